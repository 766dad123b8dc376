"""What performs decisions: loop.py says what a record does, embedded.py and kafka.py make it happen."""

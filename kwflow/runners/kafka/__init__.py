"""The Kafka runner: `runner.py` is the loop, `takeover.py` manages the partitions, `transaction.py` commits.  Everything that knows the broker lives here."""

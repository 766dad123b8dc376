"""The pure engine: what a record does to an instance.  Knows no Kafka, clock, chance, thread or file."""

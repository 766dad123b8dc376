"""The pure engine: what a record does to an instance.  It knows no Kafka, clock, randomness, threads or files."""

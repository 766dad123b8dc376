"""The Kafka runner: `runner.py` is the loop, `takeover.py` has the partitions, `transaction.py` commits; everything that knows the broker lives here."""

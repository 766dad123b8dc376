"""A client that answers every question at once.  Arguments: BOOTSTRAP QUESTIONS ANSWERS."""

from __future__ import annotations

import sys

from confluent_kafka import Consumer, Producer, TopicPartition


def main(bootstrap: str, questions: str, answers: str) -> None:
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": "bench-echo", "isolation.level": "read_committed", "fetch.wait.max.ms": 10, "log_level": 0})
    partitions = consumer.list_topics(questions, timeout=10).topics[questions].partitions
    consumer.assign([TopicPartition(questions, p, consumer.get_watermark_offsets(TopicPartition(questions, p), timeout=10)[1]) for p in partitions])
    producer = Producer({"bootstrap.servers": bootstrap, "partitioner": "murmur2_random", "linger.ms": 1, "log_level": 0})
    while True:
        first = consumer.poll(1)
        for message in [first, *consumer.consume(999, 0)] if first is not None else []:
            if message.error() is None:
                producer.produce(answers, b'{"ref":"r","value":1}', message.key())
        producer.poll(0)


if __name__ == "__main__":
    main(*sys.argv[1:])

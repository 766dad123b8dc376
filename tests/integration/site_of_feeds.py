"""Feeds of a topic whose records say what they are to become; each application of the tests has its own."""

import os
import pathlib
from dataclasses import dataclass

import kwflow as kw

TOPIC = os.environ["FEEDS_TEST_TOPIC"]
HERE = pathlib.Path(os.environ["FEEDS_TEST_DIRECTORY"])


@dataclass
class Event:
    kind: str
    id: str
    number: int = 0


@kw.feed(TOPIC)
def events(event: Event, record: kw.Record):
    match event.kind:
        case "start":
            return kw.Start(event.id, event.number, workflow=twice)
        case "count":
            return kw.Signal(event.id, "count", event.number, start="sums")
        case "both":  # a generator is accepted as well
            return (kw.Signal(f"{event.id}-{name}", "count", event.number, start=sums) for name in "ab")
        case "die":
            if not (HERE / "mended").exists():
                os._exit(9)
            return kw.Start(event.id, event.number, workflow=twice)
        case "unless mended":
            if not (HERE / "mended").exists():
                raise ValueError(event.id)
            return kw.Start(event.id, [record.topic, record.partition, record.offset, (record.key or b"").decode()], workflow="shown")
    return None


@kw.workflow
def twice(number: int):
    return 2 * number


@kw.workflow
def shown(what):
    return what


@kw.workflow
def sums(_):
    """Of the numbers until a zero comes; how many there were, and whether they came in order."""
    numbers = []
    while number := (yield kw.wait_signal("count")):
        numbers.append(number)
    return [len(numbers), sum(numbers), numbers == sorted(numbers)]

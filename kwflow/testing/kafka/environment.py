"""An Environment (runners/kafka/environment.py) on a simulated broker: one process, its clients and its disk."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import cast

from confluent_kafka.admin import AdminClient

from kwflow.runners.kafka.environment import Consumer, Database, Producer, Settings
from kwflow.testing.kafka.admin import SimulatedAdmin
from kwflow.testing.kafka.broker import Broker
from kwflow.testing.kafka.consumer import SimulatedConsumer
from kwflow.testing.kafka.producer import SimulatedProducer
from kwflow.testing.kafka.time import Host

__all__ = ["Disk", "SimulatedEnvironment"]


class Disk:
    """The databases of one machine.  They outlive its processes, and each batch is written as a whole."""

    def __init__(self) -> None:
        self.databases: dict[Path, _Content] = {}

    def release(self) -> None:
        """Release all locks, as when the process has ended."""
        for content in self.databases.values():
            content.held = False


class _Content:
    def __init__(self) -> None:
        self.values: dict[bytes, bytes] = {}
        self.keys: list[bytes] = []
        self.held = False
        self.damaged = False


class _Database:
    """One opened database."""

    def __init__(self, content: _Content, host: Host) -> None:
        if content.held:
            raise Exception("another process holds the lock of this database")  # a plain Exception, as rocksdict raises; an OSError means that the machine lacks something
        if content.damaged:
            raise Exception("the database is damaged")
        content.held = True
        self._content = content
        self._host = host

    def get(self, key: bytes) -> bytes | None:
        return self._content.values.get(key)

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Yield the entries whose keys exist when the iteration begins."""
        keys = self._content.keys
        begin = end = bisect.bisect_left(keys, max(prefix, start))
        while end < len(keys) and keys[end].startswith(prefix):
            end += 1
        for key in keys[begin:end]:
            yield key, self._content.values[key]

    def write(self, changes: Iterable[tuple[bytes, bytes | None]]) -> None:
        pairs = list(changes)
        self._host.call("database-write")
        content = self._content
        for key, value in pairs:
            known = key in content.values
            if value is not None:
                content.values[key] = value
                if not known:
                    bisect.insort(content.keys, key)
            elif known:
                del content.values[key]
                del content.keys[bisect.bisect_left(content.keys, key)]
        self._host.answered("database-write")

    def close(self) -> None:
        self._content.held = False


class SimulatedEnvironment:
    """The environment of one runner; runners of one process share the host, those of one machine the disk."""

    def __init__(self, broker: Broker, host: Host | None = None, disk: Disk | None = None) -> None:
        self.broker = broker
        self.host = host or Host(broker.time)
        self.disk = disk or Disk()

    def consumer(self, settings: Settings) -> Consumer:
        return SimulatedConsumer(self.broker, self.host, settings)

    def producer(self, settings: Settings) -> Producer:
        return SimulatedProducer(self.broker, self.host, settings)

    def admin(self, settings: Settings) -> AdminClient:
        return cast(AdminClient, SimulatedAdmin(self.broker, self.host))

    def database(self, directory: Path) -> Database:
        self.host.call("database-open")
        return _Database(self.disk.databases.setdefault(directory, _Content()), self.host)

    def wipe(self, directory: Path) -> None:
        self.host.call("database-wipe")
        self.disk.databases.pop(directory, None)

    def monotonic(self) -> float:
        return self.broker.time.now / 1000

    def sleep(self, seconds: float) -> None:
        self.host.wait(self.broker.time.now + 1000 * seconds)

    def background(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        return self.host.background(name, work)

"""What the Kafka runner gets from outside: its clients, its local database, background work, and the passing of time.

`LIVE` creates clients of confluent-kafka and RocksDB databases.  The simulated broker of `kwflow.testing` creates others with
the same interface, so that the simulation tests the unchanged runner.  Every object that the runner does not implement
itself is created here.
"""

from __future__ import annotations

import errno
import os
import shutil
import threading
import time
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, Protocol, TypeVar, cast

import confluent_kafka
from confluent_kafka import KafkaError, Message, TopicPartition
from confluent_kafka.admin import AdminClient
from rocksdict import WriteBatch

from kwflow.errors import TransportError, UsageError
from kwflow.runners import rocks
from kwflow.runners.kafka.broker_errors import BrokerErrors
from kwflow.runners.private import private
from kwflow.tokens import Token

__all__ = ["LIVE", "Consumer", "Database", "Environment", "Producer", "live", "made"]

Settings = dict[str, Any]
_DAMAGED = "damaged"  # the name of a file that marks its database's directory as damaged
_LACKING = {  # errors in RocksDB's words when the machine lacks something, which is no damage -> the remedy
    os.strerror(code): "; each partition needs at least seven open files: raise the limit (ulimit -n)" if code == errno.EMFILE else ""
    for code in (errno.EMFILE, errno.ENFILE, errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EACCES)
}
Rebalanced = Callable[[Any, list[TopicPartition]], None]


class Consumer(Protocol):
    """The part of `confluent_kafka.Consumer` that is used.  Callbacks run inside poll and consume; errors arrive as messages in the list."""

    def subscribe(self, topics: list[str], on_assign: Rebalanced = ..., on_revoke: Rebalanced = ..., on_lost: Rebalanced = ...) -> None: ...
    def unsubscribe(self) -> None: ...
    def assign(self, partitions: list[TopicPartition]) -> None: ...
    def incremental_assign(self, partitions: list[TopicPartition]) -> None: ...
    def incremental_unassign(self, partitions: list[TopicPartition]) -> None: ...
    def pause(self, partitions: list[TopicPartition]) -> None: ...
    def resume(self, partitions: list[TopicPartition]) -> None: ...
    def seek(self, partition: TopicPartition) -> None: ...
    def poll(self, timeout: float) -> Message | None: ...
    def consume(self, num_messages: int, timeout: float) -> list[Message]: ...
    def position(self, partitions: list[TopicPartition]) -> list[TopicPartition]: ...
    @property
    def commit(self) -> Callable[..., Any]: ...
    def committed(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]: ...
    def get_watermark_offsets(self, partition: TopicPartition, timeout: float) -> tuple[int, int]: ...
    def offsets_for_times(self, partitions: list[TopicPartition], timeout: float) -> list[TopicPartition]: ...
    def consumer_group_metadata(self) -> object: ...
    def close(self) -> None: ...


class Producer(Protocol):
    """The part of `confluent_kafka.Producer` that is used."""

    def __len__(self) -> int: ...
    def init_transactions(self, timeout: float) -> None: ...
    def begin_transaction(self) -> None: ...
    @property
    def produce(self) -> Callable[..., None]: ...
    def poll(self, timeout: float) -> int: ...
    def flush(self, timeout: float) -> int: ...
    def send_offsets_to_transaction(self, positions: list[TopicPartition], group_metadata: object, timeout: float) -> None: ...
    def commit_transaction(self, timeout: float) -> None: ...
    def abort_transaction(self, timeout: float) -> None: ...


class Database(Protocol):
    """An ordered map of bytes that outlives the process; `write` is atomic."""

    def get(self, key: bytes) -> bytes | None: ...

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        """Entries whose key starts with the prefix, in key order, from `start` on."""

    def write(self, changes: Iterable[tuple[bytes, bytes | None]]) -> None:
        """Write all of these changes, or none; None deletes."""

    def close(self) -> None: ...


class Environment(Protocol):
    """Creates clients (settings are librdkafka's) and databases, and provides the time for waiting."""

    def consumer(self, settings: Settings) -> Consumer: ...
    def producer(self, settings: Settings) -> Producer: ...
    def admin(self, settings: Settings) -> AdminClient: ...

    def database(self, directory: Path) -> Database:
        """Open a database, and create it if it is missing.  Raises OSError for a lack of open files, space or rights, and other errors if it is damaged."""

    def wipe(self, directory: Path) -> None:
        """Remove a database that nobody has open."""

    def monotonic(self) -> float:
        """Seconds on a clock that never goes back."""

    def sleep(self, seconds: float) -> None: ...

    def background(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        """Run the work in the background; the returned function waits for its end."""


class _Rocks:
    """RocksDB with the WAL on and without sync: the changelog is the truth (K8).  A database that turns out to be damaged is not opened again."""

    def __init__(self, directory: Path, bytes_max: int) -> None:
        self._directory = directory
        if (directory / _DAMAGED).exists():
            raise TransportError(f"{directory} is damaged")
        try:
            self._db = rocks.opened(private(directory), bytes_max)
        except Exception as error:
            remedy = _remedy(error)
            if remedy is None:
                raise
            raise OSError(f"{error}{remedy}") from None
        self._place = rocks.Place(directory)

    def get(self, key: bytes) -> bytes | None:
        try:
            found: bytes | None = self._db.get(key)
        except Exception as error:  # rocksdict has no class of its own for it
            raise self._failed(error) from None
        return found

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        try:
            yield from rocks.entries(self._db, prefix, start)
        except Exception as error:
            raise self._failed(error) from None

    def _failed(self, error: Exception) -> TransportError:
        """The error that ends this process.  The next process creates a damaged copy anew."""
        remedy = _remedy(error) or ""
        if "Corruption" in str(error):
            (self._directory / _DAMAGED).touch()
            remedy = "; it is rebuilt at the next start"
        return TransportError(f"the copy in {self._directory} cannot be used: {error}{remedy}")

    def write(self, changes: Iterable[tuple[bytes, bytes | None]]) -> None:
        batch = WriteBatch(raw_mode=True)
        for key, value in changes:
            if value is None:
                batch.delete(key)
            else:
                batch.put(key, value)
        if self._place.is_left():
            raise TransportError(f"the copy in {self._directory} was removed, moved or replaced while this engine was running; the next start restores it from the changelog")
        try:
            self._db.write(batch)
        except Exception as error:
            raise self._failed(error) from None

    def close(self) -> None:
        try:
            self._place.close(self._db)
        except Exception as error:
            raise self._failed(error) from None


def _remedy(error: Exception) -> str | None:
    """The remedy if the machine lacks something, perhaps empty; None for any other error."""
    return next((remedy for lacking, remedy in _LACKING.items() if lacking in str(error)), None)


_C = TypeVar("_C")
_SLEEPING = ("2.13.0", "2.13.2", "2.14.0", "2.14.2", "2.15.0", "2.16.0", "2.16.1")  # versions of confluent-kafka whose constructors are known to sleep at their end


def made(client: type[_C], settings: Settings) -> _C:
    """Create a client of confluent-kafka.  Raises UsageError for settings that librdkafka does not know, or files that it cannot read, TransportError if it gets no token."""
    try:
        _check_bearer(settings)
        return _made_with_token(client, settings) if "oauth_cb" in settings else client(settings)  # type: ignore[call-arg]  # each of them takes a dict
    except confluent_kafka.KafkaException as error:
        text = error.args[0].str()
        if error.args[0].code() == KafkaError.SASL_AUTHENTICATION_FAILED:
            raise TransportError(f"config [kafka]: {text}") from None
        raise UsageError(f"config [kafka]: {text}{_unread(text, settings)}") from None


def _check_bearer(settings: Settings) -> None:
    """Raises UsageError where librdkafka would wait for a token that nobody gets, or get one that nobody asks for."""
    bearer = settings.get("sasl.mechanism", settings.get("sasl.mechanisms")) == "OAUTHBEARER" and str(settings.get("security.protocol", "")).upper().startswith("SASL")
    if "oauth_cb" in settings and not bearer:
        raise UsageError('config [kafka]: oauth_cb needs "sasl.mechanism" = "OAUTHBEARER" and "security.protocol" = "SASL_SSL"')
    if bearer and not settings.keys() & {"oauth_cb", "sasl.oauthbearer.method", "enable.sasl.oauthbearer.unsecure.jwt"}:
        raise UsageError('config [kafka]: OAUTHBEARER needs a source of tokens: "sasl.oauthbearer.method" = "oidc", or "oauth_cb" = "module:function"')


def _made_with_token(client: type[_C], settings: Settings) -> _C:
    """Create a client that gets its tokens from `oauth_cb`, and reports with its other errors why there is no new one.  Raises TransportError, KafkaException.

    1. The constructor of confluent-kafka sleeps a whole second before it looks whether there is a token, and gives up after ten.
    2. An engine creates a client or two for each partition that it takes over, and would be busy with that for half a minute; `kwflow list` would take ten seconds.
    3. So we ask for the token first, and leave the constructor to a thread: the sleep is the last thing that it does, and the client is complete before.
    """
    tokens, config, errors = settings["oauth_cb"], settings.get("sasl.oauthbearer.config"), settings.get("error_cb", BrokerErrors())
    tokens(None if config is None else str(config))
    there = threading.Event()

    def token(config: str | None) -> Token:
        found: Token = tokens(config, errors.report)
        there.set()
        return found

    asked = settings | {"oauth_cb": token}
    if getattr(confluent_kafka, "__version__", "") not in _SLEEPING:
        return client(asked)  # type: ignore[call-arg]
    made: Any = client.__new__(client)
    failed: list[BaseException] = []

    def construct() -> None:
        try:
            made.__init__(asked)
        except BaseException as error:
            failed.append(error)
        there.set()

    threading.Thread(target=construct, name="kwflow-client-with-token", daemon=True).start()
    there.wait()
    if failed:
        raise failed[0]
    return cast(_C, made)


def _unread(text: str, settings: Settings) -> str:
    """Details about the file whose setting the error names: OpenSSL says neither which file it is, nor what is wrong with it."""
    for name, path in settings.items():
        if name.endswith(".location") and name in text:
            try:
                open(path, "rb").close()
            except OSError as error:
                return f" ({path}: {error.strerror})"
            return f" ({path}" + (f"; is {name.replace('location', 'password')} right, and the certificate made for this key?)" if "key" in name else ")")
    return ""


class _Admin(AdminClient):
    """An admin client whose metadata request, which comes first, says why there is no broker."""

    def __init__(self, settings: Settings) -> None:
        self._errors: BrokerErrors = settings["error_cb"]
        super().__init__(settings)

    def list_topics(self, *arguments: Any, **named: Any) -> Any:
        try:
            return super().list_topics(*arguments, **named)
        except confluent_kafka.KafkaException as error:
            self.poll(0)  # an admin client's error callback is called nowhere else
            cause = error.args[0]
            raise confluent_kafka.KafkaException(KafkaError(cause.code(), self._errors.with_cause(cause))) from None


class _Live:
    """The real environment.  All databases share `rocksdb_bytes_max` bytes of memory, and all clients together report an unreachable broker once."""

    def __init__(self, rocksdb_bytes_max: int, on_log: Callable[[str], None] | None = None) -> None:
        self._bytes_max = rocksdb_bytes_max
        self._errors = {"error_cb": BrokerErrors(on_log)} if on_log is not None else {}

    def consumer(self, settings: Settings) -> Consumer:
        return made(confluent_kafka.Consumer, settings | self._errors)

    def producer(self, settings: Settings) -> Producer:
        return made(confluent_kafka.Producer, settings | self._errors)

    def admin(self, settings: Settings) -> AdminClient:
        return made(_Admin, settings | {"error_cb": BrokerErrors()})

    def database(self, directory: Path) -> Database:
        return _Rocks(directory, self._bytes_max)

    def wipe(self, directory: Path) -> None:
        shutil.rmtree(directory)

    def monotonic(self) -> float:
        return time.monotonic()

    def sleep(self, seconds: float) -> None:
        time.sleep(seconds)

    def background(self, name: str, work: Callable[[], None]) -> Callable[[], None]:
        thread = threading.Thread(target=work, name=name, daemon=True)
        thread.start()
        return thread.join


def live(rocksdb_bytes_max: int, on_log: Callable[[str], None] | None = None) -> Environment:
    """Create a real environment; `on_log` is told why there is no broker."""
    return _Live(rocksdb_bytes_max, on_log)


LIVE = live(128 * 1024 * 1024)

"""`GET /health`, `/metrics` and `/instances` of a running engine, served on a thread of its own that only reads.

All metrics are computed on request, from numbers that the loop keeps anyway (runners/stats.py), so an engine that nobody
watches pays nothing.
"""

from __future__ import annotations

import contextlib
import socket
import threading
import time
from collections.abc import Iterable, Iterator, Sequence
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any, Protocol
from urllib.parse import unquote

import msgspec
from prometheus_client import REGISTRY, CollectorRegistry, generate_latest
from prometheus_client.core import CounterMetricFamily, GaugeMetricFamily, HistogramMetricFamily, Metric
from prometheus_client.registry import Collector

from kwflow.config import Config
from kwflow.errors import UsageError
from kwflow.runners import instances, rocks
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.instances import Instances
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.parked import holding
from kwflow.runners.stats import Durations, Histogram, Seen, Stats
from kwflow.runners.timers import TimerProcessor

__all__ = ["Watched", "advertised", "health", "is_live", "metrics_registry", "serve_http"]

_STUCK_S = 60  # beyond the longest step: a commit may be retried for twice the transaction timeout
_REQUEST_S = 10
_EVERY = ("", "0.0.0.0", "[::]")


class Watched(Protocol):
    """The part of a runner that is watched."""

    @property
    def stats(self) -> Stats: ...

    @property
    def watched_processors(self) -> Sequence[object]: ...

    def seen(self) -> list[Seen]:
        """The present state of each of its inputs.  Called from another thread; it may ask the broker."""

    def instances(self) -> Instances | None:
        """The instances that it has now; None if it runs no workflows.  Called from another thread."""


def health(runners: Sequence[Watched], config: Config) -> tuple[bool, bool, dict[str, Any]]:
    """Whether the engine is live (each loop came round lately), whether it is ready (its partitions are owned and restored), and both with details, for JSON."""
    live = is_live(runners, config)
    seen = [(runner, one) for runner in runners for one in runner.seen()]
    ready = bool(seen) and all(one.ready and runner.stats.turned_s > 0 for runner, one in seen)
    return live, ready, {"live": live, "ready": ready, "runners": [_details(one) for _, one in seen]}


def _details(one: Seen) -> dict[str, Any]:
    restoring = {str(number): reached for number, reached in one.restoring.items()}
    return {"name": one.name, "input": one.topic, "owned": one.owned, "restoring": restoring, "waiting": one.waiting, "lag": sum(one.lag.values())}


def is_live(runners: Sequence[Watched], config: Config) -> bool:
    """Whether each loop that has begun came round lately.  Asks no broker: an unreachable one is no reason to restart an engine."""
    now, limit = time.monotonic(), config.step_abort_ms / 1000 + _STUCK_S
    return all(now - runner.stats.turned_s < limit for runner in runners if runner.stats.turned_s)


class _Metrics(Collector):
    def __init__(self, runners: Sequence[Watched], config: Config) -> None:
        self._runners = runners
        self._config = config

    def collect(self) -> Iterable[Metric]:
        yield from self._counts()
        yield from self._runs()
        yield from self._partitions([one for runner in self._runners for one in runner.seen()])
        for runner in self._runners:
            served = runner.instances()
            if served is not None:
                held = sum(holding(page) for page in served.pages.values())
                yield GaugeMetricFamily("kwflow_instances_holding", "Instances that hold records: parked, or paused.  At most 10,000 of a partition are counted.", value=held)
            for processor in runner.watched_processors:
                if isinstance(processor, WorkflowProcessor):
                    yield from _instances(processor)
                if isinstance(processor, TimerProcessor):
                    yield _histogram("kwflow_timer_late_seconds", "Time from when a timer was due until it fired.", [processor.lateness])
                dispatcher = processor.dispatcher if isinstance(processor, WorkflowProcessor) else processor
                if isinstance(dispatcher, Dispatcher):
                    yield from _activities(dispatcher)
        memory = GaugeMetricFamily("kwflow_rocksdb_bytes", "Block cache and write buffers of all stores of the process.")
        memory.add_metric([], rocks.memory(self._config.rocksdb_bytes_max).usage())
        yield memory

    def _counts(self) -> Iterator[Metric]:
        records = CounterMetricFamily("kwflow_records", "Records and timers processed, by outcome.", labels=["outcome"])
        total = sum((runner.stats.counts.copy() for runner in self._runners), start=self._runners[0].stats.counts.__class__())
        for outcome, count in sorted(total.items()):
            records.add_metric([outcome], count)
        yield records
        letters = CounterMetricFamily("kwflow_dead_letters", "Records written to the dead-letter topic: single records, or notices of parked instances.")
        letters.add_metric([], total["dead-letter"] + total["parked"])
        yield letters
        steps = CounterMetricFamily("kwflow_steps", "Steps of author code, by outcome.", labels=["outcome"])
        for outcome in ("started", "resumed", "parked"):
            steps.add_metric([outcome], total[outcome])
        yield steps
        yield _histogram("kwflow_commit_seconds", "Time from the beginning of a transaction to its commit.", [runner.stats.commits for runner in self._runners])

    def _runs(self) -> Iterator[Metric]:
        started = CounterMetricFamily("kwflow_workflows_started", "Runs that were started or forked.", labels=["workflow"])
        parked = CounterMetricFamily("kwflow_workflows_parked", "How often an instance was parked.", labels=["workflow"])
        for runner in self._runners:
            for family, counted in ((started, runner.stats.started), (parked, runner.stats.parked)):
                for workflow, count in counted.copy().items():
                    family.add_metric([workflow], count)
        yield from (started, parked)
        yield _durations("kwflow_workflow_seconds", "Time from the start of a run to its end.", ["workflow", "outcome"], [runner.stats.ended for runner in self._runners])

    def _partitions(self, seen: list[Seen]) -> Iterator[Metric]:
        lag = GaugeMetricFamily("kwflow_lag_records", "Input records that are committed but not applied yet.", labels=["topic", "partition"])
        owned = GaugeMetricFamily("kwflow_partitions", "Partitions by state: owned, restoring, waiting to be restored.", labels=["topic", "state"])
        restore = GaugeMetricFamily("kwflow_restore_ratio", "How much of a changelog has been read, from 0 to 1; 1 once the partition is owned.", labels=["topic", "partition"])
        for one in seen:
            for number, records in one.lag.items():
                lag.add_metric([one.topic, str(number)], records)
            for state, count in (("owned", len(one.owned)), ("restoring", len(one.restoring)), ("waiting", len(one.waiting))):
                owned.add_metric([one.topic, state], count)
            for number, (reached, end) in one.restoring.items():
                restore.add_metric([one.topic, str(number)], min(1.0, reached / end) if end else 1.0)
            for number in one.owned:
                restore.add_metric([one.topic, str(number)], 1.0)
        yield from (lag, owned, restore)
        waiting = [one.timers for one in seen if one.timers is not None]
        if waiting:
            yield GaugeMetricFamily("kwflow_timers_waiting", "Timers that are set but not due yet, of the partitions owned here.", value=sum(waiting))


def _instances(processor: WorkflowProcessor) -> Iterator[Metric]:
    yield _histogram("kwflow_snapshot_bytes", "Sizes of saved snapshots.", [processor.snapshots])
    looked = CounterMetricFamily("kwflow_instance_cache", "Whether an instance was still in memory when its next record came.", labels=["result"])
    looked.add_metric(["hit"], processor.live.hits)
    looked.add_metric(["miss"], processor.live.misses)
    yield looked
    yield GaugeMetricFamily("kwflow_instances_live", "Instances kept in memory.", value=len(processor.live))


def _activities(dispatcher: Dispatcher) -> Iterator[Metric]:
    calls = GaugeMetricFamily("kwflow_activities", "Activities in this process; more may wait in the store. Left behind: cancelled, but still running.", labels=["state"])
    for state, count in dispatcher.counts().items():
        calls.add_metric([state], count)
    yield calls
    yield _durations("kwflow_activity_wait_seconds", "Time from a call of an activity until the attempt begins here.", ["activity"], [dispatcher.waited])
    yield _durations("kwflow_activity_seconds", "Time that an attempt of an activity took.", ["activity", "outcome"], [dispatcher.ran])


def _histogram(name: str, text: str, parts: Sequence[Histogram]) -> Metric:
    whole = Histogram(parts[0].bounds)
    for part in parts:
        whole.counts = [one + other for one, other in zip(whole.counts, part.counts, strict=True)]
        whole.total += part.total
    return HistogramMetricFamily(name, text, buckets=whole.buckets(), sum_value=whole.total)


def _durations(name: str, text: str, labels: Sequence[str], parts: Sequence[Durations]) -> Metric:
    family = HistogramMetricFamily(name, text, labels=labels)
    for part in parts:
        for values, histogram in sorted(part.copy().items()):
            family.add_metric(values, histogram.buckets(), histogram.total)
    return family


def metrics_registry(runners: Sequence[Watched], config: Config) -> CollectorRegistry:
    """Return a registry for these runners alone, so that two engines in one process do not collide, with what is in everybody's: numbers of the process, and those that activities keep."""
    registry = CollectorRegistry()
    registry.register(_Metrics(runners, config))
    registry.register(REGISTRY)
    return registry


def _address(where: str) -> tuple[str, int]:
    host, _, port = where.rpartition(":")
    if not port.isdigit() or int(port) > 65_535:
        raise UsageError(f"--http must be HOST:PORT, such as 127.0.0.1:9100 or :9100, not {where!r}")
    return host.strip("[]"), int(port)


def advertised(config: Config, port: int) -> str:
    """HOST:PORT at which others reach a listener on this port: as configured, or as it was bound; the host's name if it was bound to every address."""
    told = config.http_advertised or ""
    if told.count(":") > 1 and not told.startswith("["):  # a bare IPv6 address, as Kubernetes gives it
        return f"[{told}]:{port}"
    host, _, configured = told.rpartition(":")
    if configured.isdigit() and host:
        return f"{host}:{int(configured) + config.process}"
    bound = (config.http or "").rpartition(":")[0]
    return f"{told or (socket.gethostname() if bound in _EVERY else bound)}:{port}"


class _Server(ThreadingHTTPServer):
    """A server that prints nothing into the engine's log."""

    daemon_threads = True

    def __init__(self, address: tuple[str, int], handler: type[BaseHTTPRequestHandler]) -> None:
        self.address_family = socket.AF_INET6 if ":" in address[0] else socket.AF_INET
        super().__init__(address, handler)

    def handle_error(self, request: object, client_address: object) -> None:
        """Ignore it: a connection that broke is no problem of the engine."""


@contextlib.contextmanager
def serve_http(where: str, runners: Sequence[Watched], config: Config) -> Iterator[int]:
    """Serve while inside of this, and yield the port.  Raises UsageError if the address cannot be listened on."""
    registry = metrics_registry(runners, config)

    class Handler(BaseHTTPRequestHandler):
        timeout = _REQUEST_S
        begun = False

        def do_GET(self) -> None:
            try:
                self._get()
            except ConnectionError:
                """Whoever asked has gone."""
            except Exception as error:
                if not self.begun:
                    self._answer(500, "text/plain", f"{type(error).__name__}: {error}\n".encode())

        def _get(self) -> None:
            path = self.path.partition("?")[0]
            served = next((found for runner in runners if (found := runner.instances()) is not None), None) if path.startswith("/instances") else None
            if path == "/metrics":
                self._answer(200, "text/plain; version=0.0.4; charset=utf-8", generate_latest(registry))
            elif path == "/health/live":
                live = is_live(runners, config)
                self._answer(200 if live else 503, "application/json", msgspec.json.encode({"live": live}))
            elif path in ("/health", "/health/ready"):
                live, ready, said = health(runners, config)
                good = live and ready if path == "/health" else ready
                self._answer(200 if good else 503, "application/json", msgspec.json.encode(said, order="deterministic"))
            elif path == "/instances" and served is not None:
                self._list(served, self.path.partition("?")[2])
            elif path.startswith("/instances/") and served is not None:
                status, body = instances.one(served, unquote(path.removeprefix("/instances/")).encode("utf-8", "surrogateescape"), config.signing_keys)
                self._answer(status, "application/json", body, served)
            else:
                self._answer(404, "text/plain", b"there are /health, /health/live, /health/ready, /metrics, and where workflows run /instances and /instances/ID\n")

        def _list(self, served: Instances, query: str) -> None:
            status, body = instances.several(served, query)
            self._head(status, "application/json", served)
            for part in body:
                self.wfile.write(part)

        def _answer(self, status: int, kind: str, body: bytes, served: Instances | None = None) -> None:
            self._head(status, kind, served, ("Content-Length", str(len(body))))
            self.wfile.write(body)

        def _head(self, status: int, kind: str, served: Instances | None, *more: tuple[str, str]) -> None:
            self.begun = True
            about = [("Kwflow-Engine", served.engine), ("Kwflow-Partitions", ",".join(map(str, sorted(served.pages))))] if served is not None else []
            self.send_response(status)
            for name, value in (("Content-Type", kind), *about, *more):
                self.send_header(name, value)
            self.end_headers()

        def log_message(self, format: str, *args: object) -> None:
            """Log nothing: probes come every few seconds."""

    try:
        server = _Server(_address(where), Handler)
    except OSError as error:
        raise UsageError(f"--http {where}: {error.strerror}") from None
    thread = threading.Thread(target=server.serve_forever, name="kwflow-http", kwargs={"poll_interval": 0.2}, daemon=True)
    thread.start()
    try:
        yield server.server_address[1]
    finally:
        server.shutdown()
        server.server_close()
        thread.join(5)

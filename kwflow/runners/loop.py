"""The processor of workflows, which every runner runs: what lasts from batch to batch.  `batch.py` decides what the records of one do.

This module must not know a log, a store on disk or a clock.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import msgspec

from kwflow import api, flows
from kwflow.config import Config
from kwflow.core import wire
from kwflow.core.contract import Topics, Workflows
from kwflow.core.wire import Record
from kwflow.durable import allow_classes_by_value, allow_modules, set_abandoning, versions
from kwflow.durable.versions import Sources, no_sources
from kwflow.errors import ProtocolError, RefusedError, SnapshotError
from kwflow.ports import Budget, Changes, Decision, Deliver, Store
from kwflow.runners import code, commands, deployment, feeds, parked
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.activities.heart import kept
from kwflow.runners.batch import WorkflowBatch
from kwflow.runners.checkpoints import Checkpoints
from kwflow.runners.ended import EndedTable
from kwflow.runners.history import History
from kwflow.runners.live import LiveInstances
from kwflow.runners.stats import BYTES, Histogram
from kwflow.runners.tracing import Tracing
from kwflow.runners.watchdog import Watchdog

__all__ = ["WorkflowProcessor"]

_LOADED_UNSEEN_MAX = 16  # at a takeover, so many old versions of code are loaded without looking whether a snapshot names them


class WorkflowProcessor:
    """Runs workflow instances: one step for each record of `workflow-resume`."""

    def __init__(
        self, config: Config, workflows: Workflows, declared: frozenset[str], incarnation: str = "", on_log: Callable[[str], None] = print, sources: Sources | None = None
    ) -> None:
        """`sources` looks up the code store.  Without it no code is stored, and an instance whose code has changed is parked."""
        self.config = config
        self.on_log = on_log
        self.dispatcher: Dispatcher | None = None
        self.partitions = 1
        self.keeps_code = sources is not None
        self.sources = sources or no_sources
        self.queues = False  # set by a runner whose topics workers can read; otherwise activities with a queue also run here
        self.at_least_once = False  # set by a runner that may read a record twice: then every ended run leaves an entry
        self.input_topic = config.resume_topic
        self.changelog_topic = config.changelog_topic
        self.incarnation = incarnation
        self.workflows = Workflows({**flows.workflows(), **workflows.functions}, workflows.default, workflows.migrations)
        self.topics = Topics(config.resume_topic, config.result_topic or None, config.error_topic or None, config.scheduler_topic, declared)
        self.limits = config.limits
        self._prepared: dict[str, frozenset[str]] = {}  # `<module>@<sha256>` -> the topics that were declared when it and what it needs were loaded
        self.watchdog = Watchdog(config.step_timeout_ms, config.step_abort_ms, on_log)
        self.fed = feeds.Fed(config, self.watchdog)
        self.history = History(config) if config.history_topic else None
        self.checkpoints = Checkpoints(config, self.workflows.functions)
        self.live = LiveInstances(config)
        self.ended = EndedTable(config)
        self.snapshots = Histogram(BYTES)
        self.tracing = Tracing(None, config.header_bytes_max) if config.tracing else None
        allow_modules(config.snapshot_modules)
        allow_classes_by_value(config.snapshot_cloudpickle)

    def work(self, deliver: Deliver) -> Dispatcher:
        config = self.config
        span = self.tracing.call if self.tracing is not None else None
        limits = config.activity_concurrency, config.activity_limit_s, config.activity_bytes_max, config.value_bytes_max
        self.dispatcher = Dispatcher(deliver, self.on_log, *limits, span=span, rate=config.activity_rate, details=kept(config.signing_keys))
        return self.dispatcher

    def due(self, state: Changes, now_ms: int, limit: int) -> Decision | None:
        """Forget ended instances whose `ended_retention_ms` is over."""
        return self.ended.due(state, now_ms, limit)

    def next_due_ms(self, store: Store) -> int | None:
        return self.ended.next_due_ms(store)

    def decide(self, state: Changes, records: Sequence[Record], received_ms: int, budget: Budget | None = None) -> list[Decision]:
        before = set_abandoning(True)  # semantics §3.3: an instance dropped here is only forgotten, without its cleanup
        batch = WorkflowBatch(self, state, records, received_ms, budget)
        try:
            return batch.run()
        finally:
            for live in batch.live.values():  # only after a bug or KeyboardInterrupt: nothing of them was saved
                live.forget()
            set_abandoning(before)

    def refuse(self, state: Changes, record: Record, reason: str, topic: str = "") -> Decision:
        try:
            name, op = wire.workflow_id(record), wire.header(record, "kwflow-op")
            is_command = commands.takes(self.config, op, record, lambda: state.get(name.encode()))
        except ProtocolError:
            return parked.dead(self.config, record, "refused", reason, record.timestamp_ms)
        if op == feeds.OP:
            return self.fed.refuse_again(record, reason)
        if is_command:
            made = commands.refuse(self.config, state, name, record, reason)
        else:
            made = parked.park(self.config, state, name, state.get(name.encode()), record, RefusedError(reason), record.timestamp_ms)
        return made if self.history is None else self.history.refused(made, record, state.get(name.encode()), topic)

    def taken_over(self, store: Store) -> dict[str, str]:
        """Load the versions that this partition names.  None is loaded twice, as the next partition may name the same ones.

        1. A module is deployed each day, and nobody runs `kwflow code gc`.
        2. After a year hundreds of versions are stored that no instance runs any more; loading one takes 0.1 s.
        3. So beyond a few, only versions that a snapshot names are loaded: reading the header of a snapshot takes 5 us.
        """
        old, unused, run = 0, set[str](), functools.cache(lambda: deployment.run_by(store))

        def wanted(key: str) -> bool:
            nonlocal old
            old += 1
            if old > _LOADED_UNSEEN_MAX and key not in run():
                unused.add(key)
            return key not in unused

        named = code.named_in(store)
        for key in named:
            if key in self._prepared:
                continue
            self._prepared[key] = frozenset()
            try:
                with api.declaring() as declared:
                    versions.prepare(key, self.sources, wanted)
                self._prepared[key] = frozenset(declared)
            except SnapshotError as error:  # an instance that needs it is parked when it wakes, and can be retried
                self.on_log(f"{key[: key.index('@') + 13]}: {error}")
        self.allow(api.declared_topics())
        declared_by = {topic: key for key in named for topic in self._prepared[key]}
        for key in unused:  # a snapshot of the next partition may name it
            del self._prepared[key]
        return declared_by

    def allow(self, declared: frozenset[str]) -> None:
        """Allow outputs to these topics as well.  Stored versions declare topics when they are loaded; the union may be written to (semantics §9.6)."""
        if not declared <= self.topics.declared:
            self.topics = msgspec.structs.replace(self.topics, declared=self.topics.declared | declared)

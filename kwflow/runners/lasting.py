"""What lasts from batch to batch of the workflows of an engine: their functions, the topics and limits, what is kept in memory, and what is counted."""

from __future__ import annotations

from collections.abc import Callable

import msgspec

from kwflow import flows
from kwflow.config import Config
from kwflow.core.contract import Topics, Workflows
from kwflow.durable import allow_classes_by_value, allow_modules
from kwflow.durable.versions import Sources, no_sources
from kwflow.runners import feeds
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.checkpoints import Checkpoints
from kwflow.runners.ended import EndedTable
from kwflow.runners.history import History
from kwflow.runners.live import LiveInstances
from kwflow.runners.stats import BYTES, Histogram
from kwflow.runners.tracing import Tracing
from kwflow.runners.watchdog import Watchdog

__all__ = ["Lasting"]


class Lasting:
    """What the batches of one processor share."""

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

    def allow(self, declared: frozenset[str]) -> None:
        """Allow outputs to these topics as well.  Stored versions declare topics when they are loaded; the union may be written to (semantics §9.6)."""
        if not declared <= self.topics.declared:
            self.topics = msgspec.structs.replace(self.topics, declared=self.topics.declared | declared)

"""The processor of workflows, which every runner runs.  `batch.py` decides what the records of a batch do, and `lasting.py` has what lasts from batch to batch.

This module must not know a log, a store on disk or a clock.
"""

from __future__ import annotations

import functools
from collections.abc import Sequence

from kwflow import api
from kwflow.core import wire
from kwflow.core.wire import Record
from kwflow.durable import set_abandoning, versions
from kwflow.errors import ProtocolError, RefusedError, SnapshotError
from kwflow.ports import Budget, Changes, Decision, Deliver, Store
from kwflow.runners import code, commands, deployment, feeds, parked
from kwflow.runners.activities.dispatch import Dispatcher
from kwflow.runners.activities.heart import kept
from kwflow.runners.batch import WorkflowBatch
from kwflow.runners.lasting import Lasting

__all__ = ["WorkflowProcessor"]

_LOADED_UNSEEN_MAX = 16  # at a takeover, so many old versions of code are loaded without looking whether a snapshot names them


class WorkflowProcessor(Lasting):
    """Runs workflow instances: one step for each record of `workflow-resume`."""

    def work(self, deliver: Deliver) -> Dispatcher:
        config = self.config
        span = self.tracing.call if self.tracing is not None else None
        limits = config.activity_concurrency, config.activity_limit_s, config.activity_bytes_max, config.value_bytes_max
        self.dispatcher = Dispatcher(deliver, self.on_log, *limits, span=span, rate=config.activity_rate, details=kept(config.signing_keys), hands_out=self.queues)
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

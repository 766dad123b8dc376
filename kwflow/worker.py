"""Workers: processes that run the activities of queues for an application on Kafka: `kwflow worker`, or `run` in a program (M6.6).

A worker needs the modules of its activities, and of Kafka only the topics of its queues and the engines' input topic. It keeps nothing on disk.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

from kwflow.activities import registered_activities
from kwflow.config import Config
from kwflow.errors import UsageError

if TYPE_CHECKING:
    from kwflow.runners.kafka_queues import QueueRunner

__all__ = ["queues_served", "run", "service"]


def queues_served(names: Sequence[str] = ()) -> list[str]:
    """These queues, or those of all activities of this process.  Raises UsageError for one that none of them is for."""
    known = sorted({activity.queue for activity in registered_activities().values() if activity.queue is not None})
    unknown = [name for name in names if name not in known]
    if unknown or not known:
        has = f"there are {', '.join(known)}" if known else "no activity has a queue: @kw.activity(queue=...)"
        raise UsageError(f"no activity for the queue {', '.join(unknown)} in these modules; {has}" if unknown else has)
    return list(dict.fromkeys(names)) or known


def service(config: Config, queues: Sequence[str], on_log: Callable[[str], None] = print) -> QueueRunner:
    """What serves these queues, turn by turn.  Raises TransportError when topics are missing."""
    from kwflow.runners.dispatch import Dispatcher
    from kwflow.runners.kafka_queues import QueueRunner

    return QueueRunner(
        config, queues,
        lambda deliver: Dispatcher(deliver, on_log, config.activity_concurrency, config.activity_limit_s, config.activity_bytes_max, config.value_bytes_max, ends_late=True),
        on_log,
    )  # fmt: skip


def run(config: Config, until: Callable[[], bool], queues: Sequence[str] = (), on_log: Callable[[str], None] = print) -> None:
    """Run activities of these queues (default: all that this process has) until `until()`, asked several times a second.

    Raises UsageError, and TransportError when it has to be started again.
    """
    service(config, queues_served(queues), on_log).run(until)

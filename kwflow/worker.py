"""Workers: processes that run the activities of queues for an application on Kafka, with `kwflow worker` or `run` in a program (M6.6).

A worker needs the modules of its activities, and on Kafka only the topics of its queues and the engines' input topic.  It keeps nothing on disk.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from kwflow.activities import Activity, registered_activities
from kwflow.config import Config
from kwflow.core.ops import details_of
from kwflow.core.outcomes import describe_error
from kwflow.errors import CommandError, UsageError

if TYPE_CHECKING:
    from kwflow.client import Client
    from kwflow.core.dispatch import Dispatch
    from kwflow.ports import Deliver, Store, Worker
    from kwflow.runners.kafka.queues import QueueRunner

__all__ = ["Lending", "queues_served", "run", "service"]


def queues_served(names: Sequence[str] = ()) -> list[str]:
    """Return these queues, or those of all activities that this process implements and does not merely declare.

    Raises UsageError for a queue without an activity, and for an activity of a queue that has no body here.
    """
    known: dict[str, list[Activity[Any, Any]]] = {}
    for activity in registered_activities().values():
        if activity.queue is not None:
            known.setdefault(activity.queue, []).append(activity)
    unknown = [name for name in names if name not in known]
    if unknown or not known:
        has = f"there are {', '.join(sorted(known))}" if known else "no activity has a queue; set one with @kw.activity(queue=...)"
        raise UsageError(f"no activity for the queue {', '.join(unknown)} in these modules; {has}" if unknown else has)
    served = list(dict.fromkeys(names)) or sorted(queue for queue, activities in known.items() if not all(map(_is_stub, activities)))
    stubs = sorted(activity.name for queue in served or known for activity in known[queue] if _is_stub(activity))
    if stubs:
        raise UsageError(f"activity {', '.join(stubs)} has no body in these modules, so each call would be answered with null: name the module that implements what the workflows only declare")
    return served


def _stub() -> None: ...


async def _async_stub() -> None: ...


def _documented_stub() -> None:
    """A docstring is a constant, too, so the return may load its constant by another index."""


async def _documented_async_stub() -> None:
    """The same for `async def`."""


_NOTHING = {function.__code__.co_code for function in (_stub, _async_stub, _documented_stub, _documented_async_stub)}


def _is_stub(activity: Activity[Any, Any]) -> bool:
    """Whether the activity has no batch, and the body of its function is only `...`, `pass` or a docstring."""
    code = getattr(activity.function, "__code__", None)
    return activity.batched is None and code is not None and code.co_code in _NOTHING and set(code.co_consts) <= {None, activity.function.__doc__}


def service(config: Config, queues: Sequence[str], on_log: Callable[[str], None] = print) -> QueueRunner:
    """Return the runner that serves these queues, in a process that ends with it.  Raises TransportError if topics are missing."""
    return _service(config, queues, on_log, _Details(config))


def _service(config: Config, queues: Sequence[str], on_log: Callable[[str], None], details: _Details) -> QueueRunner:
    from kwflow.runners.activities.dispatch import Dispatcher
    from kwflow.runners.kafka.queues import QueueRunner
    from kwflow.runners.tracing import Tracing

    span = Tracing(None, config.header_bytes_max).call if config.tracing else None

    def work(deliver: Deliver) -> Worker:
        limits = config.activity_concurrency, config.activity_limit_s, config.activity_bytes_max, config.value_bytes_max
        return Dispatcher(deliver, on_log, *limits, ends_late=True, span=span, rate=config.activity_rate, details=details.look)

    return QueueRunner(config, queues, work, on_log)


class _Details:
    """Asks the engines for the heartbeat details of calls.  Its client lives from the first question on, and is replaced if it has lost its broker."""

    def __init__(self, config: Config) -> None:
        self._config = config
        self._lock = threading.Lock()
        self._client: Client | None = None

    def look(self, _: Store, call: Dispatch) -> Callable[[], Any]:
        return lambda: self._ask(call)

    def _ask(self, call: Dispatch) -> Any:
        from kwflow.client import Client

        with self._lock:
            if self._client is None or self._client.lost is not None:
                self._client = Client.kafka(self._config)
            client = self._client
        try:
            header = client.query(call.workflow_id, ref=call.ref).result()
        except CommandError as error:
            if error.status != "not_found":
                raise
            return None
        return details_of(header, call.ref)

    def close(self) -> None:
        with self._lock:
            if self._client is not None:
                self._client.close()


def run(config: Config, until: Callable[[], bool], queues: Sequence[str] = (), on_log: Callable[[str], None] = print) -> None:
    """Run the activities of these queues (default: all queues of this process) until `until()` is true, which is called several times a second.

    Raises UsageError, and TransportError if it has to be started again.
    """
    details = _Details(config)
    try:
        _service(config, queues_served(queues), on_log, details).run(until)
    finally:
        details.close()


class Lending:
    """A queue whose calls others fetch, served by a thread of this process.  Use it in a `with`, or call `close`.

    If its broker goes away, it reconnects by itself; until then there is nothing to fetch.
    """

    def __init__(self, config: Config, queue: str, on_log: Callable[[str], None] = print) -> None:
        """Raises TransportError if topics are missing."""
        from kwflow.runners.activities.lent import Lent

        self.queue = queue
        self.lent = Lent()
        self._config = config
        self._on_log = on_log
        self._stopped = threading.Event()
        self._runner = self._made()
        self._thread = threading.Thread(target=self._run, name=f"kwflow-lend-{queue}", daemon=True)
        self._thread.start()

    def _made(self) -> QueueRunner:
        from kwflow.runners.kafka.queues import QueueRunner

        return QueueRunner(self._config, [self.queue], lambda _: self.lent, self._on_log, care=False)

    def _run(self) -> None:
        while not self._stopped.is_set():
            try:
                self._runner.run(self._stopped.is_set)
            except Exception as error:  # any error: otherwise callers would never again fetch anything
                self._on_log(f"queue {self.queue}: {describe_error(error)}; it is restarted")
                while not self._stopped.wait(1):
                    try:
                        self._runner = self._made()
                        break
                    except Exception:
                        """Not yet."""

    def closing(self, id: str, ref: str) -> Callable[[], None]:
        """Return what notes that this call has ended by an answer that is sent after now, or that nobody waits for it any more."""
        lent, runner = self.lent.closing(id, ref), self._runner.closing(id, ref)

        def close() -> None:
            lent()
            runner()

        return close

    def close(self) -> None:
        """Stop serving.  Locked calls may still be answered, through any gateway."""
        self._stopped.set()
        self._thread.join(10)

    def __enter__(self) -> Lending:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

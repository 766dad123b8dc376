"""An embedded engine on a thread of this process, for programs that host their own engine (a web application, a notebook)."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from kwflow import api
from kwflow.config import Config, load_config
from kwflow.core.contract import Workflows
from kwflow.durable import set_abandoning
from kwflow.feeds import registered_feeds
from kwflow.runners.code import CodeStore
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import serve
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.modules import load_workflows
from kwflow.runners.timers import TimerProcessor

__all__ = ["Hosted", "processors_of"]


def processors_of(engine: Embedded, workflows: Workflows, config: Config, on_log: Callable[[str], None]) -> tuple[WorkflowProcessor, TimerProcessor, *tuple[FeedProcessor, ...]]:
    """Return the processors that an embedded engine runs.  The sources of the code that its instances run are kept in its log (G10)."""
    topic = config.code_topic
    engine.compact(topic)
    sources = CodeStore(lambda offset: engine.read(topic, offset, engine.end(topic)), config.signing_keys)
    fed = [FeedProcessor(config, feed, on_log) for feed in registered_feeds().values()]
    return WorkflowProcessor(config, workflows, api.declared_topics(), engine.incarnation, on_log, sources), TimerProcessor(config), *fed


class Hosted:
    """An engine that runs until `close()`.  Other processes reach it through its socket, this process with `Client.embedded(hosted.engine)`.

    `workflows` are MODULE names as for `kwflow engine`, or loaded workflows.  If an error ended the engine, `close` raises it.
    """

    def __init__(self, directory: Path | str, workflows: list[str] | Workflows, config: Config | None = None, on_log: Callable[[str], None] = print) -> None:
        self.config = config or load_config()
        loaded = workflows if isinstance(workflows, Workflows) else load_workflows(workflows, packages=self.config.durable_packages)
        self._on_log = on_log
        self._stopped = False
        self._failed: BaseException | None = None
        self._thread = threading.Thread(target=self._run, name="kwflow-engine", daemon=True)
        with contextlib.ExitStack() as stack:
            stack.callback(set_abandoning, set_abandoning(True, everywhere=True), everywhere=True)  # while the engine runs, on every thread of this process (semantics §3.3)
            self.engine = Embedded(Path(directory), self.config)
            stack.callback(self.engine.close)
            self._processors = processors_of(self.engine, loaded, self.config, on_log)
            stack.callback(self._processors[0].live.forget)
            stack.enter_context(serve(self.engine))
            self._thread.start()
            self._stack = stack.pop_all()

    def _run(self) -> None:
        try:
            self.engine.run(self._processors, lambda: self._stopped, self._on_log)
        except BaseException as error:
            self._failed = error

    def close(self) -> None:
        """Finish the current batch, then stop.  Close the clients first.  Raises the error that ended the engine, if one did."""
        self._stopped = True
        self.engine.wake()
        self._thread.join()
        self._stack.close()
        if self._failed is not None:
            raise self._failed

    def __enter__(self) -> Hosted:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None) -> None:
        self.close()

"""`kwflow dev`: an embedded engine that is deployed again whenever its source changes, and the console beside it.

Each deployment is one as in production: the engine ends and another one starts on the same directory, so what waits in changed
code finishes on the old code.  A change that cannot be imported deploys nothing.
"""

from __future__ import annotations

import importlib.util
import os
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Annotated

import typer

from kwflow.cli.console import prepared
from kwflow.cli.shared import AppDir, ConfigFile, Modules
from kwflow.cli.watching import carry_logging, ends_in_its_log, log_of
from kwflow.config import Config, load_config
from kwflow.errors import UsageError
from kwflow.runners.logs import Line
from kwflow.runners.supervise import PARENT

__all__ = ["dev"]

_LOOK_S = 0.3
_END_S = 30
_GRACE_S = 1  # for running activities, unless it is configured: they begin again in the next engine
_AGAIN = 3  # the exit code that asks for a restart
_WRONG = 2  # that of an engine whose modules cannot be imported


def dev(
    modules: Modules,
    embedded: Annotated[Path, typer.Option("--embedded", envvar="KWFLOW_EMBEDDED", help="Directory for the state.")] = Path("kwflow-dev"),
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="Port of the console; 0 takes a free one, which the log names.")] = 8081,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Run an embedded engine and the console while you write workflows: when a file of MODULE changes, it is deployed, and what waits continues.

    Example: kwflow dev workflows/trip_booking.py
    """
    settings = load_config(config)
    log = log_of(settings)
    carry_logging(log)
    sources = _Sources(modules, app_dir or Path.cwd())
    options = [word for name, value in (("--app-dir", app_dir), ("--config", config)) if value is not None for word in (name, str(value))]
    serve = prepared(settings, embedded, ["--embedded", str(embedded)], app_dir)
    with ends_in_its_log(settings), _Deployed([*modules, "--embedded", str(embedded), *options], sources, settings, log):
        log(f"start a workflow with: kwflow start ID --embedded {embedded}")
        serve("127.0.0.1", port, log)


class _Sources:
    """The files of some MODULEs: everything in a package, and what lies beside a file."""

    def __init__(self, modules: Iterable[str], app_dir: Path) -> None:
        """Raises UsageError for a module that is not there."""
        sys.path.insert(0, str(app_dir))
        self._roots = [root for module in modules for root in _roots(module)]
        self._seen = self._look()
        self._changed = False

    def _look(self) -> dict[Path, tuple[int, int]]:
        found = {}
        for root in self._roots:
            for path in root.rglob("*.py") if root.is_dir() else root.parent.glob("*.py"):
                try:
                    now = path.stat()
                except OSError:  # it was deleted just now
                    continue
                found[path] = now.st_mtime_ns, now.st_size
        return found

    def changed(self) -> bool:
        """Whether anything has changed since this was true last, and nothing is being written any more."""
        now = self._look()
        still, self._seen = now == self._seen, now
        ready = self._changed and still
        self._changed = not still or (self._changed and not ready)
        return ready


def _roots(module: str) -> list[Path]:
    if module.endswith(".py"):
        return [Path(module)]
    top = module.partition(".")[0]
    found = importlib.util.find_spec(top)
    if found is None:
        raise UsageError(f"{module}: no module {top} in {sys.path[0]} (--app-dir) or on Python's path")
    places = list(found.submodule_search_locations or ()) or [found.origin or ""]
    return [Path(place) for place in places if Path(place).exists()]


class _Deployed:
    """The engine, as a process of its own, which a thread ends and starts again."""

    def __init__(self, arguments: Sequence[str], sources: _Sources, settings: Config, log: Callable[[str], None]) -> None:
        self._command = [sys.executable, "-P", "-m", "kwflow", "engine", *arguments]
        self._sources = sources
        self._log = log
        self._environment = {**os.environ, PARENT: str(os.getpid())}  # it ends if we are killed
        if "activity_grace_s" not in settings.model_fields_set:
            self._environment["KWFLOW_ACTIVITY_GRACE_S"] = str(_GRACE_S)
        self._stopped = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kwflow-dev", daemon=True)
        self._process: subprocess.Popen[bytes] | None = None

    def __enter__(self) -> None:
        self._start()
        self._thread.start()

    def __exit__(self, *_: object) -> None:
        self._stopped.set()
        self._thread.join()
        self._end()

    def _run(self) -> None:
        while not self._stopped.wait(_LOOK_S):
            code = self._process.poll() if self._process is not None else None
            if code is not None:
                self._process = None
                again = code < 0 or code == _AGAIN
                self._log(Line.of(f"the engine has ended with {code}; {'it starts again' if again else 'it starts again when a file changes'}", "warning"))
                if again:
                    self._start()
            if self._sources.changed():
                self._deploy()

    def _deploy(self) -> None:
        """Start another engine, if it can be one; say first what becomes of what waits."""
        check = subprocess.run([*self._command, "--check"], env=self._environment, capture_output=True, text=True, check=False)
        if check.returncode == _WRONG:
            self._log(Line.of(f"not deployed: {check.stderr.strip()}", "error"))
            return
        self._log(f"deploying: {check.stdout.strip()}" if check.returncode != _AGAIN else "deploying")
        self._end()
        self._start()

    def _start(self) -> None:
        """In a session of its own: Ctrl-C on the terminal reaches us alone."""
        self._process = subprocess.Popen(self._command, env=self._environment, start_new_session=True)

    def _end(self) -> None:
        if self._process is None:
            return
        self._process.send_signal(signal.SIGTERM)
        try:
            self._process.wait(_END_S)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._process = None

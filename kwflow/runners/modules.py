"""From MODULE names on a command line to the workflows they define."""

from __future__ import annotations

import importlib
import sys
import traceback
import types
from collections.abc import Sequence
from pathlib import Path

from kwflow import api, durable, flows
from kwflow.core.contract import Workflows
from kwflow.durable.names import several
from kwflow.errors import KwflowError, UnknownWorkflowError, UsageError

__all__ = ["load_modules", "load_workflows"]


def _load(name: str) -> types.ModuleType:
    if not name.endswith(".py"):
        try:
            durable.install([name.partition(".")[0]])
        except UsageError as error:  # a program has imported its own package, and must say itself which part of it is durable
            if not durable.installed(name):
                raise UsageError(f"{error}; a program in the package must call kwflow.durable.install([{name!r}]) before it imports the module") from None
        return importlib.import_module(name)
    path = Path(name)
    if not path.exists():
        raise UsageError(f"{name}: no such file")
    return durable.load_source(path.stem, path.read_bytes(), str(path))


def _place(name: str, error: Exception) -> str:
    """Where the error was raised or, if the MODULE itself is missing, where it was looked for."""
    if isinstance(error, ModuleNotFoundError) and error.name is not None and f"{name}.".startswith(f"{error.name}."):
        return f"looked in {sys.path[0]} (--app-dir) and on Python's path; a MODULE is shop.flows or path/flows.py, without a function"
    frames = traceback.extract_tb(error.__traceback__)
    where = next((frame for frame in reversed(frames) if not frame.filename.startswith("<frozen ")), frames[-1])  # frames of the import system help nobody
    return f"{where.filename}:{where.lineno}"


def load_modules(names: Sequence[str], app_dir: Path | None = None, packages: Sequence[str] = ()) -> list[types.ModuleType]:
    """Import each MODULE (dotted name or path.py) as durable; `packages` are made durable too.

    Raises UsageError if a module cannot be imported; errors of kwflow and of syntax are passed on unchanged.
    """
    place = str(app_dir or Path.cwd())
    if sys.path[:1] != [place]:  # the option --app-dir has put it there already
        sys.path.insert(0, place)
    durable.install(packages)
    modules = []
    for name in several(names):
        try:
            modules.append(_load(name))
        except (KwflowError, SyntaxError):
            raise
        except Exception as error:  # the module's own code may raise anything
            raise UsageError(f"cannot import {name}: {type(error).__name__}: {error} ({_place(name, error)})") from error
    return modules


def load_workflows(names: Sequence[str], app_dir: Path | None = None, packages: Sequence[str] = ()) -> Workflows:
    """Load these modules, and collect their `main` functions and `@kw.workflow`s.

    Raises UsageError for a name clash, UnknownWorkflowError if the modules have no workflow, and what `load_modules` raises.
    """
    flows.workflows()  # a check of what is stored, which makes no processor, loads instances that wait in these
    functions: dict[str, object] = {}
    default: str | None = None
    for module in load_modules(names, app_dir, packages):
        main = getattr(module, "main", None)
        if main is not None:
            short = module.__name__.rpartition(".")[2]
            if short in functions:
                raise UsageError(f"two workflows are named {short!r}; rename one with @kw.workflow(name=...)")
            functions[short] = main
            default = default or short
    for short, function in api.registered_workflows().items():
        if short in functions and functions[short] is not function:
            raise UsageError(f"two workflows are named {short!r}")
        functions[short] = function
    if not functions:
        raise UnknownWorkflowError(f"no workflow in {', '.join(names)}: define main(opts) or decorate a function with @kw.workflow")
    return Workflows(functions, default or (next(iter(functions)) if len(functions) == 1 else None), api.registered_migrations())  # type: ignore[arg-type]

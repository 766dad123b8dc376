"""What durable code is told about values that it cannot await or enter.

Coroutines of other code cannot be saved, so they are refused; for asyncio's, the error names what to write instead.  All other errors are
worded as in the Python that runs.  Every function here returns the error, and leaves it to its caller to raise it.
"""

from __future__ import annotations

import inspect
import sys
from typing import Any

from kwflow.errors import UsageError

__all__ = ["asyncio_refusal", "made_durable", "no_iterator", "no_manager", "not_awaitable"]

_NO_LOCK = "no lock around code without waits, because nothing else of this workflow runs between two waits; otherwise, kw.wait_condition(lambda: ...)"
_CONDITION = "kw.wait_condition(lambda: ...), or kw.suspend() if somebody outside answers"
_INSTEAD = {
    "sleep": "kw.sleep(seconds)",
    "gather": "kw.all([...])",
    "_GatheringFuture": "kw.all([...])",
    "wait": "kw.race([...]) or kw.all([...])",
    "wait_for": "kw.timeout(x, seconds)",
    "Timeout": "kw.timeout(x, seconds)",
    "shield": "kw.shield(x)",
    "Task": "kw.spawn(x)",
    "Future": "kw.suspend()",
    "Queue": _CONDITION,
    "Lock": _NO_LOCK,
    "_ContextManagerMixin": _NO_LOCK,  # `async with` of a Lock, Semaphore or Condition
    "Semaphore": "kw.wait_condition(lambda: ...)",
    "Event": _CONDITION,
    "Condition": "kw.wait_condition(lambda: ...)",
    "TaskGroup": "kw.all([...])",
    "to_thread": "an activity",
}


def asyncio_refusal(value: object) -> UsageError | None:
    """Return why a workflow cannot await this value, if it belongs to asyncio or to code that is not durable; otherwise None."""
    if hasattr(value, "_asyncio_future_blocking"):
        return _refusal(f"asyncio's {type(value).__name__}", type(value).__name__)
    if inspect.iscoroutine(value):
        name, code = value.__qualname__, value.cr_code
        module = value.cr_frame.f_globals.get("__name__", "") if value.cr_frame is not None else ""
        given = value.cr_frame.f_locals.values() if value.cr_frame is not None else ()
        for unawaited in (value, *filter(inspect.iscoroutine, given)):
            unawaited.close()  # otherwise the interpreter would warn that it was never awaited
        if module.split(".")[0] == "asyncio":
            return _refusal(f"asyncio's {name}", name.split(".")[0])
        return UsageError(f"{name} ({code.co_filename}:{code.co_firstlineno}) is a coroutine of code that is not durable, so it could not be saved; {made_durable(module, code.co_filename)}")
    if inspect.isasyncgen(value):
        code = value.ag_code
        remedy = made_durable(value.ag_frame.f_globals.get("__name__", "") if value.ag_frame is not None else "", code.co_filename)
        return UsageError(f"{value.__qualname__} ({code.co_filename}:{code.co_firstlineno}) is an async generator of code that is not durable; {remedy}")
    return None


def made_durable(module: str, filename: str) -> str:
    """Return what makes the code of this module and file durable.  A module that is not a library's may also say so itself."""
    package = module.partition(".")[0]
    if module == "__main__":
        return "the main program is never durable: move it to a durable module that the program imports"
    if package in sys.stdlib_module_names:
        return "the standard library is never durable: keep a list of what it gives, or write the function in a durable module"
    listed = f"list {package!r} under [durable] packages in kwflow.toml (in a test: kwflow_durable)" if package else "list its package under [durable] packages in kwflow.toml"
    return listed if "site-packages" in filename else f"{listed}, or set __kwflow_durable__ = True in the module"


def _refusal(what: str, name: str) -> UsageError:
    instead = _INSTEAD.get(name, "kw.suspend(), kw.sleep, kw.all, kw.race, or an activity for work outside")
    return UsageError(f"{what} cannot be awaited in a workflow, which has no event loop; use {instead}")


def not_awaitable(value: Any) -> TypeError:
    """Return the error of `await` for this value, worded as in this Python."""
    name = type(value).__name__
    return TypeError(f"object {name} can't be used in 'await' expression" if sys.version_info < (3, 14) else f"'{name}' object can't be awaited")


def no_iterator(value: Any, got: Any) -> TypeError:
    """Return the error for what `__await__` of this value returned, worded as in this Python."""
    if sys.version_info < (3, 15):
        return TypeError(f"__await__() returned non-iterator of type '{type(got).__name__}'")
    return TypeError(f"{_full_name(type(value))}.__await__() must return an iterator, not {_full_name(type(got))}")


def no_manager(cls: type[Any], methods: tuple[str, str], others: tuple[str, str]) -> TypeError:
    """Return what `with` or `async with` raises if these methods are missing, worded as in this Python.  `others` are the methods of the other statement."""
    enters, leaves = (hasattr(cls, method) for method in methods)
    kind, statement = ("context manager", "async with") if methods[0] == "__enter__" else ("asynchronous context manager", "with")
    lacks = f"object does not support the {kind} protocol"
    if sys.version_info < (3, 14):
        return TypeError(f"'{cls.__name__}' {lacks} (missed {methods[1]} method)" if enters else f"'{cls.__name__}' {lacks}")
    text = f"'{_full_name(cls)}' {lacks} (missed {methods[0] if leaves else methods[1]} method)"
    if all(hasattr(cls, method) for method in others):
        text += f" but it supports the {'asynchronous ' * (statement != 'with')}context manager protocol. Did you mean to use '{statement}'?"
    return TypeError(text)


def _full_name(cls: type[Any]) -> str:
    return cls.__qualname__ if cls.__module__ in ("builtins", "__main__") else f"{cls.__module__}.{cls.__qualname__}"

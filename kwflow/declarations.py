"""What modules declare when they are imported: topics, workflows, migrations.

This is process state that is filled only at import time, so that all engines with the same modules have the same declarations.
"""

from __future__ import annotations

import contextlib
import re
from collections.abc import Callable, Iterator
from typing import Any, TypeVar, overload

from kwflow.core import wire
from kwflow.core.contract import CHECKPOINTS_MAX
from kwflow.core.current import in_step
from kwflow.durable import registry
from kwflow.errors import UsageError

__all__ = ["declare_topics", "declared_topics", "declaring", "migrate", "registered_migrations", "registered_workflows", "workflow"]

_F = TypeVar("_F", bound=Callable[..., Any])
_topics: set[str] = set()
_hearing: list[set[str]] = []
_workflows: dict[str, Callable[..., Any]] = {}
_migrations: dict[str, Callable[..., Any]] = {}


def declare_topics(*names: str) -> None:
    """Allow `output` to these topics.  Only at import time: a topic declared in a step would be known to some engines and not to others."""
    if in_step():
        raise UsageError("call declare_topics at module level, not inside a step")
    for name in names:
        if not wire.is_topic(name):
            raise UsageError(f"a topic name consists of letters, digits, '.', '_' and '-', not {name!r}")
    _topics.update(names)
    for heard in _hearing:
        heard.update(names)


@contextlib.contextmanager
def declaring() -> Iterator[set[str]]:
    """Collect the topics that code inside the `with` declares, including those that were declared before."""
    heard: set[str] = set()
    _hearing.append(heard)
    try:
        yield heard
    finally:
        _hearing.pop()


def declared_topics() -> frozenset[str]:
    """Return every topic declared in this process."""
    return frozenset(_topics)


@overload
def workflow(function: _F) -> _F: ...
@overload
def workflow(*, name: str | None = None, restart: bool = False, park_on_error: bool = False, checkpoints: int = 0) -> Callable[[_F], _F]: ...
def workflow(function: _F | None = None, *, name: str | None = None, restart: bool = False, park_on_error: bool = False, checkpoints: int = 0) -> _F | Callable[[_F], _F]:
    """Register a workflow under a name (default: that of the function), by which the header `kwflow-workflow` of a `new:` selects it.

    With `restart`, a `new:` for an id that is running ends that run, without running its code, and starts a new one; otherwise
    it changes nothing (G5).

    With `park_on_error`, an exception that it does not catch undoes the step and parks the instance, so that it can go on once the bug is fixed.
    BusinessError, ActivityError, WorkflowError (which ChildError is), TimeoutError and Cancelled are outcomes: they end it, as every exception does otherwise.

    With `checkpoints`, an instance is saved after each record, and that many of its earlier states are kept, to look at (`kwflow show --at`), to fork
    from (`kwflow fork --at`) and to go back to (`kwflow rewind`); at most 1,000.
    """
    if type(checkpoints) is not int or not 0 <= checkpoints <= CHECKPOINTS_MAX:
        raise UsageError(f"@kw.workflow(checkpoints=...) is the number of earlier states to keep, from 0 to {CHECKPOINTS_MAX}, not {checkpoints!r}")

    def register(target: _F) -> _F:
        if registry.version(target.__module__) is not None:  # an old version that is loaded beside the new one (semantics §8.4)
            return target
        label = name or target.__name__
        known = _workflows.get(label)
        if known is not None and (known.__module__, known.__qualname__) != (target.__module__, target.__qualname__):
            raise UsageError(f"two workflows are named {label!r}: {known.__module__}.{known.__qualname__} and {target.__module__}.{target.__qualname__}")
        if restart:
            target.kwflow_restart = True  # type: ignore[attr-defined]
        if park_on_error:
            target.kwflow_park_on_error = True  # type: ignore[attr-defined]
        if checkpoints:
            target.kwflow_checkpoints = checkpoints  # type: ignore[attr-defined]
        _workflows[label] = target
        return target

    return register if function is None else register(function)


def migrate(*, from_: str) -> Callable[[_F], _F]:
    """Register a function that moves instances waiting in old code.  `from_` is main's "module:function", or "module:function@<12 hex>" for one version.

    The function gets an OldInstance, and returns the unstarted generator that takes main's place, alone or with the refs that it
    takes over.  `kwflow code migrate` runs it (docs/CODE.md).
    """
    if not isinstance(from_, str) or re.fullmatch(r"[^:@/]+:[^:@]+(@[0-9a-f]{12})?", from_) is None:
        raise UsageError(f'@kw.migrate(from_=...) takes main as "module:function", such as "shop.orders:main", or one version, "module:function@<12 hex>" (see kwflow code list), not {from_!r}')

    def register(target: _F) -> _F:
        if registry.version(target.__module__) is not None:
            return target
        known = _migrations.get(from_)
        if known is not None and (known.__module__, known.__qualname__) != (target.__module__, target.__qualname__):
            raise UsageError(f"two migrations migrate from {from_!r}: {known.__module__}.{known.__qualname__} and {target.__module__}.{target.__qualname__}")
        _migrations[from_] = target
        return target

    return register


def registered_migrations() -> dict[str, Callable[..., Any]]:
    """Return the function of every `@migrate` in this process by the key of the function that it migrates from."""
    return dict(_migrations)


def registered_workflows() -> dict[str, Callable[..., Any]]:
    """Return the function of every `@workflow` in this process by name."""
    return dict(_workflows)

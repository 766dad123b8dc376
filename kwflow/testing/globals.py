"""Module globals are neither saved nor rolled back (semantics §3.4): a step that changes one fails the author's test."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from kwflow.durable import names, registry

__all__ = ["GlobalsCheck"]

_DEPTH_MAX = 5
_LAZY = object()  # stands for what is imported once it is used (PEP 810)
_CONTAINERS = (list, tuple, set, frozenset)


class GlobalsCheck:
    """`with check:` around a step; raises AssertionError naming each global that is bound or filled otherwise afterwards.

    Looked at are the durable modules of the top-level packages that `functions()`, the workflows, are defined in.
    Containers are compared by what they hold, five deep; any other object by identity, so a change inside one of your
    own classes is not seen.  Invariant: `active` False checks nothing.
    """

    def __init__(self, functions: Callable[[], Iterable[Any]]) -> None:
        self.active = True
        self._functions = functions
        self._before: dict[str, dict[str, Any]] = {}

    def __enter__(self) -> None:
        self._before = self._globals() if self.active else {}

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, traceback: types.TracebackType | None) -> None:
        if error is None and self.active:
            after = self._globals()
            pairs = [(module, before, after.get(module, before)) for module, before in self._before.items()]  # what the step imported is no change
            changed = sorted(f"{module}.{name}" for module, before, now in pairs for name in before.keys() | now.keys() if _differs(before.get(name), now.get(name)))
            if changed:
                raise AssertionError(f"a step changed {', '.join(changed)}: globals are neither saved nor rolled back; keep state in variables of the workflow")

    def _globals(self) -> dict[str, dict[str, Any]]:
        packages = {function.__module__.partition(".")[0] for function in self._functions()}
        modules = [module for module in registry.modules().values() if module.name.partition(".")[0] in packages]
        return {module.name: {name: _form(value, 0) for name, value in module.namespace.items() if not _is_apart(module.name, name, value)} for module in modules}


def _differs(before: Any, now: Any) -> bool:
    return before is not _LAZY and [before] != [now]  # in lists: NaN is itself


def _is_apart(module: str, name: str, value: Any) -> bool:
    """What Python or kwflow binds: `import` binds a module in its package."""
    return name[0] == "@" or name.startswith("__") or (isinstance(value, types.ModuleType) and registry.logical_name(value.__name__) == f"{module}.{name}")


def _form(value: Any, depth: int) -> Any:
    if isinstance(value, names.LAZY):
        return _LAZY
    if depth < _DEPTH_MAX and isinstance(value, names.DICTS):
        return id(value), [(_form(key, depth + 1), _form(item, depth + 1)) for key, item in value.items()]
    if depth < _DEPTH_MAX and isinstance(value, _CONTAINERS):
        return id(value), [_form(item, depth + 1) for item in value]
    return value if isinstance(value, (str, bytes, int, float, complex, type(None))) else id(value)

"""Module globals are neither saved nor rolled back (semantics §3.4), so a step that changes one fails the author's test."""

from __future__ import annotations

import types
from collections.abc import Callable, Iterable
from typing import Any

from kwflow.durable import names, registry

__all__ = ["GlobalsCheck"]

_DEPTH_MAX = 5
_LAZY = object()  # stands for a module that is imported when it is first used (PEP 810)
_CONTAINERS = (list, tuple, set, frozenset)


class GlobalsCheck:
    """`with check:` around a step raises AssertionError that names each global whose binding or content has changed.

    It looks at the durable modules of the top-level packages in which `functions()`, the workflows, are defined.
    Containers are compared by content, five levels deep, and all other objects by identity, so a change inside an object
    of the author's own class is not seen.  Invariant: if `active` is False, nothing is checked.
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
            pairs = [(module, before, after.get(module, before)) for module, before in self._before.items()]  # a module that the step imported is no change
            changed = sorted(f"{module}.{name}" for module, before, now in pairs for name in before.keys() | now.keys() if _differs(before.get(name), now.get(name)))
            if changed:
                raise AssertionError(f"a step changed {', '.join(changed)}: globals are neither saved nor rolled back; keep state in variables of the workflow")

    def _globals(self) -> dict[str, dict[str, Any]]:
        packages = {function.__module__.partition(".")[0] for function in self._functions()}
        modules = [module for module in registry.modules().values() if module.name.partition(".")[0] in packages]
        return {module.name: {name: _form(value, 0) for name, value in module.namespace.items() if not _is_apart(module.name, name, value)} for module in modules}


def _differs(before: Any, now: Any) -> bool:
    return before is not _LAZY and [before] != [now]  # in lists, so that NaN equals itself


def _is_apart(module: str, name: str, value: Any) -> bool:
    """Whether this global is bound by Python or kwflow and not by the author; `import`, for one, binds a module in its package."""
    return name[0] == "@" or name.startswith("__") or (isinstance(value, types.ModuleType) and registry.logical_name(value.__name__) == f"{module}.{name}")


def _form(value: Any, depth: int) -> Any:
    if isinstance(value, names.LAZY):
        return _LAZY
    if depth < _DEPTH_MAX and isinstance(value, names.DICTS):
        return id(value), [(_form(key, depth + 1), _form(item, depth + 1)) for key, item in value.items()]
    if depth < _DEPTH_MAX and isinstance(value, _CONTAINERS):
        return id(value), [_form(item, depth + 1) for item in value]
    return value if isinstance(value, (str, bytes, int, float, complex, type(None))) else id(value)

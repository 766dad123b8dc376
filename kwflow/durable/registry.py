"""Code object -> the function of a durable module it was compiled from, and back from (module, path) to code.

Process state on purpose (wire.md §5): code is what a process has loaded.  Entries keep their code objects alive,
because code objects compare by value and two functions may have equal ones.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

from kwflow.errors import CodeChangedError

__all__ = ["Function", "Label", "Module", "add_module", "add_sentinels", "find", "function_of", "module", "modules", "register_code", "sentinel"]


@dataclass(frozen=True)
class Label:
    """A place to wait at: its name (path in the source) and the temporaries that are needed after it."""

    name: str
    live: tuple[str, ...]


@dataclass(eq=False)
class Function:
    """One function, lambda or generator of a durable module.

    `free` are the names of the function object's closure, `captured` all cells of a generator's frame; both sorted, as
    the compiler orders them.  `path` is unique in the module ("main.<locals>.book#2").
    """

    module: str
    version: str
    path: str
    unit: str
    name: str
    qualname: str
    kind: str
    lineno: int
    filename: str
    arguments: tuple[str, ...]
    free: tuple[str, ...]
    captured: tuple[str, ...]
    labels: tuple[Label, ...]
    compile_cold: Callable[[], types.CodeType]
    compile_plain: Callable[[], types.CodeType]

    @functools.cached_property
    def label_numbers(self) -> dict[str, int]:
        return {label.name: number for number, label in enumerate(self.labels, 1)}

    @functools.cached_property
    def cold(self) -> types.CodeType:
        """The twin that restored generators run; every captured name is a free variable, in the order of `captured`."""
        return self._registered(self.compile_cold(), self.captured)

    @functools.cached_property
    def plain(self) -> types.CodeType:
        """The function itself, compiled alone, so that a closure can be built around saved cells."""
        return self._registered(self.compile_plain(), self.free)

    def _registered(self, code: types.CodeType, names: tuple[str, ...]) -> types.CodeType:
        if code.co_freevars != names:
            raise CodeChangedError(f"{self.module}.{self.path}: this interpreter closes over {code.co_freevars}, kwflow over {names}")
        register_code(code, self)
        return code

    @functools.cached_property
    def namespace(self) -> dict[str, Any]:
        return module(self.module).namespace


@dataclass(eq=False)
class Module:
    """A durable module: its functions by path, the hashes of its units (semantics §8.1) and the namespace it runs in."""

    name: str
    version: str
    filename: str
    source: str
    code: types.CodeType
    functions: dict[str, Function]
    units: Mapping[str, str]
    namespace: dict[str, Any] = field(default_factory=dict)


_functions: dict[int, tuple[types.CodeType, Function]] = {}
_modules: dict[str, Module] = {}
_sentinels: dict[int, tuple[Any, tuple[str, str]]] = {}  # the object is held, so that its id stays its own


def register_code(code: types.CodeType, function: Function) -> None:
    _functions[id(code)] = (code, function)


def function_of(code: types.CodeType) -> Function | None:
    """The durable function this code object belongs to, if any."""
    entry = _functions.get(id(code))
    return entry[1] if entry is not None else None


def add_module(loaded: Module) -> None:
    _modules[loaded.name] = loaded


def add_sentinels(module: str, named: Mapping[str, Any]) -> None:
    """Objects that are saved as "the global of this name" (semantics §4.3); replaces what the module had."""
    for identity in [identity for identity, (_, (owner, _)) in _sentinels.items() if owner == module]:
        del _sentinels[identity]
    for name, value in named.items():
        _sentinels[id(value)] = (value, (module, name))


def sentinel(value: Any) -> tuple[str, str] | None:
    """(module, name) of the global this very object is bound to, if it is one."""
    entry = _sentinels.get(id(value))
    return entry[1] if entry is not None else None


def modules() -> Mapping[str, Module]:
    return _modules


def module(name: str) -> Module:
    """Raises CodeChangedError when no durable module of that name is loaded."""
    try:
        return _modules[name]
    except KeyError:
        raise CodeChangedError(f"the durable module {name!r} is not loaded") from None


def find(name: str, path: str) -> Function:
    """Raises CodeChangedError when the module or the function is gone."""
    try:
        return module(name).functions[path]
    except KeyError:
        raise CodeChangedError(f"{name} has no function {path!r} any more") from None

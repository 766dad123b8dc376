"""Code object -> the function of a durable module it was compiled from, and back from (module, path) to code.

A module may be loaded in several versions at once: the current one under its name, stored ones as `name@<12 hex>`
(semantics §8.3).  Snapshots name modules by *reference*: `name` for the version the instance runs, `name@<12 hex>` for
code of another version that it came to hold.  Process state on purpose (wire.md §5): code is what a process has loaded.
Entries keep their code objects alive, because code objects compare by value and two functions may have equal ones.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kwflow.errors import CodeChangedError

__all__ = [
    "RUNTIME", "Function", "Label", "Module", "Pins", "Place", "add_module", "add_sentinels", "add_version", "drop_version", "function_of", "is_durable", "logical_name",
    "lookup", "module", "modules", "reference", "reference_of", "register_code", "remove_module", "sentinel", "version", "version_name", "versions_of",
]  # fmt: skip


RUNTIME = "__@kw__"  # the global that lowered code calls; `import *` does not take it along, and classes do not mangle it


class Label(NamedTuple):
    """A place to wait at: its name (path in the source) and the temporaries that are needed after it."""

    name: str
    live: tuple[str, ...]


@dataclass(eq=False)
class Function:
    """One function, lambda or generator of a durable module; `coroutine` is true for a generator written as async def.

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
    coroutine: bool
    lineno: int
    filename: str
    arguments: tuple[str, ...]
    free: tuple[str, ...]
    captured: tuple[str, ...]
    labels: tuple[Label, ...]
    compile_cold: Callable[[], types.CodeType]
    compile_plain: Callable[[], types.CodeType]
    compile_annotated: Callable[[], types.CodeType]
    home: Module = field(init=False, repr=False)  # set by who makes it

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

    @functools.cached_property
    def annotations(self) -> dict[str, Any]:
        """Those of a closure that is made again, as far as its module can tell them."""
        try:
            return types.FunctionType(self.compile_annotated(), self.namespace)().__annotations__  # type: ignore[no-any-return]
        except Exception:  # the author's code
            return {}

    def _registered(self, code: types.CodeType, names: tuple[str, ...]) -> types.CodeType:
        if code.co_freevars != names:
            raise CodeChangedError(f"{self.module}.{self.path}: this interpreter closes over {code.co_freevars}, kwflow over {names}")
        register_code(code, self)
        return code

    @property
    def namespace(self) -> dict[str, Any]:
        return self.home.namespace


@dataclass(eq=False)
class Module:
    """One version of a durable module: its functions by path, the hashes of its units (semantics §8.1) and the namespace it runs in.

    `name` is the name authors know it by, also when this version is loaded as `name@<12 hex>`; `version` is the sha256 of its
    source.  `whole` is False when its source alone cannot be run: only some of its functions are durable (`@durable`), or it was given as a tree.
    """

    name: str
    version: str
    filename: str
    source: str
    code: types.CodeType
    functions: Mapping[str, Function]
    units: Mapping[str, str]
    namespace: dict[str, Any] = field(default_factory=dict)
    whole: bool = True
    lowered: Any = None  # what lowering made of the source, as plain data that a cache may keep
    stored: Mapping[str, Any] | None = None  # what it was loaded from, if it is a stored version

    @property
    def package(self) -> str:
        return str(self.namespace.get("__package__") or "")


Pins = Mapping[str, Module]  # reference -> the version it stands for, of what is not simply current
Place = tuple[Mapping[str, Function], str]  # a function that nobody has asked for yet: those of its module, and its path
_functions: dict[int, tuple[types.CodeType, Function | Place]] = {}
_modules: dict[str, Module] = {}  # the current ones
_versions: dict[str, Module] = {}  # stored ones, by `name@<12 hex>`
_replaced: list[Module] = []  # what was current before a reload: live code of it keeps its metadata (semantics §5.4)
_sentinels: dict[int, tuple[Any, dict[str, str]]] = {}  # module -> name, the module that made it first; the object is held, so that its id stays its own


def register_code(code: types.CodeType, function: Function | Place) -> None:
    _functions[id(code)] = (code, function)


def function_of(code: types.CodeType) -> Function | None:
    """The durable function this code object belongs to, if any."""
    entry = _functions.get(id(code))
    if entry is None:
        return None
    found = entry[1]
    if isinstance(found, Function):
        return found
    functions, path = found
    made = functions[path]
    _functions[id(code)] = (code, made)
    return made


def add_module(loaded: Module) -> Module | None:
    """This version is the current one from now on; stored ones that bound classes of the one before are loaded anew.  The one before."""
    before = _modules.get(loaded.name)
    if before is not None and before.namespace is not loaded.namespace:
        _replaced.append(before)
        for name in [name for name, other in _versions.items() if other.name == loaded.name]:
            _replaced.append(_versions.pop(name))
    _modules[loaded.name] = loaded
    return before


def remove_module(loaded: Module, before: Module | None) -> None:
    """Its import has failed: the one before is current again."""
    if before is None:
        _modules.pop(loaded.name, None)
    else:
        _modules[loaded.name] = before


def add_version(loaded: Module) -> None:
    """A stored version, loaded beside the current one."""
    _versions[version_name(loaded.name, loaded.version)] = loaded


def drop_version(name: str) -> None:
    """It could not be loaded."""
    _versions.pop(name, None)


def version_name(name: str, version: str) -> str:
    """The name in `sys.modules` of a version that is not current."""
    return f"{name}@{version[:12]}"


def version(name: str) -> Module | None:
    """The stored version loaded as `name@<12 hex>`."""
    return _versions.get(name)


def versions_of(name: str) -> list[Module]:
    """Every version of the module that this process has loaded, the current one first."""
    current = _modules.get(name)
    others = [loaded for loaded in (*_versions.values(), *reversed(_replaced)) if loaded.name == name]
    return [current, *others] if current is not None else others


def known() -> list[Module]:
    """The current modules and the stored versions that this process has loaded."""
    return [*_modules.values(), *_versions.values()]


def is_durable(name: str) -> bool:
    """Whether a `__module__` or reference is of a durable module that is loaded, in any version."""
    return name in _modules or name in _versions


def logical_name(name: str) -> str:
    """The module that authors know for a `__module__` or `__name__`: `name@<12 hex>` is `name`."""
    found = _versions.get(name)
    return found.name if found is not None else name


def lookup(namespace: Mapping[str, Any], qualname: str) -> Any:
    """The object at this dotted name.  Raises KeyError or AttributeError."""
    first, _, rest = qualname.partition(".")
    found = namespace[first]
    for part in rest.split(".") if rest else ():
        found = getattr(found, part)
    return found


def reference_of(home: Module, plain: Module | None) -> str:
    """The name for this version in a snapshot of an instance that runs `plain`."""
    return home.name if plain is not None and plain.version == home.version else version_name(home.name, home.version)


def reference(name: str, qualname: str, value: object, pins: Pins) -> tuple[str, Module] | None:
    """How a snapshot names this very object of a durable module (by its logical name), and in which version; None when no version has it there."""
    plain = pins.get(name) or _modules.get(name)
    for home in [plain, *versions_of(name)] if plain is not None else versions_of(name):
        try:
            if lookup(home.namespace, qualname) is value:
                return reference_of(home, plain), home
        except (KeyError, AttributeError):
            continue
    return None


def add_sentinels(loaded: Module, named: Mapping[str, Any]) -> None:
    """Objects that are saved as "the global of this name" (semantics §4.3); those of the current version replace what the module had."""
    if _modules.get(loaded.name) is loaded:
        for identity, (_, known) in [*_sentinels.items()]:
            known.pop(loaded.name, None)
            if not known:
                del _sentinels[identity]
    for name, value in named.items():
        _sentinels.setdefault(id(value), (value, {}))[1].setdefault(loaded.name, name)  # what a stored version shares with current code goes by its current name


def sentinel(value: Any) -> tuple[str, str] | None:
    """(module, name) of the global this very object is bound to, if it is one; of several modules, that which made it."""
    entry = _sentinels.get(id(value))
    return next(iter(entry[1].items())) if entry is not None else None


def modules() -> Mapping[str, Module]:
    return _modules


def module(reference: str, pins: Pins) -> Module:
    """What a reference in a snapshot stands for.  Raises CodeChangedError when no durable module of that name is loaded."""
    found = pins.get(reference) or _modules.get(reference) or _versions.get(reference)
    if found is None:
        raise CodeChangedError(f"the durable module {reference!r} is not loaded", reference)
    return found

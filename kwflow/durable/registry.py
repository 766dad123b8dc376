"""From a code object to the function of a durable module that it was compiled from, and from (module, path) back to code.

A module may be loaded in several versions at once: the current one under its name, stored ones as `name@<12 hex>`
(semantics §8.3).  Snapshots name modules by *reference*: `name` for the version that the instance runs, `name@<12 hex>` for
code of another version that it holds.  This is process state on purpose (wire.md §5): code is what a process has loaded.
Entries keep their code objects alive, because code objects compare by value, and two functions may have equal ones.
"""

from __future__ import annotations

import functools
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kwflow.errors import CodeChangedError

__all__ = [
    "RUNTIME", "Function", "Label", "Module", "Outline", "Part", "Pins", "Place", "Wait", "add_module", "add_sentinels", "add_version", "drop_version", "function_of", "is_durable", "logical_name",
    "lookup", "module", "modules", "reference", "reference_of", "register_code", "remove_module", "sentinel", "version", "version_name", "versions_of",
]  # fmt: skip


RUNTIME = "__@kw__"  # a global that lowered code uses, as `__@type__` and others are; `import *` and `vars` filtered by `__` leave it out, and classes do not mangle it


class Label(NamedTuple):
    """A place where a generator can wait: its name (the path in the source) and the temporaries that are needed after it."""

    name: str
    live: tuple[str, ...]


class Part(NamedTuple):
    """An expression in the call of a wait: the hash of what must not change in it, and the parts that are compared one by one, by place."""

    what: str
    parts: Mapping[str, Part]


class Wait(NamedTuple):
    """One wait of a generator.  `key` identifies it, `around` the wait together with the statements around its own, `whole` with its own, too, and `call` the function called in it, if any.

    `called` is what that function is called with.
    `state` are the roles of its temporaries `live`; one whose value depends on the rest of its statement has the hash of that.
    `needed` are the author's variables that may be read after the wait before they are bound again, `lent` those that closures may read.
    """

    line: int
    text: str
    key: str
    around: str
    whole: str
    call: str
    called: Part
    live: tuple[str, ...]
    state: tuple[tuple[str, str], ...]
    needed: frozenset[str]
    lent: frozenset[str]


class Outline(NamedTuple):
    """What identifies a function in another version of its module: its hash, and its waits by label, in order.

    `fixed` tells that nothing else does: it has no name, or is part of a class that is defined in a function; the hash is that of the whole class then.
    `parameters` tell how each is given; `owners` are the functions that its captured variables belong to, empty for its own.
    """

    digest: str
    fixed: bool
    parameters: tuple[str, ...]
    owners: Mapping[str, str]
    waits: Mapping[str, Wait]


@dataclass(eq=False)
class Function:
    """One function, lambda or generator of a durable module; `coroutine` is true for a generator written as async def.

    `free` are the names in the function object's closure, `captured` those of all cells in a generator's frame; both are
    sorted, which is the compiler's order.  `path` is unique in the module ("main.<locals>.book#2").
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
    make_outline: Callable[[], Outline]
    home: Module = field(init=False, repr=False)  # set by the creator

    @functools.cached_property
    def label_numbers(self) -> dict[str, int]:
        return {label.name: number for number, label in enumerate(self.labels, 1)}

    @functools.cached_property
    def cold(self) -> types.CodeType:
        """The twin that restored generators run.  Every captured name is a free variable of it, in the order of `captured`."""
        return self._registered(self.compile_cold(), self.captured)

    @functools.cached_property
    def plain(self) -> types.CodeType:
        """The function itself, compiled alone, so that a closure can be built around saved cells."""
        return self._registered(self.compile_plain(), self.free)

    @functools.cached_property
    def annotations(self) -> dict[str, Any]:
        """The annotations of a closure that is rebuilt, as far as they can be evaluated in its module."""
        try:
            return types.FunctionType(self.compile_annotated(), self.namespace)().__annotations__  # type: ignore[no-any-return]
        except Exception:  # annotations are author code
            return {}

    @functools.cached_property
    def outline(self) -> Outline:
        """What identifies the function and its waits in another version of the module."""
        return self.make_outline()

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
    """One version of a durable module: its functions by path, the hashes of its units (semantics §8.1) and the namespace that it runs in.

    `name` is the name that authors know, even if this version is loaded as `name@<12 hex>`.  `version` is the sha256 of its source.
    `whole` is False if its source alone cannot be run, because only some of its functions are durable (`@durable`) or it was given as a tree.
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
    stored: Mapping[str, Any] | None = None  # the entry that it was loaded from, if it is a stored version

    @property
    def package(self) -> str:
        return str(self.namespace.get("__package__") or "")


Pins = Mapping[str, Module]  # by reference: the version that it stands for, unless that is simply the current one
Place = tuple[Mapping[str, Function], str]  # a function that nobody has asked for yet: the functions of its module, and its path
_functions: dict[int, tuple[types.CodeType, Function | Place]] = {}
_modules: dict[str, Module] = {}  # the current ones
_versions: dict[str, Module] = {}  # stored ones, by `name@<12 hex>`
_replaced: list[Module] = []  # what was current before a reload: its live code keeps its metadata (semantics §5.4)
_sentinels: dict[int, tuple[Any, dict[str, str]]] = {}  # by id: the object, held so that its id is not reused, and its name by module, beginning with the module that made it


def register_code(code: types.CodeType, function: Function | Place) -> None:
    _functions[id(code)] = (code, function)


def function_of(code: types.CodeType) -> Function | None:
    """Return the durable function that this code object belongs to, or None."""
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
    """Make this version the current one, and return the previous one.  Stored versions may have bound classes of that one, so they will be loaded again."""
    before = _modules.get(loaded.name)
    if before is not None and before.namespace is not loaded.namespace:
        _replaced.append(before)
        for name in [name for name, other in _versions.items() if other.name == loaded.name]:
            _replaced.append(_versions.pop(name))
    _modules[loaded.name] = loaded
    return before


def remove_module(loaded: Module, before: Module | None) -> None:
    """Make the previous version current again, after the import of this one has failed."""
    if before is None:
        _modules.pop(loaded.name, None)
    else:
        _modules[loaded.name] = before


def add_version(loaded: Module) -> None:
    """Register a stored version that is loaded beside the current one."""
    _versions[version_name(loaded.name, loaded.version)] = loaded


def drop_version(name: str) -> None:
    """Remove a stored version that could not be loaded."""
    _versions.pop(name, None)


def version_name(name: str, version: str) -> str:
    """Return the name in `sys.modules` of a version that is not current."""
    return f"{name}@{version[:12]}"


def version(name: str) -> Module | None:
    """Return the stored version that is loaded as `name@<12 hex>`, or None."""
    return _versions.get(name)


def versions_of(name: str) -> list[Module]:
    """Return every version of the module that this process has loaded, the current one first."""
    current = _modules.get(name)
    others = [loaded for loaded in (*_versions.values(), *reversed(_replaced)) if loaded.name == name]
    return [current, *others] if current is not None else others


def known() -> list[Module]:
    """Return the current modules and the stored versions that this process has loaded."""
    return [*_modules.values(), *_versions.values()]


def is_durable(name: str) -> bool:
    """Whether a `__module__` or reference belongs to a durable module that is loaded, in any version."""
    return name in _modules or name in _versions


def logical_name(name: str) -> str:
    """Return the module name that authors know for a `__module__` or `__name__`: `name` for `name@<12 hex>`."""
    found = _versions.get(name)
    return found.name if found is not None else name


def lookup(namespace: Mapping[str, Any], qualname: str) -> Any:
    """Return the object at this dotted name.  Raises KeyError or AttributeError."""
    first, _, rest = qualname.partition(".")
    found = namespace[first]
    for part in rest.split(".") if rest else ():
        found = getattr(found, part)
    return found


def reference_of(home: Module, plain: Module | None) -> str:
    """Return the name for this version in a snapshot of an instance that runs the version `plain`."""
    return home.name if plain is not None and plain.version == home.version else version_name(home.name, home.version)


def reference(name: str, qualname: str, value: object, pins: Pins) -> tuple[str, Module] | None:
    """Return the reference by which a snapshot names this very object of a durable module (`name` is the logical name), and its version.

    None if no version has the object under this name.
    """
    plain = pins.get(name) or _modules.get(name)
    for home in [plain, *versions_of(name)] if plain is not None else versions_of(name):
        try:
            if lookup(home.namespace, qualname) is value:
                return reference_of(home, plain), home
        except (KeyError, AttributeError):
            continue
    return None


def add_sentinels(loaded: Module, named: Mapping[str, Any]) -> None:
    """Register objects that are saved as "the global of this name" (semantics §4.3); those of the current version replace the module's earlier ones."""
    if _modules.get(loaded.name) is loaded:
        for identity, (_, known) in [*_sentinels.items()]:
            known.pop(loaded.name, None)
            if not known:
                del _sentinels[identity]
    for name, value in named.items():
        _sentinels.setdefault(id(value), (value, {}))[1].setdefault(loaded.name, name)  # an object that a stored version shares with current code is saved under its current name


def sentinel(value: Any) -> tuple[str, str] | None:
    """Return (module, name) of the global that is bound to this very object, or None; of several modules, the one that made it."""
    entry = _sentinels.get(id(value))
    return next(iter(entry[1].items())) if entry is not None else None


def modules() -> Mapping[str, Module]:
    return _modules


def module(reference: str, pins: Pins) -> Module:
    """Return what a reference in a snapshot stands for.  Raises CodeChangedError if no durable module of that name is loaded."""
    found = pins.get(reference) or _modules.get(reference) or _versions.get(reference)
    if found is None:
        raise CodeChangedError(f"the durable module {reference!r} is not loaded", reference)
    return found

"""Old code beside new: which version of each module the names in a snapshot mean, and stored versions as modules (semantics §8).

A version of a module is the sha256 of its source.  If every unit of M that a snapshot holds is unchanged, M means the
current M; otherwise all of M means the stored version, loaded as `M@<12 hex>`.  Whoever stores the sources passes them in
as `Sources`; nothing here reads the store.
"""

from __future__ import annotations

import builtins
import functools
import importlib.util
import itertools
import json
import linecache
import re
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from kwflow.durable import codec, hook, loader, registry
from kwflow.durable.fingerprint import class_hashes, imports_of, source_version
from kwflow.durable.lower import LOWERING_VERSION, lower_module, units_in
from kwflow.durable.moves import MovingNames, parsed
from kwflow.durable.registry import Module, Pins
from kwflow.errors import CodeChangedError, CorruptSnapshotError, SnapshotError, TransportError

__all__ = [
    "Sources", "changed_classes", "changed_units", "entry", "entry_key", "loads", "moving", "needed", "no_sources", "outdated", "prepare", "resolve", "source_in",
    "split_reference", "stored_with",
]  # fmt: skip

Sources = Callable[[str], bytes | None]  # from `<module>@<sha256>` to the stored entry; called only for versions that are not loaded
_REFERENCE = re.compile(r"(.+)@([0-9a-f]{12})")


def no_sources(_key: str) -> bytes | None:
    """Sources for when nothing is stored."""
    return None


def entry_key(name: str, version: str) -> str:
    return f"{name}@{version}"


def entry(module: Module) -> bytes:
    """Return what is stored of one version: JSON with its source, its file relative to the module's root, and the versions of its durable imports."""
    imports = {name: found.version for name, found in _imports(module).items()}
    if module.stored is not None:
        return json.dumps({**module.stored, "imports": {**module.stored["imports"], **imports}}).encode()
    package = "__path__" in module.namespace
    file = "/".join(module.filename.split("/")[-(len(module.name.split(".")) + package) :])
    return json.dumps({"source": module.source, "file": file, "package": package, "imports": imports}).encode()


def _imports(module: Module) -> dict[str, Module]:
    """Return the durable modules that it imports, and those that it will import later: in its functions, or anywhere if it has not been imported itself."""
    loaded = [(name, registry.modules().get(name)) for name in sorted(imports_of(module.source, module.package))]
    later = sorted(imports_of(module.source, module.package, in_functions="__name__" in module.namespace))
    found = dict(loaded + [(name, hook.unloaded(name)) for name in later if name not in sys.modules])
    return {name: other for name, other in found.items() if other is not None and other.whole and other.name != module.name}


def source_in(data: bytes) -> str:
    """Return the source in a stored entry."""
    return str(json.loads(data)["source"])


def needed(keys: Iterable[str], entries: Mapping[str, bytes]) -> set[str]:
    """Return the keys of these entries and of those that they import, directly or indirectly."""
    found = list(keys)
    for key in found:
        imports = json.loads(entries[key])["imports"] if key in entries else {}
        found += [other for other in (entry_key(*pair) for pair in imports.items()) if other not in found]
    return set(found)


def stored_with(module: Module) -> list[Module]:
    """Return the module and the durable ones that it imports, directly or indirectly: old code may need them after they are gone."""
    found = [module] if module.whole else []
    keys = {entry_key(known.name, known.version) for known in found}
    for known in found:
        more = {key: other for other in _imports(known).values() if (key := entry_key(other.name, other.version)) not in keys}
        keys |= more.keys()
        found += more.values()
    return found


def split_reference(reference: str) -> tuple[str, str]:
    """Return the module and the 12 hex digits of a reference; the digits are "" for the version that the instance runs."""
    explicit = _REFERENCE.fullmatch(reference)
    return (explicit[1], explicit[2]) if explicit is not None else (reference, "")


# -- which version -------------------------------------------------------------------------------------------------
def loads(body: bytes, code: Mapping[str, Any], sources: Sources, lowering: int = LOWERING_VERSION, moving: MovingNames | None = None) -> tuple[Any, Pins]:
    """Return the graph of a snapshot with this `code` header, and the versions that it runs; with `moving`, moved onto the current ones.  Raises SnapshotError.

    `lowering` is the lowering version that wrote it; if that is newer than ours, the snapshot is refused before anything is loaded.
    """
    if lowering > LOWERING_VERSION:
        raise SnapshotError(f"it was saved by a newer kwflow (lowering version {lowering}; this one reads up to {LOWERING_VERSION}); upgrade kwflow, then retry")
    pins = moving.pins if moving is not None else resolve(code, sources)
    while True:
        try:
            return codec.loads(body, pins, lowering, moving), {} if moving is not None else pins
        except CodeChangedError as error:  # something that it holds by name is gone, though no unit in which it waits has changed
            saved = code.get(error.module)
            pinned = pins.get(error.module)
            if moving is not None or saved is None or (pinned is not None and pinned.version == saved["version"]):
                raise
            pins = {**pins, error.module: _version(split_reference(error.module)[0], saved["version"], sources, str(error))}
        except CorruptSnapshotError as error:
            changed = _classes_changed(code, pins, sources)
            if error.__cause__ is None or not changed:
                raise
            why = f"may not accept what was saved: {type(error.__cause__).__name__}: {error.__cause__}; let them (__setstate__; an enum: _missing_), then retry"
            raise CodeChangedError(f"classes that have changed since it was saved ({', '.join(changed)}) {why}") from error


def _classes_changed(code: Mapping[str, Any], pins: Pins, sources: Sources) -> list[str]:
    """Name the classes that have changed, in the modules that a snapshot holds something of and that mean the current code."""
    found = []
    for name, saved in code.items():
        current = registry.modules().get(name)
        data = sources(entry_key(name, saved["version"])) if current is not None and name not in pins and current.version != saved["version"] else None
        if current is not None and data is not None:
            found += [f"{name}.{cls}" for cls in changed_classes(source_in(data), current.source)]
    return found


def resolve(code: Mapping[str, Any], sources: Sources) -> Pins:
    """Return what each reference stands for, unless that is simply the current module (semantics §8.2).  Raises CodeChangedError."""
    pins: dict[str, Module] = {}
    for reference, saved in code.items():
        current = registry.modules().get(reference)
        if current is not None and current.version == saved["version"]:
            continue
        name, _ = split_reference(reference)
        current = hook.current(name)
        changes = changed_units(current, saved)
        if current is None or changes:
            pins[reference] = _version(name, saved["version"], sources, "; ".join(changes))
        elif reference != name:
            pins[reference] = current
    return pins


def outdated(code: Mapping[str, Any]) -> list[str]:
    """Name the versions (`<module>@<12 hex>`) that an instance with this `code` header runs, and that its modules here have left behind.  Raises CodeChangedError."""
    run = [(reference, saved) for reference, saved in code.items() if not split_reference(reference)[1]]  # of the others, it only holds something
    return [registry.version_name(name, saved["version"]) for name, saved in run if changed_units(hook.current(name), saved)]


def moving(code: Mapping[str, Any], sources: Sources) -> MovingNames:
    """Return what the names of a snapshot with this `code` header mean if it is moved onto the current code.  Raises CodeChangedError."""
    pins: dict[str, Module] = {}
    old: dict[str, Module] = {}
    for reference, saved in code.items():
        name, _ = split_reference(reference)
        current = hook.current(name)
        if current is None:
            raise CodeChangedError(f"there is no durable module {name} here to move it to; @kw.migrate(from_='{name}:FUNCTION') can take it to another module", name)
        if reference != name:
            pins[reference] = current
        if changed_units(current, saved):
            old[reference] = _as_it_was(name, saved["version"], sources)
    return MovingNames(pins, old)


def _as_it_was(name: str, version: str, sources: Sources) -> Module:
    """Return a version of a module for what is known about its functions."""
    known = next((found for found in registry.versions_of(name) if found.version == version), None)
    if known is not None:
        return known
    data = sources(entry_key(name, version))
    if data is None:
        raise CodeChangedError(f"the source of {name} that this instance runs ({version[:12]}) is not stored, so it is not known where it waits", name)
    return parsed(name, version, str(_entry_of(name, version, data)["source"]), registry.version_name(name, version))


def _entry_of(name: str, version: str, data: bytes) -> dict[str, Any]:
    """Return what is stored of a version.  Raises CodeChangedError if it cannot be read, or is that of another version."""
    try:
        stored: dict[str, Any] = json.loads(data)
        source = str(stored["source"])
    except (LookupError, TypeError, ValueError) as error:
        raise CodeChangedError(f"what is stored of {name} ({version[:12]}) cannot be read: {error!r}", name) from error
    if source_version(source) != version:
        raise CodeChangedError(f"the stored source of {registry.version_name(name, version)} is not the right one: its sha256 differs", name)
    return stored


def prepare(key: str, sources: Sources, wanted: Callable[[str], bool] = lambda key: True) -> None:
    """Load what an instance that holds code of this version (`<module>@<sha256>`) needs when it wakes.

    That is the current module and, if any of its units differs from the stored version and that one is `wanted`, the stored version, too.
    Raises CodeChangedError if its code fails.
    """
    name, _, version = key.rpartition("@")
    current = hook.current(name)
    if current is not None and current.version == version:
        return
    data = sources(key)
    if data is not None and wanted(key) and (current is None or not _has_units_of(current, source_in(data))):  # None: no instance has held this version for long, and it was deleted
        _version(name, version, sources, "it is not the current version")


_units = functools.lru_cache(maxsize=128)(units_in)  # for each partition that is taken over, the current source is compared with each of perhaps a hundred stored versions


def _has_units_of(current: Module, source: str) -> bool:
    try:
        return _units(source).items() <= _units(current.source).items()
    except (SyntaxError, RecursionError):  # written for another minor of Python; loading it will say so
        return False


def changed_units(current: Module | None, saved: Mapping[str, Any]) -> list[str]:
    """Describe what has changed in the code that a snapshot holds, one sentence for each unit."""
    if current is None:
        return ["the module no longer exists"]
    if current.version == saved["version"]:
        return []
    return [f"{unit} {'has changed' if unit in current.units else 'no longer exists'}" for unit, digest in saved["units"].items() if current.units.get(unit) != digest]


# -- stored versions as modules --------------------------------------------------------------------------------------
def _version(name: str, version: str, sources: Sources, why: str) -> Module:
    known = registry.version(registry.version_name(name, version))
    if known is not None and known.version == version:
        return known
    data = sources(entry_key(name, version))
    if data is None:
        raise CodeChangedError(f"{name}: {why} since this instance began to wait in it, and the source that it runs ({version[:12]}) is not stored; deploy that code again, then retry")
    stored = _entry_of(name, version, data)
    _take_away(_stand_in({other: wanted for other, wanted in stored["imports"].items() if name.startswith(f"{other}.")}, sources))  # its packages first, as `import` does; they may import it
    known = registry.version(registry.version_name(name, version))
    return known if known is not None and known.version == version else _load(name, version, stored, sources)


def _load(name: str, version: str, stored: dict[str, Any], sources: Sources) -> Module:
    """Run a stored version as the module `name@<12 hex>`.  Raises CodeChangedError if its own code fails."""
    hidden = registry.version_name(name, version)
    source, current = str(stored["source"]), registry.modules().get(name)
    module = types.ModuleType(hidden)
    module.__file__ = _file(name, stored, current)
    module.__package__ = name if stored["package"] else name.rpartition(".")[0]
    module.__dict__["__kwflow_durable__"] = True
    if stored["package"]:
        module.__path__ = list(getattr(sys.modules.get(name), "__path__", []))
        module.__spec__ = getattr(sys.modules.get(name), "__spec__", None)  # `importlib.resources` and `pkgutil` use it to find the package's files
    filename = f"{module.__file__}@{version[:12]}"
    linecache.cache[filename] = (len(source), None, source.splitlines(True), filename)  # so that tracebacks show the old lines
    bound, before = _unchanged_classes(source, current), registry.known()
    module.__dict__["__builtins__"] = {**vars(builtins), "__import__": functools.partial(_import, {**stored["imports"], name: version}, sources)}
    try:
        sys.modules[hidden] = module
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # they were shown when this code was new
            lowered = lower_module(name, source, filename, frozenset(bound))
        lowered.namespace, lowered.stored = module.__dict__, stored
        registry.add_version(lowered)
        loader.execute(module, lowered, bound)
        _take_away(_stand_in(stored["imports"], sources))  # load those that only functions import, too, so that a failure shows now
    except BaseException as error:
        for made in [other for other in registry.known() if other not in before and other.stored is not None]:  # in a cycle of imports, others hold the module that has failed
            registry.drop_version(made.namespace["__name__"])
            sys.modules.pop(made.namespace["__name__"], None)
        sys.modules.pop(hidden, None)
        if isinstance(error, (SnapshotError, TransportError, KeyboardInterrupt, MemoryError)):
            raise
        remedy = "; another version of kwflow wrote it: upgrade all engines, then retry" if name.startswith("kwflow.") else ""
        raise CodeChangedError(f"the stored version {version[:12]} of {name} cannot be loaded: {type(error).__name__}: {error}{remedy}") from error
    return lowered


def _file(name: str, stored: dict[str, Any], current: Module | None) -> str:
    """Return the file of the module in this process, or where it would be."""
    if current is not None:
        return str(current.namespace.get("__file__") or current.filename)
    parent = getattr(sys.modules.get(name.rpartition(".")[0]), "__path__", None)
    return "/".join([parent[0], *stored["file"].split("/")[name.count(".") :]]) if parent else str(stored["file"])


def _import(imports: Mapping[str, str], sources: Sources, name: str, globals: Any = None, locals: Any = None, fromlist: Any = (), level: int = 0) -> Any:
    """Run an import statement of old code, at module level or in a function: stored versions stand in for modules that are gone, and may import each other."""
    base = importlib.util.resolve_name("." * level + name, globals["__package__"]) if level else name
    meant = {f"{base}.{part}" for part in fromlist or ()}
    gone = _stand_in({other: version for other, version in imports.items() if f"{base}.".startswith(f"{other}.") or other in meant}, sources)
    try:
        return builtins.__import__(name, globals, locals, fromlist, level)
    finally:
        _take_away(gone)


def _take_away(gone: Iterable[str]) -> None:
    for name in gone:
        sys.modules.pop(name, None)


def _stand_in(imports: Mapping[str, str], sources: Sources) -> list[str]:
    """Put stored versions of modules that are gone where `import` finds them; return their names, which are to be removed afterwards."""
    missing = {name: version for name, version in imports.items() if name not in sys.modules and not hook.exists(name)}
    loaded = {name: _version(name, version, sources, "the module no longer exists") for name, version in sorted(missing.items())}  # packages first
    packages = [package for name in loaded for package in itertools.accumulate(name.split(".")[:-1], "{}.{}".format)]
    empty = [package for package in dict.fromkeys(packages) if package not in loaded and package not in sys.modules and not hook.exists(package)]
    for package in empty:  # packages without an `__init__.py`, which have no source
        sys.modules[package] = types.ModuleType(package)
        sys.modules[package].__path__ = []
    for name, found in loaded.items():
        sys.modules[name] = sys.modules[found.namespace["__name__"]]
    for name in (*empty, *loaded):
        package, _, last = name.rpartition(".")
        if package in sys.modules and not hasattr(sys.modules[package], last):
            setattr(sys.modules[package], last, sys.modules[name])  # not removed: `import a.b` looks there when it runs
    return [*empty, *loaded]


def _unchanged_classes(source: str, current: Module | None) -> dict[str, Any]:
    """Return the top-level classes that bind to the current ones (semantics §8.4): their own AST and that of every class that they derive from is unchanged."""
    if current is None:
        return {}
    names = set(class_hashes(source)) - set(changed_classes(source, current.source))
    return {name: current.namespace[name] for name in names if isinstance(current.namespace.get(name), type)}


def changed_classes(source: str, current: str) -> list[str]:
    """Name the top-level classes of the first source that differ in the second, or derive from one that differs."""
    before, now = class_hashes(source), class_hashes(current)
    changed = {name for name, (digest, _) in before.items() if name not in now or now[name][0] != digest}
    while more := {name for name, (_, bases) in before.items() if name not in changed and not changed.isdisjoint(bases)}:
        changed |= more
    return sorted(changed)

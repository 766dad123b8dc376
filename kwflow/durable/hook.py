"""Which modules `import` makes durable: the import hook, and finding durable modules and their sources without importing them.

Apart from the cache, this is the only file of `durable` that opens files.  It is process state on purpose, as `sys.meta_path` is.
"""

from __future__ import annotations

import ast
import contextlib
import importlib.abc
import importlib.machinery
import importlib.util
import os
import sys
import types
from collections.abc import Callable, Iterable, Sequence
from importlib.machinery import ModuleSpec
from typing import Any, TypeAlias

from kwflow.durable import names, registry
from kwflow.durable.fingerprint import imports_of, source_version
from kwflow.durable.loader import naming, run
from kwflow.errors import CodeChangedError, UnsupportedError, UsageError

__all__ = ["current", "exists", "find_source", "install", "installed", "rewrite_first", "uninstall", "unloaded"]


# -- the hook ----------------------------------------------------------------------------------------------------------


Rewriter: TypeAlias = Callable[[ast.Module, str, str], None]
_rewriters: list[Rewriter] = []


def rewrite_first(rewriter: Rewriter) -> None:
    """Have this function (tree, source, filename) rewrite modules before they are lowered, if their own loader would have rewritten them (semantics §5.5)."""
    _rewriters.append(rewriter)


class _Loader(importlib.abc.InspectLoader):
    def __init__(self, inner: Any, filename: str) -> None:
        self.inner = inner
        self.filename = filename

    def __getattr__(self, name: str) -> Any:
        """Read the files of a package as its own loader does."""
        if name not in ("get_data", "get_resource_reader"):
            raise AttributeError(name)
        return getattr(self.inner, name)

    def create_module(self, spec: ModuleSpec) -> types.ModuleType | None:
        created: types.ModuleType | None = self.inner.create_module(spec)
        return created

    def get_source(self, fullname: str) -> str | None:
        return _source_of(self.inner, fullname, self.filename)

    def is_package(self, fullname: str) -> bool:
        return bool(self.inner.is_package(fullname))

    def exec_module(self, module: types.ModuleType) -> None:
        source = self.get_source(module.__name__)
        if source is None:
            raise UnsupportedError(f"{module.__name__} ({self.filename}) has no source, so it cannot be made durable")
        if _rewriters and not hasattr(self.inner, "get_source"):
            tree = ast.parse(source, self.filename)
            _rewriters[-1](tree, source, self.filename)
            run(module, tree, self.filename)
        else:
            run(module, source, self.filename)


def _source_of(loader: Any, fullname: str, filename: str) -> str | None:
    if hasattr(loader, "get_source"):
        source: str | None = naming(lambda: loader.get_source(fullname), filename)
        return source
    if not filename.endswith(".py") or not os.path.exists(filename):
        return None
    with open(filename, "rb") as file:  # for a loader that rewrites, such as pytest's
        return naming(lambda: importlib.util.decode_source(file.read()), filename)


class _Finder(importlib.abc.MetaPathFinder):
    """Asks the other finders for the spec, and inserts lowering."""

    def __init__(self) -> None:
        self.prefixes: set[str] = set()

    def matches(self, name: str) -> bool:
        return any(name == prefix or name.startswith(prefix + ".") for prefix in self.prefixes)

    def find_spec(self, fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
        if not self.matches(fullname) and not _declares(fullname, path):
            return None
        spec = _spec_of_others(fullname, path, target)
        if spec is None or spec.loader is None or isinstance(spec.loader, (_Loader, importlib.machinery.ExtensionFileLoader)):
            return spec
        if not isinstance(spec.loader, importlib.machinery.SourceFileLoader) and _source_of(spec.loader, fullname, spec.origin or "") is None:
            raise UnsupportedError(f"{fullname} ({spec.origin}) has no source, so it cannot be made durable")
        spec.loader = _Loader(spec.loader, spec.origin or fullname)
        return spec


def _spec_of_others(fullname: str, path: Sequence[str] | None, target: types.ModuleType | None = None) -> ModuleSpec | None:
    for finder in sys.meta_path:
        if not isinstance(finder, _Finder) and hasattr(finder, "find_spec"):
            spec: ModuleSpec | None = finder.find_spec(fullname, path, target)
            if spec is not None:
                return spec
    return None


def _declares(fullname: str, path: Sequence[str] | None) -> bool:
    """Whether a module sets `__kwflow_durable__ = True` at its top level.  Modules of the standard library, kwflow's and those in site-packages do not count."""
    if fullname.partition(".")[0] in sys.stdlib_module_names or fullname.partition(".")[0] == "kwflow":
        return False
    spec = _spec_of_others(fullname, path)
    if spec is None or isinstance(spec.loader, importlib.machinery.SourcelessFileLoader) or not (spec.origin or "").endswith(".py") or "site-packages" in (spec.origin or ""):
        return False
    source = _source_of(spec.loader, fullname, spec.origin or "") or ""
    return "__kwflow_durable__" in source and any(
        isinstance(node, (ast.Assign, ast.AnnAssign))
        and ast.unparse(node.target if isinstance(node, ast.AnnAssign) else node.targets[0]) == "__kwflow_durable__"
        and isinstance(node.value, ast.Constant)
        and node.value.value is True
        for node in ast.parse(source).body
    )


_finder = _Finder()


def install(prefixes: Iterable[str]) -> None:
    """Make every module of these packages durable when it is imported.

    Raises UsageError if one of them has been imported before, since its generators are native already, and for a single str instead of a list.
    """
    wanted = set(names.several(prefixes))
    for name, module in list(sys.modules.items()):
        if any(name == prefix or name.startswith(prefix + ".") for prefix in wanted) and name not in registry.modules() and getattr(module, "__file__", None):
            by = ", ".join(_importers(module)) or "a module that no longer exists"
            raise UsageError(f"{name} was imported (by {by}) before kwflow could make it durable; import it after kwflow.durable.install, or let kwflow import it (kwflow engine {name})")
    _finder.prefixes |= wanted
    if _finder not in sys.meta_path:
        sys.meta_path.insert(0, _finder)


def installed(name: str) -> bool:
    """Whether the module of this name is durable, or will be when it is imported."""
    return name in registry.modules() or (_finder in sys.meta_path and _finder.matches(name))


def _importers(imported: types.ModuleType) -> list[str]:
    """Return the modules outside this one that hold it, a module below it, or something defined there; or the program itself, if it is in this package."""
    package = imported.__name__ + "."
    program = getattr(getattr(sys.modules["__main__"], "__spec__", None), "name", "")  # `python -m`
    if (program + ".").startswith(package):
        return [f"the program, {program}"]

    def holds(other: types.ModuleType) -> bool:
        homes = (value.__name__ if isinstance(value, types.ModuleType) else getattr(value, "__module__", None) for value in list(vars(other).values()))
        return any(isinstance(home, str) and (home + ".").startswith(package) for home in homes)

    return sorted(name for name, other in list(sys.modules.items()) if isinstance(other, types.ModuleType) and not (name + ".").startswith(package) and holds(other))


def uninstall() -> None:
    """Remove the import hook; modules that were imported stay durable."""
    _finder.prefixes.clear()
    if _finder in sys.meta_path:
        sys.meta_path.remove(_finder)


# -- finding modules ---------------------------------------------------------------------------------------------------


def current(name: str) -> registry.Module | None:
    """Return the durable module of this name; import it if `install` made its package durable.  None if there is no such module any more.

    Raises CodeChangedError if its own code fails.
    """
    if name not in registry.modules() and _finder.matches(name):
        try:
            importlib.import_module(name)
        except ModuleNotFoundError as error:
            if error.name is None or not f"{name}.".startswith(f"{error.name}."):
                raise CodeChangedError(f"{name} cannot be imported: {error}") from error
        except (Exception, SystemExit) as error:  # the module's own code may raise anything
            raise CodeChangedError(f"{name} cannot be imported: {type(error).__name__}: {error}") from error
    return registry.modules().get(name)


def find_source(name: str, directory: str) -> str | None:
    """Return the source of a module, searched for in this directory and where `import` finds it.  Neither the module nor its packages are imported."""
    path: Sequence[str] | None = [directory, *sys.path]
    spec: ModuleSpec | None = None
    parts = name.split(".")
    for count in range(1, len(parts) + 1):
        if path is None:
            return None
        part = ".".join(parts[:count])
        spec = importlib.machinery.PathFinder.find_spec(part, path) or _spec_of_others(part, path if count > 1 else None)  # an editable install may be a finder of its own
        if spec is None:
            return None
        path = spec.submodule_search_locations
    source: str | None = spec.loader.get_source(name) if spec is not None and isinstance(spec.loader, importlib.abc.InspectLoader) else None
    return source


_NOT_LOWERED = (lambda: None).__code__


def unloaded(name: str) -> registry.Module | None:
    """Return a durable module that nobody has imported yet, for its source; none of it is run.  None if it is not durable, or could not be imported."""
    if _finder not in sys.meta_path:
        return None
    package = name.rpartition(".")[0]
    above = vars(sys.modules[package]) if package in sys.modules else getattr(package and unloaded(package), "namespace", {})
    if package and "__path__" not in above:
        return None
    with contextlib.suppress(UnsupportedError, SyntaxError, OSError):
        spec = _finder.find_spec(name, above.get("__path__"))
        source = spec.loader.get_source(name) if spec is not None and isinstance(spec.loader, _Loader) else None
        if spec is not None and source is not None:
            below = spec.submodule_search_locations
            namespace = {"__package__": spec.parent, **({"__path__": below} if below is not None else {})}
            imports_of(source, spec.parent or "")  # it can be read
            return registry.Module(name, source_version(source), spec.origin or name, source, _NOT_LOWERED, {}, {}, namespace)
    return None


def exists(name: str) -> bool:
    """Whether `import` would find a module of this name."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False

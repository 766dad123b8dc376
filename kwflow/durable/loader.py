"""How a module becomes durable: an import hook, `load_source`, and decorators for single functions.

Apart from the cache, this is the only module of `durable` that may read files.  A durable module is lowered before it runs;
code that cannot be lowered stops the import (semantics §5).
"""

from __future__ import annotations
import __future__

import ast
import contextlib
import functools
import hashlib
import importlib.abc
import importlib.machinery
import importlib.util
import inspect
import operator
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from importlib.machinery import ModuleSpec
from types import MappingProxyType
from typing import Any, TypeAlias, TypeVar

from kwflow.durable import cache, iters, names, registry, runtime
from kwflow.durable.lower import lower_module
from kwflow.errors import CodeChangedError, NotDurableWarning, UnsupportedError, UsageError

__all__ = ["current", "durable", "execute", "exists", "find_source", "install", "load_source", "native", "rewrite_first", "uninstall", "unloaded"]

_F = TypeVar("_F", bound=Callable[..., Any])
_T = TypeVar("_T")
_CONTAINERS = (*names.DICTS, list, set, tuple, frozenset, bytearray)
_ATOMS = (type(None), bool, int, float, complex, str, bytes, type, types.ModuleType, types.FunctionType, types.BuiltinFunctionType, types.GeneratorType)
_NAMED_TYPES = ("NewType", "ParamSpec", "TypeAliasType", "TypeVarTuple")  # everything else that typing makes is a value


def native(function: _F) -> _F:
    """Opt a function of a durable module out: it stays as written, and its generators cannot be saved."""
    return function


def durable(function: _F) -> _F:
    """Make one module-level generator function durable, in a module that is not: write `@durable` directly above its def.

    Raises UsageError for methods and inner functions, UnsupportedError for code that cannot be lowered or has no source.
    """
    raw: Any = function
    if not isinstance(raw, types.FunctionType) or raw.__qualname__ != raw.__name__:
        raise UsageError(f"@durable must decorate a module-level function, not {getattr(raw, '__qualname__', raw)!r}; make the whole module durable instead (__kwflow_durable__ = True)")
    if registry.function_of(raw.__code__) is not None:
        return function
    try:
        lines, first = inspect.getsourcelines(raw)
    except OSError:
        raise UnsupportedError(f"{raw.__module__}.{raw.__name__} has no source, so it cannot be made durable") from None
    within = lines[0][0].isspace()  # inside an `if` or `try`
    tree = ast.increment_lineno(ast.parse("if True:\n" * within + "".join(lines)), first - 1 - within)
    tree.body = tree.body[0].body if within else tree.body  # type: ignore[attr-defined] # the body of that `if`
    _bare(tree.body[0])
    if raw.__code__.co_flags & __future__.annotations.compiler_flag:  # needed for the annotations of its inner functions
        tree.body.insert(0, ast.ImportFrom("__future__", [ast.alias("annotations")], 0))
    lowered = lower_module(raw.__module__, tree, raw.__code__.co_filename)
    lowered.whole = False
    known = registry.modules().get(raw.__module__)
    if known is not None:  # other functions of this module were decorated before
        lowered.functions, lowered.units = {**known.functions, **lowered.functions}, {**known.units, **lowered.units}
        for other in known.functions.values():
            other.home = lowered
        lowered.version = hashlib.sha256(f"{known.version} {lowered.version}".encode()).hexdigest()
        lowered.source = f"{known.source}\n{lowered.source}"
    lowered.namespace = raw.__globals__
    registry.add_module(lowered)
    runtime.inject(raw.__globals__, lowered, {})
    exec(lowered.code, raw.__globals__)
    made = raw.__globals__[raw.__name__]
    made.__defaults__, made.__kwdefaults__, made.__annotations__, made.__doc__ = raw.__defaults__, raw.__kwdefaults__, raw.__annotations__, raw.__doc__
    made.__dict__.update(raw.__dict__)
    result: _F = made
    return result


def _bare(node: ast.stmt) -> None:
    """Remove what ran already when the function was defined: decorators, defaults, annotations."""
    if not isinstance(node, (ast.FunctionDef, ast.AsyncFunctionDef)):
        raise UnsupportedError(f"@durable must decorate a def, not {type(node).__name__}")
    node.decorator_list, node.returns = [], None
    arguments = node.args
    for argument in [*arguments.posonlyargs, *arguments.args, *arguments.kwonlyargs, arguments.vararg, arguments.kwarg]:
        if argument is not None:
            argument.annotation = None
    arguments.defaults = [ast.copy_location(ast.Constant(None), default) for default in arguments.defaults]
    arguments.kw_defaults = [default and ast.copy_location(ast.Constant(None), default) for default in arguments.kw_defaults]


def load_source(name: str, source: str | bytes | ast.Module, filename: str = "<source>") -> types.ModuleType:
    """Run a module from its source as a durable module, and put it into `sys.modules` under this name.

    Raises UnsupportedError, SyntaxError, or what the module's own code raises.
    """
    if isinstance(source, bytes):
        source = _named(functools.partial(importlib.util.decode_source, source), filename)
    module = types.ModuleType(name)
    module.__file__ = filename
    module.__dict__["__kwflow_durable__"] = True
    before = sys.modules.get(name)
    sys.modules[name] = module
    try:
        run(module, source, filename)
    except BaseException:
        if before is None:
            del sys.modules[name]
        else:
            sys.modules[name] = before
        raise
    return module


def run(module: types.ModuleType, source: str | ast.Module, filename: str) -> None:
    """Lower the source and execute it in this module's namespace."""
    lowered = _named(lambda: cache.load(module.__name__, source, filename), filename) if isinstance(source, str) else lower_module(module.__name__, source, filename)
    lowered.namespace = module.__dict__
    before = registry.add_module(lowered)
    try:
        execute(module, lowered)
    except BaseException:
        registry.remove_module(lowered, before)
        raise
    foreign = [(name, value) for name, value in module.__dict__.items() if isinstance(value, types.FunctionType) and value.__module__ != module.__name__]
    for name, value in foreign:
        kind = "generator" if inspect.isgeneratorfunction(value) else "coroutine" if inspect.iscoroutinefunction(value) else ""
        if kind and registry.function_of(value.__code__) is None:
            text = f"{module.__name__}.{name} is a {kind} function of {value.__module__}, which is not durable: a workflow cannot wait in it"
            warnings.warn(text, NotDurableWarning, stacklevel=2)


def execute(module: types.ModuleType, lowered: registry.Module, bound: Mapping[str, type] = MappingProxyType({})) -> None:
    """Run the code of a module.  `bound` are the current classes that a stored version uses in place of its own."""
    runtime.inject(module.__dict__, lowered, bound)
    exec(lowered.code, module.__dict__)
    _import_now(module, lowered.source)
    if sys.version_info >= (3, 14):
        module.__dict__.update(iters.twins(module.__dict__))
    named = {name: value for name, value in module.__dict__.items() if name[:2] != "__" and name[0] != "@" and not isinstance(value, (*_CONTAINERS, *_ATOMS))}
    single = {name: value for name, value in named.items() if type(value).__module__ != "typing" or type(value).__name__ in _NAMED_TYPES}
    own = [(name, cls) for name, cls in module.__dict__.items() if isinstance(cls, type) and cls.__module__ == module.__name__]
    registry.add_sentinels(lowered, single | {f"{name}.{attribute}": value for name, cls in own for attribute, value in vars(cls).items() if type(value) is object})


def _import_now(module: types.ModuleType, source: str) -> None:
    """Resolve lazy imports (PEP 810): a failing import fails now, not months later in a step.  One that needs a module still being imported stays lazy."""
    lazy = [name for name, value in module.__dict__.items() if isinstance(value, names.LAZY)]
    nodes = [node for node in ast.parse(source).body if isinstance(node, ast.Import)] if lazy else []
    submodules = [alias.name for node in nodes for alias in node.names if "." in alias.name]  # in `import a.b`, the `b` is lazy, too
    for path in [*lazy, *submodules]:
        try:
            operator.attrgetter(path)(module)
        except AttributeError:  # the name has been deleted, or is bound to another object by now
            continue
        except ImportError as error:
            if not getattr(getattr(sys.modules.get(error.name or ""), "__spec__", None), "_initializing", False):
                raise


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
            found = cache.load(name, source, spec.origin or name)
            below = spec.submodule_search_locations
            found.namespace = {"__package__": spec.parent, **({"__path__": below} if below is not None else {})}
            return found
    return None


def exists(name: str) -> bool:
    """Whether `import` would find a module of this name."""
    try:
        return importlib.util.find_spec(name) is not None
    except (ImportError, ValueError):
        return False


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
        source: str | None = _named(lambda: loader.get_source(fullname), filename)
        return source
    if not filename.endswith(".py") or not os.path.exists(filename):
        return None
    with open(filename, "rb") as file:  # for a loader that rewrites, such as pytest's
        return _named(lambda: importlib.util.decode_source(file.read()), filename)


def _named(read: Callable[[], _T], filename: str) -> _T:
    """Return what `read` returns, and name the file in its errors; Python does not, if its encoding is wrong.  Raises SyntaxError."""
    try:
        return read()
    except SyntaxError as error:
        error.filename = error.filename or filename
        raise
    except (ImportError, UnicodeDecodeError) as error:
        wrong = error.__cause__ or error  # the loader's own error says only that there is no source
        if isinstance(wrong, UnicodeDecodeError):
            raise SyntaxError(str(wrong), (filename, None, None, None)) from error
        raise


Rewriter: TypeAlias = Callable[[ast.Module, str, str], None]
_rewriters: list[Rewriter] = []


def rewrite_first(rewriter: Rewriter) -> None:
    """Have this function (tree, source, filename) rewrite modules before they are lowered, if their own loader would have rewritten them (semantics §5.5)."""
    _rewriters.append(rewriter)


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

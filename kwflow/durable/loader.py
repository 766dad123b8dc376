"""How a source becomes durable: it is lowered, and then run as a module, or, for `@durable`, in the place of one function of a module.

Code that cannot be lowered stops the import (semantics §5).  This file does not know how modules are found: that is hook.py.
"""

from __future__ import annotations
import __future__

import ast
import functools
import hashlib
import importlib.util
import inspect
import operator
import sys
import types
import warnings
from collections.abc import Callable, Mapping
from types import MappingProxyType
from typing import Any, TypeVar

from kwflow.durable import cache, iters, names, registry, runtime
from kwflow.durable.lower import lower_module
from kwflow.durable.refusals import made_durable
from kwflow.errors import NotDurableWarning, UnsupportedError, UsageError

__all__ = ["durable", "execute", "load_source", "naming", "native", "run"]

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
        source = naming(functools.partial(importlib.util.decode_source, source), filename)
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
    lowered = naming(lambda: cache.load(module.__name__, source, filename), filename) if isinstance(source, str) else lower_module(module.__name__, source, filename)
    lowered.namespace = module.__dict__
    before = registry.add_module(lowered)
    try:
        execute(module, lowered)
    except BaseException:
        registry.remove_module(lowered, before)
        raise
    foreign = [(name, value) for name, value in module.__dict__.items() if isinstance(value, types.FunctionType) and value.__module__ != module.__name__]
    for name, value in foreign if "site-packages" not in filename else ():  # its author knows nothing of kwflow, and its user cannot change what a library imports
        kind = "generator" if inspect.isgeneratorfunction(value) else "coroutine" if inspect.iscoroutinefunction(value) else ""
        if kind and registry.function_of(value.__code__) is None:
            text = f"{module.__name__}.{name} is a {kind} function of {value.__module__}, which is not durable: a workflow cannot wait in it"
            remedy = "" if (value.__module__ or "").partition(".")[0] in sys.stdlib_module_names else f"; {made_durable(value.__module__ or '', value.__code__.co_filename)}"
            warnings.warn(text + remedy, NotDurableWarning, stacklevel=2)


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


def naming(read: Callable[[], _T], filename: str) -> _T:
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

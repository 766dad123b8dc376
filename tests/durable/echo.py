"""The yield-echo mutation of CPython's own tests (H3): every sub-expression of an ordinary test method becomes a yield.

A test method turns into a generator in which each expression E is `(yield E)`, with a bare yield in front of every
statement. A driver sends each value back, so the test must still pass, wherever the yields are. Lowered by kwflow, and
captured and restored in process at sampled yields, it tests evaluation order, scopes and re-entry against a suite that
nobody here wrote. No part of that suite is kept here: the interpreter's own `test` package is used in place.

    python tests/durable/echo.py [--native] MODULE[:COUNT]...     one JSON line each: `Outcome` as a dict; COUNT methods by hash

Owns the mutation and the driver. Must not know how lowering works.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import dataclasses
import functools
import hashlib
import importlib.util
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import types
import unittest
from collections.abc import Callable, Iterator
from typing import Any

ECHOED = "@echo"  # the module global through which mutated code reaches its driver
DENSE_MAX = 60  # every yield up to here is a restore; later ones are sampled, because loops repeat what they showed
RESTORES_MAX = 300  # per test

# modules whose test methods are mutated: language, builtins, and the pure Python of the standard library
MODULES = """
    test_argparse test_array test_ast test_augassign test_base64 test_binascii test_binop test_bisect test_bool test_builtin test_bytes test_calendar
    test_class test_cmath test_codecs test_collections test_compare test_complex test_configparser test_context test_contextlib test_copy test_csv
    test_dataclasses test_decimal test_decorators test_deque test_descr test_dict test_dictviews test_difflib test_enum test_enumerate test_except_star
    test_exception_group test_exception_variations test_exceptions test_finalization test_float test_fnmatch test_format test_fractions test_fstring
    test_funcattrs test_functools test_generators test_genericalias test_genericclass test_getopt test_grammar test_graphlib test_hash test_heapq
    test_hmac test_index test_inspect test_int test_ipaddress test_isinstance test_iter test_itertools test_keywordonlyarg test_list test_listcomps
    test_long test_math test_memoryview test_metaclass test_minidom test_named_expressions test_numeric_tower test_operator test_optparse
    test_ordered_dict test_pathlib test_patma test_pickle test_plistlib test_positional_only_arg test_posixpath test_pow test_pprint test_property
    test_queue test_raise test_random test_range test_re test_reprlib test_richcmp test_scope test_set test_shlex test_shutil test_slice test_sort
    test_statistics test_string test_strptime test_struct test_subclassinit test_super test_tempfile test_textwrap test_time test_traceback test_tuple
    test_type_annotations test_types test_typing test_unary test_unicode test_unpack test_unpack_ex test_urlparse test_userdict test_userlist test_uuid
    test_weakref test_weakset test_with test_xml_etree test_yield_from test_zipfile test_zlib
""".split()

_LOCALS = "calls `vars` or `dir` as the value of a yield: only where they are called by name do they hide what lowering has added"
_FRAME = "compares a frame of its own with the one of a traceback: a restored generator has another frame"
_MODULES = "empties sys.modules, in which the harness finds kwflow"
_NATIVE = "fails natively too once every expression is a yield"
_CHANCE = "fails natively too, once in five runs: it compares floats made of chance for equality"
_COUNTS = "counts references, also those that temporaries hold"

EXCLUDED = {
    "test_ast": {"ModuleStateTests.test_sys_modules": _MODULES},
    "test_builtin": {"BuiltinTest.test_vars": _LOCALS},
    "test_dataclasses": {"TestStringAnnotations.test_classvar_module_level_import": _NATIVE, "TestStringAnnotations.test_text_annotations": _NATIVE},
    "test_descr": {"ClassPropertiesAndMethods.test_dir": _LOCALS},
    "test_raise": {"TestTracebackType.test_attrs": _FRAME},
    "test_statistics": {"TestPStdev.test_compare_to_variance": _CHANCE},
    "test_traceback": {
        "TestFrame.test_basics": _NATIVE, "TestFrame.test_lazy_lines": _NATIVE, "TestStack.test_extract_stack_lookup_lines": _NATIVE,
        "TestStack.test_extract_stackup_deferred_lookup_lines": _NATIVE, "TestTracebackException.test_lookup_lines": _NATIVE,
    },
    "test_xml_etree": {"BugsTest.test_bug_xmltoolkit63": _COUNTS},
}
LATER = {  # tests that later releases of CPython have added or changed
    "test_itertools": {"SizeofTest.test_combinations_with_replacement_sizeof": "asks how large an object of C is, for which its twin stands"},
    "test_list": {"ListTest.test_list_overwrite_local": _COUNTS},
    "test_traceback": {"TestStack.test_walk_stack": "compares the whole stack of two resumes"},
}


def left_out(module: str) -> dict[str, str]:
    """Method -> why it is left out."""
    return EXCLUDED.get(module, {}) | LATER.get(module, {})


_COMPREHENSIONS = (ast.ListComp, ast.SetComp, ast.DictComp, ast.GeneratorExp)


# -- the mutation ----------------------------------------------------------------------------------------------------


def echoed(node: ast.expr) -> ast.expr:
    """`(yield E)`, with the sub-expressions of E echoed too."""
    inner = within(node)
    return inner if isinstance(inner, (ast.Starred, ast.Slice)) or has_slice(inner) else ast.copy_location(ast.Yield(inner), node)


def has_slice(node: ast.expr) -> bool:
    return isinstance(node, ast.Tuple) and any(isinstance(element, ast.Slice) for element in node.elts)


def within(node: ast.expr) -> ast.expr:
    """The expression itself, with everything below it echoed that runs in the same activation."""
    if isinstance(node, ast.Lambda):
        return changed(node, args=defaults(node.args))
    if isinstance(node, _COMPREHENSIONS):
        first, *rest = node.generators
        return changed(node, generators=[changed(first, iter=echoed(first.iter)), *rest])
    if isinstance(node, ast.JoinedStr):
        return changed(node, values=[piece(value) for value in node.values])
    if isinstance(node, ast.NamedExpr):
        return changed(node, value=echoed(node.value))
    new: dict[str, Any] = {}
    for name, value in ast.iter_fields(node):
        if isinstance(value, ast.expr):
            new[name] = echoed(value)
        elif isinstance(value, list):
            new[name] = [echoed(item) if isinstance(item, ast.expr) else changed(item, value=echoed(item.value)) if isinstance(item, ast.keyword) else item for item in value]
    return changed(node, **new)


def piece(node: ast.expr) -> ast.expr:
    if not isinstance(node, ast.FormattedValue):
        return node
    spec = node.format_spec
    return changed(node, value=echoed(node.value), format_spec=None if spec is None else within(spec))


def defaults(args: ast.arguments) -> ast.arguments:
    return changed(args, defaults=[echoed(default) for default in args.defaults], kw_defaults=[default and echoed(default) for default in args.kw_defaults])


def target(node: ast.expr) -> ast.expr:
    """A target, with what it evaluates on the way echoed."""
    if isinstance(node, (ast.Tuple, ast.List)):
        return changed(node, elts=[target(element) for element in node.elts])
    if isinstance(node, ast.Starred):
        return changed(node, value=target(node.value))
    return within(node) if isinstance(node, (ast.Attribute, ast.Subscript)) else node


def block(statements: list[ast.stmt]) -> list[ast.stmt]:
    made: list[ast.stmt] = []
    for statement in statements:
        made += [ast.copy_location(ast.Expr(ast.copy_location(ast.Yield(None), statement)), statement), echoed_statement(statement)]
    return made


def echoed_statement(node: ast.stmt) -> ast.stmt:
    if getattr(node, "type_params", None):
        return node  # no yield may stand in the definition of a generic
    if isinstance(node, ast.FunctionDef):
        return changed(node, args=defaults(node.args), decorator_list=[echoed(decorator) for decorator in node.decorator_list])
    if isinstance(node, ast.AsyncFunctionDef):
        return node
    new: dict[str, Any] = {}
    for name, value in ast.iter_fields(node):
        if name in ("target", "targets"):
            new[name] = target(value) if isinstance(value, ast.expr) else [target(item) for item in value]
        elif name in ("body", "orelse", "finalbody") and not isinstance(node, ast.ClassDef):
            new[name] = block(value) if value else []
        elif name == "annotation" or (name == "handlers" and not isinstance(node, ast.Try)):
            continue  # not evaluated in a function; or a handler of except*, which must not wait
        elif name == "handlers":
            new[name] = [changed(handler, body=block(handler.body)) for handler in value]  # not its type, which would be refused
        elif isinstance(value, ast.expr):
            new[name] = echoed(value)
        elif isinstance(value, list):
            new[name] = [part_of_statement(item) for item in value]
    return changed(node, **new)


def part_of_statement(node: Any) -> Any:
    if isinstance(node, ast.expr):
        return echoed(node)
    if isinstance(node, ast.keyword):
        return changed(node, value=echoed(node.value))
    if isinstance(node, ast.withitem):
        return changed(node, context_expr=echoed(node.context_expr), optional_vars=node.optional_vars and target(node.optional_vars))
    if isinstance(node, ast.match_case):
        return changed(node, guard=node.guard and echoed(node.guard), body=block(node.body))
    return node


def changed(node: Any, **new: Any) -> Any:
    """A copy with some fields replaced. No tree is ever changed."""
    fields = {name: new.get(name, getattr(node, name, None)) for name in node._fields if name in new or hasattr(node, name)}
    return ast.copy_location(type(node)(**fields), node)


def mutated(method: ast.FunctionDef) -> ast.FunctionDef:
    """The method as a generator behind its driver."""
    driver = ast.copy_location(ast.Attribute(ast.Name(ECHOED, ast.Load()), "driven", ast.Load()), method)
    doc = 1 if ast.get_docstring(method, clean=False) is not None else 0
    body = [*method.body[:doc], *block(method.body[doc:])] if len(method.body) > doc else method.body
    return ast.fix_missing_locations(changed(method, body=body, decorator_list=[*method.decorator_list, driver]))


def methods(tree: ast.Module) -> Iterator[tuple[str, ast.FunctionDef]]:
    """("Class.method", node) of every ordinary test method at module level."""
    for node in in_scope(tree):
        if isinstance(node, ast.ClassDef):
            for inner in in_scope(node):
                if isinstance(inner, ast.FunctionDef) and inner.name.startswith("test") and not any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in own(inner)):
                    yield f"{node.name}.{inner.name}", inner


def in_scope(node: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(node):
        yield child
        if isinstance(child, (ast.If, ast.Try, ast.With)):
            yield from in_scope(child)


def own(function: ast.AST) -> Iterator[ast.AST]:
    for child in ast.iter_child_nodes(function):
        yield child
        if not isinstance(child, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda, ast.ClassDef)):
            yield from own(child)


class _Replace(ast.NodeTransformer):
    def __init__(self, replaced: dict[ast.AST, ast.AST]) -> None:
        self.replaced = replaced

    def generic_visit(self, node: ast.AST) -> ast.AST:
        return self.replaced[node] if node in self.replaced else super().generic_visit(node)


# -- the driver ------------------------------------------------------------------------------------------------------


class Driver:
    """Runs mutated tests: echoes every value, and re-enters the generator at sampled yields if `trip` is given."""

    def __init__(self, trip: Callable[[Any], Any] | None) -> None:
        self.trip = trip
        self.yields = self.restores = 0

    def driven(self, function: types.FunctionType) -> Callable[..., Any]:
        """The decorator put on each mutated method."""

        if self.trip is not None:
            precompiled(function)

        @functools.wraps(function)
        def test(*args: Any, **kwargs: Any) -> Any:
            return self.drive(function(*args, **kwargs))

        test.__dict__["echoed"] = True
        return test

    def drive(self, gen: Any) -> Any:
        value, number, restores, stride = None, 0, 0, 1
        while True:
            if self.trip is not None and restores < RESTORES_MAX and number % stride == 0:
                gen = self.trip(gen)
                restores += 1
                self.restores += 1
                if restores >= DENSE_MAX:
                    stride += 7
            try:
                value = gen.send(value)
            except StopIteration as stop:
                return stop.value
            number += 1
            self.yields += 1

    def native(self, function: Any) -> Any:
        return function


def precompiled(function: types.FunctionType) -> None:
    """Compile its cold twin now, because some tests lower the recursion limit."""
    from kwflow.durable import registry

    known = registry.function_of(function.__code__)
    assert known is not None, function
    assert known.cold


def restored(gen: Any) -> Any:
    """The same generator, entered again from its captured state. The old one is forgotten, which runs nothing (G8)."""
    from kwflow import durable

    made = durable.restore(durable.capture(gen))
    durable.discard(gen)
    return made


# -- running a module ------------------------------------------------------------------------------------------------


@dataclasses.dataclass
class Outcome:
    """What one module's tests did. `failed` maps "Class.method" to the end of a traceback."""

    module: str
    mutated: int = 0
    run: int = 0
    skipped: int = 0
    yields: int = 0
    restores: int = 0
    failed: dict[str, str] = dataclasses.field(default_factory=dict)


def source_file(module: str) -> pathlib.Path | None:
    """The file of `test.MODULE` of the running interpreter, if it has it."""
    try:
        spec = importlib.util.find_spec(f"test.{module}")
    except ModuleNotFoundError:
        return None
    return pathlib.Path(spec.origin) if spec is not None and spec.origin is not None else None


def chosen(module: str, names: list[str], count: int | None) -> list[str]:
    """A fixed sample: the first names by hash, so that it does not change when CPython adds a test."""
    ordered = sorted(names, key=lambda name: hashlib.sha256(f"{module}.{name}".encode()).digest())
    return ordered[:count]


def prepare(module: str, count: int | None) -> tuple[ast.Module, list[str], str]:
    """The module's tree with `count` of its methods mutated (None: all), the names of those, and its file name."""
    path = source_file(module)
    if path is None:
        raise FileNotFoundError(f"test.{module}")
    tree = ast.parse(path.read_text(encoding="utf-8"), str(path))
    found: dict[str, ast.FunctionDef] = {}
    for name, node in methods(tree):
        if name not in left_out(module):
            found[name] = node
    names = chosen(module, list(found), count)
    return _Replace({found[name]: mutated(found[name]) for name in names}).visit(tree), names, str(path)


def asynchronous_left_alone(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        if isinstance(node, ast.AsyncFunctionDef):
            mark = ast.copy_location(ast.Attribute(ast.Name(ECHOED, ast.Load()), "native", ast.Load()), node)
            node.decorator_list = [*node.decorator_list, ast.fix_missing_locations(mark)]
    return tree


def load(module: str, tree: ast.Module, filename: str, driver: Driver, native: bool) -> types.ModuleType:
    """Load the mutated module under its own name, so that what its tests pickle is found."""
    name = f"test.{module}"
    made = types.ModuleType(name)
    made.__file__ = filename
    made.__package__ = name.rpartition(".")[0]
    made.__dict__[ECHOED] = driver
    sys.modules[name] = made
    if native:
        exec(compile(tree, filename, "exec", dont_inherit=True), made.__dict__)
    else:
        from kwflow.durable import loader

        loader.run(made, asynchronous_left_alone(tree), filename)
    return made


def cases(module: types.ModuleType) -> Iterator[unittest.TestCase]:
    loader = unittest.TestLoader()
    for value in list(vars(module).values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == module.__name__:
            for name in loader.getTestCaseNames(value):
                if getattr(getattr(value, name), "echoed", False):
                    yield value(name)


def run(module: str, count: int | None = None, native: bool = False, trip: Callable[[Any], Any] | None = restored) -> Outcome:
    """Run the mutated tests of one module in this process. Raises FileNotFoundError if there is no `test.MODULE`."""
    from test import support

    support.use_resources, support.verbose = [], 0
    driver = Driver(None if native else trip)
    tree, names, filename = prepare(module, count)
    loaded = load(module, tree, filename, driver, native)
    outcome = Outcome(module, mutated=len(names))
    suite = unittest.TestSuite(cases(loaded))
    result = unittest.TestResult()
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        setup = getattr(loaded, "setUpModule", None)
        if setup is not None and not suite.countTestCases():
            return outcome
        suite.run(result)
    outcome.run, outcome.skipped = result.testsRun - len(result.skipped), len(result.skipped)
    outcome.yields, outcome.restores = driver.yields, driver.restores
    for case, text in [*result.failures, *result.errors, *[(case, "unexpected success") for case in result.unexpectedSuccesses]]:
        outcome.failed[case.id().removeprefix(f"test.{module}.")] = text[-1500:]
    return outcome


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # a shell ignores it for what it starts in the background, and some tests raise it
    parser = argparse.ArgumentParser()
    parser.add_argument("modules", nargs="+", metavar="MODULE[:COUNT]")
    parser.add_argument("--native", action="store_true")
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for named in options.modules:
            module, _, count = named.partition(":")
            outcome = run(module, int(count) if count else None, options.native)
            print(json.dumps(dataclasses.asdict(outcome)), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    main()

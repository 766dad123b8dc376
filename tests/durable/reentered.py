"""CPython's own tests of generators, with each generator captured and restored in process before every resume (H1).

The test module is lowered as it is. What its generator functions return is wrapped in the harness, so that `next`, `send`,
`throw` and `close` in a test reach a generator that has just been entered again, with the very same objects (no bytes).

    python tests/durable/reentered.py MODULE...     one JSON line each: `echo.Outcome` as a dict
"""

from __future__ import annotations

import ast
import contextlib
import dataclasses
import functools
import io
import json
import os
import pathlib
import signal
import sys
import tempfile
import types
import unittest
from collections.abc import Callable
from typing import Any

import echo

MODULES = ("test_generators", "test_yield_from", "test_contextlib", "test_with", "test_raise", "test_exceptions", "test_patma", "test_named_expressions")

_PROXY = "asks the generator object itself, where the harness has its proxy"
_STACK = "compares the whole stack: a restored generator delegates through `Resume`, and the harness through its proxy"
_CODE = "makes a function of a generator's code without the globals of its module"
_FUNCTION = "asks the generator function itself, where the harness has a wrapper"

# doctests compile their own code, so they are not lowered, and are not run
EXCLUDED = {
    "test_generators": {
        "GeneratorStackTraceTest.test_send_with_yield_from": _STACK,
        "GeneratorStackTraceTest.test_throw_with_yield_from": _STACK,
        "GeneratorTest.test_copy": _PROXY,
        "GeneratorTest.test_name": _PROXY,
        "SignalAndYieldFromTest.test_raise_and_yield_from": _PROXY,  # a C function that takes only generators
        "YieldFromTests.test_generator_gi_yieldfrom": _PROXY,
    },
}
_decorated = "TestContextDecorator.test_contextmanager_decorate_generator_function"
LATER = {
    "test_contextlib": dict.fromkeys([_decorated, f"{_decorated}_early_stop", f"{_decorated}_exception"], _FUNCTION),
    "test_generators": {
        "GeneratorStackTraceTest.test_throw_with_yield_from_custom_generator": _STACK,
        "ModifyUnderlyingIterableTest.test_new_gen_from_gi_code": _CODE,
    },
}


class Proxy:
    """A generator that is replaced by a restored one before every resume."""

    driver: Driver

    def __init__(self, gen: Any, driver: Driver) -> None:
        self.gen, self.driver = gen, driver

    def resumed(self) -> Any:
        gen = self.gen
        if not gen.gi_running and gen.gi_frame is not None:
            self.gen = self.driver.trip(gen)
        return self.gen

    def __iter__(self) -> Proxy:
        return self

    def __next__(self) -> Any:
        return next(self.resumed())

    def send(self, value: Any) -> Any:
        return self.resumed().send(value)

    def throw(self, *error: Any) -> Any:
        try:
            return self.resumed().throw(*error)
        finally:
            del error  # otherwise its traceback would hold this frame, which holds the error

    def close(self) -> Any:
        return self.resumed().close()

    def __getattr__(self, name: str) -> Any:
        return getattr(self.gen, name)


class Driver:
    """The object that the mutated module reaches through its global `@echo`."""

    def __init__(self) -> None:
        self.restores = 0
        self.parked: list[Any] = []

    def trip(self, gen: Any) -> Any:
        from kwflow import durable

        made = durable.restore(durable.capture(gen))
        self.restores += 1
        if isinstance(gen.gi_yieldfrom, types.GeneratorType):
            self.parked.append(gen)  # the two share the inner generator, and closing one would close it
        else:
            durable.discard(gen)
        return made

    def proxied(self, function: Callable[..., Any]) -> Callable[..., Any]:
        @functools.wraps(function)
        def make(*args: Any, **kwargs: Any) -> Proxy:
            return Proxy(function(*args, **kwargs), self)

        return make

    def native(self, function: Any) -> Any:
        return function


def with_proxies(tree: ast.Module) -> ast.Module:
    """Give every generator function a decorator of the harness."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef) and any(isinstance(part, (ast.Yield, ast.YieldFrom)) for part in echo.own(ast.Module(node.body, []))):
            mark = ast.copy_location(ast.Attribute(ast.Name(echo.ECHOED, ast.Load()), "proxied", ast.Load()), node)
            node.decorator_list = [*node.decorator_list, ast.fix_missing_locations(mark)]
    return tree


def run(module: str) -> echo.Outcome:
    """Run all tests of one module except the excluded ones. Raises FileNotFoundError if there is no `test.MODULE`."""
    from test import support

    support.use_resources, support.verbose = [], 0
    path = echo.source_file(module)
    if path is None:
        raise FileNotFoundError(f"test.{module}")
    driver = Driver()
    tree = with_proxies(ast.parse(path.read_text(encoding="utf-8"), str(path)))
    loaded = echo.load(module, tree, str(path), driver, native=False)
    outcome, result, suite = echo.Outcome(module), unittest.TestResult(), unittest.TestSuite()
    excluded = EXCLUDED.get(module, {}) | LATER.get(module, {})
    for value in list(vars(loaded).values()):
        if isinstance(value, type) and issubclass(value, unittest.TestCase) and value.__module__ == loaded.__name__:
            suite.addTests(value(name) for name in unittest.TestLoader().getTestCaseNames(value) if f"{value.__name__}.{name}" not in excluded)
    with contextlib.redirect_stdout(io.StringIO()), contextlib.redirect_stderr(io.StringIO()):
        suite.run(result)
    outcome.run, outcome.skipped, outcome.restores = result.testsRun - len(result.skipped), len(result.skipped), driver.restores
    for case, text in [*result.failures, *result.errors, *[(case, "unexpected success") for case in result.unexpectedSuccesses]]:
        outcome.failed[case.id().removeprefix(f"test.{module}.")] = text[-1500:]
    return outcome


def main() -> None:
    signal.signal(signal.SIGINT, signal.default_int_handler)  # as in echo.py
    with tempfile.TemporaryDirectory() as folder:
        os.chdir(folder)
        for module in sys.argv[1:]:
            print(json.dumps(dataclasses.asdict(run(module))), flush=True)


if __name__ == "__main__":
    sys.path.insert(0, str(pathlib.Path(__file__).parents[2]))
    main()

"""A pytest plugin for the tests of a library: its modules are durable, and every generator of theirs is captured and restored before each resume (H1).

    KWFLOW_LIBRARY=parso PYTHONPATH=.../tests/nightly python -m pytest -p restored_library test     in the directory of its source
"""

from __future__ import annotations

import ast
import importlib.abc
import importlib.machinery
import os
import pathlib
import sys
import types
from collections.abc import Sequence
from typing import Any

import pytest

sys.path.insert(0, str(pathlib.Path(__file__).parents[1] / "durable"))

import echo
import reentered

from kwflow.durable import loader

_driver = reentered.Driver()


class _Loader(importlib.machinery.SourceFileLoader):
    def exec_module(self, module: types.ModuleType) -> None:
        tree = reentered.with_proxies(ast.parse(self.get_data(self.path), self.path))
        module.__dict__[echo.ECHOED] = _driver
        loader.run(module, tree, self.path)


class _Finder(importlib.abc.MetaPathFinder):
    def find_spec(self, fullname: str, path: Sequence[str] | None, target: Any = None) -> importlib.machinery.ModuleSpec | None:
        if fullname.partition(".")[0] != os.environ["KWFLOW_LIBRARY"]:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path)
        if spec is not None and type(spec.loader) is importlib.machinery.SourceFileLoader:
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder())


def pytest_terminal_summary(terminalreporter: Any) -> None:
    terminalreporter.write_line(f"restores: {_driver.restores}")


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("filterwarnings", "ignore::kwflow.errors.NotDurableWarning")

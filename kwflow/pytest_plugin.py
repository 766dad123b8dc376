"""Durable modules in pytest: `kwflow_durable = package ...` in the ini file, or `__kwflow_durable__ = True` in a test module.

pytest finds this module through its entry point, and loads it wherever kwflow is installed, so it is light.  The hook is
installed before the first conftest is imported.  A durable test module first gets pytest's assertion rewrite, and is then
lowered (semantics §5.5).
"""

from __future__ import annotations

import ast

import pytest
from _pytest.assertion.rewrite import rewrite_asserts

from kwflow import durable

__all__ = ["pytest_addoption", "pytest_load_initial_conftests"]


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addini("kwflow_durable", "packages whose modules are made durable when they are imported", type="args", default=[])


@pytest.hookimpl(tryfirst=True)
def pytest_load_initial_conftests(early_config: pytest.Config) -> None:
    def rewrite(tree: ast.Module, source: str, filename: str) -> None:
        if early_config.getoption("assertmode", "rewrite") == "rewrite":
            rewrite_asserts(tree, source.encode(), filename, early_config)
            _adapt(tree)

    durable.rewrite_first(rewrite)
    durable.install(early_config.getini("kwflow_durable"))


def _adapt(tree: ast.Module) -> None:
    """Make pytest's tree fit for lowering.

    Its temporaries begin with `@` like those of lowering, which are saved only where lowering needs them, so they are renamed.
    Its nodes may end before they begin.
    """
    ast.fix_missing_locations(tree)
    for node in ast.walk(tree):
        if isinstance(node, (ast.stmt, ast.expr, ast.alias)) and (node.end_lineno or 0) < node.lineno:
            node.end_lineno, node.end_col_offset = node.lineno, node.col_offset
        if isinstance(node, ast.Name) and node.id.startswith("@py"):
            node.id = "$" + node.id[1:]
        elif isinstance(node, ast.alias) and (node.asname or "").startswith("@py"):
            node.asname = f"${(node.asname or '')[1:]}"

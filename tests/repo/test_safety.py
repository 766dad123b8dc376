"""Nothing that arrives in a record is evaluated: which files may compile, import by name or unpickle at all."""

import ast
import pathlib

import pytest

ROOT = pathlib.Path(__file__).parents[2]
CALLS = {"eval", "exec", "compile", "__import__", "import_module", "Unpickler", "_Unpickler", "loads", "system", "popen"}
ALLOWED = {
    "__init__.py": {"import_module"},  # kwflow.api, when it is first used
    "cli/__init__.py": {"import_module"},  # the modules of commands, from a table
    "durable/loader.py": {"exec"},  # the source of modules that are imported, and of stored versions whose sha256 is in the snapshot
    "durable/hook.py": {"import_module"},  # a module of a package that `install` was given
    "durable/lower/__init__.py": {"compile"},
    "durable/lower/functions.py": {"compile"},
    "durable/cache.py": {"loads"},  # marshal, for a file in __pycache__, which Python itself trusts
    "durable/loading.py": {"import_module", "_Unpickler"},  # with the list of allowed names
    "durable/saving.py": {"Unpickler"},  # what it has just pickled itself, to see whether this Python leaves nothing out
    "durable/rebuild.py": {"import_module", "loads"},  # fixed names, and modules that names.is_module_value accepts; cloudpickle only where snapshot_cloudpickle allows it
    "durable/versions.py": {"loads", "__import__"},  # codec.loads, with the code that the header names; the name in an import statement of old code
    "durable/stubs.py": {"_Unpickler"},  # every name becomes a stub
    "core/snapshot.py": {"loads"},  # codec.loads, after the seal was verified
    "runners/modules.py": {"import_module"},  # names on the command line
    "tokens.py": {"import_module"},  # a name in [kafka]
}


def calls(path: pathlib.Path) -> set[str]:
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Call):
            name = node.func.attr if isinstance(node.func, ast.Attribute) else node.func.id if isinstance(node.func, ast.Name) else ""
            if name in CALLS and not (isinstance(node.func, ast.Attribute) and isinstance(node.func.value, ast.Name) and node.func.value.id in ("re", "tomllib")):
                found.add(name)
    return found


@pytest.mark.parametrize("path", sorted((ROOT / "kwflow").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / "kwflow")))
def test_only_listed_files_compile_import_by_name_or_unpickle(path: pathlib.Path) -> None:
    """Each entry here is a decision. Write beside it why what it loads does not come from a record."""
    assert calls(path) <= ALLOWED.get(str(path.relative_to(ROOT / "kwflow")), set())


@pytest.mark.parametrize("path", sorted((ROOT / "kwflow").rglob("*.py")), ids=lambda path: str(path.relative_to(ROOT / "kwflow")))
def test_nothing_rests_on_an_assert_which_python_optimizes_away(path: pathlib.Path) -> None:
    """Style 16: `is not None` tells mypy what is known. Found with `python -O`, under which a WorkflowTester found nothing wrong."""
    asserts = [ast.unparse(node.test) for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Assert)]
    assert [test for test in asserts if not test.endswith(("is None", "is not None"))] == []


PLAIN = {("owners.py", "_write"), ("upkeep.py", "reset")}  # the owners topic: who has which partition, and which records it was at


@pytest.mark.parametrize("path", sorted((ROOT / "kwflow/runners/kafka").rglob("*.py")), ids=lambda path: path.name)
def test_whatever_is_written_to_a_broker_goes_through_encryption(path: pathlib.Path) -> None:
    """Decision 0060: a single place that forgets it would reveal everything."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.FunctionDef) and (path.name, node.name) not in PLAIN:
            called = {inner.func.attr for inner in ast.walk(node) if isinstance(inner, ast.Call) and isinstance(inner.func, ast.Attribute)}
            assert "produce" not in called or "encrypt" in called, f"{path.name}: {node.name} writes what is not encrypted"

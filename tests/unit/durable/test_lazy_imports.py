"""`lazy import` in durable modules (PEP 810): a module that cannot be imported is found when the engine starts, not months later in a step."""

import importlib
import pathlib
import sys

import pytest

from kwflow import durable
from kwflow.durable import versions
from kwflow.testing import WorkflowTester
from tests.unit.durable.test_versions import Deployed

pytestmark = pytest.mark.skipif(sys.version_info < (3, 15), reason="Python 3.15 has lazy imports")
MAIN = "\ndef main(opts):\n    numbers = count()\n    next(numbers)\n    yield kw.suspend('r')\n    return [next(numbers), helper(), LIMIT]\n"


@pytest.fixture
def package(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> pathlib.Path:
    monkeypatch.syspath_prepend(str(tmp_path))
    made = tmp_path / f"lazy_{tmp_path.name}"
    made.mkdir()
    (made / "__init__.py").touch()
    return made


@pytest.mark.parametrize("line", ["lazy import {}.missing", "lazy import {}.missing as found", "lazy from {} import missing", "lazy from nowhere import missing"])
def test_what_is_not_there_is_missed_when_the_module_is_loaded(package: pathlib.Path, line: str) -> None:
    with pytest.raises(ImportError, match="missing|nowhere"):
        durable.load_source("lazily", line.format(package.name) + "\ndef main(opts):\n    yield\n")


@pytest.mark.parametrize("first", ["flows", "helpers"])
def test_modules_that_import_each_other_lazily_may_be_imported_in_any_order(package: pathlib.Path, first: str) -> None:
    """The names of a module that is not finished stay lazy. That the first step to use one imports it does not count as a change of a global."""
    imports = f"import kwflow as kw\nlazy from {package.name}.helpers import helper\nlazy from {package.name}.limits import LIMIT\nlazy from itertools import count\n"
    (package / "flows.py").write_text(imports + MAIN)
    (package / "helpers.py").write_text(f"from {package.name}.flows import main\ndef helper():\n    return main.__name__\n")
    (package / "limits.py").write_text("LIMIT = 5\n")
    durable.install([package.name])
    importlib.import_module(f"{package.name}.{first}")
    tester = WorkflowTester(sys.modules[f"{package.name}.flows"].main)
    tester.start("w")
    tester.resume("w", "r")
    assert tester.result("w") == [1, "main", 5]


def test_old_code_imports_lazily_what_was_there_then() -> None:
    """§8.3: for a module that is gone, it is the stored one."""
    helpers = Deployed("lazily_gone")
    helpers.deploy("def helper():\n    return 'as it was'\n")
    site = Deployed()
    site.stored = helpers.stored
    gen = site.deploy("lazy from lazily_gone import helper\ndef main():\n    yield\n    yield helper()\n").main()
    saved = site.asleep(gen)
    del sys.modules["lazily_gone"]
    versions.registry.remove_module(versions.registry.modules()["lazily_gone"], None)
    site.deploy("def main():\n    yield\n    yield 'changed'\n")
    assert next(site.again(saved)) == "as it was"

"""Modules as values, packages of durable modules, and what the import system asks of their loader."""

import importlib
import inspect
import itertools
import pathlib
import pkgutil
import shutil
import sys
import traceback
from collections.abc import Callable

import pytest

from kwflow import durable
from kwflow.durable import names, registry
from kwflow.errors import CodeChangedError, CorruptSnapshotError
from kwflow.testing import WorkflowTester
from tests.unit.durable.test_versions import Deployed

_count = itertools.count()
Write = Callable[[dict[str, str]], str]


@pytest.fixture
def write(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> Write:
    """Return a function that writes files to `sys.path` below a name that no other test has. `NAME` in their paths and text stands for that name."""
    name = f"placed_{next(_count)}"
    monkeypatch.syspath_prepend(str(tmp_path))

    def write(files: dict[str, str]) -> str:
        for file, text in files.items():
            path = tmp_path / file.replace("NAME", name)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(text.replace("NAME", name))
        return name

    return write


def forget(name: str) -> None:
    """Forget a module, as if this process had not imported it."""
    for known in [known for known in sys.modules if known.startswith(name)]:
        del sys.modules[known]
        registry.modules().pop(known, None)  # type: ignore[attr-defined]


IMPORTS = [
    "from NAME_plain import prices as m", "from NAME_plain.inner import deep as m", "from NAME_plain import (\n        other,\n        prices as m,\n    )", "import NAME_plain.prices as m",
    "import NAME_plain.prices; m = NAME_plain", "import os, NAME_plain.prices as m", "if True: from NAME_plain import prices as m",
]  # fmt: skip


@pytest.mark.parametrize("statement", IMPORTS)
def test_a_module_that_a_function_imports_is_kept_however_it_is_imported(write: Write, statement: str) -> None:
    """docs/LOCALS.md: it is kept by name. In the next process, nobody may have imported it yet."""
    name = write({"NAME_plain/__init__.py": "", "NAME_plain/prices.py": "", "NAME_plain/other.py": "", "NAME_plain/inner/deep.py": ""})
    source = f"def main():\n    {statement}\n    yield\n    yield m.__name__\n".replace("NAME", name)
    gen = durable.load_source(f"{name}_flow", source).main()
    next(gen)
    saved = durable.dumps(gen)
    forget(f"{name}_plain")
    assert next(durable.loads(saved)).startswith(f"{name}_plain")


def test_a_module_that_only_old_code_imports_is_kept(write: Write) -> None:
    """docs/CODE.md: imports of old code bind the current modules."""
    name = write({"NAME_plain/__init__.py": "", "NAME_plain/prices.py": ""})
    site = Deployed(f"{name}_flow")
    gen = site.deploy(f"def main():\n    from {name}_plain import prices\n    yield\n    yield prices.__name__\n").main()
    saved = site.asleep(gen)
    site.deploy("def main():\n    yield")
    forget(f"{name}_plain")
    assert next(site.again(saved)) == f"{name}_plain.prices"


def test_a_module_that_a_function_made_durable_alone_imports_is_kept(write: Write) -> None:
    """docs/LOCALS.md: this holds for each function of a module."""
    head, body = "from kwflow.durable import durable\n", "@durable\ndef {}():\n    from NAME_plain import {} as m\n    yield\n    yield m.__name__\n"
    name = write({"NAME_plain/__init__.py": "", "NAME_plain/one.py": "", "NAME_plain/two.py": "", "NAME_flow.py": head + body.format("first", "one") + body.format("second", "two")})
    module = __import__(f"{name}_flow")
    for gen in (module.first(), module.second()):
        next(gen)
        saved = durable.dumps(gen)
        forget(f"{name}_plain")
        assert next(durable.loads(saved)).startswith(f"{name}_plain.")


def test_a_durable_module_in_a_variable_is_the_stored_one_once_it_is_gone(write: Write, tmp_path: pathlib.Path) -> None:
    """docs/CODE.md: the same as for `import`. While the current module exists, it is that one."""
    name = write({"NAME_flow.py": "def main():\n    import NAME_prices as m\n    yield\n    yield m.RATE\n", "NAME_prices.py": "RATE = 1\n"})
    durable.install([f"{name}_flow", f"{name}_prices"])
    site = Deployed(f"{name}_flow")
    gen = __import__(site.name).main()
    saved = site.asleep(gen)
    forget(name)
    write({"NAME_prices.py": "RATE = 20\n"})
    assert next(site.load(saved)[0]) == 20
    forget(name)
    (tmp_path / f"{name}_prices.py").unlink()
    assert next(site.again(saved)) == 1


def test_a_class_of_a_library_that_has_moved_is_what_its_old_name_means_now(write: Write, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/LOCALS.md: a library of `snapshot_modules`. An upgrade of the library must not park instances that wait."""
    name = write({"NAME_lib/__init__.py": "", "NAME_lib/a.py": "import subprocess\nclass P:\n    pass\n", "NAME_lib/b.py": "class P:\n    pass\n"})
    monkeypatch.setattr(names, "_modules", {f"{name}_lib"})
    gen = durable.load_source(f"{name}_flow", f"from {name}_lib.a import P\ndef main():\n    p = P()\n    yield\n    yield p\n").main()
    next(gen)
    saved = durable.dumps(gen)
    forget(f"{name}_lib")
    write({"NAME_lib/a.py": "import subprocess\nfrom NAME_lib.b import P\n"})
    assert type(next(durable.loads(saved))).__module__ == f"{name}_lib.b"
    with pytest.raises(CorruptSnapshotError, match="no longer exists"):
        durable.loads(saved.replace(b"\x8c\x01P\x94", b"\x8c\x10subprocess.Popen\x94"))
    write({"NAME_lib/a.py": "from subprocess import Popen as P\n"})
    forget(f"{name}_lib")
    with pytest.raises(CorruptSnapshotError, match="not allowed"):
        durable.loads(saved)


CYCLE = {
    "NAME/__init__.py": "RATE = 4\nfrom NAME.trips import main\n",
    "NAME/trips.py": "from NAME import models\nfrom .models import price\ndef main():\n    yield\n    yield price(), models.__name__.partition('@')[0]\n",
    "NAME/models.py": "import NAME.trips\nfrom NAME import RATE\ndef price():\n    return RATE\n",
}


@pytest.mark.parametrize("gone", [["__init__", "trips", "models"], ["trips", "models"], ["models"]])
def test_modules_that_import_each_other_are_found_in_the_store(write: Write, tmp_path: pathlib.Path, gone: list[str]) -> None:
    """docs/CODE.md: also when modules were renamed or deleted. They run in the order in which they were imported."""
    name = write(CYCLE)
    durable.install([name])
    site = Deployed(f"{name}.trips")
    gen = __import__(name).main()
    saved = site.asleep(gen)
    forget(name)
    write({"NAME/__init__.py": "RATE = 40\n", "NAME/trips.py": "def main():\n    yield 7\n"})
    for module in gone:
        (tmp_path / name / f"{module}.py").unlink()
    if "__init__" in gone:
        shutil.rmtree(tmp_path / name)
    assert next(site.again(saved)) == (4 if "__init__" in gone else 40, f"{name}.models")
    assert not any(known.startswith(name) and "@" not in known for known in sys.modules if known not in (name, f"{name}.trips"))


OWN = "def own():\n    return 4\n"
STATEMENTS = [
    "import NAME.models as m; price = m.price", "import NAME.models; price = NAME.models.price; del NAME", "from NAME.models import price", "from NAME import models; price = models.price",
    "from . import models; price = models.price", "from .models import price", "import NAME.trips as m; price = m.own",
]  # fmt: skip


@pytest.mark.parametrize("statement", STATEMENTS)
@pytest.mark.parametrize("whole", ["package", "directory", ""])
def test_a_function_of_old_code_imports_what_is_gone(write: Write, tmp_path: pathlib.Path, statement: str, whole: str) -> None:
    """docs/CODE.md: an import in a function used to raise ImportError in the workflow."""
    head = {} if whole == "directory" else {"NAME/__init__.py": ""}
    name = write({**head, "NAME/models.py": "def price():\n    return 4\n", "NAME/trips.py": f"{OWN}def main():\n    {statement}\n    yield\n    {statement}\n    yield price()\n"})
    durable.install([name])
    site = Deployed(f"{name}.trips")
    gen = importlib.import_module(site.name).main()
    saved = site.asleep(gen)
    forget(name)
    if whole:
        shutil.rmtree(tmp_path / name)
    else:
        write({"NAME/trips.py": OWN + "def main():\n    yield 7\n"})
        (tmp_path / name / "models.py").unlink()
    assert next(site.again(saved)) == 4
    assert f"{name}.models" not in sys.modules


def test_old_code_that_fails_in_a_cycle_is_tried_again_as_a_whole(write: Write, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/CODE.md: no module that holds one that failed is kept."""
    name = write({**CYCLE, "NAME/trips.py": "import os\n" + CYCLE["NAME/trips.py"].replace("def main", "os.environ['NAME']\ndef main")})
    durable.install([name])
    monkeypatch.setenv(name, "1")
    site = Deployed(f"{name}.trips")
    gen = __import__(name).main()
    saved = site.asleep(gen)
    forget(name)
    shutil.rmtree(tmp_path / name)
    monkeypatch.delenv(name)
    with pytest.raises(CodeChangedError, match="KeyError"):
        site.load(saved)
    assert not any(known.startswith(name) for known in sys.modules)
    monkeypatch.setenv(name, "1")
    assert next(site.load(saved)[0]) == (4, f"{name}.models")


DATA = {
    "NAME/__init__.py": "import pkgutil\nfrom importlib.resources import files\nTEXT = pkgutil.get_data(__name__, 'text.txt').decode()\nREAD = files(__name__).joinpath('text.txt').read_text()\n",
    "NAME/text.txt": "some text",
    "NAME/flow.py": "from importlib.resources import files\nfrom . import READ, TEXT\ndef main():\n    yield\n    yield TEXT, READ, files('NAME').joinpath('text.txt').read_text()\n",
}


@pytest.mark.parametrize("zipped", [False, True])
def test_a_durable_package_has_its_files_and_its_source_as_any_other(write: Write, tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, zipped: bool) -> None:
    """§5.2: `importlib.resources`, `pkgutil.get_data`, `inspect` and tracebacks work, in a zip too."""
    name = write(DATA)
    if zipped:
        shutil.make_archive(str(tmp_path / "packed"), "zip", tmp_path, name)
        shutil.rmtree(tmp_path / name)
        monkeypatch.syspath_prepend(str(tmp_path / "packed.zip"))
    durable.install([name])
    module = importlib.import_module(f"{name}.flow")
    gen = module.main()
    next(gen)
    gen = durable.loads(durable.dumps(gen))
    assert next(gen) == ("some text",) * 3
    assert inspect.getsource(module.main) == DATA["NAME/flow.py"].replace("NAME", name).partition("TEXT\n")[2]
    with pytest.raises(KeyError) as raised:
        gen.throw(KeyError(1))
    assert "yield TEXT, READ" in "".join(traceback.format_exception(raised.value))
    assert [found.name for found in pkgutil.iter_modules(sys.modules[name].__path__)] == ["flow"]


def test_an_old_version_of_a_package_has_the_files_of_the_current_one(write: Write) -> None:
    """§8.3: `__name__` has another value in the old version."""
    name = write({**DATA, "NAME/__init__.py": DATA["NAME/__init__.py"] + "def main():\n    yield\n    yield TEXT, READ\n"})
    durable.install([name])
    site = Deployed(name)
    gen = importlib.import_module(name).main()
    saved = site.asleep(gen)
    forget(name)
    write({"NAME/__init__.py": "def main():\n    yield 7\n"})
    assert next(site.again(saved)) == ("some text", "some text")


@pytest.mark.parametrize("imported", [False, True])
@pytest.mark.parametrize("statement", ["from .models import price", "from .below.models import price", "import NAME.below.models as m; price = m.price"])
def test_what_a_function_has_yet_to_import_is_stored_with_it(write: Write, tmp_path: pathlib.Path, statement: str, imported: bool) -> None:
    """docs/CODE.md: the deployment that deletes the module comes before that import, or after it."""
    flow = f"import kwflow as kw\ndef main(o):\n    yield kw.suspend('a')\n    {statement}\n    yield kw.suspend('b')\n    {statement}\n    return price()\n"
    models = {f"NAME/{below}models.py": "import NAME.rates as rates\ndef price():\n    return rates.RATE\n" for below in ("", "below/")}
    name = write({"NAME/__init__.py": "", "NAME/flow.py": flow, "NAME/below/__init__.py": "", "NAME/rates.py": "import NAME.models\nRATE = 4\n", **models})
    durable.install([name])
    w = WorkflowTester(importlib.import_module(f"{name}.flow").main)
    w.start("w")
    assert imported or f"{name}.rates" not in sys.modules, "storing its source runs nothing of it"
    if imported:
        w.resume("w", "a")
    forget(name)
    shutil.rmtree(tmp_path / name)
    write({"NAME/__init__.py": "", "NAME/flow.py": "import kwflow as kw\ndef main(o):\n    yield kw.suspend('c')\n"})
    w.deploy(importlib.import_module(f"{name}.flow").main)
    if not imported:
        w.resume("w", "a")
    w.resume("w", "b")
    assert w.result("w") == 4


def test_what_lowering_adds_to_a_module_is_not_among_its_public_names() -> None:
    """docs/LOCALS.md "Libraries": libraries walk `vars` of their modules (toolz curries what it finds there), and `import *` copies every name without an underscore."""
    module = durable.load_source("public_names", "def f(xs):\n    for x in xs:\n        yield x\n")
    assert [name for name in vars(module) if name[:2] != "__" or name[-2:] != "__"] == ["f"]

"""Which modules are durable, and the error when one cannot be (semantics §5), each in a process of its own."""

import importlib.util
import pathlib
import re
import subprocess
import sys
import textwrap
import zipfile

import pytest

from kwflow import durable
from kwflow.cli.lowered import _source
from kwflow.config import load_config
from kwflow.errors import UsageError
from kwflow.runners.modules import load_modules, load_workflows

WORKFLOW = "import kwflow as kw\ndef main(o):\n    yield kw.suspend('a')\n"


def python(directory: pathlib.Path, script: str, *options: str) -> "subprocess.CompletedProcess[str]":
    what = options if "-m" in options else (*options, "-c", textwrap.dedent(script))
    return subprocess.run([sys.executable, *what], cwd=directory, capture_output=True, text=True, check=False, timeout=60)


def said(directory: pathlib.Path, script: str) -> str:
    done = python(directory, script)
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


@pytest.fixture
def package(tmp_path: pathlib.Path) -> pathlib.Path:
    (tmp_path / "shop/parts").mkdir(parents=True)
    for name in ("shop/__init__.py", "shop/parts/__init__.py"):
        (tmp_path / name).touch()
    (tmp_path / "shop/orders.py").write_text("from shop.parts import helper\n" + WORKFLOW)
    (tmp_path / "shop/parts/helper.py").write_text("def steps():\n    yield 1\n")
    (tmp_path / "plain.py").write_text(WORKFLOW)
    (tmp_path / "marked.py").write_text("__kwflow_durable__ = True\n" + WORKFLOW)
    (tmp_path / "typed.py").write_text("__kwflow_durable__: bool = True\n" + WORKFLOW)
    return tmp_path


@pytest.mark.slow
def test_durable_are_the_packages_of_the_modules_those_that_say_so_and_configured_ones(package: pathlib.Path) -> None:
    """§5.1."""
    script = """
        from kwflow.durable import is_durable
        from kwflow.runners.modules import load_workflows
        load_workflows(["shop.orders"], None, ["other"])
        import marked, other, plain, shop.orders, shop.parts.helper, typed
        print([is_durable(f) for f in (shop.orders.main, shop.parts.helper.steps, marked.main, typed.main, other.main, plain.main)])
    """
    (package / "other.py").write_text(WORKFLOW)
    assert said(package, script) == "[True, True, True, True, True, False]"


@pytest.mark.slow
def test_a_program_that_belongs_to_the_package_of_its_workflows_says_what_of_it_is_durable(package: pathlib.Path) -> None:
    """§5.1: the program has imported its own package before it can host an engine, and `python -m shop.program` the package above it. What it declares is not widened."""
    (package / "shop/program.py").write_text(textwrap.dedent("""
        from kwflow import durable
        from kwflow.errors import UsageError
        from kwflow.runners.modules import load_workflows
        try:
            load_workflows(["shop.orders"])
        except UsageError as error:
            print(error)
        durable.install(["shop.orders"])
        found = load_workflows(["shop.orders"]).functions["orders"]
        from shop.orders import main
        from shop.parts import helper
        print(found is main, durable.is_durable(main), durable.is_durable(helper.steps))
    """))
    done = python(package, "", "-m", "shop.program")
    assert done.returncode == 0, done.stderr
    refused, found = done.stdout.splitlines()
    assert "shop was imported (by the program, shop.program) before" in refused
    assert "kwflow.durable.install(['shop.orders'])" in refused
    assert found == "True True False"


@pytest.mark.parametrize("head", [b"\xef\xbb\xbf", b"# -*- coding: latin-1 -*-\n"])
def test_a_file_is_in_the_encoding_that_python_takes_it_for(tmp_path: pathlib.Path, head: bytes) -> None:
    """§5.1: with a byte order mark, or a line that declares the encoding. `kwflow engine path.py` does the same as `import`."""
    file = tmp_path / "encoded_flow.py"
    file.write_bytes(head + "def main(o):\n    yield\n    return 'caf\xe9'\n".encode("latin-1" if b"latin" in head else "utf-8"))
    main = load_workflows([str(file)], tmp_path).functions["encoded_flow"]
    gen = main(None)
    next(gen)
    with pytest.raises(StopIteration, match="caf\xe9"):
        gen.send(None)
    assert "caf\xe9" in _source(str(file), None)[0]


def test_the_file_of_settings_has_a_section_for_packages_and_for_snapshots(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """§5.1, wire.md §3: the sections that the error messages point to."""
    file = tmp_path / "kwflow.toml"
    file.write_text('[durable]\npackages = ["vendor"]\n[snapshot]\nmodules = ["money"]\nbytes_max = 5000\n[embedded]\nretention_ms = 7\n[limits]\nhold_max = 3\n[topics]\nresume = "in"\n')
    config = load_config(file)
    assert (config.durable_packages, config.snapshot_modules, config.snapshot_bytes_max, config.embedded_retention_ms) == (["vendor"], ["money"], 5000, 7)
    assert (config.hold_max, config.resume_topic) == (3, "in")
    file.write_text("[snapshots]\n")
    with pytest.raises(UsageError, match=r"unknown section \[snapshots\]; sections are \[app\]"):
        load_config(file)
    for text, said in {
        "[encryption]\nkey = 1\n": "[encryption] has no setting 'key'; did you mean 'keys'?",
        "[limits]\nvalue_byte_max = 1\n": "[limits] has no setting 'value_byte_max'; did you mean 'value_bytes_max'?",
        "[topics]\nhistori = 1\n": "[topics] has no setting 'histori'; did you mean 'history'?",
        "[app]\nzzz = 1\n": "[app] has no setting 'zzz'",
    }.items():
        file.write_text(text)
        with pytest.raises(UsageError, match=re.escape(f"{file}: {said}") + "$"):
            load_config(file)
    with pytest.raises(UsageError, match=r"^there is no setting 'resumetopic'; did you mean 'resume_topic'\?$"):
        load_config(None, resumetopic="x")
    for name, meant in (("KWFLOW_VALUE_BYTE_MAX", "KWFLOW_VALUE_BYTES_MAX"), ("KWFLOW_ENCRYPTION_KEY", "KWFLOW_ENCRYPTION_KEYS")):
        monkeypatch.setenv(name, "1")
        with pytest.raises(UsageError, match=rf"^{name} is not a setting; did you mean {meant}\?$"):
            load_config(None)
        monkeypatch.delenv(name)
    for other in ("KWFLOW_PORT", "KWFLOW_SERVICE_HOST", "KWFLOW_GATEWAY_PORT_8000_TCP_ADDR", "KWFLOW_GATEWAY_SERVICE_PORT_HTTP", "KWFLOW_PROCESSES", "KWFLOW_ENGINE_STATE_DIR"):
        monkeypatch.setenv(other, "1")
    load_config(None)
    for setting, said in {"snapshot_modules": "modules under [snapshot]", "resume_topic": "resume under [topics]", "hold_max": "hold_max under [app] or [limits]"}.items():
        file.write_text(f"{setting} = 1\n")
        with pytest.raises(UsageError, match=re.escape(f"{setting} belongs in a section: write {said}")):
            load_config(file)


@pytest.mark.parametrize(("text", "said"), [
    (b"app = 5", r"write \[app\] above its settings"), (b'[app]\napplication_id = "b\xfcro"', "can't decode byte 0xfc"), (b"[app]\nhttp", "end of document"),
    (b"kafka = 5", "config kafka: .* dictionary"),
])  # fmt: skip
def test_a_file_of_settings_that_cannot_be_read_says_where(tmp_path: pathlib.Path, text: bytes, said: str) -> None:
    file = tmp_path / "kwflow.toml"
    file.write_bytes(text)
    with pytest.raises(UsageError, match=said):
        load_config(file)


@pytest.mark.parametrize(("names", "said"), [
    ({"resume": ""}, "resume_topic must not be empty"), ({"result": "workflow-resume"}, "resume_topic 'workflow-resume' is also the name of another topic"),
    ({"scheduler": "workflow-resume"}, "is also the name of another"), ({"reply": "workflow-engine-dead-letter"}, "reply_topic"), ({"error": "workflow-scheduler"}, "scheduler_topic"),
])  # fmt: skip
def test_what_the_engine_reads_is_nobody_else_s_topic(names: dict[str, str], said: str) -> None:
    """KW-12: results and errors may share a topic, or have none."""
    with pytest.raises(UsageError, match=f"^config: .*{said}"):
        load_config(**{f"{name}_topic": topic for name, topic in names.items()})
    assert load_config(error_topic="workflow-result").error_topic == "workflow-result"
    assert load_config(error_topic="", result_topic="").error_topic == ""


def test_a_list_in_the_environment_that_is_no_json_is_wrong_usage(monkeypatch: pytest.MonkeyPatch) -> None:
    """It was reported as a bug of kwflow."""
    monkeypatch.setenv("KWFLOW_SNAPSHOT_KEYS", "0123456789abcdef0123456789abcdef")
    with pytest.raises(UsageError, match='"snapshot_keys".* are JSON'):
        load_config()


@pytest.mark.parametrize("text", [b"x = '\xff'\n", b"\n\n\nx = '\xff'\n", b"# coding: nonesuch\n", b"\xef\xbb\xbf# coding: latin-1\n", b"x = 1\0\n"])
def test_a_file_that_cannot_be_decoded_is_named(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch, text: bytes) -> None:
    """Python gives only the reason, and a package has many files. Both as a path and as a module."""
    (tmp_path / "undecoded.py").write_bytes(text)
    monkeypatch.syspath_prepend(tmp_path)
    for module in (str(tmp_path / "undecoded.py"), "undecoded"):
        with pytest.raises(SyntaxError, match=r"\(undecoded.py"):
            load_workflows([module], tmp_path)


@pytest.mark.slow
def test_a_workflow_of_the_program_itself_is_told_where_it_belongs(tmp_path: pathlib.Path) -> None:
    """`python -m flows` with the mark at its top: the error asked for the mark that was there."""
    script = """
        __kwflow_durable__ = True
        from kwflow.testing import WorkflowTester
        def main(opts):
            yield
        tester = WorkflowTester(main)
        tester.start("a")
        print(tester.values("workflow-error"))
    """
    assert "the main program is never durable: move it to a durable module that the program imports" in said(tmp_path, script)


def test_the_source_of_a_module_is_found_where_a_finder_of_an_editable_install_has_it(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """docs/CODE.md: `kwflow code diff` said that the module was gone. Setuptools installs such a finder for packages whose directories have other names."""
    from kwflow import durable

    (tmp_path / "__init__.py").write_text("raise RuntimeError")
    (tmp_path / "flows.py").write_text("price = 1\n")

    class Editable:
        @staticmethod
        def find_spec(name: str, path: object = None, target: object = None) -> object:
            return importlib.util.spec_from_file_location(name, tmp_path / "__init__.py") if name == "mapped" else None

    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path, Editable])
    assert durable.find_source("mapped.flows", str(tmp_path)) == "price = 1\n"
    assert durable.find_source("mapped.gone", str(tmp_path)) is durable.find_source("unmapped", str(tmp_path)) is None


@pytest.mark.slow
def test_a_module_in_a_zip_file_is_durable_and_one_without_source_is_refused(package: pathlib.Path) -> None:
    """§5.2."""
    with zipfile.ZipFile(package / "code.zip", "w") as archive:
        archive.writestr("zipped.py", WORKFLOW)
    script = """
        import sys
        sys.path.insert(0, "code.zip")
        from kwflow import durable
        durable.install(["zipped", "compiled"])
        import zipped
        print(durable.is_durable(zipped.main))
        try:
            import compiled
        except durable.loader.UnsupportedError as error:
            print("no source" in str(error))
    """
    (package / "compiled.py").write_text(WORKFLOW)
    python(package, "import py_compile; py_compile.compile('compiled.py', 'compiled.pyc')")
    (package / "compiled.py").unlink()
    assert said(package, script).split() == ["True", "True"]


def test_one_name_where_a_list_of_names_goes_is_refused_not_taken_for_its_letters() -> None:
    """§5.2: nothing was durable then, and only the first start showed it."""
    for call in (durable.install, durable.allow_modules, load_modules):
        with pytest.raises(UsageError, match=r"a list of names goes here: \['shop'\]"):
            call("shop")


@pytest.mark.slow
def test_a_module_imported_too_early_is_refused_with_who_imported_it(package: pathlib.Path) -> None:
    """§5.2."""
    (package / "early.py").write_text("from shop.orders import main\n")
    script = """
        import early
        from kwflow import durable
        try:
            durable.install(["shop"])
        except Exception as error:
            print(error)
    """
    assert "was imported (by" in said(package, script) and "early" in said(package, script)


@pytest.mark.slow
def test_a_stale_pyc_of_the_plain_module_is_not_used(package: pathlib.Path) -> None:
    """§5.2: pip writes one when it installs a package."""
    assert python(package, "import shop.orders").returncode == 0
    assert said(package, "from kwflow import durable\ndurable.install(['shop'])\nimport shop.orders\nprint(durable.is_durable(shop.orders.main))") == "True"


@pytest.mark.slow
def test_code_of_main_is_refused_for_snapshots_of_an_engine(tmp_path: pathlib.Path) -> None:
    """§5.4: no other process could find the code again."""
    (tmp_path / "script.py").write_text(
        "import kwflow as kw\nfrom kwflow import durable\nfrom kwflow.testing import WorkflowTester\n"
        "@durable.durable\ndef flow(o):\n    yield kw.suspend('a')\n"
        "tester = WorkflowTester(flow)\ntester.start('w')\nprint(tester.header('w')['parked']['message'])\n"
    )
    done = subprocess.run([sys.executable, "script.py"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert "__main__" in done.stdout and "module of its own" in done.stdout, done.stderr


@pytest.mark.slow
def test_a_durable_test_module_has_rewritten_asserts_and_is_durable_and_saved_in_the_middle_of_one(tmp_path: pathlib.Path) -> None:
    """§5.5."""
    (tmp_path / "test_mine.py").write_text('''
__kwflow_durable__ = True
import kwflow as kw
import library
from kwflow import durable
from kwflow.testing import WorkflowTester

def flow(o):
    assert [o, 2] == [1, (yield kw.suspend("a"))]
    return "ok"

def test_good():
    tester = WorkflowTester(flow)
    tester.start("w", 1)
    tester.resume("w", "a", 2)
    assert tester.result("w") == "ok"
    assert durable.is_durable(library.steps)

def test_bad():
    tester = WorkflowTester(flow)
    tester.start("w", 1)
    tester.resume("w", "a", 3)
    assert tester.values("workflow-error") == ["nothing"]
''')
    (tmp_path / "library.py").write_text("def steps():\n    yield 1\n")
    (tmp_path / "conftest.py").write_text("import library\n")
    (tmp_path / "pytest.ini").write_text("[pytest]\nkwflow_durable = library\n")
    done = subprocess.run([sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"], cwd=tmp_path, capture_output=True, text=True, check=False, timeout=60)
    assert "1 failed, 1 passed" in done.stdout, done.stdout + done.stderr
    assert "AssertionError: assert [1, 2] == [1, 3]" in done.stdout  # in the error record: pytest's message for an assert in a workflow


@pytest.mark.slow
def test_the_lines_of_a_durable_module_are_the_authors() -> None:
    """§5.5: line coverage is exact. A tracer sees the lines that run natively."""
    script = """
        import sys
        from kwflow import durable
        source = "def g(n):\\n    for i in range(n):\\n        try:\\n            x = yield i\\n        finally:\\n            x = 2\\n    return x\\n"
        native = {}
        exec(compile(source, "m.py", "exec"), native)
        def lines(g):
            seen = set()
            def trace(frame, event, arg):
                if frame.f_code.co_filename == "m.py" and event == "line":
                    seen.add(frame.f_lineno)
                return trace
            sys.settrace(trace)
            list(g(2))
            sys.settrace(None)
            return sorted(seen)
        print(lines(native["g"]) == lines(durable.load_source("m", source, "m.py").g))
    """
    assert said(pathlib.Path.cwd(), script) == "True"


def test_locals_of_a_durable_generator_hide_what_lowering_has_added() -> None:
    """§5.5: also with `vars()` and `dir()`, in a live and in a restored generator. An author's function of one of these names is left alone."""
    from kwflow import durable

    module = durable.load_source(
        "locals_of",
        "def g():\n    for i in [1]:\n        x = 2\n        yield\n        kept = locals()\n        yield set(kept), set(vars()), dir()\n        yield set(kept)\n"
        "def mine(dir):\n    yield\n    yield dir()\n",
        "locals_of.py",
    )
    names = {"i", "x", "kept"}
    for restored in (False, True):
        gen, other = module.g(), module.mine(lambda: {"@l": 1})
        next(gen), next(other)
        if restored:
            gen, other = durable.restore(durable.capture(gen)), durable.restore(durable.capture(other))
        first = next(gen)
        assert [set(found) | {"kept"} for found in first] == [names] * 3  # until 3.12 `locals()` is one dict, which the second call updates
        durable.capture(gen)
        assert next(gen) | {"kept"} == names
        assert next(other) == {"@l": 1}


def test_a_wait_inside_a_plain_context_manager_is_refused() -> None:
    """§5.6: it would become the target of the with statement."""
    from kwflow import durable
    from kwflow.testing import WorkflowTester

    source = """
import contextlib
import kwflow as kw
@contextlib.contextmanager
def held():
    yield kw.suspend("lock")
def main(o):
    with held() as lock:
        yield kw.suspend("a")
"""
    module = durable.load_source("managers", source)
    tester = WorkflowTester(module.main)
    tester.start("w")
    assert "UsageError" in tester.values("workflow-error")[0] and "held" in tester.values("workflow-error")[0]

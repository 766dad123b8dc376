"""Hashes of units: unaffected by what does not matter and by CPython's minors, changed by anything else (semantics §8.1)."""

import ast
import json
import pathlib
import subprocess
import sys
import sysconfig

import pytest

from kwflow.durable.fingerprint import class_hashes, imports_of, unit_hash
from tests.nightly import fingerprints
from tests.nightly.test_minors import SUPPORTED, interpreter

UNIT = "def f(a, *b, c=1, **d):\n    x = a + 1\n    def g():\n        return x\n    return f'{x:{a}}', g"


def hash_of(source: str) -> str:
    return unit_hash(ast.parse(source).body[-1])


@pytest.mark.parametrize(
    "same",
    [
        "\n\n# moved\n" + UNIT,
        UNIT.replace("x = a + 1", "x = (a\n         + 1)  # why"),
        UNIT.replace("    x = a", "    '''What it does.'''\n    x = a"),
        UNIT.replace("    return x", "        '''Inner.'''\n        return x").replace("    def g():\n    ", "    def g():\n"),
        UNIT.replace("def f(a, *b, c=1, **d):", "@decorated\ndef f(a: int, *b: str, c: 'x' = 2, **d) -> None:"),
        UNIT.replace("def g():", "def g() -> int:"),
        UNIT.replace("f'{x:{a}}'", 'f"{x:{a}}"'),
        UNIT.replace("    ", "  "),
    ],
)
def test_formatting_comments_docstrings_annotations_decorators_and_defaults_do_not_count(same: str) -> None:
    assert hash_of(same) == hash_of(UNIT)


@pytest.mark.parametrize(
    "other",
    [UNIT.replace("+ 1", "+ 2"), UNIT.replace("+ 1", "+ 1.0"), UNIT.replace("return x", "return -x"), UNIT.replace("(a, *b", "(a, b"), UNIT.replace("c=1", "e=1"), UNIT.replace("{a}", "{a!r}")],
)
def test_anything_else_does(other: str) -> None:
    assert hash_of(other) != hash_of(UNIT)


def test_annotations_of_a_class_count_because_dataclasses_are_made_from_them() -> None:
    (one, _), (other, _) = (class_hashes(f"class A:\n    '''{doc}'''\n    x: {kind}")["A"] for doc, kind in (("a", "int"), ("b", "str")))
    assert one != other
    assert class_hashes("class A:\n    x: int")["A"][0] == one
    assert class_hashes("class A: pass\nclass A: pass") == {}


def test_imports_are_every_name_that_could_be_a_module() -> None:
    source = "import a.b, c as d\nfrom .e import f\nfrom .. import g\ndef h():\n    from i import j"
    assert imports_of(source, "p.q") == {"a", "a.b", "c", "p", "p.q", "p.q.e", "p.q.e.f", "p.g", "i", "i.j"}


@pytest.mark.slow
@pytest.mark.parametrize("version", [version for version in SUPPORTED if version != f"{sys.version_info[0]}.{sys.version_info[1]}"])
def test_the_hashes_of_standard_library_code_are_the_same_on_other_minors(version: str) -> None:
    """G7: a snapshot must not be mistaken for one of other code because another minor reads it."""
    library = pathlib.Path(sysconfig.get_path("stdlib"))
    files = [str(path) for path in [*sorted(library.glob("*.py"))[:60], *library.glob("test/test_fstring.py")]]
    mine = {path: fingerprints.hashes(path) for path in files}
    done = subprocess.run([interpreter(version), fingerprints.__file__], input="\n".join(files), capture_output=True, text=True, check=True, timeout=120)
    theirs = json.loads(done.stdout)
    assert sum(map(len, mine.values())) > 1000
    assert {path: found for path, found in mine.items() if theirs[path] not in ({}, found)} == {}

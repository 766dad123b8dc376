"""Values of well-known libraries in locals. Tests of a library that is missing are skipped by name."""

import importlib
from typing import Any

import pytest

from kwflow import durable
from kwflow.errors import NotDurableWarning, UnsavableError


def kept(source: str, name: str) -> Any:
    """Return what the generator `held` returns when it is saved and loaded at its yield."""
    module = durable.load_source(f"library_{name}", source, f"library_{name}.py")
    gen = module.held()
    next(gen)
    with pytest.raises(StopIteration) as stop:
        next(durable.loads(durable.dumps(gen)))
    return stop.value.value


def needs(name: str) -> None:
    try:
        importlib.import_module(name)
    except ImportError:
        pytest.skip(f"NOT TESTED: {name} is not installed")


def test_numpy_arrays_scalars_and_dtypes() -> None:
    needs("numpy")
    assert all(
        kept(
            """
import numpy as np
def held():
    whole = np.arange(6, dtype="<i4").reshape(2, 3)
    again = whole
    part = whole[:, 1]
    one, when, kind = np.float64(1.5), np.datetime64("2024-01-02"), np.dtype("f4")
    text, nothing, objects = np.array(["a", "bc"]), np.empty((0, 3)), np.array([1, "x", None], dtype=object)
    rows = np.array([(1, 2.0)], dtype=[("n", "i4"), ("x", "f8")])
    flag = np.bool_(True)
    yield
    whole[0, 0] = 9
    return [
        whole.tolist() == [[9, 1, 2], [3, 4, 5]], again is whole, part.tolist() == [1, 4], whole.dtype == np.dtype("<i4"), one == 1.5 and type(one) is np.float64,
        str(when) == "2024-01-02", kind == np.dtype("f4"),
        text.tolist() == ["a", "bc"], nothing.shape == (0, 3), objects.tolist() == [1, "x", None], rows["x"].tolist() == [2.0], rows.dtype.names == ("n", "x"), bool(flag),
    ]
""",
            "numpy",
        )
    )


def test_numpy_structures_keep_their_fields_wherever_they_are() -> None:
    needs("numpy")
    before, after, aligned = kept(
        """
import numpy as np
def held():
    padded = np.dtype([("n", "i1"), (("title", "x"), "i4")], align=True)
    inside = np.dtype([("s", padded), ("t", "f8", (2, 3)), ("w", "M8[us]")])
    over = np.dtype({"names": ["a", "b"], "formats": ["i4", "i2"], "offsets": [0, 2], "itemsize": 16})
    kinds = [padded, inside, over, np.dtype([("n", "i1"), ("o", "O")], align=True)]
    values = [np.ones(2, padded), np.ones(1, inside), np.ones(2, over), np.array([(1, [2])], kinds[3]), np.zeros(2, [("a", "i1"), ("b", "i4"), ("c", "U3")])[["a", "c"]], np.ones(1, padded)[0]]
    before = [repr(value) for value in kinds + values]
    yield
    return before, [repr(value) for value in kinds + values], [kind.isalignedstruct for kind in kinds]
""",
        "numpy_structures",
    )
    assert before == after
    assert aligned == [True, False, False, True]


@pytest.mark.parametrize(("made", "said"), [("np.array(['a'], np.dtypes.StringDType())", r"StringDType\(\)"), ("np.ones(1, [('o', 'O')])[0]", "numpy.void that holds objects")])
def test_what_numpy_cannot_make_again_is_refused(made: str, said: str) -> None:
    needs("numpy")
    with pytest.raises(UnsavableError, match=f"'array' of held .*{said}"):
        kept(f"import numpy as np\ndef held():\n    array = {made}\n    yield\n", "numpy_refused")


def test_pydantic_models() -> None:
    needs("pydantic")
    assert kept(
        """
import datetime
import pydantic
class Line(pydantic.BaseModel):
    name: str
    count: int = 1
class Order(pydantic.BaseModel):
    lines: list[Line]
    _note: str = pydantic.PrivateAttr("")
class Event(pydantic.BaseModel):
    at: datetime.datetime
def held():
    order = Order(lines=[{"name": "a"}])
    order._note = "kept"
    line = order.lines[0]
    event = Event(at="2024-01-02T03:04:05+02:00")
    yield
    return order.model_dump(), order._note, order.lines[0] is line, order.model_fields_set, event.at.isoformat()
""",
        "pydantic",
    ) == ({"lines": [{"name": "a", "count": 1}]}, "kept", True, {"lines"}, "2024-01-02T03:04:05+02:00")


def test_msgspec_structs() -> None:
    needs("msgspec")
    assert kept(
        """
import msgspec
class Point(msgspec.Struct, frozen=True):
    x: int
    y: int = 2
class Patch(msgspec.Struct, kw_only=True):
    name: str | None | msgspec.UnsetType = msgspec.UNSET
    tags: list = []
def held():
    point, patch = Point(1), Patch(tags=["a"])
    yield
    return point == Point(1, 2), point.x, patch.name is msgspec.UNSET, patch.tags
""",
        "msgspec",
    ) == (True, 1, True, ["a"])


def test_attrs_classes() -> None:
    needs("attrs")
    assert kept(
        """
import attrs
@attrs.define
class Point:
    x: int
    tags: list = attrs.field(factory=list)
@attrs.frozen
class Fixed:
    x: int
def held():
    point, fixed = Point(1), Fixed(2)
    point.tags.append(point)
    yield
    return point.x, point.tags[0] is point, fixed == Fixed(2)
""",
        "attrs",
    ) == (1, True, True)


@pytest.mark.parametrize(
    ("made", "remedy"),
    [
        ("__import__('pygments.lexers').lexers.PythonLexer().get_tokens('1')", r"list 'pygments' under \[durable\] packages in kwflow.toml \(in a test: kwflow_durable\)$"),
        ("__import__('os').walk('.')", "the standard library is never durable: keep a list of what it gives"),
        ("__import__('tests.spec.test_semantics').spec.test_semantics.plain()", r"list 'tests' under \[durable\] packages .*, or set __kwflow_durable__ = True in the module$"),
    ],
)
def test_a_generator_of_code_that_is_not_durable_is_refused_with_what_makes_it_so(made: str, remedy: str) -> None:
    """docs/LOCALS.md "Libraries"."""
    with pytest.raises(UnsavableError, match=f"'gen' of held .*{remedy}"):
        kept(f"def held():\n    gen = {made}\n    next(gen)\n    yield\n", "refused")


def test_an_import_of_a_generator_of_a_library_warns_with_the_package_to_list(recwarn: pytest.WarningsRecorder) -> None:
    """docs/LOCALS.md "Libraries". What libraries import from each other is none of an author's business: it is refused where a variable holds it."""
    source = "from pygments.lexers import get_all_lexers\n"
    durable.load_source("imports_a_generator", source, "imports_a_generator.py")
    assert str(recwarn.pop(NotDurableWarning).message).endswith("a workflow cannot wait in it; list 'pygments' under [durable] packages in kwflow.toml (in a test: kwflow_durable)")
    durable.load_source("imports_in_a_library", source, "/usr/lib/site-packages/imports_in_a_library.py")
    assert not recwarn.list

"""The input of a workflow is rebuilt by the annotation of its parameter, as an activity's arguments are (decision 0050)."""

import dataclasses
import itertools
import re
from typing import Any

import msgspec
import pydantic
import pytest

from kwflow import durable
from kwflow.core.contract import Workflows
from kwflow.errors import UsageError
from kwflow.testing import WorkflowTester

MODELS = """
import dataclasses, datetime, enum, uuid
import msgspec, pydantic

class Size(enum.Enum):
    LARGE = "l"

@dataclasses.dataclass
class Line:
    sku: str
    count: int

class Address(pydantic.BaseModel):
    street: str

class Order(msgspec.Struct):
    lines: list[Line]
    to: Address
    size: Size = Size.LARGE
    at: datetime.datetime | None = None
    key: bytes = b""
    number: uuid.UUID = uuid.UUID(int=7)
"""
PLAIN = {"lines": [{"sku": "a", "count": 2}], "to": {"street": "s"}, "size": "l", "at": "2026-01-02T00:00:00Z", "key": "AP8=", "number": "00000000-0000-0000-0000-000000000009"}
_names = itertools.count()


def load(body: str, models: str = MODELS, head: str = "") -> Any:
    """A durable module with these workflows, and a module with the classes that they mention."""
    number = next(_names)
    durable.load_source(f"typed_models_{number}", models)
    text = f"{head}import kwflow as kw\nfrom typing import *\nfrom typed_models_{number} import *\n{body}"
    return durable.load_source(f"typed_case_{number}", text, f"typed_case_{number}.py")


def started(body: str, options: Any = None, **given: Any) -> WorkflowTester:
    tester = WorkflowTester(load(body, **given).main)
    tester.start("w", options)
    return tester


def refused(tester: WorkflowTester) -> list[tuple[str, str]]:
    """Reason and message of every dead letter."""
    found = [dict(output.headers) for output in tester.outputs if output.topic == tester.config.dead_letter_topic]
    return [((one["kwflow-error-reason"] or b"").decode(), (one["kwflow-error-message"] or b"").decode()) for one in found]


WAITS = """
    yield kw.suspend("r")
    assert type(o) is Order and type(o.to) is Address and type(o.lines[0]) is Line, o
    return [o.lines[0].count, o.to.street, o.size is Size.LARGE, o.at.year, list(o.key), o.number.int]
"""


@pytest.mark.parametrize("head", ["", "from __future__ import annotations\n"], ids=["as-written", "postponed"])
@pytest.mark.parametrize("spelling", ["def main(o: Order):", "@kw.workflow(name='n{n}')\ndef main(o: Order) -> kw.Gen[list]:", "def main(o: 'Order | None' = None):"])
def test_the_input_is_what_the_annotation_says_and_a_saved_object_from_then_on(spelling: str, head: str) -> None:
    """Everything that activities rebuild, through a snapshot."""
    w = started(spelling.replace("{n}", str(next(_names))) + WAITS, PLAIN, head=head)
    w.resume("w", "r")
    assert w.result("w") == [2, "s", True, 2026, [0, 255], 9]


def test_an_async_def_a_plain_function_and_a_method_are_given_it_too() -> None:
    body = """
async def waits(line: Line):
    await kw.suspend("r")
    return line.sku
def plain(line: Line):
    return line.sku
class Shop:
    def method(self, line: Line):
        return line.sku
method = Shop().method
"""
    module = load(body)
    for name in ("waits", "plain", "method"):
        w = WorkflowTester(getattr(module, name))
        w.start("w", {"sku": "a", "count": 1})
        if name == "waits":
            w.resume("w", "r")
        assert w.result("w") == "a"


@pytest.mark.parametrize("annotation", ["", ": Any", ": object", ": dict", ": dict[str, Any]", ": Dict[str, Any]", ": dict[str, object]"])
def test_without_an_annotation_that_rebuilds_something_the_input_is_the_json_as_it_is(annotation: str) -> None:
    for given in (PLAIN, None, [1, {"a": None}], 7):
        assert started(f"def main(o{annotation}):\n    return o", given).result("w") == given


def test_what_else_is_annotated_need_not_be_known_here() -> None:
    """An import for type checkers alone does not exist when the engine runs. Only the input's annotation is checked."""
    body = "def main(line: Line, other: 'Nothing' = 1) -> 'Nothing':\n    return line.count"
    assert started(body, {"sku": "a", "count": 5}).result("w") == 5


@pytest.mark.parametrize("annotation", ["Iterable[Line]", "Reversible[Line]", "dict[str, Iterable[Line]]"])
def test_what_any_list_is_for_a_type_checker_is_rebuilt_as_a_list(annotation: str) -> None:
    """It was accepted when the engine started, and then each start was a dead letter."""
    lines: Any = [{"sku": "a", "count": 2}]
    body = f"def main(o: {annotation}):\n    yield kw.suspend('r')\n    return [line.count for line in (o['x'] if isinstance(o, dict) else o)]"
    tester = started(body, {"x": lines} if "dict" in annotation else lines)
    tester.resume("w", "r")
    assert tester.result("w") == [2]


def test_an_input_that_does_not_fit_is_a_dead_letter_and_a_reply_that_say_where_and_what_was_expected() -> None:
    """G3: nothing has run. After a correction, the dead letter is retried as any other."""
    w = WorkflowTester(load("def main(o: Order):" + WAITS).main)
    w.start("w", {**PLAIN, "lines": [{"sku": "a", "count": "two"}]}, **{"kwflow-request": "r", "kwflow-reply-to": "0/p"})
    said = "workflow 'main' does not accept this input: Expected `int`, got `str` - at `$.lines[0].count`"
    assert refused(w) == [("bad-input", said)]
    assert w.reply("r") == {"status": "bad_input", "message": said, "value": None}
    assert (w.ids(), w.counts) == ([], ["dead-letter"])


@pytest.mark.parametrize(
    ("raised", "said"),
    [("ValueError('odd')", "odd"), ("KeyError('k')", "KeyError: 'k'"), ("SystemExit(3)", "SystemExit: 3"), ("kw.now()", "UsageError: "), ("ValueError('a\\nb' * 9999)", "a b")],
)
def test_whatever_a_class_raises_while_it_is_built_is_bad_input(raised: str, said: str) -> None:
    """It ends no engine, and nothing is parked, because nothing of the workflow exists yet."""
    models = f"import dataclasses, kwflow as kw\n@dataclasses.dataclass\nclass Odd:\n    n: int\n    def __post_init__(self):\n        raise {raised}"
    w = started("def main(o: Odd):\n    return 1\n    yield", {"n": 1}, models=models)
    [(reason, message)] = refused(w)
    assert (reason, said in message, "\n" in message, len(message) < 3000, w.ids()) == ("bad-input", True, False, True, [])


def test_a_parent_a_signal_that_starts_and_a_schedule_are_told() -> None:
    body = """
def child(line: Line):
    return line.count
    yield
def main(o):
    kinds = []
    for given in ({"sku": "a"}, Line("a", 5), Address(street="s")):
        try:
            kinds.append((yield kw.start_child(child, given)))
        except kw.ChildError as error:
            kinds.append([error.outcome, error.error])
    kw.send_signal("signalled", "s", start=child, input=Line("b", 6))
    return kinds
"""
    module = load(body)
    w = WorkflowTester(module.main, child=module.child)
    w.start("w")
    missing = "workflow 'child' does not accept this input: Object missing required field `{}`"
    assert w.result("w") == [["bad_input", missing.format("count")], 5, ["bad_input", missing.format("sku")]]
    assert w.result("signalled") == 6
    reply = w.command("x", "signal", {"name": "s", "start": {"workflow": "child", "input": 3}})
    assert (reply["status"], len(refused(w)), w.header("x")) == ("bad_input", 3, None)
    w.start("job", {"name": "job", "workflow": "child", "every_ms": 60_000}, workflow="kwflow.schedule")
    w.advance(60)
    assert w.header("job")["status_value"]["last_failed"] == "job@2023-11-14T22:14:20Z: bad_input"


def test_a_start_that_does_not_fit_ends_no_run_that_it_would_restart() -> None:
    """KW-6: it is refused before anything is done."""
    w = started(f"@kw.workflow(name='again{next(_names)}', restart=True)\ndef main(n: int):\n    yield kw.suspend('r')\n    return n", 1)
    w.start("w", "two")
    assert ([reason for reason, _ in refused(w)], w.waits("w")) == (["bad-input"], ["r"])
    w.start("w", 2)
    w.resume("w", "r")
    assert w.result("w") == 2


def test_a_class_that_changes_under_a_waiting_instance_is_a_class_like_any_other() -> None:
    """The input was rebuilt once, when it came. New starts get the deployed class."""
    text = "import dataclasses, kwflow as kw\n@dataclasses.dataclass\nclass Line:\n    sku: str\n    count: int{more}\ndef main(o: Line):\n    yield kw.suspend('r')\n    return [{value}]\n"
    old, new = text.format(more="", value="o.count"), text.format(more="\n    price: int = 3", value="o.price")
    name = f"typed_deployed_{next(_names)}"
    w = WorkflowTester(durable.load_source(name, old).main)
    w.start("old", {"sku": "a", "count": 2})
    w.deploy(durable.load_source(name, new).main)
    w.start("new", {"sku": "a", "count": 2, "price": 9})
    for id in ("old", "new"):
        w.resume(id, "r")
    assert (w.result("old"), w.result("new")) == ([2], [9])


@pytest.mark.parametrize(
    ("body", "said"),
    [
        ("def main(o: 'Nothing'): ...", "cannot be resolved: name 'Nothing' is not defined"),
        ("class Odd: ...\ndef main(o: list[Odd]): ...", "typed_case_.*Odd, which cannot be rebuilt from JSON"),
        ("def main(o: Order | Line): ...", "more than one"),
        ("class Odd: ...\nclass Free(msgspec.Struct):\n    x: 'Inner | None' = None\nclass Inner(msgspec.Struct):\n    y: Odd\ndef main(o: tuple[Free, Inner]): ...", "typed_case_.*Odd, which cannot"),
        (
            "class Holder(msgspec.Struct):\n    x: 'Odd | None' = None\n@pydantic.dataclasses.dataclass\nclass Odd:\n    x: int\ndef main(o: list[Holder]): ...",
            "typed_case_.*Odd, a dataclass of pydantic",
        ),
        ("@dataclasses.dataclass\nclass Odd:\n    x: 'Nothing'\ndef main(o: Odd): ...", "name 'Nothing' is not defined"),
    ],
)
def test_an_annotation_that_rebuilds_nothing_is_said_when_the_engine_starts(body: str, said: str) -> None:
    """Before the first record, instead of as a dead letter for each start."""
    module = load(body, models="import dataclasses, pydantic.dataclasses\n" + MODELS.replace("import dataclasses,", "import", 1))
    with pytest.raises(UsageError, match=re.compile(f"the input of workflow 'shop'.* {said}")):
        Workflows({"shop": module.main})


def test_fields_that_json_never_has_are_left_to_their_defaults() -> None:
    models = "import dataclasses, threading\n@dataclasses.dataclass\nclass Line:\n    sku: str\n    lock: threading.Event = dataclasses.field(default_factory=threading.Event)"
    assert started("def main(o: Line):\n    return o.lock.is_set()", {"sku": "a"}, models=models).result("w") is False


class Model(pydantic.BaseModel):
    n: int
    key: bytes = b"\xff"


@dataclasses.dataclass
class Holder:
    key: bytes
    model: Model


class Struct(msgspec.Struct):
    n: int


def test_typed_objects_may_be_given_and_go_as_the_json_that_an_activity_is_sent() -> None:
    w = started("def main(o):\n    return o", Holder(b"\xff", Model(n=1, key=b"k")))
    assert w.result("w") == {"key": "/w==", "model": {"n": 1, "key": "k"}}
    for given in (Struct(1), {"n": 1}):
        w.start("x", given)
        assert w.result("x") == {"n": 1}
    with pytest.raises(TypeError, match=r"class builtins.object has no JSON form"):
        w.start("y", {"a": object()})
    with pytest.raises(ValueError, match="nan has no JSON form"):
        w.start("y", float("nan"))


def test_what_a_workflow_returns_is_json_as_before() -> None:
    body = "def main(o: Line):\n    kw.set_status(o)\n    o.count += 1\n    yield kw.suspend('r')\n    return [o, Size.LARGE]"
    w = started(body, {"sku": "a", "count": 1})
    assert w.header("w")["status_value"] == {"sku": "a", "count": 1}
    w.resume("w", "r")
    assert w.result("w") == [{"sku": "a", "count": 2}, "l"]

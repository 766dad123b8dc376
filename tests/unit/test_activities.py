"""What is sent to an activity and back (M6.3), its retry policy, and its registry."""

import dataclasses
import datetime
import enum
import itertools
import sys
import uuid
from decimal import Decimal
from typing import Any

import msgspec
import pydantic
import pydantic.dataclasses
import pytest

import kwflow as kw
from kwflow.activities import Activity, failure_payload
from kwflow.core.contract import Workflows
from kwflow.errors import ActivityError, BusinessError, UsageError
from kwflow.running import ActivityInfo, running_as

_names = itertools.count()


class Colour(enum.Enum):
    RED = "red"


@dataclasses.dataclass
class Line:
    sku: str
    count: int
    at: datetime.datetime | None = None


class Address(pydantic.BaseModel):
    street: str
    since: datetime.date


class Order(msgspec.Struct):
    lines: list[Line]
    to: Address
    by_number: dict[int, Decimal] = {}


def make(function: Any, **options: Any) -> Activity[Any, Any]:
    return kw.activity(name=f"case-{next(_names)}", **options)(function)


def there(activity: Activity[Any, Any], *args: Any, **kwargs: Any) -> Any:
    """The arguments as the function receives them."""
    bound = activity.decode_arguments(activity.encode_arguments(args, kwargs))
    return activity.function(*bound.args, **bound.kwargs)


def back(activity: Activity[Any, Any], value: Any) -> Any:
    """The result as the workflow receives it."""
    return activity.decode_result(msgspec.json.decode(activity.encode_result(value)))


ORDER = Order([Line("a", 2, datetime.datetime(2026, 1, 2, tzinfo=datetime.UTC))], Address(street="s", since=datetime.date(2020, 2, 29)), {7: Decimal("1.10")})


@pytest.mark.parametrize(
    ("hint", "value"),
    [
        (Order, ORDER),
        (list[Address], [ORDER.to]),
        (dict[str, Line | None], {"x": ORDER.lines[0], "y": None}),
        (Colour, Colour.RED),
        (uuid.UUID, uuid.UUID(int=5)),
        (bytes, b"\x00\xff"),
        (set[int], {1, 2}),
        (tuple[int, str], (1, "x")),
        (datetime.timedelta, datetime.timedelta(seconds=90)),
        (Address | None, None),
        (Any, {"plain": [1, 2.5, None, True]}),
    ],
    ids=str,
)
def test_annotated_arguments_and_results_arrive_as_they_were(hint: Any, value: Any) -> None:
    """M6.3: dataclasses, msgspec structs, pydantic models, what they contain, and containers of them."""

    def echo(x):
        return x

    echo.__annotations__ = {"x": hint, "return": hint}
    activity = make(echo)
    assert there(activity, value) == value
    assert back(activity, value) == value


def test_arguments_are_found_by_name_so_that_parameters_may_be_added_and_reordered() -> None:
    old = make(lambda a, b: (a, b))
    new = make(lambda b, a, c=3: (a, b, c))
    bound = new.decode_arguments(old.encode_arguments((1, 2), {}))
    assert new.function(*bound.args, **bound.kwargs) == (1, 2, 3)


def test_every_kind_of_parameter_travels() -> None:
    def all_kinds(a, /, b, *rest: int, c, **more: Line):
        return a, b, rest, c, more

    assert there(make(all_kinds), 1, 2, 3, 4, c=5, d=Line("x", 1)) == (1, 2, (3, 4), 5, {"d": Line("x", 1)})


def test_a_call_with_wrong_arguments_fails_as_a_call_of_the_function_would() -> None:
    with pytest.raises(TypeError, match="missing a required argument: 'b'"):
        make(lambda a, b: None).encode_arguments((1,), {})


@pytest.mark.parametrize("value", [object(), b"bytes", {1: 2}, Line("a", 1), float("nan"), "\ud800", {1, 2}, 2 + 1j], ids=lambda value: type(value).__name__)
def test_what_has_no_json_form_is_refused_where_it_is_given(value: Any) -> None:
    activity = make(lambda order: order)
    with pytest.raises(UsageError, match="argument 'order' of activity case-"):
        activity.encode_arguments((value,), {})
    with pytest.raises(ActivityError, match="the result of activity case-.* cannot be sent") as caught:
        activity.encode_result(value)
    assert caught.value.final


def test_a_result_that_is_not_as_annotated_is_an_activity_error_naming_where() -> None:
    def load() -> Line: ...

    with pytest.raises(ActivityError, match=r"does not match its annotation: .*\$.count"):
        make(load).decode_result({"sku": "a", "count": "many"})


def test_arguments_that_no_longer_fit_are_final() -> None:
    with pytest.raises(ActivityError, match="the function no longer has a parameter 'a'") as caught:
        make(lambda b: b).decode_arguments(b'{"a":1}')
    assert caught.value.final


def test_an_annotation_that_names_nothing_is_said() -> None:
    def wrong(x): ...

    wrong.__annotations__ = {"x": "Nowhere"}
    with pytest.raises(UsageError, match="annotation of activity .*Nowhere"):
        make(wrong).encode_arguments((1,), {})


def test_a_dataclass_of_pydantic_is_refused_as_its_checks_would_be_passed_over() -> None:
    @pydantic.dataclasses.dataclass
    class Checked:
        count: int = pydantic.Field(gt=0)

    def wrong(x): ...

    wrong.__annotations__ = {"x": dict[str, list[Checked]]}
    with pytest.raises(UsageError, match="annotation of activity .*Checked, a dataclass of pydantic.* make it a pydantic.BaseModel"):
        make(wrong).encode_arguments(({},), {})


# -- the decorator -------------------------------------------------------------------------------------------------------
@pytest.mark.skipif(sys.version_info < (3, 14), reason="PEP 649")
def test_an_annotation_may_name_a_class_that_comes_further_down() -> None:
    """Annotations are evaluated when they are needed and not at the decorator, as in Python 3.14."""
    text = """
@make
def priced(line: Line) -> Line: return line
def main(line: Line, other: Nothing = None) -> Nothing: return line
@dataclasses.dataclass
class Line:
    sku: str
"""
    found: dict[str, Any] = {"make": make, "dataclasses": dataclasses}
    exec(compile(text, "further_down.py", "exec", dont_inherit=True), found)
    assert there(found["priced"], found["Line"]("a")) == found["Line"]("a")
    assert Workflows({"shop": found["main"]}).inputs == {"shop": found["Line"]}


def test_outside_a_step_an_activity_is_the_plain_function() -> None:
    """M6.1."""

    def double(x: int) -> int:
        """Twice."""
        return 2 * x

    activity = make(double)
    assert activity(4) == 8
    assert (activity.__name__, activity.__doc__) == ("double", "Twice.")


def test_two_activities_of_one_name_are_refused_with_the_remedy() -> None:
    kw.activity(name="taken")(test_outside_a_step_an_activity_is_the_plain_function)
    with pytest.raises(UsageError, match="two activities are named 'taken'.*name="):
        kw.activity(name="taken")(test_two_activities_of_one_name_are_refused_with_the_remedy)


def test_an_activity_that_is_declared_and_done_in_one_process_is_refused_with_another_remedy() -> None:
    """A queue may have two of them, one in an engine and one in a worker. Different names would separate them."""
    kw.activity(name="declared", queue="payments")(test_two_activities_of_one_name_are_refused_with_the_remedy)
    with pytest.raises(UsageError, match="two activities are named 'declared'.*queue 'payments' belong in two processes.*import"):
        kw.activity(name="declared", queue="payments")(test_an_activity_that_is_declared_and_done_in_one_process_is_refused_with_another_remedy)


def test_the_same_function_loaded_again_takes_its_place_but_an_old_version_of_it_does_not() -> None:
    """Semantics §8.4."""

    def source(module: str) -> Any:
        def charge(): ...

        charge.__module__, charge.__qualname__ = module, "charge"
        return charge

    first, second, old = source("shop_of_test"), source("shop_of_test"), source("shop_of_test@abc")
    for function in (first, second, old):
        kw.activity(name="reloaded")(function)
    assert kw.registered_activities()["reloaded"].function is second


def _generator():
    yield


class Unbound:
    def method(self): ...


@pytest.mark.parametrize(("target", "options", "message"), [
    (_generator, {}, "contains a yield"),
    (3, {}, "must decorate a function"),
    (Unbound.method, {}, "is a method.*write a function that calls the method of a module-level object"),
    (Line, {}, "must decorate a function"),
    (len, {"retry": 3}, "must be a kw.Retry"),
    (len, {"timeout": 0}, "above 0"),
    (len, {"timeout": "1s"}, "above 0"),
])  # fmt: skip
def test_what_cannot_be_an_activity_is_refused_at_import(target: Any, options: Any, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        make(target, **options)


# -- retry ---------------------------------------------------------------------------------------------------------------
def test_pauses_grow_up_to_max_and_end_with_the_attempts() -> None:
    """M6.1."""
    policy = kw.Retry(max_attempts=5, first=1, factor=3, max=10, jitter=0)
    assert [policy.pause_s(n, "k") for n in range(1, 6)] == [1, 3, 9, 10, None]
    same = kw.Retry(max_attempts=5, first=datetime.timedelta(seconds=1), factor=3, max=datetime.timedelta(seconds=10), jitter=0)
    assert [same.pause_s(n, "k") for n in range(1, 6)] == [1, 3, 9, 10, None]
    assert kw.Retry(max_attempts=None, jitter=0).pause_s(10_000, "k") == 60


def test_jitter_shortens_by_its_part_at_most_differs_by_key_and_is_no_chance() -> None:
    """A step is pure (semantics §4.1), so the jitter is not random."""
    policy = kw.Retry(first=10, jitter=0.5)
    pauses = {policy.pause_s(1, f"w|{n}:1") for n in range(1000)}
    assert len(pauses) > 900
    assert all(pause is not None and 5 <= pause <= 10 for pause in pauses)
    assert policy.pause_s(1, "w|3:1") == policy.pause_s(1, "w|3:1")


@pytest.mark.parametrize(
    "wrong", [{"max_attempts": 0}, {"max_attempts": 1.5}, {"first": -1}, {"first": "1"}, {"factor": 0.5}, {"max": float("inf")}, {"max": datetime.timedelta(-1)}, {"jitter": 2}], ids=repr
)
def test_a_policy_that_makes_no_sense_is_refused_by_field(wrong: Any) -> None:
    with pytest.raises(UsageError, match=f"Retry.{next(iter(wrong))}"):
        kw.Retry(**wrong)


# -- errors and info -----------------------------------------------------------------------------------------------------
class Unprintable(Exception):
    def __str__(self) -> str:
        raise RuntimeError


def test_errors_travel_as_type_message_and_details() -> None:
    """M6.3."""
    try:
        raise ValueError("bad \ud800" + "x" * 5000)
    except ValueError as error:
        found = failure_payload(error)
    assert (found["kind"], found["type"], found["final"]) == ("activity", "ValueError", False)
    assert len(found["message"]) == 2000
    assert "test_activities.py" in found["details"]["at"]
    assert failure_payload(ActivityError("m", "Auth", {"n": 1}, final=True)) == {"kind": "activity", "type": "Auth", "message": "m", "details": {"n": 1}, "final": True}
    assert failure_payload(BusinessError("declined", "no funds", {"left": 3})) == {"kind": "business", "code": "declined", "message": "no funds", "variables": {"left": 3}}
    assert failure_payload(Unprintable())["message"] == "<no message: __str__ failed>"
    assert "<not sent" in failure_payload(ActivityError("m", "t", object()))["details"]
    assert "<not sent" in failure_payload(BusinessError("m", "t", "x" * 100_000))["variables"]


def test_activity_info_belongs_to_a_running_activity() -> None:
    with pytest.raises(UsageError, match="only inside an activity"):
        kw.activity_info()
    with running_as(ActivityInfo("charge", "order-7", 2, "order-7|0:1")):
        info = kw.activity_info()
        assert (info.workflow_id, info.attempt, info.idempotency_key, info.cancelled) == ("order-7", 2, "order-7|0:1", False)
        info.cancel()
        assert kw.activity_info().cancelled

"""Edits after which a wait, a variable or a temporary of an instance looks the same, and is another one: they are refused (decision 0061)."""

import sys
from typing import Any

import pytest

from kwflow.durable import discard
from kwflow.errors import CodeChangedError
from tests.unit.durable.test_moves import Site, finished

CALLS = """
    def charge(what, currency=None):
        return (yield what)
    def both(gens):
        return [(yield from gens[0]), (yield from gens[1])]
    def limit(x, seconds=1):
        return (yield from x)
    def main():
        order, tip, eur = "order", "tip", "eur"
        {}
        {}
"""
CHARGED, TIPPED, SHIPPED = "yield from charge(order)", "yield from charge(tip)", "yield 'ship'"
LOOPS = "def main():\n    for {} in {}:\n        for {} in {}:\n            yield 'a'"
FINALLY = "def main():\n    for x in [1, 2]:\n        try:\n            {}\n        finally:\n            yield 'closing'\n            {}"
BRANCHES = "def main():\n    a = b = c = 1\n    if {}:\n        yield 'p'\n    if {}:\n        yield 'p'"
NESTED = """
    def main():
        k = 1
        def get():
            return k
        def inner():
            {}
            also = lambda: k
            yield 'a'
            k = 6
        running = inner()
        del inner
        yield from running
"""
MIDDLE = """
    def main():
        {}
        def middle():
            {}
            def inner():
                nonlocal k
                yield 'a'
                k = 6
            return inner()
        seen = lambda: k
        running = middle()
        del middle
        yield from running
"""
HELD = "def main():\n    def f({}):\n        return k\n    yield 'a'\n    return f(3)"
HELPER = "import functools\ndef less({}):\n    return a - b\ndef main():\n    rest = functools.partial(less, 10)\n    yield 'a'\n    return rest(1)"
METHOD = "class Desk:\n    def less(self, {}):\n        return a - b\ndef main():\n    rest = Desk().less\n    yield 'a'\n    return rest(10, 1)"
LATE = "def f({}):\n    yield k\n    return {}\ndef main():\n    late = f(1)\n    yield 'a'\n    return late"
SEEMING = {
    "edited calls of one function that changed places": (
        CALLS.format(CHARGED, TIPPED),
        CALLS.format("yield from charge(tip, eur)", "yield from charge(order, eur)"),
        "`yield from charge(order)`, and the new code has no such wait, but more than one call of the same function that has been edited",
    ),
    "tasks that are gathered in another order": (
        CALLS.format("a, b = charge(1), charge(2)", "yield from both([a, b])"),
        CALLS.format("a, b = charge(1), charge(2)", "yield from both([b, a])"),
        "`yield from both([a, b])`, and the new code calls the same function for something else (line 11)",
    ),
    "calls of one function that are gathered in another order": (
        CALLS.format("", "yield from both([charge(1), charge(2)])"),
        CALLS.format("", "yield from both([charge(2), charge(1)])"),
        "the new code calls the same function for something else",
    ),
    "a call that limits another one": (CALLS.format("", "yield from limit(charge(order), 5)"), CALLS.format("", "yield from limit(both(order), 5)"), "calls the same function for something else"),
    "a call that limits another variable": (
        CALLS.format("a, b = charge(1), charge(2)", "yield from limit(a, 5)"),
        CALLS.format("a, b = charge(1), charge(2)", "yield from limit(x=b)"),
        "calls the same function for something else",
    ),
    "a condition that was turned round": (
        "def main(late=1):\n    if late:\n        yield 'pause'\n        return 1\n    else:\n        yield 'pause'\n        return 2",
        "def main(late=1):\n    if not late:\n        yield 'pause'\n        return 2\n    else:\n        yield 'pause'\n        return 1",
        "a condition of this wait or of an equal one has changed",
    ),
    "a condition that was turned round, of another wait": (
        "def main(late=0):\n    if late:\n        yield 'pause'\n        return 1\n    yield 'pause'\n    return 2",
        "def main(late=0):\n    if not late:\n        yield 'pause'\n        return 2\n    yield 'pause'\n    return 1",
        "a condition of this wait or of an equal one has changed",
    ),
    "a function of the module whose parameters changed places": (HELPER.format("a, b"), HELPER.format("b, a"), ":less is held in a variable, and has other parameters now"),
    "a method whose parameters changed places": (METHOD.format("a, b"), METHOD.format("b, a"), ":Desk.less is held in a variable, and has other parameters now"),
    "an edited call that is now behind another wait": (
        CALLS.format(CHARGED, SHIPPED),
        CALLS.format(SHIPPED, "yield from charge(order, eur)"),
        "and in the new code (line 11) comes before or after another wait than it did",
    ),
    "the wait of a branch that is gone, beside that of one that has stayed": (
        BRANCHES.format("a", "b"),
        BRANCHES.format("b", "c"),
        "a condition of this wait or of an equal one has changed",
    ),
    "the same expression in a statement that is gone, beside one that has stayed": (
        "def main():\n    a = yield 'p'\n    b = yield 'p'",
        "def main():\n    b = yield 'p'\n    c = yield 'p'",
        "comes before or after another wait than it did",
    ),
    "texts that end as our names of functions do": ("def main():\n    yield 'order#1'\n    yield 'order#2'", "def main():\n    yield 'order#2'\n    yield 'order#3'", "no such wait"),
    "texts that begin as our temporaries do": ("def main():\n    yield '@all users'", "def main():\n    yield '@all managers'", "no such wait"),
    "loops that changed places": (LOOPS.format("a", "[1]", "b", "[2]"), LOOPS.format("b", "[2]", "a", "[1]"), "inside another for loop: what it goes over has changed, and its variable"),
    "a loop over something else": (
        "def main():\n    for key in ['ab', 'cd']:\n        yield 'a'",
        "def main():\n    for number, key in enumerate(['ab', 'cd']):\n        yield 'a'",
        "inside another for loop: what it goes over has changed, and its variable",
    ),
    "a break that led into a finally and is now in it": (FINALLY.format("break", "pass"), FINALLY.format("pass", "break"), "in the middle of a statement that has changed"),
    "a variable of its own that is now one of the function around it": (NESTED.format("k = 5"), NESTED.format("nonlocal k"), "now uses k of the function around it"),
    "a variable of the function around it that is now its own": (NESTED.format("nonlocal k"), NESTED.format("k = 5"), "no longer uses k of the function around it, but a variable of"),
    "a variable of another function around it": (MIDDLE.format("k = 0", "k = 1"), MIDDLE.format("k = 0", "nonlocal k"), "but a variable of that name of main"),
    "a held function whose parameter is given in another way": (HELD.format("a, k=1"), HELD.format("a, *, k=1"), "has other parameters now"),
    "a call that has not begun with one argument instead of many": (LATE.format("*k", 1), LATE.format("k", 2), "has not begun, and has other parameters now"),
}


@pytest.mark.parametrize("case", SEEMING)
def test_what_only_seems_to_be_the_same_is_refused(case: str) -> None:
    old, new, why = SEEMING[case]
    with pytest.raises(CodeChangedError) as raised:
        Site().edit(old, new)
    assert why in str(raised.value), raised.value


def test_waits_whose_statements_changed_keep_their_order_among_the_others() -> None:
    """One of two equal waits comes into a try; the other one is still itself."""
    old = "def main():\n    yield 'pause'\n    yield 'pause'\n    return 'old'"
    new = "def main():\n    yield 'pause'\n    try:\n        yield 'pause'\n    except ValueError:\n        return 'handled'\n    return 'new'"
    assert finished(Site().edit(old, new), None, None) == "new"
    with pytest.raises(StopIteration) as stopped:
        Site().edit(old, new, None).throw(ValueError)
    assert stopped.value.value == "handled"


def test_a_wait_that_was_added_may_be_equal_if_its_statement_is_not() -> None:
    assert finished(Site().edit("def main():\n    a = yield 'p'\n    return a", "def main():\n    b = yield 'p'\n    a = yield 'p'\n    c = yield 'p'\n    return a, c"), 1, 2) == (1, 2)


def test_functions_of_one_name_are_told_apart_by_what_is_in_them() -> None:
    """As `functools.singledispatch` makes them."""
    one, two = (f"def _():\n    yield 'a'\n    return {number}\nkept.append(_)\n" for number in (1, 2))
    main = "def main():\n    return (yield from kept[0]())"
    assert finished(Site().edit(f"kept = []\n{one}{two}{main}", f"kept = []\n{two}{one}{main}\n    return"), None) == 1


ASYNC = """
    class Pause:
        def __init__(self, text):
            self.text = text
        def __await__(self):
            return (yield self.text)
    class M:
        def __init__(self, name, log):
            self.name, self.log = name, log
        async def __aenter__(self):
            await Pause("enters " + self.name)
        async def __aexit__(self, *error):
            await Pause("leaves " + self.name)
            self.log.append(self.name)
            return self.name == "inner"
    async def main():
        log = []
"""
SEQUENCE = "        async with M('{}', log):\n            log.append('body')\n        async with M('{}', log):\n            log.append('body')\n        return log\n"
LEFT = """
        async with M('outer', log):
            for x in [1, 2]:
                async with M('inner', log):
                    1 / 0
                    {}
            {}
        return log
"""
WITHS = {
    "another one is entered": (SEQUENCE.format("a", "b"), SEQUENCE.format("b", "c"), 0, "comes before or after another wait than it did"),
    "the other one can be left by a return now": (LEFT.format("break", "pass"), LEFT.format("pass", "return log"), 2, "in the middle of a statement that has changed"),
    "it is left by an exception, and could not note that": (LEFT.format("pass", "pass"), LEFT.format("break", "pass"), 2, "in the middle of a statement that has changed"),
}


@pytest.mark.parametrize("case", WITHS)
def test_an_async_with_is_never_taken_for_another_one_nor_left_twice(case: str) -> None:
    """G8: what was entered is left once."""
    old, new, steps, why = WITHS[case]
    site = Site()
    saved = waiting(site, ASYNC + old, steps)
    site.deploy(ASYNC + new)
    with pytest.raises(CodeChangedError) as raised:
        site.move(saved)
    assert why in str(raised.value), raised.value


def test_an_async_with_that_is_being_left_is_left_once_in_edited_code() -> None:
    site = Site()
    saved = waiting(site, ASYNC + LEFT.format("break", "pass"), 2)
    site.deploy(ASYNC + LEFT.format("break", "log.append('new')"))
    moved = site.move(saved)
    assert [moved.send(None) for _ in range(3)] == ["enters inner", "leaves inner", "leaves outer"]
    assert finished(moved, None) == ["inner", "inner", "new", "outer"]


def waiting(site: Site, source: str, steps: int) -> Any:
    """Deploy it, and return its main as it is saved after these steps."""
    site.deploy(source)
    gen = vars(sys.modules[site.name])["main"]()
    for _ in range(steps + 1):
        gen.send(None)
    saved = site.save(gen)
    discard(gen)
    return saved


def test_numbers_and_further_arguments_of_a_call_may_change() -> None:
    """What it waits for is the same."""
    old = CALLS.format("a = charge(order)", "return [(yield from limit(a, 60))]")
    for call in ("limit(a, 90)", "limit(a, 60 * 60)", "limit(a, tip)", "limit(a)"):
        assert finished(Site().edit(old, CALLS.format("a = charge(order)", f"return ['new', (yield from {call})]")), 5) == ["new", 5]
    gathers = "yield from both([charge(order), limit(charge(tip), {})])"
    assert finished(Site().edit(CALLS.format("", gathers.format(5)), CALLS.format("", f"return ({gathers.format(6)})")), 1, 2) == [1, 2]


def test_a_condition_may_change_come_or_go_if_no_other_wait_is_equal_to_its_own() -> None:
    old, plain = "def main(n=5):\n    if n > 1:\n        yield 'pause'\n    yield 'next'\n    return n", "def main(n=5):\n    yield 'pause'\n    yield 'next'\n    return n"
    for before, now in ((old, old.replace("n > 1", "n > 9")), (old, plain), (plain, old)):
        assert finished(Site().edit(before, now), None, None) == 5
    twice = "def main():\n    yield 'pause'\n    {}\n    return 'new'"
    assert finished(Site().edit(twice.format("yield 'pause'"), twice.format("if 1: yield 'pause'")), None, None) == "new", "of two equal waits, one came into a condition"


def test_a_function_of_the_module_that_is_held_may_have_more_parameters() -> None:
    assert finished(Site().edit(HELPER.format("a, b"), HELPER.format("a, b, more=0").replace("a - b", "a - b + 100")), None) == 109

"""What waits is moved onto edited code: after the same wait, with its variables, or not at all (decision 0061)."""

import itertools
import textwrap
from typing import Any

import pytest

from kwflow import durable
from kwflow.durable import codec, registry, versions
from kwflow.errors import CodeChangedError

_count = itertools.count()


class Site:
    """One module that is edited while something of it waits."""

    def __init__(self) -> None:
        self.name = f"moved_{next(_count)}"
        self.stored: dict[str, bytes] = {}

    def deploy(self, source: str) -> Any:
        return durable.load_source(self.name, textwrap.dedent(source), f"{self.name}.py")

    def save(self, graph: Any) -> tuple[bytes, dict[str, Any]]:
        body, held, _ = codec.dumps_with_code(graph, {})
        for module, _ in held.values():
            self.stored[versions.entry_key(module.name, module.version)] = versions.entry(module)
        return body, {reference: {"version": module.version, "units": units} for reference, (module, units) in held.items()}

    def move(self, saved: tuple[bytes, dict[str, Any]]) -> Any:
        return versions.loads(*saved, self.stored.get, moving=versions.moving(saved[1], self.stored.get))[0]

    def edit(self, old: str, new: str, *sent: Any) -> Any:
        """Begin `main` of the old source, send it these values, save it, and return it moved onto the new source."""
        gen = self.deploy(old).main()
        next(gen)
        for value in sent:
            gen.send(value)
        saved = self.save(gen)
        self.deploy(new)
        moved = self.move(saved)
        again, held, _ = codec.dumps_with_code(moved, {})  # what it is now can be saved and loaded like any other
        assert {found.version for found, _ in held.values()} == {registry.modules()[self.name].version}
        return codec.loads(again)


@pytest.fixture
def site() -> Site:
    return Site()


def finished(gen: Any, *sent: Any) -> Any:
    """Send these values; return what the generator returns."""
    for value in sent[:-1]:
        gen.send(value)
    with pytest.raises(StopIteration) as stopped:
        gen.send(sent[-1])
    return stopped.value.value


def test_what_follows_the_wait_is_the_new_code(site: Site) -> None:
    moved = site.edit(
        """
        def main():
            a = 1
            b = yield "b"
            return a - b
        """,
        """
        RATE = 10
        def helper(a, b):
            return (a + b) * RATE
        def main():
            print("this never runs again")
            a = 2
            b = yield "b"
            return helper(a, b)
        """,
    )
    assert finished(moved, 5) == 60, "a is what the old code had bound"


def test_loops_go_on_where_they_were(site: Site) -> None:
    old = """
    def main():
        total = 0
        for row in [[1, 2], [3, 4], [5, 6]]:
            while True:
                for x in row:
                    got = yield x
                    total += got
                break
        return total
    """
    new = """
    def main():
        total = 0
        log = []
        for row in [[1, 2]]:
            while total < 1000:
                for x in row:
                    note = f"before {x}"
                    got = yield x
                    total += got * 100
                break
        return total
    """
    assert finished(site.edit(old, new, 1, 1, 1), 1, 1, 1) == 3 + 300


def test_a_wait_may_come_into_a_try_an_if_or_a_while(site: Site) -> None:
    old = """
    def main():
        got = yield "ask"
        return got
    """
    new = """
    def main():
        tries = 0
        while tries < 3:
            if not tries:
                try:
                    got = yield "ask"
                except ValueError:
                    return "handled"
                finally:
                    tries = 5
        return got + 1
    """
    assert finished(site.edit(old, new), 1) == 2
    moved = site.edit(old, new)
    with pytest.raises(StopIteration) as stopped:
        moved.throw(ValueError)
    assert stopped.value.value == "handled"


def test_and_out_of_one(site: Site) -> None:
    old = """
    def main():
        if 1:
            try:
                got = yield "ask"
            except ValueError:
                return "handled"
        return got
    """
    assert finished(site.edit(old, "def main():\n    answer = yield 'ask'\n    return [answer]"), 1) == [1]


def test_what_is_done_with_the_answer_may_change(site: Site) -> None:
    assert finished(site.edit("def main():\n    yield 'ask'\n    return 1", "def main():\n    return [(yield 'ask')]"), 7) == [7]
    assert finished(site.edit("def main():\n    return (yield 'ask')", "def main():\n    x = [0]\n    x[0] = yield 'ask'\n    return x" .replace("    x = [0]\n", "")
                              .replace("x[0] = yield 'ask'\n    return x", "x = yield 'ask'\n    return {x}")), 7) == {7}


@pytest.mark.parametrize(
    ("old", "new", "why"),
    [
        pytest.param("yield 'a'", "yield 'b'", "waits at line 2, `yield 'a'`, and the new code has no such wait", id="another wait"),
        pytest.param("yield 'a'", "yield 'a'\nyield 'a'", "of which there were 1 and now are 2, so it is not certain which one this is", id="one more of the same"),
        pytest.param("for x in [1]:\n    yield 'a'", "yield 'a'", "the new code is no longer inside a for loop", id="its loop is gone"),
        pytest.param("yield 'a'", "for x in [1]:\n    yield 'a'", "the new code is inside a for loop", id="a loop has come"),
        pytest.param("yield 'a'", "import contextlib\nwith contextlib.suppress(ValueError):\n    yield 'a'", "the new code is inside a with block", id="a with has come"),
        pytest.param("try:\n    1 / 0\nexcept ValueError:\n    pass\nexcept ZeroDivisionError:\n    yield 'a'", "yield 'a'", "no longer inside an except clause", id="its handler is gone"),
        pytest.param("x = [main, (yield 'a')]", "x = [print, (yield 'a')]", "in the middle of a statement that has changed (line 2 of the new code)", id="the middle of another statement"),
        pytest.param("x = 1 + (yield 'a')", "y = 1\nx = y + (yield 'a')", "in the middle of a statement that has changed", id="another operand"),
    ],
)
def test_what_is_not_certain_is_refused_and_said(site: Site, old: str, new: str, why: str) -> None:
    def main(body: str) -> str:
        return "def main():\n" + textwrap.indent(body, "    ")

    with pytest.raises(CodeChangedError) as raised:
        site.edit(main(old), main(new))
    assert str(raised.value).startswith(f"{site.name}:main ") and why in str(raised.value), raised.value


def test_equal_waits_are_told_apart_by_what_they_are_in_or_by_their_order(site: Site) -> None:
    old = """
    def main():
        yield "pause"
        for x in "ab":
            yield "pause"
        yield "pause"
        return "old"
    """
    new = """
    def main():
        first = 1
        yield "pause"
        for x in "ab":
            extra = 1
            yield "pause"
        x = 5
        yield "pause"
        return x
    """
    for steps, result in enumerate([5, 5, 5, "b"]):
        assert finished(site.edit(old, new, *[None] * steps), *[None] * (4 - steps)) == result


def test_with_blocks_go_on_with_the_manager_that_was_entered(site: Site) -> None:
    old = """
    import contextlib
    def main():
        stack = contextlib.ExitStack()
        seen = []
        with stack as s:
            s.callback(seen.append, "left")
            yield "inside"
        return seen
    """
    new = """
    import contextlib
    def main():
        stack = contextlib.ExitStack()
        seen = []
        with stack as s:
            s.callback(seen.append, "never")
            got = yield "inside"
            if got:
                return ("returned", seen)
        return seen
    """
    assert finished(site.edit(old, new), 1) == ("returned", ["left"]), "a return in the block is new, and the manager is left"
    assert finished(site.edit(old, new), 0) == ["left"]


def test_a_handler_goes_on_with_its_exception_even_if_others_have_come(site: Site) -> None:
    old = """
    def main():
        try:
            raise KeyError("k")
        except KeyError as error:
            yield "why"
            return error
    """
    new = """
    def main():
        try:
            raise KeyError("other")
        except ValueError:
            return None
        except KeyError as error:
            yield "why"
            return [error.args]
    """
    assert finished(site.edit(old, new), None) == [("k",)]


def test_each_generator_of_a_chain_is_moved_by_its_own_function(site: Site) -> None:
    old = """
    def inner(n):
        got = yield "ask"
        return got + n
    def main():
        got = yield from inner(1)
        return got
    """
    new = """
    def inner(n):
        note = 1
        got = yield "ask"
        return (got + n) * 10
    def main():
        prepared = None
        got = yield from inner(2)
        return [got]
    """
    assert finished(site.edit(old, new), 5) == [60]


def test_variables_are_shared_with_nested_functions_as_before(site: Site) -> None:
    old = """
    def main():
        total = 0
        def add(n):
            nonlocal total
            total += n
        add(1)
        yield "wait"
        add(1)
        return total
    """
    new = """
    def main():
        total = 0
        other = 5
        def add(n):
            nonlocal total
            total += n * 10
        add(1)
        yield "wait"
        add(1)
        later = lambda: total
        return later()
    """
    assert finished(site.edit(old, new), None) == 11, "the function that it holds has the new code, too"


def test_a_variable_may_become_shared_or_stop_being_so(site: Site) -> None:
    plain = "def main():\n    k = 3\n    yield 'wait'\n    return k"
    shared = "def main():\n    k = 3\n    yield 'wait'\n    return [k for _ in (lambda: k)() * [0]] and (lambda: k)() + 1"
    assert finished(site.edit(plain, shared), None) == 4
    assert finished(site.edit(shared, plain), None) == 3
    held = "def main():\n    k = 3\n    def get():\n        return k\n    yield 'wait'\n    return get()"
    with pytest.raises(CodeChangedError, match="no longer shares k with the functions in it, but this instance holds one that was made by the old code"):
        site.edit(held, held.replace("return k", "return 1"))


HELD = {
    "a lambda": (
        "x = 1\nf = lambda: x\nyield 'a'\nreturn f()",
        "x = 1\nf = lambda: x + 1\nyield 'a'\nreturn f()",
        "(line 3), which this instance holds, has changed and has no name to find it by",
    ),
    "other parameters": (
        "def f(a, k=1):\n    return a\nyield 'a'\nreturn f(0)",
        "def f(a, k=1, m=2):\n    return m\nyield 'a'\nreturn f(0)",
        "main.<locals>.f is held in a variable, and has other parameters now",
    ),
    "a function that is gone": (
        "def f():\n    return 1\nyield 'a'\nreturn f()",
        "yield 'a'",
        "no longer has a function 'main.<locals>.f'",
    ),
    "another one of that name": (
        "def f():\n    return 1\nyield 'a'\nreturn f()",
        "def f():\n    return 1\nyield 'a'\ndef f():\n    return 2\nreturn f()",
        "main.<locals>.f there were 1 and now are 2",
    ),
    "another closure": (
        "def f():\n    return 1\nyield 'a'\nreturn f()",
        "x = 1\ndef f():\n    return x\nyield 'a'\nreturn f()",
        "now uses x of the function around it, which it did not when this was saved",
    ),
    "no generator": (
        "def f(n):\n    yield n\ng = f(1)\nnext(g)\nyield 'a'\nreturn g",
        "def f(n):\n    return [n]\ng = f(1)\nyield 'a'\nreturn g",
        "is no longer a generator",
    ),
    "a class": (
        "class C:\n    def m(self):\n        return 1\nc = C()\nyield 'a'\nreturn c.m()",
        "class C:\n    def m(self):\n        return 2\nc = C()\nyield 'a'\nreturn c.m()",
        "has changed and belongs to a class that is defined in a function",
    ),
    "a variable": (
        "yield 'a'\nreturn 1",
        "rate = 2\nyield 'a'\nreturn rate",
        "waits at line 3 of the new code, `yield 'a'`, and then needs rate: a variable that this instance does not have",
    ),
    "variables": (
        "yield 'a'",
        "a = b = 2\nwhile True:\n    yield 'a'\n    print(a, b)\n    a = b = 3",
        "needs a, b: variables that this instance does not have",
    ),
}


@pytest.mark.parametrize("case", HELD)
def test_what_it_holds_is_moved_as_it_is_or_refused(site: Site, case: str) -> None:
    old, new, why = HELD[case]
    with pytest.raises(CodeChangedError) as raised:
        site.edit(*("def main():\n" + textwrap.indent(body, "    ") for body in (old, new)))
    assert why in str(raised.value), raised.value


def test_a_call_that_has_not_begun_needs_the_same_parameters(site: Site) -> None:
    text = "def f(n{0}):\n    yield n\n    return n\ndef main():\n    late = f(1)\n    yield 'wait'\n    return (yield from late)"
    with pytest.raises(CodeChangedError, match="f has not begun, and has other parameters now"):
        site.edit(text.format(""), text.format(", m=2"))


def test_functions_without_a_name_are_found_by_what_they_are(site: Site) -> None:
    """Lambdas, generator expressions in the middle of their loop, classes defined in the function."""
    text = """
    def main():
        {0}
        k = 2
        double = lambda n: n * k
        rows = (double(n) for n in [1, 2, 3])
        next(rows)
        class Sum:
            def __init__(self):
                self.total = k
        made = Sum()
        yield "wait"
        return [{1}, double(5), *rows, made.total]
    """
    assert finished(site.edit(text.format("pass", "'old'"), text.format("first = lambda n: n", "'new'")), None) == ["new", 10, 4, 6, 2]


def test_a_call_that_has_not_begun_begins_in_the_new_code(site: Site) -> None:
    text = "def inner(n):\n    yield n\n    return n + {0}\ndef main():\n    late = inner(1)\n    yield 'wait'\n    return (yield from late)"
    assert finished(site.edit(text.format(1), text.format(100)), None, None) == 101


def test_it_matters_whether_a_break_leaves_a_finally_that_waits(site: Site) -> None:
    """It notes why it was entered, and only what the try can do was compiled."""
    text = "def main():\n    for x in [1, 2]:\n        try:\n            {0}\n        finally:\n            yield 'closing'\n            note = 1\n    return x"
    assert finished(site.edit(text.format("break"), text.format("x = 5\n            break")), None) == 1
    assert finished(site.edit(text.format("return 7"), text.format("return 8")), None) == 7
    with pytest.raises(CodeChangedError, match="in the middle of a statement that has changed"):
        site.edit(text.format("break"), text.format("continue"))


def test_async_code_is_moved_as_generators_are(site: Site) -> None:
    text = """
    class Pause:
        def __await__(self):
            return (yield "pause")
    class Manager:
        async def __aenter__(self):
            await Pause()
            return self
        async def __aexit__(self, *error):
            return {0}
    async def numbers():
        {1}
        for n in range(3):
            await Pause()
            yield n
    async def main():
        total = 0
        async with Manager() as m:
            async for n in numbers():
                total += n * {2}
        return total
    """
    site.deploy(text.format("None", "0", 1))
    gen = vars(__import__("sys").modules[site.name])["main"]()
    for _ in range(3):
        gen.send(None)
    saved = site.save(gen)
    site.deploy(text.format("False", "note = 0", 100))
    moved = site.move(saved)
    moved.send(None)
    with pytest.raises(StopIteration) as stopped:
        moved.send(None)
    assert stopped.value.value == 0 + 100 + 200


def test_a_module_that_is_gone_or_a_source_that_is_not_stored_is_named(site: Site) -> None:
    saved = site.save(site.deploy("def main():\n    yield 'a'").main())
    site.deploy("def main():\n    yield 'a'\n    return 1")
    registry._replaced.clear()
    site.stored.clear()
    with pytest.raises(CodeChangedError, match=r"the source of moved_\d+ that this instance runs \([0-9a-f]{12}\) is not stored, so it is not known where it waits"):
        site.move(saved)
    code = {"moved_nowhere": saved[1][site.name]}
    with pytest.raises(CodeChangedError, match=r"there is no durable module moved_nowhere here to move it to; @kw.migrate\(from_='moved_nowhere:FUNCTION'\) can take it to another module"):
        versions.moving(code, site.stored.get)


def test_old_code_is_never_run_and_need_not_run_any_more(site: Site) -> None:
    """The stored source is parsed; what it imports may be gone."""
    saved = site.save(site.deploy("import os as gone\ndef main():\n    yield 'a'\n    return gone").main())
    [key] = site.stored
    site.stored[key] = site.stored[key].replace(b"import os as gone", b"import os as gone")
    site.deploy("def main():\n    yield 'a'\n    return 1")
    registry._replaced.clear()
    moved = site.move(saved)
    next(moved)
    assert finished(moved, None) == 1
    assert registry.version(registry.version_name(site.name, saved[1][site.name]["version"])) is None, "it was not loaded"

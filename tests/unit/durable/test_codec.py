"""What snapshot bytes keep and what they refuse: identity, cycles, long chains, other processes, hostile bytes, named errors."""

import pathlib
import random
import subprocess
import sys
import tracemalloc
import types
from typing import Any

import pytest

import kwflow as kw
from kwflow import durable
from kwflow.core.murmur2 import partition_of
from kwflow.durable import saving
from kwflow.durable.peek import peek, peek_text
from kwflow.errors import LostCallWarning, NotDurableError, NotDurableWarning, SnapshotError, UnsavableError, UnsupportedError, UsageError

SOURCE = '''
import threading
SENTINEL = object()
LOCK = threading.Lock()

class Point:
    def __init__(self, x):
        self.x = x
    def walk(self):
        while True:
            self.x += yield self.x

class Odd(Exception):
    def __init__(self, a, b):
        super().__init__(f"{a}-{b}")
        self.a = a

def identity():
    shared = [1]
    pair = (shared, shared)
    mark, lock = SENTINEL, LOCK
    yield
    yield pair[0] is pair[1], mark is SENTINEL, lock is LOCK

def holds_itself():
    me = []
    def get():
        return me, get
    me.append((yield "self?"))
    yield get()[1] is get and me[0] is me[0]

def chain(inner):
    yield from inner

def leaf():
    yield "leaf"
    yield "end"

def odd():
    try:
        try:
            raise KeyError("first")
        except KeyError as e:
            raise Odd(1, 2) from e
    except Odd as caught:
        caught.add_note("noted")
        yield
        yield type(caught).__name__, caught.args, caught.a, repr(caught.__cause__), caught.__notes__

def bad(value):
    fine = 1
    trouble = value
    yield
    return fine, trouble

def iterators():
    held = [iter([1, 2, 3]), iter((1, 2)), iter({"a": 1, "b": 2}), iter(range(5)), enumerate("xyz"), zip("ab", [1, 2]), map(str, [7, 8]), reversed([1, 2, 3]), iter("text")]
    for it in held:
        next(it)
    yield
    yield [list(it) for it in held]
'''


@pytest.fixture(scope="module")
def code() -> Any:
    return durable.load_source("codec_cases", SOURCE, "codec_cases.py")


def again(gen: Any) -> Any:
    return durable.loads(durable.dumps(gen))


@pytest.mark.parametrize("name", ["identity", "odd", "iterators"])
def test_what_a_saved_generator_holds_is_what_a_native_one_holds(code: Any, name: str) -> None:
    native: dict[str, Any] = {}
    exec(SOURCE, native)
    expected = native[name]()
    next(expected)
    gen = code.__dict__[name]()
    next(gen)
    assert next(again(gen)) == next(expected)


def test_a_generator_that_holds_itself_and_a_closure_in_its_own_cell_survive(code: Any) -> None:
    gen = code.holds_itself()
    next(gen)
    gen.send(gen)
    copy = durable.loads(durable.dumps(gen))
    assert copy is not gen
    state = durable.capture(copy)
    assert any(cell.cell_contents[0] is copy for cell in state.cells if isinstance(cell.cell_contents, list))


TOOLS = """{0}import inspect
class Doc:
    pass
int_, local = int, None
def main():
    class Row:
        async def fetch(self, doc: Doc) -> Doc:
            pass
    def tool(query: str, /, limit: int_ = 3, *docs: Doc, loud: "bool" = False, **more: dict[str, Doc]) -> list[str]:
        return [query]
    local = Row
    def near(row: Row, doc: Doc) -> local:
        pass
    tools = [tool, near, Row.fetch, lambda x: x]
    yield
    yield [inspect.signature(one) for one in tools], [one.__annotations__ for one in tools], Row, Doc
"""


def test_a_closure_keeps_its_annotations() -> None:
    """What is derived from a function's signature, such as the schema of a tool, is the same after a restore. Annotations that only the call itself knows are left out."""
    gen = durable.load_source("annotated_tools", TOOLS.format(""), "annotated_tools.py").main()
    next(gen)
    saved = durable.dumps(gen)
    shown, (tool, near, fetch, none), _, doc = next(durable.loads(saved))
    native_shown, native, *_ = next(gen)
    assert str(shown[0]) == str(native_shown[0])
    assert [[*tool.items()], fetch, none] == [[*native[0].items()], native[2], {}]
    assert near == {"doc": doc}


def test_a_closure_keeps_annotations_that_are_text() -> None:
    gen = durable.load_source("told_tools", TOOLS.format("from __future__ import annotations\n"), "told_tools.py").main()
    next(gen)
    saved = durable.dumps(gen)
    assert str(next(durable.loads(saved))) == str(next(gen))


def test_a_chain_of_20000_generators_is_saved_without_recursion(code: Any) -> None:
    gens = [code.leaf()]
    next(gens[0])
    made = [code.bad(gens[0])]
    for _ in range(20_000):
        next(made[-1])
        made.append(code.bad(made[-1]))
    next(made[-1])
    copy = again(made[-1])
    depth = 0
    while "trouble" in (slots := durable.capture(copy).slots):
        copy, depth = slots["trouble"], depth + 1
    assert depth == 20_001


@pytest.mark.parametrize("grows", [saving._lists_may_grow, False])
@pytest.mark.parametrize("length", [1, *range(330, 337), *range(663, 670), *range(996, 1003)])
def test_a_chain_of_any_length_is_saved_whole(length: int, grows: bool, code: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each state brings in the next generator, also where pickle begins another batch of 1,000 items: after 332, 665 and 998 of them. Both by a list and by an iterator, as Python 3.14 wants it."""
    monkeypatch.setattr(saving, "_lists_may_grow", grows)
    made = [code.leaf()]
    for _ in range(length):
        next(made[-1])
        made.append(code.bad(made[-1]))
    next(made[-1])
    body = durable.dumps(made[-1])
    assert len(peek(body)) == length + 1
    copy, depth = durable.loads(body), 0
    while "trouble" in (slots := durable.capture(copy).slots):
        copy, depth = slots["trouble"], depth + 1
    assert depth == length


def test_times_are_shown_to_be_read() -> None:
    """Semantics §4.4: pickle stores dates and times as bytes. Bytes that are no valid date or time are shown as they are."""
    source = """
import datetime
from zoneinfo import ZoneInfo
def main():
    at = datetime.datetime(2026, 1, 2, 3, 4, 5, tzinfo=datetime.UTC)
    there, day, hour, pause = datetime.datetime(2026, 1, 2, 3, tzinfo=ZoneInfo("Europe/Berlin")), at.date(), at.time(), datetime.timedelta(days=2, hours=8)
    yield
"""
    waiting = durable.load_source("times", source, "times.py").main()
    next(waiting)
    body = durable.dumps(waiting)
    [(_, shown)] = peek(body)
    assert {name: repr(value) for name, value in shown.items()} == {
        "at": "<datetime.datetime 2026-01-02 03:04:05 <datetime.timezone <datetime.timedelta 0:00:00>>>",
        "there": "<datetime.datetime 2026-01-02 03:00:00 <zone 'Europe/Berlin'>>",
        "day": "<datetime.date 2026-01-02>",
        "hour": "<datetime.time 03:04:05>",
        "pause": "<datetime.timedelta 2 days, 8:00:00>",
    }
    [(_, damaged)] = peek(body.replace(b"\x07\xea\x01\x02\x94", b"\x07\xea\x0d\x02\x94"))
    assert repr(damaged["day"]) == r"<datetime.date b'\x07\xea\r\x02'>"


def test_pydantic_models_are_shown_by_their_fields() -> None:
    """Semantics §4.4: they were shown as the dicts in which pydantic keeps them, and with nested ones little else had room."""
    source = """
import pydantic
class Item(pydantic.BaseModel):
    sku: str
class Order(pydantic.BaseModel):
    model_config = pydantic.ConfigDict(extra="allow")
    items: list[Item]
    _note: str = pydantic.PrivateAttr("none")
def main():
    order = Order(items=[Item(sku="cup")], gift=True)
    yield
"""
    waiting = durable.load_source("models", source, "models.py").main()
    next(waiting)
    [(_, values)] = peek_text(durable.dumps(waiting), 200)
    assert values["order"] == "models.Order(items=[models.Item(sku='cup')], gift=True, _note='none')"


def test_values_that_have_no_end_are_told_in_so_many_characters() -> None:
    """Semantics §4.4: on such values, `kwflow show --locals` used to end with an internal error of kwflow."""
    source = """
def main():
    number, deep, itself = 10**5000, [], []
    itself.append(itself)
    for _ in range(300):
        deep = [deep]
    yield
"""
    waiting = durable.load_source("endless", source, "endless.py").main()
    next(waiting)
    [(function, values)] = peek_text(durable.dumps(waiting), 100)
    assert (function, values["number"], values["itself"], values["_"]) == ("main", "<int of 16610 bits>", "[…]", "299")
    assert values["deep"].startswith("[[[[") and "…" in values["deep"]


def test_damaged_bytes_do_not_fill_the_memory_of_who_looks_at_them() -> None:
    """G10: found by a property test whose process took 22 GB, because the number of an entry in a memo may be anything."""
    large = b"\x8a\x05\0\0\0\0\1"  # 2 ** 32
    made = {name: b"\x8c\x08builtins\x8c" + bytes([len(name)]) + name.encode() + b"\x93" for name in ("bytearray", "range", "set")}
    bombs = (b"Nr\0\0\x80\0.", b"\x96\0\0\0\0\1\0\0\0.", made["bytearray"] + large + b"\x85R.", made["set"] + made["range"] + large + b"\x85R\x85R.")
    tracemalloc.start()
    try:
        for data in [first + b"\x80\x05" + bomb for bomb in bombs for first in (b"\2", b"")]:
            with pytest.raises(SnapshotError):
                peek(data)
        assert tracemalloc.get_traced_memory()[1] < 10_000_000
    finally:
        tracemalloc.stop()


def test_damaged_bytes_keep_nobody_busy_who_looks_at_them() -> None:
    """G10: a tuple of the previous tuple twice, sixty levels deep, is a hundred bytes, but its hash, or its text in a name, takes forever. A very deep one ends the process."""
    wide, deep = b")" + b"2\x86" * 60, b")" + b"\x85" * 1_000_000
    rebuilt = b"\x8c\x16kwflow.durable.rebuild\x8c\x05named\x93"
    for bomb in (b"}" + wide + b"Ns.", b"}(" + wide + b"Nu.", b"\x8f(" + wide + b"\x90.", b"(" + wide + b"\x91.", b"}" + deep + b"Ns.", rebuilt + wide + b"N\x86R.", rebuilt + b"}\x8c\1xNsb."):
        with pytest.raises(SnapshotError):
            peek(b"\2\x80\x05" + bomb)


def test_a_body_that_is_a_plain_list_still_loads() -> None:
    """Every Python up to 3.13 writes bodies in this form."""
    source = "def main():\n    held = [(yield 1)]\n    got = yield held\n    held.append(got)\n    return held\n"
    durable.load_source("former", source, "former.py")
    body = (
        b'\x02\x80\x05\x956\x00\x00\x00\x00\x00\x00\x00]\x94(h\x00\x8c\x06former\x94h\x11\x86\x94R\x94NK\x00h"}\x94(\x8c\x04held\x94]\x94]\x94K\x02aah\x1c\x8c\x031 1\x94ue.'
    )
    assert [variables for _, variables in peek(body)] == [{"held": [[2]]}]
    with pytest.raises(StopIteration) as ended:
        durable.loads(body).send(3)
    assert ended.value.value == [[2], 3]


def test_a_bound_generator_method_goes_on_with_its_object(code: Any) -> None:
    point = code.Point(1)
    gen = point.walk()
    assert next(gen) == 1
    copy, same = durable.loads(durable.dumps((gen, point)))
    assert copy.send(4) == 5
    assert same.x == 5
    assert point.x == 1


def test_what_cannot_be_saved_is_named(code: Any) -> None:
    """G4."""
    gen = code.bad(open(__file__))
    next(gen)
    with pytest.raises(UnsavableError) as caught:
        durable.dumps(gen)
    error = caught.value
    assert (error.variable, error.function, error.type_name) == ("value", "bad", "TextIOWrapper")
    assert "codec_cases.py:" in str(error)
    durable.capture(gen).slots["trouble"].close()


def test_a_native_generator_is_refused_with_the_way_to_make_it_durable(code: Any) -> None:
    def native() -> Any:
        yield 1

    gen = code.bad(native())
    next(gen)
    with pytest.raises((UnsavableError, NotDurableError), match="__kwflow_durable__"):
        durable.dumps(gen)


@pytest.mark.parametrize(
    ("text", "named"),
    [
        ("def f():\n    try:\n        yield\n    except* ValueError:\n        yield", "except*"),
        ("def f():\n    try:\n        yield\n    except (yield):\n        pass", "except clause"),
        ("async def f():\n    try:\n        pass\n    except* ValueError:\n        await f()", "except*"),
        ("async def f():\n    try:\n        pass\n    except (await f()):\n        pass", "except clause"),
        *(
            [("async def f():\n    def g(x: (await f())):\n        pass", "annotation"), ("def f():\n    x: (yield) = (yield)\n", "annotation")]
            if sys.version_info < (3, 14)  # Python itself raises a SyntaxError for it since 3.14
            else []
        ),
    ],
)
def test_what_is_not_supported_is_refused_at_load_with_file_line_and_name(text: str, named: str) -> None:
    """Semantics §5.3."""
    with pytest.raises(UnsupportedError, match=r"refused\.py:\d") as caught:
        durable.load_source("refused", text, "refused.py")
    assert named in str(caught.value)
    assert "refused" not in sys.modules


def test_a_snapshot_resumes_in_another_process_with_another_hash_seed(code: Any, tmp_path: pathlib.Path) -> None:
    gen = code.iterators()
    next(gen)
    (tmp_path / "saved").write_bytes(durable.dumps(gen))
    (tmp_path / "code.py").write_text(SOURCE)
    child = (
        "import sys, pathlib\nfrom kwflow import durable\nhere = pathlib.Path(sys.argv[1])\n"
        "durable.load_source('codec_cases', (here / 'code.py').read_text(), 'codec_cases.py')\n"
        "print(next(durable.loads((here / 'saved').read_bytes())))"
    )
    done = subprocess.run([sys.executable, "-c", child, str(tmp_path)], capture_output=True, text=True, check=False, env={"PYTHONHASHSEED": "7", "PATH": ""}, cwd=pathlib.Path(__file__).parents[3])
    assert done.stdout.strip() == str(next(gen)), done.stderr


@pytest.mark.skipif(sys.version_info >= (3, 15), reason="Python 3.15 has frozendict")
def test_what_only_a_newer_python_has_is_refused_by_name(code: Any) -> None:
    """G7."""
    newer = durable.dumps(memoryview).replace(b"memoryview", b"frozendict")
    with pytest.raises(SnapshotError, match=r"names frozendict, which Python 3\.\d+ does not have; it was saved by a newer Python"):
        durable.loads(newer)


# LONG_BINPUT (r) reserves memory for any index it names; in a snapshot, the checksum is verified first
_BYTES = [byte for byte in range(256) if byte != ord("r")]


def test_any_bytes_load_or_are_refused(code: Any) -> None:
    """Seeded. Mutated snapshots load or raise SnapshotError, and nothing else happens."""
    gen = code.odd()
    next(gen)
    data = durable.dumps(gen)
    chance = random.Random(20261124)
    outcomes = set()
    for _ in range(300):
        mutated = bytearray(data)
        for _ in range(chance.randint(1, 4)):
            mutated[chance.randrange(len(mutated))] = chance.choice(_BYTES)
        try:
            durable.loads(bytes(mutated))
            outcomes.add("loaded")
        except SnapshotError:
            outcomes.add("refused")
    assert outcomes == {"loaded", "refused"}


@pytest.mark.parametrize("attack", [b"cos\nsystem\n(S'true'\ntR.", b"cbuiltins\neval\n(S'1'\ntR.", b"csubprocess\nPopen\n(S'true'\ntR.", b"cbuiltins\ngetattr\n.", b"ckwflow.durable.loading\nsys\n."])
def test_names_outside_the_list_are_never_called(attack: bytes) -> None:
    """wire.md §3."""
    with pytest.raises(SnapshotError, match="not allowed|gone|not loaded"):
        durable.loads(attack)


@pytest.mark.parametrize(("key", "hashed"), [(b"21", -973932308), (b"foobar", -790332482), (b"a-little-bit-long-string", -985981536), (b"abc", 479470107)])
def test_keys_land_where_java_puts_them(key: bytes, hashed: int) -> None:
    """K6: the hashes of Kafka's own UtilsTest.testMurmur2, modulo 100."""
    assert partition_of(key, 100) == (hashed & 0x7FFFFFFF) % 100


def test_one_function_of_a_plain_module_is_made_durable_by_the_decorator(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "plain_module.py").write_text("""
from __future__ import annotations
from kwflow.durable import durable

def helper(n):
    return n * 10

@durable
def first(n: Undefined, step=[1]) -> Undefined:
    \"\"\"Its text.\"\"\"
    total = 0
    for i in range(n):
        total += (yield i + step[0])
        yield from second(total)
    return helper(total)

@durable
def second(value):
    yield ("second", value)

def native():
    yield 1
""")
    monkeypatch.syspath_prepend(str(tmp_path))
    module = __import__("plain_module")
    assert (module.first.__doc__, module.first.__defaults__, module.first.__code__.co_firstlineno) == ("Its text.", ([1],), 9)
    assert durable.is_durable(module.second)
    assert not durable.is_durable(module.native)
    gen, met = module.first(2), []
    send = None
    while True:
        try:
            met.append(gen.send(send))
        except StopIteration as stop:
            met.append(stop.value)
            break
        send = 3
        gen = again(gen)
    assert met == [1, ("second", 3), 2, ("second", 6), 60]
    with pytest.raises(UsageError, match="module-level"):
        durable.durable(lambda: (yield))


def test_a_function_that_is_made_durable_alone_may_stand_in_an_if_and_have_annotations_that_are_never_evaluated(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    text = "from __future__ import annotations\nfrom kwflow.durable import durable\nif True:\n    @durable\n    def main():\n        def inner(a: Missing) -> Missing:\n            return a\n"
    text += "        yield inner\n        yield '''a\n  b''', inner(1)\n"
    (tmp_path / "guarded_module.py").write_text(text)
    monkeypatch.syspath_prepend(str(tmp_path))
    gen = __import__("guarded_module").main()
    assert next(gen).__annotations__ == {"a": "Missing", "return": "Missing"}
    assert gen.gi_frame.f_lineno == 8
    assert next(again(gen)) == ("a\n  b", 1)


def test_a_native_generator_function_in_a_durable_module_is_warned_about() -> None:
    """Semantics §5.3."""
    with pytest.warns(NotDurableWarning, match="findlinestarts is a generator function of dis"):
        durable.load_source("warned", "from dis import findlinestarts\n")


def test_a_thrown_away_call_of_a_generator_is_warned_about_with_its_line() -> None:
    """Semantics §1.4."""
    source = "def book(x):\n    yield x\ndef plain():\n    return 1\ndef main(o):\n    plain()\n    def inner():\n        yield 1\n    inner()\n    yield book(1)\n    book(2)\n"
    with pytest.warns(LostCallWarning) as met:
        durable.load_source("thrown", source, "thrown.py")
    assert sorted(warning.lineno for warning in met) == [9, 11]


def test_a_timeout_error_says_the_same_after_it_was_saved() -> None:
    """TimeoutError is an OSError: setting its errno to None would hide its message."""
    for error in (TimeoutError("kw.timeout"), OSError(2, "gone", "f"), OSError()):
        found = durable.loads(durable.dumps(error))
        assert (str(found), found.args, found.errno) == (str(error), error.args, error.errno)


def test_every_function_of_kw_may_be_held_over_a_wait_that_is_among_its_arguments() -> None:
    """`kw.spawn(f((yield x)))` holds the function meanwhile. A snapshot names it by the module that defines it, where 0.1.0 named all of them in kwflow.api."""
    functions = [found for name in kw.__all__ if isinstance(found := getattr(kw, name), types.FunctionType)]
    assert len(functions) > 25
    for found in functions:
        assert durable.loads(durable.dumps(found)) is found
        assert durable.loads(b"\x02\x80\x05](ckwflow.api\n" + found.__name__.encode() + b"\nNe.") is found


def test_import_star_from_a_durable_module_leaves_the_runtime_of_the_importing_one_alone() -> None:
    durable.load_source("star_source", "def inner():\n    yield 1\n")
    module = durable.load_source("star_target", "from star_source import *\ndef outer():\n    yield from inner()\n    return 'end'\n")
    gen = again(module.outer())
    assert next(gen) == 1
    with pytest.raises(StopIteration, match="end"):
        next(again(gen))


SENTINELS = """
PAD: str = "__no__pad__"
BYTES = b"ab"
import itertools
def padded(n):
    rows = itertools.zip_longest(*[iter(range(3))] * n, fillvalue=PAD)
    for row in rows:
        yield row
        if row[-1] is PAD:
            yield "short"
        if any(item is not PAD for item in row) and (lambda x: PAD is x)(row[-1]):
            yield "again"
def shadowed(PAD):
    yield
    yield "".join(["__no__", "pad__"]) is PAD
def others(text):
    yield
    yield [text is PAD, BYTES is text, object() is PAD, None is not PAD, [x is PAD for x in [text]], type(text is PAD)]
def waits():
    got = (yield) is PAD
    yield
    yield got
"""


def test_a_text_of_the_module_that_is_compared_by_identity_is_the_same_after_a_restore() -> None:
    """docs/LOWERING.md. Libraries mark what is missing with a text of their own (toolz's `partition_all`); nothing tells an equal text that was saved from it."""
    module = durable.load_source("sentinels", SENTINELS, "sentinels.py")
    expected = [(0, 1), (2, module.PAD), "short", "again"]
    assert [*module.padded(2)] == expected
    gen, got = module.padded(2), []
    for _ in expected:
        got.append(next(gen))
        gen = again(gen)
    assert got == expected
    for text, answer in [("__no__pad__", True), ("other", False)]:
        gen = module.others(text)
        next(gen)
        assert next(again(gen)) == [answer, False, False, True, [answer], bool]
    gen = module.shadowed("__no__pad__")
    next(gen)
    assert next(gen) is False
    gen = module.waits()
    next(gen)
    gen = again(gen)
    assert gen.send("__no__pad__") is None
    assert next(again(gen)) is True


def test_an_expression_of_a_thousand_terms_is_lowered_as_any_other(monkeypatch: pytest.MonkeyPatch) -> None:
    """Semantics §5. Tables of numbers in libraries are such expressions (sympy). What is too deep even for that is refused by the name of its file."""
    long = " + ".join(["x"] * 1000)
    gen = durable.load_source("long_sum", f"def plain(x):\n    return {long}\ndef main(x):\n    y = {long} + (yield)\n    yield y, plain(x)\n", "long_sum.py").main(2)
    next(gen)
    assert again(gen).send(1) == (2001, 2000)
    limit = sys.getrecursionlimit()
    monkeypatch.setattr("kwflow.durable.lower._CALLS_MAX", 0)
    with pytest.raises(UnsupportedError, match="too_long_sum.py: code nested too deeply to be made durable"):
        durable.load_source("too_long_sum", f"def plain(x):\n    return {long}\n", "too_long_sum.py")
    assert sys.getrecursionlimit() == limit

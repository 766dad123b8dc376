"""Objects that do not outlive a process, reducers of the author's own, and errors that name what cannot be saved."""

import contextlib
import socket
import threading
import weakref
from collections.abc import Iterator
from typing import Any

import pytest

import kwflow as kw
from kwflow import durable
from kwflow.errors import ResourceError, SnapshotError, UnsavableError, UsageError
from kwflow.testing import WorkflowTester

SOURCE = """
import contextlib, functools
import kwflow as kw

MADE = []
FAIL = []

class Connection:
    def __init__(self, url):
        if FAIL:
            raise OSError(FAIL[0])
        MADE.append(url)
        self.url, self.calls, self.lock = url, [], __import__("threading").Lock()
    def query(self, text):
        self.calls.append(text)
        return f"{self.url}: {text}"
    def __enter__(self):
        self.calls.append("enter")
        return self
    def __exit__(self, *error):
        self.calls.append("exit")
    def __getitem__(self, key):
        return key
    def __len__(self):
        return 3

def uses(url):
    conn = kw.reacquire(Connection, url)
    first = conn.query("a")
    yield first
    yield conn.query("b"), conn.calls, conn["k"], len(conn), bool(conn)
    conn.name = "n"
    return conn.name, conn.calls

def within(url):
    with kw.reacquire(lambda: Connection(url)) as conn:
        yield conn.query("a")
        yield conn.query("b"), list(conn.calls)
        calls = conn.calls
    return calls

def unused(url):
    with kw.reacquire(Connection, url) as conn:
        yield
    yield "left"

class Client:
    def __init__(self, url):
        self.url, self.socket = url, object()
        self.connect()
    def connect(self):
        if FAIL:
            raise OSError(FAIL[0])
        MADE.append(self.url)
        self.lock = __import__("threading").Lock()
    def __getstate__(self):
        return {"url": self.url}
    def __durable_reenter__(self):
        self.connect()

class Quiet(Client):
    def connect(self):
        if FAIL:
            raise OSError(FAIL[0])

def holds(url):
    client = Client(url)
    pair = [client, client]
    yield
    yield client.url, pair[0] is client, hasattr(client, "lock")

def main(opts):
    client = Quiet("main")
    answer = yield kw.suspend("ask")
    return [client.url, answer]

class Thing:
    def __init__(self, x):
        self.x = x

def bad(value, extra=None):
    fine = 1
    yield
    return fine, value, extra

def outer(value):
    inner = bad({"a": [0, Thing(value)]})
    del value
    yield from inner

def undoing(value):
    return lambda: value

def closed(value):
    undos = [undoing(value)]
    del value
    yield
    return undos

def failed(value):
    try:
        raise ValueError("no", value)
    except ValueError as error:
        kept = error
    del value
    yield
    return kept
"""


@pytest.fixture
def code() -> Iterator[Any]:
    made = durable.load_source("resource_cases", SOURCE, "resource_cases.py")
    yield made


def again(gen: Any) -> Any:
    return durable.loads(durable.dumps(gen))


# -- kw.reacquire ----------------------------------------------------------------------------------------------------


def test_a_resource_is_made_again_when_it_is_first_used_after_a_restore(code: Any) -> None:
    gen = code.uses("db")
    assert next(gen) == "db: a"
    gen = again(again(gen))
    assert code.MADE == ["db"]
    assert next(gen) == ("db: b", ["b"], "k", 3, True)
    assert code.MADE == ["db", "db"]
    with pytest.raises(StopIteration) as stop:
        next(again(gen))
    assert stop.value.value == ("n", [])


def test_within_a_with_block_it_is_entered_again_and_left_once(code: Any) -> None:
    gen = code.within("db")
    assert next(gen) == "db: a"
    gen = again(gen)
    assert next(gen) == ("db: b", ["enter", "b"])
    with pytest.raises(StopIteration) as stop:
        next(gen)
    assert stop.value.value == ["enter", "b", "exit"]


def test_a_resource_that_is_not_used_again_is_not_made_again(code: Any) -> None:
    gen = code.unused("db")
    next(gen)
    assert next(again(gen)) == "left"
    assert code.MADE == ["db"]


def test_what_the_factory_raises_after_a_restore_is_raised_where_the_resource_is_used(code: Any) -> None:
    gen = code.uses("db")
    next(gen)
    gen = again(gen)
    code.FAIL.append("no network")
    with pytest.raises(OSError, match="no network"):
        next(gen)


def test_reacquire_takes_a_factory_and_is_not_iterated(code: Any) -> None:
    with pytest.raises(UsageError, match="creates the resource"):
        kw.reacquire(object())  # type: ignore[arg-type]
    with pytest.raises(TypeError, match="not iterable"):
        iter(kw.reacquire(list))
    assert "reacquired" in repr(kw.reacquire(list))


# -- __durable_reenter__ ---------------------------------------------------------------------------------------------


def test_an_object_is_told_that_it_is_back_once_for_each_restore(code: Any) -> None:
    gen = code.holds("a")
    next(gen)
    assert next(again(again(gen))) == ("a", True, True)
    assert code.MADE == ["a"] * 3


def test_it_is_not_told_when_a_snapshot_is_only_looked_at(code: Any) -> None:
    gen = code.holds("a")
    next(gen)
    body = durable.dumps(gen)
    assert durable.peek(body)[0][0] == "holds"
    assert durable.canonical_bytes(body) == durable.canonical(again(gen))
    assert code.MADE == ["a", "a"]


def test_what_it_raises_is_a_resource_error_that_names_the_class(code: Any) -> None:
    gen = code.holds("a")
    next(gen)
    body = durable.dumps(gen)
    code.FAIL.append("no network")
    with pytest.raises(ResourceError, match=r"Client.__durable_reenter__ failed: OSError: no network") as caught:
        durable.loads(body)
    assert caught.value.type_name == "Client"


def test_an_instance_whose_resource_does_not_come_back_is_parked_and_goes_on_when_it_does(code: Any) -> None:
    """G4."""
    engine = WorkflowTester(code.main)
    engine.start("w")
    code.FAIL.append("no network")
    engine.resume("w", "ask", 7)
    parked = (engine.header("w") or {})["parked"]
    assert (parked["reason"], "no network" in parked["message"]) == ("ResourceError", True)
    code.FAIL.clear()
    engine.command("w", "retry")
    assert engine.result("w") == ["main", 7]


# -- durable.register_reducer ----------------------------------------------------------------------------------------


class Money:
    """Cannot be saved by itself: its class is in a module that is not durable."""

    def __init__(self, cents: int) -> None:
        self.cents = cents


def test_a_registered_class_is_saved_by_its_reducer_and_keeps_its_identity(code: Any) -> None:
    gen = code.bad(Money(5))
    next(gen)
    with pytest.raises(UnsavableError, match=r"durable\.register_reducer"):
        durable.dumps(gen)
    durable.register_reducer(Money, lambda money: [money.cents], lambda held: Money(held[0]), name="test-money")
    price = Money(7)
    gen = code.bad(price, [price])
    next(gen)
    with pytest.raises(StopIteration) as stop:
        next(again(gen))
    _, one, (two,) = stop.value.value
    assert one.cents == 7
    assert one is two


def test_a_reducer_that_is_not_registered_where_it_is_loaded_is_named(code: Any) -> None:
    durable.register_reducer(Money, lambda money: money.cents, Money, name="test-money")
    data = durable.dumps(Money(5)).replace(b"test-money", b"lost-money")
    with pytest.raises(SnapshotError, match="'lost-money', for which no reducer is registered"):
        durable.loads(data)


def test_old_code_registers_reducers_for_its_own_classes_only() -> None:
    """Semantics §8.4."""
    from kwflow.durable import rebuild, registry

    class Old:
        pass

    current = durable.load_source("reducing", "def build(held):\n    return held\n", "reducing.py")
    loaded = registry.modules()["reducing"]
    hidden = registry.version_name("reducing", loaded.version)
    registry.add_version(loaded)
    try:
        build = type(current.build)(current.build.__code__, current.build.__globals__)
        build.__module__ = hidden
        durable.register_reducer(Money, lambda money: money.cents, build, name="of-old-code")
        assert "of-old-code" not in rebuild.builders
        Old.__module__ = hidden
        durable.register_reducer(Old, lambda old: 1, build, name="of-old-code")
        assert [name for name in rebuild.builders if name.startswith("of-old-code")] == [f"of-old-code@{loaded.version[:12]}"]
    finally:
        registry.drop_version(hidden)


def test_reducers_have_names_of_their_own_and_are_not_for_builtin_values() -> None:
    durable.register_reducer(Money, lambda money: money.cents, Money, name="test-money")
    durable.register_reducer(Money, lambda money: money.cents, Money, name="test-money")  # a module that is loaded again
    with pytest.raises(UsageError, match="'test-money' is for"):
        durable.register_reducer(threading.Thread, lambda _: 0, lambda _: None, name="test-money")
    for cls in (dict, int, ValueError):
        with pytest.raises(UsageError, match="already saved by kwflow"):
            durable.register_reducer(cls, lambda value: value, lambda value: value)


# -- errors that name what cannot be saved (G4) ----------------------------------------------------------------------


def error_of(gen: Any) -> UnsavableError:
    next(gen)
    with pytest.raises(UnsavableError) as caught:
        durable.dumps([gen])
    return caught.value


def test_variable_function_file_line_type_and_remedy_are_named(code: Any) -> None:
    with contextlib.closing(socket.socket()) as held:
        error = error_of(code.bad(held))
    assert (error.variable, error.function, error.type_name) == ("value", "bad", "socket")
    line = SOURCE.splitlines().index("def bad(value, extra=None):") + 3
    assert error.place == f"resource_cases.py:{line}"
    assert str(error).startswith(f"variable 'value' of bad (resource_cases.py:{line}) cannot be saved: socket: ")
    assert "kw.reacquire" in str(error)
    assert "activity" in str(error)


LOCK = "is a lock"
PATHS: dict[str, tuple[Any, str, str]] = {
    "in containers": (lambda code, lock: code.bad({"conn": [1, (lock,)]}), "value", "value['conn'][1][0] is a lock"),
    "in an object": (lambda code, lock: code.bad([code.Thing({"a": lock})]), "value", "value[0].x['a'] is a lock"),
    "in an inner generator": (lambda code, lock: code.outer(lock), "value", "value['a'][1].x is a lock"),
    "in a closure": (lambda code, lock: code.closed(lock), "undos", "undos[0] (its variable 'value') is a lock"),
    "in an exception": (lambda code, lock: code.failed(lock), "kept", "kept.args[1] is a lock"),
    "in a partial": (lambda code, lock: code.bad(code.functools.partial(code.bad, extra=lock)), "value", "value.keywords['extra'] is a lock"),
    "in a bound method": (lambda code, lock: code.bad(code.Connection("x").query), "value", "value.__self__.lock is a lock"),
    "in an iterator": (lambda code, lock: code.bad(iter([lock, 1])), "value", "something inside value"),
}


@pytest.mark.parametrize("name", PATHS)
def test_the_way_to_the_culprit_is_shown(code: Any, name: str) -> None:
    make, variable, shown = PATHS[name]
    error = error_of(make(code, threading.Lock()))
    assert (error.variable, error.type_name) == (variable, "lock"), str(error)
    assert shown in str(error)
    assert "no lock" in str(error)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: weakref.ref(Money(1)), "weak reference"),
        (lambda: __import__("contextvars").ContextVar("v"), "context variables"),
        (lambda: __import__("contextvars").copy_context(), "context variables"),
        (lambda: __import__("itertools").pairwise("ab"), r"kwflow\.durable\.iters\.pairwise"),
        (lambda: memoryview(b"abc")[1:], "part of an object"),
        (lambda: open(__file__), r"kw\.reacquire\(lambda: open"),
        (lambda: (n for n in [1]), "not durable"),
        (lambda: threading.Thread, r"threading\.Thread"),
        (lambda: __import__("os").system, "of a module that is not durable"),
        (lambda: __import__("operator").attrgetter("x"), "attrgetter"),
        (lambda: eval, "eval"),
        (lambda: {}.__ior__, "method __ior__ of a dict"),
        (lambda: dict.__init_subclass__, "method __init_subclass__ of a type"),
        (lambda: list.__iadd__, r"list\.__iadd__"),
    ],
)
def test_what_must_not_be_saved_is_refused_with_what_to_do(code: Any, make: Any, said: str) -> None:
    with pytest.raises(UnsavableError, match=said) as caught:
        gen = code.bad(make())
        next(gen)
        durable.dumps(gen)
    assert caught.value.variable == "value"


class Unshown:
    def __repr__(self) -> str:
        raise RuntimeError("not loaded")


def test_the_way_to_the_culprit_leads_past_a_key_that_cannot_be_shown(code: Any) -> None:
    error = error_of(code.bad({Unshown(): threading.Lock()}))
    assert (error.variable, error.type_name) == ("value", "Unshown"), str(error)


DELEGATES = """
class Settings:
    def __init__(self, held):
        self.held = held
    def __getattr__(self, name):
        return self.held[name]
class Row(dict):
    __getattr__ = dict.__getitem__
    __setattr__ = dict.__setitem__
class Careful(Settings):
    def __getattr__(self, name):
        if name.startswith("__"):
            raise AttributeError(name)
        return self.held[name]
def main(value):
    yield
    yield value.limit
"""


def test_an_object_whose_getattr_fails_before_it_has_attributes_is_refused_and_does_not_fail_to_load() -> None:
    """An unpickler asks an empty object for `__setstate__`. An object that needs no filling is kept, and so is one whose class says that it has no `__setstate__`."""
    module = durable.load_source("delegating", DELEGATES, "delegating.py")
    for value in (module.Row(limit=3), module.Careful({"limit": 3})):
        gen = module.main(value)
        next(gen)
        assert next(durable.loads(durable.dumps(gen))) == 3
    for _ in range(2):
        error = error_of(module.main(module.Settings({"limit": 3})))
        assert error.variable == "value"
        assert "the __getattr__ of Settings fails on an object without attributes" in str(error)


NAMED = """
import functools, typing
class Price:
    @functools.lru_cache
    def rounded(self):
        return 1
class Known:
    def __reduce__(self):
        return "Price.KNOWN"
Price.KNOWN = Known()
def main(value):
    yield
"""


@pytest.mark.parametrize(("expression", "said"), [("Price().rounded", r"Price\.rounded, a _lru_cache_wrapper"), ("Price.KNOWN", r"Price\.KNOWN, a Known")])
def test_what_pickle_would_save_by_a_name_that_no_snapshot_may_hold_is_refused_and_does_not_fail_to_load(expression: str, said: str) -> None:
    module = durable.load_source("named_values", NAMED, "named_values.py")
    gen = module.main(eval(expression, vars(module)))
    next(gen)
    with pytest.raises(UnsavableError, match=f"{said}, .*; look it up where it is needed$") as caught:
        durable.dumps(gen)
    assert caught.value.variable == "value"


def test_too_deep_a_nest_is_named_by_its_variable(code: Any) -> None:
    deep: list[Any] = []
    for _ in range(100_000):
        deep = [deep]
    error = error_of(code.bad(deep))
    assert error.variable == "value"
    assert "nested too deeply" in str(error)
    while deep:
        deep = deep.pop()


FILLED = """
class Inverse(dict):
    def __init__(self, **given):
        self.back = {}
        for key, value in given.items():
            self[key] = value
    def __setitem__(self, key, value):
        if value in self.back:
            raise KeyError(value)
        self.back[value] = key
        super().__setitem__(key, value)
class Watched(list):
    __slots__ = ("seen",)
    def __init__(self):
        self.seen = 0
    def append(self, item):
        self.seen += 1
        super().append(item)
    def extend(self, items):
        for item in items:
            self.append(item)
class Owned(set):
    def __init__(self, owner, items):
        self.owner = owner
        super().__init__(items)
def main():
    inverse, watched, owned = Inverse(a="x"), Watched(), Owned("me", [3])
    watched.append(inverse)
    inverse.up = watched
    for later in (0, 1):
        yield
        inverse[f"b{later}"] = later
        watched.append(later)
    yield inverse == {"a": "x", "b0": 0, "b1": 1}, inverse.back, watched[0] is inverse, watched[1:], watched.seen, owned == {3}, owned.owner, inverse.up is watched
"""


def test_a_container_whose_own_methods_need_its_attributes_is_filled_without_them() -> None:
    """docs/LOCALS.md: pickle fills such an object by its methods before it has attributes, so that a saved one could not be loaded (boltons' `OneToOne`)."""
    gen = durable.load_source("filled", FILLED, "filled.py").main()
    for _ in range(2):
        next(gen)
        data = durable.dumps(gen)
        assert "back" in repr(durable.peek(data))
        gen = durable.loads(data)
    assert next(gen) == (True, {"x": "a", 0: "b0", 1: "b1"}, True, [0, 1], 3, True, "me", True)


def test_a_class_without_a_module_is_refused_by_its_name() -> None:
    """docs/LOCALS.md. Libraries make such classes (sympy's undefined functions)."""
    source = "made = type('made', (), {'__module__': None})\ndef main(value):\n    yield\n"
    module = durable.load_source("no_module", source, "no_module.py")
    for value in (module.made, module.made()):
        error = error_of(module.main(value))
        assert (error.variable, "the class made, which has no module to find it in; keep what it was made from" in str(error)) == ("value", True)

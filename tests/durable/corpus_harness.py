"""Run one corpus generator natively and lowered through the same scripts, and report where they differ.

Owns scripts, traces, and the ways of re-entry. Must not know how lowering works: it uses only what kwflow.durable exports.
The native run is the oracle. No expected result is written down anywhere.
"""

import inspect
import pathlib
import re
import sys
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

CORPUS = pathlib.Path(__file__).parent / "corpus"
OPS_MAX = 30  # an endless generator is cut off here; the longest finite one of the corpus needs fewer
THROW_POINTS_MAX = 10  # throws at later yields repeat what loops already showed
KEPT: list[Any] = []  # every generator ever driven: one that is collected could run its finally inside another script's log

NATIVE_NAME = re.compile(r"\bcoroutine\b")  # the interpreter's messages call the native twin of an async function so
MODULE = re.compile("corpus_(native|lowered)_")
ITERATED = re.compile(r"\w+(?=\\*' object has no attribute \\*'send)")  # 3.15 makes no iterator of a list in `yield from`, and names the list

Op = tuple[str, Any]
Trip = Callable[[Any], Any]


@dataclass(frozen=True)
class Script:
    """What a driver does to a generator, in order. ops: ("send", value) | ("throw", factory of an exception) | ("close", None)."""

    name: str
    ops: tuple[Op, ...]


STREAMS: dict[str, Callable[[int], Any]] = {
    "ints": lambda n: 9 + n,
    "false": lambda n: False,
    "none": lambda n: None,
    "strings": lambda n: "xy"[: 1 + n % 2],
    "alternating": lambda n: n % 2 == 0,
}
THROWN: dict[str, Callable[[], Any]] = {
    "ValueError": lambda: ValueError("thrown"),
    "KeyError": lambda: KeyError,
    "Base": lambda: KeyboardInterrupt("base"),
}


def module_names() -> list[str]:
    """The names of the corpus files that this interpreter can compile."""
    names = sorted(p.stem for p in CORPUS.glob("*.py"))
    return [n for n in names if not n.startswith("py3") or sys.version_info >= (3, int(n[3:]))]


def on_every_minor(text: str) -> str:
    """Replace messages by a common form. What a generator met before it was saved has the words of the Python it ran on; 3.14 and 3.15 changed some."""
    text = MODULE.sub("", text)
    text = re.sub(r"object (\w+) can\\*'t be used in \\*'await\\*' expression|\\*'(\w+)\\*' object can\\*'t be awaited", r"await \1\2", text)
    text, quoted = re.subn(r"__await__\(\) returned non-iterator of type \\*'(\w+)\\*'|\w+\.\w+\.__await__\(\) must return an iterator, not (\w+)", r"__await__() gave \1\2", text)
    text = re.sub(r"[\\'\"]", "", text) if quoted else text
    return re.sub(r"(context manager protocol) \(missed __\w+__ method\)", r"\1", text)


def source_of(name: str) -> str:
    return (CORPUS / f"{name}.py").read_text(encoding="utf-8")


def load_native(name: str) -> dict[str, Any]:
    """Execute the corpus file as it is, as a module in which its classes can be found."""
    module = types.ModuleType(f"corpus_native_{name}")
    sys.modules[module.__name__] = module
    exec(compile(source_of(name), str(CORPUS / f"{name}.py"), "exec"), module.__dict__)
    return {n: driven(value) if n.startswith("g_") and inspect.iscoroutinefunction(value) else value for n, value in module.__dict__.items()}


class Driven:
    """Make a native coroutine behave as a generator after its end. While it runs, the two are the same."""

    def __init__(self, coroutine: Any) -> None:
        self.coroutine = coroutine
        self.ended = False

    def send(self, value: Any) -> Any:
        if self.ended:
            raise StopIteration
        try:
            return self.coroutine.send(value)
        finally:
            self._note()

    def throw(self, error: Any) -> Any:
        try:
            if self.ended:
                raise error
            return self.coroutine.throw(error)
        finally:
            del error  # otherwise the error would hold this frame, which holds the error
            self._note()

    def close(self) -> Any:
        try:
            self.coroutine.close()
        finally:
            self._note()

    def _note(self) -> None:
        self.ended = inspect.getcoroutinestate(self.coroutine) == inspect.CORO_CLOSED


def driven(function: Callable[[], Any]) -> Callable[[], Any]:
    return lambda: Driven(function())


def load_lowered(name: str) -> dict[str, Any]:
    """Load the same source through kwflow.durable.load_source and return its namespace."""
    from kwflow import durable

    loaded = durable.load_source(f"corpus_lowered_{name}", source_of(name), str(CORPUS / f"{name}.py"))
    return getattr(loaded, "namespace", None) or vars(loaded)


def generators_of(namespace: dict[str, Any]) -> list[str]:
    return [n for n in namespace if n.startswith("g_")]


def stream(values: str) -> Iterator[Op]:
    yield ("send", None)
    for n in range(1, OPS_MAX):
        yield ("send", STREAMS[values](n))


def scripts_for(start: Callable[[], Any], log: list[str]) -> list[Script]:
    """Return the scripts for one generator: each value stream, and for each yield a throw, two throws, and a close there."""
    scripts = [Script("send before start", (("send", 1), *stream("ints"))), Script("close twice", (("close", None),) * 2)]
    for values in STREAMS:
        plain = Script(values, tuple(stream(values)))
        scripts.append(plain)
        yields = sum(step[0] == "yield" for step in run(start, plain, log))
        for k in range(min(yields, THROW_POINTS_MAX) + 1):
            head, tail = plain.ops[:k], plain.ops[k:]
            if values in ("ints", "false", "strings"):
                for thrown, make in THROWN.items():
                    scripts.append(Script(f"{values}, {thrown} at {k}", (*head, ("throw", make), *tail)))
                twice = (("throw", THROWN["ValueError"]), ("throw", THROWN["KeyError"]))
                scripts.append(Script(f"{values}, two throws at {k}", (*head, *twice, *tail)))
            scripts.append(Script(f"{values}, close at {k}", (*head, ("close", None), *tail)))
    return scripts


def describe_error(error: BaseException | None, depth: int = 6) -> Any:
    """An exception as comparable data: its type, its arguments, and the chains that pickle would lose."""
    if error is None or depth == 0:
        return None
    chains = (describe_error(error.__cause__, depth - 1), describe_error(error.__context__, depth - 1))
    text = MODULE.sub("", ITERATED.sub("iterator", NATIVE_NAME.sub("generator", repr(error.args))))
    return (type(error).__name__, text, *chains, error.__suppress_context__)


def apply(generator: Any, op: Op) -> tuple[Any, ...]:
    kind, argument = op
    try:
        if kind == "send":
            return ("yield", repr(generator.send(argument)))
        if kind == "throw":
            return ("yield", repr(generator.throw(argument())))
        return ("closed", repr(generator.close()))
    except StopIteration as stop:
        return ("return", MODULE.sub("", repr(stop.value)))
    except BaseException as error:  # the outcome under test, SystemExit and KeyboardInterrupt included
        return ("raise", describe_error(error))


def run(start: Callable[[], Any], script: Script, log: list[str], trip: Trip | None = None) -> list[tuple[Any, ...]]:
    """Drive a fresh generator through the script. Return one entry (outcome, its data, what was logged meanwhile) per op.

    trip is applied before the first op and after every yield. What it raises becomes an entry of its own and ends the run.
    """
    log.clear()
    generator = start()
    KEPT.append(generator)
    trace: list[tuple[Any, ...]] = [("started", "", tuple(log))]
    ended = 0
    for op in script.ops:
        if trip is not None and not ended:
            try:
                generator = trip(generator)
            except BaseException as error:
                trace.append(("trip failed", describe_error(error), tuple(log)))
                return trace
            KEPT.append(generator)
        log.clear()
        outcome = apply(generator, op)
        trace.append((*outcome, tuple(log)))
        ended += outcome[0] != "yield"
        if ended == 2:  # one op past the end: an ended generator must stay ended
            break
    return trace


def shallow(generator: Any) -> Any:
    from kwflow import durable

    state = durable.capture(generator)
    made = durable.restore(state)
    shared = any(name.startswith("@delegate") for name in state.slots)  # discarding one of the two would close it
    del state  # from 3.12 on, a frame that errors hold leads to the frames that have closed it, which would keep what is in here
    if not shared:
        durable.discard(generator)
    return made


def deep(generator: Any) -> Any:
    from kwflow import durable

    made = durable.loads(durable.dumps(generator))
    durable.discard(generator)
    return made


TRIPS: dict[str, Trip | None] = {"lowered": None, "restored": shallow, "pickled": deep}


def difference(native: Callable[[], Any], native_log: list[str], other: Callable[[], Any], other_log: list[str], trip: Trip | None) -> str | None:
    """The first script and step where the two differ, as text, or None if there is none."""
    for script in scripts_for(native, native_log):
        expected = run(native, script, native_log)
        got = run(other, script, other_log, trip)
        if got != expected:
            step = next((i for i, (e, g) in enumerate(zip(expected, got, strict=False)) if e != g), min(len(expected), len(got)))
            at = [t[step] if step < len(t) else "nothing more" for t in (expected, got)]
            return f"script {script.name!r}, step {step}:\n  native : {at[0]}\n  lowered: {at[1]}"
    return None



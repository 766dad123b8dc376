"""Random generators over the grammar that is lowered, random scripts for them, and the smallest program that still differs (H6).

A program is text, made from a seed: a fixed prelude, whose helpers log how they are called, and one generator `g`. The
native run is the oracle, as in corpus_harness. Nothing here knows how lowering works. Programs end, because loops count.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import inspect
import random
import signal
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import corpus_harness as harness

NAME = "random_program"
SCRIPTS = 3
OPS_MAX = 25
STATEMENTS_MAX = 4  # in one block
DEPTH_MAX = 4

PRELUDE = '''
LOG = []

def log(x):
    LOG.append(repr(x))
    return x

class Mine(Exception):
    def __init__(self, a, b=2):
        super().__init__(a)
        self.b = b

def f(*args, **named):
    LOG.append(("f", repr(args), repr(named)))
    return len(args) + sum(x for x in named.values() if isinstance(x, int))

def boom(x):
    if x:
        raise Mine(x) if x == 2 else KeyError(x) if x == 3 else ValueError(x)
    return x

class O:
    def __init__(self):
        self.x, self.items = 1, {}
    def __getitem__(self, i):
        LOG.append(("get", repr(i)))
        return self.items.get(repr(i), 7)
    def __setitem__(self, i, v):
        LOG.append(("set", repr(i), repr(v)))
        self.items[repr(i)] = v
    def __delitem__(self, i):
        LOG.append(("del", repr(i)))
        del self.items[repr(i)]
    def m(self, *args, **named):
        LOG.append(("m", repr(args), repr(named)))
        return args[0] if args else 0
    def __iadd__(self, v):
        LOG.append(("iadd", repr(v)))
        return self

class M:
    def __init__(self, name, swallow=0):
        self.name, self.swallow = name, swallow
    def __enter__(self):
        LOG.append(("enter", repr(self.name)))
        return self.name
    def __exit__(self, kind, error, tb):
        LOG.append(("exit", repr(self.name), kind and kind.__name__))
        if self.swallow == 3:
            raise Mine("exit")
        return self.swallow == 1

class Seq:
    def __getitem__(self, i):
        LOG.append(("seq", i))
        if i > 2:
            raise IndexError
        return i

def inner(n):
    try:
        for i in range(n):
            log((yield ("inner", i)))
        return n
    except KeyError as e:
        log(e)
        return (yield "inner caught")
    finally:
        log("inner ends")

'''


class Maker:
    """Makes one program from a seed."""

    def __init__(self, seed: int) -> None:
        self.random = random.Random(seed)
        self.names = 0
        self.captured = self.random.random() < 0.4

    def chance(self, probability: float) -> bool:
        return self.random.random() < probability

    def one(self, *choices: Any) -> Any:
        return choices[self.random.randrange(len(choices))]

    def source(self) -> str:
        lines = ["def g():", "    global G", "    G = 0", "    a, b, c, x, y = 1, 2, 3, 0, [4, 5]", "    o = O()"]
        if self.captured:
            lines += ["    def bump(n=1):", "        nonlocal a", "        a = n if not isinstance(a, int) else a + 1", "        log(('bump', b))", "        return a"]
        for _ in range(self.random.randrange(3, 6)):
            if self.chance(0.8):  # otherwise the first error would end most programs
                lines += ["    try:", *self.block(2, False), "    except Exception as e:", "        log((e, e.__context__))"]
            else:
                lines += self.statement(1, False)
        lines.append("    return log(('end', a, b, x, G))")
        if not any("yield" in line for line in lines):
            lines.insert(5, "    yield")
        return "\n".join(lines) + "\n"

    # -- statements ----------------------------------------------------------------------------------------------
    def block(self, depth: int, loop: bool) -> list[str]:
        lines: list[str] = []
        for _ in range(self.random.randrange(1, STATEMENTS_MAX)):
            lines += self.statement(depth, loop)
        return lines

    def statement(self, depth: int, loop: bool) -> list[str]:
        simple = [self.assignment, self.expression, self.target, self.augmented, self.leaving, self.raising, self.deleting]
        compound = [self.if_, self.while_, self.for_, self.try_, self.with_, self.match, self.delegating, self.def_]
        make = self.one(*simple) if depth >= DEPTH_MAX or self.chance(0.5) else self.one(*compound)
        lines: list[str] = make(depth, loop)
        return lines

    def pad(self, depth: int) -> str:
        return "    " * depth

    def assignment(self, depth: int, loop: bool) -> list[str]:
        return [f"{self.pad(depth)}{self.one('a', 'b', 'x', 'x = b', 'c', 'G')} = {self.value()}"]

    def expression(self, depth: int, loop: bool) -> list[str]:
        return [f"{self.pad(depth)}{self.one('log({})', '{}', 'yield {}', 'f({})')}".format(self.value())]

    def target(self, depth: int, loop: bool) -> list[str]:
        targets = [f"o[{self.value()}]", f"o.m({self.value()}); o.x", f"a, o[{self.value()}]", f"(x, *y), o[{self.value()}]", f"b, *o.items['{self.one(*'pq')}']", "y[0]"]
        chosen = self.one(*targets)
        count = chosen.count(",") if chosen[0] in "ab" else 0
        value = f"[{self.value()}, {self.value()}]" if count else f"(y, {self.value()})" if chosen[0] == "(" else self.value()
        return [f"{self.pad(depth)}{chosen} = {value}"]

    def augmented(self, depth: int, loop: bool) -> list[str]:
        if self.chance(0.2):
            return [f"{self.pad(depth)}y += [{self.value()}]"]
        return [f"{self.pad(depth)}{self.one('a', 'b', 'o', 'o.x', f'o[{self.value()}]')} {self.one('+=', '+=', '-=')} {self.value()}"]

    def leaving(self, depth: int, loop: bool) -> list[str]:
        if loop and self.chance(0.7):
            return [f"{self.pad(depth)}if {self.value()}:", f"{self.pad(depth + 1)}{self.one('break', 'continue')}"]
        if self.chance(0.3):
            return [f"{self.pad(depth)}if {self.value()} == 9:", f"{self.pad(depth + 1)}return {self.value()}"]
        return [f"{self.pad(depth)}assert {self.value()} != 8, {self.value()}"]

    def raising(self, depth: int, loop: bool) -> list[str]:
        raised = self.one(f"boom({self.value()})", f"boom({self.one(0, 0, 1, 2, 3)})", f"log(boom({self.value()}))")
        if self.chance(0.2):
            raised = f"raise {self.one('Mine', 'ValueError')}({self.value()}){self.one('', ' from KeyError(1)', ' from None')}"
            return [f"{self.pad(depth)}if {self.value()}:", f"{self.pad(depth + 1)}{raised}"]
        return [f"{self.pad(depth)}{raised}"]

    def deleting(self, depth: int, loop: bool) -> list[str]:
        return [f"{self.pad(depth)}{self.one('c = log(c); del c; c = 1', 'o[1] = 2; del o[1]', f'y = [1, 2]; del y[{self.one(0, -1)}]')}"]

    def if_(self, depth: int, loop: bool) -> list[str]:
        lines = [f"{self.pad(depth)}if {self.value()}:", *self.block(depth + 1, loop)]
        if self.chance(0.4):
            lines += [f"{self.pad(depth)}elif {self.value()}:", *self.block(depth + 1, loop)]
        return lines + ([f"{self.pad(depth)}else:", *self.block(depth + 1, loop)] if self.chance(0.5) else [])

    def fresh(self) -> str:
        self.names += 1
        return f"n{self.names}"

    def while_(self, depth: int, loop: bool) -> list[str]:
        count = self.fresh()
        test = self.one(f"{count} < 2 and {self.value()} is not None", f"{count} < 3", f"[{self.value()}, {count} < 2][1]")
        lines = [f"{self.pad(depth)}{count} = 0", f"{self.pad(depth)}while {test}:", f"{self.pad(depth + 1)}{count} += 1", *self.block(depth + 1, True)]
        return lines + ([f"{self.pad(depth)}else:", *self.block(depth + 1, loop)] if self.chance(0.3) else [])

    def for_(self, depth: int, loop: bool) -> list[str]:
        plain = ("range(2)", "enumerate('pq')", "Seq()", "{1: 2, 3: 4}", "zip([1, 2], 'ab')", "map(log, [1, 2])", "inner(2)", "inner(2)", "(log(n) for n in y[:3])")
        over = self.one(*plain, f"[{self.value()}, {self.value()}]", f"({self.value()}, 3)")
        target = self.one("x", "a", f"o[{self.value()}]", "o.x", "n0")
        lines = [f"{self.pad(depth)}for {target} in {over}:", *self.block(depth + 1, True)]
        return lines + ([f"{self.pad(depth)}else:", *self.block(depth + 1, loop)] if self.chance(0.3) else [])

    def try_(self, depth: int, loop: bool) -> list[str]:
        lines = [f"{self.pad(depth)}try:", *self.block(depth + 1, loop)]
        handlers = self.random.randrange(0, 3)
        for _ in range(handlers):
            kind = self.one("ValueError", "KeyError", "(Mine, KeyError)", "Exception") + self.one("", " as e")
            lines += [f"{self.pad(depth)}except {kind}:", *self.block(depth + 1, loop)]
            if " as e" in kind and self.chance(0.5):
                lines.append(f"{self.pad(depth + 1)}log((e, e.__context__))")
            if self.chance(0.25):
                lines.append(f"{self.pad(depth + 1)}raise")
        if handlers and self.chance(0.3):
            lines += [f"{self.pad(depth)}else:", *self.block(depth + 1, loop)]
        if not handlers or self.chance(0.4):
            lines += [f"{self.pad(depth)}finally:", *self.block(depth + 1, loop)]
        return lines

    def with_(self, depth: int, loop: bool) -> list[str]:
        items = [f"M({self.value()}, {self.one(0, 0, 1, 2, 3)}){self.one('', ' as x', ' as o.x', f' as o[{self.value()}]')}" for _ in range(self.one(1, 1, 2))]
        return [f"{self.pad(depth)}with {', '.join(items)}:", *self.block(depth + 1, loop)]

    def match(self, depth: int, loop: bool) -> list[str]:
        lines = [f"{self.pad(depth)}match {self.one(self.value(), f'[{self.value()}, {self.value()}]', 'y')}:"]
        for pattern in ("int(a)", "[x, *_]", f"{self.one(1, 9)} | None"):
            guard = f" if {self.value()}" if self.chance(0.4) else ""
            lines += [f"{self.pad(depth + 1)}case {pattern}{guard}:", *self.block(depth + 2, loop)]
        return lines

    def delegating(self, depth: int, loop: bool) -> list[str]:
        source = self.one("inner(2)", "inner(1)", "inner(2)", "inner(3)", "iter(y[:3])", "Seq()", "range(2)")
        return [self.pad(depth) + self.one("x = {}", "log({})", "{}", "b = [1, {}]", "f(a, {}, *y)").format(f"(yield from {source})")]

    def def_(self, depth: int, loop: bool) -> list[str]:
        name = self.fresh()
        lines = [f"{self.pad(depth)}def {name}(p={self.value()}, *, q={self.value()}):", f"{self.pad(depth + 1)}return log((p, q))"]
        lines += [f"{self.pad(depth)}{self.one('log', 'f')}({name}({self.value()}))"]
        if self.chance(0.4):
            lines = [f"{self.pad(depth)}{name} = lambda p={self.value()}: (p, 2)", f"{self.pad(depth)}log({name}())"]
        return lines

    # -- expressions -----------------------------------------------------------------------------------------------
    def value(self, depth: int = 0) -> str:
        if depth >= 3 or self.chance(0.35 + 0.15 * depth):
            return self.atom()
        if self.chance(0.3):
            return self.one(f"(yield {self.value(depth + 1)})", "(yield)", f"log((yield {self.value(depth + 1)}))")
        v = lambda: self.value(depth + 1)
        forms = [
            lambda: f"({v()} {self.one('+', '-', '*')} {v()})", lambda: f"({v()} {self.one('<', '==', 'is not', 'in [1, 9],')} {v()})", lambda: f"({v()} == {v()} != {v()})",
            lambda: f"({v()} and {v()})", lambda: f"({v()} or {v()} or {v()})", lambda: f"(not {v()})", lambda: f"({v()} if {v()} else {v()})", lambda: f"f({v()}, {v()})",
            lambda: f"f(*[{v()}], k={v()})", lambda: f"f({v()}, *y, **{{'k': {v()}}})", lambda: f"o.m({v()}, n={v()})", lambda: f"o[{v()}]", lambda: f"o[{v()}:{v()}]", lambda: "o.x",
            lambda: f"[{v()}, *[{v()}], {v()}][{self.one(0, 1, -1)}]", lambda: f"{{{v()}: {v()}, 'k': {v()}}}['k']", lambda: f"len({{*[1], repr({v()}), repr({v()})}})",
            lambda: f"len(f'{{{bare(v())}!r}} {{{bare(v())}}}')", lambda: f"(x := {v()})", lambda: f"len([n for n in [{bare(v())}, 2] if n])", lambda: f"sum(1 for n in [{bare(v())}])",
            lambda: f"({v()}, {v()})[{self.one(0, 1)}]", lambda: f"log({v()})", lambda: f"(lambda n={v()}: n)()", lambda: f"-len([{v()}])",
        ]  # fmt: skip
        text: str = self.one(*forms)()
        return text

    def atom(self) -> str:
        return str(self.one(0, 1, 2, 9, "a", "b", "x", "a", "b", "a", "b", self.one("None", "'s'", "1"), "G", "bump()" if self.captured else "log(1)"))


def bare(text: str) -> str:
    """What may be in an f-string of 3.11, and in the iterable of a comprehension."""
    return "(yield a)" if any(mark in text for mark in ("'", "{", ":=", "\\")) else text


def scripts_for(seed: int) -> Iterator[harness.Script]:
    """What a driver does: mostly it sends, and sometimes it throws or closes."""
    chosen = random.Random(f"scripts {seed}")
    for number in range(SCRIPTS):
        ops: list[harness.Op] = [("send", None)]
        for _ in range(OPS_MAX - 1):
            dice = chosen.random()
            if number and dice < 0.12:
                ops.append(("throw", harness.THROWN[("ValueError", "KeyError", "Base")[chosen.randrange(3)]]))
            elif number and dice < 0.15:
                ops.append(("close", None))
            else:
                ops.append(("send", (0, 1, 2, 9, 1, 2, 3, 5, 9, None, None, "s", (1, 2), False)[chosen.randrange(14)]))
        yield harness.Script(f"script {number}", tuple(ops))


def reentered(gen: Any) -> Any:
    """Restore it in process, or from bytes where it waits in another generator, which the old copy would share and hold."""
    return harness.deep(gen) if gen.gi_yieldfrom is not None else harness.shallow(gen)


TRIPS: dict[str, harness.Trip | None] = {"lowered": None, "restored": reentered, "pickled": harness.deep}


@dataclass
class Difference:
    """A program that behaves differently once it is lowered."""

    seed: int
    source: str
    script: str
    mode: str
    text: str

    def __str__(self) -> str:
        return f"seed {self.seed}, {self.script}, {self.mode}:\n{self.source}\n{self.text}"


@functools.cache
def native_prelude() -> dict[str, Any]:
    space: dict[str, Any] = {"__name__": f"{NAME}_prelude"}
    exec(compile(PRELUDE, f"{NAME}_prelude.py", "exec"), space)
    return space


@functools.cache
def lowered_prelude() -> types.ModuleType:
    from kwflow import durable

    return durable.load_source(f"{NAME}_prelude", PRELUDE, f"{NAME}_prelude.py")


def native(source: str, name: str = NAME) -> dict[str, Any]:
    space: dict[str, Any] = {**native_prelude(), "__name__": name}
    exec(compile(source, f"{name}.py", "exec"), space)
    return space


def lowered(source: str, name: str = NAME) -> dict[str, Any]:
    from kwflow import durable

    lowered_prelude()
    return vars(durable.load_source(name, f"from {NAME}_prelude import *\n{source}", f"{name}.py"))


class TooLong(BaseException):
    """Raised in a program that does not end."""


@contextlib.contextmanager
def time_limit(seconds: float = 5.0) -> Iterator[list[bool]]:
    """Limit the block's processor time. The list is not empty if it was exceeded."""
    late: list[bool] = []

    def raising(*_: Any) -> None:
        late.append(True)
        raise TooLong

    before = signal.signal(signal.SIGVTALRM, raising)
    signal.setitimer(signal.ITIMER_VIRTUAL, seconds, 0.1)
    try:
        yield late
    except TooLong:
        late.append(True)
    finally:
        signal.setitimer(signal.ITIMER_VIRTUAL, 0)
        signal.signal(signal.SIGVTALRM, before)


def difference(seed: int, source: str) -> Difference | None:
    """The first difference, not shrunk yet, or None. Raises SyntaxError if the source is no program."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        plain, other = native(source), lowered(source)
    if not inspect.isgeneratorfunction(plain["g"]):
        return None
    for script in scripts_for(seed):
        harness.KEPT.clear()
        with time_limit() as late:
            expected = harness.run(plain["g"], script, plain["LOG"])
        for mode, trip in TRIPS.items():
            with time_limit() as late_too:
                got = harness.run(other["g"], script, other["LOG"], trip)
            if late or late_too:
                return None  # an endless loop, which only shrinking makes
            if got != expected:
                step = next((i for i, (e, g) in enumerate(zip(expected, got, strict=False)) if e != g), min(len(expected), len(got)))
                at = [t[step] if step < len(t) else "nothing more" for t in (expected, got)]
                return Difference(seed, source, script.name, mode, f"step {step}:\n  native : {at[0]}\n  lowered: {at[1]}")
    return None


def check(seed: int) -> Difference | None:
    """The shrunk difference of this seed's program, if it has one."""
    found = difference(seed, Maker(seed).source())
    return shrunk(found) if found is not None else None


# -- shrinking -------------------------------------------------------------------------------------------------------


def shrunk(found: Difference, tries_max: int = 2000) -> Difference:
    """The smallest program reached by dropping statements, unfolding compound ones, and replacing expressions by their parts."""
    tries = 0
    smaller = True
    while smaller and tries < tries_max:
        smaller = False
        for source in candidates(found.source):
            tries += 1
            try:
                other = difference(found.seed, source)
            except Exception:
                continue
            if other is not None and " at 0x" not in other.text:  # a different address does not count
                found, smaller = other, True
                break
            if tries >= tries_max:
                break
    return found


def candidates(source: str) -> Iterator[str]:
    """Programs with one thing less in `g`."""
    edits = sum(1 for _ in _edits(ast.parse(source)))
    for number in range(edits):
        tree = ast.parse(source)
        for at, edit in enumerate(_edits(tree)):
            if at == number:
                edit()
                break
        text = ast.unparse(ast.fix_missing_locations(tree)) + "\n"
        if len(text) < len(source):
            yield text


def _g(tree: ast.Module) -> ast.FunctionDef:
    return next(node for node in tree.body if isinstance(node, ast.FunctionDef) and node.name == "g")


def _edits(tree: ast.Module) -> Iterator[Callable[[], None]]:
    for node in ast.walk(_g(tree)):
        for name, value in ast.iter_fields(node):
            if isinstance(value, list):
                for number, item in enumerate(value):
                    if isinstance(item, (ast.stmt, ast.excepthandler, ast.match_case, ast.withitem)):
                        yield lambda items=value, at=number: items.__setitem__(slice(at, at + 1), [])
                        for body in _bodies(item):
                            yield lambda items=value, at=number, body=body: items.__setitem__(slice(at, at + 1), body)
                    elif isinstance(item, ast.expr):
                        for part in _parts(item):
                            yield lambda items=value, at=number, part=part: items.__setitem__(at, part)
            elif isinstance(value, ast.expr) and isinstance(getattr(value, "ctx", ast.Load()), ast.Load):
                for part in _parts(value):
                    yield lambda node=node, name=name, part=part: setattr(node, name, part)


def _bodies(node: ast.AST) -> Iterator[list[ast.stmt]]:
    if isinstance(node, ast.stmt) and not isinstance(node, ast.FunctionDef):
        for part in [node, *getattr(node, "handlers", []), *getattr(node, "cases", [])]:
            for name in ("body", "orelse", "finalbody"):
                if getattr(part, name, None):
                    yield getattr(part, name)


def _parts(node: ast.expr) -> list[ast.expr]:
    parts = [child for child in ast.iter_child_nodes(node) if isinstance(child, ast.expr) and not isinstance(child, ast.Starred)]
    return [*parts, ast.Constant(1)] if not isinstance(node, (ast.Constant, ast.Name)) else []

"""Moving what waits onto edited code, in place: each generator goes on after the same wait, in the function as it is now (decision 0061).

A snapshot is read with the current code in the place of the code that it names.  A `Move` says what that means for one function: which
wait is the one where the generator stands, which temporaries hold what, which cell is which variable's.  Whatever cannot be decided from the
two sources is refused with a CodeChangedError, before anything runs; nothing is guessed.  The old source is only read, never run.
"""

from __future__ import annotations

import functools
import itertools
import operator
import re
import types
import warnings
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kwflow.durable import rebuild, registry
from kwflow.durable.body import CELL, CREATED, GENERATOR
from kwflow.durable.frames import empty
from kwflow.durable.lower import lower_module
from kwflow.durable.lower.outline import LOOPS, NUMBER
from kwflow.durable.registry import Function, Module, Part, Pins, Wait
from kwflow.errors import CodeChangedError, UnsupportedError

__all__ = ["MovingNames", "parsed"]

_whole, _around = operator.attrgetter("whole"), operator.attrgetter("around")
_BRANCH = re.compile(r"\b(If|Match|Try \w+ except|TryStar \w+ except) ")
_OPEN = ("open", "")  # whether a with block is still to be left; needed only if a return, break or continue leaves it
_WHAT = {"for-iterator": "a for loop", "async-iterator": "an async for loop", "manager": "a with block", "handled": "an except clause", "completion": "a finally that waits"}


@functools.lru_cache(maxsize=64)
def parsed(name: str, version: str, source: str, filename: str) -> Module:
    """Return a version of a module for what is known about its functions; its code never runs."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return lower_module(name, source, filename)
    except (SyntaxError, ValueError, RecursionError, UnsupportedError) as error:
        raise CodeChangedError(f"{name}: the source that it runs ({version[:12]}) cannot be read: {error}") from error


@dataclass(frozen=True)
class Move:
    """One function, from the version that a snapshot names to the current one."""

    old: Function
    new: Function

    @property
    def name(self) -> str:
        return f"{self.old.module}:{self.old.path}"

    @functools.cached_property
    def is_edited(self) -> bool:
        return self.old.outline.digest != self.new.outline.digest

    def refused(self, why: str) -> CodeChangedError:
        return CodeChangedError(f"{self.name} {why}", self.old.module)

    def cells(self, saved: tuple[types.CellType, ...], is_begun: bool) -> tuple[types.CellType, ...]:
        """Return the cells in the order of the new function; variables that only it shares with nested functions get new ones."""
        names = self.old.captured if is_begun else self.old.free
        known = dict(zip(names, saved, strict=True))
        wanted = self.new.captured if is_begun else self.new.free
        before, now = self.old.outline.owners, self.new.outline.owners
        for name in self.new.free:
            if name not in known or before[name] == "":
                raise self.refused(f"now uses {name} of the function around it, which it did not when this was saved")
        for name in wanted:
            if name in known and before[name] != now[name]:
                raise self.refused(f"no longer uses {name} of the function around it, but a variable of that name of {'its own' if not now[name] else now[name]}")
        return tuple(known[name] if name in known else types.CellType() for name in wanted)

    def place(self, label: str) -> tuple[str, Wait, Wait]:
        """Return the label of the same wait in the new function, and both waits.  Raises CodeChangedError if it is not certain which it is.

        It is the one in the same statement, or else the same expression in the same statements around it, or else the same expression, or else the only
        edited call of the same function, among those that are left: a wait that is found by more is not found by less.  It must be between those that it
        was between.  Of several that are equal, it is the one at the same place among them, as long as there are as many as there were.
        """
        sure: dict[str, str] = {}
        before: dict[str, str] = {}
        for alike in (_whole, _around):
            pairs = self._pairs(alike, sure)
            if label in pairs:
                before = dict(sure)
            sure |= pairs
        self._check_conditions(label, sure)
        return self._between(label, sure[label], before) if label in sure else self._between(label, self._guessed(label, sure), sure)

    def _check_conditions(self, label: str, sure: Mapping[str, str]) -> None:
        """Refuse a wait if the condition of an equal one has changed.

        1. `if late: yield pause; return 1`, then `yield pause; return 2`.  It becomes `if not late: yield pause; return 2`, then `yield pause; return 1`.
        2. An instance waits in the second, whose statement is the same in the new code.  It would go on as if it had been late.
        """
        old, new = self.old.outline.waits, self.new.outline.waits
        was = old[label]
        are_several = was.text and any(sum(wait.key == was.key for wait in waits.values()) > 1 for waits in (old, new))
        if are_several and all(any(wait.key == was.key and _BRANCH.search(wait.around) for wait in waits.values()) for waits in self._left(sure)):
            raise self.refused(f"{_where(was)}, and a condition of this wait or of an equal one has changed, so it is not certain which one this is")

    def _left(self, sure: Mapping[str, str]) -> tuple[dict[str, Wait], dict[str, Wait]]:
        """Return the waits of the old and of the new function that are not among those that are sure."""
        found = {*sure.values()}
        return {name: wait for name, wait in self.old.outline.waits.items() if name not in sure}, {name: wait for name, wait in self.new.outline.waits.items() if name not in found}

    def _pairs(self, alike: Callable[[Wait], str], sure: Mapping[str, str]) -> dict[str, str]:
        """Return what is the same wait in the new function, by label, for those that are left and of which there are as many as there were."""
        groups: tuple[dict[str, list[str]], ...] = ({}, {})
        for group, waits in zip(groups, self._left(sure), strict=True):
            for name, wait in waits.items():
                group.setdefault(alike(wait), []).append(name)
        before, now = groups
        return {old: new for what, labels in before.items() if len(labels) == len(now.get(what, ())) for old, new in zip(labels, now[what], strict=True)}

    def _guessed(self, label: str, sure: Mapping[str, str]) -> str:
        old, new = self.old.outline.waits, self.new.outline.waits
        was = old[label]
        kept = {wait.key for wait in old.values()} & {wait.key for wait in new.values()}
        if was.key in kept:
            before, now = ([name for name, wait in waits.items() if wait.key == was.key] for waits in self._left(sure))
            if len(before) == len(now):
                return now[before.index(label)]
            counts = [sum(wait.key == was.key for wait in waits.values()) for waits in (old, new)]
            raise self.refused(f"{_where(was)}, of which there were {counts[0]} and now are {counts[1]}, so it is not certain which one this is")
        before, now = ([name for name, wait in waits.items() if wait.call == was.call != "" and wait.key not in kept] for waits in (old, new))
        if len(before) == len(now) == 1:
            if _is_edited(was.called, new[now[0]].called):
                return now[0]
            raise self.refused(f"{_where(was)}, and the new code calls the same function for something else (line {new[now[0]].line})")
        raise self.refused(f"{_where(was)}, and the new code has no such wait" + (", but more than one call of the same function that has been edited" if len(now) > 1 else ""))

    def _between(self, label: str, found: str, sure: Mapping[str, str]) -> tuple[str, Wait, Wait]:
        """Return what `place` does, if the waits that are sure come before and after it as they did."""
        old, new = self.old.outline.waits, self.new.outline.waits
        passed, passing = ([*itertools.takewhile(end.__ne__, waits)] for waits, end in ((old, label), (new, found)))
        if {sure[name] for name in passed if name in sure} != {*passing} & {*sure.values()}:
            raise self.refused(f"{_where(old[label])}, and in the new code (line {new[found].line}) comes before or after another wait than it did")
        return found, old[label], new[found]

    def slots(self, saved: dict[str, Any], bound: Mapping[str, Any]) -> dict[str, Any]:
        """Return the slots of a waiting generator for the new function.  `bound` has its variables that are in cells, by name."""
        label, was, now = self.place(saved["@l"])
        made = {name: value for name, value in saved.items() if name[0] != "@"}
        needed, before = (wait.needed | (wait.lent & {*self.old.captured}) for wait in (now, was))  # no closure that is saved has another variable
        missing = sorted(needed - before - made.keys() - bound.keys())
        if missing:
            said = "a variable that this instance does not have" if len(missing) == 1 else "variables that this instance does not have"
            raise self.refused(f"{_where(now, 'of the new code')}, and then needs {', '.join(missing)}: {said}")
        return made | self._temporaries(saved, was, now) | {"@l": label}

    def _temporaries(self, saved: Mapping[str, Any], was: Wait, now: Wait) -> dict[str, Any]:
        """Return what the saved temporaries are called in the new function.  Raises CodeChangedError if these are not the same ones."""
        before, after = _Temporaries(was), _Temporaries(now)
        if len(before.state) != len(after.state) or not all(map(_is_alike, before.state, after.state)):
            raise self.refused(_differs(was, now, before.state, after.state))
        if not all(saved[name] for place, name in before.opens.items() if place not in after.opens):
            raise self.refused(f"{_where(was)}, while it leaves a with block, and a return, break or continue in that has gone")
        opens = {name: place not in before.opens or saved[before.opens[place]] for place, name in after.opens.items()}
        return {new: saved[old] for old, new in zip(before.names, after.names, strict=True) if old in saved} | opens


class _Temporaries:
    """The temporaries of a wait: the names of those that say whether a with block is open, by the place of their block, and the names and the state of all others."""

    def __init__(self, wait: Wait) -> None:
        both = list(zip(wait.live, wait.state, strict=True))
        self.names = [name for name, state in both if state != _OPEN]
        self.state = [state for _, state in both if state != _OPEN]
        self.opens: dict[int, str] = {}
        blocks = 0
        for name, state in both:
            blocks += state[0] == "manager"
            if state == _OPEN:
                self.opens[blocks] = name


def _is_edited(before: Part, now: Part) -> bool:
    """Whether this may be the same expression, after an edit.  What it waits for, or gathers, is the same; numbers may have changed, and arguments come or gone.

    1. x, y = yield kw.all([pay, ship]), which becomes y, x = yield kw.all([ship, pay])
    2. An instance waits for the first; its results come in the order in which it began to wait, and the new code would take each for the other.
    """
    if NUMBER in (before.what, now.what):
        return True
    common = before.parts.keys() & now.parts.keys()
    return before.what == now.what and common in (before.parts.keys(), now.parts.keys()) and all(_is_edited(before.parts[place], now.parts[place]) for place in common)


def _is_alike(before: tuple[str, str], after: tuple[str, str]) -> bool:
    """Whether a temporary means the same.  What a loop goes over may have been edited, or the name of its variable; if both were, it is another loop."""
    if before[0] != after[0] or before[0] not in LOOPS:
        return before == after
    return any(map(operator.eq, before[1].split(), after[1].split()))


def _where(wait: Wait, code: str = "") -> str:
    return f"waits at line {wait.line}{code and f' {code}'}" + (f", `{wait.text}`" if wait.text else "")


def _differs(was: Wait, now: Wait, before: list[tuple[str, str]], after: list[tuple[str, str]]) -> str:
    """Say what an instance that waits here is inside of, or not, that the new code is not, or is."""
    for these, those, said in ((before, after, "is no longer inside"), (after, before, "is inside")):
        more = Counter(role for role, _ in these) - Counter(role for role, _ in those)
        named = [_WHAT[role] for role in more if role in _WHAT]
        if named:
            return f"{_where(was)}; there, the new code {said} {named[0]}"
    if any(old[0] == new[0] and old[0] in LOOPS and not _is_alike(old, new) for old, new in zip(before, after, strict=False)):
        return f"{_where(was)}; there, the new code is inside another for loop: what it goes over has changed, and its variable"
    return f"{_where(was)}, in the middle of a statement that has changed (line {now.line} of the new code)"


def _unedited(old: Function, were: list[Function], are: list[Function]) -> Function:
    """Return the same function among those of the new version: under its qualified name, or else anywhere in the unit.  Its own name tells too little."""
    in_unit = [[one for one in some if (one.unit, one.name, one.outline.digest) == (old.unit, old.name, old.outline.digest)] for some in (were, are)]
    found = _at_its_place(old, *([one for one in some if one.qualname == old.qualname] for some in in_unit)) or _at_its_place(old, *in_unit)
    if found is None:
        why = "has no name to find it by" if old.name[0] == "<" else "belongs to a class that is defined in a function"
        raise CodeChangedError(f"{old.module}:{old.path} (line {old.lineno}), which this instance holds, has changed and {why}", old.module)
    return found


def _called(module: Module, qualname: str) -> list[Function]:
    return [one for one in module.functions.values() if one.qualname == qualname]


def _of_the_name(old: Function, were: list[Function], are: list[Function]) -> Function:
    """Return the function of the same qualified name.  Of several, those that are unedited may only have changed their places."""
    before, now = ([one for one in some if one.qualname == old.qualname] for some in (were, are))
    unedited = {one.outline.digest for one in before} & {one.outline.digest for one in now}
    wanted = {old.outline.digest} if old.outline.digest in unedited else {one.outline.digest for one in (*before, *now)} - unedited
    found = _at_its_place(old, *([one for one in some if one.outline.digest in wanted] for some in (before, now))) if len(before) == len(now) else None
    if found is None:
        said = f"of {old.module}:{old.qualname} there were {len(before)} and now are {len(now)}" if now else f"{old.module} no longer has a function {old.qualname!r}"
        raise CodeChangedError(said, old.module)
    return found


def _at_its_place(old: Function, were: list[Function], are: list[Function]) -> Function | None:
    return are[were.index(old)] if len(were) == len(are) else None


class MovingNames(rebuild.Names):
    """What the names in a snapshot mean if it is to be moved.  `old` are the versions, by reference, whose functions are replaced by those that `pins` or the registry have."""

    def __init__(self, pins: Pins, old: Mapping[str, Module]) -> None:
        super().__init__(pins)
        self.old = old
        self.moved: dict[Any, tuple[Move, tuple[types.CellType, ...], tuple[types.CellType, ...]]] = {}  # by generator; its cells before and after
        self.holders: Counter[int] = Counter()  # by id of a cell: how many functions and generators have it
        self.frames: list[str] = []  # for people: each waiting generator of the author, callers first, and from which line to which it was moved

    def generator(
        self, module: str, path: str, cells: tuple[types.CellType, ...] = (), name: str | None = None, qualname: str | None = None
    ) -> types.GeneratorType[Any, Any, Any]:
        self.holders.update(map(id, cells))
        if module not in self.old:
            return super().generator(module, path, cells, name, qualname)
        move = self._move(module, path)
        if move.new.kind != "generator":
            raise move.refused("is no longer a generator")
        made = move.cells(cells, is_begun=True)
        gen = empty(move.new, made, name, qualname)
        self.moved[gen] = move, cells, made
        return gen

    def function(self, module: str, path: str, cells: tuple[types.CellType, ...]) -> types.FunctionType:
        self.holders.update(map(id, cells))
        if module not in self.old:
            return super().function(module, path, cells)
        move = self._move(module, path)
        if move.new.outline.parameters != move.old.outline.parameters:
            raise move.refused("is held in a variable, and has other parameters now")
        return super().function(module, move.new.path, move.cells(cells, is_begun=False))

    def named(self, module: str, qualname: str) -> Any:
        found = super().named(module, qualname)
        if module in self.old and isinstance(found, types.FunctionType):
            were, are = (_called(known, qualname) for known in (self.old[module], registry.module(module, self.pins)))
            if were and are and are[-1].outline.parameters[: len(were[-1].outline.parameters)] != were[-1].outline.parameters:  # what is added has a default here
                raise Move(were[-1], are[-1]).refused("is held in a variable, and has other parameters now")
        return found

    def _move(self, module: str, path: str) -> Move:
        """Return where a function of an old version has gone.  Raises CodeChangedError if that is not certain."""
        old = self.old[module].functions.get(path)
        if old is None:
            raise CodeChangedError(f"the source of {module} has no function {path!r}", module)
        were, are = (list(known.functions.values()) for known in (self.old[module], registry.module(module, self.pins)))
        new = _unedited(old, were, are) if old.outline.fixed else _of_the_name(old, were, are)
        move = Move(old, new)
        if new.coroutine != old.coroutine:
            raise move.refused("was changed from def to async def, or back")
        return move

    def settle(self, states: list[Any]) -> None:
        """Give the states of generators that were moved the names of the new functions."""
        contents = {id(made): state for kind, made, state in zip(states[::3], states[1::3], states[2::3], strict=True) if kind == CELL}
        for number in range(0, len(states), 3):
            kind, gen, saved = states[number : number + 3]
            if kind not in (GENERATOR, CREATED):
                continue
            if gen not in self.moved:
                self._tell(registry.function_of(gen.gi_code), dict(saved))
                continue
            move, before, after = self.moved[gen]
            shared = dict(zip(move.old.captured, before, strict=True))
            values = dict(saved) | self._no_longer_shared(move, shared, contents)
            if kind == CREATED:
                if move.new.outline.parameters != move.old.outline.parameters:
                    raise move.refused("has not begun, and has other parameters now")
            elif move.is_edited:
                values = move.slots(values, {name: contents[id(held)] for name, held in shared.items() if id(held) in contents})
            for name, held in zip(move.new.captured, after, strict=True):
                if name not in shared and name in values:
                    held.cell_contents = values.pop(name)
            states[number + 2] = values
            self._tell(move.new, values, move.old.outline.waits.get(dict(saved).get("@l", "")))
        self.moved.clear()  # nothing of this may keep a generator alive

    def _tell(self, function: Function | None, slots: Mapping[str, Any], was: Wait | None = None) -> None:
        """Note where a generator waits now, and where it did if it was moved."""
        now = function.outline.waits.get(slots.get("@l", "")) if function is not None and not function.module.startswith("kwflow.") else None
        if function is not None and now is not None:
            self.frames.append(f"{function.qualname} line {f'{was.line} -> ' if was is not None else ''}{now.line}")

    def _no_longer_shared(self, move: Move, shared: Mapping[str, types.CellType], contents: Mapping[int, Any]) -> dict[str, Any]:
        """Return the variables that the new function keeps for itself, while the old one shared them with nested functions."""
        alone = {name: held for name, held in shared.items() if name not in move.new.captured and id(held) in contents}
        for name, held in alone.items():
            if self.holders[id(held)] > 1:
                raise move.refused(f"no longer shares {name} with the functions in it, but this instance holds one that was made by the old code")
        return {name: contents[id(held)] for name, held in alone.items()}

"""How a suspended generator is read and put back; the only file that knows frames.

`read` copies the author's variables in the frame, and the temporaries that are live at its label.  `shell` creates an unstarted
generator of the cold twin, whose state dict is filled later, and `enter` runs it to its yield without running author code.
"""

from __future__ import annotations

import gc
import sys
import types
from dataclasses import dataclass, field
from typing import Any, TypeAlias

from kwflow.durable import registry
from kwflow.durable.awaiting import below
from kwflow.durable.driving import set_abandoning
from kwflow.durable.lower.scopes import ITERATOR
from kwflow.durable.refusals import made_durable
from kwflow.durable.registry import Function
from kwflow.durable.runtime import Resume, shown
from kwflow.errors import CodeChangedError, KwflowBug, NotDurableError, UsageError

__all__ = ["Frame", "State", "capture", "describe", "discard", "empty", "enter", "forget_shells", "is_durable", "read", "refill", "restore", "snap", "where"]

Gen: TypeAlias = "types.GeneratorType[Any, Any, Any]"
_REFERENCES_TO_OURS = 3  # that of the frame, of the variable and of the argument
CREATED, SUSPENDED, FINISHED = "created", "suspended", "finished"


@dataclass
class State:
    """A generator as data.  `slots` maps names to values (`@l` to the name of the label); `cells` are in the order of `Function.captured`."""

    function: Function
    status: str
    slots: dict[str, Any] = field(default_factory=dict)
    cells: tuple[types.CellType, ...] = ()
    name: str = ""
    qualname: str = ""


@dataclass(frozen=True)
class Frame:
    """Where one generator of a chain waits."""

    function: str
    filename: str
    lineno: int
    locals: dict[str, Any]


def is_durable(value: Any) -> bool:
    """Whether this generator or generator function can be saved at its yields."""
    code = getattr(value, "gi_code", None) or getattr(getattr(value, "__func__", value), "__code__", None)
    function = registry.function_of(code) if isinstance(code, types.CodeType) else None
    return function is not None and function.kind == "generator"


def _function(gen: Gen) -> Function:
    function = registry.function_of(gen.gi_code)
    if function is None:
        code, module = gen.gi_code, gen.gi_frame.f_globals.get("__name__", "") if gen.gi_frame is not None else ""
        raise NotDurableError(f"the generator {gen.__qualname__} ({code.co_filename}:{code.co_firstlineno}) is not durable; {made_durable(module, code.co_filename)}")
    return function


@dataclass(frozen=True, slots=True)
class _Plan:
    """What to read from frames of one code object: for each label its name and the variables that matter there (no labels for generator expressions)."""

    code: types.CodeType  # held, so that its id is not reused
    function: Function
    labels: tuple[tuple[str, tuple[str, ...]], ...]


_plans: dict[int, _Plan] = {}
_LABEL = sys.intern("@l")


def _plan(gen: Gen) -> _Plan:
    code = gen.gi_code
    plan = _plans.get(id(code))
    if plan is None:
        function = _function(gen)
        captured = set(function.captured)
        own = dict.fromkeys(name for name in (*code.co_varnames, *code.co_cellvars, *code.co_freevars) if name[0] != "@" and name not in captured)
        labels = () if ".0" in code.co_varnames else tuple((label.name, (*own, *label.live)) for label in function.labels)
        plan = _plans[id(code)] = _Plan(code, function, labels)
    return plan


def snap(gen: Gen) -> tuple[Function, str, dict[str, Any], tuple[types.CellType, ...]]:
    """Return function, status, slots and cells, sharing every value: the hot part of `read`.  Raises what `read` raises."""
    plan = _plans.get(id(gen.gi_code)) or _plan(gen)
    frame = gen.gi_frame
    if frame is None:
        return plan.function, FINISHED, {}, tuple(types.CellType() for _ in plan.function.captured)
    if not gen.gi_suspended or not plan.labels:
        return _snap_slowly(gen, plan.function, frame)
    names = frame.f_locals
    label, wanted = plan.labels[names["@l"] - 1]
    slots = {name: names[name] for name in wanted if name in names}
    slots[_LABEL] = label
    cells = names["@c"] if plan.function.captured else ()
    if type(names) is dict:
        if sys.getrefcount(names) == _REFERENCES_TO_OURS:
            names.clear()  # as in `copied_locals`
        else:
            shown(names)
    return plan.function, SUSPENDED, slots, cells


def _snap_slowly(gen: Gen, function: Function, frame: types.FrameType) -> tuple[Function, str, dict[str, Any], tuple[types.CellType, ...]]:
    """Do what `snap` does, for a generator that has not begun, or a generator expression."""
    if gen.gi_running:
        raise UsageError(f"{gen.__qualname__} is running; only a waiting generator can be saved")
    names = copied_locals(frame)
    created = not gen.gi_suspended
    if ".0" in names:  # the first iterator of a generator expression
        names[ITERATOR if created else function.labels[0].live[0]] = names.pop(".0")
    if created and "@S" in names:  # a restored generator that has not run yet
        slots = dict(names["@S"])
        slots.pop("@l", None)
        return function, CREATED, slots, slots.pop("@c")
    captured = set(function.captured)
    slots = {name: value for name, value in names.items() if name[0] != "@" and name not in captured}
    if created:
        return function, CREATED, slots, _created_cells(gen, function, names)
    label = function.labels[names.get("@l", 1) - 1]  # a generator expression has just one label
    slots |= {name: names[name] for name in label.live if name in names}
    slots[_LABEL] = label.name
    return function, SUSPENDED, slots, names.get("@c", ())


def read(gen: Gen) -> State:
    """Return its state, sharing every value.  Raises NotDurableError, or UsageError while it is running."""
    return State(*snap(gen), gen.__name__, gen.__qualname__)


def copied_locals(frame: types.FrameType) -> dict[str, Any]:
    """Return a copy of the frame's variables.  The copy that frames themselves keep until 3.12 is emptied; it would hold what the author has dropped."""
    found = frame.f_locals
    names = dict(found)
    if type(found) is dict:
        if sys.getrefcount(found) == _REFERENCES_TO_OURS:
            found.clear()
        else:  # the author has called locals() and keeps the result
            shown(found)
    return names


def _created_cells(gen: Gen, function: Function, names: dict[str, Any]) -> tuple[types.CellType, ...]:
    """Return the cells of a generator before its first line: free ones are those of the function object, its own hold arguments that only it can see."""
    if not function.captured:
        return ()
    free: dict[str, types.CellType] = {}
    if function.free:
        owner = next((r for r in gc.get_referents(gen) if isinstance(r, types.FunctionType) and r.__code__ is gen.gi_code), None)
        if owner is None:
            raise KwflowBug(f"the function of {gen.__qualname__} is not reachable from its frame")
        free = dict(zip(owner.__code__.co_freevars, owner.__closure__ or (), strict=True))
    own = {name: types.CellType(names[name]) if name in names else types.CellType() for name in function.captured if name not in free}
    return tuple(free[name] if name in free else own[name] for name in function.captured)


_shells: dict[Gen, dict[str, Any]] = {}  # created and not filled yet


def shell(function: Function, cells: tuple[types.CellType, ...], name: str | None, qualname: str | None) -> tuple[Gen, dict[str, Any]]:
    """Return an unstarted generator and the dict that its first step will read; fill the dict, then call `enter` if the generator was suspended."""
    slots: dict[str, Any] = {"@c": cells}
    gen: Gen = types.FunctionType(function.cold, function.namespace, name or function.name, None, cells)(slots)
    gen.__qualname__ = qualname or function.qualname
    return gen, slots


def empty(function: Function, cells: tuple[types.CellType, ...], name: str | None, qualname: str | None) -> Gen:
    """Return a shell for `refill`."""
    gen, slots = shell(function, cells, name, qualname)
    _shells[gen] = slots
    return gen


def refill(gen: Gen, status: str, saved: dict[str, Any]) -> None:
    """Fill a shell that `empty` returned."""
    slots = _shells.pop(gen, None)
    if slots is None:  # a load on another thread has failed meanwhile, or the snapshot has two states for it
        frame = gen.gi_frame
        slots = copied_locals(frame)["@S"] if frame is not None else {}
    fill(gen, slots, status, saved)


def forget_shells() -> None:
    """Forget all shells, after a load that failed half-way."""
    _shells.clear()


def fill(gen: Gen, slots: dict[str, Any], status: str, saved: dict[str, Any]) -> None:
    """Put the saved slots into a shell's dict; close a generator that was finished."""
    slots.update(saved)
    if status == SUSPENDED:
        function = _function(gen)
        try:
            slots["@l"] = function.label_numbers[saved["@l"]]
        except KeyError:
            raise CodeChangedError(f"{function.module}.{function.path} no longer has the wait {saved.get('@l')!r}") from None
        return
    slots["@l"] = 0
    if status == FINISHED:
        gen.close()


def enter(gen: Gen) -> None:
    """Do the handshake: run only guards, down to the yield where the generator waited."""
    next(gen)


def capture(gen: Gen) -> State:
    """Return its state within this process, without bytes: values, cells and delegates are shared with the generator."""
    return read(gen)


def restore(state: State) -> Gen:
    """Return a generator that continues from the state as the captured one would have."""
    gen, slots = shell(state.function, state.cells, state.name, state.qualname)
    fill(gen, slots, state.status, state.slots)
    if state.status == SUSPENDED:
        enter(gen)
    return gen


def discard(gen: Gen) -> None:
    """Forget a generator without running the author's cleanup (G8).  Its variables are released, even if somebody (a traceback) holds its frame."""
    frame = gen.gi_frame
    before = set_abandoning(True)
    try:
        gen.close()
        if frame is not None:
            frame.clear()
    finally:
        del frame  # from 3.12 on, its `f_back` is the frame of this call: a cycle that would keep alive what our callers hold
        set_abandoning(before)


def where(gen: Gen) -> tuple[str, str, int]:
    """Return function, file and line of the innermost wait of a `yield from` chain; cheaper than `describe`."""
    while True:
        frame, inner = gen.gi_frame, gen.gi_yieldfrom
        if inner is not None:
            inner = below(inner.target if isinstance(inner, Resume) else inner)
        if inner is None or not isinstance(inner, types.GeneratorType) or inner.gi_frame is None or registry.function_of(inner.gi_code) is None:
            return gen.__qualname__, gen.gi_code.co_filename, frame.f_lineno if frame is not None else 0
        gen = inner


def describe(gen: Gen) -> list[Frame]:
    """Return function, file, line and variables of each generator of a `yield from` chain, outermost first; this runs nothing."""
    frames = []
    current: Any = gen
    while isinstance(current, types.GeneratorType) and current.gi_frame is not None and registry.function_of(current.gi_code) is not None:
        state = read(current)
        values = {name: value for name, value in state.slots.items() if name[0] != "@"}
        for name, cell in zip(state.function.captured, state.cells, strict=False):
            try:
                values[name] = cell.cell_contents
            except ValueError:
                continue
        line = current.gi_frame.f_lineno if state.status == SUSPENDED else state.function.lineno
        frames.append(Frame(state.qualname, state.function.filename, line, values))
        live = [name for name in state.slots if name.startswith("@delegate")]
        current = below(state.slots[live[-1]]) if live else None
    return frames

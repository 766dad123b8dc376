"""An instance as a picture, from its bytes alone: its tasks, the generators on their stacks, and what the innermost ones wait for.

No author code is loaded and nothing is run: objects are stubs (durable/stubs.py).  Finding the line of a label takes the
sources, and is done by durable/lower/show.py.
"""

from __future__ import annotations

from typing import Any

import msgspec

from kwflow.core.snapshot import CLASSES
from kwflow.core.tasks import PENDING, Awaitable, Combinator, Task
from kwflow.durable.peek import Shown
from kwflow.durable.stubs import CREATED, OBJECT, WAITING, States, Stub, graph, qualname, text
from kwflow.errors import CorruptSnapshotError

__all__ = ["UNSET", "Frame", "Node", "Picture", "named", "picture_of"]

_NODES_MAX = 200  # of a picture; the header lists the waits besides
_RUNNING = ("target", "agen", "gen")  # the attributes in which our own iterators hold what they run
_WORD_MAX = 1000  # characters
_WRAPPED_MAX = 50  # an `async with` inside an exit stack's entry, and so on
UNSET = msgspec.UNSET  # the content of a cell that has not been assigned yet


class Frame(msgspec.Struct, frozen=True):
    """One generator: its code, the label where it waits (None if it has not begun), its variables, and the contents of its cells in order.

    `module` is named as in the header.
    """

    module: str
    path: str
    function: str
    label: str | None
    variables: dict[str, Any]
    cells: tuple[Any, ...]


class Node(msgspec.Struct, frozen=True):
    """A generator on a stack, or something that is waited for.

    `kind` is frame, task, all, race, timeout, shield or the kind of a wait.  `name` is what the author calls it, `ref` the ref of a wait (or the number of a
    task), `key` tells which child of its combinator it is, and `again` that it was shown before.
    """

    depth: int
    kind: str
    name: str = ""
    ref: str = ""
    key: str = ""
    state: str = PENDING
    value: Any = None
    frame: Frame | None = None
    again: bool = False


class Picture(msgspec.Struct, frozen=True):
    """An instance as it waits.

    `nodes` go from the outermost generator to what the innermost one waits for; further tasks follow.  `whole` is False if there are more nodes than shown.
    `held` are waiting generators that only variables hold.
    """

    nodes: list[Node]
    whole: bool
    held: list[Frame]
    shown: Shown


def picture_of(body: bytes) -> Picture:
    """Draw the body of a snapshot.  Raises CorruptSnapshotError."""
    root, states = graph(body)
    try:
        return _Drawing(states).picture(root)
    except (LookupError, TypeError, ValueError, AttributeError) as error:
        raise CorruptSnapshotError(f"the body of a snapshot is not an instance: {error!r}") from error


class _Drawing:
    """Draws without recursion, with a stack of what is still to be drawn, because nesting may be deep."""

    def __init__(self, states: States) -> None:
        self._states = states
        self._seen: set[int] = set()
        self._nodes: list[Node] = []
        self._todo: list[tuple[int, str, Any]] = []
        self._shown = Shown(states, named)

    def picture(self, root: dict[str, Any]) -> Picture:
        for task in [root["main"], *root["tasks"].values()]:
            if id(task) not in self._seen and _fields(self._states, task).get("state") == PENDING:
                self._todo.append((0, "", task))
                while self._todo and len(self._nodes) < _NODES_MAX:
                    self._draw(*self._todo.pop())
        whole = not self._todo
        waiting = [made for kind, made, _ in self._states.values() if kind == WAITING and id(made) not in self._seen] if whole else []
        return Picture(self._nodes, whole, [self._frame(made) for made in waiting[:_NODES_MAX]], self._shown)

    def _draw(self, depth: int, key: str, awaited: Any) -> None:
        """Draw one thing that is waited for.  A task is drawn as its stack, followed by what it waits for."""
        cls, fields = _class(awaited), _fields(self._states, awaited)
        again = id(awaited) in self._seen
        self._seen.add(id(awaited))
        node = Node(depth, getattr(cls, "kind", cls.__name__.lower()), key=key, state=text(fields["state"]), value=fields["value"], again=again)
        if issubclass(cls, Task):
            self._nodes.append(msgspec.structs.replace(node, name=self._word(fields["name"]), ref=self._word(fields["number"])))
            if fields["state"] == PENDING and not again:
                self._stack(depth + 1, fields)
        elif issubclass(cls, Combinator):
            self._nodes.append(node)
            if fields["state"] == PENDING and not again:
                keys = fields["keys"] or range(len(fields["children"]))
                self._todo += [(depth + 1, self._word(key), child) for key, child in reversed(list(zip(keys, fields["children"], strict=True)))]
        else:
            self._nodes.append(msgspec.structs.replace(node, name=self._word(fields.get("name") or fields.get("child_id") or ""), ref=self._word(fields.get("ref", ""))))

    def _stack(self, depth: int, task: dict[str, Any]) -> None:
        """Draw the generators of a task, and on the same stack those of the tasks that it waits for with `yield`."""
        while True:
            gen = task["gen"]
            while gen is not None and id(gen) not in self._seen and len(self._nodes) < _NODES_MAX:
                self._seen.add(id(gen))
                frame = self._frame(gen)
                self._nodes.append(Node(depth, "frame", frame.function, frame=frame))
                gen = self._below(gen)
            inner = task["waiting_on"]
            if inner is None:
                return
            task = _fields(self._states, inner)
            if not issubclass(_class(inner), Task) or task["state"] != PENDING or id(inner) in self._seen or len(self._nodes) >= _NODES_MAX:
                self._todo.append((depth, "", inner))
                return
            self._seen.add(id(inner))

    # -- what stubs stand for ----------------------------------------------------------------------------------------
    def _frame(self, gen: Stub) -> Frame:
        kind, _, slots = self._states[id(gen)]
        cells = tuple(self._content(cell) for cell in (gen.args[2] if len(gen.args) > 2 else ()))
        variables = {text(name): value for name, value in slots.items() if name[0] != "@"}
        label = slots.get("@l") if kind == WAITING else None
        return Frame(text(gen.args[0]), text(gen.args[1]), qualname(gen), None if label is None else text(label), variables, cells)

    def _word(self, value: Any) -> str:
        """Return a key, name or number as text; an author's key may be any object."""
        return value[:_WORD_MAX] if isinstance(value, str) else self._shown.text(value, _WORD_MAX)

    def _content(self, cell: Stub) -> Any:
        return self._states[id(cell)][2] if id(cell) in self._states else UNSET

    def _below(self, gen: Stub) -> Stub | None:
        """Return the generator that this one runs in a `yield from` or `await`, or None."""
        kind, _, slots = self._states[id(gen)]
        delegates = [value for name, value in slots.items() if name.startswith("@delegate")]
        return self._generator_in(delegates[-1]) if kind == WAITING and delegates else None

    def _generator_in(self, value: Any) -> Stub | None:
        """Return the value if it is a generator, or the generator that one of our iterators runs (awaiting.below)."""
        for _ in range(_WRAPPED_MAX):
            if not isinstance(value, Stub) or self._states.get(id(value), (None,))[0] in (WAITING, CREATED):
                return value if isinstance(value, Stub) else None
            slots = value.state[-1] if isinstance(value.state, tuple) and value.state else None
            value = next((slots[name] for name in _RUNNING if isinstance(slots.get(name), Stub)), None) if isinstance(slots, dict) else None
        return None


def named(states: States, made: Stub) -> str | None:
    """Return the text that the repr of an awaitable gives, or None for any other object.  Raises LookupError, TypeError or ValueError if it is damaged."""
    if states.get(id(made), (None,))[0] != OBJECT:
        return None
    cls, fields = _class(made), _fields(states, made)
    if issubclass(cls, Combinator):
        return f"<{cls.__name__.lower()} of {len(fields['children'])} {text(fields['state'])}>"
    name = f"task {_number(fields['number'])} {text(fields['name'])}" if issubclass(cls, Task) else f"{getattr(cls, 'kind', '')} {text(fields.get('ref'))}"
    return f"<{name} {text(fields['state'])}>"


def _class(made: Any) -> type[Awaitable]:
    cls: type[Awaitable] = CLASSES[made.args[0]]
    return cls


def _fields(states: States, made: Any) -> dict[str, Any]:
    return {} if made is None else dict(zip(_class(made)._fields, states[id(made)][2], strict=True))


def _number(value: Any) -> int:
    return value if isinstance(value, int) and value.bit_length() < 64 else 0

"""What of an exception is saved besides its class: its arguments, and a state that is set afterwards, since causes and contexts form cycles.

The traceback is not.  Both directions are here; the object itself is made by `rebuild.exception`.
"""

from __future__ import annotations

import weakref
from typing import Any, TypeAlias

__all__ = ["fill", "parts"]

State: TypeAlias = "tuple[dict[str, Any], dict[str, Any], Any, Any, bool]"  # attributes, slots, cause, context, whether the context is suppressed: part of the snapshot format
# What __init__ of a builtin exception stores besides args, and __new__ alone does not.
_ATTRIBUTES: dict[type[BaseException], tuple[str, ...]] = {
    StopIteration: ("value",),
    StopAsyncIteration: (),
    SystemExit: ("code",),
    ImportError: ("name", "path", "msg"),
    OSError: ("errno", "strerror", "filename", "filename2"),
    UnicodeDecodeError: ("encoding", "object", "start", "end", "reason"),
    UnicodeEncodeError: ("encoding", "object", "start", "end", "reason"),
    SyntaxError: ("msg", "filename", "lineno", "offset", "text", "end_lineno", "end_offset"),
    AttributeError: ("name", "obj"),
    NameError: ("name",),
}
_set = BaseException.__setattr__  # the class's own may refuse everything, as that of a frozen dataclass does


def parts(error: BaseException) -> tuple[tuple[Any, ...], State]:
    """Return the arguments from which `rebuild.exception` makes it again, and the state for `fill`."""
    builtin, own = _slots_of(type(error))
    slots = {name: held for name in builtin if (held := getattr(error, name, None)) is not None}
    slots |= {name: getattr(error, name) for name in own if hasattr(error, name)}
    args = error.args
    if isinstance(error, BaseExceptionGroup):
        args, slots["args"] = (error.message, error.exceptions), args  # a group cannot be built from the arguments of an author's __init__
    return args, (error.__dict__, slots, error.__cause__, error.__context__, error.__suppress_context__)


def fill(made: BaseException, state: State) -> None:
    """Set what `parts` returned as the state."""
    attributes, slots, cause, context, suppress = state
    for name, value in slots.items():
        if getattr(made, name, slots) is value:
            continue  # setting errno of an OSError to None, too, would make it show that instead of its message
        try:
            _set(made, name, value)
        except (AttributeError, TypeError):
            continue  # read-only on this minor, where args hold it
    made.__dict__.update(attributes)
    _set(made, "__cause__", cause)
    _set(made, "__context__", context)
    _set(made, "__suppress_context__", suppress)


_known: weakref.WeakKeyDictionary[type[BaseException], tuple[tuple[str, ...], tuple[str, ...]]] = weakref.WeakKeyDictionary()


def _slots_of(cls: type[BaseException]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Return the attributes of such an exception that neither args nor `__dict__` hold: those of builtin classes, and those in `__slots__`."""
    found = _known.get(cls)
    if found is None:
        builtin = [name for base in cls.__mro__ for name in _ATTRIBUTES.get(base, ())]
        own = [_mangled(base, name) for base in cls.__mro__ for name in _slots(base) if name not in ("__dict__", "__weakref__")]
        found = _known[cls] = tuple(builtin), tuple(own)
    return found


def _slots(cls: type[Any]) -> tuple[str, ...]:
    slots = cls.__dict__.get("__slots__", ())
    return (slots,) if isinstance(slots, str) else tuple(slots)


def _mangled(cls: type[Any], name: str) -> str:
    return f"_{cls.__name__.lstrip('_')}{name}" if name.startswith("__") and not name.endswith("__") else name

"""What an author sees of an error: the traceback and the context that it would have without us.

An error passes through functions of ours on its way, and is raised again to enter a handler after a restore.  Neither may show.
"""

from __future__ import annotations

import sys
import types

__all__ = ["forget_catcher", "forget_frames", "links", "relink"]

_OURS = ("kwflow.durable.awaiting", "kwflow.durable.protocols", "kwflow.durable.runtime")


def forget_frames(error: BaseException) -> None:
    """Remove our own frames from the error's traceback, and from those of its causes and contexts.

    They tell the author nothing, and each one holds its callers, among them whoever drives the generator.  So an error that is
    kept would keep generators alive that have ended.
    """
    seen: set[int] = set()
    errors: list[BaseException | None] = [error]
    while errors:
        one = errors.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        errors += [one.__cause__, one.__context__]
        first = _authors(one.__traceback__)
        if first is not one.__traceback__:
            BaseException.__setattr__(one, "__traceback__", first)  # a frozen class would refuse
        while first is not None:
            following = _authors(first.tb_next)
            if following is not first.tb_next:
                first.tb_next = following
            first = following


def forget_catcher(error: BaseException) -> None:
    """The same, and remove the frame of the function that has just caught the error."""
    if error.__traceback__ is not None:
        BaseException.__setattr__(error, "__traceback__", error.__traceback__.tb_next)
    forget_frames(error)


def _authors(entry: types.TracebackType | None) -> types.TracebackType | None:
    while entry is not None and entry.tb_frame.f_globals.get("__name__") in _OURS:
        entry = entry.tb_next
    return entry


def links(error: BaseException) -> tuple[types.TracebackType | None, list[tuple[BaseException, BaseException | None]]]:
    """Return what raising the error again, to enter a handler or a `finally`, would change: its traceback and contexts.

    These include a cycle of contexts, which CPython would cut.
    """
    contexts: list[tuple[BaseException, BaseException | None]] = [(error, error.__context__)]
    seen = set()
    other = sys.exc_info()[1]
    while other is not None and id(other) not in seen:
        seen.add(id(other))
        if other.__context__ is error:
            contexts.append((other, error))
        other = other.__context__
    return error.__traceback__, contexts


def relink(error: BaseException, saved: tuple[types.TracebackType | None, list[tuple[BaseException, BaseException | None]]]) -> None:
    """Restore what `links` returned.  An error that was loaded from bytes has no traceback, and keeps the line where it was raised again."""
    traceback, contexts = saved
    for other, context in contexts:
        BaseException.__setattr__(other, "__context__", context)
    if traceback is not None:
        BaseException.__setattr__(error, "__traceback__", traceback)

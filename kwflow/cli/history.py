"""`kwflow history`: what happened to an instance, from the events that its engines wrote with its steps."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import msgspec

from kwflow.cli.shared import Bootstrap, ConfigFile, Json, MaybeDir, err, out, print_json
from kwflow.config import Config, load_config
from kwflow.core import wire
from kwflow.core.encrypted import is_encrypted, missing_key
from kwflow.core.wire import Record
from kwflow.errors import UsageError
from kwflow.runners.instances import instant
from kwflow.runners.outside import read

__all__ = ["history"]

_WAITS = 3  # of a line


def history(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    as_json: Json = False,
    config: ConfigFile = None,
) -> None:
    """Show what happened to an instance, if engines record it ([topics] history in kwflow.toml).

    Example: kwflow history order-7 --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers)
    if not settings.history_topic:
        raise UsageError('no history is kept: set [topics] history = "workflow-history" (or KWFLOW_HISTORY_TOPIC) for the engines, and here')
    events = [event for record in _records(settings, embedded, settings.history_topic, id) if (event := _event(record)) is not None]
    if as_json:
        print_json(events)
        return
    if not events:
        err.print(f"{settings.history_topic} has no events of {id}: it never ran, none were kept then, or they have been deleted")
    for event in events:
        out.print(f"{instant(event['at'])}  {_cause(event)}", markup=False, highlight=False, soft_wrap=True)
        for line in (*_lines(event), *event.get("logs", ())):
            out.print(f"    {line}", markup=False, highlight=False, soft_wrap=True)


def _records(settings: Config, embedded: Path | None, topic: str, id: str) -> Iterator[Record]:
    key = wire.key_of(id)
    if embedded is not None:
        found = read(settings, embedded, topic)
    else:
        from kwflow.runners.kafka import link

        found = iter(link.read(settings, topic, link.partition_for(settings, topic, key)))
    return (record for record in found if record.key == key)


def _event(record: Record) -> dict[str, Any] | None:
    """None for what no engine of ours wrote.  Raises TransportError for what cannot be opened."""
    if is_encrypted(record.value):
        raise missing_key(record.topic, record.value)
    try:
        event = msgspec.json.decode(record.value or b"")
        return event if isinstance(event["at"], int) and isinstance(event["event"], str) and isinstance(event["by"], dict) else None
    except (msgspec.DecodeError, LookupError, TypeError):
        return None


def _cause(event: dict[str, Any]) -> str:
    """What came, and its effect where that is not the same."""
    by = event["by"]
    what = " ".join(str(by[name]) for name in ("kind", "name", "child", "ref") if by.get(name))
    details = [f"attempt {by['attempt']}" if "attempt" in by else "", "an error" if "failed" in by else "", "in place" if by.get("in_place") else "", str(by.get("reason", ""))]
    details += [f"checkpoint {by[name]}" for name in ("at", "to") if name in by]
    effect = event["event"] if event["event"] not in ("started", "resumed", by.get("kind")) else ""
    return what + (f" ({', '.join(filter(None, details))})" if any(details) else "") + (f": {effect}" if effect else "")


def _lines(event: dict[str, Any]) -> Iterator[str]:
    """Where it is since."""
    outcome = event.get("outcome")
    if outcome:
        at = outcome.get("at")
        yield f"ended: {outcome.get('kind')}" + (f" in {at.get('function')} ({at.get('file')}:{at.get('line')})" if at else "")
        return
    if event.get("status") not in ("waiting", None):
        yield f"{event['status']}{': ' if event.get('reason') else ''}{event.get('reason', '')}"
    waits = event.get("waits", ())
    for wait in waits[:_WAITS]:
        where = f" in {wait['function']} ({wait.get('file')}:{wait.get('line')})" if "function" in wait else ""
        due = f", due {instant(wait['due'])}" if "due" in wait else ""
        pause = wait["kind"] == "timer" and "attempt" in wait
        what = f"pause before attempt {wait['attempt']} of {wait.get('name')}" if pause else f"waits for {wait['kind']} {wait.get('name') or wait.get('child') or wait['ref']}"
        yield f"{what}{where}{due}"
    if (more := len(waits) - min(len(waits), _WAITS) + event.get("more_waits", 0)) > 0:
        yield f"and {more} more"

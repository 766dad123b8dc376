"""What `kwflow engine --check` says of `@kw.migrate` functions: which are for no stored code, and what each would do to the instances that it is for.

A trial is the step of a `migrate` command, on a copy of the instance in memory.  The one rule: what such a step decides is looked at and forgotten;
nothing is written, sent, set or called.  The author's code runs in it, up to the new generator's first wait.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import msgspec

from kwflow import api
from kwflow.config import Config
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.wire import Record
from kwflow.durable import registry, versions
from kwflow.durable.moves import parsed
from kwflow.errors import CodeChangedError
from kwflow.runners import parked
from kwflow.runners.code import CodeStore
from kwflow.runners.instances import places_of
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay

__all__ = ["Trial", "without_code"]

_VERSIONS_MAX = 20  # of a module that are read in search of a function; reading one takes 0.1 s
_DRAINS_MAX = 1000  # of parked.DRAINED_MAX records each
_NAMED_MAX = 3
_HEADERS = (("kwflow-op", b"migrate"), ("kwflow-request", b"check"), ("kwflow-reply-to", b"0/check"))


class _Copy(dict[bytes, bytes]):
    """A Store of what one trial may see."""

    def scan(self, prefix: bytes, start: bytes = b"") -> Iterator[tuple[bytes, bytes]]:
        yield from ((key, self[key]) for key in sorted(self) if key.startswith(prefix) and key >= start)


class Trial:
    """Tries the migration of one instance after the other."""

    def __init__(self, config: Config, workflows: Workflows, sources: versions.Sources, held: Mapping[bytes, bytes]) -> None:
        """`held` has the entries of all holds, among others."""
        self._config = config.model_copy(update={"tracing": False, "history_topic": "", "instances_cached_max": 0})
        self._processor = WorkflowProcessor(self._config, workflows, api.declared_topics(), "check", lambda _: None, sources)
        self._held: dict[str, dict[bytes, bytes]] = {}
        for key, value in held.items():
            if (of := parked.of_hold(key)) is not None:
                self._held.setdefault(of.decode(), {})[key] = value

    def __call__(self, id: str, data: bytes, now_ms: int) -> tuple[bool, str]:
        """Return whether the instance would be migrated, and where it would wait then, or why not."""
        keys = self._config.signing_keys
        header = snapshot.split(data, keys)[0]
        if parked.is_paused(header):  # the command would be held until it is unpaused
            data = snapshot.unpark(data, keys) or data
        state = Overlay(_Copy({id.encode(): data, **self._held.get(id, {})}))
        offset = max([*(header.get("applied") or ())[2:], 0]) + 1
        record = Record(self._config.resume_topic, 0, offset, now_ms, id.encode(), b"null", _HEADERS)
        [made] = self._processor.decide(state, [record], now_ms)
        reply = msgspec.json.decode(made.replies[-1].value or b"") if made.replies else {"status": "", "message": "; ".join(made.logs)}
        left = self._left(state, id)
        for _ in range(_DRAINS_MAX):  # what it held is applied by commands that the engine gives itself
            if left["status"] != "parked" or left["parked"]["reason"] != "draining":
                break
            record = msgspec.structs.replace(record, offset=record.offset + 1, headers=(("kwflow-op", b"retry"),))
            self._processor.decide(state, [record], now_ms)
            left = self._left(state, id)
        why = f"{left['parked']['reason']}: {left['parked']['message']}" if left["status"] == "parked" else ""
        if reply["status"] != "ok":
            return False, why if reply["status"] == "held" else reply["message"]
        return not why, f"then it is parked: {why}" if why else _where(left)

    def _left(self, state: Overlay, id: str) -> dict[str, Any]:
        data = state.get(id.encode())
        return snapshot.split(data, self._config.signing_keys)[0] if data is not None else {"status": "ended", "waits": []}


def _where(header: dict[str, Any]) -> str:
    """Where an instance with this header waits."""
    if header["status"] == "ended":
        return "then it ends"
    places = places_of(header)
    return f"then it waits in {', '.join(places[:_NAMED_MAX])}{', …' if len(places) > _NAMED_MAX else ''}" if places else "then it waits"


def without_code(migrations: Iterable[str], store: CodeStore) -> Iterator[str]:
    """Say which of these keys of migrations name nothing that is stored, so that no instance can run it."""
    stored: dict[str, list[str]] = {}
    for key in sorted(store.entries, key=lambda key: store.written_ms[key], reverse=True):
        name, _, version = key.rpartition("@")
        stored.setdefault(name, []).append(version)
    for key in sorted(migrations):
        place, digits = versions.split_reference(key)
        module, _, path = place.partition(":")
        why = _missing(module, path, digits, stored, store) if module in stored else f"no version of {module} is stored{_meant(module, stored)}"
        if why:
            yield f"@kw.migrate(from_={key!r}): {why}"


def _missing(module: str, path: str, digits: str, stored: Mapping[str, list[str]], store: CodeStore) -> str:
    known = [version for version in stored[module] if version.startswith(digits)]
    if not known:
        there = ", ".join(version[:12] for version in stored[module][:_NAMED_MAX])
        return f"no stored version of {module} is {digits}; there are {there}{', …' if len(stored[module]) > _NAMED_MAX else ''}"
    names: set[str] = set()
    for version in known[:_VERSIONS_MAX]:
        try:
            functions = parsed(module, version, versions.source_in(store.entries[versions.entry_key(module, version)]), registry.version_name(module, version)).functions
        except (CodeChangedError, LookupError, ValueError):  # such as one for another minor of Python
            return ""
        if path in functions:
            return ""
        names |= functions.keys()
    return f"no stored version has {module}:{path}{_meant(path, names)}" if len(known) <= _VERSIONS_MAX else ""


def _meant(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), 1)
    return f" (did you mean {close[0]}?)" if close else ""

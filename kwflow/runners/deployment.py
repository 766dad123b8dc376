"""What a deployment will do to stored instances: which continue in the new code, which on old code, and which would be parked.

Every snapshot is really loaded, on the code that it would run, and then forgotten; no step is run.
"""

from __future__ import annotations

import functools
import itertools
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from kwflow.core import migration, snapshot
from kwflow.durable import registry, set_abandoning, versions
from kwflow.errors import SnapshotError
from kwflow.ports import Store
from kwflow.runners import parked
from kwflow.runners.checkpoints import of_checkpoint
from kwflow.runners.instances import header_of

__all__ = ["Fate", "check", "code_of", "moved_to", "run_by", "source_of", "versions_in"]

_FRAMES_MAX = 3
Migrations = Mapping[str, Callable[..., Any]]


@dataclass(frozen=True)
class Fate:
    """What would become of one instance.

    `kind` is resume, old, parked, or failed if it is parked already; `why` holds sentences; `migration` is true if `kwflow code migrate` would move it, `in_place` says
    what `--in-place` would do with one that stays on old code or is parked; `changed` lists, by module, the classes that have changed since it was saved.
    """

    id: str
    kind: str
    why: tuple[str, ...] = ()
    migration: bool = False
    in_place: str = ""
    changed: Mapping[str, tuple[str, ...]] = field(default_factory=dict)


def check(stored: Mapping[bytes, bytes], sources: versions.Sources, migrations: Migrations, keys: snapshot.Keys = ()) -> Iterator[Fate]:
    """Yield the fate of each instance that has not ended, with the modules that are loaded now."""
    before = set_abandoning(True)
    try:
        for key, data in sorted(stored.items()):
            try:
                header, body = snapshot.split(data, keys)
                if header["status"] == "ended":
                    continue
                in_place = functools.partial(_in_place, data, sources, keys)
                if header["status"] == "parked" and not parked.is_paused(header):
                    yield Fate(key.decode(), "failed", (header["parked"]["reason"],), _has_migration(data, sources, migrations, keys), in_place())
                    continue
                yield _fate(key.decode(), header, body, sources, migrations, in_place)
            except SnapshotError as error:
                yield Fate(key.decode(), "parked", (str(error),))
    finally:
        set_abandoning(before)


def _fate(id: str, header: dict[str, Any], body: bytes, sources: versions.Sources, migrations: Migrations, in_place: Callable[[], str]) -> Fate:
    instance = snapshot.wake(header, body, sources)
    try:
        old = {found.name for found in instance.pins.values() if registry.modules().get(found.name) is not found}
        why = [f"{name}: {change}" for name, saved in code_of(header) if name in old for change in versions.changed_units(registry.modules().get(name), saved)]
        why += [f"{name}: something that it refers to by name no longer exists" for name in sorted(old) if not any(line.startswith(f"{name}:") for line in why)]
        moves = migration.find(instance, migrations) is not None
        return Fate(id, "old" if old else "resume", tuple(why), moves, in_place() if old else "", dict(_changed(header, sources)))
    finally:
        instance.forget()


def _has_migration(data: bytes, sources: versions.Sources, migrations: Migrations, keys: snapshot.Keys) -> bool:
    """Whether there is a migration for a parked instance."""
    try:
        before = snapshot.unpark(data, keys)
        if before is None:
            return False
        instance = snapshot.load(before, sources, keys)
    except SnapshotError:
        return False
    try:
        return migration.find(instance, migrations) is not None
    finally:
        instance.forget()


def _in_place(data: bytes, sources: versions.Sources, keys: snapshot.Keys) -> str:
    """Say what moving it in place would do."""
    try:
        moved = snapshot.move(data, sources, keys)
    except SnapshotError as error:
        return f"not in place: {error}"
    if moved is None:
        return "it runs this code already"
    return f"can be migrated in place{moved_to(moved[2])}"


def moved_to(frames: Sequence[str]) -> str:
    """The frames of an instance that is moved in place, to follow a text: the outermost one and those where it waits."""
    told = list(dict.fromkeys(frames))
    if len(told) > _FRAMES_MAX:
        told[1 : 1 - _FRAMES_MAX] = [f"… {len(told) - _FRAMES_MAX} more"]
    return f" ({', '.join(told)})" if told else ""


def _changed(header: dict[str, Any], sources: versions.Sources) -> Iterator[tuple[str, tuple[str, ...]]]:
    for name, saved in code_of(header):
        current = registry.modules().get(name)
        if current is None or current.version == saved["version"]:
            continue
        source = source_of(name, saved["version"], sources)
        if source is not None and (changed := versions.changed_classes(source, current.source)):
            yield name, tuple(changed)


def code_of(header: dict[str, Any]) -> list[tuple[str, dict[str, Any]]]:
    """(module name, what the snapshot says about that version) for each version of a module in the header."""
    return [(versions.split_reference(reference)[0], saved) for reference, saved in header.get("code", {}).items()]


def source_of(name: str, version: str, sources: versions.Sources) -> str | None:
    """The stored source of a version; None if it is not stored."""
    data = sources(versions.entry_key(name, version))
    return versions.source_in(data) if data is not None else None


def run_by(store: Store) -> frozenset[str]:
    """`<module>@<sha256>` of every version that a snapshot in this state names.  Reads the header of every snapshot."""
    found: set[tuple[str, str]] = set()
    for key, data in store.scan(b""):
        if not key.startswith(b"\0"):
            found.update((name, saved["version"]) for name, saved in code_of(header_of(data, snapshot.read_inner_header)))
    return frozenset(itertools.starmap(versions.entry_key, found))


def versions_in(stored: Mapping[bytes, bytes]) -> dict[str, list[str]]:
    """`<module>@<sha256>` -> the instances whose snapshots, or earlier ones that are kept, name it, from their headers alone; a damaged snapshot names none."""
    found: dict[str, dict[str, None]] = {}
    for key, data in sorted(stored.items()):
        holder = (of_checkpoint(key) or key).decode()
        for name, saved in code_of(header_of(data, snapshot.read_inner_header)):
            found.setdefault(versions.entry_key(name, saved["version"]), {})[holder] = None
    return {key: list(holders) for key, holders in found.items()}

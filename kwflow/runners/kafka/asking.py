"""Asking the engine that owns an instance over HTTP, if it serves that, before anybody reads a whole changelog.

The owners come from `<app>-owners`, which may be outdated.  So an answer counts only if it comes from the engine that is named
there, and covers partitions that it owns when it answers.
"""

from __future__ import annotations

import urllib.error
import urllib.request
from collections import Counter
from collections.abc import Callable
from email.message import Message
from http.client import HTTPException
from typing import Any
from urllib.parse import quote, urlencode

import msgspec

from kwflow.config import Config
from kwflow.core.murmur2 import partition_of
from kwflow.errors import UsageError
from kwflow.runners.instances import Filter, Found, found_in, newest_of
from kwflow.runners.kafka import topics
from kwflow.runners.kafka.link import latest
from kwflow.runners.kafka.owners import Owner, owner_key

__all__ = ["list_", "show"]

_TIMEOUT_S = 5
_OPENER = urllib.request.build_opener(urllib.request.ProxyHandler({}))  # without proxies: an engine is not on the outside network
Note = Callable[[str], None]


class _NoAnswer(Exception):
    """Raised with the reason why the changelog has to be read."""


def show(config: Config, id: str, note: Note) -> dict[str, Any] | None:
    """What an instance's owner reports about it; None, and a note why, if there is no answer.  Raises UsageError if there is no such instance, TransportError."""
    try:
        number = partition_of(id.encode(), _partitions(config))
        owner = _owners(config, [number])[number]
        status, _, body = _get(owner, f"/instances/{quote(id, safe='')}")
        if status == 404:
            raise UsageError(f"no instance {id!r}")
        if status != 200:
            raise _NoAnswer(f"{owner.engine} at {owner.address} answers {status}")
        return dict(_json(owner, body))
    except _NoAnswer as why:
        note(str(why))
        return None


def list_(config: Config, note: Note, wanted: Filter, limit: int | None) -> Found | None:
    """The newest instances that the owners of all partitions report; None, and a note why, if one of them does not answer.  Raises TransportError."""
    query = urlencode([*wanted.query(), *([("limit", str(limit))] if limit is not None else [])])
    try:
        numbers = range(_partitions(config))
        owners = _owners(config, numbers)
        rows: list[dict[str, Any]] = []
        counts: Counter[str] = Counter()
        told: list[int] = []
        for owner in sorted(set(owners.values()), key=lambda owner: owner.engine):
            status, headers, body = _get(owner, f"/instances?{query}")
            if status != 200:
                raise _NoAnswer(f"{owner.engine} at {owner.address} answers {status}")
            found = _found(owner, body, wanted, limit)
            rows += found.rows
            counts.update(found.counts)
            told += [int(number) for number in headers.get("Kwflow-Partitions", "").split(",") if number.isdigit()]
        if sorted(told) != list(numbers):
            raise _NoAnswer("partitions are moving from one engine to another")
        return Found(newest_of(rows, limit).rows, dict(counts))
    except _NoAnswer as why:
        note(str(why))
        return None


def _found(owner: Owner, body: bytes, wanted: Filter, limit: int | None) -> Found:
    try:
        return found_in(_json(owner, body), wanted, limit)
    except msgspec.ValidationError as error:  # such as a bad header that an older engine lets pass
        raise _NoAnswer(f"the answer of {owner.engine} at {owner.address} is not a list of instances: {error}") from None


def _partitions(config: Config) -> int:
    there = topics.partitions_of(topics.admin(config), config)
    if config.owners_topic not in there or config.resume_topic not in there:
        raise _NoAnswer(f"there is no topic {config.owners_topic if config.owners_topic not in there else config.resume_topic}")
    return there[config.resume_topic]


def _owners(config: Config, numbers: Any) -> dict[int, Owner]:
    """Partition -> its owner, each with an address."""
    said = latest(config, config.owners_topic)
    found: dict[int, Owner] = {}
    for number in numbers:
        where = f"{config.resume_topic}[{number}]"
        value = said.get(owner_key(config.resume_topic, number))
        if value is None:
            raise _NoAnswer(f"no engine owns {where}")
        try:
            owner = found[number] = msgspec.json.decode(value, type=Owner)
        except msgspec.DecodeError:
            raise _NoAnswer(f"the entry for {where} in {config.owners_topic} cannot be read") from None
        if owner.address is None:
            raise _NoAnswer(f"{owner.engine}, which owns {where}, was started without --http")
    return {number: msgspec.structs.replace(owner, since=0) for number, owner in found.items()}  # without `since`, so that one engine is equal in all of its partitions


def _get(owner: Owner, path: str) -> tuple[int, Message, bytes]:
    """(status, headers, body) of the owner's answer."""
    try:
        try:
            answer = _OPENER.open(f"http://{owner.address}{path}", timeout=_TIMEOUT_S)
        except urllib.error.HTTPError as error:
            answer = error
        with answer:
            status, headers, body = answer.status, answer.headers, answer.read()
    except (OSError, HTTPException, ValueError) as error:
        raise _NoAnswer(f"{owner.engine} does not answer at {owner.address}: {error}") from None
    if (who := headers.get("Kwflow-Engine")) != owner.engine:
        raise _NoAnswer(f"{who or 'something else'} answers at {owner.address}, not {owner.engine}")
    return status, headers, body


def _json(owner: Owner, body: bytes) -> Any:
    try:
        return msgspec.json.decode(body)
    except msgspec.DecodeError:  # it gave a partition away while it answered, and so ended the answer early
        raise _NoAnswer(f"the answer of {owner.engine} at {owner.address} is incomplete") from None

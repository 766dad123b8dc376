"""Checks every output of an instance, in order, against its workflow's source (native.py): exactly these must have been written.

A parked instance continues with its held records, in order, as if nothing had happened; only senders that waited for a reply
notice.  Left out is what depends on more than an instance's records: states that cannot be saved or are too large, outputs that
the broker refuses, and records that kill; instances of which a record was discarded, or that were terminated or paused while
they were parked; and schedules, which are kwflow's own code.
"""

import collections
import json
import math
import re
from typing import Any

from kwflow.core.murmur2 import partition_of
from kwflow.testing.kafka.log import Entry
from tests.simulation import fed, native
from tests.simulation.activities import MAIL, QUEUE
from tests.simulation.world import Failed, World

OWN = ("sim-ask", "sim-said", "result", "error")


class Log:
    """The visible records of a run, sorted by what they belong to."""

    def __init__(self, world: World, entries: dict[tuple[str, str], list[Entry]], places: dict[Entry, tuple[str, int]], dead: set[tuple[int, int]]) -> None:
        """`dead`: (partition, offset) of records in the resume topic that were dead-lettered alone."""
        self.world = world
        self.places = places
        self.names = {world.config.result_topic: "result", world.config.error_topic: "error", world.config.resume_topic: "resume", world.config.scheduler_topic: "scheduler"}
        self.inputs: dict[str, list[Entry]] = collections.defaultdict(list)
        self.outputs: dict[str, list[native.Said]] = collections.defaultdict(list)  # id -> its outputs, in order for each topic and key
        self.replies: dict[str, list[tuple[str, Any]]] = collections.defaultdict(list)
        self.fired: collections.Counter[str] = collections.Counter()  # timer's key -> how often it fired
        self.parked: set[str] = set()
        self.disturbed: set[str] = set()
        forwarded = {headers["kwflow-sim-sent"] for mine in entries.values() for entry in mine if "kwflow-forwarded" in (headers := dict(entry.headers))}
        started = [(key, dict(entry.headers)) for (topic, key), mine in entries.items() if topic == world.config.resume_topic for entry in mine]
        self.children = {headers["kwflow-parent"]: key for key, headers in started if "kwflow-parent" in headers}
        for (topic, key), mine in entries.items():
            for entry in mine:
                headers = dict(entry.headers)
                if "kwflow-error-feed" in headers or headers.get("kwflow-op") == b"feed":
                    continue  # belongs to no instance (fed.py)
                if topic == world.config.resume_topic:
                    sent_on = entry.transaction is None and headers.get("kwflow-sim-sent") in forwarded
                    if not sent_on and (places[entry][1], entry.offset) not in dead:
                        self.inputs[key].append(entry)
                if topic == world.config.dead_letter_topic:
                    reason = headers["kwflow-error-reason"]
                    if reason == b"parked":
                        self.parked.add(key)
                    elif reason == b"hold-full" or (reason == b"refused" and headers.get("kwflow-op") != b"update"):
                        self.disturbed.add(key)
                elif topic == world.config.reply_topic:
                    told = json.loads(entry.value or b"")
                    self.replies[told["request"]].append((told["status"], told["value"]))
                elif entry.transaction is not None and "kwflow-forwarded" not in headers and not fed.is_fed(world, places[entry], entry):
                    self._output(topic, key, entry, headers)

    def _output(self, topic: str, key: str, entry: Entry, headers: dict[str, bytes | None]) -> None:
        """Assign an output to the instance that wrote it."""
        name = self.names.get(topic, topic)
        if name in (QUEUE, MAIL):
            self.outputs[key.rpartition("|")[0]].append((name, key, json.loads(entry.value) if entry.value is not None else None))
        if name not in (*OWN, "resume", "scheduler"):
            return
        text = (entry.value or b"").decode()
        run = (headers.get("kwflow-parent") or headers.get("kwflow-start-id") or b"").decode()
        if name in OWN:
            self.world.happened["rejected by a workflow"] += text.startswith("rejected ")
            self.outputs[key].append((name, key, json.loads(text) if name in ("result", "error") else text))
        elif name == "scheduler":
            self.outputs[key.partition("|")[0]].append((name, key, text))
        elif name == "resume" and text.startswith("new:") and "kwflow-parent" in headers:
            self.outputs[run.partition("|")[0]].append((name, key, {"new": json.loads(text[4:]), "parent": run}))
        elif name == "resume" and headers.get("kwflow-op") in (b"cancel", b"terminate"):
            self.outputs[run.partition("|")[0]].append((name, key, {"op": (headers["kwflow-op"] or b"").decode(), "start": run}))
        elif name == "resume" and headers.get("kwflow-op") == b"signal" and entry.transaction is not None and "from" in text:
            self.outputs[json.loads(text)["value"]["from"]].append((name, key, json.loads(text)))
            self.world.happened["told by a workflow"] += 1
        elif name == "resume" and entry.transaction is not None and entry.transaction.producer.startswith("sim-scheduler-"):
            self.fired[f"{key}|{text}"] += 1
        elif name == "resume" and "kwflow-op" not in headers:
            value = json.loads(text) if text[:1] == "{" else {}
            self.outputs[self.children.get(f"{key}|{value.get('ref')}".encode(), key)].append((name, key, value))  # the end of a child, or else the effect of a discard

    def away(self, entry: Entry) -> bool:
        """Whether the copy that this record asks for would belong to another partition."""
        copy = self.copy(entry)
        return copy is not None and partition_of(copy.encode(), self.world.partitions) != self.places[entry][1]

    @staticmethod
    def copy(entry: Entry) -> str | None:
        return json.loads(entry.value or b"")["id"] if ("kwflow-op", b"fork") in entry.headers else None

    def record(self, entry: Entry) -> native.Record:
        headers = {name: (value or b"").decode() for name, value in entry.headers}
        text = (entry.value or b"").decode()
        waits = headers.get("kwflow-request") if int(headers.get("kwflow-reply-to", "0/").partition("/")[0]) < self.world.partitions else None
        return {
            "offset": entry.offset, "at": entry.timestamp_ms, "value": {"new": json.loads(text[4:])} if text.startswith("new:") else json.loads(text), "op": headers.get("kwflow-op"),
            "away": self.away(entry), "fork start": f"fork-{self.places[entry][1]}-{entry.offset}",
            "id": headers.get("kwflow-id"), "start": headers.get("kwflow-start-id"), "request": waits, "parent": headers.get("kwflow-parent"),
        }  # fmt: skip


def check(log: Log) -> None:
    """Raises Failed, which names the first instance whose outputs are wrong."""
    happened = log.world.happened
    made = {copy: id for id, entries in log.inputs.items() for entry in entries if (copy := log.copy(entry)) is not None}
    unheard = log.outputs.keys() - log.inputs.keys() - made.keys()
    if unheard:
        raise Failed(f"outputs of instances that nobody has sent anything: {sorted(unheard)}")
    for id in {**log.inputs, **made}:
        instances: list[native.Instance] = []
        try:
            instance = _played(log, id, made, instances)
        except native.Unpredicted:
            instance = None
        finally:
            for one in instances:
                one.close()
        happened["outputs not predicted" if instance is None else "outputs predicted"] += len(log.outputs[id])
        if instance is not None:
            happened["went back as predicted"] += instance.went_back
            happened["copies predicted"] += id in made and instance.id == id and bool(instance.said)
            _same(log, id, instance)
            records = [log.record(entry) for entry in log.inputs[id]]
            at_once = ("pause", "query", "unpause") if id in log.parked else ()  # these commands overtake held records
            _same_replies(log, id, instance, [record["request"] for record in records if record["request"] and record["op"] not in at_once])
            _fired(log, instance)


def _played(log: Log, id: str, made: dict[str, str], instances: list[native.Instance], until: float = math.inf) -> native.Instance:
    """Play an instance's records, up to an offset.  A copy is its original, played again up to the fork.  Raises Unpredicted."""
    entries = log.inputs[id]
    schedule = any(dict(entry.headers).get("kwflow-workflow") not in (None, b"main") for entry in entries)
    ops = {dict(entry.headers).get("kwflow-op") for entry in entries}
    if schedule or id in log.disturbed or (id in log.parked and ops & {b"discard", b"pause", b"terminate", b"fork", b"rewind"}):
        raise native.Unpredicted(id)
    instance, since = native.Instance(id, log.world.checkpoints), -1
    if id in made:
        origin = _played(log, made[id], made, instances)
        record = next((record for record in origin.forks if record["value"]["id"] == id), None)
        if record is not None:
            since, at = record["offset"], record["value"].get("at")
            instance = _played(log, made[id], made, instances, since if at is None else origin.reached(at))
            instance.become(id, record)
    instance.earlier = lambda offset: _played(log, id, made, instances, offset)
    instances.append(instance)
    for entry in entries:
        if since < entry.offset <= until:
            instance.apply(log.record(entry))
    return instance


def _same(log: Log, id: str, instance: native.Instance) -> None:
    wanted, found = (_by_key(outputs) for outputs in (instance.said, log.outputs[id]))
    for place in sorted({*wanted, *found}):
        if not _equal(place[0], wanted.get(place, []), found.get(place, [])):
            raise Failed(f"{id} has written to {place}:\n  {found.get(place)}\nand its source says\n  {wanted.get(place)}")


def _same_replies(log: Log, id: str, instance: native.Instance, requests: list[str]) -> None:
    for request in requests:
        seen, replies = log.replies.get(request, []), instance.replies.get(request, [])
        if len(seen) != len(replies) or not all(_answers(one, wanted, id in log.parked) for one, wanted in zip(seen, replies, strict=True)):
            raise Failed(f"{id} has answered {request} with {seen}, and its source says {replies}")


def _answers(seen: tuple[str, Any], wanted: tuple[str, Any], parked: bool) -> bool:
    """Whether a reply is as wanted; `...` stands for any value.  The sender of a record for a parked instance is told so at once, and gets no other reply."""
    return (parked and seen == ("held", None)) or (seen[0] == wanted[0] and wanted[1] in (..., seen[1]))


def _fired(log: Log, instance: native.Instance) -> None:
    """A timer fires exactly once each time it is set, or at most once if it was cancelled: at the end of a run nothing is due any more."""
    for (topic, key), values in _by_key(instance.said).items():
        often = sum(value != "0" for value in values)  # more than once after going back
        if topic == "scheduler" and not (log.fired[key] == often if "0" not in values else log.fired[key] <= often):
            raise Failed(f"the timer {key} with {values} fired {log.fired[key]} times")


def _by_key(outputs: list[native.Said]) -> dict[tuple[str, str], list[Any]]:
    found: dict[tuple[str, str], list[Any]] = collections.defaultdict(list)
    for topic, key, value in outputs:
        found[topic, key].append(_of_any_release(value))
    return found


def _of_any_release(value: Any) -> Any:
    """The value without what says which code it came from, which meaning.py checks."""
    if isinstance(value, dict):
        return {name: _of_any_release(one) for name, one in value.items() if name not in ("began", "ended", "helper")}
    if isinstance(value, list):
        return [_of_any_release(one) for one in value]
    return re.sub(r", 'began': 'main \d+', 'ended': 'main \d+', 'helper': \d+", "", value) if isinstance(value, str) else value


def _equal(topic: str, wanted: list[Any], found: list[Any]) -> bool:
    """Whether outputs are equal.  Of an error only the first word counts, as the text may be the product's own."""
    if topic != "error":
        return wanted == found
    first_words = [[one.split(":")[0] if isinstance(one, str) else one for one in values] for values in (wanted, found)]
    return first_words[0] == first_words[1]

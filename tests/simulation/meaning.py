"""What must be true of a run whatever the processors say: outcomes that are known in closed form, and what no record may do.

The only product code that runs here reads a snapshot's header.  Checked are sums of accounts, the undo order of sagas, outcomes
of activities by their plans, times of schedules, and replies; the version that an instance begins and ends on (G10), and what an
older kwflow may do to a snapshot that a newer one saved (G7).
"""

import collections
import datetime
import json
import re
from collections.abc import Collection
from typing import Any

from kwflow.core import snapshot
from kwflow.runners.checkpoints import of_checkpoint
from kwflow.testing.kafka.log import Entry, Place, Transaction
from tests.simulation import predicted
from tests.simulation.activities import ATTEMPTS_MAX, QUEUES
from tests.simulation.ledger import Ledger
from tests.simulation.releases import NAME, Release
from tests.simulation.world import Failed, World

Reply = tuple[str, Any]
UNPLANNED = ("WorkerDied", "OutcomeUnknown", "TransportError")  # how attempts in workers fail whatever their plan is: with their worker, or as nobody has told them where to continue


def check(world: World, ledger: Ledger) -> None:
    """Raises Failed, which names the first thing that is wrong."""
    log = _Log(world, ledger)
    _Code(world).check(ledger)
    for id in world.clients.special.accounts:
        _account(log, id)
    for id in world.clients.special.sagas:
        _saga(log, id)
    for id in world.clients.special.schedules:
        _schedule(log, id)
    _calls(world, log)
    if not world.rewind_share:  # who goes back makes calls again
        _begun_once(world, ledger, log)
    predicted.check(predicted.Log(world, log.records, log.place, log.dead))


class _Log:
    """The visible records of a run by topic and key, in order."""

    def __init__(self, world: World, ledger: Ledger) -> None:
        self.config = world.config
        self.records: dict[tuple[str, str], list[Entry]] = collections.defaultdict(list)
        self.keys: dict[str, list[str]] = collections.defaultdict(list)
        self.dead: set[tuple[int, int]] = set()  # records of the resume topic that were dead-lettered alone
        self.place: dict[Entry, Place] = {}
        for place in ledger.entries:
            for entry in ledger.visible(place):
                key = (entry.key or b"").decode("utf-8", "replace")
                self.records[place[0], key].append(entry)
                self.keys[place[0]].append(key)
                self.place[entry] = place
                headers = dict(entry.headers)
                if place[0] == world.config.dead_letter_topic and headers["kwflow-error-reason"] != b"parked" and headers["kwflow-error-topic"] == world.config.resume_topic.encode():
                    self.dead.add((int(headers["kwflow-error-partition"] or 0), int(headers["kwflow-error-offset"] or 0)))

    def inputs(self, id: str) -> list[Entry]:
        """The records for this id that were not dead-lettered, in the order in which they are applied."""
        return [entry for entry in self.records[self.config.resume_topic, id] if (self.place[entry][1], entry.offset) not in self.dead]

    def results(self, id: str) -> list[Any]:
        return [_json(entry) for entry in self.records[self.config.result_topic, id]]

    def replies(self) -> dict[str, list[Reply]]:
        found: dict[str, list[Reply]] = collections.defaultdict(list)
        for (topic, _), entries in self.records.items():
            for entry in entries if topic == self.config.reply_topic else ():
                reply = _json(entry)
                found[reply["request"]].append((reply["status"], reply["value"]))
        return found

    def said(self, id: str) -> list[list[str]]:
        return [(entry.value or b"").decode().split(" ") for entry in self.records["sim-said", id]]


def _json(entry: Entry) -> Any:
    return json.loads(entry.value or b"null")


def _wrong(what: str, found: object, wanted: object) -> None:
    if found != wanted:
        raise Failed(f"{what}: is {found}, should be {wanted}")


# -- accounts ------------------------------------------------------------------------------------------------------------
def _account(log: _Log, id: str) -> None:
    """M1.4, M2, M3: an account's total is the sum of the values it was sent, each command counted once, whichever wait read it.

    Each request is answered once, an update with twice its value.
    """
    total = heard = 0
    done: dict[bytes | None, Reply] = {}
    wanted: dict[str, list[Reply]] = {}
    for entry in log.inputs(id):
        headers = dict(entry.headers)
        op, command = headers.get("kwflow-op"), headers.get("kwflow-id")
        if op not in (b"signal", b"update"):
            continue
        if command not in done:
            value = _json(entry)["value"]
            if op == b"update" and value < 0:
                done[command] = ("rejected", None)
            else:
                total, heard = total + (value or 0), heard + (value is not None)
                done[command] = ("ok", 2 * value) if op == b"update" else ("delivered", None)
        wanted[(headers["kwflow-request"] or b"").decode()] = [done[command]]
    _wrong(f"the result of {id}", [result["found"] for result in log.results(id)], [[total, heard]])
    replies = log.replies()
    found = {request: replies.get(request, []) for request in wanted}
    held = {request: mine for request, mine in found.items() if mine == [("held", None)]}  # the sender was told so at once, as the account was parked
    _wrong(f"the replies of {id}", found, wanted | held)


# -- sagas ---------------------------------------------------------------------------------------------------------------
def _saga(log: _Log, id: str) -> None:
    """Bookings are undone in reverse order if the saga fails, and not at all if it does not."""
    lines = log.said(id)
    booked = [line[1:] for line in lines if line[0] == "answered"]
    undone = [line[1:] for line in lines if line[0] == "undo"]
    failed = [line for line in lines if line[:2] == ["saga", "failed"]]
    _wrong(f"how often {id} ended", len(log.results(id)) + len(log.records[log.config.error_topic, id]), 1)
    _wrong(f"what {id} has undone", undone, booked[::-1] if failed else [])
    _wrong(f"whether {id} failed", bool(failed), not log.results(id))
    for result in log.results(id):
        _wrong(f"the result of {id}", [str(value) for value in result["found"]], [value for _, value in sorted(booked)])


# -- activities ----------------------------------------------------------------------------------------------------------
def outcomes(kind: str, plan: list[str], failures: Collection[str] = ()) -> set[Any]:
    """How a call with this plan may end: in one way, unless its attempts have a timeout (which an engine that is down lets pass), or have failed in these other ways."""
    found: set[Any] = set()
    limited = kind.endswith("timed")
    for attempt in range(1, ATTEMPTS_MAX + 1):
        word = plan[min(attempt, len(plan)) - 1]
        if word not in ("fail", "kill"):
            found.add("refused" if word == "refuse" else attempt)
        if found and not limited and not failures:
            return found
    return found | {"ValueError"} | ({"Timeout"} if limited else set()) | set(failures)


def _unplanned(entry: Entry) -> list[str]:
    return [type for type in UNPLANNED if b'"type":"%s"' % type.encode() in (entry.value or b"")]


def _calls(world: World, log: _Log) -> None:
    """M6: each call ends as its plan says, and there are no more results than attempts that ended."""
    failed = {id: found for id in dict.fromkeys(log.keys[world.config.resume_topic]) if (found := {type for entry in log.records[world.config.resume_topic, id] for type in _unplanned(entry)})}
    for id in dict.fromkeys(log.keys["sim-said"]):
        for line in log.said(id):
            if line[0] == "called":
                kind, text = line[1], " ".join(line[2:])
                plan, end = json.JSONDecoder().raw_decode(text)
                outcome = json.loads(text[end:])
                discarded = any(("kwflow-op", b"discard") in entry.headers for entry in log.records[world.config.resume_topic, id])
                here = {type for other, types in failed.items() if id == other or id.startswith(f"{other}-") for type in types}  # the id itself, or that of its original
                may = outcomes(kind, plan, here if kind in QUEUES else ())
                if outcome not in may | ({"Discarded"} if discarded else set()):
                    raise Failed(f"a call of {id} to {kind} with {plan} ended with {outcome}, not one of {may}")
    for id in dict.fromkeys(log.keys[world.config.resume_topic]):
        told = [_json(entry) for entry in log.records[world.config.resume_topic, id] if entry.transaction is None and dict(entry.headers).keys().isdisjoint({"kwflow-sim-sent", "kwflow-op"})]
        results = collections.Counter(answer["ref"] for answer in told if answer.get("error", {}).get("type") not in ("Timeout", *UNPLANNED))
        ran = sum(count for (key, _, _), count in world.performed.items() if key.partition("|")[0] == id)
        if sum(results.values()) > ran:
            raise Failed(f"M6: {id} got {dict(results)}, and {ran} attempts ended")


def _begun_once(world: World, ledger: Ledger, log: _Log) -> None:
    """M6.5: an engine that comes after an answer was applied, or kept for a workflow that is parked or paused, does not begin its call again.  A worker may, if another had no time to note it."""
    passed: dict[Place, list[tuple[int, float]]] = collections.defaultdict(list)
    for transaction, _ in ledger.transactions():
        for place, end in transaction.groups.get(world.config.application_id, {}).items():
            passed[place].append((end, transaction.decided_ms))
    taken_ms: dict[str, float] = {}  # call -> when an engine had taken its answer
    for id in dict.fromkeys(log.keys[world.config.resume_topic]):
        for entry in log.inputs(id):
            told = _json(entry) if (entry.value or b"").startswith(b"{") and "kwflow-op" not in dict(entry.headers) else {}
            if "ref" in told:
                taken_ms.setdefault(f"{id}|{told['ref']}", next(ms for end, ms in passed[log.place[entry]] if end > entry.offset))
    lives = {f"{machine.name}/{number}": life.begun for machine in world.machines if "engine" in machine.roles for number, life in enumerate(machine.lives)}
    for begun in world.broker.book.begun:
        answered_ms = taken_ms.get(begun.idempotency_key, float("inf")) if begun.attempt == 1 else float("inf")  # later attempts have refs of their own
        if lives.get(begun.process, 0) > answered_ms:
            raise Failed(f"M6.5: {begun.process} began {begun.idempotency_key} again at {begun.ms:.1f}, whose answer an engine had taken at {answered_ms:.1f}")


# -- schedules -----------------------------------------------------------------------------------------------------------
def _schedule(log: _Log, id: str) -> None:
    """Each run starts once, at a multiple of the interval, and after the end of the previous one unless they may overlap; the schedule reports their number."""
    [begun] = [entry for entry in log.inputs(id) if (entry.value or b"").startswith(b"new:")]
    plan = json.loads((begun.value or b"")[4:])
    names = [key for key in log.keys[log.config.resume_topic] if key.startswith(f"{plan['name']}@")]
    starts = [entry for name in dict.fromkeys(names) for entry in log.records[log.config.resume_topic, name] if (entry.value or b"").startswith(b"new:")]
    starts.sort(key=lambda entry: (_decided_ms(entry), _time_ms((entry.key or b"").decode())))
    ids = [(entry.key or b"").decode() for entry in starts]
    _wrong(f"runs of {id} that were started twice", [name for name, count in collections.Counter(ids).items() if count > 1], [])
    planned = [_time_ms(name) for name in ids if "+" not in name]
    _wrong(f"runs of {id} that are off its interval", [at for at in planned if (at - begun.timestamp_ms) % plan["every_ms"]], [])
    _wrong(f"the order of the runs of {id}", planned, sorted(planned))
    if plan["overlap"] != "allow":
        for before, after in zip(starts, starts[1:], strict=False):
            ended = [_decided_ms(entry) for topic in (log.config.result_topic, log.config.error_topic) for entry in log.records[topic, (before.key or b"").decode()]]
            refused = log.records[log.config.dead_letter_topic, (before.key or b"").decode()]  # it may have been discarded
            if not refused and (not ended or min(ended) >= _decided_ms(after)):
                raise Failed(f"{after.key!r} began before {before.key!r} had ended, and {plan['overlap']} is its policy")
    _wrong(f"what {id} says of its runs", [result["runs"] for result in log.results(id)], [len(starts)])


def _decided_ms(entry: Entry) -> float:
    return entry.appended_ms if entry.transaction is None else entry.transaction.decided_ms


def _time_ms(name: str) -> int:
    """The time of a run that is named `<schedule>@<ISO 8601>`, in ms since the epoch."""
    text = re.sub(r"^[^@]*@|[+].*", "", name).replace("Z", "+00:00")
    return round(datetime.datetime.fromisoformat(text).timestamp() * 1000)


# -- code ----------------------------------------------------------------------------------------------------------------
class _Code:
    """Checks G7 and G10 for all committed snapshots and results, in order: on which code each instance continues, whichever releases its owners run.

    An instance begins on the code of the process that starts it, keeps its own main whatever is deployed, unless it is moved in place,
    and takes the helpers of a process that runs the same main.
    """

    def __init__(self, world: World) -> None:
        self.world = world
        self.sources: set[str] = set()
        self.saved: dict[tuple[int, bytes], tuple[dict[str, Any], bytes]] = {}
        self.runs: dict[tuple[int, bytes], Release] = {}  # the code that an instance's last snapshot names
        self.ever: dict[tuple[int, bytes], set[Release]] = collections.defaultdict(set)  # of instances that may go back: the code of each of their snapshots
        self.bodies: dict[tuple[int, bytes], set[bytes]] = collections.defaultdict(set)  # likewise
        self.known = {release.version: release.code for release in world.deployed}

    def check(self, ledger: Ledger) -> None:
        for transaction, entries in ledger.transactions():
            self.sources |= {(entry.key or b"").decode() for place, entry in entries if place[0] == self.world.config.code_topic and entry.value is not None}
            results = [entry for place, entry in entries if place[0] == self.world.config.result_topic and b'"began"' in (entry.value or b"")]
            states = [(place[1], entry) for place, entry in entries if place[0] == self.world.config.changelog_topic and not (entry.key or b"").startswith(b"\0")]
            if not results and not states:
                continue
            now = self.world.release_of(transaction)
            kept = [((place[1], of), entry.value) for place, entry in entries if (of := of_checkpoint(entry.key or b"")) is not None and entry.value is not None]
            headers = {(number, entry.key or b""): snapshot.split(entry.value)[0] for number, entry in states if entry.value is not None}
            made = {key: header for key, header in headers.items() if "forked" in header and self.saved.get(key, ({}, b""))[0].get("start_id") != header["start_id"]}
            for key, value in kept:
                if key not in made:
                    self._checkpoint(now.code, key, value)
            for key in made:
                self._copied(key, made)
            for key, value in kept:
                if key in made:
                    self._checkpoint(now.code, key, value)
            for entry in results:
                self._result(_json(entry), entry.key or b"", now)
            for number, entry in states:
                self._snapshot(transaction, now, number, entry)

    def _may_be_moved(self, key: bytes) -> bool:
        """Whether somebody wanted to move this instance, or one that it is a copy of: it may have been copied in the transaction of the move."""
        return any(key == moved or key.startswith(moved + b"-") for moved in self.world.moved)

    def _goes_on_in(self, before: Release | None, now: Release) -> Release:
        return now if before is None or before.main == now.main else before

    def _checkpoint(self, now: Release, key: tuple[int, bytes], data: bytes) -> None:
        """What is kept to go back to: of an instance that began and ended in one transaction, the only snapshot that names its code."""
        header, body = snapshot.split(data)
        self.bodies[key].add(body)
        if NAME in header["code"]:
            runs = self.known[header["code"][NAME]["version"]]
            if runs not in {self._goes_on_in(self.runs.get(key), now), now, *self.ever[key]} and not self._may_be_moved(key[1]):
                raise Failed(f"G10: a checkpoint of {key} is saved on {runs}, not on one of {[now, self.runs.get(key), *self.ever[key]]}")
            self.ever[key].add(runs)

    def _snapshot(self, transaction: Transaction, now: Release, number: int, entry: Entry) -> None:
        key = (number, entry.key or b"")
        gone: dict[str, Any] = {"status": "gone"}
        header, body = snapshot.split(entry.value) if entry.value is not None else (gone, b"")
        code = header.get("code", {})
        missing = [f"{reference.partition('@')[0]}@{saved['version']}" for reference, saved in code.items()]
        if not set(missing) <= self.sources:
            raise Failed(f"G10: {key} is saved on code that is not stored: {missing}; {transaction.producer} at {transaction.decided_ms:.1f}")
        before, before_body = self.saved.get(key, ({}, b""))
        alive = header["status"] not in ("gone", "ended")
        if alive and before.get("lowering", 0) > now.lowering and body not in {before_body, *self.bodies[key]} and not self._went_back(before, header):
            raise Failed(f"G7: {key} was saved by a newer kwflow, and an older one went on with it; {transaction.producer} at {transaction.decided_ms:.1f}")
        self.saved[key] = header, body
        if self.world.checkpoints:
            self.bodies[key].add(body)
        if not alive or NAME not in code:
            self.runs.pop(key, None)
            return
        was, runs = self.runs.get(key) if before.get("start_id") == header["start_id"] else None, self.known[code[NAME]["version"]]
        if before_body != body or was is None:
            held = before.get("code", {}).get(NAME, {}).get("units")  # every function is another one in each release of the main code
            allowed = [self._goes_on_in(was if held else None, now.code)]
            if self._may_be_moved(key[1]) and runs == now.code:
                if runs not in allowed:
                    self.world.happened.update(["was moved", *{f"was moved while it waited for: {wait['kind']}" for wait in header["waits"]}])
                allowed = [*allowed, runs]
            if runs not in {*allowed, *self.ever[key]}:
                raise Failed(f"G10: {key} is saved on {runs} by {transaction.producer} at {transaction.decided_ms:.1f}, not on one of {allowed}")
            self.world.happened["went on in old code"] += runs.main < now.main
            self.world.happened["went on in newer code"] += runs.main > now.main
            self.world.happened["took over new helpers"] += was is not None and was.main == runs.main and was.helper < runs.helper
        self.runs[key] = runs
        if self.world.checkpoints:
            self.ever[key].add(runs)

    def _went_back(self, before: dict[str, Any], header: dict[str, Any]) -> bool:
        """Whether an instance was put back in the transaction that saved this header: it may have gone on then, from what an older kwflow had saved."""
        new = {id: answer for id, answer in header.get("ids", {}).items() if id not in before.get("ids", {})}
        if went_back := any(id.startswith("rewind-") and answer[0] == "ok" for id, answer in new.items()):
            self.world.happened["went on in an older kwflow after going back"] += 1
        return went_back

    def _copied(self, key: tuple[int, bytes], made: dict[tuple[int, bytes], dict[str, Any]]) -> None:
        """A copy made in this transaction, even of another copy, was before it what its original was; an original that began in it was nothing."""
        origin, run = key, ""
        while origin in made:
            forked = made[origin]["forked"]
            origin, run = (key[0], forked["id"].encode()), forked["start_id"]
        header, body = self.saved.get(origin, ({}, b""))
        was = header.get("start_id") == run
        self.ever[key], self.bodies[key] = {*self.ever[origin]}, {*self.bodies[origin]}
        self.saved[key] = ({**header, "start_id": made[key]["start_id"]}, body) if was else ({}, b"")
        self.runs.pop(key, None)
        if was and origin in self.runs:
            self.runs[key] = self.runs[origin]

    def _result(self, result: dict[str, Any], key: bytes, now: Release) -> None:
        """Check the result of an instance that existed before, or that began in this transaction."""
        if not self._may_be_moved(key):
            _wrong(f"G10: the code that {key!r} ended on", result["ended"], result["began"])
        self.world.happened["ended on moved code"] += result["ended"] != result["began"]
        befores = {None, *(runs for (_, other), runs in self.runs.items() if other == key), *(runs for (_, other), ever in self.ever.items() if other == key for runs in ever)}
        allowed = [(f"main {runs.main}", runs.helper) for runs in (self._goes_on_in(before, now.code) for before in befores)]
        if (result["ended"], result["helper"]) not in allowed:
            raise Failed(f"G10: {key!r} ended on {result['ended']} with helper {result['helper']}, not one of {allowed}")

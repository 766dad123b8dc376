"""What must be true of a finished run, according to the sequential model: the same processors, one record after the other, without faults.

Each committed transaction has exactly the outputs and state changes of the records whose offsets it moves past (G1), in order
(G2), and nothing else.  Each timer that fired was due, still set, and no unread record could have cancelled it.  At the end,
every reader sees what one sequential run would have written, and each copy of the state equals that run's.
"""

import collections
import difflib
import functools
import itertools
import json
import pathlib
import re
from typing import Any

import msgspec

from kwflow.core import snapshot, timers
from kwflow.core.murmur2 import partition_of
from kwflow.core.wire import Output, Record
from kwflow.durable import canonical_bytes
from kwflow.ports import Decision
from kwflow.runners.ended import EXPIRES
from kwflow.runners.kafka.state import POSITION
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.overlay import Overlay
from kwflow.runners.timers import TimerProcessor
from kwflow.testing import MemoryStore
from kwflow.testing.kafka.log import Entry, Place, Transaction
from kwflow.testing.kafka.time import START_MS
from tests.simulation import fed, handed_out, meaning, probes, releases
from tests.simulation.ledger import Ledger
from tests.simulation.others import GROUP
from tests.simulation.world import RECORD_BYTES_MAX, Failed, Machine, World

CODE = b"\0code\0"  # when this partition wrote a source: state of the runner itself
_DIED = "the engine died three times with this record"
_UNEQUAL = {"kwflow-due-ms", "kwflow-error-at", "kwflow-error-message", "kwflow-failure-traceback"}  # headers about when and how, which the model cannot know
Form = tuple[str, bytes | None, bytes | None, tuple[tuple[str, bytes | None], ...]]
Timed = tuple[Form, int | None]


def check(world: World) -> None:
    """Raises Failed, which names the first thing that is wrong."""
    ledger = Ledger(world)
    engines, schedulers = WorkflowModel(world, ledger), TimerModel(world, ledger)
    for transaction, entries in ledger.transactions():
        if not transaction.producer.startswith(f"{GROUP}-"):  # fed.py
            model = schedulers if transaction.producer.startswith("sim-scheduler-") else engines
            model.apply(transaction, entries)
    _identities(ledger)
    fed.check(world, ledger)
    engines.finish()
    schedulers.finish()
    _clients(world, ledger)
    _resumes(world, ledger, engines, schedulers)
    meaning.check(world, ledger)
    handed_out.check(world, ledger)
    if world.forgotten:
        raise Failed(f"M6: heartbeat details were lost: {world.forgotten[:5]}")
    if probes.outside:
        raise Failed(f"G8: cleanup of forgotten instances ran: {probes.outside[:5]}")


def form(topic: str, key: bytes | None, value: bytes | None, headers: Any) -> Form:
    if value is not None and value.startswith(b'{"request":'):  # replies contain what the model cannot know: the message of a parked instance, the engine's time of an end, and the place of an error
        value = re.sub(rb',"at":\{[^}]*\}', b"", value)
        value = re.sub(rb'"ended":\d+', b'"ended":0', re.sub(rb'"message":"[^"]*"', b'"message":""', value))
    return topic, key, value, tuple((name, content) for name, content in headers if name not in _UNEQUAL)


def of_output(output: Output) -> Form:
    return form(output.topic, output.key, output.value, output.headers)


@functools.lru_cache(2048)  # what is stored is looked at when it was written, and again at the end in the log and on disks
def state_form(value: bytes | None) -> object:
    """A form of a stored value that is the same for values with the same meaning."""
    if value is None or not value.startswith(b"KWF"):
        return value
    header, body = snapshot.split(value)
    if "parked" in header:
        header["parked"] = {**header["parked"], "message": ""}
    header.pop("ended", None)
    header.get("outcome", {}).pop("at", None)  # an error that was saved has lost its traceback
    return json.dumps(header, sort_keys=True), canonical_bytes(body) if body and header.get("parked", {}).get("was") != "damaged" else body


def _timeless(key: bytes) -> bytes:
    """A key without its time: the table of ended instances is ordered by the engine's clock, which the model cannot know."""
    return EXPIRES + key.split(b"\0", 3)[3] if key.startswith(EXPIRES) else key


def _is_state(key: bytes) -> bool:
    return key != POSITION and not key.startswith(CODE)


def _difference(found: object, wanted: object) -> str:
    lines = [text if isinstance(text := part, str) else repr(part) for part in (found, wanted)] if not isinstance(found, tuple) or not isinstance(wanted, tuple) else None
    pairs = [tuple(lines)] if lines is not None else list(zip(found, wanted, strict=True))  # type: ignore[arg-type,call-overload]
    shown = [line for one, other in pairs for line in difflib.unified_diff(str(one).splitlines(), str(other).splitlines(), "is", "should be", n=0, lineterm="")]
    return "\n".join(shown[:30])


def _in_order(mine: list[Timed], found: list[Timed]) -> bool:
    """Whether these are among the others, in this order."""
    left = iter(found)
    return all(one in left for one in mine)


class Model:
    """The model of one application's partitions, each with its state and its next offset."""

    def __init__(self, world: World, ledger: Ledger, group: str, input_topic: str, changelog: str) -> None:
        self.world = world
        self.ledger = ledger
        self.group = group
        self.input_topic = input_topic
        self.changelog = changelog
        self.stores = [MemoryStore() for _ in range(world.partitions)]
        self.next = [0] * world.partitions
        self.visible = [ledger.visible((input_topic, number)) for number in range(world.partitions)]
        self.outputs: list[Output] = []
        self.counts: collections.Counter[str] = collections.Counter()
        self.refused = self._refusals(ledger)

    def _refusals(self, ledger: Ledger) -> set[tuple[int, int]]:
        """The records that were refused by K19, which needs three deaths."""
        found = set()
        asked = {dict(entry.headers)["number"]: (number, entry.offset) for number, visible in enumerate(self.visible) for entry in visible if ("kwflow-op", b"feed") in entry.headers}
        for number in range(self.world.partitions):
            for entry in ledger.visible((self.world.config.dead_letter_topic, number)):
                headers = dict(entry.headers)
                if re.search(_DIED.encode(), headers.get("kwflow-error-message") or b""):
                    if headers.get("kwflow-error-topic") == self.input_topic.encode():
                        found.add((int(headers["kwflow-error-partition"] or 0), int(headers["kwflow-error-offset"] or 0)))
                    elif headers.get("number") in asked and entry.transaction is not None and not entry.transaction.producer.startswith(f"{GROUP}-"):  # its feed was asked about it again
                        found.add(asked[headers["number"]])
        gone = self.world.crashes + self.world.happened["freeze"]  # for the next owner, a process that is frozen has died
        if found and gone < 3:
            raise Failed(f"K19: {found} refused, and only {gone} processes died")
        return found

    def record(self, number: int, entry: Entry) -> Record:
        return Record(self.input_topic, number, entry.offset, entry.timestamp_ms, entry.key, entry.value, tuple(entry.headers))

    def upto(self, number: int, offset: int) -> list[Record]:
        begin = self.next[number]
        if offset < begin:
            raise Failed(f"{self.group}: {self.input_topic}[{number}] went back from {begin} to {offset}")
        self.next[number] = offset
        return [self.record(number, entry) for entry in self.visible[number] if begin <= entry.offset < offset]

    def positions(self, transaction: Transaction, entries: list[tuple[Place, Entry]]) -> dict[int, int]:
        """The offsets that a transaction moved to: those sent to the group and those in the changelog beside the state must be equal (K14, K16)."""
        sent = {place[1]: offset for place, offset in transaction.groups.get(self.group, {}).items() if place[0] == self.input_topic}
        stored = {place[1]: json.loads(entry.value or b"{}")["next"] for place, entry in entries if place[0] == self.changelog and entry.key == POSITION}
        touched = {place[1] for place, _ in entries if place[0] == self.changelog}
        if sent != stored or not touched <= set(sent):
            raise Failed(f"K14, K16: {self._name(transaction)} sent offsets {sent}, stored {stored}, and touched {touched}")
        return sent

    def _name(self, transaction: Transaction) -> str:
        return f"the transaction of {transaction.producer} decided at {transaction.decided_ms:.1f}"

    def same_outputs(self, transaction: Transaction, expected: dict[int, list[Output]], entries: list[tuple[Place, Entry]]) -> None:
        """Compare outputs per input partition, topic and key, in order, with the timestamps that the model knows (K13); each is where its key belongs (K6)."""
        found: dict[tuple[str, bytes | None], list[Timed]] = collections.defaultdict(list)
        for place, entry in entries:
            if place[0] != self.changelog:
                found[(place[0], entry.key)].append((form(place[0], entry.key, entry.value, entry.headers), entry.timestamp_ms))
                if entry.key is not None and place[0] != self.world.config.reply_topic and place[1] != partition_of(entry.key, self.world.partitions):
                    raise Failed(f"K6: {entry.key!r} of {place[0]} was written to partition {place[1]}")
        wanted: dict[tuple[str, bytes | None], dict[int, list[Timed]]] = collections.defaultdict(lambda: collections.defaultdict(list))
        for number, outputs in expected.items():
            for output in outputs:
                mine = wanted[(output.topic, output.key)][number]
                times = [at for what, at in found[(output.topic, output.key)] if what == of_output(output)]
                before = sum(what == of_output(output) for what, _ in mine)
                mine.append((of_output(output), times[before] if output.timestamp_ms is None and len(times) > before else output.timestamp_ms))
        for where in sorted({*found, *wanted}, key=repr):
            everything = [one for mine in wanted[where].values() for one in mine]
            ordered = where[1] is not None  # without a key they may be in any partition, and have no order
            if sorted(found[where], key=repr) != sorted(everything, key=repr) or (ordered and not all(_in_order(mine, found[where]) for mine in wanted[where].values())):
                raise Failed(f"G1: {self._name(transaction)} wrote to {where}:\n  {found[where]}\nand should have written\n  {everything}")

    def same_changes(self, transaction: Transaction, number: int, before: dict[bytes, bytes | None], entries: list[tuple[Place, Entry]]) -> None:
        """Compare state changes: no state without its outputs; the last record of each key counts (K9).  `before` has the old values of changed keys."""
        found = {_timeless(entry.key or b""): entry.value for place, entry in entries if place == (self.changelog, number) and entry.key != POSITION}
        for key in sorted({*found, *before}):
            wanted = self.stores[number].get(key)
            written = found.get(key, before.get(key, wanted))
            if written != wanted and state_form(written) != state_form(wanted):
                raise Failed(f"G1: {self._name(transaction)}, {self.changelog}[{number}], {key!r} is not as it should be:\n{_difference(state_form(written), state_form(wanted))}")

    def finish(self) -> None:
        """Everything is read, and every copy of the state equals the model's."""
        for number, store in enumerate(self.stores):
            left = [entry.offset for entry in self.visible[number] if entry.offset >= self.next[number]]
            if left:
                raise Failed(f"G3: {self.input_topic}[{number}] was never read from {left[0]} on")
            wanted = {key: state_form(value) for key, value in store.entries.items()}
            committed = self.world.broker.partition((self.changelog, number)).committed()
            replayed = {entry.key or b"": entry.value for entry in committed}
            self._same(f"replay of {self.changelog}[{number}]", wanted, {key: value for key, value in replayed.items() if value is not None and _is_state(key)})
            self._same_on_disk(number, wanted)
            for machine in self.world.machines:
                self._copy(machine, number)

    def _same(self, what: str, wanted: dict[bytes, object], found: dict[bytes, bytes]) -> None:
        forms = {_timeless(key): state_form(value) for key, value in found.items()}
        for key in sorted({*wanted, *forms}):
            if wanted.get(key) != forms.get(key):
                raise Failed(f"{what}: {key!r} is not as it should be:\n{_difference(forms.get(key), wanted.get(key))}")

    def _same_on_disk(self, number: int, wanted: dict[bytes, object]) -> None:
        """Check the local copy of the partition's last owner (K8)."""
        owner = next((share for _, shares in reversed(self.world.broker.group(self.group).history) for share in shares.items() if (self.input_topic, number) in share[1]), None)
        if owner is None:
            return
        instance = owner[0].rpartition("-")[0].removeprefix(f"{self.group}-")
        machine = next(machine for machine in self.world.machines if instance.split(".")[0] == machine.name)  # never a stranger's: those have left
        content = machine.disk.databases.get(self._place(machine, number))
        if content is not None and machine.instance == instance and not content.damaged:
            self._same(f"the disk of {machine.name}, {self.group}[{number}]", wanted, {key[1:]: value for key, value in content.values.items() if key[:1] == b"s" and _is_state(key[1:])})

    def _place(self, machine: Machine, number: int) -> pathlib.Path:
        return machine.directory / "sim" / "0" / self.group / str(number)

    def _copy(self, machine: Machine, number: int) -> None:
        """Check a copy on a disk, whoever wrote it: it must have what was committed up to its offset (K8).

        Keys that changed later are left out, as compaction may have removed their old values before they could be read.
        """
        place = self._place(machine, number)
        content = machine.disk.databases.get(place)
        if content is None or content.damaged or b"mwritten" not in content.values:
            return
        retention_ms = int(self.world.broker.topics[self.changelog].config["delete.retention.ms"])
        if place not in machine.open and abs(START_MS + self.world.time.now + machine.skew_ms - int(content.values[b"mwritten"])) > retention_ms // 2:
            return  # nobody would use it
        reached, log = int(content.values.get(b"moffset", b"0")), self.ledger.visible((self.changelog, number))
        later = {entry.key for entry in log if entry.offset >= reached}
        wanted = {entry.key or b"": entry.value for entry in log if entry.key not in later}
        found = {key[1:]: value for key, value in content.values.items() if key[:1] == b"s" and key[1:] not in later}
        self.world.happened["copies compared"] += 1
        wrong = sorted(key for key in {*wanted, *found} if wanted.get(key) != found.get(key))
        if wrong:
            raise Failed(f"K8: the copy of {self.changelog}[{number}] on {machine.name}, which has reached {reached}, is wrong in {wrong[:5]}")


class WorkflowModel(Model):
    def __init__(self, world: World, ledger: Ledger) -> None:
        super().__init__(world, ledger, "sim", world.config.resume_topic, world.config.changelog_topic)
        self.sources = {(entry.key or b"").decode(): entry.value for entry in ledger.visible((world.config.code_topic, 0))}
        self.code: dict[releases.Release, tuple[releases.Code, WorkflowProcessor]] = {}

    def _run(self, release: releases.Release) -> None:
        """Switch to the code that made the next transaction."""
        if release not in self.code:
            code = releases.Code(release, self.world.checkpoints)
            config = self.world.config.model_copy(update={"instances_cached_max": 0})
            processor = WorkflowProcessor(config, code.workflows, self.world.outputs, self.world.broker.topics[config.resume_topic].id, lambda _: None, self.sources.get)
            processor.partitions = self.world.partitions
            processor.queues = True
            processor.keeps_code = False  # when sources are stored does not depend on one record; meaning.py checks it
            self.code[release] = code, processor
        code, self.processor = self.code[release]
        code.enter()

    def apply(self, transaction: Transaction, entries: list[tuple[Place, Entry]]) -> None:
        self._run(self.world.release_of(transaction))
        entries = [(place, entry) for place, entry in entries if place[0] != self.world.config.code_topic and not (entry.key or b"").startswith(CODE)]
        expected: dict[int, list[Output]] = collections.defaultdict(list)
        for number, offset in sorted(self.positions(transaction, entries).items()):
            before: dict[bytes, bytes | None] = {}
            for record in self.upto(number, offset):
                made, changes = self.decide(number, record)
                changed = {_timeless(key): value for key, value in changes.items()}
                before = {key: self.stores[number].get(key) for key in changed} | before
                expected[number] += made.outputs
                expected[number] += [reply for reply in made.replies if (reply.partition or 0) < self.world.partitions]  # M1.2: others are left out
                if not made.counts:
                    raise Failed(f"G3: {record} counts as nothing")
                self.counts.update(made.counts)
                self.stores[number].apply(changed)
            self.same_changes(transaction, number, before, entries)
        self.outputs += [output for mine in expected.values() for output in mine]
        self.same_outputs(transaction, expected, entries)

    def decide(self, number: int, record: Record) -> tuple[Decision, dict[bytes, bytes | None]]:
        """What this record does alone, including what K6, K11 and K19 do to it."""
        overlay = Overlay(self.stores[number])
        if record.key is not None and partition_of(record.key, self.world.partitions) != number:
            headers = (*record.headers, ("kwflow-forwarded", str(number).encode()))
            return Decision((Output(record.topic, record.key, record.value, headers, record.timestamp_ms),), counts=("forwarded",)), {}
        if (number, record.offset) not in self.refused:
            try:
                [made] = self.processor.decide(overlay, [record], record.timestamp_ms)
            except probes.Killed:
                raise Failed(f"K19: {record} kills every process, and was applied") from None
            if all(len(output.value or b"") < (1 if output.topic == "sim-said" else 2) * RECORD_BYTES_MAX for output in made.outputs):
                return _timed(made), overlay.changes
            overlay = Overlay(self.stores[number])
        return _timed(self.processor.refuse(overlay, record, "")), overlay.changes


def _timed(made: Decision) -> Decision:
    """A decision whose feed's dead letters have no timestamp, as the model cannot know it."""
    letter = [("kwflow-error-feed" in dict(output.headers)) for output in made.outputs]
    return msgspec.structs.replace(made, outputs=tuple(msgspec.structs.replace(output, timestamp_ms=None) if its else output for output, its in zip(made.outputs, letter, strict=True)))


class TimerModel(Model):
    def __init__(self, world: World, ledger: Ledger) -> None:
        super().__init__(world, ledger, "sim-scheduler", world.config.scheduler_topic, world.config.timers_changelog_topic)
        self.processor = TimerProcessor(world.config)
        self._history = [(at, shares) for at, shares in world.broker.group(self.group).history]

    def apply(self, transaction: Transaction, entries: list[tuple[Place, Entry]]) -> None:
        expected: dict[int, list[Output]] = collections.defaultdict(list)
        for number, offset in sorted(self.positions(transaction, entries).items()):
            overlay = Overlay(self.stores[number])
            records = self.upto(number, offset)
            for record in records:
                refused = (number, record.offset) in self.refused
                [made] = [self.processor.refuse(overlay, record, "")] if refused else self.processor.decide(overlay, [record], 0)
                expected[number] += made.outputs
            mine = [entry for place, entry in entries if place == (self.changelog, number)]
            removed = [entry.key or b"" for entry in mine if entry.value is None and (entry.key or b"").startswith(timers.DUE)]
            if not records and any(entry.key == timers.COUNT for entry in mine):  # nothing is removed if the first timer had been cancelled
                for key in sorted(removed):
                    self._may_fire(transaction, number, key, offset, entries)
                fired = self.processor.due(overlay, 2**62, len(removed))
                expected[number] += [msgspec.structs.replace(output, timestamp_ms=None) for output in (fired.outputs if fired is not None else ())]
            before = {key: self.stores[number].get(key) for key in overlay.changes}
            self.stores[number].apply(overlay.changes)
            self.same_changes(transaction, number, before, entries)
        self.outputs += [output for mine in expected.values() for output in mine]
        self.same_outputs(transaction, expected, entries)

    def _may_fire(self, transaction: Transaction, number: int, due_key: bytes, offset: int, entries: list[tuple[Place, Entry]]) -> None:
        due_ms, timer = timers.due_entries(due_key)
        if self.stores[number].get(due_key) is None:
            raise Failed(f"a timer fires twice, or after it was cancelled: {timer!r}, {self._name(transaction)}")
        workflow, _, value = timer.partition(b"|")
        at = [entry.timestamp_ms for place, entry in entries if place[0] == self.world.config.resume_topic and (entry.key, entry.value) == (workflow, value)]
        if not at or min(at) < due_ms:
            raise Failed(f"a timer fires {due_ms - min(at, default=0)} ms early: {timer!r}, {self._name(transaction)}")
        if not self.world.faults.jump and START_MS + transaction.decided_ms < due_ms:
            raise Failed(f"a timer fires before its time: {timer!r}, {self._name(transaction)}")
        self._nothing_before(transaction, number, offset, timer)

    def _nothing_before(self, transaction: Transaction, number: int, offset: int, timer: bytes) -> None:
        """K18: all records that were there when the partition was assigned have been read."""
        place = (self.input_topic, number)
        assigned, holder = 0.0, ""
        for at, shares in self._history:
            if at > transaction.begun_ms:
                break
            now = next((member.rpartition("-")[0] for member, share in shares.items() if place in share), "")
            if now != holder:
                assigned, holder = at, now
        for machine in self.world.machines:
            for life in machine.lives:
                if transaction.producer == f"{self.group}-{life.instance}" and assigned < life.begun <= transaction.begun_ms:
                    assigned = life.begun
        waiting = [entry.offset for entry in self.visible[number] if entry.offset >= offset and self._visible_ms(entry) < assigned]
        if waiting:
            raise Failed(f"K18: {timer!r} fires at {self.input_topic}[{number}]@{offset} although {waiting} were there when the partition was assigned at {assigned:.1f}; {self._name(transaction)}")

    @staticmethod
    def _visible_ms(entry: Entry) -> float:
        return entry.appended_ms if entry.transaction is None else entry.transaction.decided_ms


def _identities(ledger: Ledger) -> None:
    """K1: a process that starts under a name ends that name's open transaction before it begins one of its own."""
    of_name: dict[str, list[Transaction]] = collections.defaultdict(list)
    for transaction in ledger.all():
        of_name[".".join(transaction.producer.split(".")[:1]) + re.sub(r"^[^.]*\.(\d+).*", r".\1", transaction.producer)].append(transaction)
    for name, mine in of_name.items():
        mine.sort(key=lambda transaction: transaction.begun_ms)
        for before, after in itertools.pairwise(mine):
            if before.decided_ms < 0 or before.decided_ms > after.begun_ms:
                raise Failed(f"K1: {name} began a transaction at {after.begun_ms:.1f} although one of {before.begun_ms:.1f} was open until {before.decided_ms:.1f}")


def _clients(world: World, ledger: Ledger) -> None:
    """Everything that clients sent is in the log, exactly once (their producer is idempotent)."""
    sent = collections.Counter(
        dict(entry.headers)["kwflow-sim-sent"]
        for place, entries in ledger.entries.items()
        if place[0] in (world.config.resume_topic, world.config.scheduler_topic, *world.queues)
        for entry in entries
        if entry.transaction is None and "kwflow-sim-sent" in dict(entry.headers)
    )
    if len(sent) != world.clients.sent or max(sent.values(), default=1) > 1:
        raise Failed(f"clients sent {world.clients.sent} records, the log has {sum(sent.values())}")


def _resumes(world: World, ledger: Ledger, engines: WorkflowModel, schedulers: TimerModel) -> None:
    """G3: the input topic has exactly what clients, engines and timers wrote, and so has every other topic."""
    made = collections.Counter(of_output(output) for output in [*engines.outputs, *schedulers.outputs])
    for topic in [world.config.resume_topic, world.config.scheduler_topic, world.config.dead_letter_topic, *world.outputs, world.config.result_topic, world.config.error_topic]:
        for number in range(world.partitions):
            for entry in ledger.visible((topic, number)):
                if entry.transaction is not None and not entry.transaction.producer.startswith(f"{GROUP}-"):
                    made[form(topic, entry.key, entry.value, entry.headers)] -= 1
    wrong = {what: count for what, count in made.items() if count and what[0] != world.config.reply_topic}
    if wrong:
        raise Failed(f"the model and the log differ: {list(wrong.items())[:3]}")

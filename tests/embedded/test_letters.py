"""Retrying a dead letter sends it again and marks it as done in one batch. If that is killed at any moment, or done twice, the letter is sent once."""

import json
import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from kwflow import durable
from kwflow.cli import app
from kwflow.config import Config
from kwflow.core.contract import Workflows
from kwflow.core.wire import Output, Record
from kwflow.runners.embedded import socket
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import serve, submit, submit_all
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.groups import Group, Mark
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.parked import remnant
from kwflow.runners.timers import TimerProcessor
from tests.embedded.shell import Shell
from tests.simulation.faults import Crashed
from tests.simulation.test_embedded import Dying

DONE_HEADER = "kwflow-dead-letter-done"
DONE = Mark("letters", 0, "done", b"0:0")
RECORDS = (Output("resume", b"w", b"again"), Output("letters", b"w", None, ((DONE.name, DONE.value),)))
LETTER = [Group(RECORDS, DONE)]


def written(directory: pathlib.Path) -> tuple[int, int]:
    held = Embedded(directory, sync=False)
    try:
        return len(held.read("resume")), len(held.read("letters"))
    finally:
        held.close()


@pytest.mark.parametrize(("fate", "found"), [("before", (0, 0)), ("after", (1, 1))])
def test_a_process_that_dies_at_the_write_leaves_both_or_neither(tmp_path: pathlib.Path, fate: str, found: tuple[int, int]) -> None:
    held = Embedded(tmp_path, Config(), sync=False)
    held.db = Dying(held.db, lambda: fate)  # type: ignore[assignment]
    with pytest.raises(Crashed):
        held.append_all(LETTER)
    held.close()
    assert written(tmp_path) == found
    assert len(submit_all(tmp_path, LETTER)[0]) == (2 if fate == "before" else 0)
    assert written(tmp_path) == (1, 1)


@pytest.mark.parametrize("engine_runs", [True, False])
def test_two_operators_who_retry_the_same_letter_send_it_once(tmp_path: pathlib.Path, engine_runs: bool) -> None:
    if engine_runs:
        held = Embedded(tmp_path, Config(), sync=False)
        with serve(held):
            answers = [submit_all(tmp_path, LETTER) for _ in range(2)]
        held.close()
    else:
        answers = [submit_all(tmp_path, LETTER) for _ in range(2)]
    assert answers == [[[0, 0]], [[]]]
    assert written(tmp_path) == (1, 1)


def test_a_mark_counts_only_from_its_offset_on(tmp_path: pathlib.Path) -> None:
    """Another letter had this place before the topic was trimmed."""
    held = Embedded(tmp_path, Config(), sync=False)
    held.append_all(LETTER)
    assert held.append_all([Group(RECORDS, Mark("letters", 1, DONE.name, DONE.value))]) == [[1, 1]]
    held.close()


def test_a_letter_that_is_named_twice_in_one_batch_is_sent_once(tmp_path: pathlib.Path) -> None:
    held = Embedded(tmp_path, Config(), sync=False)
    assert held.append_all([*LETTER, *LETTER]) == [[0, 0], []]
    held.close()
    assert written(tmp_path) == (1, 1)


class Counting:
    """A database that counts how much is read from it."""

    def __init__(self, db: Any) -> None:
        self._db = db
        self.reads = 0

    def get(self, key: bytes) -> Any:
        self.reads += 1
        return self._db.get(key)

    def items(self, **options: Any) -> Iterator[Any]:
        for pair in self._db.items(**options):
            self.reads += 1
            yield pair

    def __getattr__(self, name: str) -> Any:
        return getattr(self._db, name)


class Opened(Embedded):
    """Counts how often a database was opened."""

    times = 0

    def __init__(self, *arguments: Any, **options: Any) -> None:
        Opened.times += 1
        super().__init__(*arguments, **options)


def refused(directory: pathlib.Path, number: int) -> Embedded:
    """An engine with this many letters."""
    held = Embedded(directory, Config(), sync=False)
    why = (("kwflow-error-reason", b"json"), ("kwflow-error-message", b"it is none"), ("kwflow-error-topic", b"workflow-resume"))
    held.append_all([Group((Output(Config().dead_letter_topic, b"w%d" % one, b"{", why),)) for one in range(number)])
    return held


def test_retrying_all_letters_reads_as_much_for_each_of_them_however_many_there_are(tmp_path: pathlib.Path) -> None:
    """In the engine's database; the command itself reads the topic once."""
    reads = {}
    for number in (150, 300):
        held = refused(tmp_path / str(number), number)
        counting = held.db = Counting(held.db)  # type: ignore[assignment]
        with serve(held):
            said = CliRunner().invoke(app, ["dead-letters", "retry", "--all", "--embedded", str(held.directory)])
        assert said.output.count("sent again") == number, said.output
        reads[number] = counting.reads
        assert len(held.read("workflow-resume")) == number
        held.close()
    assert reads[300] <= 2 * reads[150] <= 4 * 150


def test_without_an_engine_the_database_is_opened_once_for_a_hundred_letters(tmp_path: pathlib.Path, monkeypatch: pytest.MonkeyPatch) -> None:
    refused(tmp_path, 250).close()
    monkeypatch.setattr(socket, "Embedded", Opened)
    said = CliRunner().invoke(app, ["dead-letters", "discard", "--all", "--embedded", str(tmp_path)])
    assert said.output.count("closed") == 250, said.output
    assert Opened.times == 3
    assert "no instance is parked and no dead letter is open" in str(CliRunner().invoke(app, ["dead-letters", "discard", "--all", "--embedded", str(tmp_path)]).exception)


def test_large_letters_fit_a_request_to_the_engine(tmp_path: pathlib.Path) -> None:
    held = Embedded(tmp_path, Config(), sync=False)
    why = (("kwflow-error-reason", b"json"), ("kwflow-error-topic", b"workflow-resume"))
    held.append_all([Group((Output(Config().dead_letter_topic, b"w", b"x" * 900_000, why),)) for _ in range(20)])
    with serve(held):
        said = CliRunner().invoke(app, ["dead-letters", "retry", "--all", "--embedded", str(tmp_path)])
    assert said.output.count("sent again") == 20, said.output
    held.close()


SOURCE = """
import kwflow as kw

def main(opts):
    while (value := (yield kw.suspend("r"))) != "last":
        held = open(__file__) if value == "unsavable" else None
        yield kw.suspend("s")
"""


def kwflow(directory: pathlib.Path, *command: str) -> str:
    done = CliRunner(env={"COLUMNS": "200"}).invoke(app, [*command, "--embedded", str(directory)])
    return done.output if done.exception is None else str(done.exception)


class Office:
    """An engine that has stopped, and an operator. `parked` is at fault and holds twelve records, `paused` is not at fault; there are three letters."""

    def __init__(self, directory: pathlib.Path) -> None:
        (directory / "kept.py").write_text(SOURCE)
        module = durable.load_source("kept", SOURCE, str(directory / "kept.py"))
        self.directory = directory
        self.config = Config()
        held = Embedded(directory, self.config, sync=False)
        self.processors = [WorkflowProcessor(self.config, Workflows({"main": module.main}, "main"), frozenset(), held.incarnation), TimerProcessor(self.config)]
        for id in ("parked", "paused"):
            held.append(self.config.resume_topic, id.encode(), b"new:null")
        held.append(self.config.resume_topic, b"paused", b'{"reason":"audit"}', (("kwflow-op", b"pause"),))
        for value in (b"unsavable", *(b"held %d" % number for number in range(11))):
            held.append(self.config.resume_topic, b"parked", b'{"ref":"r","value":"%s"}' % value)
        held.append(self.config.resume_topic, b"a", b"{", (("mine", b"travels"),))
        held.append(self.config.resume_topic, b"b", b"[]")
        held.append(self.config.scheduler_topic, b"c|{}", b"soon")
        self.close(held)

    def close(self, held: Embedded) -> None:
        """After everything was applied."""
        while held.step(self.processors):
            pass
        held.close()

    def run(self) -> None:
        self.close(Embedded(self.directory, self.config, sync=False))

    def records(self, topic: str) -> list[Record]:
        held = Embedded(self.directory, self.config, sync=False)
        try:
            return held.read(topic)
        finally:
            held.close()

    def __call__(self, *arguments: str) -> str:
        return kwflow(self.directory, "dead-letters", *arguments)


@pytest.fixture
def office(tmp_path: pathlib.Path) -> Office:
    return Office(tmp_path)


def test_what_is_at_fault_is_listed_with_its_reason_and_what_it_holds_and_what_is_only_paused_is_not(office: Office) -> None:
    rows = [tuple(cell.strip() for cell in line.split("│")[1:-1]) for line in office("list").splitlines() if line.startswith("│")]
    assert [(letter, id, reason, holds) for letter, id, reason, _, holds in rows if reason] == [
        ("", "parked", "UnsavableError", "12"), ("0:1", "a", "bad-json", ""), ("0:2", "b", "bad-message", ""), ("0:3", "c|{}", "bad-delay", ""),
    ]  # fmt: skip
    assert "variable 'held' of main" in rows[0][3] and "a resume is a JSON object" in office("list")
    listed = json.loads(office("list", "--json"))
    assert [(row["letter"], row["id"], row["reason"], row["holds"]) for row in listed] == [
        (None, "parked", "UnsavableError", 12), ("0:1", "a", "bad-json", None), ("0:2", "b", "bad-message", None), ("0:3", "c|{}", "bad-delay", None),
    ]  # fmt: skip
    assert "variable 'held' of main" in listed[0]["message"]


def test_a_parked_instance_is_shown_where_it_waits_with_the_record_at_fault_and_ten_behind_it(office: Office) -> None:
    """An instance that holds nothing is not unknown, either."""
    said = office("show", "parked").splitlines()
    assert said[0].startswith("parked  main  parked at offset 3: UnsavableError: variable 'held'")
    waits, head = said.index(f"  waits for suspension r  main  {said[said.index('the record at fault:') - 1].rpartition('  ')[2]}"), said.index("the record at fault:")
    assert waits == head - 1 and said[waits].endswith("kept.py:5")
    assert said[head + 1 : head + 4] == ["workflow-resume[0]@3", "key    parked", 'value  {"ref":"r","value":"unsavable"}']
    behind = said.index("11 records wait behind it:")
    assert said[behind + 1 :] == [*(f'  workflow-resume[0]@{number + 4} {{"ref":"r","value":"held {number}"}}' for number in range(10)), "  … and 1 more"]
    letter = office("show", "0:1").splitlines()
    assert letter[:3] == [f"{office.config.dead_letter_topic}[0]@1", "key    a", "value  {"]
    assert {"mine: travels", "kwflow-error-topic: workflow-resume", "kwflow-error-partition: 0", "kwflow-error-offset: 15", "kwflow-error-reason: bad-json"} <= set(letter)
    assert {line.partition(": ")[0] for line in letter[3:]} >= {"kwflow-error-timestamp", "kwflow-error-at"}


def test_a_letter_that_is_retried_goes_where_it_came_from_as_it_was_with_its_first_time(office: Office) -> None:
    """K13: the headers that say why it is a letter are not sent."""
    first = {letter.offset: str(letter.timestamp_ms).encode() for letter in office.records(office.config.dead_letter_topic)}
    assert "0:1: sent again" in office("retry", "0:1") and "0:3: sent again" in office("retry", "0:3")
    for topic, offset, key, value, headers in ((office.config.resume_topic, 1, b"a", b"{", (("mine", b"travels"),)), (office.config.scheduler_topic, 3, b"c|{}", b"soon", ())):
        again = office.records(topic)[-1]
        assert (again.key, again.value, again.headers) == (key, value, (*headers, ("kwflow-original-timestamp", first[offset])))


def test_a_table_cuts_no_id_off_however_narrow_it_is(tmp_path: pathlib.Path) -> None:
    """Runs of a schedule differ only at the ends of their ids. In a pipe a row is one line, for grep."""
    held, id = Embedded(tmp_path, sync=False), "nightly@" + "".join(f"{number:03}" for number in range(100))
    held.append(Config().dead_letter_topic, id.encode(), b"{", (("kwflow-error-reason", b"bad-json"),))
    held.db[EmbeddedStore(held.db, Config().changelog_topic).prefix + id.encode()] = b"KWF?"
    held.close()
    for place, *command in ((1, "list"), (2, "dead-letters", "list")):
        said = CliRunner(env={"COLUMNS": "80"}).invoke(app, [*command, "--embedded", str(tmp_path)]).output
        assert "".join(line.split("│")[place].strip() for line in said.splitlines() if line.startswith("│")) == id
        said = CliRunner(env={"COLUMNS": None}).invoke(app, [*command, "--embedded", str(tmp_path)]).output
        assert [line.split("│")[place].strip() for line in said.splitlines() if line.startswith("│")] == [id]


def test_a_letter_that_fails_again_keeps_its_first_time(office: Office) -> None:
    """K13."""
    [first] = [str(letter.timestamp_ms).encode() for letter in office.records(office.config.dead_letter_topic) if letter.key == b"b"]
    for letter in ("0:2", "0:5"):
        assert f"{letter}: sent again" in office("retry", letter)
        office.run()
    again = office.records(office.config.resume_topic)[-1]
    assert (again.key, again.headers) == (b"b", (("kwflow-original-timestamp", first),))


def test_a_letter_whose_sender_was_told_is_a_letter_again_when_it_fails_again(office: Office) -> None:
    """G3, M1.2: one request has one reply, so only the operator learns what becomes of it now."""
    held = Embedded(office.directory, office.config, sync=False)
    headers = (("kwflow-op", b"signal"), ("kwflow-request", b"r"), ("kwflow-reply-to", b"0/p"))
    held.append(office.config.resume_topic, b"nobody", b'{"name":5}', headers)
    office.close(held)
    held = Embedded(office.directory, office.config, sync=False)
    letter = held.read(office.config.dead_letter_topic)[-1]
    held.append(office.config.dead_letter_topic, b"nobody", b'{"name":"s"}', letter.headers)  # as if it had been refused for a reason that was mended since
    office.close(held)
    assert len(office.records(office.config.reply_topic)) == 1
    assert "0:5: sent again" in office("retry", "0:5")
    office.run()
    assert len(office.records(office.config.reply_topic)) == 1
    assert "not-found" in office("list")


def test_a_letter_without_its_record_is_not_sent_but_says_where_that_is(office: Office) -> None:
    """G3, K11: it would be sent as an empty record, whose own letter would hide where the refused one is."""
    held = Embedded(office.directory, office.config, sync=False)
    [made] = remnant(office.config, held.read(office.config.resume_topic)[-1], "too large", 1).outputs
    held.append(made.topic, made.key, made.value, made.headers)
    held.close()
    done = CliRunner().invoke(app, ["dead-letters", "retry", "--all", "--embedded", str(office.directory)])
    assert done.exit_code == 1 and done.output.count("sent again") == 3
    assert "0:4: it does not contain its record, which is workflow-resume[0]@16; send that again from its source, and discard this letter\n" in done.output
    assert "refused" in office("list")
    assert "0:4: closed" in office("discard", "0:4")


def test_a_reason_chooses_among_letters_and_parked_instances(office: Office) -> None:
    assert office("discard", "--reason", "bad-json").startswith("give one ID or LETTER")
    assert office("discard", "0:1", "--reason", "bad-json").startswith("give one ID or LETTER")
    assert office("discard", "--all", "--reason", "none").strip() == "no instance is parked and no dead letter is open with reason none"
    assert office("discard", "--all", "--reason", "bad-json").splitlines() == ["0:1: closed"]
    assert office("retry", "--all", "--reason", "UnsavableError").splitlines() == ["parked: retry requested; the engine does it"]
    assert office("discard", "--all").splitlines() == ["parked: discard requested; the engine does it", "0:2: closed", "0:3: closed"]
    office.run()
    assert office("show", "paused") == "'paused' is neither a parked instance nor an open dead letter; kwflow dead-letters list shows them"


@pytest.mark.parametrize("mark", [b"0:1", b"\xff"])
def test_a_letter_whose_sender_gave_it_our_mark_is_listed_and_closes_no_other(office: Office, mark: bytes) -> None:
    """G3: a letter has all headers of its record."""
    before = office("list")
    held = Embedded(office.directory, office.config, sync=False)
    held.append(office.config.resume_topic, b"marked", b"{", ((DONE_HEADER, mark),))
    office.close(held)
    office.run()
    said = office("list")
    assert "marked" in said and said.count("bad-json") == before.count("bad-json") + 1


def test_a_letter_whose_headers_are_no_text_hides_and_holds_up_none_of_the_others(office: Office) -> None:
    """G3: its sender may have given it any header, and whoever may write to the topic may write any letter."""
    held = Embedded(office.directory, office.config, sync=False)
    held.append(office.config.resume_topic, b"odd", b"{", (("kwflow-original-timestamp", b"\xff"),))
    office.close(held)
    office.run()
    held = Embedded(office.directory, office.config, sync=False)
    held.append(office.config.dead_letter_topic, b"foreign", b"{", (("kwflow-error-reason", b"bad-\xff"), ("kwflow-error-message", b"\xfe")))
    held.close()
    assert "bad-\\xff" in office("list") and '"\\\\xfe"' in office("list", "--json")
    assert office("retry", "--all").count("sent again") == 5
    assert office.records(office.config.resume_topic)[-2].headers == (("kwflow-original-timestamp", b"\xff"),)


def test_one_entry_that_is_damaged_hides_none_of_the_others(office: Office) -> None:
    """It is parked, and then listed, once a record for it arrives. Until then, every command that looks at all instances skips it."""
    held = Embedded(office.directory, office.config, sync=False)
    held.db[EmbeddedStore(held.db, office.config.changelog_topic).prefix + b"damaged"] = b"KWF?"
    office.close(held)
    assert "UnsavableError" in office("list") and "parked at offset 3" in office("show", "parked")
    assert "parked: retry requested" in office("retry", "--all", "--reason", "UnsavableError")
    said = [kwflow(office.directory, *command) for command in (("list",), ("schedule", "list"), ("code", "list"), ("code", "migrate", "--all", "--command-timeout", "0.1"), ("code", "gc"))]
    assert ["damaged" in line for line in said] == [True, False, False, False, True], said
    assert "\"damaged\"," in kwflow(office.directory, "list", "--status", "damaged", "--json")
    assert "at least 0 of 2 are done" in said[3] and said[4] == "damaged is damaged, so the code that it runs is unknown; repair or terminate it first"
    kwflow(office.directory, "resume", "damaged", "r")
    office.run()
    assert "CorruptSnapshotError" in office("list")


def test_a_letter_of_a_queue_is_sent_to_that_queue_again(shell: Shell) -> None:
    """G3, M6.6: a worker could not read it, and no engine can; a key of encryption was missing, say."""
    said = (("kwflow-error-reason", b"bad-job"), ("kwflow-error-topic", b"payments"))
    submit(shell.directory, Config().dead_letter_topic, b"w|1:1", b"{}", said)
    assert "0:0: sent again" in shell("dead-letters", "retry", "--all")
    assert [line.split(maxsplit=1)[1] for line in shell.records("payments")] == ["w|1:1 {}"]

"""A dead letter that is retried is sent again and marked as done in one batch: killed at any moment, or done twice, it is sent once."""

import pathlib
from collections.abc import Iterator
from typing import Any

import pytest
from typer.testing import CliRunner

from kwflow.cli import app
from kwflow.config import Config
from kwflow.core.wire import Output
from kwflow.runners import socket
from kwflow.runners.embedded import Embedded
from kwflow.runners.embedded_state import Group, Mark
from kwflow.runners.socket import serve, submit_all
from tests.simulation.faults import Crashed
from tests.simulation.test_embedded import Dying

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
    """A database that counts what is read of it."""

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
    """An engine with so many letters."""
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
    assert "nothing is parked and no dead letter is open" in str(CliRunner().invoke(app, ["dead-letters", "discard", "--all", "--embedded", str(tmp_path)]).exception)


def test_large_letters_fit_a_request_to_the_engine(tmp_path: pathlib.Path) -> None:
    held = Embedded(tmp_path, Config(), sync=False)
    why = (("kwflow-error-reason", b"json"), ("kwflow-error-topic", b"workflow-resume"))
    held.append_all([Group((Output(Config().dead_letter_topic, b"w", b"x" * 900_000, why),)) for _ in range(20)])
    with serve(held):
        said = CliRunner().invoke(app, ["dead-letters", "retry", "--all", "--embedded", str(tmp_path)])
    assert said.output.count("sent again") == 20, said.output
    held.close()

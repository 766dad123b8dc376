"""What is done to a stopped application, on the simulated broker: whoever does it may die at any request, and nothing is lost or done twice."""

import json
import pathlib
from collections.abc import Callable
from typing import Any

import pytest

from kwflow.config import Config
from kwflow.core.encrypted import is_encrypted
from kwflow.core.timers import DUE
from kwflow.errors import TransportError, UsageError
from kwflow.runners.kafka import moving, topics, upkeep
from kwflow.runners.kafka.runner import KafkaRunner
from kwflow.testing.kafka import Broker, Host, SimulatedEnvironment
from kwflow.testing.kafka.log import Transaction
from tests.simulation.test_found import Lab
from tests.simulation.test_takeover import Killed

pytestmark = [pytest.mark.slow, pytest.mark.timeout(300)]
IDS, LATE = [f"w{number}" for number in range(6)], ["late0", "late1"]
ANSWERED = IDS[:3]  # before it is stopped
LATER_MS = 25_000
KEY = "k" * 32


class Mortal(Host):
    """A process that dies before or after one of its requests, or is not answered, and notes which requests it has made."""

    def __init__(self, broker: Broker, at: int = 0) -> None:
        """`at`: the number of the moment when it dies; if negative, that of the moment whose answer is lost."""
        super().__init__(broker.time, "operator")
        self.at = at
        self.moments: list[str] = []

    def _moment(self, name: str) -> None:
        self.moments.append(name)
        if len(self.moments) == self.at:
            raise Killed

    def call(self, what: str) -> None:
        super().call(what)
        self._moment(f"before {what}")

    def answered(self, what: str) -> bool:
        self._moment(f"after {what}")
        return len(self.moments) != -self.at


class Site:
    """An application with workflows and timers that wait.  Its engine was killed when its last transaction was decided, but not all markers were written."""

    def __init__(self, directory: pathlib.Path, partitions: int = 2) -> None:
        self.lab = Lab(directory, partitions, seed=partitions)  # topics of another broker have other ids
        self.runners: dict[str, KafkaRunner] = {}
        self.settings: dict[str, Any] = {}

    @property
    def config(self) -> Config:
        return self.lab.config("operator", **self.settings)

    def run(self, until: Callable[[], bool]) -> None:
        """Run an engine and a scheduler until then, and until they have read everything."""
        self.runners = {"one": self.lab.engine("one", **self.settings), "s": self.lab.scheduler("s", **self.settings)}
        for _ in range(2000):
            if until() and not self.unread():
                return
            for runner in self.runners.values():
                runner.turn()
        raise AssertionError(f"it did not happen; unread: {self.unread()}; {self.lab.said[-5:]}")

    def unread(self) -> list[str]:
        broker, found = self.lab.broker, []
        for topic, group in (("workflow-resume", "found"), ("workflow-scheduler", "found-scheduler")):
            for partition in broker.topics[topic].partitions:
                if partition.unstable or partition.read(broker.group(group).offsets.get(partition.place, 0), True, 1)[0]:
                    found.append(f"{partition.place}")
        return found

    def kill(self) -> None:
        for name, runner in self.runners.items():
            self.lab.kill(runner, name)
        self.runners = {}

    def start(self) -> None:
        for id in IDS + LATE:
            self.lab.send("workflow-resume", id, "new:{}", **{"kwflow-workflow": "told" if id in IDS else "late"})
        self.run(lambda: len(self.set_timers()) == len(LATE))

    def begin(self) -> None:
        self.start()
        for id in ANSWERED:
            self.say(id, id)
        self.decide_offsets_late()
        while len(self.said()) < len(ANSWERED):
            self.runners["one"].turn()
        self.kill()

    def say(self, id: str, text: str) -> None:
        self.lab.send("workflow-resume", id, json.dumps({"name": "say", "value": text}), **{"kwflow-op": "signal"})

    def decide_offsets_late(self) -> None:
        """Let the markers of groups' offsets come long after those of records, as when their leader is away."""
        transactions = self.lab.broker.transactions
        settle = transactions._settle_offsets

        def later(group: str, transaction: Transaction) -> None:
            self.lab.broker.time.after(LATER_MS, lambda: settle(group, transaction))

        transactions._settle_offsets = later
        self.lab.broker.time.after(1_000, lambda: setattr(transactions, "_settle_offsets", settle))

    def finish(self) -> None:
        """Say what was not said yet, let timers fire, and let everything end."""
        for id in set(IDS) - set(ANSWERED):
            self.say(id, id)
        for id in IDS:
            self.say(id, "end")
        self.run(lambda: len(self.ended()) >= len(IDS + LATE) and not self.set_timers())
        self.kill()

    def set_timers(self) -> list[bytes]:
        return [key for number in range(len(self.lab.broker.topics["found-timers-changelog"].partitions)) for key in self.state("found-timers-changelog", number) if key.startswith(DUE)]

    def state(self, changelog: str, number: int) -> dict[bytes, bytes]:
        """What the changelog of a partition says."""
        last = {entry.key or b"": entry.value for entry in self.lab.broker.partition((changelog, number)).committed()}
        return {key: value for key, value in last.items() if value is not None}

    def said(self) -> list[str]:
        return self.lab.written("found-out")

    def ended(self) -> list[str]:
        return self.lab.written("workflow-result") + self.lab.written("workflow-error")


Work = Callable[[Site, SimulatedEnvironment, Host], object]


def done(site: Site, work: Work, at: int = 0) -> list[str]:
    """Let somebody do the work, who dies or is not answered at this moment, and then somebody else.  Return the moments of the last one."""
    while True:
        host = Mortal(site.lab.broker, at)
        try:
            work(site, SimulatedEnvironment(site.lab.broker, host), host)
        except (Killed, TransportError):
            assert at, "nothing is wrong"
            at = 0
            continue
        return host.moments


def moments(all_of: list[str]) -> list[int]:
    """The first, the middle and the last of each kind, to die at, and for answers also to lose them."""
    places = dict[str, list[int]]()
    for number, name in enumerate(all_of, 1):
        places.setdefault(name, []).append(number)
    chosen = {name: {at[index] for index in (0, len(at) // 2, -1)} for name, at in places.items()}
    return sorted(at for name, numbers in chosen.items() for number in numbers for at in (number, -number)[: 2 if name.startswith("after") else 1])


def begun(directory: pathlib.Path) -> Site:
    site = Site(directory)
    site.begin()
    return site


def check_finishes(site: Site, before: list[str]) -> None:
    """Each instance has said its word once, before or now, and each has ended once."""
    site.finish()
    assert sorted(before + site.said()) == sorted(IDS)
    assert len(site.ended()) == len(IDS + LATE)


def migrate(site: Site, environment: SimulatedEnvironment, _: Host) -> None:
    upkeep.migrate(site.config, 5, site.lab.said.append, environment)


def reencrypt(site: Site, environment: SimulatedEnvironment, _: Host) -> None:
    site.settings = {"encryption_keys": [KEY], "encryption_plain_topics": ["found-out", "workflow-result", "workflow-error"]}
    upkeep.reencrypt(site.config, site.lab.said.append, environment)


def all_encrypted(site: Site) -> bool:
    site.lab.broker.time.advance(site.lab.broker.time.now + 100)  # until all markers are written
    changelogs = [(topic, number) for topic in (site.config.changelog_topic, site.config.timers_changelog_topic) for number in range(2)]
    return all(is_encrypted(value) for place in changelogs for value in site.state(*place).values())


@pytest.mark.parametrize("work", [migrate, reencrypt])
def test_whoever_does_it_may_die_at_any_request(tmp_path: pathlib.Path, work: Work) -> None:
    """K16, G1."""
    found = moments(done(begun(tmp_path / "whole"), work))
    assert len(found) > 30
    for at in found:
        site = begun(tmp_path / str(at))
        done(site, work, at)
        assert work is migrate or all_encrypted(site)
        check_finishes(site, [])


def test_whoever_resets_may_die_at_any_request(tmp_path: pathlib.Path) -> None:
    """The same ids begin anew, and nothing of before is there."""

    def reset(site: Site, environment: SimulatedEnvironment, _: Host) -> None:
        try:
            upkeep.reset(site.config, "latest", site.lab.said.append, environment)
        except UsageError as error:  # somebody died after deleting it
            assert "has no topic found-" in str(error) and "kwflow topics create" in str(error)
            topics.create(topics.admin(site.config, environment), site.config, [], 1, 1)
            upkeep.reset(site.config, "latest", site.lab.said.append, environment)

    found = moments(done(begun(tmp_path / "whole"), reset))
    assert len(found) > 20
    for at in found:
        site = begun(tmp_path / str(at))
        done(site, reset, at)
        assert not site.set_timers()
        site.start()
        site.kill()
        check_finishes(site, [])


def export(file: pathlib.Path) -> Work:
    return lambda site, environment, host: moving.take(site.config, file, environment, host)


def bring(file: pathlib.Path) -> Work:
    return lambda site, environment, host: moving.bring(site.config, file, environment, host)


def test_an_export_has_what_an_engine_did_last_as_done_although_its_offsets_are_decided_late(tmp_path: pathlib.Path) -> None:
    """G1: the record would have been in the archive as not applied yet, beside the state after it."""
    source, target, file = begun(tmp_path / "source"), Site(tmp_path / "target", 3), tmp_path / "one.kwflow"
    done(source, export(file))
    done(target, bring(file))
    check_finishes(target, source.said())


def test_an_export_that_dies_at_any_request_leaves_no_archive(tmp_path: pathlib.Path) -> None:
    """Not one of which nobody has made sure, either, that no engine ran meanwhile."""
    found = moments(done(begun(tmp_path / "whole"), export(tmp_path / "one.kwflow")))
    assert len(found) > 15
    for at in found:
        site, file = begun(tmp_path / str(at)), tmp_path / f"{at}.kwflow"
        if at < 0:  # an answer is lost
            done(site, export(file), at)
            assert file.exists()
            continue
        host = Mortal(site.lab.broker, at)
        with pytest.raises(Killed):
            export(file)(site, SimulatedEnvironment(site.lab.broker, host), host)
        assert not file.exists()


def test_an_import_that_dies_at_any_request_can_be_repeated(tmp_path: pathlib.Path) -> None:
    """Decision 0065: all or nothing, however often it is begun."""
    source, file = begun(tmp_path / "source"), tmp_path / "one.kwflow"
    done(source, export(file))
    found = moments(done(Site(tmp_path / "whole", 3), bring(file)))
    assert len(found) > 30
    over = 0
    for at in found:
        target = Site(tmp_path / str(at), 3)
        try:
            done(target, bring(file), at)
        except UsageError as error:
            assert "it has state in" in str(error)
            over += 1
        check_finishes(target, source.said())
    assert over == 1, "whoever died when the last transaction was committed, but did not know it"

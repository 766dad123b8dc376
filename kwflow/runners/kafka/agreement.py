"""What the engines of one application must agree on, and what is said when they do not.

An engine writes its choices beside its name into `<app>-owners`, and compares them with those of others when it takes partitions
over.  What differs is logged, as nobody would notice it otherwise: a start without a name runs another workflow, a timer goes
where no scheduler reads.  Engines of one group that read different topics would write to the same changelog, so one of them ends.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator

from kwflow.config import Config
from kwflow.core.snapshot import UNSIGNED, key_id
from kwflow.errors import TransportError
from kwflow.ports import Processor
from kwflow.runners.kafka.member import Member
from kwflow.runners.kafka.owners import Owner
from kwflow.runners.logs import Line
from kwflow.runners.loop import WorkflowProcessor

__all__ = ["Agreement", "choices"]

_TOPICS = ("resume_topic", "scheduler_topic", "reply_topic", "result_topic", "error_topic", "history_topic")
_DEFAULT, _SIGNED = "default workflow", "snapshot_keys"


def choices(config: Config, processor: Processor) -> dict[str, str]:
    """Return what this engine tells the others: topics by setting and, if it runs workflows, the default one and the name of the key that signs."""
    made = {name: getattr(config, name) or "" for name in _TOPICS}
    if isinstance(processor, WorkflowProcessor):
        made |= {_DEFAULT: processor.workflows.default or "", _SIGNED: _signing(config)}
    return made


def _signing(config: Config) -> str:
    """The public name of the key that signs; empty without keys."""
    return key_id(config.signing_keys[0]) if config.signing_keys else ""


class Agreement:
    """Compares the choices of other engines with our own; each difference is logged once."""

    def __init__(self, member: Member) -> None:
        self._member = member
        self.choices = choices(member.config, member.processor)
        self._said: set[str] = set()

    def check(self, others: Iterable[tuple[str, Owner]]) -> None:
        """Look at the entries of other engines, each with the topic that it reads.  An entry may be outdated, so the group is asked before this engine ends.

        Raises TransportError if an engine that is in our group now reads another topic.
        """
        group: set[str] | None = None
        for topic, owner in others:
            if owner.group == self._member.group and topic != self._member.processor.input_topic:
                group = self._member.present() if group is None else group
                if group is not None and owner.engine in group:
                    raise self._two_topics(owner.engine, topic)
            for line in self._differences(owner):
                if line not in self._said:
                    self._said.add(line)
                    self._member.on_log(Line.of(line, "warning"))

    def _two_topics(self, engine: str, topic: str) -> TransportError:
        """The error that ends this engine, as its state and that of the other one would be written to the same changelog."""
        mine = self._member.processor.input_topic
        setting = "scheduler_topic" if mine == self._member.config.scheduler_topic else "resume_topic"
        return TransportError(
            f"{self._member.group}: {engine} is in this group and reads {topic}, while {setting} is {mine} here: engines of one application share their state, so they must read the same topic. "
            "Correct the setting, or choose another application_id",
            retryable=False,
        )

    def _differences(self, owner: Owner) -> Iterator[str]:
        others = dict(owner.choices)
        for name, mine in self.choices.items():
            theirs = others.get(name)
            if theirs is None or theirs == mine:
                continue
            if name == _SIGNED:
                if (problem := self._unknown_key(theirs)) is not None:
                    yield f"{self._member.group}: {owner.engine} {problem}"
            elif name == _DEFAULT:
                yield f"{self._member.group}: a start that names no workflow runs {theirs or 'none'} in {owner.engine}, and {mine or 'none'} in this engine: start both with the same MODULE first"
            else:
                yield f"{self._member.group}: {owner.engine} has {name} {theirs!r}, and this process {mine!r}: all processes of an application must have the same one"

    def _unknown_key(self, theirs: str) -> str | None:
        """What is wrong with the key by which another engine signs, if this engine parks what it has saved."""
        keys = self._member.config.signing_keys
        if theirs and theirs not in {key_id(key) for key in keys if key != UNSIGNED}:
            return f"signs snapshots with key {theirs}, which is not in snapshot_keys here: instances that it has saved are parked here; give all engines the key before one signs with it"
        if not theirs and UNSIGNED not in keys:
            return 'does not sign snapshots: instances that it has saved are parked here; give it snapshot_keys, or this engine snapshot_unsigned = "accept"'
        return None

"""What a runner counts while it runs: plain numbers that the loop adds to and that other threads only read.

Nothing is formatted or locked here: the loop pays for an addition, and the reader does the rest (runners/watch.py).
"""

from __future__ import annotations

from bisect import bisect_left
from collections import Counter
from collections.abc import Iterable, Sequence

import msgspec

from kwflow.ports import RunEvent

__all__ = ["BYTES", "DURATIONS", "SECONDS", "Durations", "Histogram", "Seen", "Stats"]

SECONDS = (0.001, 0.002, 0.005, 0.01, 0.02, 0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0, 10.0)
DURATIONS = (0.01, 0.05, 0.1, 0.5, 1.0, 5.0, 10.0, 60.0, 300.0, 900.0, 3_600.0, 21_600.0, 86_400.0, 604_800.0, 2_592_000.0, 31_536_000.0)  # s, up to a year
BYTES = (256.0, 1_024.0, 4_096.0, 16_384.0, 65_536.0, 262_144.0, 1_048_576.0)
_NAMES_MAX, _NAME_CHARACTERS_MAX = 1_000, 1_000


class Histogram:
    """Counts values by upper bound.  Invariant: `counts` has one more entry than `bounds`, for larger values."""

    __slots__ = ("bounds", "counts", "total")

    def __init__(self, bounds: Sequence[float]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def buckets(self) -> list[tuple[str, int]]:
        """(upper bound, how many values up to it) for each bound, in the form of Prometheus."""
        made, so_far = [], 0
        for bound, count in zip([*map(str, self.bounds), "+Inf"], list(self.counts), strict=True):
            so_far += count
            made.append((bound, so_far))
        return made


class Durations(dict[tuple[str, ...], Histogram]):
    """Counts durations, in seconds, under labels: `durations["order", "result"].observe(0.5)`."""

    def __missing__(self, labels: tuple[str, ...]) -> Histogram:
        made = self[labels] = Histogram(DURATIONS)
        return made


class Stats:
    """The numbers of one runner.  `turned_s` is when its loop last came round, 0 before the first time; `back_by_s` is when the
    current call of the Kafka client should return, 0 outside of one.  Both are on the monotonic clock."""

    def __init__(self) -> None:
        self.counts: Counter[str] = Counter()  # what became of records, by the words of Decision.counts
        self.started: Counter[str] = Counter()  # runs, by workflow
        self.parked: Counter[str] = Counter()
        self._names: set[str] = set()
        self.ended = Durations()  # of runs, by workflow and outcome
        self.commits = Histogram(SECONDS)
        self.turned_s = 0.0
        self.back_by_s = 0.0

    def count(self, outcomes: Iterable[str], runs: Iterable[RunEvent]) -> None:
        """Count what a commit did, as its decisions say."""
        self.counts.update(outcomes)
        for run in runs:
            name = self._name(run.workflow)
            if run.seconds is not None:
                self.ended[name, self._name(run.event)].observe(run.seconds)
            elif run.event == "started":
                self.started[name] += 1
            else:
                self.parked[name] += 1

    def _name(self, name: str) -> str:
        """The name under which a workflow or an outcome is counted.  Forged snapshots may have any number of names, and each would cost memory, here and in Prometheus."""
        if name not in self._names:
            if len(self._names) >= _NAMES_MAX or len(name) > _NAME_CHARACTERS_MAX:
                return "(others)"
            self._names.add(name)
        return name

    def is_late(self, now: float, turn_max_s: float) -> bool:
        """Whether the loop is stuck: in a client that ignores its own timeout, or for far too long in anything else."""
        back_by_s, turned_s = self.back_by_s, self.turned_s
        return bool(back_by_s and now > back_by_s) or bool(turned_s and now > turned_s + turn_max_s)


class Seen(msgspec.Struct, frozen=True):
    """The state of a runner's input at one moment.

    `owned`: partitions that are ours and restored; `restoring`: partition -> (changelog offset reached, its end); `waiting`: partitions
    that are assigned, but whose restore has not begun; `lag`: partition -> number of records not applied yet; `timers`: None if the runner has none.
    """

    name: str
    topic: str
    joined: bool
    owned: list[int]
    waiting: list[int]
    restoring: dict[int, tuple[int, int]]
    lag: dict[int, int]
    timers: int | None = None

    @property
    def ready(self) -> bool:
        """Whether the runner has its share of the partitions, all restored.  With many engines that share may be empty."""
        return self.joined and not self.waiting and not self.restoring

"""Worlds of workers in which planted bugs show (planted.py); one has a plan, as its situation is too seldom drawn."""

from typing import Any

from tests.simulation.world import Machine, World


class Queued(World):
    """A world in which each seed has queues and workers."""

    queue_share = 1.0
    rest_ms = 200_000
    switches_max = 100_000


class Lends(Queued):
    """Gateways in every seed."""

    lend_share = 1.0


class QueuedGoesBack(Queued):
    """Workflows with calls of queues go back often."""

    rewind_shares = (0.4,)


class Handover(Queued):
    """The second of two workers with fixed names comes later than the first one, which gives it half of the queues, and is back soon if it dies of that."""

    def __init__(self, *arguments: Any) -> None:
        super().__init__(*arguments)
        workers = [self._worker(number) for number in range(2)]
        for machine in workers:
            machine.settings["instance_id"], machine.queues = machine.instance, self.queues
        self.machines = [*[machine for machine in self.machines if not machine.queues], *workers]

    def _operate(self, machine: Machine) -> None:
        if machine.name == "worker1":
            self.hub.pause(self.time.now + 8_000)
        super()._operate(machine)

    def _while_down(self, machine: Machine) -> None:
        self.hub.pause(self.time.now + 1_000)

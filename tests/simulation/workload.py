"""What clients do: they start random programs, answer what these ask, and send records that they should not send."""

import itertools
import json
import random
from typing import TYPE_CHECKING, Any

from kwflow.core.murmur2 import partition_of
from kwflow.schedules import SIGNAL as SCHEDULE

if TYPE_CHECKING:
    from tests.simulation.world import World

Node = list[Any]


def call(chance: random.Random) -> Node:
    """Draw an activity call, and what its attempts do."""
    kind = chance.choice(["work", "work", "timed"])
    words = ["ok", "slow", "fail", "refuse", *(["hang"] if kind == "timed" else [])]
    return ["call", kind, [chance.choice(words) for _ in range(chance.randint(1, 3))]]


def program(chance: random.Random, depth: int = 3, calls: bool = True) -> Node:
    """Draw a random tree, whose leaves wait for an answer, for time, or for an activity."""
    leaf = lambda: program(chance, 0, calls)
    below = lambda: program(chance, depth - 1, calls)
    if calls and chance.random() < 0.12:
        return call(chance)
    if depth == 0 or chance.random() < 0.3:
        return chance.choice([["ask", f"a{chance.randrange(100)}"], ["ask", f"b{chance.randrange(100)}"], ["sleep", round(chance.choice([0.0, 0.5, 5.0, 20.0]) * chance.random(), 3)]])
    kind = chance.choices(["all", "race", "limit", "child", "stop", "sequence", "rescue", "shield", "saga", "poison", "kid", "hear"], [3, 3, 3, 2, 2, 4, 2, 1, 2, 1.5, 2, 2])[0]
    if kind in ("all", "race", "sequence"):
        return [kind, *(below() for _ in range(chance.randint(1, 3)))]
    if kind == "limit":
        return [kind, below(), round(10 * chance.random(), 3)]
    if kind in ("child", "stop"):
        return [kind, below(), leaf()]
    if kind == "saga":
        return [kind, *(f"s{number}" for number in range(chance.randint(1, 3)))]
    if kind == "kid":
        return [kind, below(), chance.choice(["cancel", "terminate", "abandon"]), leaf() if chance.random() < 0.5 else None]
    if kind == "hear":
        return [kind, chance.choice(["s", "t"]), below()]
    if kind == "poison":
        return chance.choice([["fail", "as told"], ["stuck"], ["lock", "l"], ["large", "l"], ["huge"], ["rescue", ["fail", "as told"]]])
    return [kind, below()]


def queue_call(chance: random.Random) -> Node:
    """Draw a call that a worker runs; some calls kill it."""
    kind = chance.choice(["queued", "queued-beating", "queued-timed", "mailed"])
    words = ["ok", "ok", "slow", "slow", "fail", "refuse", *(["hang"] if kind == "queued-timed" else [])]
    plan = [chance.choice(words) for _ in range(chance.randint(1, 3))]
    if chance.random() < 0.04:
        plan[chance.randrange(len(plan))] = "kill"
    return ["call", kind, plan]


def with_queues(chance: random.Random, made: Node) -> Node:
    """Combine a program with calls of queues: several at once, cancelled, limited, raced, or in a child."""
    for _ in range(chance.randint(1, 2)):
        call = queue_call(chance)
        many = ["all", *(["rescue", queue_call(chance)] for _ in range(chance.randint(2, 4)))]
        made = chance.choice([
            ["sequence", call, made], ["all", call, made], ["race", call, made], ["sequence", many, made], ["race", many, made],
            ["sequence", ["limit", call, round(4 * chance.random(), 3)], made], ["sequence", ["stop", call, ["sleep", round(2 * chance.random(), 3)]], made],
            ["sequence", ["stop", call, ["sleep", 0.0]], made], ["sequence", ["kid", call, chance.choice(["cancel", "terminate", "abandon"]), ["sleep", 1.0]], made],
        ])  # fmt: skip
    return made


def with_cleanups(chance: random.Random, made: Node) -> Node:
    """Combine a program with one whose cleanup waits: for a part that ends, for one that is cancelled, or for what the end of main meets in the middle of it."""
    below = lambda: program(chance, 1)
    undo = ["undo", below(), chance.choice([below(), ["all", below(), below()], ["limit", below(), 20.0], ["child", below(), ["sleep", 0.5]]])]
    seconds = round(4 * chance.random(), 3)
    return chance.choice([
        ["sequence", ["limit", undo, seconds], made], ["sequence", ["limit", undo, seconds, True], made], ["sequence", ["stop", undo, ["sleep", seconds]], made],
        ["limit", undo, seconds], ["race", undo, ["sleep", seconds]], ["race", undo, made], ["all", undo, ["fail", "as told"]], ["all", undo, made],
    ])  # fmt: skip


def with_slots(chance: random.Random, made: Node) -> Node:
    """Combine a program with tasks that wait for each other, and may be cancelled, fail or be late meanwhile."""
    slots = ["slots", chance.randint(1, 2), *(program(chance, 1) for _ in range(chance.randint(2, 4)))]
    seconds = round(6 * chance.random(), 3)
    return chance.choice([
        ["sequence", slots, made], ["all", slots, made], ["race", slots, made], ["slots", 1, made, slots], ["limit", slots, seconds], ["limit", slots, seconds, True],
        ["sequence", ["stop", slots, ["sleep", seconds]], made], ["sequence", ["rescue", [*slots, ["fail", "as told"]]], made],
    ])  # fmt: skip


class Clients:
    """An actor that sends records; in calm times it answers every question and settles every parked instance."""

    def __init__(self, world: "World", ids: int, actions: int, killers: bool) -> None:
        self.world = world
        self.chance = world.chance
        self.sent = 0
        self.finished = False
        self.asks: dict[tuple[str, str], int] = {}  # (id, ref) -> answers sent
        self.parked: dict[str, int] = {}  # id -> number of dead letters that are not dealt with
        self.special = Special(self)
        self._retried: set[str] = set()
        self._ids = ids
        self._actions = actions
        self._killers = killers
        self._started: list[str] = []
        self._forks: list[tuple[str, str]] = []  # (id, id of its copy)
        self._forking = random.Random(f"forks {world.seed}")  # a stream of its own: three of four seeds are the same runs as without forks
        self._fork_share = self._forking.choice([0, 0, 0, 0.1])
        self._rewound: set[str] = set()
        self._telling = random.Random(f"signals {world.seed}")  # also a stream of its own
        self._tell_share = self._telling.choice([0, 0, 0.3])
        self._cleaning = random.Random(f"cleanups {world.seed}")  # also a stream of its own
        self._clean_share = self._cleaning.choice(world.clean_shares)
        self._slotting = random.Random(f"slots {world.seed}")  # also a stream of its own
        self._slot_share = self._slotting.choice(world.slot_shares)
        self._queueing = random.Random(f"queues {world.seed}")  # also a stream of its own
        self._timers = 0
        self._read: dict[tuple[str, int], int] = {}
        self._producer = world.client_environment.producer({"partitioner": "murmur2_random"})

    def send(self, topic: str, key: str | None, value: str | None, headers: tuple[tuple[str, str], ...] = (), partition: int = -1) -> None:
        """Send a record, with its number in a header that is not passed on, unlike a client's own headers."""
        self.sent += 1
        self._producer.produce(topic, value, key, headers=[*headers, ("kwflow-sim-sent", str(self.sent))], partition=partition)

    def flush(self) -> None:
        self._producer.flush()

    def work(self) -> None:
        for _ in range(self._actions):
            self.world.hub.pause(self.world.time.now + self.chance.expovariate(1 / 250))
            self._look()
            self._act()
            if self._started and self._forking.random() < self._fork_share:
                self._fork()
            if self._started and self._telling.random() < self._tell_share:
                self._ask()
            if self._started and self.world.rewinding.random() < self.world.rewind_share:
                self._go_back()
            if self.world.queues and self._queueing.random() < 0.03:
                self._disturb_queue()
            self._producer.flush()
        self.finished = True

    def settle(self) -> bool:
        """Do one round in calm times; true if there was nothing to do."""
        self._look()
        for ask in [ask for ask in self.asks if ask[0] in self._rewound]:
            self.asks[ask] = 0  # it may wait for this again
        self._rewound.clear()
        for id, copy in self._forks:
            for ask in [ask for ask in self.asks if ask[0] == id]:
                self.asks.setdefault((copy, ask[1]), 0)
        waiting = [ask for ask, count in self.asks.items() if not count]
        for ask in waiting:
            self._answer(ask)
        waiting += [(id, "") for id in self.special.settle()]
        for id in [id for id, letters in self.parked.items() if letters]:
            self.parked[id] = 0
            self._command(id, "discard" if id in self._retried and not self.special.known(id) else "retry")
            self._retried.add(id)
            waiting.append((id, ""))
        self._producer.flush()
        return not waiting

    # -- what is done ------------------------------------------------------------------------------------------------
    def _act(self) -> None:
        config, chance = self.world.config, self.chance
        kinds = {"start": 30, "answer": 50, "again": 3, "stray": 3, "unknown": 2, "bad": 3, "misplaced": 3, "command": 4, "timer": 6, "message": 12, "special": 12}
        kind = chance.choices(list(kinds), list(kinds.values()))[0]
        id = chance.choice(self._started) if self._started else "nobody"
        if kind == "start" and len(self._started) < self._ids:
            self._start()
        elif kind == "answer" and self.asks:
            self._answer(chance.choice(list(self.asks)))
        elif kind == "again":
            self.send(config.resume_topic, id, 'new:{"program": ["ask", "again"]}')
        elif kind == "stray":
            self.send(config.resume_topic, id, '{"ref": "nothing", "value": 1}')
        elif kind == "unknown":
            self.send(config.resume_topic, f"ghost{chance.randrange(5)}", '{"ref": "0:1"}')
        elif kind == "bad":
            key, value = chance.choice([(id, "{not json"), (None, "{}"), (id, None), ("a|b", "{}"), (id, "[]"), (id, "new:")])
            self.send(config.resume_topic, key, value)
        elif kind == "misplaced" and len(self._started) < self._ids:
            self._start(misplaced=True)
        elif kind == "command":
            parked = [id for id, letters in self.parked.items() if letters]
            id = chance.choice(parked) if parked and chance.random() < 0.8 else id
            self._command(id, "retry" if self.special.known(id) else chance.choice(["retry", "discard"]))
        elif kind == "timer":
            self._timer()
        elif kind == "message":
            self._message(id)
        elif kind == "special":
            self.special.act()

    def _start(self, misplaced: bool = False) -> None:
        id = f"w{len(self._started)}"
        self._started.append(id)
        made = ["kill"] if self._killers and self.chance.random() < 0.05 else program(self.chance)
        if self._telling.random() < self._tell_share:
            made = self._with_signals(made)
        if self.world.queues and self._queueing.random() < 0.5:
            made = with_queues(self._queueing, made)
        if self._cleaning.random() < self._clean_share and made != ["kill"]:
            made = with_cleanups(self._cleaning, made)
        if self._slotting.random() < self._slot_share and made != ["kill"]:
            made = with_slots(self._slotting, made)
        headers = (("trace", f"t{self.chance.randrange(10)}"),) if self.chance.random() < 0.3 else ()
        headers += (("kwflow-start-id", f"start-{id}"),) if self.chance.random() < 0.3 else ()
        partition = -1
        if misplaced:
            partition = (partition_of(id.encode(), self.world.partitions) + 1) % self.world.partitions
        for _ in range(2 if self.chance.random() < 0.05 else 1):
            self.send(self.world.config.resume_topic, id, "new:" + json.dumps({"program": made}), headers, partition)

    def _with_signals(self, made: Node) -> Node:
        """Extend a program so that it sends signals to others, or can be asked meanwhile."""
        chance = self._telling
        for _ in range(chance.randint(1, 3)):
            other = chance.choice([*self._started, *(f"told{number}" for number in range(5)), "ghost1"])
            start = chance.choice([None, ["hear", "s", ["ask", "told"]], ["judge", ["hear", "t", ["sleep", 2.0]]]])
            tell = ["tell", other, chance.choice(["s", "s", "t", "rest"]), chance.randrange(100), start]
            made = chance.choice([["sequence", tell, made], ["sequence", made, tell], ["race", made, ["sequence", ["sleep", 0.5], tell]], ["judge", made], ["hear", "s", ["sequence", tell, made]]])
        return made

    def _disturb_queue(self) -> None:
        """Send a queue a record that is no call, or is another application's, or nobody's, or withdraws a call that does not exist."""
        chance, number = self._queueing, self.sent
        ghost = {"workflow_id": "ghost1", "ref": f"{number}:1", "activity": "sim-queued", "attempt": 1, "idempotency_key": f"ghost1|{number}:1", "arguments": {"plan": [chance.choice(["ok", "slow"])]}}
        value = chance.choice(["{not json", "[]", json.dumps({"resume_topic": "elsewhere", **ghost}), json.dumps({"resume_topic": self.world.config.resume_topic, **ghost}), None])
        self.send(chance.choice(self.world.queues), f"ghost1|{number}:1", value)

    def _ask(self) -> None:
        """Send an update to a workflow that may be running `judge`."""
        chance, number = self._telling, self._telling.randrange(10_000)
        id = chance.choice([*self._started, *(f"told{number}" for number in range(5))])
        home = partition_of(id.encode(), self.world.partitions)
        headers = (("kwflow-op", "update"), ("kwflow-id", f"asked-{number}"), ("kwflow-request", f"request-{self.sent}"), ("kwflow-reply-to", f"{home}/client{home}"))
        for _ in range(2 if chance.random() < 0.3 else 1):
            self.send(self.world.config.resume_topic, id, json.dumps({"name": "judge", "value": chance.randrange(100)}), headers)

    def _fork(self) -> None:
        """Fork a started workflow or a copy; most of the new ids belong to the right partition."""
        chance = self._forking
        id = chance.choice([*self._started, *(copy for _, copy in self._forks)])
        home = partition_of(id.encode(), self.world.partitions)
        ids = (f"{id}-{number}" for number in range(len(self._forks) * 100, 1_000_000))
        copy = next(copy for copy in ids if chance.random() < 0.05 or partition_of(copy.encode(), self.world.partitions) == home)
        self._forks.append((id, copy))
        headers = (("kwflow-op", "fork"), ("kwflow-id", f"fork-{copy}"), ("kwflow-request", f"request-{self.sent}"), ("kwflow-reply-to", f"{home}/client{home}"))
        for _ in range(2 if chance.random() < 0.3 else 1):
            self.send(self.world.config.resume_topic, id, json.dumps({"id": copy}), headers)

    def _go_back(self) -> None:
        """Put a started workflow or a copy back to a state that it may have had, or copy it from there."""
        chance = self.world.rewinding
        id, number = chance.choice([*self._started, *(copy for _, copy in self._forks)]), chance.choice([0, 1, 1, 2, 3, 4, 6])
        home = partition_of(id.encode(), self.world.partitions)
        headers = (("kwflow-id", f"rewind-{self.sent}"), ("kwflow-request", f"request-{self.sent}"), ("kwflow-reply-to", f"{home}/client{home}"))
        arguments: dict[str, object] = {"to": number}
        if chance.random() < 0.3:
            copy = next(copy for copy in (f"{id}-{number}" for number in itertools.count(len(self._forks) * 100)) if partition_of(copy.encode(), self.world.partitions) == home)
            self._forks.append((id, copy))
            arguments = {"id": copy, "at": number}
        else:
            self._rewound.add(id)
        for _ in range(2 if chance.random() < 0.3 else 1):
            self.send(self.world.config.resume_topic, id, json.dumps(arguments), (("kwflow-op", "rewind" if "to" in arguments else "fork"), *headers))

    def _answer(self, ask: tuple[str, str]) -> None:
        self.asks[ask] += 1
        outcome = {"error": {"code": self.chance.randrange(9)}} if self.chance.random() < 0.1 else {"value": self.chance.randrange(1000)}
        self.send(self.world.config.resume_topic, ask[0], json.dumps({"ref": ask[1], **outcome}))

    def _command(self, id: str, op: str) -> None:
        self.send(self.world.config.resume_topic, id, "null", (("kwflow-op", op),))

    def _message(self, id: str) -> None:
        """Send a command, sometimes twice under its id, to a running id, one that has ended, or a child."""
        chance = self.chance
        target = f"{id}/{chance.randrange(40)}:{chance.randint(1, 3)}" if chance.random() < 0.3 else id
        op = chance.choices(["signal", "cancel", "terminate", "pause", "unpause", "query", "update"], [8, 2, 1, 2, 3, 2, 1])[0]
        arguments = {"name": chance.choice(["s", "t", "rest"]), "value": chance.randrange(100)} if op in ("signal", "update") else {}
        if op == "signal" and chance.random() < 0.3:
            arguments["ttl_ms"] = chance.randint(1, 10_000)
        headers = (("kwflow-op", op), ("kwflow-id", f"command-{chance.randrange(10_000)}"))
        if chance.random() < 0.7:  # one reply address per input partition, as replies from several partitions have no order among them
            number = partition_of(target.encode(), self.world.partitions)
            place = f"{number}/client{number}" if chance.random() < 0.9 else f"{self.world.partitions}/gone"
            headers += (("kwflow-request", f"request-{self.sent}"), ("kwflow-reply-to", place))
        for _ in range(2 if chance.random() < 0.3 else 1):
            self.send(self.world.config.resume_topic, target, json.dumps(arguments), headers)

    def _timer(self) -> None:
        """Set a timer that belongs to nobody here; often it is cancelled again."""
        self._timers += 1
        key = f"other{self._timers % 7}|" + json.dumps({"ref": f"timer{self._timers}"})
        self.send(self.world.config.scheduler_topic, key, str(self.chance.choice([1, 500, 5_000, 15_000])))
        if self.chance.random() < 0.6:
            self.send(self.world.config.scheduler_topic, key, self.chance.choice(["0", "null"]))

    # -- what is seen ------------------------------------------------------------------------------------------------
    def _look(self) -> None:
        for topic in ("sim-ask", self.world.config.dead_letter_topic):
            for partition in self.world.broker.topics[topic].partitions:
                offset = self._read.get(partition.place, 0)
                entries, self._read[partition.place] = partition.read(offset, True, 10_000)
                for entry in entries:
                    id, value = (entry.key or b"").decode("utf-8", "replace"), (entry.value or b"").decode("utf-8", "replace")
                    if topic == "sim-ask":
                        self.asks.setdefault((id, value), 0)
                    elif "kwflow-error-feed" in dict(entry.headers):
                        continue  # belongs to no workflow
                    elif ("kwflow-error-reason", b"parked") in entry.headers or ("kwflow-error-reason", b"refused") in entry.headers:
                        self.parked[id] = self.parked.get(id, 0) + 1


class Special:
    """Workflows whose correct outcome is known in closed form (meaning.py): accounts, sagas and schedules.

    Nobody cancels or discards them, but an account may be paused.
    """

    def __init__(self, clients: Clients) -> None:
        self.clients = clients
        self.chance = clients.chance
        self.accounts: list[str] = []
        self.sagas: list[str] = []
        self.schedules: list[str] = []
        self._told = 0
        self._going_on = self._ending = False

    def known(self, id: str) -> bool:
        return id in self.accounts or id in self.sagas or id in self.schedules

    def act(self) -> None:
        chance = self.chance
        if not self.accounts or (len(self.accounts) < 3 and chance.random() < 0.1):
            self._start(self.accounts, "account", {"program": ["account"]})
        elif len(self.sagas) < 4 and chance.random() < 0.15:
            self._start(self.sagas, "trip", {"program": ["saga", *(f"s{number}" for number in range(chance.randint(2, 4)))]})
        elif len(self.schedules) < 2 and chance.random() < 0.1:
            self._schedule()
        elif self.schedules and chance.random() < 0.15:
            self._tell(chance.choice(self.schedules), "signal", SCHEDULE, {"do": chance.choice(["pause", "unpause", "unpause", "trigger", "trigger", "what?"])})
        elif chance.random() < 0.15:
            self._tell(chance.choice(self.accounts), chance.choice(["pause", "unpause"]))
        else:
            self._tell(chance.choice(self.accounts), chance.choice(["signal", "update"]), "add", chance.randint(-3, 20))

    def settle(self) -> list[str]:
        """First unpause everything; once that is done, end everything.  Returns the ids that still have to be sent something."""
        if not self._going_on:
            self._going_on = True
            for id in self.accounts:
                self._tell(id, "unpause")
        elif not self._ending and not self.clients.world.unread(waiting=False):
            self._ending = True
            for id in self.accounts:
                self._tell(id, "signal", "add", None)
            for id in self.schedules:
                self._tell(id, "signal", SCHEDULE, {"do": "remove"})
        elif self._ending:
            return []
        return [*self.accounts, *self.schedules]

    def _start(self, kind: list[str], name: str, input: object, *headers: tuple[str, str]) -> None:
        id = f"{name}{len(kind)}"
        kind.append(id)
        self.clients.send(self.clients.world.config.resume_topic, id, "new:" + json.dumps(input), (("kwflow-start-id", f"start-{id}"), *headers))

    def _schedule(self) -> None:
        """Start a schedule, whose runs wait for a moment, for an answer, or for an activity."""
        name, chance = f"plan{len(self.schedules)}", self.chance
        node = chance.choice([["sleep", 0.5], ["ask", "scheduled"], call(chance), ["fail", "as told"]])
        plan = {"name": name, "workflow": "main", "input": {"program": node}, "every_ms": chance.choice([2_000, 5_000, 20_000]), "overlap": chance.choice(["skip", "queue", "allow"])}
        self._start(self.schedules, "schedule:plan", plan, ("kwflow-workflow", SCHEDULE))

    def _tell(self, id: str, op: str, name: str = "", value: object = None) -> None:
        """Send a command, with a new request id each time; now and then it is sent twice under its command id."""
        self._told += 1
        clients, topic = self.clients, self.clients.world.config.resume_topic
        arguments = {"name": name, "value": value} if name else {}
        number = partition_of(id.encode(), clients.world.partitions)
        for _ in range(2 if self.chance.random() < 0.2 else 1):
            asked = (("kwflow-request", f"told-{clients.sent}"), ("kwflow-reply-to", f"{number}/client{number}"))
            clients.send(topic, id, json.dumps(arguments), (("kwflow-op", op), ("kwflow-id", f"told-{self._told}"), *asked))

"""kwflow: embedded, and on Kafka.  Run it with the interpreter of kwflow."""

from __future__ import annotations

import sys

from common import System, main, on_disk, until, variable

from kwflow.client import Client
from kwflow.config import Config

SOURCE = """
import kwflow as kw

@kw.activity
def step(n: int) -> int:
    return n

@kw.workflow
def chain(count):
    for n in range(count):
        yield step(n)

@kw.workflow
def waits(variable):
    total = yield step(1)
    # INSERTED: total += yield step(2)
    yield kw.wait_signal("go")
    total += yield step(3)
    return total if variable else None

@kw.workflow
def listener(opts):
    inbox, taken = kw.signals("go"), 0
    while True:
        kw.set_status(taken)
        yield inbox
        taken += 1
"""


class Kwflow(System):
    source = SOURCE
    client: Client

    async def open(self) -> None:
        self.write(1)
        await self.start_worker()
        self.client = await until(self.connect)
        await until(lambda: self.chain("first"))

    def connect(self) -> Client:
        raise NotImplementedError

    async def chain(self, id: str) -> None:
        await self.client.start_and_wait(id, 20, workflow="chain")

    async def wait(self, id: str) -> None:
        await self.client.start(id, variable(id), workflow="waits")

    async def release(self, id: str) -> object:
        await self.client.signal(id, "go", 1)
        return await self.client.result(id)

    async def listen(self, id: str) -> None:
        await self.client.start(id, None, workflow="listener")

    async def tell(self, id: str, n: int) -> None:
        await self.client.signal(id, "go", n)

    async def told(self, id: str) -> int:
        return int((await self.client.query(id))["status_value"])

    async def close(self) -> None:
        self.client.close()


class Embedded(Kwflow):
    name = "kwflow embedded"

    async def start_worker(self) -> None:
        self.worker = self.run(sys.executable, "-m", "kwflow", "engine", "app.py", "--embedded", "state", log="worker")

    def connect(self) -> Client:
        return Client.embedded(self.directory / "state")

    def stored(self) -> int:
        return on_disk(self.directory / "state")


class Kafka(Kwflow):
    name = "kwflow on Kafka"
    extra = ""

    async def open(self) -> None:
        from tests.integration.broker import Broker

        extra = self.extra

        class Production(Broker):
            jvm = ()

            def properties(self, port: int) -> str:
                return super().properties(port) + extra

        self.broker = Production(self.directory / "broker")
        self.broker.start()
        self.processes.append(self.broker._process)
        self.config = Config(bootstrap_servers=self.broker.bootstrap, application_id="comparison")
        self.environment = {"KWFLOW_BOOTSTRAP_SERVERS": self.broker.bootstrap, "KWFLOW_APPLICATION_ID": "comparison"}
        self.write(1)
        self.run(sys.executable, "-m", "kwflow", "topics", "create", "app.py", log="topics", environment=self.environment).wait(60)
        await super().open()

    async def start_worker(self) -> None:
        self.worker = self.run(sys.executable, "-m", "kwflow", "engine", "app.py", "--with-scheduler", log="worker", environment=self.environment)

    def connect(self) -> Client:
        return Client.kafka(self.config)

    def stored(self) -> int:
        return on_disk(self.directory / "broker" / "log", self.directory / "kwflow-state")


class Synced(Kafka):
    name = "kwflow on Kafka, each write to disk"
    extra = "log.flush.interval.messages=1\n"


if __name__ == "__main__":
    main({"embedded": Embedded, "kafka": Kafka, "kafka-synced": Synced})

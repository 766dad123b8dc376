"""Temporal on Postgres.  Needs temporalio, Postgres' pg_config, and temporal-server and temporal-sql-tool on the PATH."""

from __future__ import annotations

import asyncio
import subprocess
import sys
from datetime import timedelta

from common import Postgres, System, free_port, listening, main, until, variable
from google.protobuf.duration_pb2 import Duration
from temporalio.api.workflowservice.v1 import RegisterNamespaceRequest
from temporalio.client import Client

QUEUE = "comparison"
SOURCE = """
import asyncio, sys
from datetime import timedelta
from temporalio import activity, workflow
from temporalio.client import Client
from temporalio.worker import Worker

LIMIT = timedelta(seconds=30)

@activity.defn
async def step(n: int) -> int:
    return n

@workflow.defn(name="chain")
class Chain:
    @workflow.run
    async def run(self, count: int) -> None:
        for n in range(count):
            await workflow.execute_activity(step, n, start_to_close_timeout=LIMIT)

@workflow.defn(name="chain-local")
class ChainLocal:
    @workflow.run
    async def run(self, count: int) -> None:
        for n in range(count):
            await workflow.execute_local_activity(step, n, start_to_close_timeout=LIMIT)

@workflow.defn(name="waits")
class Waits:
    def __init__(self) -> None:
        self.gone = False

    @workflow.run
    async def run(self, variable: str) -> int:
        total = await workflow.execute_activity(step, 1, start_to_close_timeout=LIMIT)
        # INSERTED: total += await workflow.execute_activity(step, 2, start_to_close_timeout=LIMIT)
        await workflow.wait_condition(lambda: self.gone)
        total += await workflow.execute_activity(step, 3, start_to_close_timeout=LIMIT)
        return total if variable else 0

    @workflow.signal
    def go(self, n: int) -> None:
        self.gone = True

class Taking:
    def __init__(self) -> None:
        self.inbox: list[int] = []
        self.count = 0

    async def take(self) -> None:
        await workflow.wait_condition(lambda: self.inbox)
        self.count += len(self.inbox)
        self.inbox.clear()

@workflow.defn(name="listener")
class Listener(Taking):
    @workflow.run
    async def run(self, count: int) -> None:
        self.count += count
        while not workflow.info().is_continue_as_new_suggested():
            await self.take()
        self.count += len(self.inbox)
        self.inbox.clear()
        workflow.continue_as_new(self.count)

    @workflow.signal
    def go(self, n: int) -> None:
        self.inbox.append(n)

    @workflow.query
    def taken(self) -> int:
        return self.count

@workflow.defn(name="listener-one-run")
class ListenerOneRun(Taking):
    @workflow.run
    async def run(self, count: int) -> None:
        while True:
            await self.take()

    @workflow.signal
    def go(self, n: int) -> None:
        self.inbox.append(n)

    @workflow.query
    def taken(self) -> int:
        return self.count

async def run() -> None:
    client = await Client.connect(sys.argv[1])
    await Worker(client, task_queue="comparison", workflows=[Chain, ChainLocal, Waits, Listener, ListenerOneRun], activities=[step]).run()

if __name__ == "__main__":
    asyncio.run(run())
"""
CONFIG = """
log: {{stdout: true, level: warn}}
persistence:
  defaultStore: default
  visibilityStore: visibility
  numHistoryShards: {shards}
  datastores:
    default:
      sql: &sql {{pluginName: postgres12, databaseName: temporal, connectAddr: "127.0.0.1:{postgres}", connectProtocol: tcp,
                   user: postgres, password: "x", maxConns: 20, maxIdleConns: 20, maxConnLifetime: 1h}}
    visibility:
      sql: {{<<: *sql, databaseName: temporal_visibility}}
global:
  membership: {{maxJoinDuration: 30s, broadcastAddress: "127.0.0.1"}}
services:
{services}
clusterMetadata:
  enableGlobalNamespace: false
  failoverVersionIncrement: 10
  masterClusterName: active
  currentClusterName: active
  clusterInformation:
    active: {{enabled: true, initialFailoverVersion: 1, rpcName: frontend, rpcAddress: "127.0.0.1:{frontend}"}}
dcRedirectionPolicy: {{policy: noop}}
publicClient: {{hostPort: "127.0.0.1:{frontend}"}}
"""


class Temporal(System):
    name = "Temporal"
    source = SOURCE
    shards = 512
    chained, listening_as = "chain", "listener"

    async def open(self) -> None:
        self.postgres = Postgres(self)
        await listening(self.postgres.port)
        for database, schema in {"temporal": "temporal", "temporal_visibility": "visibility"}.items():
            await until(lambda: self.postgres.query(f"CREATE DATABASE {database}"))
            tool = ["temporal-sql-tool", "--plugin", "postgres12", "--ep", "127.0.0.1", "-p", str(self.postgres.port), "-u", "postgres", "--pw", "x", "--db", database]
            for command in (["setup-schema", "-v", "0.0"], ["update-schema", "--schema-name", f"postgresql/v12/{schema}"]):
                subprocess.run([*tool, *command], check=True, capture_output=True)
        ports = {name: (free_port(), free_port()) for name in ("frontend", "matching", "history", "worker")}
        services = "\n".join(f"  {name}: {{rpc: {{grpcPort: {grpc}, membershipPort: {member}, bindOnLocalHost: true}}}}" for name, (grpc, member) in ports.items())
        self.address = f"127.0.0.1:{ports['frontend'][0]}"
        config = CONFIG.format(shards=self.shards, postgres=self.postgres.port, services=services, frontend=ports["frontend"][0])
        (self.directory / "config").mkdir()
        (self.directory / "config" / "comparison.yaml").write_text(config)
        self.run("temporal-server", "--root", str(self.directory), "--config", "config", "--env", "comparison", "start", log="server")
        self.client = await until(lambda: Client.connect(self.address))
        await until(self.register)
        self.write(1)
        await self.start_worker()
        await until(lambda: asyncio.wait_for(self.chain(f"first-{asyncio.get_running_loop().time()}"), 20))

    async def register(self) -> None:
        request = RegisterNamespaceRequest(namespace="default", workflow_execution_retention_period=Duration(seconds=86_400))
        await self.client.workflow_service.register_namespace(request)

    async def start_worker(self) -> None:
        self.worker = self.run(sys.executable, "app.py", self.address, log="worker")

    def stored(self) -> int:
        return self.postgres.size()

    async def chain(self, id: str) -> None:
        await self.client.execute_workflow(self.chained, 20, id=id, task_queue=QUEUE)

    async def wait(self, id: str) -> None:
        await self.client.start_workflow("waits", variable(id), id=id, task_queue=QUEUE)

    async def release(self, id: str) -> object:
        handle = self.client.get_workflow_handle(id)
        await handle.signal("go", 1)
        return await handle.result()

    async def listen(self, id: str) -> None:
        await self.client.start_workflow(self.listening_as, 0, id=id, task_queue=QUEUE)

    async def tell(self, id: str, n: int) -> None:
        await self.client.get_workflow_handle(id).signal("go", n)

    async def told(self, id: str) -> int:
        return int(await self.client.get_workflow_handle(id).query("taken", rpc_timeout=timedelta(seconds=10)))


class Local(Temporal):
    name = "Temporal, local activities"
    chained = "chain-local"


class OneRun(Temporal):
    name = "Temporal, without continue-as-new"
    listening_as = "listener-one-run"


class TimedWait(Temporal):
    name = "Temporal, a wait with a timeout"
    source = SOURCE.replace("lambda: self.gone)", "lambda: self.gone, timeout=timedelta(days=1))")


class FewShards(Temporal):
    name = "Temporal, 4 shards"
    shards = 4


if __name__ == "__main__":
    main({"temporal": Temporal, "local": Local, "one-run": OneRun, "few-shards": FewShards, "timed-wait": TimedWait})

"""DBOS on Postgres.  Needs dbos, and Postgres' pg_config on the PATH."""

from __future__ import annotations

import asyncio
import json
import sys

from common import Postgres, System, at_once, free_port, listening, main, until, variable

SOURCE = '''
import asyncio, json, sys
from concurrent.futures import ThreadPoolExecutor
from dbos import DBOS, DBOSConfig, SetWorkflowID

DAY_S = 86_400
HANDLERS = ThreadPoolExecutor(250)

@DBOS.step()
async def step(n: int) -> int:
    return n

@DBOS.workflow()
async def chain(count: int) -> None:
    for n in range(count):
        await step(n)

@DBOS.step()
def step_in_thread(n: int) -> int:
    return n

@DBOS.workflow()
def chain_in_thread(count: int) -> None:
    for n in range(count):
        step_in_thread(n)

@DBOS.workflow()
async def waits(variable: str) -> int:
    total = await step(1)
    # INSERTED: total += await step(2)
    await DBOS.recv_async("go", timeout_seconds=DAY_S)
    total += await step(3)
    return total if variable else 0

@DBOS.workflow()
async def listener(count: int) -> None:
    for _ in range(count):
        await DBOS.recv_async("go", timeout_seconds=DAY_S)

async def start(workflow, id, argument):
    with SetWorkflowID(id):
        return await DBOS.start_workflow_async(workflow, argument)

def run_in_thread(id):
    with SetWorkflowID(id):
        chain_in_thread(20)

async def answer(op, id, argument):
    """What a request handler of the application would do."""
    if op == "chain":
        await (await start(chain, id, 20)).get_result()
    elif op == "chain_in_thread":
        await asyncio.get_running_loop().run_in_executor(HANDLERS, run_in_thread, id)
    elif op == "wait":
        await start(waits, id, argument)
    elif op == "listen":
        await start(listener, id, 1_000_000)
    elif op == "tell":
        await DBOS.send_async(id, argument, "go")

async def serve(reader, writer):
    while line := await reader.readline():
        await answer(*json.loads(line))
        writer.write(b"done\\n")

async def run():
    config: DBOSConfig = {"name": "comparison", "system_database_url": sys.argv[1], "log_level": "WARNING", **json.loads(sys.argv[3])}
    DBOS(config=config)
    DBOS.launch()
    server = await asyncio.start_server(serve, "127.0.0.1", int(sys.argv[2]))
    await server.serve_forever()

if __name__ == "__main__":
    asyncio.run(run())
'''


class Dbos(System):
    name = "DBOS"
    source = SOURCE
    config: dict[str, object] = {}

    async def open(self) -> None:
        self.free: list[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = []
        self.postgres = Postgres(self)
        await listening(self.postgres.port)
        await until(lambda: self.postgres.query("CREATE DATABASE comparison"))
        self.write(1)
        await self.start_worker()
        await until(lambda: self.chain("first"))

    async def start_worker(self) -> None:
        self.free.clear()
        self.port = free_port()
        url = f"{self.postgres.url}/comparison"
        self.worker = self.run(sys.executable, "app.py", url, str(self.port), json.dumps(self.config), log="worker")

    async def ask(self, op: str, id: str, argument: object = None) -> None:
        reader, writer = self.free.pop() if self.free else await asyncio.open_connection("127.0.0.1", self.port)
        writer.write(json.dumps([op, id, argument]).encode() + b"\n")
        if await reader.readline() != b"done\n":
            writer.close()
            raise ConnectionError(f"{op} {id} failed")
        self.free.append((reader, writer))

    def stored(self) -> int:
        return self.postgres.size()

    async def chain(self, id: str) -> None:
        await self.ask("chain", id)

    async def wait(self, id: str) -> None:
        await self.ask("wait", id, variable(id))

    async def ended(self, ids: list[str]) -> None:
        like = ids[0].partition("-")[0]
        found = int(self.postgres.query(f"SELECT count(*) FROM dbos.workflow_status WHERE workflow_uuid LIKE '{like}%' AND status IN ('SUCCESS', 'ERROR')", "comparison"))
        if found < len(ids):
            raise TimeoutError(f"{found} of {len(ids)} have ended")

    async def release(self, id: str) -> object:
        await self.ask("tell", id, 1)
        await until(lambda: self.ended([id]), 15, 0.2)
        return self.postgres.query(f"SELECT status, output FROM dbos.workflow_status WHERE workflow_uuid = '{id}'", "comparison")

    async def release_all(self, ids: list[str]) -> None:
        await at_once(self.ask("tell", id, 1) for id in ids)
        await until(lambda: self.ended(ids), 600, 0.2)

    async def listen(self, id: str) -> None:
        await self.ask("listen", id)

    async def tell(self, id: str, n: int) -> None:
        await self.ask("tell", id, n)

    async def told(self, id: str) -> int:
        return int(self.postgres.query(f"SELECT count(*) FROM dbos.notifications WHERE destination_uuid = '{id}' AND consumed", "comparison"))


class OneVersion(Dbos):
    name = "DBOS, one application version"
    config = {"application_version": "1"}


class Threads(Dbos):
    """Functions without async, as for a web framework with threads."""

    name = "DBOS, without async"

    async def chain(self, id: str) -> None:
        await self.ask("chain_in_thread", id)


if __name__ == "__main__":
    main({"dbos": Dbos, "threads": Threads, "one-version": OneVersion})

"""Restate, with the settings for production on one node.  Needs restate-sdk, hypercorn and aiohttp, and restate-server on the PATH."""

from __future__ import annotations

import asyncio
import socket
import sys
import time

import aiohttp
from common import IN_FLIGHT, System, free_port, listening, main, on_disk, until, variable

SOURCE = """
import restate
from restate import ObjectContext, ObjectSharedContext, VirtualObject, Workflow, WorkflowContext, WorkflowSharedContext

chain, waits, promises, listener = Workflow("chain"), Workflow("waits"), Workflow("promises"), VirtualObject("listener")

async def step(n: int) -> int:
    return n

@chain.main()
async def run(ctx: WorkflowContext, count: int) -> None:
    for n in range(count):
        await ctx.run_typed("step", step, n=n)

@waits.main(name="run")
async def run_waits(ctx: WorkflowContext, variable: str) -> int:
    total = await ctx.run_typed("step", step, n=1)
    # INSERTED: total += await ctx.run_typed("inserted", step, n=2)
    await ctx.promise("go").value()
    total += await ctx.run_typed("step", step, n=3)
    return total if variable else 0

@waits.handler()
async def go(ctx: WorkflowSharedContext, n: int) -> None:
    await ctx.promise("go").resolve(n)

@promises.main(name="run")
async def run_promises(ctx: WorkflowContext, count: int) -> None:
    for n in range(count):
        ctx.set("taken", n)
        await ctx.promise(f"go-{n}").value()

@promises.handler()
async def take_promise(ctx: WorkflowSharedContext, n: int) -> None:
    await ctx.promise(f"go-{n}").resolve(n)

@promises.handler()
async def taken_promises(ctx: WorkflowSharedContext) -> int:
    return (await ctx.get("taken")) or 0

@listener.handler()
async def take(ctx: ObjectContext, n: int) -> None:
    ctx.set("taken", ((await ctx.get("taken")) or 0) + 1)

@listener.handler(kind="shared")
async def taken(ctx: ObjectSharedContext) -> int:
    return (await ctx.get("taken")) or 0

app = restate.app([chain, waits, promises, listener])
"""


class Restate(System):
    name = "Restate"
    source = SOURCE

    async def open(self) -> None:
        self.ingress, self.admin, self.port = free_port(), free_port(), free_port()
        settings = {"INGRESS__BIND_PORT": self.ingress, "ADMIN__BIND_PORT": self.admin, "BIND_PORT": free_port(), "DISABLE_TELEMETRY": "true", "BASE_DIR": self.directory / "state"}
        environment = {f"RESTATE_{name}": str(value) for name, value in settings.items()}
        self.run("restate-server", "--production", "--node-name=one", "--auto-provision=true", "--no-logo", log="server", environment=environment)
        self.client = aiohttp.ClientSession(connector=aiohttp.TCPConnector(limit=2 * IN_FLIGHT), timeout=aiohttp.ClientTimeout(600))
        self.write(1)
        await self.start_worker()
        await until(self.register)
        await until(lambda: self.chain("first"))

    async def register(self) -> None:
        async with self.client.post(f"http://127.0.0.1:{self.admin}/deployments", json={"uri": f"http://127.0.0.1:{self.port}", "force": True}) as answer:
            if answer.status >= 300:
                raise ConnectionError(await answer.text())

    async def start_worker(self) -> None:
        self.worker = self.run(sys.executable, "-m", "hypercorn", "--bind", f"127.0.0.1:{self.port}", "app:app", log="worker")

    async def deploy(self) -> None:
        await super().deploy()
        await listening(self.port)
        await until(self.register)

    async def post(self, path: str, body: object = None) -> object:
        async with self.client.post(f"http://127.0.0.1:{self.ingress}/{path}", json=body) as answer:
            if answer.status >= 300:
                raise ConnectionError(await answer.text())
            return await answer.json(content_type=None) if answer.status == 200 else None

    def stored(self) -> int:
        return on_disk(self.directory / "state")

    async def settled(self) -> None:
        """At most 1,000 invocations run at a time; one that waits is suspended after a minute."""
        end = time.monotonic() + 100
        states: list[dict[str, object]] = [{"status": "ready"}]
        while any(state["status"] in ("ready", "pending", "running") for state in states) and time.monotonic() < end:
            await asyncio.sleep(5)
            query = {"query": "SELECT status, count(*) AS count FROM sys_invocation WHERE target_service_name = 'waits' GROUP BY status"}
            async with self.client.post(f"http://127.0.0.1:{self.admin}/query", json=query, headers={"Accept": "application/json"}) as answer:
                states = (await answer.json())["rows"]
        print(states, flush=True)

    async def chain(self, id: str) -> None:
        await self.post(f"chain/{id}/run", 20)

    async def wait(self, id: str) -> None:
        await self.post(f"waits/{id}/run/send", variable(id))

    async def release(self, id: str) -> object:
        await self.post(f"waits/{id}/go", 1)
        async with self.client.get(f"http://127.0.0.1:{self.ingress}/restate/workflow/waits/{id}/attach") as answer:
            if answer.status >= 300:
                raise ConnectionError(await answer.text())
            return await answer.text()

    async def listen(self, id: str) -> None:
        return None

    async def tell(self, id: str, n: int) -> None:
        await self.post(f"listener/{id}/take", n)

    async def told(self, id: str) -> int:
        async with self.client.post(f"http://127.0.0.1:{self.ingress}/listener/{id}/taken", skip_auto_headers=["Content-Type"]) as answer:
            if answer.status >= 300:
                raise ConnectionError(await answer.text())
            return int(await answer.text())

    async def close(self) -> None:
        await self.client.close()


class NoDelay(Restate):
    """With TCP_NODELAY, which a socket that hypercorn makes itself lacks: asyncio sets it only where the protocol is given."""

    name = "Restate, TCP_NODELAY"

    async def start_worker(self) -> None:
        with socket.socket(socket.AF_INET, socket.SOCK_STREAM, socket.IPPROTO_TCP) as held:
            held.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            await until(lambda: held.bind(("127.0.0.1", self.port)))
            held.listen(100)
            self.worker = self.run(sys.executable, "-m", "hypercorn", "--bind", f"fd://{held.fileno()}", "app:app", log="worker", fds=(held.fileno(),))


class Promises(Restate):
    """The signals are durable promises of one workflow, each with a name of its own."""

    name = "Restate, promises of one workflow"

    async def listen(self, id: str) -> None:
        await self.post(f"promises/{id}/run/send", 1_000_000)

    async def tell(self, id: str, n: int) -> None:
        await self.post(f"promises/{id}/take_promise", n)

    async def told(self, id: str) -> int:
        async with self.client.post(f"http://127.0.0.1:{self.ingress}/promises/{id}/taken_promises", skip_auto_headers=["Content-Type"]) as answer:
            return int(await answer.text())


class Beside(Restate):
    """New code is a new deployment beside the old one, as the documentation says."""

    name = "Restate, a new deployment"

    async def deploy(self) -> None:
        beside = self.directory / "beside"
        beside.mkdir()
        self.write(2).rename(beside / "app.py")
        self.port = free_port()
        self.run(sys.executable, "-m", "hypercorn", "--bind", f"127.0.0.1:{self.port}", "app:app", log="worker", cwd=beside)
        await listening(self.port)
        await until(self.register)


if __name__ == "__main__":
    main({"restate": Restate, "no-delay": NoDelay, "promises": Promises, "beside": Beside})

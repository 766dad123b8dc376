"""The workloads, the same for every system, and what is measured of them.  Each on_*.py says how one system does them."""

from __future__ import annotations

import argparse
import asyncio
import contextlib
import json
import os
import pathlib
import random
import signal
import socket
import statistics
import string
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Coroutine, Iterable
from typing import Any

IN_FLIGHT = 100  # requests of the client at a time
INSERTED = "# INSERTED: "  # in the source of an application: what version 2 has before the wait


def variable(id: str) -> str:
    """300 bytes that hardly compress, others for each id."""
    return "".join(random.Random(id).choices(string.ascii_letters + string.digits, k=300))


class System:
    """One system: its servers, the process that runs the application, and what a client asks of it.  The client is this process, and is not counted."""

    name = ""
    source = ""  # of the application
    database: subprocess.Popen[bytes] | None = None

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.processes: list[subprocess.Popen[bytes]] = []
        self.worker: subprocess.Popen[bytes] | None = None
        self.ended_s = 0.0  # CPU time of workers that were killed

    # -- what each system says -----------------------------------------------------------------------------------------
    async def open(self) -> None:
        """Start the servers and the worker, and connect."""
        raise NotImplementedError

    async def start_worker(self) -> None:
        """Start the process that runs app.py; it need not be ready when this returns."""
        raise NotImplementedError

    def stored(self) -> int:
        """Bytes on disk."""
        raise NotImplementedError

    async def chain(self, id: str) -> None:
        """Run a workflow of 20 steps to its end."""
        raise NotImplementedError

    async def wait(self, id: str) -> None:
        """Start a workflow that waits for a signal."""
        raise NotImplementedError

    async def release(self, id: str) -> object:
        """Send the signal, wait for the end of the workflow, and return its result: the sum of the numbers of the steps that it ran."""
        raise NotImplementedError

    async def release_all(self, ids: list[str]) -> None:
        await at_once(self.release(id) for id in ids)

    async def listen(self, id: str) -> None:
        """Start a workflow that takes signals, one after the other."""
        raise NotImplementedError

    async def tell(self, id: str, n: int) -> None:
        """Send one."""
        raise NotImplementedError

    async def told(self, id: str) -> int:
        """How many it has taken."""
        raise NotImplementedError

    async def deploy(self) -> None:
        """Replace the worker by one with version 2."""
        self.kill_worker()
        self.write(2)
        await self.start_worker()

    async def settled(self) -> None:
        """Return when the workflows that were started wait; called before bytes are counted."""
        await asyncio.sleep(5)

    async def close(self) -> None:
        return None

    # -- processes -----------------------------------------------------------------------------------------------------
    def run(self, *command: str, log: str, environment: dict[str, str] | None = None, cwd: pathlib.Path | None = None, fds: tuple[int, ...] = ()) -> subprocess.Popen[bytes]:
        with open(self.directory / f"{log}.log", "ab") as to:
            process = subprocess.Popen(command, stdout=to, stderr=to, env={**os.environ, **(environment or {})}, cwd=cwd or self.directory, start_new_session=True, pass_fds=fds)
        self.processes.append(process)
        return process

    def write(self, version: int) -> pathlib.Path:
        """Write app.py; version 2 has the inserted step."""
        source = self.source.replace(INSERTED, "") if version == 2 else self.source
        path = self.directory / "app.py"
        path.write_text(source)
        return path

    def kill_worker(self) -> None:
        assert self.worker is not None
        self.ended_s += _cpu_s(self.worker.pid)
        os.killpg(self.worker.pid, signal.SIGKILL)
        self.worker.wait()
        self.processes.remove(self.worker)

    def stop(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(20)
            except subprocess.TimeoutExpired:
                process.kill()

    def cpu_s(self) -> float:
        """User and system time of all processes of the system so far, with those of their children."""
        return sum(_cpu_s(process.pid) for process in self.processes)


def _cpu_s(pid: int) -> float:
    try:
        fields = pathlib.Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        children = [int(child) for task in pathlib.Path(f"/proc/{pid}/task").iterdir() for child in (task / "children").read_text().split()]
    except OSError:
        return 0.0
    return sum(map(int, fields[11:15])) / os.sysconf("SC_CLK_TCK") + sum(map(_cpu_s, children))


def _others_s(system: System) -> float:
    """CPU time of this machine so far without that of the system and of this process."""
    fields = [int(field) for field in pathlib.Path("/proc/stat").read_text().splitlines()[0].split()[1:]]
    busy = sum(fields[:3]) + sum(fields[5:8])  # user, nice, system, interrupts, steal
    own = os.times()
    return busy / os.sysconf("SC_CLK_TCK") - system.cpu_s() - system.ended_s - own.user - own.system


def on_disk(*directories: pathlib.Path) -> int:
    """Bytes in files, without those that are only reserved or are holes."""
    size = 0
    for directory in directories:
        for path in directory.rglob("*"):
            with contextlib.suppress(OSError):
                found = path.lstat()
                size += min(found.st_size, found.st_blocks * 512)
    return size


def free_port() -> int:
    """A port below those that the kernel gives to outgoing connections; Temporal keeps it in 16 bits with a sign."""
    while True:
        port = random.randrange(12_000, 32_000)
        with socket.socket() as held, contextlib.suppress(OSError):
            held.bind(("127.0.0.1", port))
            return port


async def listening(port: int, limit_s: float = 60) -> None:
    await until(lambda: socket.create_connection(("127.0.0.1", port), 1).close(), limit_s)


async def until(attempt: Callable[[], Any], limit_s: float = 60, pause_s: float = 0.01) -> Any:
    """Repeat it until it raises nothing."""
    end = time.monotonic() + limit_s
    while True:
        try:
            found = attempt()
            return await found if asyncio.iscoroutine(found) else found
        except Exception:
            if time.monotonic() > end:
                raise
            await asyncio.sleep(pause_s)


async def at_once(requests: Iterable[Coroutine[Any, Any, Any]], count: int = IN_FLIGHT) -> None:
    """Run them all, at most `count` at a time."""
    left = iter(requests)

    async def one() -> None:
        for request in left:
            await request

    await asyncio.gather(*(one() for _ in range(count)))


class Postgres:
    """A Postgres in a directory of its own, with the settings of a new cluster but for its memory and connections: fsync and synchronous_commit are on."""

    SETTINGS = {"shared_buffers": "2GB", "max_connections": "300", "max_wal_size": "4GB", "listen_addresses": "127.0.0.1"}
    USER = "postgres"

    def __init__(self, system: System) -> None:
        self.port = free_port()
        self.data = system.directory / "postgres"
        self._bin = pathlib.Path(subprocess.run(["pg_config", "--bindir"], capture_output=True, text=True, check=True).stdout.strip())
        self._as = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.getuid() == 0 else []  # it does not run as root
        self.data.mkdir()
        if self._as:
            for directory in (system.directory, system.directory.parent):
                directory.chmod(0o755)
            subprocess.run(["chown", "postgres", str(self.data)], check=True)
        subprocess.run([*self._as, str(self._bin / "initdb"), "-D", str(self.data), "-U", self.USER, "-A", "trust"], check=True, capture_output=True)
        options = [f"-c{name}={value}" for name, value in {**self.SETTINGS, "port": str(self.port), "unix_socket_directories": str(self.data)}.items()]
        system.run(*self._as, str(self._bin / "postgres"), "-D", str(self.data), *options, log="postgres")
        self.url = f"postgresql://{self.USER}@127.0.0.1:{self.port}"

    def query(self, sql: str, database: str = "postgres") -> str:
        command = [str(self._bin / "psql"), "-qAt", f"{self.url}/{database}", "-c", sql]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    def size(self) -> int:
        """Bytes of all databases, with their indexes and without the WAL."""
        return int(self.query("SELECT sum(pg_database_size(datname)) FROM pg_database"))


class Measured:
    def __init__(self, system: System, options: argparse.Namespace) -> None:
        self.system = system
        self.options = options
        self.figures: dict[str, object] = {"load before": round(os.getloadavg()[0], 2)}

    def note(self, name: str, value: object) -> None:
        self.figures[name] = round(value, 3) if isinstance(value, float) else value
        print(f"{self.system.name}: {name}: {self.figures[name]}", flush=True)

    async def steps(self) -> None:
        system = self.system
        for n in range(5):
            await system.chain(f"warm-{n}")
        await at_once(system.chain(f"warm-many-{n}") for n in range(self.options.chains // 4))
        seconds = []
        for n in range(self.options.alone):
            begun = time.perf_counter()
            await system.chain(f"alone-{n}")
            seconds.append(time.perf_counter() - begun)
        self.note("20 steps alone, ms p50", 1000 * statistics.median(seconds))
        self.note("a step alone, ms p50", 50 * statistics.median(seconds))
        rates, cpus = [], []
        for turn in range(3):
            begun, spent = time.perf_counter(), system.cpu_s()
            await at_once((system.chain(f"many-{turn}-{n}") for n in range(self.options.chains)), self.options.chains)
            count = 20 * self.options.chains
            rates.append(count / (time.perf_counter() - begun))
            await asyncio.sleep(1)  # so that what it does just after the end is counted, too
            cpus.append(1000 * (system.cpu_s() - spent) / count)
        self.note(f"steps/s, {self.options.chains} at once (three runs)", [round(rate) for rate in rates])
        self.note("CPU ms a step, all processes (three runs)", [round(cpu, 3) for cpu in cpus])

    async def waiting(self) -> None:
        system, count = self.system, self.options.waiting
        ids = [f"waiting-{n}" for n in range(count)]
        await asyncio.sleep(2)
        before, begun, spent = system.stored(), time.perf_counter(), system.cpu_s()
        await at_once(system.wait(id) for id in ids)
        self.note(f"s to start {count} that wait", time.perf_counter() - begun)
        await system.settled()
        self.note("bytes stored for one that waits", (system.stored() - before) / count)
        self.note("CPU ms a start, all processes", 1000 * (system.cpu_s() - spent) / count)
        begun, spent = time.perf_counter(), system.cpu_s()
        await system.release_all(ids)
        self.note(f"s to signal and end {count}", time.perf_counter() - begun)
        self.note("CPU ms a signal and end, all processes", 1000 * (system.cpu_s() - spent) / count)

    async def signals(self) -> None:
        system, count, each = self.system, self.options.signals, self.options.signals // 20
        await system.listen("short")
        await system.tell("short", 0)
        await until(lambda: self.reached("short", 1))
        self.note("s from kill -9 of the worker to the next signal taken, after 1", await self.killed("short", 1))
        await system.listen("long")
        seconds, cpu = [], []
        for first in range(0, count, each):
            if first == count // 2:
                before = await system.told("long")
                self.note(f"s from kill -9 of the worker to the next signal taken, after {before}", await self.killed("long", before))
            start = await system.told("long")
            begun, spent = time.perf_counter(), system.cpu_s()
            await at_once((system.tell("long", n) for n in range(start, start + each)), self.options.in_flight)
            await until(lambda: self.reached("long", start + each), 300)
            seconds.append(time.perf_counter() - begun)
            cpu.append(1000 * (system.cpu_s() - spent) / each)
        self.note(f"ms for each of {each} signals: first, tenth, last", [round(1000 * took / each, 3) for took in (seconds[0], seconds[9], seconds[-1])])
        self.note(f"CPU ms for each of {each} signals: first, tenth, last", [round(took, 3) for took in (cpu[0], cpu[9], cpu[-1])])

    async def reached(self, id: str, count: int) -> None:
        found = await self.system.told(id)
        if found < count:
            raise TimeoutError(f"{id} has taken {found} signals of {count}")

    async def killed(self, id: str, before: int) -> float:
        """Seconds from kill -9 until a worker that is started at once has taken the next signal, which is sent at once, too."""
        self.system.kill_worker()
        begun = time.perf_counter()
        await self.system.start_worker()
        await until(lambda: self.system.tell(id, before), 120)
        await until(lambda: self.reached(id, before + 1), 300)
        return time.perf_counter() - begun

    async def idle(self) -> None:
        """What it uses while nothing is to be done."""
        await asyncio.sleep(3)
        spent = self.system.cpu_s()
        await asyncio.sleep(10)
        self.note("CPU ms a second, idle", 100 * (self.system.cpu_s() - spent))

    async def changed(self) -> None:
        """What becomes of a workflow that waits when a step is put before its wait."""
        await self.system.wait("changed")
        await asyncio.sleep(2)
        await self.system.deploy()
        try:
            result = await asyncio.wait_for(until(lambda: self.system.release("changed"), 20), 30)
            self.note("a step inserted before the wait", {"4": "ended without the inserted step", "6": "ended, and ran the inserted step"}.get(str(result), f"ended with {result}"))
        except Exception as error:
            self.note("a step inserted before the wait", f"{type(error).__name__}: {error}"[:300])


async def _measure(made: Callable[[pathlib.Path], System], options: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(prefix="comparison-", dir=options.directory, ignore_cleanup_errors=True) as directory:
        system = made(pathlib.Path(directory))
        measured = Measured(system, options)
        try:
            await system.open()
            for workload in options.workloads.split(","):
                others, begun = _others_s(system), time.perf_counter()
                try:
                    await getattr(measured, workload)()
                except Exception as error:
                    measured.note(f"{workload} failed", f"{type(error).__name__}: {error}"[:500])
                measured.note(f"cores used by others during {workload}", (_others_s(system) - others) / (time.perf_counter() - begun))
            measured.figures["load after"] = round(os.getloadavg()[0], 2)
            print(json.dumps({system.name: measured.figures}), flush=True)
            if options.out:
                with open(options.out, "a") as out:
                    print(json.dumps({system.name: measured.figures}), file=out)
            await system.close()
        finally:
            system.stop()
            if options.logs:
                for log in pathlib.Path(directory).glob("*.log"):
                    (options.logs / f"{system.name.replace(' ', '-')}-{log.name}").write_bytes(log.read_bytes())


def main(variants: dict[str, Callable[[pathlib.Path], System]]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("variant", nargs="?", default=next(iter(variants)), choices=[*variants])
    parser.add_argument("--workloads", default="idle,steps,waiting,signals,changed")
    parser.add_argument("--directory", type=pathlib.Path, help="where state is kept meanwhile; it must be on a disk")
    parser.add_argument("--logs", type=pathlib.Path, help="where the logs of servers and workers are copied to")
    parser.add_argument("--out", type=pathlib.Path, help="a file to which the figures are added as a line of JSON")
    parser.add_argument("--in-flight", type=int, default=IN_FLIGHT, help="signals of one workflow that are sent at a time")
    for name, count in {"alone": 40, "chains": 200, "waiting": 10_000, "signals": 20_000}.items():
        parser.add_argument(f"--{name}", type=int, default=count)
    options = parser.parse_args()
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(1))  # so that the processes end with this one
    asyncio.run(_measure(variants[options.variant], options))
    sys.exit(0)

"""Run in a child process by test_hostile.py: `hostile.py SEED COUNT PROGRESS`, with limits on memory and processor time.

Takes real snapshots, damages them, corrects the checksum of every other one, and loads them: each loads or raises
SnapshotError. An audit hook watches the loads: nothing is run, opened for writing, or imported beyond the allowed names.
Prints {"loaded", "refused", "wrong": [...]}. PROGRESS holds the number of the snapshot that is being loaded.
"""

import hashlib
import json
import pathlib
import random
import resource
import struct
import sys

ROOT = pathlib.Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "tests/durable")]

from kwflow import durable  # noqa: E402
from kwflow.core import snapshot  # noqa: E402
from kwflow.durable import names  # noqa: E402
from kwflow.errors import SnapshotError  # noqa: E402
from kwflow.testing import WorkflowTester  # noqa: E402
from tests.compat import kept  # noqa: E402

MEMORY_BYTES = 2 << 30
CPU_SECONDS = 600
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "os.remove", "os.rename", "os.fork", "subprocess.Popen", "socket.connect", "ctypes.dlopen", "compile", "exec", "marshal.loads")

FLOWS = '''
import itertools, re, decimal, datetime, pathlib, uuid, collections, functools
import kwflow as kw

class Rejected(Exception):
    def __init__(self, a, b):
        super().__init__(a)
        self.b = b

def book(kind, undo):
    class Local:
        def __init__(self, x):
            self.x = x
    held = Local(kind)
    try:
        item = yield kw.suspend(kind)
        undo.append(lambda: held.x)
        return item
    finally:
        undo.append(kind)

def main(opts):
    undo, it = [], itertools.chain([1, 2], {"a": 1}.items())
    table = {"price": decimal.Decimal("1.5"), "when": datetime.datetime(2024, 1, 2), "where": pathlib.PurePosixPath("/a"), "who": uuid.UUID(int=3), "n": 2**80, "t": (1, (2, frozenset("ab")))}
    found = re.search("b", "abc")
    queue = collections.deque([table], maxlen=3)
    call = functools.partial(int, base=2)
    next(it)
    try:
        raise Rejected(1, table)
    except Rejected as error:
        kept = error
        yield kw.race({"all": kw.all([book("car", undo), book("hotel", undo)]), "late": kw.sleep(1000)})
    return [undo, list(it), found.group(), call("11"), kept.b is table, len(queue)]
'''
# opcodes and operands that damage most cleverly: names, calls, memo, sizes
PIECES = [
    b"\x93", b"R", b"b", b"\x81", b"\x92", b"0", b"2", b"N", b"]", b"}", b")", b"\x85", b"\x86", b"a", b"e", b"s", b"u", b"t", b"(", b".", b"h\x00", b"h\x03", b"h\x0a", b"K\xff",
    b"\x8a\x01\x7f", b"J\xff\xff\xff\x7f", b"\x8b\xff\xff\xff\x7f", b"\x8d\xff\xff\xff\xff\xff\xff\xff\x0f", b"\x96\xff\xff\xff\xff\xff\x00\x00\x00", b"r\xff\xff\xff\x0f",
    b"\x95\xff\xff\xff\xff\xff\xff\xff\xff", b"\x8c\x02os\x94\x8c\x06system\x94\x93", b"\x8c\x08builtins\x94\x8c\x04eval\x94\x93", b"\x8c\x08builtins\x94\x8c\x05range\x94\x93",
    b"cos\nsystem\n", b"cbuiltins\nlist\n", b"\x8c\x05flows", b"\x82\x01", b"P1\n", b"Q",
]  # fmt: skip


def real() -> list[bytes]:
    """Snapshots of instances in several states."""
    module = durable.load_source("flows", FLOWS, "flows.py")
    made = []
    for answered in ((), ("car",), ("car", "hotel")):
        engine = WorkflowTester(module.main)
        engine.start("w", {"a": 1})
        for ref in answered[:1]:
            engine.resume("w", ref, {"ok": ref})
        made.append(engine.state.entries[b"w"])
    made += earlier()
    for data in made:
        snapshot.load(data)
    return made


def earlier() -> list[bytes]:
    """The largest snapshot that 0.1.0 stored."""
    found = []
    for scenario in kept.read("0.1.0", "instances.json.gz").values():
        state = kept.store(kept.msgspec.convert(scenario["steps"][0], kept.Step).state)
        found += [(len(data), data, scenario["module"]) for data in state.entries.values() if data[:4] == b"KWF1"]
    _, data, module = max(found)
    kept.load("0.1.0", "workflows", module)
    return [data]


def sealed(data: bytes) -> bytes:
    return data[:-32] + hashlib.sha256(data[:-32]).digest()


def damaged(data: bytes, others: list[bytes], chance: random.Random) -> bytes:
    """The data changed in one to four places, mostly in the body."""
    (length,) = struct.unpack(">I", data[4:8])
    made = bytearray(data)
    for _ in range(chance.choice((1, 1, 1, 2, 4))):
        first = 8 + length if chance.random() < 0.85 else 0
        at = chance.randrange(first, max(first + 1, len(made) - 32))
        way = chance.randrange(7)
        if way == 0:
            made[at] = chance.randrange(256)
        elif way == 1:
            made[at] ^= 1 << chance.randrange(8)
        elif way == 2:
            del made[at : at + chance.randint(1, 8)]
        elif way == 3:
            made[at:at] = chance.choice(PIECES)
        elif way == 4:
            piece = chance.choice(PIECES)
            made[at : at + len(piece)] = piece
        elif way == 5:
            other = chance.choice(others)
            start = chance.randrange(len(other))
            made[at:at] = other[start : start + chance.randint(1, 40)]
        else:
            start = chance.randrange(first, max(first + 1, len(made) - 32))
            made[at:at] = made[start : start + chance.randint(1, 40)]
    return bytes(made)


def main(seed: int, count: int, progress: pathlib.Path) -> None:
    durable.set_abandoning(True, everywhere=True)
    originals = real()
    for module in ("zoneinfo", "fractions"):  # what a load may import
        __import__(module)
    resource.setrlimit(resource.RLIMIT_AS, (MEMORY_BYTES, MEMORY_BYTES))
    resource.setrlimit(resource.RLIMIT_CPU, (CPU_SECONDS, CPU_SECONDS))
    watching = [False]
    done: list[str] = []

    def watch(event: str, arguments: tuple[object, ...]) -> None:
        if not watching[0]:
            return
        if event.startswith(FORBIDDEN) and not (event in ("compile", "exec") and _of_import()):
            done.append(f"{event} {arguments!r}"[:200])
        elif event == "open" and isinstance(arguments[1], str) and set(arguments[1]) & set("wax+"):
            done.append(f"open {arguments[0]!r} {arguments[1]}")
        elif event == "import" and not allowed_import(str(arguments[0])):
            done.append(f"import {arguments[0]}")

    sys.addaudithook(watch)
    chance = random.Random(seed)
    outcomes = {"loaded": 0, "refused": 0}
    wrong: list[str] = []
    for number in range(count):
        data = damaged(chance.choice(originals), originals, chance)
        if number % 2:
            data = sealed(data)
        progress.write_text(f"{number} {data.hex()}")
        watching[0] = True
        try:
            snapshot.load(data)
            outcomes["loaded"] += 1
        except SnapshotError:
            outcomes["refused"] += 1
        except BaseException as error:
            wrong.append(f"{number}: {type(error).__name__}: {error}"[:300])
        watching[0] = False
        wrong += [f"{number}: {text}" for text in done]
        done.clear()
    print(json.dumps({**outcomes, "wrong": wrong[:20]}))


def _of_import() -> bool:
    frame = sys._getframe(2)
    while frame is not None:
        if frame.f_code.co_filename.startswith("<frozen importlib") or frame.f_globals.get("__name__", "").startswith("kwflow.durable.lower"):
            return True
        frame = frame.f_back  # type: ignore[assignment]
    return False


def allowed_import(name: str) -> bool:
    return names.importable(name) or names.is_module_value(name) or name.partition(".")[0] in ("kwflow", "encodings") or name in sys.modules or name.startswith("_")


if __name__ == "__main__":
    main(int(sys.argv[1]), int(sys.argv[2]), pathlib.Path(sys.argv[3]))

"""Damaged bytes: each loads or raises SnapshotError, in a child process with limits. There is never a crash, a hang or a foreign import."""

import json
import os
import pathlib
import pickle
import pickletools
import subprocess
import sys
from typing import Any

import pytest

from kwflow import durable
from kwflow.errors import SnapshotError

CHILD = pathlib.Path(__file__).with_name("hostile.py")


def run(seed: int, count: int, tmp_path: pathlib.Path, seconds: float) -> None:
    progress = tmp_path / "progress"
    try:
        done = subprocess.run([sys.executable, str(CHILD), str(seed), str(count), str(progress)], capture_output=True, text=True, check=False, timeout=seconds)
    except subprocess.TimeoutExpired:
        pytest.fail(f"hangs, seed {seed}: {progress.read_text()[:20000]}")
    assert done.returncode == 0, f"ended with {done.returncode}, seed {seed}: {progress.read_text()[:20000]} {done.stderr[-2000:]}"
    told = json.loads(done.stdout.splitlines()[-1])
    assert told["wrong"] == []
    assert told["loaded"] + told["refused"] == count
    assert told["loaded"] > count // 100, "so much damage that nothing is tested"
    assert told["refused"] > count // 2


@pytest.mark.slow
def test_1500_damaged_snapshots_load_or_are_refused(tmp_path: pathlib.Path) -> None:
    """Half of them have a corrected checksum."""
    run(20261124, 1500, tmp_path, 100)


@pytest.mark.nightly
@pytest.mark.timeout(900)
def test_10000_damaged_snapshots_load_or_are_refused(tmp_path: pathlib.Path) -> None:
    """The seed is new each time, and is in the message if something is found."""
    run(int.from_bytes(os.urandom(4), "big"), 10_000, tmp_path, 800)


# -- what somebody who can correct the checksum may name ----------------------------------------------------------

SOURCE = """
import os, subprocess
from subprocess import Popen, run
from os import system

class Fine:
    pass

def fine():
    return 1

def gen():
    yield 1
"""


@pytest.fixture(scope="module")
def flow() -> Any:
    return durable.load_source("hostile_flow", SOURCE, "hostile_flow.py")


def named(module: str, name: str) -> bytes:
    """A body that names one thing and calls it with "x"."""
    encoded = b"".join(b"\x8c" + bytes([len(text)]) + text.encode() for text in (module, name))
    return b"\2\x80\x05" + encoded + b"\x93\x8c\x01x\x85R."


FORBIDDEN = [
    "os system", "posix system", "subprocess Popen", "builtins eval", "builtins exec", "builtins getattr", "builtins setattr", "builtins open", "builtins __import__",
    "builtins compile", "builtins globals", "builtins vars", "builtins input", "builtins breakpoint", "builtins object.__getattribute__", "operator attrgetter",
    "operator methodcaller", "operator call", "operator setitem", "types FunctionType", "types CodeType", "types ModuleType", "functools partial.__call__",
    "pathlib Path.write_text", "pathlib PosixPath.unlink", "shutil rmtree", "importlib import_module", "ctypes CDLL", "sys exit", "pickle loads", "pickle Unpickler",
    "marshal loads", "codecs open", "io open", "io FileIO", "tempfile TemporaryDirectory", "contextlib redirect_stdout", "weakref finalize", "threading Thread",
    "multiprocessing Process", "webbrowser open", "antigravity fly", "hostile_flow os.system", "hostile_flow system", "hostile_flow subprocess.run", "hostile_flow Popen",
    "hostile_flow run", "hostile_flow os", "hostile_flow fine.__globals__", "hostile_flow Fine.__init_subclass__", "hostile_flow gen.__code__", "kwflow.durable.loading _Unpickler",
    "kwflow.durable.codec loads", "kwflow.durable.loading sys.modules", "kwflow.durable.names allow_modules", "kwflow.durable.loader load_source",
    "kwflow.durable.registry register_code", "kwflow.durable.rebuild importlib.import_module", "kwflow.durable.rebuild builders", "kwflow.durable.runtime functools.partial",
    "kwflow.cli main", "kwflow.testing WorkflowTester", "kwflow.runners.modules load_workflows", "kwflow.core.snapshot load", "kwflow.api import_module",
]  # fmt: skip


@pytest.mark.parametrize("name", FORBIDDEN)
def test_names_outside_the_list_are_never_called(flow: Any, name: str) -> None:
    """wire.md §3: not with a correct checksum, and not through what an author's module has imported."""
    before = set(sys.modules)
    with pytest.raises(SnapshotError, match="not allowed|no longer exists|not loaded|no class or function"):
        durable.loads(named(*name.split(" ")))
    assert not {module for module in set(sys.modules) - before if not module.startswith("kwflow")}


def constructed(name: str, *arguments: Any) -> bytes:
    """A body that calls one of kwflow's constructors with these plain arguments."""
    call = named("kwflow.durable.rebuild", name)[:-6]
    return call + pickletools.optimize(pickle.dumps(arguments, 3))[2:-1] + b"R."  # without frames, whose lengths would be wrong here


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("bound", ("x", "__class__")),
        ("bound", ("x", "__reduce_ex__")),
        ("bound", (None, "x")),
        ("bound", (None, "__eq__")),
        ("imported_module", ("antigravity",)),
        ("imported_module", ("kwflow.durable.codec",)),
        ("imported_module", ("no_such_module",)),
        ("global_of", ("hostile_flow", "os")),
        ("global_of", ("hostile_flow", "system")),
        ("global_of", ("hostile_flow", "@kw")),
        ("global_of", ("os", "system")),
        ("named", ("hostile_flow", "os.system")),
        ("named", ("hostile_flow", "Popen")),
        ("path", ("Path.write_text", "x")),
        ("custom", ("no-such-reducer", 1)),
        ("instance", (99,)),
        ("set_class", (1, ({}, None))),
        ("set_contents", ({}, (None, {}))),
        ("set_contents", (1, (None, {}))),
        ("generator", ("os", "system")),
        ("generator", ("hostile_flow", "no_such")),
        ("match", (1, "search", "x", 0, 1)),
    ],
)
def test_constructors_make_nothing_but_what_a_save_would_have_named(flow: Any, name: str, arguments: tuple[Any, ...]) -> None:
    body = constructed(name, *arguments)
    assert len(list(pickletools.genops(body[1:]))) > 5  # it is a valid pickle, so the refusal comes from kwflow
    with pytest.raises(SnapshotError, match="a snapshot (names|holds|changes|fills) |is not loaded|no longer has a function|descriptor 'search'"):
        durable.loads(body)


BOMBS = {
    "a list of 2**60 items": b"\x80\x05\x8c\x08builtins\x8c\x05bytes\x93\x8a\x08\x00\x00\x00\x00\x00\x00\x00\x10\x85R.",
    "bytes of 2**60": b"\x80\x05\x8e\x00\x00\x00\x00\x00\x00\x00\x10.",
    "a bytearray of 2**60": b"\x80\x05\x96\x00\x00\x00\x00\x00\x00\x00\x10.",
    "text of 2**60": b"\x80\x05\x8d\x00\x00\x00\x00\x00\x00\x00\x10.",
    "a frame of 2**60": b"\x80\x05\x95\x00\x00\x00\x00\x00\x00\x00\x10N.",
    "a huge int": b"\x80\x05\x8b\xff\xff\xff\x7f.",
    "memo index 2**60": b"\x80\x05j\xff\xff\xff\xff.",
    "nothing": b"",
    "only the format": b"",
    "no list": b"\x80\x05K\x01.",
    "an empty list": b"\x80\x05].",
    "half a state": b"\x80\x05](NNK\x01e.",
    "an unknown kind": b"\x80\x05](NNK\x63NNe.",
}


@pytest.mark.parametrize("name", BOMBS)
def test_sizes_that_do_not_fit_are_refused(name: str) -> None:
    with pytest.raises(SnapshotError):
        durable.loads(b"\2" + BOMBS[name])
    if BOMBS[name]:
        with pytest.raises(SnapshotError):
            durable.loads(BOMBS[name] if name not in ("no list", "an empty list", "half a state", "an unknown kind") else BOMBS[name][:-1])

"""The bytes of archives (wire: Archives): a file of today is read by every later version."""

import gzip
import pathlib
import struct

import msgspec

from kwflow.config import Config
from kwflow.core.dispatch import Dispatch
from kwflow.runners import archive

HEAD = ["kwflow archive", 1, "f00d", "shop", "0.2.0", 1_796_000_000_000, False]
PARTS = [
    ["entry", "state", b"order-7", b"KWF1"],
    ["entry", "timers", b"\0due\0" + b"%020d\0%020d\0" % (5, 7) + b'w|{"ref":"7:1"}', b""],
    ["entry", "code", b"shop@00", b"{}"],
    ["sent", "resume", b"order-7", b"new:null", [["kwflow-start-id", b"x"], ["empty", None]], 1_796_000_000_001],
    ["sent", "dead-letter", None, None, [], 0],
    ["call", "payments", {"workflow_id": "order-7", "ref": "12:1", "name": "charge", "attempt": 1, "key": "12:1", "arguments": b"{}", "called_ms": 5}],
]
COUNTS = {"parts": 6, "instances": 1}


def test_an_archive_of_version_1_is_read(tmp_path: pathlib.Path) -> None:
    encoded = [msgspec.msgpack.encode(part) for part in [HEAD, *PARTS, ["end", COUNTS, 2]]]
    (tmp_path / "x").write_bytes(gzip.compress(b"".join(struct.pack(">I", len(part)) + part for part in encoded)))
    head, *found, tail = archive.parts(tmp_path / "x", Config())
    assert head == archive.Head(1, "f00d", "shop", "0.2.0", 1_796_000_000_000, False)
    assert tail == archive.Tail(COUNTS, 2)
    assert [list(msgspec.structs.astuple(part)) for part in found[:3]] == [part[1:] for part in PARTS[:3]]
    assert found[3:5] == [archive.Sent("resume", b"order-7", b"new:null", (("kwflow-start-id", b"x"), ("empty", None)), 1_796_000_000_001), archive.Sent("dead-letter", None, None, (), 0)]
    assert found[5] == archive.Call("payments", Dispatch("order-7", "12:1", "charge", 1, "12:1", b"{}", called_ms=5))
    assert archive.check(tmp_path / "x", Config()).queues == ["payments"]


def test_what_is_written_today_is_version_1(tmp_path: pathlib.Path) -> None:
    made = [archive.Entry("state", b"order-7", b"KWF1"), archive.Call("payments", Dispatch("order-7", "12:1", "charge", 1, "12:1", b"{}", called_ms=5))]
    archive.write(tmp_path / "x", Config(application_id="shop"), made, lambda: 2, 1_796_000_000_000)
    data, parts = gzip.decompress((tmp_path / "x").read_bytes()), []
    while data:
        (length,) = struct.unpack(">I", data[:4])
        parts.append(msgspec.msgpack.decode(data[4 : 4 + length]))
        data = data[4 + length :]
    head, *entries, tail = parts
    assert [*head[:2], head[3], *head[5:]] == ["kwflow archive", 1, "shop", 1_796_000_000_000, False]
    assert entries == [PARTS[0], PARTS[5]]
    assert tail[0] == "end" and tail[1]["parts"] == 2 and tail[2] == 2

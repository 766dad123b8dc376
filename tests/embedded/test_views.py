"""What other processes read of an embedded engine's directory while it writes: a state that there was, whole."""

import pathlib
import subprocess
import sys

from kwflow.runners.embedded.state import read_only
from kwflow.runners.rocks import entries
from tests.waiting import until

VIEWS = 150
WRITER = """
import os, pathlib, sys, time
from kwflow.runners import rocks

db = rocks.opened(pathlib.Path(sys.argv[1]), 1)  # tables of 64 KB: a log is deleted every 20 ms or so
number = 0
while True:
    db[b"a%04d" % (number % 1000)] = b"%d " % number + os.urandom(1000)
    number += 1
    if number % 4 == 0:
        time.sleep(0.001)  # an engine that writes without a pause would leave no moment for a view
"""


def test_a_view_beside_an_engine_has_everything_up_to_one_moment(tmp_path: pathlib.Path) -> None:
    """Decision 0065: a log that was written to a table and deleted while the view was opened was missing from it, and what came later was not."""
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(tmp_path / "state")])
    try:
        until(lambda: len(list((tmp_path / "state").glob("*.sst"))) > 1)
        for _ in range(VIEWS):
            db = read_only(tmp_path / "state")
            found = sorted(int(value.split(b" ", 1)[0]) for _, value in entries(db, b"a"))
            db.close()
            assert found == list(range(found[0], found[-1] + 1))
    finally:
        writer.kill()
        writer.wait()

"""The same steps in a Faust agent (`kwflow engine --runner faust`): at-least-once, on a real broker."""

import importlib.util
import json
import pathlib
import signal
import time
from collections.abc import Iterator

import pytest

from tests.integration.site import TRIP, Site, answer, refs

pytestmark = [
    pytest.mark.broker,
    pytest.mark.slow,
    pytest.mark.skipif(importlib.util.find_spec("faust") is None, reason="NOT TESTED: faust-streaming is not installed (kwflow[faust])"),
]


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    yield site
    site.end()


def test_sagas_go_on_after_kill_9_of_a_faust_engine_and_no_state_changes_twice(site: Site) -> None:
    """G6; outputs may appear twice, results do not change; `show` and `list` read the same changelog; bad records are dead letters."""
    ids = [f"{site.application}-{number}" for number in range(3)]
    engine = site.engine("one", TRIP, False, "--runner", "faust")
    site.send("bad", "{not json")
    site.send(ids[0], None)
    for id in ids:
        site.send(id, 'new:{"timeout": 600000}')
    asked = refs(site, ids, once=False)
    for id in ids:
        answer(site, id, asked[id]["car"])
    deadline = time.monotonic() + 60
    while any(f"suspension {asked[id]['car']} " in site.run("show", id) for id in ids):
        assert time.monotonic() < deadline, "the answers were not applied"
    engine.send_signal(signal.SIGKILL)
    engine.wait()
    for id in ids:
        answer(site, id, asked[id]["hotel"])
    site.engine("one", TRIP, False, "--runner", "faust")
    for id in ids:
        answer(site, id, asked[id]["flight"])
    found: dict[str, set[str]] = {}
    seen = 0
    deadline = time.monotonic() + 90
    while len(found) < len(ids):
        assert time.monotonic() < deadline, found
        results = site.read(site.topic("result"), seen + 1, 90)
        seen = len(results)
        for id, value in results:
            found.setdefault(id, set()).add(value)
    assert {id: sorted(values) for id, values in found.items()} == {id: [json.dumps({kind: {"id": asked[id][kind]} for kind in ("car", "hotel", "flight")}, separators=(",", ":"))] for id in ids}
    assert {id for id, _ in site.read(f"{site.application}-dead-letter", 2)} == {"bad", ids[0]}


def test_a_faust_engine_refuses_what_it_cannot_do(site: Site) -> None:
    assert "kwflow scheduler" in site.refused("engine", TRIP, "--runner", "faust", "--with-scheduler")


WITH_ACTIVITY = """
import kwflow as kw

@kw.activity
def double(n):
    return 2 * n

def main(opts):
    return (yield double(opts))
"""


def test_activities_run_beside_a_faust_agent(site: Site) -> None:
    """M6: their results come back as records."""
    module = site.directory / "doubling.py"
    module.write_text(WITH_ACTIVITY)
    site.engine("one", str(module), False, "--runner", "faust")
    for number in range(3):
        site.send(f"{site.application}-{number}", f"new:{number}")
    assert {id[-1]: value for id, value in site.read(site.topic("result"), 3)} == {"0": "0", "1": "2", "2": "4"}

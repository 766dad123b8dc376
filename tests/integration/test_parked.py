"""A parked instance on a real broker: what it holds is applied in order, exactly once, whoever has the partition meanwhile (semantics §7, K17)."""

import json
import pathlib
import signal
from collections.abc import Iterator

import pytest

from tests.integration.site import Site

pytestmark = [pytest.mark.broker, pytest.mark.slow]
RECORDS = 1200  # three transactions of a drain
COUNTING = """
import os
import kwflow as kw

kw.declare_topics("counted")

def main(opts):
    while True:
        value = yield kw.suspend("next")
        held = open(__file__) if value == 0 and not os.path.exists(opts["mended"]) else None
        kw.output(str(value), "counted")
        if held is not None:
            yield kw.suspend("never")
        if value == opts["last"]:
            return "done"
"""


@pytest.fixture
def site(broker: str, application: str, tmp_path: pathlib.Path) -> Iterator[Site]:
    site = Site(broker, application, tmp_path)
    yield site
    site.end()


def test_a_takeover_and_a_restore_in_the_middle_of_a_retry_change_nothing(site: Site) -> None:
    module, mended, id = site.directory / "counting.py", site.directory / "mended", f"{site.application}-w"
    module.write_text(COUNTING.replace('"counted"', f'"{site.application}-counted"'))
    site.run("topics", "create", str(module))
    first = site.engine("one", str(module), False)
    site.send(id, "new:" + json.dumps({"mended": str(mended), "last": RECORDS - 1}))
    for value in range(RECORDS):
        site.producer.produce(site.topic("resume"), f'{{"ref":"next","value":{value}}}', id)
    assert site.producer.flush(30) == 0
    site.until(lambda: f" {RECORDS} " in site.run("dead-letters", "list"))
    assert f"{RECORDS - 1} records wait behind it" in site.run("dead-letters", "show", id)
    mended.touch()
    site.run("dead-letters", "retry", id)
    site.read(f"{site.application}-counted", 1)
    first.send_signal(signal.SIGKILL)
    first.wait()
    site.engine("two", str(module), False)  # another identity, an empty state directory
    assert site.read(site.topic("result"), 1) == [(id, '"done"')]
    assert [value for _, value in site.read(f"{site.application}-counted", RECORDS)] == [str(value) for value in range(RECORDS)]

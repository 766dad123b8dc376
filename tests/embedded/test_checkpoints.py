"""Earlier states of an instance, as an operator looks at them and goes back to them (decision 0062)."""

from __future__ import annotations

import json
import pathlib
import re
import signal
from collections.abc import Iterator

import pytest

from kwflow.config import Config
from kwflow.runners.embedded.engine import Embedded
from kwflow.testing import WorkflowTester
from tests.embedded.test_code import HEAD, Deployments
from tests.embedded.test_console import Shop, at, text_of

TALK = HEAD + """
@kw.workflow(checkpoints=20)
def talk(question):
    said = [question]
    while len(said) < 4:
        said.append((yield kw.wait_signal("said")))
    return {0}
"""


@pytest.fixture
def site(tmp_path: pathlib.Path) -> Iterator[Deployments]:
    site = Deployments(tmp_path)
    yield site
    site.end()


def say(site: Deployments, id: str, *said: str) -> None:
    for value in said:
        site("signal", id, "said", "--value", json.dumps(value))


@pytest.mark.slow
def test_an_operator_finds_the_state_before_a_mistake_and_goes_back_to_it(site: Deployments) -> None:
    """It is stored with each step: an engine that was killed in between changes nothing."""
    site.deploy({"talks.py": TALK.format("said")}, "shop.talks")
    site("start", "talk-7", "--input", '"tea?"')
    say(site, "talk-7", "green", "no, bl")
    assert re.findall(r"│ (\d|now) ", site("checkpoints", "talk-7")) == ["0", "1", "now"]
    assert [(row["number"], row["status"]) for row in json.loads(site("checkpoints", "talk-7", "--json"))] == [(0, "waiting"), (1, "waiting")]
    assert "checkpoints 0 to 1" in site("show", "talk-7")
    assert "said = ['tea?', 'green']" in site("show", "talk-7", "--at", "1", "--locals")
    assert "'talk-7' has no checkpoint 2; kwflow checkpoints talk-7 lists those that there are" in site("show", "talk-7", "--at", "2", code=2)
    site.engines[-1].send_signal(signal.SIGKILL)
    site.engines[-1].communicate(timeout=30)
    site.engine("shop.talks", "--app-dir", str(site.folder))
    assert site("fork", "talk-7", "talk-8", "--at", "0").strip() == "talk-8"
    site("rewind", "talk-7", "--to", "1")
    assert "it has no checkpoint 9: there are 0 to 2" in site("rewind", "talk-7", "--to", "9", code=1)
    say(site, "talk-7", "black", "milk")
    say(site, "talk-8", "a", "b", "c")
    assert site("result", "talk-7").strip() == '["tea?","green","black","milk"]'
    assert site("result", "talk-8").strip() == '["tea?","a","b","c"]'


@pytest.mark.slow
def test_a_state_of_before_is_taken_into_a_test(site: Deployments, tmp_path: pathlib.Path) -> None:
    site.deploy({"talks.py": TALK.format("said")}, "shop.talks")
    site("start", "w", "--input", '"tea?"')
    say(site, "w", "a", "b")
    site("show", "w", "--at", "1", "--save", str(tmp_path / "w.json"))
    site.stop()
    tester = WorkflowTester()
    tester.load(tmp_path / "w.json")
    for value in ("x", "y"):
        tester.command("w", "signal", {"name": "said", "value": value})
    assert tester.result("w") == ["tea?", "a", "x", "y"]


@pytest.mark.slow
def test_the_code_of_an_earlier_state_is_kept_and_a_fix_is_moved_under_it(site: Deployments) -> None:
    """G10, decision 0061."""
    site.deploy({"talks.py": TALK.format("len(said)")}, "shop.talks")
    site("start", "w", "--input", '"tea?"')
    say(site, "w", "a", "b", "c")
    assert site("result", "w").strip() == "4"
    site.deploy({"talks.py": TALK.format("said")}, "shop.talks")
    site.stop()
    held = Embedded(site.directory)
    old = {record.key for record in held.read(Config().code_topic) if record.key is not None and record.key.startswith(b"shop.talks@")}
    held.close()
    assert len(old) == 1 and "1 of" not in site("code", "gc", "--dry-run")
    (row,) = [row for row in json.loads(site("code", "list", "--json")) if row["module"] == "shop.talks"]
    assert row["ids"] == ["w"]
    site.engine("shop.talks", "--app-dir", str(site.folder))
    site("fork", "w", "again", "--at", "2")
    site("code", "migrate", "again", "--in-place")
    say(site, "again", "d")
    assert site("result", "again").strip() == '["tea?","a","b","d"]'


@pytest.mark.slow
def test_the_console_goes_through_earlier_states_and_back_to_one(tmp_path: pathlib.Path) -> None:
    source = "import kwflow as kw\n" + "".join(f"def {name}(opts):\n    yield kw.suspend('r')\n" for name in ("other", "fails", "parent", "pays"))
    source += "def main(opts):\n    said = [opts]\n    while len(said) < 4:\n        said.append((yield kw.wait_signal('said')))\n    return said\nmain.kwflow_checkpoints = 9\n"
    shop = Shop(tmp_path, "console_checkpoints", source)
    try:
        http = shop.console()
        shop.start("w", "tea?")
        assert "Earlier states" not in http.get(at("w")).text
        for value in ("a", "b"):
            shop.client.signal("w", "said", value).result(20)
        assert f'<a href="{at("w")}?at=1">the last one</a>' in http.get(at("w")).text
        page = http.get(f"{at('w')}?at=1")
        assert "Where it waited" in page.text and "['tea?', 'a']" in text_of(page.text) and "kwflow rewind w --to 1" in page.text
        assert f'<a href="{at("w")}?at=0">earlier</a>' in page.text and '<span class="soft">later</span>' in page.text
        assert http.get(f"{at('w')}?at=7").status_code == 404 and http.get(f"{at('w')}?at=x").status_code == 400
        start_id = shop.client.query("w").result(20)["start_id"]
        assert http.post(f"{at('w')}/fork", data={"at": "0", "new_id": "copy"}).headers["location"] == f"{at('copy')}?done=fork"
        assert http.post(f"{at('w')}/rewind", data={"at": "0", "start_id": "another run"}).status_code == 409
        assert http.post(f"{at('w')}/rewind", data={"start_id": start_id}).status_code == 400
        answer = http.post(f"{at('w')}/rewind", data={"at": "1", "start_id": start_id})
        assert "It was put back to the checkpoint, and continues from there." in text_of(http.get(answer.headers["location"]).text)
        for id in ("w", "copy"):
            for value in ("x", "y", "z")[: 2 if id == "w" else 3]:
                shop.client.signal(id, "said", value).result(20)
        assert (shop.client.result("w").result(20), shop.client.result("copy").result(20)) == (["tea?", "a", "x", "y"], ["tea?", "x", "y", "z"])
    finally:
        shop.close()

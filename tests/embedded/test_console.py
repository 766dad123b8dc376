"""The console on an embedded engine that runs beside it: what pages show, what forms do, and who may enter (docs/CONSOLE.md)."""

from __future__ import annotations

import contextlib
import html
import pathlib
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from typing import Any
from urllib.parse import quote

import httpx
import pytest
from typer.testing import CliRunner

from kwflow import durable
from kwflow.cli import app
from kwflow.client import Client
from kwflow.config import Config
from kwflow.console.gate import is_local
from kwflow.console.site import Site
from kwflow.console.sources import Code, placed
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.core.picture import Frame
from kwflow.durable.peek import Shown
from kwflow.errors import CommandError, TransportError
from kwflow.runners.embedded.state import EmbeddedStore
from kwflow.runners.hosted import Hosted
from tests.embedded.serving import console
from tests.embedded.shell import ROOT
from tests.waiting import until

pytestmark = pytest.mark.slow
HOSTILE = "<img src=x onerror=alert(1)>\"'/../?a=b&c#d%2f"
TOKEN = "t" * 32
SOURCE = '''
import kwflow as kw

def ask(question):
    hidden = [lambda: question]
    answer = kw.suspend("answer")
    return (yield answer)              # as it was

def main(opts):
    kw.set_status({"customer": opts, "order": {"paid": False}})
    return (yield kw.timeout(ask("budget?"), 86400))

def other(opts):
    yield kw.suspend("go")
    held = open(__file__)
    yield kw.suspend("after")

def fails(opts):
    yield kw.suspend("go")
    raise ValueError(opts)

def parent(opts):
    yield kw.start_child("main", "kid", id=f"{opts}-kid")

@kw.activity(name="console-charge", retry=kw.Retry(first=3600, max=3600))
def charge(customer):
    raise ConnectionError(customer)

def pays(opts):
    yield charge(opts)
'''


class Shop:
    """An engine with instances, and consoles for it."""

    def __init__(self, directory: pathlib.Path, name: str = "console_case", source: str = SOURCE) -> None:
        self.directory = directory
        self.file = directory / f"{name}.py"
        self.file.write_text(source)
        module = durable.load_source(name, source, str(self.file))
        flows = Workflows({name: getattr(module, name) for name in ("main", "other", "fails", "parent", "pays")}, "main")
        self.hosted = Hosted(directory / "state", flows, Config(command_timeout_s=10), on_log=lambda _: None)
        self.client = Client.embedded(self.hosted.engine, self.hosted.config)
        self.stack = contextlib.ExitStack()

    def start(self, id: str, input: Any = None, workflow: str = "main") -> str:
        return self.client.start(id, input, workflow=workflow).result(20).start_id

    def status(self, id: str) -> str:
        return str(self.client.query(id).result(20)["status"])

    def park(self, id: str) -> None:
        self.start(id, workflow="other")
        with pytest.raises(CommandError, match="held"):
            self.client.resume(id, "go").result(20)

    def console(self, read_only: bool = False, place: pathlib.Path | None = None, connect: Callable[[], Client] | None = None, **settings: Any) -> httpx.Client:
        config, state = Config(command_timeout_s=10, **settings), place or self.directory / "state"
        site = Site(config, state, connect or (lambda: Client.embedded(state, config)), ["--embedded", str(state)], self.directory, read_only)
        return self.stack.enter_context(console(site))

    def close(self) -> None:
        self.stack.close()
        self.client.close()
        self.hosted.close()


@pytest.fixture(scope="module")
def shop(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Shop]:
    shop = Shop(tmp_path_factory.mktemp("console"))
    yield shop
    shop.close()


@pytest.fixture(scope="module")
def http(shop: Shop) -> httpx.Client:
    return shop.console()


def at(id: str) -> str:
    return f"/instances/{quote(id, safe='')}"


def text_of(page: str) -> str:
    """The text that a reader of the page sees."""
    return " ".join(html.unescape(re.sub(r"<[^>]*>", " ", page)).split())


def ids(page: str) -> list[str]:
    return [html.unescape(id) for id in re.findall(r'<td><a class="id" href="/instances/[^"]*">([^<]*)</a></td>', page)]


# -- what pages show ---------------------------------------------------------------------------------------------------
def test_the_list_tells_each_instance_what_it_waits_for_and_where_and_filters_by_all_of_it(shop: Shop, http: httpx.Client) -> None:
    shop.start("list-1", "Ada Lovelace")
    shop.start("list-2", "Bob")
    shop.start("list-3", workflow="other")
    said = text_of(http.get("/?id=list-").text)
    assert "list-1 main waiting suspension answer and 1 more ask console_case.py:7" in said and "waiting 3" in said
    assert "Newest first: 1 to 3 of 3." in said and "kwflow list --id list- --embedded" in said and f"from {shop.directory / 'state'} in" in said
    for query, found in (
        ({"id": "list-"}, ["list-3", "list-2", "list-1"]), ({"id": "*ist-1"}, ["list-1"]), ({"workflow": "other", "id": "list"}, ["list-3"]),
        ({"where": 'customer="Ada Lovelace"'}, ["list-1"]), ({"where": "order.paid=false customer=Bob"}, ["list-2"]), ({"where": "order.paid=true"}, []),
        ({"status": "ended", "id": "list"}, []), ({"since": "2h", "id": "list-1"}, ["list-1"]), ({"since": "2999-01-01", "id": "list"}, []),
    ):  # fmt: skip
        assert ids(http.get("/", params=query).text) == found, query


def test_the_pause_between_two_attempts_says_which_activity_is_tried_again(shop: Shop, http: httpx.Client) -> None:
    """On both pages, and in `kwflow show` and `kwflow list`."""
    shop.start("tries", "Ada", "pays")
    until(lambda: "pause before attempt 2 of console-charge" in text_of(http.get(at("tries")).text))
    assert "tries pays waiting pause before attempt 2 of console-charge pays console_case.py" in text_of(http.get("/?id=tries").text)
    for command in (["show", "tries"], ["list", "--id", "tries"]):
        assert "pause before attempt 2 of console-charge" in CliRunner().invoke(app, [*command, "--embedded", str(shop.directory / "state")], env={"COLUMNS": None}).output


def test_a_filter_that_means_nothing_is_refused_by_name(http: httpx.Client) -> None:
    wrong = {"status=dead": "must be one of", "since=soon": "since must be like", "where=paid": "be NAME=VALUE", "where='": "quotation", "color=red": "no filter color", "page=26": "25 pages"}
    for query, said in wrong.items():
        answer = http.get(f"/?{query}")
        assert answer.status_code == 400 and said in text_of(answer.text), query


def test_an_instance_is_shown_in_the_source_that_it_runs_also_when_the_file_has_changed_since(shop: Shop, http: httpx.Client) -> None:
    """The page shows the stored version (semantics §8.1): line, stack and variables are as they were."""
    shop.start("looked", "Ada")
    shop.start("mother", "mother", "parent")
    page = text_of(http.get(at("looked")).text)
    assert "as the file here" in page and "older than the file here" not in page
    try:
        shop.file.write_text("# another line\n" + SOURCE.replace("as it was", "as it is now").replace("return (yield answer)", "return [(yield answer)]"))
        answer = http.get(at("looked"))
    finally:
        shop.file.write_text(SOURCE)
    page = text_of(answer.text)
    assert "7 return (yield answer) # as it was waits here" in page and "as it is now" not in page
    assert "11 return (yield kw.timeout(ask(&quot;budget?&quot;), 86400)) waits here" in page.replace('"budget?"', "&quot;budget?&quot;")
    assert "older than the file here" in page and "the file here has changed, including what this instance runs: ask" in page
    assert "opts 'Ada'" in page and "question 'budget?'" in page and "timeout goes on with the first" in page and '"customer": "Ada"' in page
    assert "in 23 h 59 min" in page and "kwflow show looked --locals --embedded" in page
    assert page.index("main console_case.py:11") < page.index("timeout goes on") < page.index("ask console_case.py:7") < page.index("suspension answer since")
    assert f'href="{at("mother-kid")}"' in http.get(at("mother")).text and f'href="{at("mother")}"' in http.get(at("mother-kid")).text


def test_whatever_a_record_holds_is_text_on_every_page(shop: Shop, http: httpx.Client) -> None:
    shop.start(HOSTILE, HOSTILE)
    shop.client.pause(HOSTILE, HOSTILE).result(20)
    shop.client.start("-x", HOSTILE, workflow="fails").result(20)
    shop.client.resume("-x", "go", HOSTILE).result(20)
    with pytest.raises(CommandError):
        shop.client.start("letter", 1, workflow=HOSTILE).result(20)
    [letter] = re.findall(r'href="(/dead-letters/[^"?]+)"', http.get("/dead-letters").text)
    asked = (f"/?id={quote(HOSTILE)}", f"/?where={quote(HOSTILE)}", f"{at(HOSTILE)}/terminate?reason={quote(HOSTILE)}", at(HOSTILE + "no"))
    for path in ("/", at(HOSTILE), at("-x"), "/dead-letters", letter, *asked):
        answer = http.get(path)
        assert "<img" not in answer.text and "onerror=alert(1)" in html.unescape(answer.text) and answer.status_code in (200, 400, 404), path
        assert "default-src 'none'" in answer.headers["content-security-policy"] and answer.headers["x-content-type-options"] == "nosniff"
    assert "kwflow show --locals --embedded" in http.get(at("-x")).text and "-- -x" in http.get(at("-x")).text
    assert "raised in fails console_case.py:20" in text_of(http.get(at("-x")).text)
    assert http.get("/style.css").headers["content-type"].startswith("text/css")


def test_a_damaged_instance_is_listed_and_shown_with_the_reason(shop: Shop, http: httpx.Client) -> None:
    store = EmbeddedStore(shop.hosted.engine.db, shop.hosted.config.changelog_topic)
    shop.hosted.engine.db[store.prefix + b"broken"] = b"KWF?"
    whole = store.get(b"looked") or snapshot.save_ended({"id": "x", "workflow": "w", "start_id": "", "ended": 1})
    shop.hosted.engine.db[store.prefix + b"broken-body"] = snapshot.copy(b"\2nothing", snapshot.read_header(whole))
    assert ids(http.get("/?status=damaged").text) == ["broken"]
    assert "Its bytes cannot be read. these bytes are not a snapshot" in text_of(http.get(at("broken")).text)
    assert "Its variables are not shown: the body of a snapshot cannot be read" in text_of(http.get(at("broken-body")).text)
    for name, told in {"waits": [3], "updated": "soon", "workflow": 1, "parked": 1, "outcome": [], "code": 3}.items():
        shop.hosted.engine.db[store.prefix + b"broken-header"] = snapshot.copy(b"", {"v": 1, "id": "broken-header", "start_id": "", "status": "waiting", "waits": [], "workflow": "w", name: told})
        assert "the header of a snapshot is invalid: Expected" in text_of(http.get(at("broken-header")).text), name
        assert "broken-header" in ids(http.get("/?status=damaged").text)
    for id in (b"broken", b"broken-body", b"broken-header"):
        del shop.hosted.engine.db[store.prefix + id]


def test_a_source_that_no_python_can_read_is_said_beside_the_generator() -> None:
    """The source may be for another minor version. The parser of this one raises MemoryError for code that is nested too deeply."""
    frame = Frame("m", "main", "main", "1", {"x": 1}, ())
    for source in ("def main(:", "x = " + "-" * 100_000 + "1", "x = " + "1+" * 100_000 + "1", "\0"):
        found = placed(frame, {"m": Code("m", "", "m.py", source, "", ())}, Shown({}), 1)
        assert found.said.startswith("the Python of this console cannot read its source") and found.variables == [("x", "1")], source[:10]


def test_what_is_not_there_is_a_page_that_says_so(shop: Shop, http: httpx.Client) -> None:
    missing = {at("nobody"): "There is no instance nobody", "/nowhere": "There is no such page", "/dead-letters/0:99": "no open dead letter 0:99", at("\0hold"): "There is no instance"}
    for path, said in missing.items():
        answer = http.get(path)
        assert answer.status_code == 404 and said in text_of(answer.text), path
    assert http.get("/instances/%ff").status_code == 400
    answer = shop.console(place=shop.directory / "nothing").get("/")
    assert answer.status_code == 503 and "holds no embedded engine" in text_of(answer.text)


# -- what forms do -----------------------------------------------------------------------------------------------------
def test_forms_do_what_commands_do_and_lead_back_to_the_instance(shop: Shop, http: httpx.Client) -> None:
    shop.start("act", 1)

    def act(op: str, **fields: str) -> str:
        answer = http.post(f"{at('act')}/{op}", data=fields)
        assert (answer.status_code, answer.headers.get("location")) == (303, f"{at('act')}?done={op}"), answer.text
        return text_of(http.get(answer.headers["location"]).text)

    said = act("pause", reason="audit <now>")
    assert "It is paused: records for it are held. Paused. audit <now> Nothing is held." in said
    early = shop.client.signal("act", "early", 1)
    until(lambda: "1 record waits until it goes on." in text_of(http.get(at("act")).text))
    assert "It continues; what was held is applied in order." in act("unpause")
    early.result(20)
    assert "1 signal early , 1 signal note" in act("signal", name="note", value='{"a": 1}')
    assert "kw.Cancelled was raised where it waits." in act("cancel", reason="enough")
    assert shop.client.query("act").result(20)["outcome"]["kind"] == "cancelled"


def test_what_a_paused_instance_keeps_is_told_at_once_and_done_when_it_is_unpaused(shop: Shop, http: httpx.Client) -> None:
    """Its reply comes only then: the page waited 20 s for it, and told that no engine has replied."""
    shop.start("kept", 1)
    http.post(f"{at('kept')}/pause")
    for op, fields in (("signal", {"name": "note", "value": "1"}), ("cancel", {"reason": "enough"})):
        answer = http.post(f"{at('kept')}/{op}", data=fields)
        assert (answer.status_code, answer.headers.get("location")) == (303, f"{at('kept')}?done=kept"), text_of(answer.text)
    assert "It is paused, and keeps this until it is unpaused. Paused. No reason was given. 2 records wait until it goes on." in text_of(http.get(answer.headers["location"]).text)
    assert http.post(f"{at('kept')}/unpause").headers["location"] == f"{at('kept')}?done=unpause"
    assert shop.client.query("kept").result(20)["outcome"]["kind"] == "cancelled"


def test_a_form_is_for_the_run_that_its_page_showed(shop: Shop, http: httpx.Client) -> None:
    run = shop.start("runs", 1)
    assert f'value="{run}"' in http.get(at("runs")).text
    answer = http.post(f"{at('runs')}/pause", data={"start_id": "another"})
    assert answer.status_code == 409 and shop.status("runs") == "waiting" and "The engine refuses it" in text_of(answer.text)
    for fields, said in (({"name": "n", "value": "{"}, "the value is not JSON"), ({"value": "1"}, "signal")):
        answer = http.post(f"{at('runs')}/signal", data=fields)
        assert answer.status_code in (400, 409) and said in text_of(answer.text)
    assert http.post(f"{at('runs')}/explode").status_code == 404
    assert http.post(f"{at('runs')}/signal", content=b"value=" + b"1" * 3_100_000).status_code == 413
    assert http.post(f"{at('runs')}/signal", content=b"=&&\xff").status_code == 400


def test_terminate_asks_once_more(shop: Shop, http: httpx.Client) -> None:
    shop.start("end", 1)
    page = http.get(f"{at('end')}/terminate?reason=over").text
    assert "Terminate end ?" in text_of(page) and "The reason: over" in text_of(page) and "kwflow terminate end --reason over" in page and shop.status("end") == "waiting"
    assert http.post(f"{at('end')}/terminate", data={"reason": "over"}).status_code == 303
    assert "Outcome terminated" in text_of(http.get(at("end")).text)
    assert http.get(f"{at('end')}/cancel").status_code == 404


def test_parked_instances_and_letters_are_shown_with_the_record_at_fault_and_retried_or_discarded(shop: Shop, http: httpx.Client) -> None:
    """K13, K17."""
    for id in ("stuck", "dropped"):
        shop.park(id)
        for number in range(12):
            with pytest.raises(CommandError, match="held"):
                shop.client.signal(id, "note", number).result(20)
    page = text_of(http.get(at("stuck")).text)
    assert "UnsavableError variable 'held'" in page and "The record at fault, and 12 that wait behind it, are held" in page
    assert 'value {"ref":"go","value":null}' in page and "and 2 more" in page and "kwflow dead-letters retry stuck" in page
    listed = text_of(http.get("/dead-letters").text)
    assert "parked stuck UnsavableError" in listed
    assert http.post(f"{at('stuck')}/retry").status_code == 303
    assert "Discard dropped ? The record at fault is dropped for good" in text_of(http.get(f"{at('dropped')}/discard").text)
    assert http.post(f"{at('dropped')}/discard").status_code == 303
    shop.client.signal("dropped", "last").result(20)  # it comes after the discard: once it is answered, the rest is applied
    assert "12 signals note" in text_of(http.get(at("dropped")).text) and shop.status("stuck") == "parked"
    answer = http.post(f"{at('dropped')}/discard")
    assert answer.status_code == 400 and "neither a parked instance" in text_of(answer.text)
    for op in ("retry", "discard"):
        with pytest.raises(CommandError):
            shop.client.start(f"letter-{op}", 1, workflow="nobody").result(20)
        letter = http.get("/dead-letters?reason=unknown-workflow").text.split('href="/dead-letters/')[-1].split('"')[0]
        answer = http.post(f"/dead-letters/{letter}/{op}")
        assert (answer.status_code, answer.headers["location"]) == (303, f"/dead-letters?done=letter-{op}")
        assert http.get(f"/dead-letters/{letter}").status_code == 404


def test_an_instance_is_moved_onto_fixed_code_or_the_page_says_why_not(tmp_path: pathlib.Path) -> None:
    """Decision 0061."""
    source = SOURCE.replace("console-charge", "console-charge-2")
    shop = Shop(tmp_path, "console_fixed", source)
    try:
        http = shop.console()
        shop.park("stuck")
        assert "kwflow code migrate stuck --in-place" in http.get(at("stuck")).text
        answer = http.post(f"{at('stuck')}/migrate")
        assert answer.status_code == 409 and "it runs the code of the engine that was asked; if other code has been deployed, restart the engines first" in text_of(answer.text)
        durable.load_source("console_fixed", source.replace("held = open(__file__)", "held = None"), str(shop.file))
        answer = http.post(f"{at('stuck')}/migrate")
        assert answer.headers.get("location") == f"{at('stuck')}?done=migrate", answer.text
        assert "It continues in the code that the engine has now." in text_of(http.get(answer.headers["location"]).text)
        assert shop.client.query("stuck").result(20)["waits"][0]["ref"] == "after"
    finally:
        shop.close()


def test_a_command_that_no_engine_answers_says_so(shop: Shop) -> None:
    def lost() -> Client:
        raise TransportError("nobody is there")

    answer = shop.console(connect=lost).post(f"{at('looked')}/pause")
    assert answer.status_code == 503 and "nobody is there" in text_of(answer.text)


# -- who may enter -----------------------------------------------------------------------------------------------------
def test_without_tokens_only_a_host_that_dns_gives_nobody_else_is_answered(http: httpx.Client) -> None:
    """DNS rebinding: a page from elsewhere reaches this port under its own name."""
    for host in ("localhost", "LOCALHOST:8081", "127.0.0.1:8081", "[::1]:8081", "10.0.0.7"):
        assert is_local(host) and http.get("/style.css", headers={"Host": host}).status_code == 200
    for host in ("evil.example", "", "127.0.0.1.evil.example", "localhost@evil.example", "[::1", "localhost.evil.example:80", "evil.example#localhost", "localhost:80:80"):
        answer = http.get("/style.css", headers={"Host": host})
        assert not is_local(host) and answer.status_code == 403 and "set console_tokens" in answer.text, host


def test_a_form_counts_only_if_a_page_of_the_console_sent_it(shop: Shop, http: httpx.Client) -> None:
    shop.start("form", 1)
    own = str(http.headers.pop("Origin"))
    for headers in ({"Origin": own}, {"Origin": own.upper()}, {"Origin": own.replace("http", "https")}, {"Sec-Fetch-Site": "same-origin"}):
        assert http.post(f"{at('form')}/signal", data={"name": "n"}, headers=headers).status_code == 303
    others: list[dict[str, str]] = [{"Sec-Fetch-Site": site, "Origin": own} for site in ("cross-site", "same-site", "none")]
    for headers in ({}, {"Origin": "http://evil.example"}, {"Origin": "null"}, {"Origin": "http://127.0.0.1:9999"}, {"Origin": "http://[::1"}, {"Sec-Fetch-Site": "cross-site"}, *others):
        answer = http.post(f"{at('form')}/signal", data={"name": "n"}, headers=headers)
        assert answer.status_code == 403 and "use its form" in answer.text, headers
    http.headers["Origin"] = own


def test_with_tokens_the_password_is_one_of_them_and_any_host_is_answered(shop: Shop) -> None:
    http = shop.console(console_tokens=["s" * 32, TOKEN])
    refused = http.get("/", headers={"Host": "console.example"})
    assert refused.status_code == 401 and refused.headers["www-authenticate"].startswith("Basic ") and "list-" not in refused.text
    for user, password, status in (("", TOKEN, 200), ("anybody", TOKEN, 200), ("ops", "wrong", 401), (TOKEN, "", 401)):
        assert http.get("/", auth=(user, password), headers={"Host": "console.example"}).status_code == status
    for header in ("Basic", "Basic !!!", f"Bearer {TOKEN}", "Basic " + TOKEN):
        assert http.get("/", headers={"Authorization": header}).status_code == 401
    assert http.post(f"{at('form')}/pause", auth=("a", TOKEN), headers={"Origin": "http://evil.example"}).status_code == 403, "a browser sends the password with forms of others, too"
    assert http.get("/", auth=("a", TOKEN)).text.find(TOKEN) == -1


def test_read_only_leaves_all_forms_out_and_takes_none(shop: Shop) -> None:
    shop.start("quiet", 1)
    http = shop.console(read_only=True)
    assert 'method="post"' not in http.get(at("quiet")).text and "terminate" not in http.get(at("quiet")).text
    answer = http.post(f"{at('quiet')}/pause")
    assert answer.status_code == 403 and "start it without --read-only" in text_of(answer.text) and shop.status("quiet") == "waiting"
    assert http.get(f"{at('quiet')}/terminate").status_code == 404


def test_variables_are_shown_only_of_what_a_key_signed(shop: Shop) -> None:
    shop.start("unsigned", "secret")
    http = shop.console(snapshot_keys=["k" * 32])
    page = text_of(http.get(at("unsigned")).text)
    assert "Its variables are not shown: the snapshot is not signed" in page and "opts 'secret'" not in page


# -- the command -------------------------------------------------------------------------------------------------------
def test_the_command_does_not_listen_for_others_without_tokens_and_says_what_to_install(shop: Shop) -> None:
    refused = CliRunner().invoke(app, ["console", "--host", "0.0.0.0", "--embedded", str(shop.directory / "state")])
    assert refused.exit_code == 2 and "set console_tokens" in refused.output
    code = "import sys; sys.modules['jinja2'] = None; sys.argv[1:] = ['console']; from kwflow.cli import main; main()"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60, check=False)
    assert (done.returncode, done.stderr) == (2, "kwflow: kwflow console needs jinja2: pip install 'kwflow[console]'\n")

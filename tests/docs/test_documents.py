"""What the documents show is run: Python blocks as they stand (for commands, see test_commands.py; the tutorial has a test of its own)."""

import pathlib
import re
import subprocess
import sys

import pytest

from kwflow import declarations, durable
from kwflow.config import _SECTIONS, Config, load_config
from kwflow.runners.kafka import topics
from kwflow.testing import WorkflowTester

ROOT = pathlib.Path(__file__).parents[2]
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]


def blocks(path: pathlib.Path, language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", path.read_text(encoding="utf-8"), re.DOTALL)


SAMPLES = sorted(path for path in (ROOT / "workflows").glob("*.py") if (ROOT / f"docs/how-to/{path.stem.replace('_', '-')}.md").exists())
PYTHON = [(path, number, text) for path in DOCUMENTS if path.parent.name != "how-to" and path.name != "TUTORIAL.md" for number, text in enumerate(blocks(path, "python"))]


@pytest.mark.parametrize(("path", "number", "text"), PYTHON, ids=[f"{p.name}-{n}" for p, n, _ in PYTHON])
def test_python_blocks_run_as_they_stand(path: pathlib.Path, number: int, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(declarations, "_workflows", {})  # what a document registers is not there for other tests: the first workflow would be their default
    durable.load_source(f"document_{path.stem}_{number}", text, str(path))


def test_each_how_to_shows_its_sample_as_it_is() -> None:
    """The samples are those that tests/spec/test_samples.py runs."""
    assert len(SAMPLES) == len(list((ROOT / "docs/how-to").glob("*.md"))) >= 6
    for path in SAMPLES:
        [shown] = blocks(ROOT / f"docs/how-to/{path.stem.replace('_', '-')}.md", "python")
        assert shown == path.read_text(encoding="utf-8"), f"copy {path.name} into its how-to"


def test_the_example_of_the_readme_does_what_it_says() -> None:
    module = durable.load_source("approvals", blocks(ROOT / "README.md", "python")[0], "approvals.py")
    tester = WorkflowTester(module.main)
    tester.start("a")
    budget, legal = (text.split()[0] for text in tester.outputs_to("ask") if text)
    tester.resume("a", legal, True)
    tester.resume("a", budget, True)
    assert tester.result("a") == {"budget": True, "legal": True}
    tester.start("b")
    tester.advance(86_400)
    assert tester.values("workflow-error") == ["TimeoutError: kw.timeout: not done within 86400 s"]


LIBRARY = """
import sys
from kwflow import durable
durable.install(["markdown_it"])
module = durable.load_source("links", sys.argv[1], "links.py")
from kwflow.testing import WorkflowTester
tester = WorkflowTester(module.main)
tester.start("a", "[one](http://one) and [two](http://two)")
tester.resume("a", "http://one", "fine")
tester.resume("a", "http://two", "gone")
print(tester.result("a"))
"""


@pytest.mark.slow
def test_the_example_of_a_durable_library_does_what_it_says() -> None:
    """In a process of its own, in which nobody has imported the library before."""
    [shown] = [text for text in blocks(ROOT / "docs/LOCALS.md", "python") if "markdown_it" in text]
    done = subprocess.run([sys.executable, "-W", "error", "-c", LIBRARY, shown], capture_output=True, text=True, check=False, cwd=ROOT)
    assert done.stdout == "{'http://one': 'fine', 'http://two': 'gone'}\n", done.stderr


def test_a_migration_of_several_waits_does_what_it_says() -> None:
    """Semantics §8.5."""
    [new] = [text for text in blocks(ROOT / "docs/CODE.md", "python") if "shop.parcels" in text]
    old = "import kwflow as kw\ndef pack(item):\n    return (yield kw.suspend(item))\ndef main(opts):\n    return (yield kw.all([pack(item) for item in opts]))\n"
    declarations._migrations.clear()  # it was loaded under another name, too
    try:
        tester = WorkflowTester(durable.load_source("shop.parcels", old, "shop/parcels.py").main)
        tester.start("a", ["cup", "pot", "can"])
        tester.resume("a", "pot", 2)
        tester.deploy(durable.load_source("shop.parcels", new, "shop/parcels.py").main)
        assert tester.command("a", "migrate")["status"] == "ok"
        assert tester.waits("a") == ["cup", "can"]
        tester.resume("a", "can", 3)
        tester.resume("a", "cup", 1)
        assert tester.result("a") == [2, 1, 3]
    finally:
        declarations._migrations.clear()


def test_settings_that_are_shown_are_taken(tmp_path: pathlib.Path) -> None:
    """Also by librdkafka. The placeholder for a key is too short to be a key."""
    for number, text in enumerate(text for path in DOCUMENTS for text in blocks(path, "toml")):
        (tmp_path / f"{number}.toml").write_text(text.replace("output of: openssl rand", "output of: openssl  rand"), encoding="utf-8")
        topics.admin(load_config(tmp_path / f"{number}.toml"))


BY_PROCESSES = {"process", "supervisor_pid"}  # set by --processes for its own children
SETTINGS = re.findall(r"^\| `\[(\w+)\]` \| (.+?) \| (.+?) \|", (ROOT / "docs/OPERATIONS.md").read_text(encoding="utf-8"), re.MULTILINE)


def test_every_setting_is_documented_and_those_of_the_table_with_their_defaults() -> None:
    told = {_SECTIONS[section].format(name): text for section, names, texts in SETTINGS for name, text in zip(re.findall(r"`(\w+)`", names), texts.split(", "), strict=True)}
    text = (ROOT / "docs/OPERATIONS.md").read_text(encoding="utf-8")
    assert [name for name in Config.model_fields if name not in told and name not in BY_PROCESSES and not re.search(rf"\b{name}\b", text)] == []
    for name, default in told.items():
        real = Config.model_fields[name].get_default(call_default_factory=True)
        assert default == ("none" if real is None or real == [] else str(real).lower()), name


def anchors(path: pathlib.Path) -> set[str]:
    """The anchors that GitHub makes of the headings."""
    headings = re.findall(r"^#+ (.+)$", re.sub(r"```.*?```", "", path.read_text(encoding="utf-8"), flags=re.DOTALL), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("path", [*DOCUMENTS, ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md"], ids=lambda p: p.name)
def test_links_between_documents_lead_somewhere(path: pathlib.Path) -> None:
    for target, anchor in re.findall(r"\]\(([^)#:]*)#?([^):]*)\)", path.read_text(encoding="utf-8")):
        there = path.parent / target if target else path
        assert there.exists(), target
        assert not anchor or anchor in anchors(there), f"{target}#{anchor}"


def test_places_in_documents_that_the_code_names_are_there() -> None:
    named = {found for path in (ROOT / "kwflow").rglob("*.py") for found in re.findall(r"(docs/[\w/-]+\.md)(?:#([\w-]+))?", path.read_text(encoding="utf-8"))}
    assert named
    for document, anchor in named:
        assert not anchor or anchor in anchors(ROOT / document), f"{document}#{anchor}"
        assert (ROOT / document).exists(), document

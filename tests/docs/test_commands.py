"""docs/COMMANDS.md has every command and option as it is (KWFLOW_REWRITE=1 rewrites the file), and the commands that the documents show are valid."""

import os
import pathlib
import re
import shlex
from collections import Counter
from collections.abc import Iterator
from typing import Any

import pytest
import typer
import yaml

from kwflow.cli import app
from kwflow.config import Config

ROOT = pathlib.Path(__file__).parents[2]
FILE = ROOT / "docs/COMMANDS.md"
DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
EVERYWHERE = 8  # an option that at least this many commands have in the same words is described once
HEAD = """# Commands

This page is generated from the command line by `tests/docs/test_commands.py`; `kwflow COMMAND --help` prints the same. Commands print results on standard output,
and messages and errors on standard error. Exit codes: 0: success; 1: an error, or an outcome that is not a result; 2: wrong usage; 3: "start me again"
([OPERATIONS.md](OPERATIONS.md#processes)); 130: interrupted. Options that are not given are read from `KWFLOW_<COMMAND>_<OPTION>`, if that is set.

Options that many commands share; below, each command lists those that it has by name only:

"""


def leaves(command: Any, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Any]]:
    """Typer's commands are click's, or copies of them, depending on its version."""
    if hasattr(command, "commands"):
        for name in sorted(command.commands):
            yield from leaves(command.commands[name], (*path, name))
    else:
        yield path, command


COMMANDS = dict(leaves(typer.main.get_command(app)))


def options_of(command: Any) -> list[Any]:
    return [parameter for parameter in command.params if parameter.param_type_name == "option"]


def names_of(command: Any) -> set[str]:
    return {name for option in options_of(command) for name in (*option.opts, *option.secondary_opts)} | {"--help"}


def row(option: Any) -> str:
    default = "" if option.default in (None, False, "") or option.is_flag and not option.secondary_opts else f"; default: `{option.opts[0] if option.default is True else option.default}`"
    name = "/".join((*option.opts, *option.secondary_opts))
    variable = f"; or `{option.envvar}`" if option.envvar else ""
    return f"- `{name}`: {option.help.rstrip('.')}{default}{variable}\n"


def document() -> str:
    rows = Counter(row(option) for command in COMMANDS.values() for option in options_of(command))
    common = {line for line, count in rows.items() if count >= EVERYWHERE}
    parts = [HEAD + "".join(sorted(common))]
    for path, command in COMMANDS.items():
        text, _, example = (command.help or "").partition("Example: ")
        named = [(argument.metavar or argument.name.upper(), argument.required) for argument in command.params if argument.param_type_name == "argument"]
        arguments = "".join(f" {name}" if required else f" [{name}]" for name, required in named)
        own = [row(option) for option in options_of(command) if row(option) not in common]
        shared = [f"`{option.opts[0]}`" for option in options_of(command) if row(option) in common]
        parts.append(f"\n## kwflow {' '.join(path)}{arguments}\n\n{' '.join(text.split())}\n\n```sh\n{example.strip()}\n```\n")
        parts += ["\n" if own or shared else "", *own, f"- {', '.join(shared)}\n" if shared else ""]
    return "".join(parts)


def test_commands_md_has_every_command_and_option_as_they_are() -> None:
    if os.environ.get("KWFLOW_REWRITE"):
        FILE.write_text(document(), encoding="utf-8")
    assert FILE.read_text(encoding="utf-8") == document(), "the command line is another one now: KWFLOW_REWRITE=1 pytest tests/docs/test_commands.py"


def command_of(words: list[str]) -> tuple[Any, list[str]]:
    """The command that these words name, and the words after it."""
    known = next((path for path in (tuple(words[:2]), tuple(words[:1])) if path in COMMANDS), None)
    assert known is not None, words
    return COMMANDS[known], words[len(known) :]


def shown() -> Iterator[str]:
    """The command lines that are shown in blocks."""
    for path in DOCUMENTS:
        text = path.read_text(encoding="utf-8")
        yield from re.findall(r"^kwflow (.+)$", "\n".join(re.findall(r"```sh\n(.*?)```", text, re.DOTALL)), re.MULTILINE)
        yield from re.findall(r"^    kwflow (.+)$", text, re.MULTILINE)
        yield from re.findall(r"^ExecStart=\S+/kwflow (.+)$", text, re.MULTILINE)
        for container in containers(text):
            yield shlex.join(container["args"])


def containers(text: str) -> Iterator[dict[str, Any]]:
    """The containers of the manifests in YAML blocks."""
    for block in re.findall(r"```yaml\n(.*?)```", text, re.DOTALL):
        for manifest in yaml.safe_load_all(block):
            pod = manifest["spec"]["template"]["spec"]
            yield from [*pod.get("initContainers", []), *pod["containers"]]


@pytest.mark.parametrize("line", sorted(set(shown())))
def test_every_command_line_of_the_documents_is_understood(line: str) -> None:
    command, words = command_of([word for word in shlex.split(line, comments=True) if word != "&"])
    command.make_context("kwflow", words)


def test_what_a_manifest_sets_and_asks_for_is_there() -> None:
    """A variable that is not a setting is ignored, and a probe of a path that does not exist kills the pod."""
    found = list(containers((ROOT / "docs/DEPLOYING.md").read_text(encoding="utf-8")))
    assert [container["args"][0] for container in found] == ["topics", "engine", "worker", "gateway"]
    for container in found:
        assert {variable["name"].removeprefix("KWFLOW_").lower() for variable in container["env"]} <= Config.model_fields.keys()
        served = {"/health"} if container["args"][0] == "gateway" else {"/health/live", "/health/ready"}
        assert {probe["httpGet"]["path"] for name, probe in container.items() if name.endswith("Probe")} == (set() if container["args"][0] == "topics" else served)


def test_every_option_that_the_documents_name_exists() -> None:
    everywhere = set().union(*map(names_of, COMMANDS.values())) | {"--version"}
    for path in DOCUMENTS:
        text = re.sub("^kafka-acls .*$|^RUN .*$", "", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        assert set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)) <= everywhere, path
        for span in re.findall(r"`kwflow ([^`…]+?)`", text):
            words = re.sub(r"[|\[\]]", " ", span).split()
            if named := {word for word in words if word.startswith("--")} - {"--version", "--help"}:
                assert named <= names_of(command_of(words)[0]), f"{path}: {span}"

"""The releases that one run deploys: what changes in the workflow's source, and whether a newer kwflow runs it (G7, G10).

A deployment ends every process, and the next ones run the new code: code is process state, and all of them live in this
one.  The checkers play the same releases at the same moments.
"""

import dataclasses
import pathlib
import random
import sys

from kwflow import durable
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.durable import codec, registry, versions
from kwflow.durable.lower import LOWERING_VERSION

SOURCE = pathlib.Path(__file__).with_name("workflows.py")
_NAME = "sim_workflows"


@dataclasses.dataclass(frozen=True)
class Release:
    """`main`: the workflow's own code is another one; `helper`: only what it calls is; `newer`: the lowering of a kwflow that is to come."""

    main: int = 0
    helper: int = 0
    newer: bool = False

    @property
    def lowering(self) -> int:
        return LOWERING_VERSION + self.newer

    def source(self) -> str:
        text = SOURCE.read_text()
        for old, new in (('"main 0"', f'"main {self.main}"'), ("HELPER = 0", f"HELPER = {self.helper}")):
            assert old in text
            text = text.replace(old, new)
        return text


def draw(chance: random.Random) -> list[Release]:
    """Those that follow the first one.  The last has the newest kwflow, so that whatever was saved can be read in the end."""
    found, current = [], Release()
    for _ in range(chance.choice([0, 0, 0, 1, 3, 3])):
        new_main = chance.random() < 0.6
        current = Release(current.main + new_main, current.helper + (not new_main), chance.random() < 0.5)
        found.append(current)
    if found and any(release.newer for release in found):
        found[-1] = dataclasses.replace(found[-1], newer=True)
    return found


def install(release: Release) -> Workflows:
    """This is the code of the process from now on."""
    known, text = registry.modules().get(_NAME), release.source()
    module = sys.modules[_NAME] if known is not None and known.source == text else durable.load_source(_NAME, text, str(SOURCE))
    for where in (codec, snapshot, versions):
        where.LOWERING_VERSION = release.lowering
    return Workflows({"main": module.main}, "main")

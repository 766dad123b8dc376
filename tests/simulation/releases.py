"""The releases that one run deploys: what changes in the workflow's source, and whether a newer kwflow runs it (G7, G10).

Loaded code is state of a process, and all simulated processes share this one.  So each has a `Code`, which is loaded while one
of its actors runs.  The checkers play each transaction with the code of the process that made it.
"""

import dataclasses
import functools
import pathlib
import random
import re
import sys
import types
from typing import ClassVar, Optional

from kwflow import durable
from kwflow.core import snapshot
from kwflow.core.contract import Workflows
from kwflow.durable import codec, frames, registry, versions
from kwflow.durable.fingerprint import source_version
from kwflow.durable.lower import LOWERING_VERSION

SOURCE = pathlib.Path(__file__).with_name("workflows.py")
NAME = "sim_workflows"


@dataclasses.dataclass(frozen=True)
class Release:
    """A release.  `main` is the version of the workflow's own code, all functions of it, `helper` that of a function that it calls; `newer`: the lowering of a future kwflow."""

    main: int = 0
    helper: int = 0
    newer: bool = False

    @property
    def code(self) -> "Release":
        """The same code, without regard to which kwflow runs it."""
        return dataclasses.replace(self, newer=False)

    @property
    def lowering(self) -> int:
        return LOWERING_VERSION + self.newer

    @functools.cached_property
    def source(self) -> str:
        text = SOURCE.read_text()
        for old, new in (('"main 0"', f'"main {self.main}"'), ("HELPER = 0", f"HELPER = {self.helper}")):
            assert old in text
            text = text.replace(old, new)
        return re.sub(r"^( *)(def .*):$", rf"\1\2:\n\1    edit = {self.main}", text, flags=re.MULTILINE) if self.main else text

    @functools.cached_property
    def version(self) -> str:
        """The version as a snapshot names it."""
        return source_version(self.source)


def draw(chance: random.Random) -> list[Release]:
    """Draw the releases that follow the first one.  The last one has the newest kwflow, so that every snapshot can be read in the end."""
    found, current = [], Release()
    for _ in range(chance.choice([0, 0, 0, 1, 3, 3])):
        new_main = chance.random() < 0.6
        current = Release(current.main + new_main, current.helper + (not new_main), chance.random() < 0.5)
        found.append(current)
    if found and any(release.newer for release in found):
        found[-1] = dataclasses.replace(found[-1], newer=True)
    return found


def with_rollbacks(upcoming: list[Release], chance: random.Random) -> list[Release]:
    """Return these releases, where now and then the previous one is deployed again in between."""
    found: list[Release] = []
    for before, release in zip([Release(), *upcoming], upcoming, strict=False):
        found += [release, before, release] if chance.random() < 0.3 else [release]
    return found


class Code:
    """What one process has loaded: its release, and the stored versions that its instances needed."""

    _running: ClassVar[Optional["Code"]] = None

    def __init__(self, release: Release, checkpoints: int = 0) -> None:
        """`checkpoints`: how many earlier states its instances keep."""
        self.release = release
        self._versions: dict[str, registry.Module] = {}
        self._modules: dict[str, types.ModuleType] = {}
        self._module, self._current = _loaded(release)
        self._module.main.kwflow_checkpoints = checkpoints
        self.workflows = Workflows({"main": self._module.main}, "main")

    def enter(self) -> None:
        """Make this the loaded code from now on."""
        if Code._running is self:
            return
        if Code._running is not None:
            Code._running._leave()
        Code._running = self
        registry._modules[NAME] = self._current
        registry._versions.update(self._versions)
        sys.modules.update({**self._modules, NAME: self._module})
        for where in (codec, snapshot, versions):
            where.LOWERING_VERSION = self.release.lowering

    def _leave(self) -> None:
        self._versions, self._modules = _taken_out()


def _taken_out() -> tuple[dict[str, registry.Module], dict[str, types.ModuleType]]:
    """Take the loaded stored versions out of the registry, and return them."""
    names = [name for name, module in registry._versions.items() if module.name == NAME]
    return {name: registry._versions.pop(name) for name in names}, {name: sys.modules.pop(name) for name in names if name in sys.modules}


@functools.cache
def _loaded(release: Release) -> tuple[types.ModuleType, registry.Module]:
    """A release's module and its registry entry; loaded once for all processes, as nothing in it changes."""
    running = Code._running
    leave()
    registry._modules.pop(NAME, None)  # so that this is no reload, and nothing of another process is replaced
    found = durable.load_source(NAME, release.source, str(SOURCE)), registry._modules[NAME]
    if running is not None:
        running.enter()
    return found


def leave() -> None:
    """Unload the code of the simulated process that ran last."""
    if Code._running is not None:
        Code._running._leave()
        Code._running = None
    for where in (codec, snapshot, versions):
        where.LOWERING_VERSION = LOWERING_VERSION


def forget() -> None:
    """After a run, forget the code of stored versions, which the registry would keep alive."""
    leave()
    for identity, (_, function) in list(registry._functions.items()):
        home = function.home if isinstance(function, registry.Function) else getattr(function[0], "home", None)
        if home is not None and home.name == NAME and home.stored is not None:
            del registry._functions[identity]
            frames._plans.pop(identity, None)

"""What tests of the embedded engine share."""

import pathlib
from collections.abc import Iterator

import pytest

from tests.embedded.shell import Shell


@pytest.fixture
def shell(tmp_path: pathlib.Path) -> Iterator[Shell]:
    shell = Shell(tmp_path / "state")
    yield shell
    shell.end()

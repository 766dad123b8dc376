"""`kwflow code lowered`: what a function is compiled as."""

from __future__ import annotations

import importlib.util
import sys
from pathlib import Path
from typing import Annotated

import typer

from kwflow.cli.shared import AppDir, out
from kwflow.durable.lower.show import functions_of, lowered_text
from kwflow.errors import UsageError

__all__ = ["lowered"]


def lowered(
    target: Annotated[str, typer.Argument(metavar="MODULE[:FUNCTION]", help="Dotted name or path.py, and a function; without a function, list those of the module.")],
    cold: Annotated[bool, typer.Option("--cold", help="Print the twin that runs after a restore: it is entered at the label where the generator waited.")] = False,
    app_dir: AppDir = None,
) -> None:
    """Print the Python code that a durable function is compiled to.

    Example: kwflow code lowered workflows/trip_booking.py:main
    """
    module, _, path = target.partition(":")
    source, filename = _source(module, app_dir)
    if not path:
        for name in functions_of(source):
            out.print(name)
        return
    out.print(lowered_text(source, path, filename, cold))


def _source(module: str, app_dir: Path | None) -> tuple[str, str]:
    """Text and file of a module that is not imported."""
    if module.endswith(".py"):
        path = Path(module)
    else:
        sys.path.insert(0, str(app_dir or Path.cwd()))
        try:
            found = importlib.util.find_spec(module)
        except (ImportError, ValueError) as error:
            raise UsageError(f"cannot find {module}: {error}") from None
        if found is None or found.origin is None:
            raise UsageError(f"there is no module {module}")
        path = Path(found.origin)
    if not path.is_file():
        raise UsageError(f"{path}: no such file")
    return importlib.util.decode_source(path.read_bytes()), str(path)

"""Looking at instances: from their headers alone, no code of the author's is loaded."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

import typer
from rich.table import Table

from kwflow.cli.shared import Application, Bootstrap, ConfigFile, MaybeDir, out, snapshots
from kwflow.config import load_config
from kwflow.core import snapshot
from kwflow.durable.peek import peek
from kwflow.errors import UsageError

__all__ = ["list_", "show"]


def show(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    locals: Annotated[bool, typer.Option("--locals", help="Variables too; objects of your classes are shown as stubs.")] = False,
    config: ConfigFile = None,
) -> None:
    """Where an instance waits, from its header alone: no code of yours is loaded.

    Example: kwflow show order-7 --locals --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    if embedded is None:
        from kwflow.runners.kafka_link import state_of

        data = state_of(settings, id)
    else:
        data = snapshots(settings, embedded).get(id.encode())
    if data is None:
        raise UsageError(f"no instance {id!r}")
    header = snapshot.read_header(data)
    out.print(f"{id}  {header['workflow']}  {header['status']}  ({snapshot.seal_of(data, settings.signing_keys)})", markup=False, highlight=False)
    if "parked" in header:
        out.print(f"parked at offset {header['parked']['offset']}: {header['parked']['reason']}: {header['parked']['message']}", markup=False)
    for wait in header["waits"]:
        since = datetime.fromtimestamp(wait["since"] / 1000, UTC).isoformat(sep=" ", timespec="seconds")
        what = " ".join(str(wait[name]) for name in ("child", "name") if name in wait) + (f" attempt {wait['attempt']}" if "attempt" in wait else "")
        parts = [f"{wait['kind']} {wait['ref']}", what, wait.get("function", ""), f"{wait.get('file', '')}:{wait.get('line', '')}", f"since {since}"]
        out.print("  " + "  ".join(part for part in parts if part), markup=False, highlight=False)
    body = snapshot.split(data, settings.signing_keys)[1] if locals else b""  # variables only of what is verified, where there are keys
    for function, values in peek(body) if body else []:
        out.print(f"  {function}", markup=False, highlight=False)
        for name, value in values.items():
            out.print(f"    {name} = {value!r}"[:500], markup=False, highlight=False)


def list_(embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """All instances.

    Example: kwflow list --embedded ./state
    """
    table = Table("id", "workflow", "status", "waits")
    for key, data in sorted(snapshots(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded).items()):
        header = snapshot.read_header(data)
        table.add_row(key.decode(), header["workflow"], header["status"], ", ".join(wait["ref"] for wait in header["waits"]))
    out.print(table)

"""`kwflow export` and `kwflow import`: everything that an application's workflows are, in one file (decision 0065)."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from kwflow.cli.shared import Application, Bootstrap, ConfigFile, MaybeDir, err, out
from kwflow.config import load_config
from kwflow.runners.archive import described
from kwflow.runners.embedded.socket import is_served

__all__ = ["export", "import_"]

Archive = Annotated[Path, typer.Argument(metavar="FILE", help="The archive.")]


def export(file: Archive, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Write all workflows, with their timers, calls, dead letters and code, to one file.

    An embedded engine may run meanwhile: the file has what its directory has now. On Kafka, every engine and scheduler must be stopped.

    Example: kwflow export shop.kwflow --embedded ./state
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    if embedded is not None:
        from kwflow.runners.embedded.moving import take

        counts, left_out = take(settings, embedded, file)
        if is_served(embedded):
            left_out.append(f"an engine runs in {embedded}: this is a backup of what was there just now; to move the workflows, stop the engine and export again")
    else:
        from kwflow.runners.kafka.moving import take as take_from_kafka

        counts, left_out = take_from_kafka(settings, file)
    for line in left_out:
        err.print(line, style="yellow")
    out.print(f"{file}: {described(counts)}")


def import_(file: Archive, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Continue the workflows of an archive in a new directory, or in an application on Kafka that has none.

    What the archive was made from must not run again.

    Example: kwflow import shop.kwflow --application-id shop
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    if embedded is not None:
        from kwflow.runners.embedded.moving import bring

        counts, where = bring(settings, file, embedded), str(embedded)
    else:
        from kwflow.runners.kafka.moving import bring as bring_to_kafka

        counts, where = bring_to_kafka(settings, file), f"{settings.application_id} at {settings.bootstrap_servers}"
    out.print(f"{where}: {described(counts)}")

"""`kwflow topics`: what is missing is named, or created (K12)."""

from __future__ import annotations

from typing import Annotated

import typer

from kwflow import api
from kwflow.cli.shared import AppDir, Application, Bootstrap, ConfigFile, out
from kwflow.config import load_config
from kwflow.runners.modules import load_workflows

__all__ = ["topics_app"]

topics_app = typer.Typer(no_args_is_help=True, help="The Kafka topics of an application.")


@topics_app.command("create")
def topics_create(
    modules: Annotated[list[str] | None, typer.Argument(metavar="MODULE...")] = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    partitions: Annotated[int, typer.Option(help="For input and output topics.")] = 4,
    replication: Annotated[int, typer.Option(help="Replication factor.")] = 1,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Create the topics that are missing.

    Example: kwflow topics create workflows.trip_booking --bootstrap-servers localhost:9092
    """
    from kwflow.runners import topics

    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    if modules:
        load_workflows(modules, app_dir, settings.durable_packages)
    for topic in topics.create(topics.admin(settings), settings, api.declared_topics(), partitions, replication):
        out.print(f"created {topic}", markup=False)


@topics_app.command("check")
def topics_check(
    modules: Annotated[list[str] | None, typer.Argument(metavar="MODULE...")] = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Say what is missing; exit 1 if anything is.

    Example: kwflow topics check workflows.trip_booking
    """
    from kwflow.runners import topics

    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    if modules:
        load_workflows(modules, app_dir, settings.durable_packages)
    problems = topics.problems(topics.admin(settings), settings, api.declared_topics())
    for problem in problems:
        out.print(problem, markup=False)
    raise typer.Exit(1 if problems else 0)

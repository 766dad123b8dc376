"""`kwflow topics`: what is missing is named, or created (K12), or given more partitions; `kwflow reset`."""

from __future__ import annotations

import enum
from pathlib import Path
from typing import Annotated

import typer

from kwflow import api
from kwflow.cli.code import prepare_stored
from kwflow.cli.shared import AppDir, Application, Bootstrap, ConfigFile, StateDir, out
from kwflow.config import Config, load_config
from kwflow.feeds import registered_feeds
from kwflow.runners.modules import load_workflows

__all__ = ["From", "reset", "topics_app"]

topics_app = typer.Typer(no_args_is_help=True, help="The Kafka topics of an application.")


@topics_app.command("create")
def topics_create(
    modules: Annotated[list[str] | None, typer.Argument(metavar="MODULE...")] = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    partitions: Annotated[int, typer.Option(help="Number of partitions of input and output topics.")] = 4,
    replication: Annotated[int, typer.Option(help="Replication factor.")] = 1,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Create the topics that are missing.

    Example: kwflow topics create workflows.trip_booking --bootstrap-servers localhost:9092
    """
    from kwflow.runners.kafka import topics

    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    declared = _declared(settings, modules, app_dir)
    for topic in topics.create(topics.admin(settings), settings, declared | registered_feeds().keys(), partitions, replication):
        out.print(f"created {topic}")


@topics_app.command("check")
def topics_check(
    modules: Annotated[list[str] | None, typer.Argument(metavar="MODULE...")] = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Print which topics are missing or wrong; exit 1 if any are.

    Example: kwflow topics check workflows.trip_booking
    """
    from kwflow.runners.kafka import topics

    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id)
    declared = _declared(settings, modules, app_dir)
    problems = topics.problems(topics.admin(settings), settings, declared, [settings.application_id, settings.timers_group, *map(settings.feed_group, registered_feeds())])
    for problem in problems:
        out.print(problem)
    raise typer.Exit(1 if problems else 0)


def _declared(settings: Config, modules: list[str] | None, app_dir: Path | None) -> frozenset[str]:
    """Topics that these modules declare, and stored code that instances of theirs still run (semantics §9.6)."""
    from kwflow.runners.kafka import topics

    if modules:
        load_workflows(modules, app_dir, settings.durable_packages)
    if modules and {settings.code_topic, settings.changelog_topic} <= topics.partitions_of(topics.admin(settings), settings).keys():
        prepare_stored(settings)
    return api.declared_topics()


@topics_app.command("migrate")
def topics_migrate(
    partitions: Annotated[int, typer.Option(help="New number of partitions of the input topics and their changelogs; must be more than now.")],
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    config: ConfigFile = None,
) -> None:
    """Give a stopped application more partitions, and move its state to the partitions where its keys then belong.

    Example: kwflow topics migrate --partitions 12
    """
    from kwflow.runners.kafka import upkeep

    upkeep.migrate(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), partitions, out.print)


@topics_app.command("reencrypt")
def topics_reencrypt(bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Encrypt the state and the stored code of a stopped application with the first of `encryption_keys`, whether they were plain or encrypted with another key.

    Example: kwflow topics reencrypt
    """
    from kwflow.runners.kafka import upkeep

    upkeep.reencrypt(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), out.print)


class From(enum.StrEnum):
    """Where the input is read from after a reset."""

    earliest = "earliest"
    latest = "latest"


def reset(
    input_from: Annotated[From, typer.Option("--input-from", help="earliest: apply every record that is still there again.")] = From.latest,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    state_dir: StateDir = None,
    config: ConfigFile = None,
) -> None:
    """Delete every instance and timer of a stopped application; prints its plan and asks first.  (Embedded: delete the directory.)

    Example: kwflow reset --application-id shop --input-from latest
    """
    from kwflow.runners.kafka import upkeep

    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir)
    for line in upkeep.reset_plan(settings, input_from):
        out.print(line)
    if not yes and not typer.confirm("Do all this?"):
        raise typer.Exit(1)
    upkeep.reset(settings, input_from, out.print)

"""`kwflow …`: one clear line for every error, an exit code (0, 1 error, 2 usage, 3 start me again, 130 interrupted), never a traceback."""

from __future__ import annotations

import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from kwflow import api
from kwflow.config import Config, load_config
from kwflow.core import snapshot
from kwflow.errors import KwflowError, TransportError, UnsupportedError, UsageError
from kwflow.runners.embedded import Embedded, entries, read_only, stored
from kwflow.runners.loop import TimerProcessor, WorkflowProcessor
from kwflow.runners.modules import load_workflows
from kwflow.runners.socket import serve, submit

__all__ = ["app", "main"]

app = typer.Typer(no_args_is_help=True, add_completion=False, pretty_exceptions_enable=False, help="Durable workflows as plain Python generators.", rich_markup_mode=None)
dead = typer.Typer(no_args_is_help=True, help="Records that could not be applied, and parked instances.")
topics_app = typer.Typer(no_args_is_help=True, help="The Kafka topics of an application.")
app.add_typer(dead, name="dead-letters")
app.add_typer(topics_app, name="topics")
out, err = Console(soft_wrap=True), Console(stderr=True, soft_wrap=True)

Bootstrap = Annotated[str | None, typer.Option("--bootstrap-servers", help="H:P of Kafka; default from the config.")]
Application = Annotated[str | None, typer.Option("--application-id", help="Names the group and its topics.")]
StateDir = Annotated[Path | None, typer.Option("--state-dir", help="Local state; each engine its own.")]
MaybeDir = Annotated[Path | None, typer.Option("--embedded", envvar="KWFLOW_EMBEDDED", help="Directory of the embedded engine, instead of Kafka.")]
Dir = Annotated[Path, typer.Option("--embedded", envvar="KWFLOW_EMBEDDED", help="Directory of the embedded engine.")]
ConfigFile = Annotated[Path | None, typer.Option("--config", envvar="KWFLOW_CONFIG", help="kwflow.toml; default: the one here, if any.")]
AppDir = Annotated[Path | None, typer.Option("--app-dir", envvar="KWFLOW_APP_DIR", help="Where MODULEs are looked for first; default: here.")]
Modules = Annotated[list[str], typer.Argument(help="Dotted names or path.py", metavar="MODULE...")]


def _json(text: str, option: str) -> bytes:
    try:
        msgspec.json.decode(text)
    except msgspec.DecodeError as error:
        raise UsageError(f"{option} is not JSON: {error}") from None
    return text.encode()


def _processors(modules: list[str], config: Config, engine: Embedded, app_dir: Path | None) -> list[Any]:
    workflows = load_workflows(modules, app_dir)
    return [WorkflowProcessor(config, workflows, api.declared_topics(), engine.incarnation), TimerProcessor(config)]


def _stopper() -> Callable[[], bool]:
    """Flag-only signal handlers: the batch is finished whole; a second signal ends at once (semantics §2.5)."""
    asked: list[int] = []

    def on_signal(number: int, _frame: object) -> None:
        if asked:
            os._exit(128 + number)
        asked.append(number)

    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, on_signal)
    return lambda: bool(asked)


@app.command()
def engine(
    modules: Modules,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    state_dir: StateDir = None,
    with_scheduler: Annotated[bool, typer.Option("--with-scheduler", help="Run the timers in this process too.")] = False,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Run workflows until SIGTERM; embedded, their timers too.

    Example: kwflow engine workflows.trip_booking --bootstrap-servers localhost:9092 --with-scheduler
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir)
    stop = _stopper()
    if embedded is None:
        workflows = load_workflows(modules, app_dir)
        makers: list[tuple[str, Callable[[str], Any]]] = [(settings.application_id, lambda incarnation: WorkflowProcessor(settings, workflows, api.declared_topics(), incarnation))]
        if with_scheduler:
            makers.append((f"{settings.application_id}-scheduler", lambda _: TimerProcessor(settings)))
        _run_on_kafka(settings, makers, stop)
        return
    held = Embedded(embedded)
    try:
        processors = _processors(modules, settings, held, app_dir)
        with serve(held):
            err.print(f"kwflow engine runs in {embedded}", style="green")
            held.run(processors, stop, lambda line: err.print(line, markup=False))
            held.trim(processors)
    finally:
        held.close()


def _run_on_kafka(settings: Config, makers: list[tuple[str, Callable[[str], Any]]], stop: Callable[[], bool]) -> None:
    """Each processor on a thread of its own with its own clients; the first that fails stops all."""
    from kwflow.runners import kafka, topics

    problems = topics.missing(topics.admin(settings), settings, api.declared_topics())
    if problems:
        raise TransportError("; ".join(problems) + " (kwflow topics create makes them)", retryable=False)
    failed: list[BaseException] = []
    log = lambda line: err.print(line, markup=False)
    runners = [kafka.KafkaRunner(settings, make, group, log) for group, make in makers]

    def run_one(runner: kafka.KafkaRunner) -> None:
        try:
            runner.run(lambda: stop() or bool(failed))
        except BaseException as error:
            failed.append(error)

    threads = [threading.Thread(target=run_one, args=(runner,)) for runner in runners[1:]]
    for thread in threads:
        thread.start()
    err.print(f"kwflow engine runs on {settings.bootstrap_servers}", style="green")
    run_one(runners[0])
    for thread in threads:
        thread.join()
    if failed:
        raise failed[0]


@app.command()
def scheduler(bootstrap_servers: Bootstrap = None, application_id: Application = None, state_dir: StateDir = None, config: ConfigFile = None) -> None:
    """Run the timers on Kafka until SIGTERM; it runs no code of yours.

    Example: kwflow scheduler --bootstrap-servers localhost:9092
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir)
    _run_on_kafka(settings, [(f"{settings.application_id}-scheduler", lambda _: TimerProcessor(settings))], _stopper())


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
        load_workflows(modules, app_dir)
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
        load_workflows(modules, app_dir)
    problems = topics.missing(topics.admin(settings), settings, api.declared_topics())
    for problem in problems:
        out.print(problem, markup=False)
    raise typer.Exit(1 if problems else 0)


def _send(settings: Config, embedded: Path | None, id: str, value: bytes, headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
    """One record on the resume topic, embedded or on Kafka, durable when this returns."""
    if embedded is not None:
        submit(embedded, settings.resume_topic, id.encode(), value, headers)
        return
    from kwflow.client import send

    send(settings, settings.resume_topic, id.encode(), value, headers)


@app.command()
def run(
    module: Annotated[str, typer.Argument(metavar="MODULE")],
    input: Annotated[str, typer.Option("--input", help="JSON for main's argument.")] = "null",
    embedded: Annotated[Path, typer.Option("--embedded", envvar="KWFLOW_EMBEDDED")] = Path("kwflow-run"),
    id: Annotated[str, typer.Option("--id")] = "run",
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Start one workflow, run it to its end and print its result; started again, it goes on where it was.

    Example: kwflow run workflows/trip_booking.py --input '{"timeout": 60000}'
    """
    settings = load_config(config)
    stop = _stopper()
    held = Embedded(embedded)
    try:
        processors = _processors([module], settings, held, app_dir)
        ends = (settings.result_topic, settings.error_topic)
        begun = {topic: held.end(topic) for topic in ends}
        if stored(held.db, settings.changelog_topic).get(id.encode()) is None:
            held.append(settings.resume_topic, id.encode(), b"new:" + _json(input, "--input"))
        shown: set[str] = set()
        with serve(held):
            held.run(processors, lambda: stop() or _ended(held, begun, id) is not None or _show_waits(held, settings, id, shown), lambda line: err.print(line, markup=False))
        ended = _ended(held, begun, id)
    finally:
        held.close()
    if ended is None:
        raise typer.Exit(130)
    topic, value = ended
    (out if topic == settings.result_topic else err).print(value, markup=False, highlight=False)
    raise typer.Exit(0 if topic == settings.result_topic else 1)


def _ended(held: Embedded, begun: dict[str, int], id: str) -> tuple[str, str] | None:
    for topic, offset in begun.items():
        for record in held.read(topic, offset):
            if record.key == id.encode():
                return topic, (record.value or b"null").decode()
    return None


def _show_waits(held: Embedded, settings: Config, id: str, shown: set[str]) -> bool:
    data = stored(held.db, settings.changelog_topic).get(id.encode())
    for wait in snapshot.read_header(data)["waits"] if data is not None else []:
        if wait["ref"] not in shown and wait["kind"] == "suspension":
            shown.add(wait["ref"])
            err.print(f"waits for {wait['ref']} in {wait.get('function')} ({wait.get('file')}:{wait.get('line')}); answer with: kwflow resume {id} {wait['ref']}", markup=False)
    return False


@app.command()
def start(
    id: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    workflow: Annotated[str | None, typer.Option("--workflow", help="Name; default: the engine's first MODULE.")] = None,
    input: Annotated[str, typer.Option("--input", help="JSON for the workflow's argument.")] = "null",
    config: ConfigFile = None,
) -> None:
    """Start a workflow under an id; an id that runs is left alone.

    Example: kwflow start order-7 --input '{"items": 3}' --embedded ./state
    """
    headers = (("kwflow-workflow", workflow.encode()),) if workflow else ()
    _send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, b"new:" + _json(input, "--input"), headers)


@app.command()
def resume(
    id: str,
    ref: str,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    value: Annotated[str | None, typer.Option("--value", help="JSON that the yield returns.")] = None,
    error: Annotated[str | None, typer.Option("--error", help="JSON that is raised as kw.WorkflowError.")] = None,
    config: ConfigFile = None,
) -> None:
    """Answer a wait.

    Example: kwflow resume order-7 0:1 --value '"paid"' --embedded ./state
    """
    if value is not None and error is not None:
        raise UsageError("give --value or --error, not both")
    name, text = ("error", error) if error is not None else ("value", value or "null")
    message = b'{"ref":' + msgspec.json.encode(ref) + b',"%s":' % name.encode() + _json(text, f"--{name}") + b"}"
    _send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, message)


@app.command()
def show(id: str, embedded: Dir, config: ConfigFile = None) -> None:
    """Where an instance waits, from its header alone: no code of yours is loaded.

    Example: kwflow show order-7 --embedded ./state
    """
    db = read_only(embedded)
    try:
        data = stored(db, load_config(config).changelog_topic).get(id.encode())
    finally:
        db.close()
    if data is None:
        raise UsageError(f"no instance {id!r}")
    header = snapshot.read_header(data)
    out.print(f"{id}  {header['workflow']}  {header['status']}", markup=False)
    if "parked" in header:
        out.print(f"parked at offset {header['parked']['offset']}: {header['parked']['reason']}: {header['parked']['message']}", markup=False)
    for wait in header["waits"]:
        out.print(f"  {wait['kind']} {wait['ref']}  {wait.get('function', '')}  {wait.get('file', '')}:{wait.get('line', '')}  since {wait['since']}", markup=False, highlight=False)


@app.command("list")
def list_(embedded: Dir, config: ConfigFile = None) -> None:
    """All instances.

    Example: kwflow list --embedded ./state
    """
    db = read_only(embedded)
    table = Table("id", "workflow", "status", "waits")
    try:
        for key, data in stored(db, load_config(config).changelog_topic).scan(b""):
            if not key.startswith(b"\0"):
                header = snapshot.read_header(data)
                table.add_row(key.decode(), header["workflow"], header["status"], ", ".join(wait["ref"] for wait in header["waits"]))
    finally:
        db.close()
    out.print(table)


@app.command()
def tail(topic: str, embedded: Dir, offset: int = 0) -> None:
    """Print the records of a topic.

    Example: kwflow tail workflow-result --embedded ./state
    """
    db = read_only(embedded)
    try:
        prefix = b"L" + topic.encode() + b"\0"
        for _, value in entries(db, prefix, prefix + b"%020d" % offset):
            record = msgspec.msgpack.decode(value)
            out.print(f"{record['offset']} {_text(record['key'])} {_text(record['value'])}", markup=False, highlight=False)
    finally:
        db.close()


def _text(data: bytes | None) -> str:
    return "null" if data is None else bytes(data).decode("utf-8", "backslashreplace")


@dead.command("list")
def dead_list(embedded: Dir, config: ConfigFile = None) -> None:
    """What was dead-lettered, and why."""
    tail(load_config(config).dead_letter_topic, embedded)


@dead.command("retry")
def dead_retry(id: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, config: ConfigFile = None) -> None:
    """Apply what a parked instance holds, in order."""
    _send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, b"null", (("kwflow-op", b"retry"),))


@dead.command("discard")
def dead_discard(id: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, config: ConfigFile = None) -> None:
    """Drop the record that parked an instance, then apply the rest of what it holds."""
    _send(load_config(config, bootstrap_servers=bootstrap_servers), embedded, id, b"null", (("kwflow-op", b"discard"),))


def main() -> None:
    """The entry point: errors become one line."""
    try:
        app(standalone_mode=True)
    except (UsageError, UnsupportedError, SyntaxError) as error:
        err.print(f"kwflow: {error}", style="red", markup=False)
        sys.exit(2)
    except TransportError as error:
        err.print(f"kwflow: {error}", style="red", markup=False)
        sys.exit(3 if error.retryable else 1)
    except KwflowError as error:
        err.print(f"kwflow: {error}", style="red", markup=False)
        sys.exit(1)
    except KeyboardInterrupt:
        sys.exit(130)


if __name__ == "__main__":
    main()

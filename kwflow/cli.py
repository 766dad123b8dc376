"""`kwflow …`: one clear line for every error, an exit code (0, 1 error, 2 usage, 3 start me again, 130 interrupted), never a traceback."""

from __future__ import annotations

import os
import re
import signal
import sys
import threading
import time
from collections import Counter
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Annotated, Any

import msgspec
import typer
from rich.console import Console
from rich.table import Table

from kwflow import api
from kwflow.config import Config, load_config
from kwflow.core import snapshot, wire
from kwflow.core.wire import Record
from kwflow.durable.peek import peek
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
AcceptReset = Annotated[bool, typer.Option("--accept-offset-reset", help="Start from the group's offsets although they differ from the stored ones.")]
WaitForBroker = Annotated[float | None, typer.Option("--wait-for-broker", help="Seconds to wait for the broker and the topics; default 0.")]
Letter = Annotated[str, typer.Argument(metavar="ID|LETTER", help="A parked instance's id, or a dead letter as `dead-letters list` names it.")]
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
    with_scheduler: Annotated[bool, typer.Option("--with-scheduler", envvar="KWFLOW_WITH_SCHEDULER", help="Run the timers in this process too.")] = False,
    accept_offset_reset: AcceptReset = False,
    wait_for_broker: WaitForBroker = None,
    sync: Annotated[bool, typer.Option("--sync/--no-sync", envvar="KWFLOW_SYNC", help="Embedded: each batch is on disk before it counts.")] = True,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Run workflows until SIGTERM; embedded, their timers too.

    Example: kwflow engine workflows.trip_booking --bootstrap-servers localhost:9092 --with-scheduler
    """
    settings = load_config(
        config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir,
        accept_offset_reset=accept_offset_reset or None, wait_for_broker_s=wait_for_broker,
    )  # fmt: skip
    stop = _stopper()
    if embedded is None:
        workflows = load_workflows(modules, app_dir)
        makers: list[tuple[str, Callable[[str], Any]]] = [(settings.application_id, lambda incarnation: WorkflowProcessor(settings, workflows, api.declared_topics(), incarnation))]
        if with_scheduler:
            makers.append((f"{settings.application_id}-scheduler", lambda _: TimerProcessor(settings)))
        _run_on_kafka(settings, makers, stop)
        return
    held = Embedded(embedded, sync=sync, retention_ms=settings.embedded_retention_ms)
    try:
        processors = _processors(modules, settings, held, app_dir)
        with serve(held):
            err.print(f"kwflow engine runs in {embedded}", style="green")
            held.run(processors, stop, lambda line: err.print(line, markup=False))
            held.trim(processors)
            _say_counts(held.counts)
    finally:
        held.close()


def _say_counts(counts: Counter[str]) -> None:
    """What became of the records of this run (G3)."""
    err.print("records: " + (", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "none"), markup=False, highlight=False)


def _wait_for_topics(settings: Config) -> None:
    """Raises TransportError when broker or topics are not as they must be, after `wait_for_broker_s` of asking again."""
    from kwflow.runners import topics

    give_up = time.monotonic() + settings.wait_for_broker_s
    while True:
        try:
            found = topics.problems(topics.admin(settings), settings, api.declared_topics())
            if not found:
                return
            problem = TransportError("; ".join(found) + " (kwflow topics create makes what is missing)", retryable=False)
        except TransportError as error:
            problem = error
        if time.monotonic() >= give_up:
            raise problem
        time.sleep(0.5)


def _run_on_kafka(settings: Config, makers: list[tuple[str, Callable[[str], Any]]], stop: Callable[[], bool]) -> None:
    """Each processor on a thread of its own with its own clients; the first that fails stops all."""
    from kwflow.runners import kafka

    _wait_for_topics(settings)
    failed: list[BaseException] = []
    log = lambda line: err.print(line, markup=False)
    runners = [kafka.KafkaRunner(settings, make, group, log, outputs=api.declared_topics()) for group, make in makers]

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
    _say_counts(sum((runner.counts for runner in runners), Counter()))
    if failed:
        raise failed[0]


@app.command()
def scheduler(
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    state_dir: StateDir = None,
    accept_offset_reset: AcceptReset = False,
    wait_for_broker: WaitForBroker = None,
    config: ConfigFile = None,
) -> None:
    """Run the timers on Kafka until SIGTERM; it runs no code of yours.

    Example: kwflow scheduler --bootstrap-servers localhost:9092
    """
    settings = load_config(
        config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir,
        accept_offset_reset=accept_offset_reset or None, wait_for_broker_s=wait_for_broker,
    )  # fmt: skip
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
    problems = topics.problems(topics.admin(settings), settings, api.declared_topics())
    for problem in problems:
        out.print(problem, markup=False)
    raise typer.Exit(1 if problems else 0)


def _send(settings: Config, embedded: Path | None, id: str, value: bytes, headers: tuple[tuple[str, bytes | None], ...] = ()) -> None:
    """One record on the resume topic, embedded or on Kafka, durable when this returns."""
    _append(settings, embedded, settings.resume_topic, id.encode(), value, headers)


def _append(settings: Config, embedded: Path | None, topic: str, key: bytes | None, value: bytes | None, headers: wire.Headers) -> None:
    if embedded is not None:
        submit(embedded, topic, key, value, headers)
        return
    from kwflow.client import send

    send(settings, topic, key, value, headers)


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


def _read(settings: Config, embedded: Path | None, topic: str) -> list[Record]:
    """Every committed record of a topic that is still there."""
    if embedded is None:
        from kwflow.client import read

        return list(read(settings, topic))
    db = read_only(embedded)
    try:
        prefix = b"L" + topic.encode() + b"\0"
        return [msgspec.msgpack.decode(value, type=Record) for _, value in entries(db, prefix)]
    finally:
        db.close()


def _snapshots(settings: Config, embedded: Path | None) -> dict[bytes, bytes]:
    """Id -> stored bytes of every instance."""
    if embedded is None:
        latest = {record.key: record.value for record in _read(settings, None, settings.changelog_topic)}
        return {key: value for key, value in latest.items() if key is not None and value is not None and not key.startswith(b"\0")}
    db = read_only(embedded)
    try:
        return {key: value for key, value in stored(db, settings.changelog_topic).scan(b"") if not key.startswith(b"\0")}
    finally:
        db.close()


@app.command()
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
        from kwflow.client import state_of

        data = state_of(settings, id)
    else:
        data = _snapshots(settings, embedded).get(id.encode())
    if data is None:
        raise UsageError(f"no instance {id!r}")
    header, body = snapshot.split(data)
    out.print(f"{id}  {header['workflow']}  {header['status']}", markup=False)
    if "parked" in header:
        out.print(f"parked at offset {header['parked']['offset']}: {header['parked']['reason']}: {header['parked']['message']}", markup=False)
    for wait in header["waits"]:
        since = datetime.fromtimestamp(wait["since"] / 1000, UTC).isoformat(sep=" ", timespec="seconds")
        out.print(f"  {wait['kind']} {wait['ref']}  {wait.get('function', '')}  {wait.get('file', '')}:{wait.get('line', '')}  since {since}", markup=False, highlight=False)
    for function, values in peek(body) if locals and body else []:
        out.print(f"  {function}", markup=False, highlight=False)
        for name, value in values.items():
            out.print(f"    {name} = {value!r}"[:500], markup=False, highlight=False)


@app.command("list")
def list_(embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """All instances.

    Example: kwflow list --embedded ./state
    """
    table = Table("id", "workflow", "status", "waits")
    for key, data in sorted(_snapshots(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded).items()):
        header = snapshot.read_header(data)
        table.add_row(key.decode(), header["workflow"], header["status"], ", ".join(wait["ref"] for wait in header["waits"]))
    out.print(table)


@app.command()
def tail(topic: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, offset: Annotated[int, typer.Option(help="From this offset on.")] = 0, config: ConfigFile = None) -> None:
    """Print the committed records of a topic.

    Example: kwflow tail workflow-result --embedded ./state
    """
    for record in _read(load_config(config, bootstrap_servers=bootstrap_servers), embedded, topic):
        if record.offset >= offset:
            out.print(f"{record.offset} {_text(record.key)} {_text(record.value)}", markup=False, highlight=False)


def _text(data: bytes | None) -> str:
    return "null" if data is None else data.decode("utf-8", "backslashreplace")


_DONE = "kwflow-dead-letter-done"


def _letters(settings: Config, embedded: Path | None) -> dict[str, Record]:
    """Identity (`<partition>:<offset>`) -> dead letter that nobody has dealt with."""
    letters: dict[str, Record] = {}
    done: set[str | None] = set()
    for record in _read(settings, embedded, settings.dead_letter_topic):
        if any(name == _DONE for name, _ in record.headers):
            done.add(wire.header(record, _DONE))
        else:
            letters[f"{record.partition}:{record.offset}"] = record
    return {identity: record for identity, record in letters.items() if identity not in done}


def _letter(settings: Config, embedded: Path | None, identity: str) -> Record:
    found = _letters(settings, embedded).get(identity)
    if found is None:
        raise UsageError(f"no dead letter {identity!r} is open; kwflow dead-letters list shows them")
    return found


@dead.command("list")
def dead_list(embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """What could not be applied, and why.

    Example: kwflow dead-letters list --embedded ./state
    """
    table = Table("letter", "id", "reason", "message")
    for identity, record in _letters(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded).items():
        table.add_row(identity, _text(record.key), wire.header(record, "kwflow-error-reason"), wire.header(record, "kwflow-error-message"))
    out.print(table)


@dead.command("show")
def dead_show(letter: str, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """One dead letter with its headers.

    Example: kwflow dead-letters show 0:3 --embedded ./state
    """
    record = _letter(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, letter)
    out.print(f"key    {_text(record.key)}\nvalue  {_text(record.value)}", markup=False, highlight=False)
    for name, value in record.headers:
        out.print(f"{name}: {_text(value)}", markup=False, highlight=False)


@dead.command("retry")
def dead_retry(what: Letter, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Apply what a parked instance holds, in order, or send a dead-lettered record again.

    Example: kwflow dead-letters retry order-7 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, "retry")


@dead.command("discard")
def dead_discard(what: Letter, embedded: MaybeDir = None, bootstrap_servers: Bootstrap = None, application_id: Application = None, config: ConfigFile = None) -> None:
    """Drop the record that parked an instance and apply the rest, or close a dead letter.

    Example: kwflow dead-letters discard 0:3 --embedded ./state
    """
    _settle(load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id), embedded, what, "discard")


def _settle(settings: Config, embedded: Path | None, what: str, op: str) -> None:
    """K17 for a parked instance; a letter is sent again with its first timestamp in a header (K13), then marked as done."""
    if re.fullmatch(r"\d+:\d+", what) is None:
        _append(settings, embedded, settings.resume_topic, what.encode(), b"null", (("kwflow-op", op.encode()),))
        return
    record = _letter(settings, embedded, what)
    if wire.header(record, "kwflow-error-reason") == "parked":
        _append(settings, embedded, settings.resume_topic, record.key, b"null", (("kwflow-op", op.encode()),))
    elif op == "retry":
        headers = tuple(pair for pair in record.headers if not pair[0].startswith("kwflow-error-"))
        first = ("kwflow-original-timestamp", str(record.timestamp_ms).encode())
        _append(settings, embedded, wire.header(record, "kwflow-error-topic") or settings.resume_topic, record.key, record.value, (*headers, first))
    _append(settings, embedded, settings.dead_letter_topic, record.key, None, ((_DONE, what.encode()),))


def main() -> None:
    """The entry point: errors become one line."""
    try:
        app(standalone_mode=True, auto_envvar_prefix="KWFLOW")
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
    except Exception as error:
        if os.environ.get("KWFLOW_TRACEBACK"):
            raise
        err.print(f"kwflow: {type(error).__name__}: {error} (a bug of kwflow's; KWFLOW_TRACEBACK=1 shows where)", style="red", markup=False)
        sys.exit(1)


if __name__ == "__main__":
    main()

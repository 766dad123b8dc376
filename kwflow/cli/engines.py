"""The long-running commands: the engine, the scheduler, and `run` for one workflow."""

from __future__ import annotations

import contextlib
import enum
import functools
import gc
import resource
import shlex
import threading
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer

from kwflow import api, timers
from kwflow.cli.code import check as check_code
from kwflow.cli.serving import begin_processes, end_if_late, stopper, wait_for_topics
from kwflow.cli.shared import AcceptReset, AppDir, Application, Bootstrap, ConfigFile, Http, LogFormat, MaybeDir, Modules, StateDir, Traced, WaitForBroker, err, json_option, out
from kwflow.cli.watching import RestoreBar, carry_logging, ends_in_its_log, log_of, watched
from kwflow.config import Config, load_config
from kwflow.core import snapshot, wire
from kwflow.errors import UsageError
from kwflow.feeds import Feed, registered_feeds
from kwflow.runners.embedded.engine import Embedded
from kwflow.runners.embedded.socket import serve
from kwflow.runners.embedded.state import EmbeddedStore, changelogs_of
from kwflow.runners.feeds import FeedProcessor
from kwflow.runners.hosted import processors_of
from kwflow.runners.loop import WorkflowProcessor
from kwflow.runners.modules import load_modules, load_workflows
from kwflow.runners.outside import code_store
from kwflow.runners.supervise import orphaned
from kwflow.runners.watchdog import end_when_stuck

__all__ = ["Runner", "engine", "feed", "open_many_files", "run", "scheduler"]


class Runner(enum.StrEnum):
    """What runs the steps on Kafka."""

    kafka = "kafka"
    faust = "faust"


_COLLECT_AFTER = 20_000  # new objects; Python's 700 would be a collection every few steps, each past all live instances
_LOOK_S = 0.1  # how often the main thread looks at the runners' threads


def _be_an_engine(log: Callable[[str], None]) -> None:
    """What is right for a process that does nothing else."""
    carry_logging(log)
    end_when_stuck()
    _collect_rarely()
    open_many_files()


def _collect_rarely() -> None:
    """What was imported is never garbage, and a step leaves few cycles: collections are for authors' cycles, after batches, in large lots."""
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)


def open_many_files() -> None:
    """Each partition takes seven or more; what is usual, 1,024, is meant for programs that use select()."""
    _, most = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):  # a system may allow less than it says
        resource.setrlimit(resource.RLIMIT_NOFILE, (most, most))


def engine(
    modules: Modules,
    embedded: MaybeDir = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    state_dir: StateDir = None,
    runner: Annotated[Runner, typer.Option("--runner", envvar="KWFLOW_RUNNER", help="faust: run in a Faust application, at-least-once (needs kwflow[faust]).")] = Runner.kafka,
    with_scheduler: Annotated[bool, typer.Option("--with-scheduler", envvar="KWFLOW_WITH_SCHEDULER", help="Run the timers in this process too.")] = False,
    with_feeds: Annotated[bool, typer.Option("--with-feeds", envvar="KWFLOW_WITH_FEEDS", help="Run the feeds of the MODULEs in this process too.")] = False,
    accept_offset_reset: AcceptReset = False,
    wait_for_broker: WaitForBroker = None,
    processes: Annotated[int, typer.Option("--processes", min=1, envvar="KWFLOW_PROCESSES", help="Kafka: number of engine processes, usually one per core; a process that dies is restarted.")] = 1,
    http: Http = None,
    log_format: LogFormat = None,
    tracing: Traced = False,
    sync: Annotated[bool, typer.Option("--sync/--no-sync", envvar="KWFLOW_SYNC", help="Embedded: write each batch to disk before it counts.")] = True,
    check: Annotated[bool, typer.Option("--check", help="Run nothing; print what deploying MODULE would do to waiting instances; exit 1 if any would be parked.")] = False,
    migrations: Annotated[bool, typer.Option("--migrations", help="With --check: try the @kw.migrate functions on copies in memory. Your code runs for this; nothing is written or sent.")] = False,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Run workflows until SIGTERM; an embedded engine runs their timers and feeds, too.

    Example: kwflow engine workflows.trip_booking --bootstrap-servers localhost:9092 --with-scheduler
    """
    settings = load_config(
        config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir,
        accept_offset_reset=accept_offset_reset or None, wait_for_broker_s=wait_for_broker, http=http, log_format=log_format, tracing=tracing or None,
    )  # fmt: skip
    if check:
        raise typer.Exit(check_code(settings, modules, embedded, app_dir, migrations))
    if migrations:
        raise UsageError("--migrations is for --check: it says what kwflow code migrate would do")
    if processes > 1 and (embedded is not None or runner is Runner.faust):
        raise UsageError("--processes is for Kafka: only one process can use an embedded directory; with Faust, start as many workers as you like, each with its own --state-dir")
    begin_processes(settings, processes, log_of(settings))
    if runner is Runner.faust:
        _run_in_faust(settings, modules, app_dir, with_scheduler or with_feeds or embedded is not None)
    with ends_in_its_log(settings):
        if embedded is None:
            _engine_on_kafka(settings, modules, app_dir, with_scheduler, with_feeds)
        else:
            _engine_embedded(settings, modules, app_dir, embedded, sync)


def _engine_on_kafka(settings: Config, modules: list[str], app_dir: Path | None, with_scheduler: bool, with_feeds: bool) -> None:
    stop, log = stopper(), log_of(settings)
    workflows = load_workflows(modules, app_dir, settings.durable_packages)
    sources = functools.cache(lambda: code_store(settings, None))  # read once the topics are known to be there
    makers: list[tuple[str, Callable[[str], Any]]] = [
        (settings.application_id, lambda incarnation: WorkflowProcessor(settings, workflows, api.declared_topics(), incarnation, log, sources()))
    ]
    if with_scheduler:
        makers.append(timers.service(settings))
    if with_feeds:
        makers += _feeds(settings, modules, log)
    elif fed := sorted(registered_feeds()):
        log(f"{', '.join(fed)}: not read here; run the feeds of these modules with --with-feeds, or with kwflow feed {' '.join(modules)}")
    _run_on_kafka(settings, makers, stop, modules)


def _feeds(settings: Config, modules: Sequence[str], log: Callable[[str], None]) -> list[tuple[str, Callable[[str], FeedProcessor]]]:
    """The consumer group of each feed of these modules, and what makes its processor.  Raises UsageError when there is none."""
    if not registered_feeds():
        raise UsageError(f"no feed in {', '.join(modules)}; decorate a function with @kw.feed(topic)")

    def service(feed: Feed) -> tuple[str, Callable[[str], FeedProcessor]]:
        made = FeedProcessor(settings, feed, log)
        return settings.feed_group(feed.topic), lambda _incarnation: made

    return [service(feed) for feed in registered_feeds().values()]


def _engine_embedded(settings: Config, modules: list[str], app_dir: Path | None, directory: Path, sync: bool) -> None:
    stop, log = stopper(), log_of(settings)
    workflows = load_workflows(modules, app_dir, settings.durable_packages)  # before others find the directory held, and nobody there to take their records
    held = Embedded(directory, settings, sync=sync)
    try:
        processors = processors_of(held, workflows, settings, log)
        _be_an_engine(log)
        with serve(held), watched(settings, [held], log):
            log(f"kwflow engine runs in {directory}")
            others = [name.removesuffix("-state-changelog") for name in changelogs_of(held.db) if name not in (settings.changelog_topic, settings.timers_changelog_topic)]
            if others:
                log(f"it leaves what belongs to the application {others[0]} alone: to continue that, start it with --application-id {others[0]}, or its configuration file")
            held.run(processors, lambda: stop() or orphaned(settings.supervisor_pid), log)
            _say_counts(held.counts, log)
    finally:
        held.close()


def _run_in_faust(settings: Config, modules: list[str], app_dir: Path | None, more: bool) -> NoReturn:
    """Faust's own worker handles the signals and ends the process."""
    if more:
        beside = "leave out --embedded, --with-scheduler and --with-feeds, and run `kwflow scheduler` and `kwflow feed` beside it"
        raise UsageError(f"--runner faust runs on Kafka, fires no timers and reads no feeds: {beside}")
    if settings.kafka:
        raise UsageError("--runner faust does not use [kafka] settings, which are for librdkafka; configure a faust.App of your own and pass it to kwflow.runners.faust.attach")
    try:
        import faust
    except ImportError:
        raise UsageError("--runner faust needs faust-streaming: pip install 'kwflow[faust]'") from None
    from kwflow.runners.faust import application
    from kwflow.runners.kafka.link import ends_in_a_transaction

    workflows = load_workflows(modules, app_dir, settings.durable_packages)
    log = log_of(settings)
    wait_for_topics(settings, log, [settings.application_id], modules)
    if ends_in_a_transaction(settings, settings.changelog_topic):
        raise UsageError(
            f"{settings.changelog_topic} was written in transactions by the Kafka runner, and Faust never reaches the end of such a topic; "
            "use another --application-id, or run kwflow reset first"
        )
    app, agent = application(settings, lambda incarnation: WorkflowProcessor(settings, workflows, api.declared_topics(), incarnation, log, code_store(settings, None)), log)
    err.print(f"kwflow engine runs in Faust on {settings.bootstrap_servers}, at-least-once", style="green")
    with watched(settings, [agent], log):
        raise SystemExit(faust.Worker(app, loglevel="WARNING").execute_from_commandline())


def _say_counts(counts: Counter[str], log: Callable[[str], None]) -> None:
    """What became of the records of this run (G3)."""
    log("records: " + (", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "none"))


def _run_on_kafka(settings: Config, makers: list[tuple[str, Callable[[str], Any]]], stop: Callable[[], bool], modules: Sequence[str] = (), what: str = "engine runs") -> None:
    """Each processor on a thread of its own with its own clients; the first that fails stops all."""
    from kwflow.runners.kafka import runner as kafka
    from kwflow.runners.kafka.environment import live

    log, bar = log_of(settings), RestoreBar()
    wait_for_topics(settings, log, [group for group, _ in makers], modules, stop)
    if stop():
        return
    failed: list[BaseException] = []
    environment = live(settings.rocksdb_bytes_max, log)
    runners: list[kafka.KafkaRunner] = []

    def run_one(runner: kafka.KafkaRunner) -> None:
        try:
            runner.run(lambda: stop() or bool(failed) or orphaned(settings.supervisor_pid))
        except BaseException as error:
            failed.append(error)

    with contextlib.ExitStack() as stack:
        unrun = stack.enter_context(contextlib.ExitStack())
        for group, make in makers:
            runners.append(kafka.KafkaRunner(settings, make, group, log, outputs=api.declared_topics(), environment=environment))
            unrun.callback(runners[-1].close)
        threads = [threading.Thread(target=run_one, args=(runner,)) for runner in runners]
        _be_an_engine(log)
        address = stack.enter_context(watched(settings, runners, log))
        for runner in runners:
            runner.owners.address = address
        unrun.pop_all()  # each closes itself at the end of its run
        for thread in threads:
            thread.start()
        log(f"kwflow {what} on {settings.bootstrap_servers}")
        while any(thread.is_alive() for thread in threads):
            bar.look({where: progress for runner in runners for where, progress in runner.restoring().items()})
            end_if_late(runners, 2 * settings.step_abort_ms / 1000 + settings.activity_grace_s, log)
            threads[0].join(_LOOK_S)
        for thread in threads:
            thread.join()
    _say_counts(sum((runner.counts for runner in runners), Counter()), log)
    if failed:
        raise failed[0]


def scheduler(
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    state_dir: StateDir = None,
    accept_offset_reset: AcceptReset = False,
    wait_for_broker: WaitForBroker = None,
    http: Http = None,
    log_format: LogFormat = None,
    config: ConfigFile = None,
) -> None:
    """Run the timers on Kafka until SIGTERM; none of your code runs in it.

    Example: kwflow scheduler --bootstrap-servers localhost:9092
    """
    settings = load_config(
        config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir,
        accept_offset_reset=accept_offset_reset or None, wait_for_broker_s=wait_for_broker, http=http, log_format=log_format,
    )  # fmt: skip
    with ends_in_its_log(settings):
        _run_on_kafka(settings, [timers.service(settings)], stopper())


def feed(
    modules: Modules,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    state_dir: StateDir = None,
    wait_for_broker: WaitForBroker = None,
    processes: Annotated[int, typer.Option("--processes", min=1, envvar="KWFLOW_PROCESSES", help="Number of processes, usually one per core; a process that dies is restarted.")] = 1,
    http: Http = None,
    log_format: LogFormat = None,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Run the feeds of MODULE on Kafka until SIGTERM: records of other topics become messages for workflows.

    Example: kwflow feed shop.feeds --bootstrap-servers localhost:9092
    """
    settings = load_config(config, bootstrap_servers=bootstrap_servers, application_id=application_id, state_dir=state_dir, wait_for_broker_s=wait_for_broker, http=http, log_format=log_format)
    begin_processes(settings, processes, log_of(settings))
    with ends_in_its_log(settings):
        stop, log = stopper(), log_of(settings)
        load_modules(modules, app_dir, settings.durable_packages)
        _run_on_kafka(settings, _feeds(settings, modules, log), stop, modules, f"feed reads {', '.join(sorted(registered_feeds()))}")


def run(
    module: Annotated[str, typer.Argument(metavar="MODULE")],
    input: Annotated[str, typer.Option("--input", help="JSON for main's argument.")] = "null",
    embedded: Annotated[Path, typer.Option("--embedded", envvar="KWFLOW_EMBEDDED", help="Directory for its state.")] = Path("kwflow-run"),
    id: Annotated[str, typer.Option("--id", help="Id of the workflow.")] = "run",
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Start one workflow, run it to its end and print its result; run again, it continues where it was.

    Example: kwflow run workflows/trip_booking.py --input '{"timeout": 60000}'
    """
    settings = load_config(config)
    if not settings.result_topic or not settings.error_topic:
        raise UsageError("kwflow run prints what arrives in the result or error topic: set result_topic and error_topic in the configuration")
    key, argument, stop = wire.key_of(id), b"new:" + json_option(input, "--input"), stopper()
    workflows = load_workflows([module], app_dir, settings.durable_packages)
    held = Embedded(embedded, settings)
    try:
        processors = processors_of(held, workflows, settings, log_of(settings))
        looked = {topic: held.end(topic) for topic in (settings.result_topic, settings.error_topic, settings.dead_letter_topic)}
        started: int | None = None
        header = _header(held, settings, id)
        if header is None or header["status"] == "ended":
            started = held.append(settings.resume_topic, key, argument)
        else:
            why = f", parked: {header['parked']['reason']}: {header['parked']['message']}" if header["status"] == "parked" else ""
            err.print(f"{id} has already started and continues where it was{why}; it keeps its first input: use another --id to start another")
        shown: set[tuple[str, str]] = set()
        with serve(held):
            held.run(processors, lambda: stop() or _ended(held, looked, id, started) is not None or _show_waits(held, settings, id, shown, embedded), log_of(settings))
        ended = _ended(held, looked, id, started)
    finally:
        held.close()
    if ended is None:
        raise typer.Exit(130)
    kind, value, where = ended
    (out if kind == "result" else err).print(value)
    for line in where.splitlines():
        err.print(f"  {line}")
    raise typer.Exit(0 if kind == "result" else 1)


def _header(held: Embedded, settings: Config, id: str) -> dict[str, Any] | None:
    data = EmbeddedStore(held.db, settings.changelog_topic).get(id.encode())
    return snapshot.read_header(data) if data is not None else None


def _ended(held: Embedded, looked: dict[str, int], id: str, started: int | None) -> tuple[str, str, str] | None:
    """Kind and value of its outcome, and the lines that an error came through; or why the start at this offset is a dead letter.

    Looked for from these offsets on, which go up to it.  An author may write there, too.
    """
    for topic in looked:
        while records := held.read(topic, looked[topic]):
            for record in records:
                kind = wire.header(record, "kwflow-outcome") if record.key == id.encode() else None
                if kind is not None:
                    return kind, (record.value or b"null").decode(), wire.header(record, "kwflow-failure-traceback") or ""
                if started is not None and wire.header(record, "kwflow-error-offset") == str(started) and wire.header(record, "kwflow-error-reason") != "parked":
                    return "refused", wire.header(record, "kwflow-error-message") or "", ""
                looked[topic] = record.offset + 1
    return None


_ANSWERED = {"suspension": "resume", "signal": "signal", "update": "update"}  # kinds of waits that somebody answers, and the command that does


def _show_waits(held: Embedded, settings: Config, id: str, shown: set[tuple[str, str]], directory: Path) -> bool:
    header = _header(held, settings, id) or {"status": "", "waits": []}
    if header["status"] == "parked" and ("parked", id) not in shown:
        shown.add(("parked", id))
        err.print(f"once that is fixed: {shlex.join(['kwflow', 'dead-letters', 'retry', id, '--embedded', str(directory)])}")
    for wait in header["waits"]:
        what = (wait["kind"], wait.get("name", wait["ref"]))
        if what not in shown and wait["kind"] in _ANSWERED:
            shown.add(what)
            answer = shlex.join(["kwflow", _ANSWERED[wait["kind"]], id, what[1], "--value", "JSON", "--embedded", str(directory)])
            named = wait["ref"] if wait["kind"] == "suspension" else " ".join(what)
            err.print(f"waits for {named} in {wait.get('function')} ({wait.get('file')}:{wait.get('line')}); answer with: {answer}")
    return False

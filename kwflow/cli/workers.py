"""`kwflow worker`: runs the activities of queues, beside the engines and on other machines than theirs."""

from __future__ import annotations

import gc
import threading
from collections import Counter
from typing import Annotated

import typer

from kwflow.cli.serving import begin_processes, end_if_late, stopper, wait_for_topics
from kwflow.cli.shared import AppDir, Application, Bootstrap, ConfigFile, Http, LogFormat, Modules, Traced, WaitForBroker
from kwflow.cli.watching import ends_in_its_log, log_of, watched
from kwflow.config import load_config
from kwflow.runners.modules import load_modules
from kwflow.runners.supervise import orphaned

__all__ = ["worker"]

_LOOK_S = 0.1


def worker(
    modules: Modules,
    queue: Annotated[list[str] | None, typer.Option("--queue", help="Serve this queue; may be given several times; default: queues whose activities the MODULEs implement, not just declare.")] = None,
    bootstrap_servers: Bootstrap = None,
    application_id: Application = None,
    wait_for_broker: WaitForBroker = None,
    processes: Annotated[int, typer.Option("--processes", min=1, envvar="KWFLOW_PROCESSES", help="Number of worker processes, usually one per core; a process that dies is restarted.")] = 1,
    rate: Annotated[float | None, typer.Option("--rate", help="Calls that each process starts per second; a batch counts as one; default: no limit.")] = None,
    http: Http = None,
    tracing: Traced = False,
    log_format: LogFormat = None,
    config: ConfigFile = None,
    app_dir: AppDir = None,
) -> None:
    """Run activities that have a queue, for engines on Kafka, until SIGTERM.

    Example: kwflow worker shop.activities --queue payments
    """
    settings = load_config(
        config, bootstrap_servers=bootstrap_servers, application_id=application_id, wait_for_broker_s=wait_for_broker, http=http, log_format=log_format, tracing=tracing or None,
        activity_rate=rate,
    )  # fmt: skip
    begin_processes(settings, processes, log_of(settings))
    with ends_in_its_log(settings):
        from kwflow import worker as workers

        stop, log = stopper(), log_of(settings)
        load_modules(modules, app_dir, settings.durable_packages)
        queues = workers.queues_served(queue or ())
        wait_for_topics(settings, log, [settings.workers_group], modules, stop, queues)
        if stop():
            return
        serving = workers.service(settings, queues, log)
        gc.collect()
        gc.freeze()  # what was imported is never garbage
        failed: list[BaseException] = []

        def serve() -> None:
            try:
                serving.run(lambda: stop() or orphaned(settings.supervisor_pid))
            except BaseException as error:
                failed.append(error)

        with watched(settings, [serving], log):
            log(f"kwflow worker serves {', '.join(queues)} on {settings.bootstrap_servers}")
            thread = threading.Thread(target=serve)
            thread.start()
            while thread.is_alive():
                end_if_late([serving], settings.activity_grace_s, log)
                thread.join(_LOOK_S)
        if failed:
            raise failed[0]
        counts = Counter(serving.stats.counts)
        log("calls: " + (", ".join(f"{count} {word}" for word, count in sorted(counts.items())) or "none"))

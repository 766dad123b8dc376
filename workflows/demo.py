"""`make demo`: trips are booked on the embedded engine, which is killed with SIGKILL in the middle and continues."""

import pathlib
import signal
import subprocess
import sys
import tempfile
import time

from rich.console import Console

from kwflow.runners.embedded.socket import submit
from kwflow.runners.embedded.state import read_only, records_of

ROOT = pathlib.Path(__file__).parents[1]
TRIP = ROOT / "workflows/trip_booking.py"
console = Console(highlight=False)
begun = time.monotonic()


def say(what: str, style: str = "") -> None:
    console.print(f"{time.monotonic() - begun:6.2f} s  {what}", style=style)


class Timeline:
    """Prints each output record once, as it appears in the log."""

    TOPICS = ("saga-reserve-car", "saga-reserve-hotel", "saga-reserve-flight", "saga-cancel-car", "saga-cancel-hotel", "saga-cancel-flight", "workflow-result", "workflow-error")
    STYLES = {"workflow-result": "green", "workflow-error": "red", "saga-cancel": "yellow"}

    def __init__(self, directory: pathlib.Path) -> None:
        self.directory = directory
        self.seen: dict[str, int] = {}
        self.records: list[tuple[str, str, str]] = []

    def look(self) -> None:
        db = read_only(self.directory)
        try:
            for topic in self.TOPICS:
                for record in records_of(db, topic, self.seen.get(topic, 0)):
                    self.seen[topic] = record.offset + 1
                    key, value = (record.key or b"").decode(), (record.value or b"null").decode()
                    self.records.append((topic, key, value))
                    style = next((style for start, style in self.STYLES.items() if topic.startswith(start)), "")
                    say(f"{key:<8} → {topic:<20} {value}", style)
        finally:
            db.close()

    def until(self, topic: str, key: str) -> str:
        deadline = time.monotonic() + 30
        while True:
            self.look()
            for found, whose, value in self.records:
                if (found, whose) == (topic, key):
                    return value
            if time.monotonic() > deadline:
                sys.exit(f"demo: no {topic} for {key} within 30 s")
            time.sleep(0.05)


def engine(directory: pathlib.Path) -> "subprocess.Popen[str]":
    command = [sys.executable, "-m", "kwflow", "engine", str(TRIP), "--embedded", str(directory)]
    process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    assert process.stderr is not None
    if "runs in" not in process.stderr.readline():
        sys.exit("demo: the engine did not start")
    say(f"engine started (pid {process.pid})", "bold blue")
    return process


def main() -> None:
    directory = pathlib.Path(tempfile.mkdtemp(prefix="kwflow-demo-"))
    timeline = Timeline(directory)

    def start(id: str, timeout_ms: int) -> None:
        say(f"{id:<8} ← start", "cyan")
        submit(directory, "workflow-resume", id.encode(), b'new:{"timeout":%d}' % timeout_ms)

    def answer(id: str, kind: str, what: str = '"value":"booked"') -> None:
        ref = timeline.until(f"saga-reserve-{kind}", id)
        say(f"{id:<8} ← {kind} {what}", "cyan")
        submit(directory, "workflow-resume", id.encode(), b'{"ref":"%s",%s}' % (ref.encode(), what.encode()))

    running = engine(directory)
    console.rule("a trip; the engine is killed in the middle")
    start("happy", 600_000)
    answer("happy", "car")
    timeline.until("saga-reserve-flight", "happy")
    running.send_signal(signal.SIGKILL)
    running.wait()
    say(f"kill -9 {running.pid}", "bold red")
    answer("happy", "hotel")
    running = engine(directory)
    answer("happy", "flight")
    timeline.until("workflow-result", "happy")
    console.rule("the hotel refuses: what was booked is undone")
    start("refused", 600_000)
    answer("refused", "car")
    answer("refused", "hotel", '"error":"no room"')
    timeline.until("workflow-error", "refused")
    console.rule("answers come too late: undone, too")
    start("late", 1500)
    answer("late", "flight")
    timeline.until("workflow-error", "late")
    running.terminate()
    code = running.wait(20)
    say(f"engine ended with {code}", "bold blue")
    booked = [value for topic, _, value in timeline.records if topic == "workflow-result"]
    if code or len(booked) != 1:
        sys.exit("demo: the outcome is not as expected")
    say(f"one booked, two undone, nothing lost or doubled; the state was in {directory}", "bold green")


if __name__ == "__main__":
    main()

"""The dashboard and the alerts ask for metrics that there are, and docs/OPERATIONS.md says what each alert means."""

import ast
import json
import pathlib
import re
from collections.abc import Iterator
from typing import Any

import yaml

ROOT = pathlib.Path(__file__).parents[2]
MONITORING = ROOT / "docs/monitoring"
GUIDE = (ROOT / "docs/OPERATIONS.md").read_text(encoding="utf-8")
ENDINGS = {"counter": ("_total",), "histogram": ("_bucket", "_count", "_sum"), "gauge": ("",)}
MADE_BY = {
    "CounterMetricFamily": "counter", "GaugeMetricFamily": "gauge", "HistogramMetricFamily": "histogram", "_histogram": "histogram", "_durations": "histogram", "Counter": "counter", "Gauge": "gauge",
    "Histogram": "histogram",
}  # fmt: skip


def made() -> Iterator[tuple[str, str, set[str] | None]]:
    """(name, kind, labels) of each metric; None for labels that are not spelled out where it is made."""
    for path in (ROOT / "kwflow/runners/watch.py", *(ROOT / "kwflow/gateway").glob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in MADE_BY and node.args and isinstance(node.args[0], ast.Constant)):
                continue
            lists = [part for part in (*node.args[2:], *(keyword.value for keyword in node.keywords if keyword.arg == "labels")) if isinstance(part, ast.List)]
            labels = {item.value for part in lists for item in part.elts if isinstance(item, ast.Constant)}
            yield str(node.args[0].value), MADE_BY[node.func.id], labels


METRICS = {name + ending: labels | ({"le"} if ending == "_bucket" else set()) for name, kind, labels in made() for ending in ENDINGS[kind]}
OF_THE_PROCESS = {"process_resident_memory_bytes", "process_cpu_seconds_total", "process_start_time_seconds"}  # prometheus_client's
OF_THE_SCRAPE = {"job", "instance"}


def rules() -> list[dict[str, Any]]:
    return [rule for group in yaml.safe_load((MONITORING / "alerts.yml").read_text())["groups"] for rule in group["rules"]]


def panels() -> list[dict[str, Any]]:
    return [panel for panel in json.loads((MONITORING / "grafana.json").read_text())["panels"] if panel["type"] != "row"]


def check(expression: str, shown: str) -> None:
    """Each metric of the expression exists and has the labels that are selected, grouped by, or shown."""
    names = set(re.findall(r"\b(?:kwflow|process)_\w+", expression))
    assert names and names <= METRICS.keys() | OF_THE_PROCESS, names - METRICS.keys()
    asked = {*re.findall(r"(\w+)=~?\"", expression), *(label.strip() for group in re.findall(r"by \(([^)]*)\)", expression) for label in group.split(","))}
    asked |= set(re.findall(r"\{\{ *(?:\$labels\.)?(\w+) *\}\}", shown))
    known = OF_THE_SCRAPE.union(*(METRICS.get(name, set()) for name in names))
    assert asked <= known, (asked - known, expression)


def test_each_alert_asks_for_what_there_is_and_its_meaning_is_in_the_guide() -> None:
    table = GUIDE[GUIDE.index("**What to alert on.**") : GUIDE.index("On Kafka, `kwflow show` and `list` ask the owners")].replace("\\|", "|")
    told = set(re.findall(r"^\| `(.+?)`(?: for | \|)", table, re.MULTILINE))
    for rule in rules():
        check(rule["expr"], rule["annotations"]["summary"])
    assert told == {rule["expr"] for rule in rules() if "workflow-scheduler" not in rule["expr"]}, "the scheduler's is told with that of the engines"


def test_each_panel_of_the_dashboard_asks_for_what_there_is_and_every_metric_is_in_the_guide() -> None:
    for panel in panels():
        for target in panel["targets"]:
            check(target["expr"].replace('{job=~"$job"}', ""), target["legendFormat"])
    places = [tuple(panel["gridPos"].values()) for panel in panels()]
    assert len(set(places)) == len(places) >= 20
    told = GUIDE + (ROOT / "docs/HTTP.md").read_text(encoding="utf-8")
    for name in {name.removesuffix("_bucket") for name in METRICS if not name.endswith(("_count", "_sum"))}:
        assert f"`{name}" in told, name

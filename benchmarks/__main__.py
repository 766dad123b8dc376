"""`python -m benchmarks [GROUP...]` prints figures as a table and writes bench-results.json.

The groups are generators, loading, embedded, scale, activities, kafka and restore.
"""

import importlib
import json
import pathlib
import sys
import tempfile

from rich.console import Console
from rich.table import Table

from benchmarks.common import FIGURES, TARGETS

GROUPS = ("generators", "loading", "embedded", "scale", "activities", "kafka", "restore")


def main(groups: list[str]) -> None:
    unknown = set(groups) - set(GROUPS)
    if unknown:
        sys.exit(f"no group {', '.join(sorted(unknown))}; there are {', '.join(GROUPS)}")
    console = Console()
    for group in groups or GROUPS:
        with tempfile.TemporaryDirectory() as name:
            importlib.import_module(f"benchmarks.{group}").measure(pathlib.Path(name))
    table = Table("figure", "value", "target")
    for name, value in FIGURES.items():
        table.add_row(name, f"{value:,.2f}" if value < 100 else f"{value:,.0f}", TARGETS.get(name, ""))
    console.print(table)
    results = pathlib.Path("bench-results.json")
    before = json.loads(results.read_text()) if results.exists() and groups else {}
    results.write_text(json.dumps({**before, **FIGURES}, indent=2))


if __name__ == "__main__":
    main(sys.argv[1:])

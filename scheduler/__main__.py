"""`python -m scheduler [options]` is `kwflow scheduler [options]`."""

import sys

from kwflow.cli import main

sys.argv.insert(1, "scheduler")
main()

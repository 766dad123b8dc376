"""`python -m scheduler [options]` runs `kwflow scheduler [options]`: the service of `kwflow.timers`, with its options and signals."""

import sys

from kwflow.cli import main

sys.argv.insert(1, "scheduler")
main()

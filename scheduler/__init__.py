"""The timer service of the demo: `python -m scheduler` is the same as `kwflow scheduler`."""

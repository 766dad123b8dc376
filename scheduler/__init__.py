"""The timer service of the demo: `python -m scheduler`, the same as `kwflow scheduler`."""

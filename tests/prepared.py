"""Loaded by the fork server of `commands.py`: every command, prepared as one that is asked for, which is most of the time that a command takes."""

import gc

import typer

from kwflow.cli import app

COMMANDS = dict(typer.main.get_group(app).commands)
gc.collect()
gc.freeze()  # so that no collection in a forked process writes to, and thereby copies, what is here

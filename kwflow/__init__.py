"""kwflow: durable workflows as plain Python generators.

Lazy on purpose: `import kwflow` loads no driver and no engine, so that a worker or a tool pays only for what it uses.
"""

from importlib import import_module
from typing import TYPE_CHECKING

from kwflow import errors as _errors

if TYPE_CHECKING:  # for type checkers and editors, which do not run __getattr__
    from kwflow.api import *  # noqa: F403
    from kwflow.errors import *  # noqa: F403

_API = (
    "Activity", "ActivityInfo", "Awaitable", "Call", "Cancel", "Child", "Gen", "Inbox", "OldInstance", "OldTask", "Record", "Resume", "Retry", "Signal", "Start", "Suspension", "Task",
    "Update", "Wait", "activity", "activity_info", "all", "batch_of", "cancel", "declare_topics", "declared_topics", "feed", "headers", "log", "migrate", "now", "on_update", "output",
    "output_json", "race", "reacquire", "registered_activities", "registered_migrations", "registered_workflows", "reject", "reply", "send_signal", "set_status", "shield", "signals",
    "sleep", "spawn", "start_child", "step_id", "suspend", "timeout", "wait_condition", "wait_signal", "workflow", "workflow_id",
)  # fmt: skip
__version__ = "0.2.0"
__all__ = sorted([*_API, *_errors.__all__])  # noqa: PLE0605


def __getattr__(name: str) -> object:
    if name in _API:
        value: object = getattr(import_module("kwflow.api"), name)
    elif name in _errors.__all__:
        value = getattr(_errors, name)
    else:
        raise AttributeError(f"module 'kwflow' has no attribute {name!r}")
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return [*__all__, "__version__"]

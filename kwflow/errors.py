"""Every exception that kwflow raises, grouped by who has to act.  Imports nothing.

    KwflowError
    ├ UsageError            the author's code: fix it
    │   ├ UnsupportedError      a construct that a durable module must not contain, found when it is loaded
    │   ├ NotDurableError       a generator that cannot be saved was handed to the engine
    │   ├ UnknownWorkflowError  no workflow of that name is registered
    │   ├ StuckError            nothing is left that could wake the workflow (G9)
    │   ├ MigrationError        a migration did not return a replacement for a waiting instance, which is parked as it was
    │   └ WorkflowError         an error that arrived in a record; carries its JSON payload
    │       └ ChildError            a child workflow ended without a result, or did not start
    ├ ProtocolError         the record: dead-letter it and continue
    ├ SnapshotError         stored state: park the instance
    │   ├ CodeChangedError
    │   ├ RefusedError          the record killed processes, or the broker rejects what its step writes
    │   ├ ResourceError         an object could not get its resource back after a restore
    │   ├ UnsavableError        a value that cannot be saved; names variable, function, place and type
    │   └ CorruptSnapshotError
    ├ TransportError        broker or store; `retryable` tells whether a retry can help
    │   ├ FencedError           another owner took over: stop
    │   └ OutcomeUnknown        no reply to a client's command: repeat it under the same id
    ├ CommandError          a client's command was refused; `status` is that of the reply
    ├ OutcomeError          a workflow that a client waited for ended without a result
    ├ ActivityError         an activity failed for good
    └ BusinessError         an outcome that the business expects, with a code; passes unchanged from an activity to its workflow
    KwflowBug               our own invariant broke (never the author's fault)
    StepTimeout             a BaseException: author code ran too long without a wait; its instance is parked
    Cancelled               a BaseException, so that `except Exception` does not swallow it
"""

__all__ = [
    "ActivityError",
    "BusinessError",
    "CancelToken",
    "Cancelled",
    "ChildError",
    "CodeChangedError",
    "CommandError",
    "CorruptSnapshotError",
    "FencedError",
    "KwflowBug",
    "KwflowError",
    "LostCallWarning",
    "MigrationError",
    "NotDurableError",
    "NotDurableWarning",
    "OutcomeError",
    "OutcomeUnknown",
    "ProtocolError",
    "RefusedError",
    "ResourceError",
    "SnapshotError",
    "StepTimeout",
    "StuckError",
    "TransportError",
    "UncaughtError",
    "UnknownWorkflowError",
    "UnsavableError",
    "UnsupportedError",
    "UsageError",
    "WorkflowError",
]


class KwflowError(Exception):
    """Base of everything that kwflow raises on purpose, except Cancelled, StepTimeout and KwflowBug."""


class UsageError(KwflowError):
    """The author's code uses kwflow in a wrong way; the message says what to write instead."""


class UnsupportedError(UsageError):
    """Lowering refuses a construct; the message names it with file and line.  Raised when the module is loaded, never later."""


class NotDurableError(UsageError):
    """A generator whose module is not durable was given to the engine, which could not save it while it waits."""


class LostCallWarning(UserWarning):
    """The result of calling a durable generator function is thrown away, so that none of it runs."""


class NotDurableWarning(UserWarning):
    """A durable module uses a generator function that is not durable."""


class UnknownWorkflowError(UsageError):
    """No workflow of that name is registered, or a module has no `main`."""


class StuckError(UsageError):
    """Main waits, but nothing that is pending could ever wake it (G9).  Raised at main's wait, so that its cleanup runs."""


class MigrationError(UsageError):
    """The function of a `@kw.migrate` raised, or returned something other than an unstarted durable generator and pending refs."""


class WorkflowError(UsageError):
    """A resume record carried an `error`; `payload` is that JSON value, unchanged."""

    def __init__(self, payload: object = None) -> None:
        super().__init__(payload)
        self.payload = payload


class ChildError(WorkflowError):
    """A child workflow has no result.

    `outcome` is error, cancelled, terminated, or why it did not start (exists, unknown_workflow, bad_input, discarded ...).  `error`
    is the JSON value of its error record, or a text.  `id` is that of the child.
    """

    def __init__(self, payload: dict[str, object]) -> None:
        super().__init__(payload)
        self.id = str(payload.get("id"))
        self.outcome = str(payload.get("outcome"))
        self.error = payload.get("error")

    def __str__(self) -> str:
        return f"child {self.id}: {self.outcome}: {self.error}"


class UncaughtError(KwflowError):
    """A workflow that is declared with `park_on_error` did not catch an exception.  The step is undone, and the instance parked.

    `in_log` is what the log says, without the exception's own message: many people read logs.
    """

    def __init__(self, message: str, in_log: str = "") -> None:
        super().__init__(message, in_log)
        self.in_log = in_log

    def __str__(self) -> str:
        return str(self.args[0])


class ProtocolError(KwflowError):
    """A record from outside has no meaning for kwflow; `reason` is the short word that counters and dead letters use."""

    def __init__(self, message: str, reason: str = "protocol") -> None:
        super().__init__(message, reason)
        self.reason = reason

    def __str__(self) -> str:
        return str(self.args[0])


class SnapshotError(KwflowError):
    """Stored state cannot be saved or read; the instance is parked and its previous snapshot stays."""


class CodeChangedError(SnapshotError):
    """A snapshot needs code that is neither current nor stored (G10); `module` is the module that lacks it, if that is a single one."""

    def __init__(self, message: str, module: str = "") -> None:
        super().__init__(message, module)
        self.module = module

    def __str__(self) -> str:
        return str(self.args[0])


class CorruptSnapshotError(SnapshotError):
    """Stored bytes are not a snapshot of kwflow, or their checksum does not match, or their content cannot be read."""


class RefusedError(SnapshotError):
    """A record is not retried automatically, because processes died of it (K19) or the broker rejects what its step writes (K11).  Its instance is parked."""


class ResourceError(SnapshotError):
    """`__durable_reenter__` of an object raised after a restore; `type_name` is its class.  No code of the workflow has run."""

    def __init__(self, message: str, type_name: str = "") -> None:
        super().__init__(message, type_name)
        self.type_name = type_name

    def __str__(self) -> str:
        return str(self.args[0])


class UnsavableError(SnapshotError):
    """A value in a waiting generator cannot be saved (G4); the attributes say which."""

    def __init__(self, message: str, variable: str = "", function: str = "", place: str = "", type_name: str = "") -> None:
        super().__init__(message, variable, function, place, type_name)
        self.variable = variable
        self.function = function
        self.place = place
        self.type_name = type_name

    def __str__(self) -> str:
        return str(self.args[0])


class TransportError(KwflowError):
    """A broker or store failed."""

    def __init__(self, message: str, retryable: bool = True) -> None:
        super().__init__(message, retryable)
        self.retryable = retryable

    def __str__(self) -> str:
        return str(self.args[0])


class FencedError(TransportError):
    """Another engine owns this partition now; this one must stop writing (G6)."""

    def __init__(self, message: str, retryable: bool = False) -> None:
        super().__init__(message, retryable)


class OutcomeUnknown(TransportError):
    """A command got no reply within `command_timeout_s`, or no broker acknowledged it: it may have taken effect, or take effect later.

    Repeat it with this `command_id`: it takes effect once (M1.4).  `why` is the message without that advice.
    """

    def __init__(self, message: str, command_id: str = "", why: str = "") -> None:
        super().__init__(message, True)
        self.args = (message, command_id, why)
        self.command_id = command_id
        self.why = why or message


_REPLIES = {  # what a reply without a message means
    "exists": "another run has this id",
    "full": "its mailbox is full; send it again once the workflow has read some",
    "not_found": "there is no such run; kwflow list shows those that are known",
    "unknown_ref": "nobody waits for this ref; perhaps it was answered before: kwflow show tells what it waits for",
}


class CommandError(KwflowError):
    """The command changed nothing; `status` is the word of the reply: not_found, exists, full, rejected, ended, unknown_ref ...

    A command with the status `held` is kept: the workflow is parked, and the command is applied when somebody retries the workflow.
    """

    def __init__(self, status: str, message: str = "", id: str = "") -> None:
        super().__init__(status, message, id)
        self.status = status
        self.message = message
        self.id = id

    def __str__(self) -> str:
        said = self.message or _REPLIES.get(self.status)
        return f"{self.id}: {self.status}" + (f": {said}" if said else "")


class OutcomeError(KwflowError):
    """The workflow has no result; `kind` is error, cancelled or terminated, `value` the JSON value of its error record."""

    def __init__(self, kind: str, value: object = None, id: str = "", start_id: str = "") -> None:
        super().__init__(kind, value, id, start_id)
        self.kind = kind
        self.value = value
        self.id = id
        self.start_id = start_id

    def __str__(self) -> str:
        return f"{self.id}: {self.kind}: {self.value}"


class ActivityError(KwflowError):
    """An activity failed after its retries; `type` and `details` come from the activity.

    If an activity itself raises it, `final` says that a retry cannot help.
    """

    def __init__(self, message: str, type: str = "", details: object = None, final: bool = False) -> None:
        super().__init__(message, type, details, final)
        self.type = type
        self.details = details
        self.final = final

    def __str__(self) -> str:
        return str(self.args[0])


class BusinessError(KwflowError):
    """An expected refusal, such as "card declined", which is never retried.  `code` is for programs, `variables` is any JSON value."""

    def __init__(self, code: str, message: str = "", variables: object = None) -> None:
        super().__init__(code, message, variables)
        self.code = code
        self.message = message
        self.variables = variables

    def __str__(self) -> str:
        return f"{self.code}: {self.message}" if self.message else self.code


class KwflowBug(Exception):
    """An invariant of kwflow is broken; this aborts the step even if author code swallows it."""


class StepTimeout(BaseException):
    """Raised by the engine in a step that does not reach a wait; the step is undone, and its instance parked."""


class Cancelled(BaseException):
    """Raised at the wait of a cancelled task.  Catch it only to clean up, then raise it again."""


CancelToken = Cancelled

"""One frozen Config, from `kwflow.toml` and `KWFLOW_*`; the environment wins over the file.

The sections of the file are [app] [topics] [limits] [durable] [snapshot] [embedded] [encryption] [gateway] [console] [kafka].
"""

from __future__ import annotations

import difflib
import functools
import os
import tomllib
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, ValidationError, ValidationInfo, field_validator, model_validator
from pydantic_settings import BaseSettings, SettingsConfigDict, SettingsError

from kwflow.errors import UsageError
from kwflow.tokens import Tokens

if TYPE_CHECKING:
    from kwflow.core.contract import Limits

__all__ = ["Config", "load_config"]

_KEY_CHARS_MIN = 32
_NEARLY = 0.92  # how similar, of 1: a letter or two differ
_OPTIONS = ("KWFLOW_PROCESSES",)  # variables of commands whose names are similar to that of a setting
_NOT_YOURS = (  # in [kafka]: some rule depends on each of these (K1, K2, K5, K6, K16), or it has a setting of its own
    "bootstrap.servers metadata.broker.list group.id group.instance.id transactional.id enable.auto.commit enable.auto.offset.store auto.offset.reset "
    "isolation.level enable.idempotence enable.partition.eof partitioner partition.assignment.strategy group.protocol"
).split()
_INSTEAD = {name: "; set bootstrap_servers in [app]" for name in ("bootstrap.servers", "metadata.broker.list")} | {
    "group.protocol": "; leave it out: engines use the classic protocol, in which a killed engine gets its partitions back at once, not after the broker's 45 s"
}


class Config(BaseSettings):
    """All settings.  `kafka` is passed to librdkafka unchanged (security.protocol, sasl.*, ssl.*); only `oauth_cb`, a function or its name, becomes Tokens."""

    model_config = SettingsConfigDict(env_prefix="KWFLOW_", frozen=True, extra="forbid")

    application_id: str = "workflow-engine"
    bootstrap_servers: str = "localhost:9092"
    instance_id: str | None = Field(default=None, description="this engine's identity, such as a pod's name; default: a UUID kept in the state directory (K1)")
    process: int = Field(default=0, ge=0, description="the number of this process in its engine; set by --processes")
    supervisor_pid: int | None = Field(default=None, description="set by --processes and kwflow dev: a process ends when this is no longer its parent")
    accept_offset_reset: bool = Field(default=False, description="start from the group's offsets even if they differ from the stored ones, or if retention has deleted the next records (K16)")
    wait_for_broker_s: float = Field(default=0, ge=0, description="how long to wait at start for the broker and the topics")
    client_connect_s: float = Field(default=10, gt=0, description="how long a client waits for the broker when it is created")
    command_timeout_s: float = Field(default=20, gt=0, description="a client's command without a reply by then has an unknown outcome; set it above session timeout plus restore")
    state_dir: Path = Path("kwflow-state")
    standby: bool = Field(default=False, description="keep warm copies of the partitions that other engines own, so that a takeover restores only the most recent changes")
    state_cleanup_s: float = Field(default=600, ge=0, description="how long the local copy of a partition is kept after the partition has left")
    http: str | None = Field(default=None, description="HOST:PORT for GET /health, /metrics and /instances; /instances shows everybody who can reach it what `kwflow list` and `show` print")
    http_advertised: str | None = Field(default=None, description="HOST or HOST:PORT at which other machines reach `http`; default: its host, or this machine's name if that means all addresses")
    gateway_url: str | None = Field(default=None, description="URL at which services reach `kwflow gateway`, such as https://flows.example; the callback URLs of rest.call begin with it")
    tracing: bool = Field(default=False, description="send OpenTelemetry spans as the OTEL_* variables say (needs kwflow[otel])")
    log_format: Literal["text", "json"] = Field(default="text", description="json: one object per line, with workflow id, topic, partition and offset")
    resume_topic: str = "workflow-resume"
    result_topic: str = "workflow-result"
    error_topic: str = "workflow-error"
    scheduler_topic: str = "workflow-scheduler"
    reply_topic: str = "workflow-reply"
    history_topic: str | None = Field(default=None, description="an event for each step and command is written there, in its transaction; without a topic, none are written")
    durable_packages: list[str] = Field(default_factory=list, description="more packages to make durable, besides those of the MODULEs; third-party ones, too")
    snapshot_modules: list[str] = Field(default_factory=list, description="modules that are not durable but whose classes snapshots may hold")
    snapshot_keys: list[SecretStr] = Field(default_factory=list, description="keys that sign snapshots (HMAC-SHA-256): the first signs, all are accepted; instances signed by none of them are parked")
    snapshot_unsigned: Literal["park", "accept"] = Field(default="park", description="with snapshot_keys, what becomes of unsigned snapshots and sources; accepted ones are signed when next saved")
    snapshot_cloudpickle: bool = Field(default=False, description="snapshots may hold classes that generated code makes in functions, as cloudpickle bytes bound to this minor version of Python")
    snapshot_bytes_warn: int = Field(default=450_000, gt=0, description="an instance that grows beyond this is logged")
    snapshot_bytes_max: int = Field(default=900_000, gt=0, description="a larger instance is parked; below Kafka's 1 MB default")
    value_bytes_max: int = Field(default=1_000_000, gt=0, description="a larger input record is dead-lettered, a larger output is a UsageError in the workflow")
    header_bytes_max: int = Field(default=65_536, gt=0, description="the same for all headers of a record, names and values together")
    outputs_max: int = Field(default=10_000, gt=0, description="outputs of one step; one more is a UsageError in the workflow")
    output_bytes_max: int = Field(default=8_000_000, gt=0, description="bytes of all outputs of one step, and of what is kept of its calls of activities; more is a UsageError in the workflow")
    mailbox_max: int = Field(default=1000, gt=0, description="unread signals and updates of one instance; one more is refused")
    mailbox_bytes_max: int = Field(default=262_144, gt=0, description="bytes of the records of one instance's unread signals and updates")
    waits_max: int = Field(default=100_000, gt=0, description="pending suspensions and timers of one instance; one more is a UsageError in the workflow")
    tasks_max: int = Field(default=100_000, gt=0, description="unsettled tasks of one instance, main included; one more is a UsageError in the workflow")
    nesting_max: int = Field(default=100, gt=0, description="tasks that start inside one another's start; one more is a UsageError in the workflow")
    activity_concurrency: int = Field(default=64, gt=0, description="activities that run at the same time in one engine; the rest wait in the store")
    activity_rate: float = Field(default=0, ge=0, le=1_000_000, description="activities that one engine or worker process starts per second; a batch counts as one; 0 for no limit")
    activity_bytes_max: int = Field(default=256_000, gt=0, description="bytes of an activity's arguments or result; more is a UsageError in the workflow, or an ActivityError for a result")
    activity_limit_s: float = Field(default=600, ge=0, description="how long an activity without a timeout of its own may run; 0 for no limit")
    activity_grace_s: float = Field(default=10, ge=0, description="how long running activities may still take when the engine stops or gives a partition away")
    hold_max: int = Field(default=10_000, gt=0, description="records kept for a parked or paused instance, the one at fault included (a tenth for unexpected callbacks); more are dead-lettered")
    step_timeout_ms: int = Field(default=10_000, gt=0, description="a step that runs longer is logged with its line")
    step_abort_ms: int = Field(default=150_000, gt=0, description="a step that runs longer is aborted and its instance parked; half of Kafka's max.poll.interval.ms")
    batch_records_max: int = Field(default=4000, gt=0, description="records in one transaction")
    batch_ms_max: int = Field(default=100, gt=0, description="a batch that has been processed for longer is committed with what it has")
    batch_bytes_max: int = Field(default=16_000_000, gt=0, description="a batch whose outputs, states and calls have more bytes is committed with what it has; well below transaction.timeout.ms")
    instances_cached_max: int = Field(default=1000, ge=0, description="instances kept live after their step, so that the next one need not load them")
    instances_cached_bytes_max: int = Field(default=32_000_000, ge=0, description="bytes of their snapshots; live instances take several times as much")
    rocksdb_bytes_max: int = Field(default=128 * 1024 * 1024, ge=1024 * 1024, description="block cache and write buffers of all local stores of a process together")
    embedded_retention_ms: int = Field(default=7 * 86_400_000, ge=0, description="applied input records of the embedded log are kept for this long")
    embedded_outputs_retention_ms: int = Field(default=0, ge=0, description="results, errors and other outputs in the embedded log are kept for this long; 0: for ever")
    ended_retention_ms: int = Field(default=86_400_000, ge=0, description="how long after the end a start repeated under its start id is recognised (K20)")
    encryption_keys: list[SecretStr] = Field(default_factory=list, description="keys for values on the broker (AES-256-GCM): the first encrypts, all decrypt; Kafka only (`kwflow[encryption]`)")
    encryption_topics: list[str] = Field(default_factory=list, description="more topics to encrypt, such as the resume topic of another application that has the key")
    encryption_plain_topics: list[str] = Field(default_factory=list, description="topics of kwflow, and queues, that stay unencrypted for readers without a key")
    gateway_tokens: list[SecretStr] = Field(default_factory=list, description="callers of the gateway send one of these (Bearer); without any, everybody who can reach it may do everything")
    gateway_tls_cert: Path | None = Field(default=None, description="PEM file with the gateway's certificate and the intermediate CAs'; with gateway_tls_key it speaks HTTPS")
    gateway_tls_key: Path | None = Field(default=None, description="PEM file with the private key of gateway_tls_cert, without a passphrase")
    gateway_waits_max: int = Field(default=10_000, gt=0, description="requests that wait in one gateway; one more is answered with 503")
    gateway_wait_s_max: float = Field(default=300, gt=0, description="how long a request may wait for an outcome")
    console_tokens: list[SecretStr] = Field(default_factory=list, description="users of the console give one of these as the password; without any, it is served on this machine only")
    console_tls_cert: Path | None = Field(default=None, description="as gateway_tls_cert, for the console")
    console_tls_key: Path | None = Field(default=None, description="as gateway_tls_key, for the console")
    kafka: dict[str, Any] = Field(default_factory=dict, repr=False)  # it contains passwords

    @field_validator("snapshot_keys", "encryption_keys", "gateway_tokens", "console_tokens")
    @classmethod
    def _long_enough(cls, keys: list[SecretStr], field: ValidationInfo) -> list[SecretStr]:
        if any(len(key.get_secret_value()) < _KEY_CHARS_MIN for key in keys):
            raise ValueError(f"a {'key' if str(field.field_name).endswith('_keys') else 'token'} must have at least {_KEY_CHARS_MIN} characters; make one with: openssl rand -hex 32")
        return keys

    @field_validator("gateway_url")
    @classmethod
    def _a_place(cls, url: str | None) -> str | None:
        """Check the URL, and remove a slash at its end."""
        parts = urlsplit(url or "")
        if url is not None and (parts.scheme not in ("http", "https") or not parts.hostname or parts.query or parts.fragment):
            raise ValueError(f"it must be a URL such as https://flows.example or https://example.com/flows, not {url!r}")
        return None if url is None else url.rstrip("/")

    @field_validator("kafka")
    @classmethod
    def _for_librdkafka(cls, kafka: dict[str, Any]) -> dict[str, Any]:
        for name, value in kafka.items():
            if name in _NOT_YOURS:
                raise ValueError(f"{name} is set by kwflow itself{_INSTEAD.get(name, '')}")
            if isinstance(value, dict):
                raise ValueError(f'a name with dots must be quoted: "{name}.{next(iter(value), "…")}" = …')
            if name != "oauth_cb" and not isinstance(value, (str, int, float)):
                raise ValueError(f"{name} is neither a string nor a number")
        if "oauth_cb" not in kafka or isinstance(kafka["oauth_cb"], Tokens):
            return kafka
        return {**kafka, "oauth_cb": Tokens(kafka["oauth_cb"])}

    @model_validator(mode="after")
    def _each_its_own(self) -> Config:
        """Check that the topics of resumes, timers, replies and history share their names with no other topic; results and errors may share one, or go nowhere."""
        named = {"resume_topic": self.resume_topic, "scheduler_topic": self.scheduler_topic, "reply_topic": self.reply_topic}
        named |= {"history_topic": self.history_topic} if self.history_topic else {}
        for name, topic in named.items():
            if not topic:
                raise ValueError(f"{name} must not be empty")
            others = [*(other for key, other in named.items() if key != name), self.result_topic, self.error_topic, self.dead_letter_topic]
            if topic in others:
                raise ValueError(f"{name} {topic!r} is also the name of another topic")
        return self

    @model_validator(mode="after")
    def _encrypted_or_not(self) -> Config:
        if both := sorted(set(self.encryption_topics) & set(self.encryption_plain_topics)):
            raise ValueError(f"{both[0]} is both in encryption_topics and in encryption_plain_topics")
        return self

    @model_validator(mode="after")
    def _whole_certificates(self) -> Config:
        for kind in ("gateway", "console"):
            if (getattr(self, f"{kind}_tls_cert") is None) != (getattr(self, f"{kind}_tls_key") is None):
                raise ValueError(f"{kind}_tls_cert and {kind}_tls_key belong together: set both or neither")
        return self

    @functools.cached_property
    def signing_keys(self) -> tuple[bytes, ...]:
        """`snapshot_keys` as bytes; the last one is empty (snapshot.UNSIGNED) if unsigned snapshots are accepted, too."""
        keys = tuple(key.get_secret_value().encode() for key in self.snapshot_keys)
        return (*keys, b"") if keys and self.snapshot_unsigned == "accept" else keys

    @functools.cached_property
    def cipher_keys(self) -> tuple[bytes, ...]:
        """`encryption_keys` as bytes."""
        return tuple(key.get_secret_value().encode() for key in self.encryption_keys)

    @functools.cached_property
    def limits(self) -> Limits:
        """What one instance may use."""
        from kwflow.core.contract import Limits  # it loads what a client does not need

        return Limits(**{name: getattr(self, name) for name in Limits.__struct_fields__})

    @property
    def dead_letter_topic(self) -> str:
        return f"{self.application_id}-dead-letter"

    @property
    def changelog_topic(self) -> str:
        return f"{self.application_id}-state-changelog"

    @property
    def code_topic(self) -> str:
        return f"{self.application_id}-code"

    @property
    def owners_topic(self) -> str:
        return f"{self.application_id}-owners"

    @property
    def timers_group(self) -> str:
        return f"{self.application_id}-scheduler"

    @property
    def workers_group(self) -> str:
        return f"{self.application_id}-workers"

    def feed_group(self, topic: str) -> str:
        """The consumer group of the feed of this topic."""
        return f"{self.application_id}-feed-{topic}"

    @property
    def timers_changelog_topic(self) -> str:
        return f"{self.application_id}-timers-changelog"


_SECTIONS = {  # by section: the name in Config for the name of a setting in the section
    "app": "{}", "topics": "{}_topic", "limits": "{}", "durable": "durable_{}", "snapshot": "snapshot_{}", "embedded": "embedded_{}", "encryption": "encryption_{}", "gateway": "gateway_{}",
    "console": "console_{}",
}  # fmt: skip


def load_config(path: Path | None = None, **given: Any) -> Config:
    """Return the Config from this file (default: `kwflow.toml` in the current directory, if it exists).

    `given` wins over everything else.  Raises UsageError.
    """
    _check_environment()
    values: dict[str, Any] = {}
    sections: dict[str, Any] = {}
    file = path or Path("kwflow.toml")
    if path is not None or file.exists():
        try:
            sections = tomllib.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:  # not TOML, or not UTF-8
            raise UsageError(f"{file}: {error}") from None
        for section, content in sections.items():
            if section == "kafka":
                values["kafka"] = content
            elif section in _SECTIONS and not isinstance(content, dict):
                raise UsageError(f"{file}: {section} is a section, not a setting: write [{section}] above its settings")
            elif section in _SECTIONS:
                values |= {_SECTIONS[section].format(name): value for name, value in content.items()}
            elif section in Config.model_fields:  # its full name, as in the environment and everywhere else
                fits = [form.split("{}") for form in _SECTIONS.values()]
                before, after = max((fit for fit in fits if section.startswith(fit[0]) and section.endswith(fit[1])), key=lambda fit: len(fit[0] + fit[1]))
                places = " or ".join(f"[{known}]" for known, form in _SECTIONS.items() if form == f"{before}{{}}{after}")
                raise UsageError(f"{file}: {section} belongs in a section: write {section.removeprefix(before).removesuffix(after)} under {places}")
            else:
                raise UsageError(f"{file}: unknown section [{section}]; sections are {' '.join(f'[{known}]' for known in (*_SECTIONS, 'kafka'))}")
    beside = values.get("kafka", {})
    values = {name: value for name, value in values.items() if f"KWFLOW_{name.upper()}" not in os.environ}
    values |= {name: value for name, value in given.items() if value is not None}
    try:
        config = Config(**values)
        return config if "kafka" in values or not beside else Config(**{**values, "kafka": {**beside, **config.kafka}})  # such as a password in the environment, and the rest in the file
    except ValidationError as error:
        first = error.errors()[0]
        if first["type"] == "extra_forbidden":
            raise UsageError(_unknown(str(first["loc"][0]), file, sections)) from None
        where = ".".join(map(str, first["loc"]))
        raise UsageError(f"config {where}: {first['msg']}" if where else f"config: {first['msg']}") from None
    except SettingsError as error:
        raise UsageError(f"config: {error}; in environment variables, lists and tables are JSON, such as '[\"a\", \"b\"]'") from None


def _check_environment() -> None:
    """Raises UsageError for a variable whose name is similar to that of a setting.

    Others are ignored, because Kubernetes sets some for a service that is named kwflow.
    """
    known = {f"KWFLOW_{name.upper()}" for name in Config.model_fields}
    for name in os.environ:
        if name.startswith("KWFLOW_") and name not in known and name not in _OPTIONS and (near := difflib.get_close_matches(name, known, 1, _NEARLY)):
            raise UsageError(f"{name} is not a setting; did you mean {near[0]}?")


def _unknown(name: str, file: Path, sections: dict[str, Any]) -> str:
    """Return the error for an unknown setting: where it is set, and which one may be meant."""
    [near, *_] = difflib.get_close_matches(name, Config.model_fields, 1) or [""]
    for section, form in _SECTIONS.items():
        before, after = form.split("{}")
        own = name.removeprefix(before).removesuffix(after)
        if form.format(own) == name and own in sections.get(section, {}):
            meant = near.removeprefix(before).removesuffix(after)
            return f"{file}: [{section}] has no setting {own!r}" + (f"; did you mean {meant!r}?" if near and form.format(meant) == near else "")
    return f"there is no setting {name!r}" + (f"; did you mean {near!r}?" if near else "")

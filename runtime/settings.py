"""Settings: one file, flag before ``REMITSTREAM_*`` before file before default. The only reader of the environment.

``read_settings`` gives a ``Settings`` with every secret resolved and every path absolute, or raises ``SettingsError``
that names all wrong keys at once.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import BaseModel, Field, PrivateAttr, SerializeAsAny, ValidationError
from pydantic.fields import FieldInfo
from pydantic_settings import (
    BaseSettings,
    EnvSettingsSource,
    PydanticBaseSettingsSource,
    SettingsConfigDict,
)
from pydantic_settings import SettingsError as UnreadableVariableError

from identity.projection import RedisSettings
from runtime import secret_references
from runtime.configuration import Issue, Key, MissingFileError, SettingsError, read_document, show_path
from runtime.connectors import Gateways, Targets
from runtime.cross_checks import Known, is_file_key, run_checks
from runtime.embedded_mode import ADDRESSES, decide_embedded
from runtime.layers import (
    PREFIX,
    Layer,
    Merged,
    Origin,
    Rank,
    build_environment_layer,
    build_file_layer,
    build_flag_layer,
    merge,
    suggest,
)
from runtime.sections import (
    ConnectorSettings,
    HealthSettings,
    ListenerSettings,
    LogSettings,
    ReceiverSettings,
    SandboxSettings,
    SecretSettings,
    StackSettings,
    WorkerSettings,
)
from runtime.validation import PLACEHOLDER, set_value, translate, walk
from schemas.tenancy import Account, Facility, Feed, Name, Tenancy
from sinks.contract import TargetSettings
from topics.catalog import HL7, Topic, list_topics
from topics.cluster import KafkaSettings, build_instance_name
from topics.registry import RegistrySettings

FILE_NAME = "remitstream.toml"
FILE_VARIABLE = "REMITSTREAM_CONFIG"
_NOT_SETTINGS = frozenset({FILE_VARIABLE, "REMITSTREAM_SHARED"})
_MINIMUM_KEY = 32


class Settings(BaseSettings):
    """All settings of one deployment: one tenant, its facilities, accounts, feeds, targets, and where things run."""

    model_config = SettingsConfigDict(
        extra="forbid",
        frozen=True,
        env_prefix=PREFIX,
        env_nested_delimiter="__",
        env_ignore_empty=True,
        case_sensitive=False,
    )

    tenant: Name = Field(description="Name of the organisation.")
    facilities: tuple[Facility, ...] = Field(min_length=1, description="Hospitals and clinics.")
    accounts: tuple[Account, ...] = Field(default=(), description="Accounts at payment gateways.")
    feeds: tuple[Feed, ...] = Field(default=(), description="Senders of HL7 v2 messages.")
    targets: tuple[SerializeAsAny[TargetSettings], ...] = Field(
        default=(), description="Systems that events are posted to."
    )
    secrets: SecretSettings
    connectors: ConnectorSettings = ConnectorSettings()
    kafka: KafkaSettings = KafkaSettings()
    registry: RegistrySettings = RegistrySettings()
    redis: RedisSettings = RedisSettings()
    receiver: ReceiverSettings = ReceiverSettings()
    listener: ListenerSettings = ListenerSettings()
    worker: WorkerSettings = WorkerSettings()
    health: HealthSettings = HealthSettings()
    log: LogSettings = LogSettings()
    stack: StackSettings = StackSettings()
    sandbox: SandboxSettings = SandboxSettings()

    _reading: Reading = PrivateAttr()

    @classmethod
    def settings_customise_sources(
        cls,
        settings_cls: type[BaseSettings],  # noqa: ARG003 - the five names are pydantic-settings'
        init_settings: PydanticBaseSettingsSource,
        env_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        dotenv_settings: PydanticBaseSettingsSource,  # noqa: ARG003
        file_secret_settings: PydanticBaseSettingsSource,  # noqa: ARG003
    ) -> tuple[PydanticBaseSettingsSource, ...]:
        """Only the merged tree: ``read_settings`` lays file, environment and flags over each other itself."""
        return (init_settings,)

    @property
    def tenancy(self) -> Tenancy:
        """The domain part, as sources and streams take it."""
        return Tenancy(tenant=self.tenant, facilities=self.facilities, accounts=self.accounts, feeds=self.feeds)

    @property
    def file(self) -> Path | None:
        """The configuration file, absolute; None when everything came from the environment and flags."""
        return self._reading.file

    @property
    def embedded(self) -> bool:
        """Whether the embedded stack serves this deployment (one broker, no replicas)."""
        return self._reading.embedded

    @property
    def instance(self) -> str:
        """Stable name of this host."""
        return self.worker.instance or build_instance_name()

    @property
    def sources(self) -> tuple[str, ...]:
        """Sources in use: gateways that have an account, and ``hl7``."""
        return (*sorted({account.source for account in self.accounts}), HL7)

    @property
    def topics(self) -> tuple[Topic, ...]:
        """Every topic of this deployment."""
        return list_topics(self.sources, [target.name for target in self.targets])

    def list_arguments(self) -> list[str]:
        """Command line options that make another process read the same settings. They hold no secret."""
        chosen = ["--config", str(self.file)] if self.file is not None else []
        for key, text in self._reading.overrides:
            chosen += ["--set", f"{key}={text}"]
        return chosen

    def override(self, values: Mapping[str, str]) -> Settings:
        """The same settings with some dotted keys replaced, as by ``--set``; the embedded mode stays as it is."""
        chosen = dict(self._reading.overrides) | {"stack.embedded": str(self.embedded).lower()} | dict(values)
        return read_settings(self.file, chosen.items())

    def find_origin(self, key: Key) -> Origin | None:
        """Where a value was given; None for a default."""
        return self._reading.merged.origins.get(key)

    def find_reference(self, key: Key) -> str | None:
        """The reference of a secret (``env:NAME``), for display."""
        return self._reading.references.get(key)


@dataclass(frozen=True, slots=True)
class Reading:
    """How a ``Settings`` was read."""

    file: Path | None
    overrides: tuple[tuple[str, str], ...]
    merged: Merged
    references: Mapping[Key, str]
    embedded: bool


def read_settings(path: Path | None = None, overrides: Iterable[tuple[str, str]] = ()) -> Settings:
    """Read and check everything. ``overrides`` are dotted keys and texts, as given by ``--set``.

    Without ``path`` the file is ``$REMITSTREAM_CONFIG``, else ``remitstream.toml`` in the working directory.
    Raises ``SettingsError`` with every wrong setting, ``MissingFileError`` or ``SyntaxIssueError``.
    """
    file, chosen = _find_file(path), tuple(overrides)
    merged = _merge(file, chosen)
    issues = list(merged.issues)
    embedded = decide_embedded(merged, issues)
    references, resolve_issues = _resolve_secrets(merged, embedded=embedded)
    issues += resolve_issues
    _make_paths_absolute(merged, file)
    settings, model_issues = _build(merged)
    issues += model_issues
    issues += _check_services(merged, embedded=embedded)
    told = {issue.key for issue in issues}
    issues += [issue for issue in run_checks(merged, _list_known(merged)) if issue.key not in told]
    if issues or settings is None:
        raise SettingsError(_order(issues), place=show_path(file) if file else "environment")
    settings._reading = Reading(file, chosen, merged, references, embedded)  # noqa: SLF001 - we build it
    return settings


def ensure_secrets(path: Path | None = None, overrides: Iterable[tuple[str, str]] = ()) -> tuple[Path, ...]:
    """Create the missing secret files of a deployment in the embedded mode; outside it nothing is created.

    Each gets random content and mode 0600. Returns those that were created. Files outside are never replaced.
    """
    merged = _merge(_find_file(path), tuple(overrides))
    if not decide_embedded(merged, []):
        return ()
    created = []
    for key, kind, given in walk(Settings, merged.tree, (), _find_targets(merged).find_model):
        origin = merged.find_origin(key)
        if kind == "secret" and isinstance(given, str) and given.startswith("file:") and origin is not None:
            file = secret_references.join_path(origin.folder, given.removeprefix("file:"))
            if secret_references.create_file(file):
                created.append(file)
    return tuple(created)


def _find_targets(merged: Merged) -> Targets:
    """The target connectors of this deployment: which settings a target has depends on them."""
    return Targets(_find_folder(merged, "targets"))


def _find_folder(merged: Merged, kind: str) -> Path | None:
    """The user's folder of connectors of a kind."""
    section = merged.tree.get("connectors")
    given = section.get(kind) if isinstance(section, dict) else None
    if not isinstance(given, str) or not given:
        return None
    origin = merged.find_origin(("connectors", kind))
    return secret_references.join_path(origin.folder if origin is not None else Path.cwd(), given)


def _list_known(merged: Merged) -> Known:
    targets = _find_targets(merged)
    return Known(
        gateways=frozenset(Gateways(_find_folder(merged, "gateways")).list_all()),
        connectors=frozenset(targets.list_all()),
        renewing=targets.list_renewing(),
    )


def _find_file(path: Path | None) -> Path | None:
    if path is not None:
        return path.absolute()
    named = os.environ.get(FILE_VARIABLE)
    if named:
        return Path(named).absolute()
    file = Path(FILE_NAME).absolute()
    if file.exists():
        return file
    if not _list_variables():
        raise MissingFileError("there is no configuration file here.", place=show_path(file))
    return None


def _list_variables() -> list[str]:
    return [
        name
        for name, text in os.environ.items()
        if text and name.upper().startswith(PREFIX) and name.upper() not in _NOT_SETTINGS
    ]


def _merge(file: Path | None, overrides: tuple[tuple[str, str], ...]) -> Merged:
    environment, issues = _read_environment()
    layers = [environment, build_flag_layer(overrides)]
    if file is not None:
        layers.append(build_file_layer(read_document(file)))
    merged = merge(layers)
    merged.home = show_path(file) if file is not None else "environment"
    merged.issues[:0] = issues
    return merged


def _read_environment() -> tuple[Layer, list[Issue]]:
    """Our variables, and those that look like ours and are none."""
    names = _list_variables()
    issues = []
    whole: set[str] = set()
    for name in names:
        section, _, rest = name.upper().removeprefix(PREFIX).lower().partition("__")
        whole |= {section} if not rest else set()
        near = suggest(section, Settings.model_fields)
        # Kubernetes sets variables such as REMITSTREAM_SERVICE_HOST for a service of our name: not ours, not wrong.
        if section not in Settings.model_fields and (rest or near):
            issues.append(
                Issue(
                    key=section,
                    place=f"environment variable {name}",
                    problem="unknown setting.",
                    accepted=", ".join(sorted(Settings.model_fields)),
                    remedy=near or "Unset the variable.",
                )
            )
    issues += [
        Issue(
            key=name.upper().removeprefix(PREFIX).lower().replace("__", "."),
            place=f"environment variable {name}",
            problem="given beside the variable of the whole section.",
            remedy=f"Keep either {PREFIX}{section.upper()} or the single settings.",
        )
        for name in names
        for section in whole
        if name.upper().startswith(f"{PREFIX}{section.upper()}__")
    ]
    try:
        tree = dict(EnvSettingsSource(Settings)())
    except UnreadableVariableError as error:
        tree = {}
        field = str(error).split('"')[1]
        issues.append(
            Issue(
                key=field,
                place=f"environment variable {PREFIX}{field.upper()}",
                problem="not JSON.",
                accepted="a JSON array or object",
                remedy="Correct the text, or set the single settings.",
            )
        )
    return build_environment_layer(tree, names), issues


def _check_services(merged: Merged, *, embedded: bool) -> list[Issue]:
    """Outside the embedded mode each service needs its address: a default would be somebody's other broker."""
    if embedded:
        return []
    return [
        Issue(
            key=f"{section}.{name}",
            place=merged.say_place((section,)),
            problem="missing.",
            accepted=_get_field(section, name).description or "",
            remedy=f"Set it, or {PREFIX}{section.upper()}__{name.upper()}, or `stack.embedded = true`.",
        )
        for section, name in ADDRESSES
        if section in Settings.model_fields and merged.get_rank(section, name) == Rank.DEFAULT
    ]


def _get_field(section: str, name: str) -> FieldInfo:
    model = Settings.model_fields[section].annotation
    assert isinstance(model, type)
    assert issubclass(model, BaseModel)
    return model.model_fields[name]


def _resolve_secrets(merged: Merged, *, embedded: bool) -> tuple[dict[Key, str], list[Issue]]:
    references: dict[Key, str] = {}
    issues: list[Issue] = []
    for key, kind, given in list(walk(Settings, merged.tree, (), _find_targets(merged).find_model)):
        if kind != "secret":
            continue
        secret, issue = secret_references.resolve(key, given, merged, os.environ, embedded=embedded)
        if issue is not None:
            issues.append(issue)
        else:
            references[key] = given
        if key[0] == "secrets" and secret is not None and len(secret.get_secret_value()) < _MINIMUM_KEY:
            issues.append(
                Issue(
                    key=merged.spell(key),
                    place=merged.say_place(key),
                    problem="too short.",
                    accepted=f"at least {_MINIMUM_KEY} characters",
                    remedy="Make one with `openssl rand -hex 32`.",
                )
            )
        set_value(merged.tree, key, secret or PLACEHOLDER)
    return references, issues


def _make_paths_absolute(merged: Merged, file: Path | None) -> None:
    """Relative paths are taken from the folder of the file they are written in, else from the working directory."""
    for key, kind, given in list(walk(Settings, merged.tree, (), _find_targets(merged).find_model)):
        if isinstance(given, str) and given and (kind == "path" or is_file_key(key)):
            origin = merged.find_origin(key)
            folder = origin.folder if origin is not None else Path.cwd()
            set_value(merged.tree, key, str(secret_references.join_path(folder, given)))
    folder = file.parent if file is not None else Path.cwd()
    for section, name in (("worker", "state"), ("stack", "home"), ("stack", "cache")):
        part = merged.tree.setdefault(section, {})
        if isinstance(part, dict) and name not in part:
            default = _get_field(section, name).default
            part[name] = str(secret_references.join_path(folder, str(default)))


def _build(merged: Merged) -> tuple[Settings | None, list[Issue]]:
    """The models. Targets are built by the models of their connectors, one by one."""
    find_model = _find_targets(merged).find_model
    issues: list[Issue] = []
    tree = dict(merged.tree)
    targets = tree.get("targets")
    if isinstance(targets, list):
        built: list[Any] = []
        for position, entry in enumerate(targets):
            try:
                built.append(find_model(entry).model_validate(entry))
            except ValidationError as error:
                issues += translate(error, Settings, merged, find_model, ("targets", position))
        tree["targets"] = tuple(built)
    try:
        return Settings(**tree), issues
    except ValidationError as error:
        return None, issues + translate(error, Settings, merged, find_model, ())


def _order(issues: list[Issue]) -> list[Issue]:
    """By place, lines as numbers; one complaint per key and problem."""

    def rank(issue: Issue) -> tuple[str, int, str]:
        file, _, line = issue.place.rpartition(":")
        return (file, int(line), issue.key) if line.isdigit() else (issue.place, 0, issue.key)

    return sorted(dict.fromkeys(issues), key=rank)

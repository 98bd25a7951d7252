"""Generated documents: errors, settings, topics, connectors, rendered from the running objects.

``write`` brings the files up to date, ``check`` refuses stale ones. A name stands in a document because the object
exists, never because somebody typed it.
"""

from __future__ import annotations

import importlib
import pkgutil
from collections.abc import Iterable, Iterator
from pathlib import Path

from runtime.connectors import Gateways, list_hosts, list_targets
from runtime.installation import PACKAGES
from runtime.markdown import NOTICE, join_parts, write_table
from runtime.settings_reference import render_configuration
from schemas.failure import ConfigurationError, ExitCode, FatalError, OperatorError, TemporaryError
from topics.catalog import DAY_MS, HL7, Topic, list_topics

TOPICS_INTRODUCTION = """\
# Topics

`flow` means `worker.partitions`: all such topics share that count, and it is frozen once they exist. `TARGET` stands
for the name of a target instance. Topics marked PHI need their own access rules, TLS and encrypted volumes.\
"""

CONNECTORS_INTRODUCTION = """\
# Connectors

Status `sandbox` means proved against simulators and the vendors' published vectors, `live` against the vendor's own
test system.\
"""

EGRESS_INTRODUCTION = """\
# Hosts that are called

What a firewall must let out for the targets in use, from the connectors' own declarations; calls go nowhere else, and
redirects are not followed. Where no host is named, it is the one in the instance's settings. With
`environment = "simulator"` only 127.0.0.1 is called. `remitstream connectors` lists your own folder's connectors, too.\
"""

ERRORS_INTRODUCTION = """\
# Errors

Every error has a code, a place (a setting, a file and line, a topic, a port) and a remedy. None ever shows payload,
patient data or a secret. `--json` prints them as one JSON object.\
"""


class StaleTablesError(FatalError):
    """A generated document differs from what would be generated now."""

    code = "RS391"
    meaning = "A generated document is not what the code says now; `remitstream tables --check` found it."
    default_remedy = "Run `remitstream tables` in the source tree and commit the files."


class BrokenModuleError(FatalError):
    """A module of ours cannot be imported."""

    code = "RS392"
    meaning = "A module of remitstream cannot be imported, so the tables would not be complete."
    default_remedy = "Correct the named module, or install what it needs."


class RepeatedCodeError(FatalError):
    """Two errors have one code."""

    code = "RS393"
    meaning = "Two error classes share a code, or one has none of its own."
    default_remedy = "Give each error class its own code in the family of its exit code (RS1xx, RS2xx, RS3xx)."


def render() -> dict[str, str]:
    """All generated documents: path below the source tree -> text."""
    return {
        "docs/errors.md": render_errors(list_errors()),
        "docs/configuration.md": render_configuration(),
        "docs/generated/topics.md": render_topics(),
        "docs/generated/connectors.md": render_connectors(),
        "docs/generated/egress.md": render_egress(),
    }


def write(root: Path) -> list[str]:
    """Write what differs; return the paths written."""
    documents = render()
    stale = _list_stale(root, documents)
    for name in stale:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(documents[name])
    return stale


def check(root: Path) -> list[str]:
    """Raise ``StaleTablesError`` naming every stale document; else an empty list."""
    stale = _list_stale(root, render())
    if stale:
        raise StaleTablesError(f"stale: {', '.join(stale)}.", place=str(root))
    return []


def _list_stale(root: Path, documents: dict[str, str]) -> list[str]:
    return [
        name for name, text in documents.items() if not (root / name).is_file() or (root / name).read_text() != text
    ]


# ---------------------------------------------------------------- errors


def list_errors() -> list[type[OperatorError]]:
    """Every error a person can meet, by code. Raises ``RepeatedCodeError``."""
    for package in PACKAGES:
        _import_all(package)
    found = [error for error in _walk_subclasses(OperatorError) if error.__module__.partition(".")[0] in PACKAGES]
    codes: dict[str, type[OperatorError]] = {}
    for error in sorted(found, key=lambda error: (error.__module__, error.__qualname__)):
        holder = codes.setdefault(error.code, error)
        if holder is not error:
            raise RepeatedCodeError(
                f"{holder.__qualname__} ({holder.__module__}) and {error.__qualname__} share {error.code}.",
                place=error.__module__,
            )
    return [codes[code] for code in sorted(codes)]


def _import_all(package: str) -> None:
    module = importlib.import_module(package)
    for found in pkgutil.walk_packages(module.__path__, f"{package}."):
        if found.name.endswith("__main__"):
            continue
        try:
            importlib.import_module(found.name)
        except Exception as error:
            raise BrokenModuleError(f"import failed with {type(error).__name__}.", place=found.name) from error


def _walk_subclasses(parent: type[OperatorError]) -> Iterator[type[OperatorError]]:
    for child in dict.fromkeys(parent.__subclasses__()):
        yield child
        yield from _walk_subclasses(child)


def render_errors(errors: Iterable[type[OperatorError]]) -> str:
    """The list of errors."""
    listed = list(errors)
    families: tuple[tuple[type[OperatorError], str], ...] = (
        (ConfigurationError, "A setting or the installation is wrong; nothing was started"),
        (TemporaryError, "Something is not there yet; trying again is right and nothing was lost"),
        (FatalError, "A person must look before it can go on"),
    )
    parts = [
        NOTICE,
        ERRORS_INTRODUCTION,
        write_table(
            ("Exit code", "Meaning"),
            [
                (f"{int(ExitCode.OK)}", "Done."),
                (f"{int(ExitCode.FAILED)}", "Failed, or a check found something; a person must look."),
                (f"{int(ExitCode.USAGE)}", "Wrong usage of the command line."),
                (f"{int(ExitCode.RETRY)}", "Try again later; nothing was lost."),
                (f"{int(ExitCode.CONFIGURATION)}", "The configuration is wrong; nothing was started."),
            ],
        ),
    ]
    for family, title in families:
        rows = [
            (f"`{error.code}`", error.meaning, error.default_remedy) for error in listed if issubclass(error, family)
        ]
        parts += [f"## {title} (exit code {int(family.exit_code)})", write_table(("Code", "Meaning", "Remedy"), rows)]
    return join_parts(parts)


# ---------------------------------------------------------------- topics


def render_topics() -> str:
    """The topic catalog with every gateway of this installation and one example target."""
    sources = [*Gateways().list_all(), HL7]
    rows = [
        (
            f"`{topic.name}`",
            topic.purpose,
            topic.key,
            f"`{topic.schema}`" if topic.schema else "bytes",
            str(topic.partitions or "flow"),
            topic.cleanup,
            _describe_retention(topic),
            "yes" if topic.phi else "no",
            topic.writer,
            topic.readers,
        )
        for topic in list_topics(sources, ["TARGET"])
    ]
    head = ("Topic", "Holds", "Key", "Value", "Partitions", "Cleanup", "Kept", "PHI", "Writer", "Readers")
    return join_parts(
        [
            NOTICE,
            TOPICS_INTRODUCTION,
            write_table(head, rows),
        ]
    )


def _describe_retention(topic: Topic) -> str:
    if topic.cleanup == "compact":
        return "latest per key"
    return "for ever" if topic.retention_ms < 0 else f"{topic.retention_ms // DAY_MS} days"


# ---------------------------------------------------------------- connectors


def render_connectors() -> str:
    """Heads of all connectors."""
    gateways = [
        (
            f"`{gateway.name}`",
            gateway.display_name,
            gateway.status.value,
            f"`{gateway.topic}`",
            str(gateway.max_body_bytes),
            gateway.documentation,
        )
        for gateway in Gateways().list_all().values()
    ]
    targets = list_targets().values()
    rows = [
        (
            f"`{target.name}`",
            target.display_name,
            target.status,
            target.transport,
            "yes" if target.accepts_phi else "no",
            target.documentation,
        )
        for target in targets
    ]
    parts = [
        NOTICE,
        CONNECTORS_INTRODUCTION,
        "## Payment gateways",
        write_table(
            ("Name", "Gateway", "Status", "Raw topic", "Largest body (bytes)", "Vendor's documentation"), gateways
        ),
        "## Targets",
        write_table(("Name", "Target", "Status", "Transport", "Takes PHI", "Vendor's documentation"), rows),
    ]
    for target in targets:
        parts += [
            f"### What `{target.name}` does",
            write_table(("Capability", "How"), [(name, text) for name, text in target.capabilities.items()]),
        ]
    return join_parts(parts)


# ---------------------------------------------------------------- egress


def render_egress() -> str:
    """Hosts of all targets, per environment."""
    rows = [
        (
            f"`{called.connector}`",
            called.environment,
            ", ".join(f"`{origin}`" for origin in called.origins) or "in the instance's settings",
        )
        for called in list_hosts(list_targets().values())
    ]
    return join_parts([NOTICE, EGRESS_INTRODUCTION, write_table(("Target", "Environment", "Hosts"), rows)])

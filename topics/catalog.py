"""The catalog: every topic, what its key and value are, how long it lives, who writes and reads it.

``docs/generated/topics.md`` is rendered from here, ``topics apply`` creates from here, ``topics check`` compares.
Partition counts are frozen: growth is a new topic generation after a drain.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterable

DAY_MS = 86_400_000
SEVEN_YEARS_MS = 2_555 * DAY_MS
SEEN_RETENTION_MS = 45 * DAY_MS
"""How long a decided key is known: longer than any copy of its fact may come."""

PAYMENTS = "payments"
SETTLEMENTS = "settlements"
PATIENTS = "patients"
FRONTIERS = "frontiers"
DISPOSITIONS = "dispositions"
DELIVERIES = "deliveries"
REVIEWS = "reviews"
DLQ = "dlq"
AUDIT = "audit"

CANONICAL_MONEY = (PAYMENTS, SETTLEMENTS)
"""Topics whose events every target accounts for."""

HL7 = "hl7"
"""Source name of the HL7 v2 feeds."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Topic:
    """One topic. ``partitions`` 0 means: as many as configured for the flow (all aligned topics share that count)."""

    name: str
    purpose: str
    key: str
    schema: str | None
    """Name of the Avro schema of the value; None for bytes as received or for another small format."""
    writer: str
    readers: str
    cleanup: str = "delete"
    retention_ms: int = -1
    partitions: int = 0
    phi: bool = False
    frozen: bool = True

    @property
    def subject(self) -> str:
        """Registry subject of the value (topic name strategy)."""
        return f"{self.name}-value"

    @property
    def configuration(self) -> dict[str, str]:
        """Topic configuration, the same everywhere; replication comes with the deployment."""
        config = {"cleanup.policy": self.cleanup, "retention.ms": str(self.retention_ms)}
        if "compact" in self.cleanup:
            # Short segments and an early cleaner keep the catch-up of a lost local store small.
            config |= {
                "segment.ms": "600000",
                "segment.bytes": str(64 * 1024 * 1024),
                "min.cleanable.dirty.ratio": "0.1",
                "max.compaction.lag.ms": "3600000",
                "delete.retention.ms": str(7 * DAY_MS),
            }
        return config


def name_raw(source: str) -> str:
    """Raw topic of a source."""
    return f"raw.{source}"


def name_seen(source: str) -> str:
    """Changelog of seen keys."""
    return f"seen.{source}"


def name_waiting(source: str) -> str:
    """Changelog of the waiting room."""
    return f"waiting.{source}"


def name_lineage(source: str) -> str:
    """Changelog of roots: what a child needs of its parent."""
    return f"lineage.{source}"


def name_attempts(target: str) -> str:
    """Changelog of a target instance's attempt ledger."""
    return f"attempts.{target}"


def name_decisions(target: str) -> str:
    """What people decided about events at a target instance; its partitions are those of the attempts."""
    return f"decisions.{target}"


def list_topics(sources: Iterable[str], targets: Iterable[str]) -> tuple[Topic, ...]:
    """All topics of a deployment with these sources (gateways and ``hl7``) and target instances."""
    topics = [
        _money(PAYMENTS, "Money facts of patients: captures, refunds, disputes.", "root transaction", phi=True),
        _money(SETTLEMENTS, "Payouts of gateways to facilities.", "payout", phi=False),
        Topic(
            name=PATIENTS,
            purpose="Patient identifiers and merges, full state.",
            key="keyed hash of the identifier",
            schema="patient_record",
            writer="worker",
            readers="projector",
            cleanup="compact",
            phi=True,
        ),
        Topic(
            name=FRONTIERS,
            purpose="Next offset of each group and partition.",
            key="group, topic id, partition",
            schema=None,
            writer="worker, deliverer",
            readers="worker, deliverer",
            cleanup="compact",
            partitions=1,
        ),
        Topic(
            name=DISPOSITIONS,
            purpose="Why a raw record has no other output.",
            key="hop",
            schema="disposition",
            writer="worker",
            readers="account, trace",
            retention_ms=SEVEN_YEARS_MS,
        ),
        Topic(
            name=DELIVERIES,
            purpose="Outcome of each event at each target.",
            key="event id, target",
            schema="delivery_outcome",
            writer="deliverer",
            readers="account, trace, subscribers",
            retention_ms=SEVEN_YEARS_MS,
        ),
        Topic(
            name=REVIEWS,
            purpose="What a person must decide.",
            key="event id, reason",
            schema="review",
            writer="worker",
            readers="operators",
            cleanup="compact",
        ),
        Topic(
            name=DLQ,
            purpose="Dead letters: original bytes and headers, with reason codes.",
            key="original key",
            schema=None,
            writer="worker, deliverer",
            readers="operators",
            retention_ms=90 * DAY_MS,
            phi=True,
        ),
        Topic(
            name=AUDIT,
            purpose="Every act of a person, each with the hash of the one before.",
            key="actor",
            schema=None,
            writer="desk",
            readers="desk, auditors",
            retention_ms=SEVEN_YEARS_MS,
            partitions=1,
        ),
    ]
    for source in sources:
        topics.extend(_list_source_topics(source))
    topics.extend(
        Topic(
            name=name_attempts(target),
            purpose=f"Changelog: attempt ledger of {target}, frozen requests included.",
            key="event id",
            schema=None,
            writer="deliverer",
            readers="deliverer",
            cleanup="compact",
            phi=True,
        )
        for target in targets
    )
    topics.extend(
        Topic(
            name=name_decisions(target),
            purpose=f"What people decided about events at {target}; edited events included.",
            key="event id",
            schema="decision",
            writer="desk",
            readers="deliverer",
            retention_ms=90 * DAY_MS,
            phi=True,
        )
        for target in targets
    )
    return tuple(topics)


def _money(name: str, purpose: str, key: str, *, phi: bool) -> Topic:
    return Topic(
        name=name,
        purpose=purpose,
        key=key,
        schema="money_event",
        writer="worker",
        readers="deliverer, subscribers",
        retention_ms=SEVEN_YEARS_MS,
        phi=phi,
    )


def _list_source_topics(source: str) -> list[Topic]:
    topics = [
        Topic(
            name=name_raw(source),
            purpose=f"Events of {source} as received, after redaction.",
            key="sending feed" if source == HL7 else "root transaction, as the connector declares",
            schema=None,
            writer="listener" if source == HL7 else "receiver",
            readers="worker",
            retention_ms=30 * DAY_MS,
            phi=True,
        ),
        Topic(
            name=name_seen(source),
            purpose=f"Changelog: keys of {source} already decided.",
            key="transaction key",
            schema=None,
            writer="worker",
            readers="worker",
            cleanup="compact,delete",
            retention_ms=SEEN_RETENTION_MS,
        ),
    ]
    if source != HL7:
        topics.append(
            Topic(
                name=name_waiting(source),
                purpose=f"Changelog: records of {source} on hold.",
                key="hop",
                schema="waiting_entry",
                writer="worker",
                readers="worker",
                cleanup="compact",
                phi=True,
            )
        )
        topics.append(
            Topic(
                name=name_lineage(source),
                purpose=f"Changelog: roots of {source} and their patient.",
                key="root",
                schema=None,
                writer="worker",
                readers="worker",
                cleanup="compact,delete",
                retention_ms=730 * DAY_MS,
                phi=True,
            )
        )
    return topics

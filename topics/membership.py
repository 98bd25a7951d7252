"""How a process is a member of a consumer group: who gets which partitions, and what ends or hinders a membership."""

from __future__ import annotations

import time
from enum import Enum
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError

from schemas.failure import FatalError, OperatorError
from topics.cluster import COMPLAINT_SECONDS, KafkaUnreachable
from topics.lease import STATISTICS_INTERVAL_MS

if TYPE_CHECKING:
    from collections.abc import Callable

    from topics.cluster import KafkaSettings

_REFUSALS = frozenset({KafkaError.INCONSISTENT_GROUP_PROTOCOL, KafkaError.INVALID_SESSION_TIMEOUT})
"""The client asks to join again and again, and is refused each time."""

_STANDSTILL = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)
"""The client goes on asking, in vain until somebody acts, and nobody else would tell."""

REJOINS = 2
FENCED_SECONDS = 60.0
"""A member that the group fences joins it again, at most this often within so many seconds."""


class MemberFenced(FatalError):
    """The group does not let this member in any more."""

    code = "RS309"
    meaning = "The group's coordinator fenced this member again and again: another one of its name is in the group."
    default_remedy = "Give every process its own instance name and slot; look for one that was started twice."


class JoinRefused(FatalError):
    """The group's coordinator refuses this member; it is told, and asks again."""

    code = "RS398"
    meaning = (
        "The group's coordinator does not let this member in: its session timeout is outside the broker's bounds, or "
        "the members that are in the group share out in another way."
    )
    default_remedy = (
        "Set `kafka.session_timeout_seconds` between the broker's `group.min.session.timeout.ms` and "
        "`group.max.session.timeout.ms`. After a change of `worker.group_protocol` or of the version, end the members "
        "that still have the old way; this one then comes in by itself."
    )


class Membership(Enum):
    """How a group shares its partitions out."""

    STICKY = "classic, cooperative-sticky"
    """Each member keeps what it has; whoever joins gets the first topics' partitions, of the last ones perhaps none."""
    SPREAD = "classic, roundrobin"
    """Every member gets its share of every topic; all partitions pause when a member joins or leaves."""
    SERVER = "consumer"
    """KIP-848: the broker shares out, by ranges of every topic, and sets the session time-out. No static ids there: a
    killed static member would block its successor until the session ends."""

    def build_client(self, kafka: KafkaSettings, group: str, instance: str) -> dict[str, Any]:
        """Configuration of the member's client. ``instance`` is its name in the group, stable over restarts."""
        session_ms = kafka.session_timeout_seconds * 1000
        return (
            kafka.build_client(instance)
            | self._build_protocol(instance, session_ms)
            | {
                "group.id": group,
                "max.poll.interval.ms": max(300_000, session_ms),
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # A position is always set from the frontier; a missing offset must never decide anything.
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 20,
                "fetch.queue.backoff.ms": 10,
                "queued.max.messages.kbytes": 32_768,
                "statistics.interval.ms": STATISTICS_INTERVAL_MS,
            }
        )

    def _build_protocol(self, instance: str, session_ms: int) -> dict[str, Any]:
        """With ``SERVER`` librdkafka refuses session settings and assignors of ours."""
        if self is Membership.SERVER:
            return {"group.protocol": "consumer", "group.remote.assignor": "range"}
        return {
            "group.instance.id": instance,
            "partition.assignment.strategy": "roundrobin" if self is Membership.SPREAD else "cooperative-sticky",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": min(3000, session_ms // 6),
        }


class Fences:
    """How often the coordinator has fenced this member lately."""

    def __init__(self, group: str) -> None:
        self._group = group
        self._noted: list[float] = []

    def note(self) -> None:
        """It was fenced once more. Raises ``MemberFenced`` when that is too often."""
        now = time.monotonic()
        self._noted = [at for at in self._noted if now - at < FENCED_SECONDS]
        if len(self._noted) >= REJOINS:
            raise MemberFenced(f"{len(self._noted) + 1} times within {FENCED_SECONDS:.0f} s.", place=self._group)
        self._noted.append(now)


class Complaints:
    """What the client complains of, made known now and then where nobody but a person can mend it."""

    def __init__(self, report: Callable[[str, OperatorError], None]) -> None:
        self._report = report
        self._told: dict[tuple[str, int], float] = {}

    def hear(self, error: KafkaError, place: str) -> JoinRefused | None:
        """Report ``client_trouble`` if this one keeps the client from going on; return it if it keeps us out."""
        refusal = JoinRefused(f"{error.name()}.", place=place) if error.code() in _REFUSALS else None
        trouble: OperatorError | None = refusal
        if error.code() in _STANDSTILL:
            remedy = "Check this user's rights on the topic and on the group, and that the topic exists."
            trouble = KafkaUnreachable(f"{error.name()}.", place=place, remedy=remedy)
        now = time.monotonic()
        if trouble and now - self._told.get((place, error.code()), float("-inf")) >= COMPLAINT_SECONDS:
            self._told[place, error.code()] = now
            self._report("client_trouble", trouble)
        return refusal

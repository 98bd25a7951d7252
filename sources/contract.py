"""What a source connector declares. One file per gateway: a head and two or three pure functions.

Pure means: no I/O, no clock, no logging; time and secrets are arguments. The receiver does the rest: verify, redact,
split, publish, answer.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Protocol

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence


class Status(StrEnum):
    """How far a connector is proved."""

    SANDBOX = "sandbox"
    """Against simulators and vendors' published vectors only."""
    LIVE = "live"
    """Against the vendor's own test system."""


class Refusal(StrEnum):
    """Why a delivery is refused; each is a metric label."""

    SIGNATURE_MISSING = "signature_missing"
    SIGNATURE_MALFORMED = "signature_malformed"
    SIGNATURE_WRONG = "signature_wrong"
    TIMESTAMP_STALE = "timestamp_stale"


@dataclass(frozen=True, slots=True)
class Verdict:
    """Verification of one delivery. ``refusal`` is None when the sender is who it says."""

    refusal: Refusal | None
    scheme: str = ""
    key_id: str = ""
    """Which secret matched: ``1`` or ``2`` in the configured order; never the secret."""
    signed_at: int | None = None
    """Seconds since the epoch inside the signature, where the scheme has one."""


@dataclass(frozen=True, slots=True)
class RawEvent:
    """One event of a delivery: ``key`` is the Kafka key, ``body`` its exact bytes."""

    key: str
    body: bytes
    delivery_id: str
    event_type: str
    occurred_at: float | None
    """Seconds since the epoch as the sender says, for the CloudEvents time."""


class Verify(Protocol):
    """Checks a delivery over its raw bytes, in constant time per secret. Header names are lower case."""

    def __call__(
        self, body: bytes, headers: Mapping[str, str], *, secrets: Sequence[bytes], now: float, tolerance: float
    ) -> Verdict:
        """Return the verdict; never raises for bad input."""


_NAME = re.compile(r"[a-z][a-z0-9_]{1,30}\Z")


@dataclass(frozen=True, slots=True, kw_only=True)
class Gateway:
    """Head of a payment gateway connector: its module in ``sources/payments/`` holds one as ``GATEWAY``."""

    name: str
    display_name: str
    status: Status
    documentation: str
    """Where the vendor describes its webhooks."""
    verify: Verify
    split: Callable[[bytes], list[RawEvent]]
    """One delivery's body -> its events. Raises ``schemas.failure.Failure`` when it cannot be parsed; the receiver then
    publishes the body whole, keyed by its digest, and the stream dead-letters it."""
    sensitive_members: frozenset[str] = field(default_factory=frozenset)
    """JSON members whose string value is personal and that no mapping needs (names, addresses): emptied at the edge."""
    max_body_bytes: int = 1_048_576

    def __post_init__(self) -> None:
        if not _NAME.match(self.name):
            raise ValueError(f"gateway name {self.name!r}: lower-case letters, digits and underscore")

    @property
    def topic(self) -> str:
        """The raw topic this gateway's events go to."""
        return f"raw.{self.name}"

"""One event at a target: its state, its entry in the changelog `attempts.<target>`, what is reported of it. Data."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Final, Literal

import msgspec

from sinks.contract import Request

if TYPE_CHECKING:
    from schemas.events import MoneyEvent, Outcome
    from schemas.failure import FailureKind
    from topics.headers import Headers

NEVER = float("inf")
"""A steady time that does not come."""
WITHDRAWN: Final = "WITHDRAWN"
"""Kind of a call that was given up before its write."""
BEHIND_ENTITY = "BEHIND_ENTITY"
"""Parked: an earlier event of the entity is rejected, unknown or parked."""

BY_PERSON = "BY_PERSON"
"""A person decided what became of it."""


class Ruling(StrEnum):
    """What came of a person's decision."""

    APPLIED = "APPLIED"
    WAIT = "WAIT"
    """The last write may still land; it is acted on later."""
    CALL_UNDER_WAY = "CALL_UNDER_WAY"
    NOT_REJECTED = "NOT_REJECTED"
    """Only what the target surely refused is redriven."""
    NOT_WAIVABLE = "NOT_WAIVABLE"
    """It may be at the target, or is on its way there."""
    NOT_UNKNOWN = "NOT_UNKNOWN"
    TOO_EARLY = "TOO_EARLY"
    """It was made while the last write could still land."""
    EDIT_UNUSABLE = "EDIT_UNUSABLE"
    """The edited event cannot be read, or is another event."""
    ACTION_UNKNOWN = "ACTION_UNKNOWN"


class State(StrEnum):
    """State of an event at the target."""

    PENDING = "PENDING"
    """Only in memory: nothing was decided yet."""
    IN_FLIGHT = "IN_FLIGHT"
    """A call may be under way."""
    DONE = "DONE"
    REJECTED = "REJECTED"
    """Refused by the target, or impossible to build; the dead letter is its report."""
    RETRY_AT = "RETRY_AT"
    """Surely not applied; tried again later. Holds the frontier."""
    PARKED = "PARKED"
    """Cannot finish soon; no longer holds the frontier."""
    UNKNOWN = "UNKNOWN"
    """May have been applied. With a time to resend it holds the frontier; without one a person decides."""


_STOPPED = frozenset({State.REJECTED, State.PARKED})


class Entry(msgspec.Struct, frozen=True, array_like=True, omit_defaults=True):
    """Value of `attempts.<target>`, keyed by event id. New members go to the end, with a default."""

    state: str
    topic: str
    offset: int
    entity: str
    number: int = 0
    frozen_at: int = 0
    first_write_at: int = 0
    may_have_landed: bool = False
    control_id: str = ""
    reference: str = ""
    body: bytes | None = None
    retry_at: int = 0
    tries: int = 0
    failure: str = ""
    code: str = ""
    outcome: str = ""
    key: bytes | None = None
    value: bytes | None = None
    """The canonical event as read; kept while it may still be needed, because the frontier may be past it."""
    headers: list[tuple[str, bytes]] = []
    since: int = 0
    method: str = ""
    url: str = ""
    request_headers: list[tuple[str, str]] = []
    round: int = 0
    """Decisions of people taken."""
    decidable_at: int = 0
    """UNKNOWN: wall time from which a person may decide; no earlier write can land after it."""
    decision: str = ""
    """The last decision taken, and ``ruling``: what came of it."""
    ruling: str = ""

    def __repr__(self) -> str:
        return f"Entry({self.state}, {self.topic}@{self.offset}, attempt {self.number}, {self.code or 'no code'})"


_decoder = msgspec.msgpack.Decoder(Entry)
_encoder = msgspec.msgpack.Encoder()


def encode_entry(entry: Entry) -> bytes:
    """Bytes for the changelog."""
    return _encoder.encode(entry)


def decode_entry(value: bytes) -> Entry:
    """Entry from the changelog. Raises ``msgspec.MsgspecError``."""
    return _decoder.decode(value)


@dataclass(frozen=True, slots=True)
class Source:
    """The canonical record an attempt is about. Its repr shows neither key nor value."""

    key: bytes = field(repr=False)
    value: bytes = field(repr=False)
    headers: Headers = field(repr=False, default_factory=list)


class Attempt:
    """One event at the target, as it is in memory. Compared by identity; its repr shows no payload."""

    __slots__ = (
        "asks",
        "calling",
        "code",
        "decidable_at",
        "decision",
        "due",
        "entity",
        "event",
        "event_id",
        "failure",
        "first_write_at",
        "frozen_at",
        "is_first_write",
        "is_queued",
        "may_have_landed",
        "number",
        "offset",
        "outcome",
        "recorded",
        "request",
        "retry_at",
        "round",
        "ruling",
        "settled_at",
        "since",
        "source",
        "state",
        "tries",
        "written",
    )

    def __init__(self, event_id: str, offset: int, entity: str, source: Source, event: MoneyEvent | None) -> None:
        self.event_id = event_id
        self.offset = offset
        self.entity = entity
        self.source = source
        self.event = event
        """None until decoded, and for good when the record cannot be."""
        self.state = State.PENDING
        self.request: Request | None = None
        self.number = 0
        """Calls begun."""
        self.tries = 0
        """Refusals for now, since the event was last at rest."""
        self.frozen_at = 0
        self.first_write_at = 0
        """No write happened before this wall time; 0 when none can have."""
        self.may_have_landed = False
        self.retry_at = 0
        self.failure = ""
        self.code = ""
        self.outcome = ""
        """The last outcome reported to `deliveries`."""
        self.since = 0
        """Wall time at which the event was first seen here."""
        self.due = NEVER
        """Steady time of the next step; infinite when there is none."""
        self.settled_at = 0.0
        """Steady time after which no earlier write of this event can still land."""
        self.written = False
        """Whether the running call has written."""
        self.is_first_write = False
        """Whether no call before the running one has written."""
        self.calling = False
        """Whether a call is under way."""
        self.asks = False
        """Whether that call is a look-up, which posts nothing."""
        self.is_queued = False
        """Whether it stands in line to begin."""
        self.recorded = False
        """Whether the changelog holds an entry."""
        self.round = 0
        """Decisions of people taken about it."""
        self.decidable_at = 0
        """UNKNOWN: wall time from which a person may decide."""
        self.decision = self.ruling = ""
        """The last decision taken, and what came of it."""

    def __repr__(self) -> str:
        return f"Attempt({self.event_id}, {self.state}, offset {self.offset}, attempt {self.number})"

    @property
    def waits_for_person(self) -> bool:
        """UNKNOWN with nothing left that the machine may do."""
        return self.state is State.UNKNOWN and self.due == NEVER and not self.calling

    @property
    def is_stopped(self) -> bool:
        """Whether later events of the entity are parked behind it."""
        return self.state in _STOPPED or self.waits_for_person

    @property
    def is_put_off(self) -> bool:
        """PARKED for a reason of its own, to be tried again at a time."""
        return self.state is State.PARKED and self.code != BEHIND_ENTITY

    @property
    def is_passable(self) -> bool:
        """Whether the frontier may move past it."""
        return self.state is State.DONE or self.is_stopped


def restore_attempt(event_id: str, entry: Entry) -> Attempt:
    """An event as its changelog entry left it; the event itself is decoded by whoever needs it."""
    source = Source(entry.key or b"", entry.value or b"", entry.headers)
    attempt = Attempt(event_id, entry.offset, entry.entity, source, None)
    attempt.state = State(entry.state)
    attempt.number = entry.number
    attempt.tries = entry.tries
    attempt.frozen_at = entry.frozen_at
    attempt.first_write_at = entry.first_write_at
    attempt.may_have_landed = entry.may_have_landed
    attempt.retry_at = entry.retry_at
    attempt.failure = entry.failure
    attempt.code = entry.code
    attempt.outcome = entry.outcome
    attempt.since = entry.since
    attempt.round = entry.round
    attempt.decidable_at = entry.decidable_at
    attempt.decision, attempt.ruling = entry.decision, entry.ruling
    attempt.recorded = True
    if entry.body is not None:
        attempt.request = Request(
            entry.body,
            entry.control_id,
            entry.reference,
            entry.method,
            entry.url,
            tuple(entry.request_headers),
        )
    return attempt


def build_entry(attempt: Attempt, topic: str) -> Entry:
    """The changelog entry of an event; a finished one keeps neither event nor request."""
    is_done = attempt.state is State.DONE
    request = None if is_done else attempt.request
    return Entry(
        state=attempt.state.value,
        topic=topic,
        offset=attempt.offset,
        entity=attempt.entity,
        number=attempt.number,
        frozen_at=attempt.frozen_at,
        first_write_at=attempt.first_write_at,
        may_have_landed=attempt.may_have_landed,
        control_id=request.control_id if request else "",
        reference=request.reference if request else "",
        body=request.body if request else None,
        retry_at=attempt.retry_at,
        tries=attempt.tries,
        failure=attempt.failure,
        code=attempt.code,
        outcome=attempt.outcome,
        key=None if is_done else attempt.source.key,
        value=None if is_done else attempt.source.value,
        headers=[] if is_done else attempt.source.headers,
        since=attempt.since,
        method=request.method if request else "",
        url=request.url if request else "",
        request_headers=list(request.headers) if request else [],
        round=attempt.round,
        decidable_at=attempt.decidable_at,
        decision=attempt.decision,
        ruling=attempt.ruling,
    )


@dataclass(frozen=True, slots=True)
class Report:
    """What the next transaction tells `deliveries` (and `dlq`, when ``dead_letter`` is set) about an event."""

    attempt: Attempt
    outcome: Outcome
    failure: str
    code: str
    number: int
    control_id: str
    reference: str
    field: str = ""
    dead_letter: bool = False


@dataclass(frozen=True, slots=True)
class Flush:
    """One partition's part of a transaction: changelog entries (None: tombstone), reports, next offset to read."""

    records: list[tuple[str, bytes | None]]
    reports: list[Report]
    frontier: int
    passed: int
    dirty: list[Attempt]


@dataclass(frozen=True, slots=True)
class Failed:
    """A call without an answer. ``kind`` UNAVAILABLE means that nothing was written, AMBIGUOUS that it may have landed.

    ``WITHDRAWN`` calls were given up before the write and are no attempt. ``retry_after`` is in seconds.
    """

    kind: FailureKind | Literal["WITHDRAWN"]
    code: str
    retry_after: float = 0.0

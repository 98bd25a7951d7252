"""Typed events of every topic whose value is Avro; each struct mirrors the ``.avsc`` of its name (a test compares).

Times are milliseconds since the epoch, UTC. ``phi`` in the Avro schema marks protected health information.
"""

from __future__ import annotations

from enum import StrEnum

import msgspec

from schemas.money import Money


class Kind(StrEnum):
    """What happened to the money, or to the dispute about it."""

    CAPTURE = "capture"
    REFUND = "refund"
    REFUND_REVERSAL = "refund_reversal"
    """A refund failed at the bank; its money came back."""
    DISPUTE_OPENED = "dispute_opened"
    """The payer's bank opened a dispute; no money moved yet."""
    CHARGEBACK = "chargeback"
    """The disputed money was withdrawn."""
    CHARGEBACK_REVERSAL = "chargeback_reversal"
    """The disputed money was reinstated."""
    DISPUTE_CLOSED = "dispute_closed"
    PAYOUT = "payout"
    PAYOUT_FAILED = "payout_failed"


ROOT_KINDS = frozenset({Kind.CAPTURE})
"""Kinds that begin a lineage; all others of `payments` are children of one."""


class Reference(msgspec.Struct, frozen=True, gc=False):
    """An identifier of a person, account or visit: unique only inside its assigning authority."""

    authority: str
    id_type: str
    value: str


class MoneyEvent(msgspec.Struct, kw_only=True, gc=False):
    """One money fact: value of `payments` and `settlements`, keyed by ``root``."""

    event_id: str
    transaction_key: str
    tenant: str
    facility: str
    source: str
    account: str
    kind: str
    status: str
    money: Money
    occurred_at: int
    received_at: int
    object_id: str
    root: str
    """Root transaction of the lineage; Kafka key and entity of ordering."""
    source_event_id: str
    patient: Reference | None = None
    """The patient as the event (or its parent) named them."""
    mrn: Reference | None = None
    """The patient's medical record number, resolved through merges at the time of publishing."""
    guarantor_account: Reference | None = None
    visit: Reference | None = None
    claim: str | None = None
    invoice: str | None = None
    token_reference: str | None = None
    attributes: dict[str, str] = {}
    mapping_version: str
    origin: str
    """Hop (topic id, partition, offset) of the first raw record of this fact."""


class PatientRecord(msgspec.Struct, kw_only=True):
    """Full state of one patient identifier: value of `patients`, keyed by the identifier's keyed hash."""

    tenant: str
    facility: str
    identifier: Reference
    status: str
    """``active``, ``merged`` or ``inactive``."""
    mrn: Reference | None = None
    """The medical record number this identifier belongs to; null when the message left it ambiguous."""
    merged_into: Reference | None = None
    feed: str
    source_event_id: str
    message_type: str
    occurred_at: int
    received_at: int
    mapping_version: str
    origin: str


class Fate(StrEnum):
    """The one fact every raw record ends in (names of the conservation equation)."""

    CANONICAL = "canonical"
    SUPPRESSED = "suppressed"
    IGNORED = "ignored"
    PATIENT_UPDATE = "patient_update"
    WAITING = "waiting"
    IN_REVIEW = "in_review"
    DEAD_LETTERED = "dead_lettered"


class Outcome(StrEnum):
    """The one fact every canonical event ends in at each target."""

    POSTED = "posted"
    NOT_ROUTED = "not_routed"
    REJECTED = "rejected"
    DEAD_LETTERED = "dead_lettered"
    PARKED = "parked"
    UNKNOWN = "unknown"
    WAIVED = "waived"


class Disposition(msgspec.Struct, kw_only=True):
    """Why a raw record has no other output: value of `dispositions`, keyed by ``hop``."""

    hop: str
    fate: str
    reason: str
    source: str
    facility: str
    event_type: str
    linked: str
    """Hop or event id this one repeats or is evidence of; empty when there is none."""
    decided_at: int


class Review(msgspec.Struct, kw_only=True):
    """What a person must decide: value of `reviews`, keyed by event id and reason."""

    event_id: str
    reason: str
    hop: str
    source: str
    facility: str
    transaction_key: str
    root: str
    event_type: str
    created_at: int


class WaitingEntry(msgspec.Struct, kw_only=True):
    """A raw record on hold: value of `waiting.<source>`, keyed by ``hop``; a PHI topic."""

    hop: str
    entity: str
    reason: str
    """``PATIENT_UNKNOWN``, ``PARENT_UNKNOWN`` or ``BEHIND_ENTITY`` (an earlier event of the entity waits)."""
    awaited: str
    """Keyed hash of the identifier, or the root transaction, that would release it."""
    event_id: str
    transaction_key: str
    since: int
    raw_key: bytes
    raw_value: bytes
    raw_headers: list[tuple[str, bytes]]


class DeliveryOutcome(msgspec.Struct, kw_only=True):
    """Outcome of one event at one target: value of `deliveries`, keyed by event id and target."""

    event_id: str
    target: str
    outcome: str
    tenant: str
    facility: str
    root: str
    kind: str
    failure: str
    """Failure kind, empty when there is none."""
    code: str
    """Reason code such as ``MSA_AR``; never payload text."""
    attempt: int
    control_id: str
    """Idempotency key or MSH-10 of the request; empty when nothing was sent."""
    reference: str
    """The target's own reference of the posting, where it gives one."""
    decided_at: int


class Action(StrEnum):
    """What a person may decide about an event at a target."""

    REDRIVE = "redrive"
    """Begin again with an event that the target surely does not have; with ``value`` as an edited version."""
    WAIVE = "waive"
    """End it without a posting; later events of its entity go on."""
    POSTED = "posted"
    """Its unknown outcome is: the target has it."""
    NOT_POSTED = "not_posted"
    """Its unknown outcome is: the target does not have it. The same bytes are sent again."""


class Decision(msgspec.Struct, kw_only=True):
    """What a person decided about one attempt: value of `decisions.<target>`, keyed by event id; a PHI topic.

    It counts only for the attempt it names: the event at ``offset`` of ``topic`` with this many calls begun
    (``attempt``) and this many decisions taken before (``round``).
    """

    decision_id: str
    target: str
    event_id: str
    topic: str
    offset: int
    attempt: int
    round: int
    action: str
    reference: str
    """The target's own reference, as the person found it; empty when there is none."""
    value: bytes | None = None
    """The edited canonical event that takes the place of the one read."""
    decided_at: int

"""What a deliverer writes beside its ledger: outcomes to `deliveries`, dead letters to `dlq`."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.events import DeliveryOutcome, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.wire import Decoder, Encoder
from topics import catalog, headers
from topics.dead_letter import build_dead_letter
from topics.registry import list_subjects
from topics.transaction import Output

if TYPE_CHECKING:
    from sinks.attempts import Report
    from topics.registry import Registry

SCHEMA = "delivery_outcome"
SUBJECT = next(subject for subject, schema in list_subjects(catalog.list_topics((), ())).items() if schema == SCHEMA)

_LONGEST_REFERENCE = 512
"""Characters of a target's reference that are kept: whatever it sends must not make an outcome too large to write."""


class Codecs:
    """Reads canonical events, writes outcomes. Blocking where the registry is asked; make it in a thread."""

    def __init__(self, registry: Registry, outcome_schema_id: int) -> None:
        self._decoder = Decoder("money_event", MoneyEvent, registry.find_schema)
        self._encoder = Encoder(SCHEMA, outcome_schema_id)

    def decode(self, value: bytes) -> MoneyEvent:
        """A canonical event. Raises ``Failure`` NOT_AVRO; ``TemporaryError`` when the registry is needed and down."""
        event: MoneyEvent = self._decoder.decode(value)
        return event

    def encode(self, outcome: DeliveryOutcome) -> bytes:
        """Framed bytes of an outcome."""
        return self._encoder.encode(outcome)


def build_outcome(report: Report, target: str, codecs: Codecs, now_ms: int) -> Output:
    """The record for `deliveries`."""
    attempt = report.attempt
    event = attempt.event
    outcome = DeliveryOutcome(
        event_id=attempt.event_id,
        target=target,
        outcome=report.outcome.value,
        tenant=event.tenant if event else "",
        facility=event.facility if event else "",
        root=event.root if event else attempt.entity,
        kind=event.kind if event else "",
        failure=report.failure,
        code=report.code,
        attempt=report.number,
        control_id=report.control_id,
        reference=report.reference[:_LONGEST_REFERENCE],
        decided_at=now_ms,
    )
    return Output(
        catalog.DELIVERIES,
        f"{attempt.event_id}|{target}".encode(),
        codecs.encode(outcome),
        [(headers.EVENT_ID, attempt.event_id.encode())],
        cause=attempt.event_id,
    )


def build_report_letter(report: Report, target: str, hop: str, now_ms: int) -> Output:
    """The record for `dlq`: the canonical record as it was read, with the reason. ``hop`` is the canonical record's."""
    attempt = report.attempt
    letter = build_dead_letter(
        key=attempt.source.key,
        value=attempt.source.value,
        original=attempt.source.headers,
        failure=Failure(FailureKind(report.failure), report.code, report.field),
        stage=target,
        hop=hop,
        origin=attempt.event.origin if attempt.event else hop,
        now_ms=now_ms,
    )
    letter.cause = attempt.event_id
    return letter

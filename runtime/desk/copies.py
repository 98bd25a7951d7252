"""Two copies of one money fact that contradict each other: what each says, and what stands of the fact.

A money fact is in the canonical topics once, under the id of its transaction key; whoever adds up amounts relies on it.
So a second copy can take the place of a first that came to nothing, and never stands beside one that was published.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.account import TopicScan
from runtime.connectors import Gateways
from schemas.events import DeliveryOutcome, Disposition, MoneyEvent, WaitingEntry
from schemas.failure import Failure
from streams.normalise import Normaliser
from streams.normalised import Normalised
from topics import catalog, headers
from topics.headers import RawRecord, find_header
from topics.reading import keep_latest

if TYPE_CHECKING:
    from collections.abc import Callable, Collection

    from runtime.desk.office import Office
    from schemas.events import Review
    from topics.reading import Record

WAITING = "waiting"
IN_REVIEW = "in_review"
SENT_AGAIN = "sent_again"
CANONICAL = "canonical"
NOWHERE = "nowhere"


@dataclass(frozen=True, slots=True)
class Standing:
    """What became of the other copies of a fact, and the event where one was published."""

    state: str
    """``canonical``, ``waiting``, ``in_review``, ``sent_again`` (by a person, and perhaps on its way), or ``nowhere``:
    dismissed or dead-lettered, and only a person can bring it back."""
    event: MoneyEvent | None = None


def find_standing(
    office_: Office, review: Review, read_reviewed: Callable[[], Collection[str]], resent: Collection[str]
) -> Standing:
    """What stands of the fact that a copy in review is of.

    ``read_reviewed`` tells the events with an open review of another kind; ``resent`` are the reasons of dispositions
    by which a person sent a copy on its way. Every place is read before those that a record goes to from there, so none
    is missed that moves meanwhile.
    """
    scan = TopicScan(office_.settings)
    entries = scan.build_decoder("waiting_entry", WaitingEntry)
    held = keep_latest(scan.read(catalog.name_waiting(review.source))).values()
    if any(entries.decode(record.value or b"").transaction_key == review.transaction_key for record in held):
        return Standing(WAITING)
    if review.event_id in read_reviewed():
        return Standing(IN_REVIEW)
    dispositions = scan.build_decoder("disposition", Disposition)
    found = (dispositions.decode(record.value or b"") for record in scan.read(catalog.DISPOSITIONS))
    is_resent = any(one.linked == review.event_id and one.reason in resent for one in found)
    event = _find_event(scan, review.event_id)
    if event is not None:
        return Standing(CANONICAL, event)
    return Standing(SENT_AGAIN if is_resent else NOWHERE)


def describe_copies(office_: Office, review: Review, standing: Standing, raw: Record | None) -> dict[str, Any]:
    """What each copy says about the money, and where the published one went; no patient, no payload."""
    first: dict[str, Any] = {"state": standing.state}
    if standing.event is not None:
        first |= _describe(standing.event) | {"targets": _find_outcomes(office_, review.event_id)}
    return {"first": first, "this": _read_copy(office_, review, raw)}


def _find_event(scan: TopicScan, event_id: str) -> MoneyEvent | None:
    decoder = scan.build_decoder("money_event", MoneyEvent)
    for topic in catalog.CANONICAL_MONEY:
        for record in scan.read(topic):
            if find_header(record.headers, headers.EVENT_ID) == event_id:
                event: MoneyEvent = decoder.decode(record.value or b"")
                return event
    return None


def _find_outcomes(office_: Office, event_id: str) -> dict[str, str]:
    scan = TopicScan(office_.settings)
    decoder = scan.build_decoder("delivery_outcome", DeliveryOutcome)
    found: dict[str, str] = {}
    for record in scan.read(catalog.DELIVERIES):
        if find_header(record.headers, headers.EVENT_ID) == event_id:
            outcome: DeliveryOutcome = decoder.decode(record.value or b"")
            found[outcome.target] = outcome.outcome
    return found


def _read_copy(office_: Office, review: Review, raw: Record | None) -> dict[str, Any]:
    if raw is None:
        return {"state": "its raw record is no longer kept"}
    settings = office_.settings
    mappings = Gateways(settings.connectors.gateways).find_mappings(review.source)
    record = RawRecord(
        review.hop, raw.partition, raw.offset, raw.key or b"", raw.value or b"", raw.headers, raw.timestamp
    )
    try:
        found = Normaliser.load(review.source, settings.tenancy, mappings).normalise(record)
    except Failure as failure:
        return {"state": f"cannot be mapped now ({failure.code})"}
    return _describe(found.event) if isinstance(found, Normalised) else {"state": f"ignored now ({found.reason})"}


def _describe(event: MoneyEvent) -> dict[str, Any]:
    return {
        "kind": event.kind,
        "status": event.status,
        "amount": f"{event.money.major()} {event.money.currency}",
        "object": event.object_id,
        "source_event": event.source_event_id,
    }

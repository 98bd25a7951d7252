"""One event's story, from raw record to outcome, read from the topics alone. It shows no body and no patient id."""

from __future__ import annotations

import datetime as dt
from typing import TYPE_CHECKING, Any

from runtime.account import NORMALISE_STAGES, TopicScan
from schemas.events import DeliveryOutcome, Disposition, MoneyEvent, Review, WaitingEntry
from schemas.failure import FatalError
from topics import catalog, headers
from topics.headers import find_header

if TYPE_CHECKING:
    from collections.abc import Iterator

    from runtime.settings import Settings
    from topics.reading import Record

Step = dict[str, Any]


class IdUnknown(FatalError):
    """Nothing is known of an id."""

    code = "RS370"
    meaning = "No record of any topic has this id."
    default_remedy = (
        "Give an event id, a gateway object or event id (`pi_...`, `evt_...`), an MSH-10, or a hop; raw records are "
        "kept for 30 days."
    )


def trace(settings: Settings, identifier: str) -> list[Step]:
    """The story in order of time: one dict per record, with ``time``, ``what`` and where it stands.

    ``identifier`` is an event id, a gateway's object, transaction or event id, an MSH-10, or a hop. An id of a root
    transaction tells the whole lineage. Raises ``IdUnknown``. It reads every topic from its beginning.
    """
    story = _Story(settings, identifier)
    steps = sorted(story.tell(), key=lambda step: (step["time"], step.pop("rank")))
    if not steps:
        raise IdUnknown("no record has it.", place=identifier)
    return steps


def render(steps: list[Step]) -> list[str]:
    """The story as lines for people: time, what happened, where, and the facts."""
    width = max(len(step["what"]) for step in steps)
    return [
        f"{step['time']}  {step['what']:<{width}}  {step['at']}  "
        + " ".join(f"{name}={fact}" for name, fact in step.items() if name not in ("time", "what", "at"))
        for step in steps
    ]


class _Story:
    def __init__(self, settings: Settings, identifier: str) -> None:
        self._settings = settings
        self._scan = TopicScan(settings)
        self._wanted = identifier
        self._hops: set[str] = set()
        self._events: set[str] = set()

    def tell(self) -> Iterator[Step]:
        """All steps, in no order."""
        # Canonical events first: an event id names no raw record by itself.
        canonical = list(self._find_canonical())
        yield from self._find_raw()
        yield from canonical
        yield from self._find_waiting()
        yield from self._find_fates()
        yield from self._find_deliveries()

    def _find_canonical(self) -> Iterator[Step]:
        decoder = self._scan.build_decoder("money_event", MoneyEvent)
        for topic in catalog.CANONICAL_MONEY:
            for record in self._scan.read(topic):
                event = decoder.decode(record.value or b"")
                names = (
                    event.event_id,
                    event.object_id,
                    event.root,
                    event.root.rpartition("/")[2],
                    event.source_event_id,
                )
                hop = find_header(record.headers, headers.HOP) or ""
                if self._wanted not in (*names, hop):
                    continue
                self._events.add(event.event_id)
                self._hops.add(hop)
                yield _build_step(
                    record,
                    2,
                    f"canonical {event.kind}",
                    event_id=event.event_id,
                    facility=event.facility,
                    amount=f"{event.money.major()} {event.money.currency}",
                    object=event.object_id,
                    root=event.root,
                    patient="resolved" if event.mrn is not None else "none",
                    mapping=event.mapping_version,
                    raw=hop,
                )

    def _find_raw(self) -> Iterator[Step]:
        needle = self._wanted.encode()
        for source in self._settings.sources:
            topic = catalog.name_raw(source)
            topic_id = self._scan.find_id(topic)
            for record in self._scan.read(topic):
                hop = f"{topic_id}:{record.partition}:{record.offset}"
                delivery = find_header(record.headers, headers.DELIVERY_ID)
                key = (record.key or b"").decode("utf-8", "replace")
                if (
                    hop not in self._hops
                    and self._wanted not in (hop, delivery, key, key.rpartition("/")[2])
                    and b'"' + needle + b'"' not in (record.value or b"")
                ):
                    continue
                self._hops.add(hop)
                yield _build_step(
                    record,
                    0,
                    f"raw {find_header(record.headers, 'ce_type') or ''}",
                    source=source,
                    account=find_header(record.headers, headers.ACCOUNT),
                    facility=find_header(record.headers, headers.FACILITY),
                    delivery=delivery,
                    verdict=find_header(record.headers, headers.VERDICT),
                    hop=hop,
                )

    def _find_waiting(self) -> Iterator[Step]:
        decoder = self._scan.build_decoder("waiting_entry", WaitingEntry)
        for source in self._settings.sources:
            for record in self._scan.read(catalog.name_waiting(source)) if source != catalog.HL7 else ():
                hop = (record.key or b"").decode()
                if hop not in self._hops:
                    continue
                if record.value is None:
                    yield _build_step(record, 1, "released from waiting", hop=hop)
                else:
                    yield _build_step(record, 1, "waiting", reason=decoder.decode(record.value).reason, hop=hop)

    def _find_fates(self) -> Iterator[Step]:
        dispositions = self._scan.build_decoder("disposition", Disposition)
        for record in self._scan.read(catalog.DISPOSITIONS):
            if (record.key or b"").decode() in self._hops:
                found = dispositions.decode(record.value or b"")
                yield _build_step(record, 2, found.fate, reason=found.reason, linked=found.linked, hop=found.hop)
        for record in self._scan.read(catalog.DLQ):
            hop = find_header(record.headers, headers.HOP) or ""
            stage = find_header(record.headers, headers.DEAD_LETTER_STAGE) or ""
            if hop in self._hops and stage in NORMALISE_STAGES:
                code = find_header(record.headers, headers.DEAD_LETTER_CODE)
                edited = find_header(record.headers, headers.EDITED_FROM)
                what = "dead_lettered" if edited is None else "edited version"
                yield _build_step(record, 2, what, stage=stage, reason=code, hop=hop, of=edited)
        reviews = self._scan.build_decoder("review", Review)
        for record in self._scan.read(catalog.REVIEWS):
            if record.value is not None and (review := reviews.decode(record.value)).hop in self._hops:
                yield _build_step(
                    record, 2, "in_review", reason=review.reason, event_id=review.event_id, hop=review.hop
                )

    def _find_deliveries(self) -> Iterator[Step]:
        decoder = self._scan.build_decoder("delivery_outcome", DeliveryOutcome)
        for record in self._scan.read(catalog.DELIVERIES):
            outcome = decoder.decode(record.value or b"")
            if outcome.event_id in self._events:
                yield _build_step(
                    record,
                    3,
                    f"{outcome.outcome} at {outcome.target}",
                    code=outcome.code,
                    attempt=outcome.attempt,
                    control_id=outcome.control_id,
                    reference=outcome.reference,
                    event_id=outcome.event_id,
                )


def _build_step(record: Record, rank: int, what: str, **facts: object) -> Step:
    moment = dt.datetime.fromtimestamp(record.timestamp / 1000, dt.UTC).isoformat(timespec="milliseconds")
    place = f"{record.topic}[{record.partition}]@{record.offset}"
    return {
        "time": moment.replace("+00:00", "Z"),
        "what": what,
        "at": place,
        **{name: fact for name, fact in facts.items() if fact not in (None, "")},
        "rank": rank,
    }

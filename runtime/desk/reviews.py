"""Reviews: what a stream may not decide by itself, and the ways in which a person ends one.

A decision ends the review and writes the raw record's new fate in the same transaction, so the account stays balanced:

* ``keep``: the copy that came first stands; this one is suppressed.
* ``retry``: the raw record is published again as a new hop; for a parent that came at last, or a patient who is clear
  now.
* ``patient``: as ``retry``, for the patient the person names. Only the keyed hash of the identifier travels; the MRN
  comes from the projection, so a patient nobody knows yet is waited for.
* ``dismiss``: the money is not passed on to anybody; a second person approves.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.account import TopicScan
from runtime.desk import office
from runtime.desk.letters import write_time
from runtime.desk.office import ActRefused, NothingFound, Office
from schemas.events import Disposition, Fate, Review
from schemas.wire import Encoder
from topics import catalog, headers
from topics.reading import Record, read_to_end
from topics.transaction import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.events import Reference
    from topics.audit import Act, Actor

CONFLICTING_COPY = "CONFLICTING_COPY"
KEEP = "keep"
RETRY = "retry"
PATIENT = "patient"
_LINKED = {KEEP: "KEPT_FIRST", RETRY: "REVIEW_RETRIED", PATIENT: "PATIENT_NAMED"}


@dataclass(frozen=True, slots=True)
class Question:
    """One open review. ``key`` is its key in `reviews`, by which commands name it."""

    key: str
    partition: int
    review: Review

    def describe(self) -> dict[str, Any]:
        """Codes and ids; a review holds no payload."""
        review = self.review
        return {
            "review": self.key,
            "reason": review.reason,
            "since": write_time(review.created_at),
            "source": review.source,
            "facility": review.facility,
            "kind": review.event_type,
            "root": review.root,
            "transaction_key": review.transaction_key,
            "hop": review.hop,
            "ways": self.list_ways(),
        }

    def list_ways(self) -> list[str]:
        """How it may be ended."""
        if self.review.reason == CONFLICTING_COPY:
            return [KEEP]
        if self.review.reason == "PARENT_NEVER_CAME":
            return [RETRY, "dismiss"]
        return [PATIENT, RETRY, "dismiss"]


def read_questions(office_: Office, *, reason: str = "", facility: str = "") -> list[Question]:
    """Every open review, oldest first."""
    scan = TopicScan(office_.settings)
    decoder = scan.build_decoder("review", Review)
    latest: dict[str, Record] = {}
    for record in scan.read(catalog.REVIEWS):
        key = (record.key or b"").decode()
        if record.value is None:
            latest.pop(key, None)
        else:
            latest[key] = record
    found = [Question(key, record.partition, decoder.decode(record.value or b"")) for key, record in latest.items()]
    chosen = [
        question
        for question in found
        if reason in ("", question.review.reason) and facility in ("", question.review.facility)
    ]
    return sorted(chosen, key=lambda question: (question.review.created_at, question.key))


def find_question(office_: Office, key: str) -> Question:
    """One open review. Raises ``NothingFound``."""
    for question in read_questions(office_):
        if question.key == key:
            return question
    raise NothingFound("there is no such open review.", place=key)


def decide(office_: Office, key: str, way: str, actor: Actor, *, patient: Reference | None = None) -> dict[str, Any]:
    """End a review by ``keep``, ``retry`` or ``patient``."""
    last_act = office_.find_last_act()
    question = find_question(office_, key)
    if way not in question.list_ways() or way not in _LINKED:
        raise ActRefused(
            f"a review {question.review.reason} is not ended by {way!r}, but by: {', '.join(question.list_ways())}.",
            place=key,
        )
    with office_.open_log(actor, seen=last_act) as log:
        outputs = [*_end(office_, question, Fate.SUPPRESSED, _LINKED[way])]
        if way != KEEP:
            outputs.append(_republish(office_, question, patient))
        facts = {"reason": question.review.reason, "way": way, "hop": question.review.hop}
        act = log.append(office.DECIDE_REVIEW, [key], facts, outputs)
    return {"act": act.number, "review": key, "way": way}


def propose_dismissal(office_: Office, keys: Sequence[str], actor: Actor) -> dict[str, Any]:
    """Ask that money under review is passed on to nobody; a second person approves."""
    questions = [find_question(office_, key) for key in keys]
    for question in questions:
        if "dismiss" not in question.list_ways():
            raise ActRefused(f"a review {question.review.reason} is not dismissed.", place=question.key)
    facts = {"reasons": ",".join(sorted({question.review.reason for question in questions}))}
    with office_.open_log(actor) as log:
        act = log.append(office.PROPOSE_DISMISSAL, list(keys), facts)
    return {"proposal": act.number, "reviews": list(keys), "needs": "a second person"}


def approve(office_: Office, proposal: Act, actor: Actor) -> dict[str, Any]:
    """Dismiss what was proposed. The caller has checked that this is a second person."""
    last_act = office_.find_last_act()
    questions = [find_question(office_, key) for key in proposal.ids]
    with office_.open_log(actor, seen=last_act) as log:
        outputs = [output for question in questions for output in _end(office_, question, Fate.IGNORED, "DISMISSED")]
        facts = {"proposal": str(proposal.number), "of": proposal.act, "proposed_by": proposal.by}
        act = log.append(office.APPROVE, proposal.ids, facts, outputs)
    return {"act": act.number, "reviews": list(proposal.ids), "done": proposal.act}


def _end(office_: Office, question: Question, fate: Fate, reason: str) -> list[Output]:
    """The review's tombstone, and the fate that its raw record has instead."""
    review = question.review
    disposition = Disposition(
        hop=review.hop,
        fate=fate.value,
        reason=reason,
        source=review.source,
        facility=review.facility,
        event_type=review.event_type,
        linked=review.event_id,
        decided_at=time.time_ns() // 1_000_000,
    )
    encoder = Encoder("disposition", office_.find_schema_id(catalog.DISPOSITIONS, "disposition"))
    return [
        Output(catalog.REVIEWS, question.key.encode(), None, partition=question.partition),
        Output(catalog.DISPOSITIONS, review.hop.encode(), encoder.encode(disposition)),
    ]


def _republish(office_: Office, question: Question, patient: Reference | None) -> Output:
    record = _find_raw(office_, question)
    named = headers.find_header(record.headers, headers.NAMED_PATIENT)
    if patient is not None:
        named = office_.key.hash_identifier(patient)
    ours = (headers.ORIGIN, headers.REVIEWED_HOP, headers.NAMED_PATIENT)
    origin = headers.find_header(record.headers, headers.ORIGIN) or question.review.hop
    return Output(
        record.topic,
        record.key or b"",
        record.value,
        [
            (headers.ORIGIN, origin.encode()),
            *[(name, text) for name, text in record.headers if name not in ours],
            *([(headers.NAMED_PATIENT, named.encode())] if named else []),
            (headers.REVIEWED_HOP, question.review.hop.encode()),
        ],
    )


def _find_raw(office_: Office, question: Question) -> Record:
    """The raw record under review. Raw topics keep 30 days; a review that is older can only be dismissed."""
    topic = catalog.name_raw(question.review.source)
    topic_id, partition, offset = question.review.hop.rsplit(":", 2)
    if TopicScan(office_.settings).find_id(topic) == topic_id:
        kafka = office_.settings.kafka
        wanted = int(offset)
        for item in read_to_end(kafka, topic, offsets={int(partition): wanted}, partitions=[int(partition)]):
            if isinstance(item, Record) and item.offset == wanted:
                return item
    raise ActRefused("its raw record is no longer kept.", place=question.key)

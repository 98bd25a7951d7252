"""Reviews: what a stream may not decide by itself, and the ways in which a person ends one.

A decision ends the review and writes the raw record's new fate in the same transaction, so the account stays balanced:

* ``keep``: the copy that came first stands; this one is suppressed.
* ``accept``: the copy that came first came to nothing (dismissed, dead-lettered), and this one is published in its
  place; a second person approves. One that was published is never doubled: the fact is in the canonical topics once.
* ``retry``: the raw record is published again as a new hop; for a parent that came at last, or a patient who is clear
  now.
* ``patient``: as ``retry``, for the patient the person names. Only the keyed hash of the identifier travels; the MRN
  comes from the projection, so a patient nobody knows yet is waited for.
* ``dismiss``: the money is not passed on to anybody; a second person approves. A copy only where none stands.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from runtime.account import TopicScan
from runtime.desk import office
from runtime.desk.copies import NOWHERE, Standing, describe_copies, find_standing
from runtime.desk.letters import write_time
from runtime.desk.office import ActRefused, NothingFound, Office
from schemas.events import Disposition, Fate, Review
from schemas.wire import Encoder
from topics import catalog, headers
from topics.reading import Record, keep_latest, read_to_end
from topics.transaction import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.events import Reference
    from topics.audit import Act, Actor

CONFLICTING_COPY = "CONFLICTING_COPY"
KEEP = "keep"
RETRY = "retry"
PATIENT = "patient"
ACCEPT = "accept"
DISMISS = "dismiss"
_LINKED = {KEEP: "KEPT_FIRST", RETRY: "REVIEW_RETRIED", PATIENT: "PATIENT_NAMED"}
_ACCEPTED = "COPY_ACCEPTED"
_RESENT = frozenset({_LINKED[RETRY], _LINKED[PATIENT], _ACCEPTED})
_PROPOSED = {ACCEPT: office.PROPOSE_ACCEPTANCE, DISMISS: office.PROPOSE_DISMISSAL}


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
            return [KEEP, ACCEPT, DISMISS]
        if self.review.reason == "PARENT_NEVER_CAME":
            return [RETRY, DISMISS]
        return [PATIENT, RETRY, DISMISS]


def read_questions(office_: Office, *, reason: str = "", facility: str = "") -> list[Question]:
    """Every open review, oldest first."""
    scan = TopicScan(office_.settings)
    decoder = scan.build_decoder("review", Review)
    found = [
        Question(key.decode(), record.partition, decoder.decode(record.value or b""))
        for key, record in keep_latest(scan.read(catalog.REVIEWS)).items()
    ]
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
    _check_copy(office_, question, way)
    with office_.open_log(actor, seen=last_act) as log:
        outputs = [*_end(office_, question, Fate.SUPPRESSED, _LINKED[way])]
        if way != KEEP:
            outputs.append(_republish(office_, question, patient))
        facts = {"reason": question.review.reason, "way": way, "hop": question.review.hop}
        act = log.append(office.DECIDE_REVIEW, [key], facts, outputs)
    return {"act": act.number, "review": key, "way": way}


def show(office_: Office, key: str) -> dict[str, Any]:
    """One open review; of a copy also what it and the published one say about the money, side by side."""
    question = find_question(office_, key)
    if question.review.reason != CONFLICTING_COPY:
        return question.describe()
    standing = _find_standing(office_, question)
    copies = describe_copies(office_, question.review, standing, _find_raw(office_, question))
    return question.describe() | {"copies": copies}


def propose(office_: Office, keys: Sequence[str], way: str, actor: Actor) -> dict[str, Any]:
    """Ask that money under review is passed on to nobody, or a copy accepted; a second person approves."""
    questions = [find_question(office_, key) for key in keys]
    for question in questions:
        if way not in question.list_ways():
            raise ActRefused(f"a review {question.review.reason} is not ended by {way!r}.", place=question.key)
        _check_copy(office_, question, way)
    facts = {"reasons": ",".join(sorted({question.review.reason for question in questions}))}
    with office_.open_log(actor) as log:
        act = log.append(_PROPOSED[way], list(keys), facts)
    return {"proposal": act.number, "reviews": list(keys), "needs": "a second person"}


def approve(office_: Office, proposal: Act, actor: Actor) -> dict[str, Any]:
    """Do what was proposed. The caller has checked that this is a second person."""
    last_act = office_.find_last_act()
    questions = [find_question(office_, key) for key in proposal.ids]
    way = ACCEPT if proposal.act == office.PROPOSE_ACCEPTANCE else DISMISS
    fate, reason = (Fate.SUPPRESSED, _ACCEPTED) if way == ACCEPT else (Fate.IGNORED, "DISMISSED")
    for question in questions:
        _check_copy(office_, question, way)
    with office_.open_log(actor, seen=last_act) as log:
        outputs = [output for question in questions for output in _end(office_, question, fate, reason)]
        if way == ACCEPT:
            outputs += [_republish(office_, question, None) for question in questions]
        facts = {"proposal": str(proposal.number), "of": proposal.act, "proposed_by": proposal.by}
        act = log.append(office.APPROVE, proposal.ids, facts, outputs)
    return {"act": act.number, "reviews": list(proposal.ids), "done": proposal.act}


def _check_copy(office_: Office, question: Question, way: str) -> None:
    """A copy is kept out where another stands, and takes its place or is dismissed only where none does."""
    if question.review.reason != CONFLICTING_COPY:
        return
    state = _find_standing(office_, question).state
    if way == KEEP and state == NOWHERE:
        raise ActRefused(
            "no other copy of this money stands: it would be passed on to nobody.",
            place=question.key,
            remedy="Propose `accept` or `dismiss`; a second person approves.",
        )
    if way != KEEP and state != NOWHERE:
        raise ActRefused(
            f"another copy stands ({state}), and a money fact is published once.",
            place=question.key,
            remedy="Use `keep`. Where the first copy is wrong, correct it in the systems that own the money, or with "
            "`remitstream dlq edit` at a target that refused it.",
        )


def _find_standing(office_: Office, question: Question) -> Standing:
    def read_reviewed() -> set[str]:
        return {other.review.event_id for other in read_questions(office_) if other.review.reason != CONFLICTING_COPY}

    return find_standing(office_, question.review, read_reviewed, _RESENT)


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
    if record is None:
        raise ActRefused("its raw record is no longer kept.", place=question.key)
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


def _find_raw(office_: Office, question: Question) -> Record | None:
    """The raw record under review. Raw topics keep 30 days; a review that is older can only be dismissed."""
    topic = catalog.name_raw(question.review.source)
    topic_id, partition, offset = question.review.hop.rsplit(":", 2)
    if TopicScan(office_.settings).find_id(topic) == topic_id:
        kafka = office_.settings.kafka
        wanted = int(offset)
        for item in read_to_end(kafka, topic, offsets={int(partition): wanted}, partitions=[int(partition)]):
            if isinstance(item, Record) and item.offset == wanted:
                return item
    return None

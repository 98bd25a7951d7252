"""What people decided about events at a target, put into the ledger.

A decision names the attempt it is about, and is used up in the transaction that acts on it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.events import Action, Outcome
from schemas.failure import FailureKind
from sinks.attempts import BY_PERSON, NEVER, Attempt, Ruling, Source, State

if TYPE_CHECKING:
    from schemas.events import Decision, MoneyEvent
    from sinks.ledger import Ledger
    from sinks.policy import Moment


def find_decided(ledger: Ledger, decision: Decision) -> Attempt | None:
    """The event a decision is about; None when it is finished, or at another attempt than the one named."""
    attempt = ledger.queues.peek(decision.event_id)
    if attempt is None or attempt.state is State.DONE:
        return None
    named = (decision.topic, decision.offset, decision.attempt, decision.round)
    if named != (ledger.topic, attempt.offset, attempt.number, attempt.round):
        return None
    return ledger.queues.find(decision.event_id)


def rule(ledger: Ledger, attempt: Attempt, decision: Decision, moment: Moment) -> Ruling:
    """Whether a decision about this attempt may be acted on now.

    A person may have looked before the deadline of the write, and the write have landed after: the time of the
    decision counts, not only that of acting on it.
    """
    if attempt.calling:
        return Ruling.CALL_UNDER_WAY
    if decision.action == Action.REDRIVE:
        return Ruling.APPLIED if attempt.state is State.REJECTED else Ruling.NOT_REJECTED
    if decision.action == Action.WAIVE:
        is_free = attempt.state is State.REJECTED or (attempt.is_put_off and not attempt.may_have_landed)
        return Ruling.APPLIED if is_free else Ruling.NOT_WAIVABLE
    if decision.action not in (Action.POSTED, Action.NOT_POSTED):
        return Ruling.ACTION_UNKNOWN
    if not attempt.waits_for_person:
        return Ruling.NOT_UNKNOWN
    if decision.decided_at < attempt.decidable_at + ledger.policy.clock_error * 1000:
        return Ruling.TOO_EARLY
    return Ruling.APPLIED if moment.steady >= attempt.settled_at else Ruling.WAIT


def refuse_decision(ledger: Ledger, attempt: Attempt, decision: Decision, ruling: Ruling) -> None:
    """The decision is used up without effect; the entry says why."""
    _take_decision(attempt, decision, ruling)
    ledger.touch(attempt)


def end_by_person(ledger: Ledger, attempt: Attempt, decision: Decision, outcome: Outcome) -> None:
    """A person ends the event: POSTED, WAIVED, or NOT_ROUTED when an edit sends it nowhere."""
    _take_decision(attempt, decision, Ruling.APPLIED)
    attempt.state = State.DONE
    attempt.failure, attempt.code = "", BY_PERSON
    attempt.may_have_landed = False
    attempt.due = NEVER
    ledger.report(attempt, outcome, reference=decision.reference)
    ledger.queues.leave(attempt)


def send_again(ledger: Ledger, attempt: Attempt, decision: Decision, moment: Moment) -> None:
    """A person says that nothing landed: the same bytes go out as a first write."""
    _take_decision(attempt, decision, Ruling.APPLIED)
    attempt.may_have_landed = False
    attempt.first_write_at = attempt.tries = 0
    ledger.retry(attempt, FailureKind.AMBIGUOUS, BY_PERSON, moment, pause=0)


def begin_again(
    ledger: Ledger, attempt: Attempt, decision: Decision, source: Source, event: MoneyEvent | None, moment: Moment
) -> None:
    """A person redrives a refused event: a new request is built, with the mapping and settings of now."""
    _take_decision(attempt, decision, Ruling.APPLIED)
    attempt.source, attempt.event = source, event
    attempt.request = None
    attempt.frozen_at = attempt.first_write_at = attempt.tries = 0
    if ledger.queues.is_first(attempt):
        attempt.state = State.PENDING
        attempt.failure = attempt.code = ""
        ledger.touch(attempt)
        ledger.queues.advance(attempt.entity)
    else:
        ledger.park_behind(attempt, moment)


def _take_decision(attempt: Attempt, decision: Decision, ruling: Ruling) -> None:
    attempt.round += 1
    attempt.decision, attempt.ruling = decision.decision_id, ruling.value

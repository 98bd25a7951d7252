"""The attempt ledger of a target: what was tried for each event, what may have landed, what comes next.

Pure: no I/O, no clock (``Moment`` is passed in), no Kafka. One ``Ledger`` holds one partition of one canonical topic.
Its truth is the compacted topic ``attempts.<target>``; ``flush`` gives the records and the frontier of the next
transaction, ``confirm`` says that it has committed. Decisions wait in memory until then, and a call starts only after
the commit that made its entry IN_FLIGHT durable.

The rules, each of which answers a way to lose or to double a posting:

* The frontier moves over finished and parked work only; a DONE entry is tombstoned in the transaction that moves the
  frontier past it, not before. REJECTED, PARKED and UNKNOWN stay. Below the frontier, no entry means DONE.
* IN_FLIGHT with its request is durable before the call. After a crash it is UNKNOWN: the write may have happened.
* Nothing is resent, and no later event of the entity starts, before the call deadline of every earlier write of the
  event has passed; after a take-over also the session timeout: the late first write may still land.
* Class A resends the same bytes while its key's window, less the margins, is open, and looks again just before the
  write. Class B resends. Class C, and A outside the window where the target can be asked, looks up: found is DONE,
  only what is surely absent is posted, unclear is asked again. For D, and A without a look-up, a person decides.
* A rejected resend after a write that may have landed is UNKNOWN: the first write may have been the one that counts.
* Behind an event that is REJECTED, UNKNOWN or PARKED, later events of its entity are PARKED in order.
"""

from __future__ import annotations

import itertools
from typing import TYPE_CHECKING

from schemas.events import Outcome
from schemas.failure import FailureKind
from sinks.attempts import (
    BEHIND_ENTITY,
    NEVER,
    Attempt,
    Entry,
    Failed,
    Flush,
    Report,
    Source,
    State,
    build_entry,
    encode_entry,
    restore_attempt,
)
from sinks.contract import Absent, Answer, Finding, Found, Request, TargetClass, Unclear
from sinks.policy import Moment, Policy, Step
from sinks.queues import Queues

if TYPE_CHECKING:
    from schemas.events import MoneyEvent

RESEND_REJECTED = "RESEND_REJECTED"
"""Unknown: a resend was refused although the first write may have been applied."""
WINDOW_OVER = "WINDOW_OVER"
"""Unknown: the target may have forgotten the idempotency key."""

SEEN_ABSENT = "SEEN_ABSENT"
"""To be posted: the target was asked and does not have it."""
SEEN_THERE = "SEEN_THERE"
"""Posted: the target was asked and has it."""

_REFUSALS = frozenset({FailureKind.REJECTED, FailureKind.INVALID, FailureKind.UNMAPPED})
_DOUBTS = frozenset({FailureKind.AMBIGUOUS, FailureKind.INTERNAL})
_ABOUT_TARGET = frozenset({FailureKind.AUTH, FailureKind.RATE_LIMITED})


class Ledger:
    """Attempts of one partition of one canonical topic, strictly in order per entity.

    ``position`` is the next offset to read. Restore the changelog's entries first, then call ``open`` with the
    frontier.
    """

    def __init__(self, topic: str, policy: Policy) -> None:
        self.topic = topic
        self.policy = policy
        self.position = 0
        self.frontier = 0
        self.queues = Queues(topic)
        self._dirty: dict[str, Attempt] = {}
        self._reports: list[Report] = []

    # Taking over.

    def restore(self, event_id: str, entry: Entry) -> None:
        """Take an entry of the changelog (the last one of its key)."""
        self.forget(event_id)
        self.queues.restore(restore_attempt(event_id, entry))

    def forget(self, event_id: str) -> None:
        """Take a tombstone of the changelog."""
        self.queues.drop(event_id)

    def open(self, frontier: int, moment: Moment) -> None:
        """Begin at the frontier: what was IN_FLIGHT is now UNKNOWN, and nothing of it starts before its writes end."""
        self.position = self.frontier = frontier
        quiet = moment.steady + self.policy.call_deadline + self.policy.session_timeout
        for attempt in self.queues.open(moment, quiet, self.policy.longest_pause):
            if attempt.state is State.DONE:
                if attempt.offset < frontier:
                    # Finished, and the frontier is past it: only its tombstone is missing.
                    self.touch(attempt)
                continue
            if attempt.may_have_landed or attempt.state in (State.IN_FLIGHT, State.UNKNOWN):
                attempt.settled_at = quiet
            if attempt.state is State.UNKNOWN and not attempt.decidable_at:
                attempt.decidable_at = moment.after(quiet - moment.steady).wall
                self.touch(attempt)
            self.queues.insert(attempt)
        for entity in self.queues.list_waiting():
            for attempt in self.queues.list_of(entity):
                if attempt.state is State.IN_FLIGHT:
                    attempt.may_have_landed = True
                    self._doubt(attempt, attempt.code or "PROCESS_ENDED", moment)
                elif attempt.state is State.RETRY_AT or attempt.is_put_off:
                    attempt.due = moment.count_wait(attempt.retry_at, self.policy.longest_pause)
            self.queues.advance(entity)

    # New events.

    def admit(
        self, event_id: str, offset: int, entity: str, source: Source, event: MoneyEvent | None, moment: Moment
    ) -> Attempt | None:
        """Take a record of the topic in its order. None when there is nothing to do for it (known already).

        Offsets below ``position`` are copies after a rewind.
        """
        if offset < self.position:
            return None
        self.position = offset + 1
        if self.queues.meet_again(event_id, offset, event):
            return None
        attempt = Attempt(event_id, offset, entity, source, event)
        attempt.since = moment.wall
        self.queues.add(attempt)
        return attempt

    def line_up(self, attempt: Attempt, moment: Moment) -> None:
        """Put an admitted event in the queue of its entity; it is parked when something stopped before it."""
        is_behind_stopped = self.queues.insert(attempt)
        # Behind a stopped event everything is stopped, so one look is enough.
        if is_behind_stopped is None:
            self.queues.advance(attempt.entity)
        elif attempt.state is State.PENDING and is_behind_stopped:
            self.park_behind(attempt, moment)

    def skip(self, attempt: Attempt) -> None:
        """The event is not posted at this instance (``not_routed``); it waits for nothing."""
        attempt.state = State.DONE
        attempt.code = "NOT_ROUTED"
        self.report(attempt, Outcome.NOT_ROUTED)

    # Work.

    def take(self, room: int, moment: Moment) -> list[Attempt]:
        """Up to ``room`` events whose next step may begin now: to be frozen, started again, or resent."""
        return self.queues.take(room, moment)

    def give_back(self, attempt: Attempt) -> None:
        """An event that was taken cannot begin just now (no room, identity not available)."""
        self.queues.give_back(attempt)

    def start(self, attempt: Attempt, request: Request, moment: Moment) -> None:
        """IN_FLIGHT with its frozen request; the call may begin once this is durable."""
        if attempt.request is None:
            attempt.request = request
            attempt.frozen_at = moment.wall
        attempt.is_first_write = not attempt.first_write_at
        if attempt.is_first_write:
            attempt.first_write_at = moment.wall
        attempt.state = State.IN_FLIGHT
        attempt.failure = attempt.code = ""
        attempt.retry_at = 0
        attempt.due = NEVER
        attempt.number += 1
        attempt.calling = True
        attempt.written = False
        self.touch(attempt)

    def resume(self, attempt: Attempt, moment: Moment) -> Step:
        """Begin the next step of a request that may have landed; PERSON when nothing is begun any more."""
        step = self.policy.choose_step(attempt.first_write_at, moment)
        if step is Step.PERSON:
            self._stop_unknown(attempt, FailureKind.AMBIGUOUS, self._name_doubt(attempt.code), moment)
            return step
        attempt.due = NEVER
        attempt.calling = True
        attempt.written = False
        attempt.asks = step is Step.LOOK_UP
        if step is Step.RESEND:
            attempt.number += 1
            attempt.is_first_write = False
        return step

    def may_ask(self, attempt: Attempt, moment: Moment) -> bool:
        """The last look before a look-up leaves: no write of the event can still land."""
        return attempt.calling and attempt.asks and moment.steady >= attempt.settled_at

    def may_write(self, attempt: Attempt, moment: Moment) -> bool:
        """The last look before the socket write; True notes the write.

        A call may look again: HTTP does between head and body, and before it repeats a request that was answered 401.
        """
        if not attempt.calling or attempt.asks or (not attempt.written and moment.steady < attempt.settled_at):
            return False
        if attempt.may_have_landed and not self.policy.may_resend(attempt.first_write_at, moment):
            return False
        attempt.written = True
        attempt.settled_at = moment.steady + self.policy.call_deadline
        return True

    # Outcomes.

    def settle(self, attempt: Attempt, result: Answer | Failed, moment: Moment) -> None:
        """Take what a call brought."""
        attempt.calling = False
        kind = result.kind
        if isinstance(result, Answer) and kind is not FailureKind.AMBIGUOUS:
            # The write was answered: it is over.
            attempt.settled_at = 0.0
        elif kind not in _DOUBTS and not attempt.may_have_landed:
            # No write of this event can still land: what this call wrote was answered (401, then no newer token), or
            # it was given up between two looks.
            attempt.settled_at = 0.0
        if isinstance(result, Answer) and kind in (None, FailureKind.DUPLICATE):
            self._finish(attempt, result)
            return
        if kind in _DOUBTS and (attempt.may_have_landed or attempt.written):
            attempt.may_have_landed = True
            self._doubt(attempt, result.code, moment, pause=self.policy.choose_pause(attempt.tries))
            attempt.tries += 1
            return
        if attempt.may_have_landed:
            self._settle_resend(attempt, result, moment)
        else:
            self._settle_unapplied(attempt, result, moment)

    def settle_look_up(self, attempt: Attempt, result: Finding | Answer | Failed, moment: Moment) -> None:
        """Take what a look-up brought. An ``Answer`` or ``Failed`` says only that it could not be asked."""
        attempt.calling = attempt.asks = False
        if isinstance(result, Found):
            self._finish(attempt, Answer(None, SEEN_THERE, result.reference))
        elif isinstance(result, Absent):
            # As if never written: a new first write, with a window of its own.
            attempt.may_have_landed = False
            attempt.first_write_at = 0
            attempt.settled_at = 0.0
            self.retry(attempt, FailureKind.AMBIGUOUS, SEEN_ABSENT, moment, pause=0)
        elif isinstance(result, Unclear):
            attempt.tries += 1
            if attempt.tries >= self.policy.ask_person_after:
                self._stop_unknown(attempt, FailureKind.AMBIGUOUS, result.code, moment)
            else:
                self._doubt(attempt, result.code, moment, pause=self.policy.choose_pause(attempt.tries))
        else:
            self._doubt(attempt, attempt.code, moment, pause=self.policy.retry_first)

    def _settle_resend(self, attempt: Attempt, result: Answer | Failed, moment: Moment) -> None:
        """This call was not applied; an earlier one may have been."""
        if isinstance(result.kind, FailureKind) and result.kind in _REFUSALS:
            self._stop_unknown(attempt, result.kind, RESEND_REJECTED, moment)
            return
        if isinstance(result, Answer) and not result.is_outage and result.kind not in _ABOUT_TARGET:
            attempt.tries += 1
            self._doubt(attempt, attempt.code, moment, pause=self.policy.choose_pause(attempt.tries))
            return
        # Withdrawn, or about the target as a whole, which holds all calls back: no try of this event.
        self._doubt(attempt, attempt.code, moment)

    def _settle_unapplied(self, attempt: Attempt, result: Answer | Failed, moment: Moment) -> None:
        """Nothing of this event can be at the target."""
        kind = result.kind
        if isinstance(kind, FailureKind) and kind in _REFUSALS:
            # Without an answer the client itself refused to send it: it was built wrong.
            outcome = Outcome.REJECTED if isinstance(result, Answer) else Outcome.DEAD_LETTERED
            self.reject(attempt, kind, result.code, moment, outcome=outcome)
        elif isinstance(result, Answer) and kind is FailureKind.UNAVAILABLE and not result.is_outage:
            attempt.tries += 1
            pause = self.policy.choose_pause(attempt.tries)
            if attempt.tries >= self.policy.park_after:
                self.park(attempt, kind, result.code, moment, pause=pause)
            else:
                self.retry(attempt, kind, result.code, moment, pause=pause)
        else:
            # Withdrawn, or the target as a whole cannot be reached: the runner holds all calls back, so this one need
            # not wait for itself.
            self.retry(attempt, kind or "", result.code, moment, pause=0)

    def reject(
        self,
        attempt: Attempt,
        kind: FailureKind,
        code: str,
        moment: Moment,
        *,
        field: str = "",
        outcome: Outcome = Outcome.REJECTED,
    ) -> None:
        """Refused for good, or impossible to build (``outcome`` DEAD_LETTERED): dead letter, and the entity stops."""
        attempt.state = State.REJECTED
        attempt.failure, attempt.code = kind.value, code
        attempt.due = NEVER
        self.report(attempt, outcome, field=field, dead_letter=True)
        self._stop_entity(attempt, moment)

    def refuse(self, attempt: Attempt, code: str, moment: Moment) -> bool:
        """The broker does not take a record about this event for what it is: a dead letter, made small step by step.

        First without the request, which was not sent: its call begins only after the commit that did not happen. Then
        without the event itself; the hop in the dead letter says where it is. False when nothing may be left out: the
        request may have landed, or all of it is out already.
        """
        if attempt.may_have_landed or attempt.written or attempt.state is State.DONE:
            return False
        if attempt.state is State.REJECTED and attempt.request is None:
            if not attempt.source.value:
                return False
            attempt.source = Source(attempt.source.key, b"")
            self.touch(attempt)
            return True
        if attempt.calling:
            attempt.calling = False
            attempt.number -= 1
        attempt.request = None
        attempt.first_write_at = attempt.frozen_at = 0
        self.reject(attempt, FailureKind.INVALID, code, moment, outcome=Outcome.DEAD_LETTERED)
        return True

    def park(self, attempt: Attempt, kind: FailureKind | None, code: str, moment: Moment, *, pause: float) -> None:
        """Set aside and try again after ``pause`` seconds; later events of the entity are parked behind it.

        An event parked already for the same reason is only put off.
        """
        put_off = attempt.state is State.PARKED and attempt.code == code
        attempt.state = State.PARKED
        attempt.failure, attempt.code = kind.value if kind else "", code
        attempt.retry_at = moment.wall + int(pause * 1000)
        self.queues.schedule(attempt, moment.steady + pause)
        if put_off:
            if attempt.event_id not in self._dirty:
                self.queues.put_away(attempt)
            return
        self.touch(attempt)
        if attempt.outcome != Outcome.PARKED:
            self.report(attempt, Outcome.PARKED)
        self._stop_entity(attempt, moment)

    # Transactions.

    def flush(self) -> Flush:
        """What the next transaction must hold. Changes nothing: after an abort it is simply asked for again."""
        passed = 0
        frontier = self.position
        line = self.queues.line.values()
        for attempt in line:
            if attempt is not None and not attempt.is_passable:
                frontier = attempt.offset
                break
            passed += 1
        changed = dict(self._dirty)
        for attempt in itertools.islice(line, passed):
            if attempt is not None and attempt.state is State.DONE:
                changed[attempt.event_id] = attempt
        records: list[tuple[str, bytes | None]] = []
        for event_id, attempt in changed.items():
            if attempt.state is State.DONE and attempt.offset < frontier:
                if attempt.recorded:
                    records.append((event_id, None))
            else:
                records.append((event_id, encode_entry(build_entry(attempt, self.topic))))
        return Flush(records, list(self._reports), frontier, passed, list(changed.values()))

    @property
    def has_changes(self) -> bool:
        """Whether a transaction would write an entry or a report."""
        return bool(self._dirty or self._reports)

    def confirm(self, flush: Flush) -> None:
        """The transaction with this content has committed."""
        self.frontier = flush.frontier
        for _ in range(flush.passed):
            self.queues.line.popitem(last=False)
        for attempt in flush.dirty:
            attempt.recorded = True
            self._dirty.pop(attempt.event_id, None)
            if attempt.state is State.DONE and attempt.offset < flush.frontier:
                self.queues.drop(attempt.event_id)
            else:
                self.queues.put_away(attempt)
        del self._reports[: len(flush.reports)]

    # Inside.

    def _finish(self, attempt: Attempt, answer: Answer) -> None:
        attempt.state = State.DONE
        attempt.failure = answer.kind.value if answer.kind else ""
        attempt.code = answer.code
        attempt.may_have_landed = False
        self.report(attempt, Outcome.POSTED, reference=answer.reference)
        self.queues.leave(attempt)

    def retry(self, attempt: Attempt, kind: FailureKind | str, code: str, moment: Moment, *, pause: float) -> None:
        """Surely not applied: begin it again after ``pause`` seconds."""
        attempt.state = State.RETRY_AT
        attempt.failure, attempt.code = str(kind), code
        attempt.retry_at = moment.wall + int(pause * 1000)
        if attempt.is_first_write and not attempt.written:
            # Nothing ever left, so the key's window has not begun.
            attempt.first_write_at = 0
        self.touch(attempt)
        self.queues.schedule(attempt, moment.steady + pause)

    def _doubt(self, attempt: Attempt, code: str, moment: Moment, *, pause: float = 0.0) -> None:
        """The request may have landed: its next step comes once every earlier write is over."""
        due = max(attempt.settled_at, moment.steady + pause)
        step = self.policy.choose_step(attempt.first_write_at, moment.after(due - moment.steady))
        if step is Step.PERSON:
            self._stop_unknown(attempt, FailureKind.AMBIGUOUS, self._name_doubt(code), moment)
            return
        if step is Step.LOOK_UP:
            due = max(due, max(attempt.settled_at, moment.steady) + self.policy.visible_after)
        if attempt.tries >= self.policy.park_after:
            self.park(attempt, FailureKind.AMBIGUOUS, code, moment, pause=due - moment.steady)
            return
        attempt.state = State.UNKNOWN
        attempt.failure, attempt.code = FailureKind.AMBIGUOUS.value, code
        # The changelog still says IN_FLIGHT, which means the same after a restart.
        self.queues.schedule(attempt, due)

    def _name_doubt(self, code: str) -> str:
        """Why a person must decide: what was seen, unless only the key's window is in the way."""
        return WINDOW_OVER if self.policy.target_class is TargetClass.A else code

    def _stop_unknown(self, attempt: Attempt, kind: FailureKind, code: str, moment: Moment) -> None:
        attempt.state = State.UNKNOWN
        attempt.failure, attempt.code = kind.value, code
        attempt.may_have_landed = True
        attempt.calling = False
        attempt.due = NEVER
        attempt.decidable_at = moment.after(max(0.0, attempt.settled_at - moment.steady)).wall
        self.report(attempt, Outcome.UNKNOWN)
        self._stop_entity(attempt, moment)

    def _stop_entity(self, attempt: Attempt, moment: Moment) -> None:
        for later in self.queues.list_later(attempt):
            if later.state is State.PENDING:
                self.park_behind(later, moment)

    def park_behind(self, attempt: Attempt, moment: Moment) -> None:
        """Set aside until the events of its entity that stopped before it are settled."""
        attempt.state = State.PARKED
        attempt.failure, attempt.code = "", BEHIND_ENTITY
        attempt.retry_at = moment.wall
        attempt.due = NEVER
        self.report(attempt, Outcome.PARKED)

    def touch(self, attempt: Attempt) -> None:
        """Its entry goes into the next transaction."""
        self._dirty[attempt.event_id] = attempt

    def report(
        self, attempt: Attempt, outcome: Outcome, *, reference: str = "", field: str = "", dead_letter: bool = False
    ) -> None:
        """Say with the next transaction what became of it."""
        self.touch(attempt)
        attempt.outcome = outcome.value
        request = attempt.request
        self._reports.append(
            Report(
                attempt,
                outcome,
                attempt.failure,
                attempt.code,
                attempt.number,
                request.control_id if request else "",
                reference or (request.reference if request else ""),
                field,
                dead_letter,
            )
        )

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
  write. Class B resends. Outside the window, and for C (which has no look-up here yet) and D, a person decides.
* A rejected resend after a write that may have landed is UNKNOWN: the first write may have been the one that counts.
* Behind an event that is REJECTED, UNKNOWN or PARKED, later events of its entity are PARKED in order.
"""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING, Literal

import msgspec

from schemas.events import MoneyEvent, Outcome
from schemas.failure import FailureKind
from sinks.contract import Answer, Request, TargetClass

if TYPE_CHECKING:
    from topics.headers import Headers

BEHIND_ENTITY = "BEHIND_ENTITY"
"""Parked: an earlier event of the entity is rejected, unknown or parked."""
RESEND_REJECTED = "RESEND_REJECTED"
"""Unknown: a resend was refused although the first write may have been applied."""
WINDOW_OVER = "WINDOW_OVER"
"""Unknown: the target may have forgotten the idempotency key."""

_REFUSALS = frozenset({FailureKind.REJECTED, FailureKind.INVALID, FailureKind.UNMAPPED})
_DOUBTS = frozenset({FailureKind.AMBIGUOUS, FailureKind.INTERNAL})
_NEVER = float("inf")


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


@dataclass(frozen=True, slots=True)
class Moment:
    """Now: ``steady`` seconds for waiting, ``wall`` milliseconds since the epoch for what outlives the process."""

    steady: float
    wall: int

    def count_wait(self, until_wall: int) -> float:
        """Steady time at which that wall time is reached."""
        return self.steady + max(0, until_wall - self.wall) / 1000


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How one target instance is treated. Times in seconds.

    ``window`` is how long the target remembers an idempotency key; None means that nobody knows.
    """

    target_class: TargetClass
    call_deadline: float
    session_timeout: float
    window: float | None = None
    clock_error: float = 5.0
    retry_first: float = 0.5
    retry_longest: float = 60.0
    park_after: int = 6
    """Refusals for now of one event, after which it is parked and no longer holds the frontier."""

    def may_resend(self, first_write_at: int, moment: Moment) -> bool:
        """Whether a request that may have landed is safe to send again at this moment."""
        if self.target_class is TargetClass.B:
            return True
        if self.target_class is not TargetClass.A or self.window is None or not first_write_at:
            return False
        margin = self.call_deadline + self.session_timeout + self.clock_error
        return moment.wall + margin * 1000 <= first_write_at + self.window * 1000

    def choose_pause(self, tries: int) -> float:
        """Exponential pause before the next try of one event, without jitter (only this event waits for it)."""
        return float(min(self.retry_longest, self.retry_first * 2 ** min(tries, 20)))


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
        "calling",
        "code",
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
        self.due = _NEVER
        """Steady time of the next step; infinite when there is none."""
        self.settled_at = 0.0
        """Steady time after which no earlier write of this event can still land."""
        self.written = False
        """Whether the running call has written."""
        self.is_first_write = False
        """Whether no call before the running one has written."""
        self.calling = False
        self.is_queued = False
        """Whether it stands in line to begin."""
        self.recorded = False
        """Whether the changelog holds an entry."""

    def __repr__(self) -> str:
        return f"Attempt({self.event_id}, {self.state}, offset {self.offset}, attempt {self.number})"

    @property
    def waits_for_person(self) -> bool:
        """UNKNOWN with nothing left that the machine may do."""
        return self.state is State.UNKNOWN and self.due == _NEVER and not self.calling

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

    ``WITHDRAWN`` calls were given up before the write and are no attempt.
    """

    kind: FailureKind | Literal["WITHDRAWN"]
    code: str


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
        self.attempts: dict[str, Attempt] = {}
        self._line: deque[Attempt] = deque()
        self._entities: dict[str, list[Attempt]] = {}
        self._ready: deque[Attempt] = deque()
        self._timers: list[tuple[float, int, Attempt]] = []
        self._numbers = itertools.count()
        self._dirty: dict[str, Attempt] = {}
        self._reports: list[Report] = []

    # Taking over.

    def restore(self, event_id: str, entry: Entry) -> None:
        """Take an entry of the changelog (the last one of its key)."""
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
        self.attempts[event_id] = attempt

    def forget(self, event_id: str) -> None:
        """Take a tombstone of the changelog."""
        self.attempts.pop(event_id, None)

    def open(self, frontier: int, moment: Moment) -> None:
        """Begin at the frontier: what was IN_FLIGHT is now UNKNOWN, and nothing of it starts before its writes end."""
        self.position = self.frontier = frontier
        quiet = moment.steady + self.policy.call_deadline + self.policy.session_timeout
        for attempt in sorted(self.attempts.values(), key=lambda attempt: attempt.offset):
            if attempt.state is State.DONE:
                if attempt.offset < frontier:
                    # Finished, and the frontier is past it: only its tombstone is missing.
                    self._touch(attempt)
                continue
            if attempt.may_have_landed or attempt.state in (State.IN_FLIGHT, State.UNKNOWN):
                attempt.settled_at = quiet
            self._entities.setdefault(attempt.entity, []).append(attempt)
        for queue in list(self._entities.values()):
            for attempt in queue:
                if attempt.state is State.IN_FLIGHT:
                    attempt.may_have_landed = True
                    self._doubt(attempt, attempt.code or "PROCESS_ENDED", moment)
                elif attempt.state is State.RETRY_AT or attempt.is_put_off:
                    attempt.due = moment.count_wait(attempt.retry_at)
            self._advance(queue)

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
        known = self.attempts.get(event_id)
        if known is not None:
            if known.offset == offset:
                self._line.append(known)
                known.event = known.event or event
            # The same event at another offset is a copy: its outcome is that of the first.
            return None
        attempt = Attempt(event_id, offset, entity, source, event)
        attempt.since = moment.wall
        self.attempts[event_id] = attempt
        self._line.append(attempt)
        return attempt

    def line_up(self, attempt: Attempt, moment: Moment) -> None:
        """Put an admitted event in the queue of its entity; it is parked when something stopped before it."""
        queue = self._entities.setdefault(attempt.entity, [])
        place = len(queue)
        while place and queue[place - 1].offset > attempt.offset:
            place -= 1
        queue.insert(place, attempt)
        # Behind a stopped event everything is stopped, so one look is enough.
        if attempt.state is State.PENDING and place and queue[place - 1].is_stopped:
            self._park_behind(attempt, moment)
        elif place == 0:
            self._advance(queue)

    def skip(self, attempt: Attempt) -> None:
        """The event is not posted at this instance (``not_routed``); it waits for nothing."""
        attempt.state = State.DONE
        attempt.code = "NOT_ROUTED"
        self._report(attempt, Outcome.NOT_ROUTED)

    # Work.

    def take(self, room: int, moment: Moment) -> list[Attempt]:
        """Up to ``room`` events whose next step may begin now: to be frozen, started again, or resent."""
        while self._timers and self._timers[0][0] <= moment.steady:
            due, _, attempt = heapq.heappop(self._timers)
            if attempt.due == due and not attempt.calling:
                self._queue(attempt)
        found: list[Attempt] = []
        while self._ready and len(found) < room:
            attempt = self._ready.popleft()
            attempt.is_queued = False
            if self._may_begin(attempt, moment):
                found.append(attempt)
        return found

    def give_back(self, attempt: Attempt) -> None:
        """An event that was taken cannot begin just now (no room, identity not available)."""
        attempt.is_queued = True
        self._ready.appendleft(attempt)

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
        attempt.due = _NEVER
        attempt.number += 1
        attempt.calling = True
        attempt.written = False
        self._touch(attempt)

    def resend(self, attempt: Attempt, moment: Moment) -> bool:
        """Begin a resend of a request that may have landed; False when a person must decide now instead."""
        if not self.policy.may_resend(attempt.first_write_at, moment):
            self._stop_unknown(attempt, FailureKind.AMBIGUOUS, WINDOW_OVER, moment)
            return False
        attempt.due = _NEVER
        attempt.number += 1
        attempt.calling = True
        attempt.written = False
        attempt.is_first_write = False
        return True

    def may_write(self, attempt: Attempt, moment: Moment) -> bool:
        """The last look before the socket write; True notes the write.

        A call may look again: HTTP does between head and body, and before it repeats a request that was answered 401.
        """
        if not attempt.calling or (not attempt.written and moment.steady < attempt.settled_at):
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

    def _settle_resend(self, attempt: Attempt, result: Answer | Failed, moment: Moment) -> None:
        """This call was not applied; an earlier one may have been."""
        if isinstance(result.kind, FailureKind) and result.kind in _REFUSALS:
            self._stop_unknown(attempt, result.kind, RESEND_REJECTED, moment)
            return
        attempt.tries += 1
        self._doubt(attempt, attempt.code, moment, pause=self.policy.choose_pause(attempt.tries))

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
                self._retry(attempt, kind, result.code, moment, pause=pause)
        else:
            # Withdrawn, or the target as a whole cannot be reached: the runner holds all calls back, so this one need
            # not wait for itself.
            self._retry(attempt, kind or "", result.code, moment, pause=0)

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
        attempt.due = _NEVER
        self._report(attempt, outcome, field=field, dead_letter=True)
        self._stop_entity(attempt, moment)

    def park(self, attempt: Attempt, kind: FailureKind | None, code: str, moment: Moment, *, pause: float) -> None:
        """Set aside and try again after ``pause`` seconds; later events of the entity are parked behind it.

        An event parked already for the same reason is only put off.
        """
        put_off = attempt.state is State.PARKED and attempt.code == code
        attempt.state = State.PARKED
        attempt.failure, attempt.code = kind.value if kind else "", code
        attempt.retry_at = moment.wall + int(pause * 1000)
        self._schedule(attempt, moment.steady + pause)
        if put_off:
            return
        self._touch(attempt)
        if attempt.outcome != Outcome.PARKED:
            self._report(attempt, Outcome.PARKED)
        self._stop_entity(attempt, moment)

    # Transactions.

    def flush(self) -> Flush:
        """What the next transaction must hold. Changes nothing: after an abort it is simply asked for again."""
        passed = 0
        frontier = self.position
        for attempt in self._line:
            if not attempt.is_passable:
                frontier = attempt.offset
                break
            passed += 1
        changed = dict(self._dirty)
        for attempt in itertools.islice(self._line, passed):
            if attempt.state is State.DONE:
                changed[attempt.event_id] = attempt
        records: list[tuple[str, bytes | None]] = []
        for event_id, attempt in changed.items():
            if attempt.state is State.DONE and attempt.offset < frontier:
                if attempt.recorded:
                    records.append((event_id, None))
            else:
                records.append((event_id, encode_entry(self._build_entry(attempt))))
        return Flush(records, list(self._reports), frontier, passed, list(changed.values()))

    @property
    def has_changes(self) -> bool:
        """Whether a transaction would write an entry or a report."""
        return bool(self._dirty or self._reports)

    def confirm(self, flush: Flush) -> None:
        """The transaction with this content has committed."""
        self.frontier = flush.frontier
        for _ in range(flush.passed):
            self._line.popleft()
        for attempt in flush.dirty:
            attempt.recorded = True
            self._dirty.pop(attempt.event_id, None)
            if attempt.state is State.DONE and attempt.offset < flush.frontier:
                self.attempts.pop(attempt.event_id, None)
        del self._reports[: len(flush.reports)]

    # Numbers for people.

    def count_states(self) -> dict[State, int]:
        """Events per state, without those that are done."""
        counts = dict.fromkeys(State, 0)
        for attempt in self.attempts.values():
            counts[attempt.state] += 1
        del counts[State.DONE]
        return counts

    def find_oldest(self) -> int | None:
        """Wall time since which the oldest unfinished event is here."""
        return min((a.since for a in self.attempts.values() if a.state is not State.DONE), default=None)

    # Inside.

    def _may_begin(self, attempt: Attempt, moment: Moment) -> bool:
        queue = self._entities.get(attempt.entity)
        if not queue or queue[0] is not attempt or attempt.calling:
            return False
        if attempt.state not in (State.PENDING, State.RETRY_AT, State.PARKED, State.UNKNOWN):
            return False
        if attempt.waits_for_person:
            return False
        wait_until = attempt.settled_at if attempt.may_have_landed else 0.0
        if attempt.state in (State.RETRY_AT, State.UNKNOWN) and attempt.due != _NEVER:
            wait_until = max(wait_until, attempt.due)
        if moment.steady < wait_until:
            self._schedule(attempt, wait_until)
            return False
        if attempt.state is State.PARKED and attempt.may_have_landed:
            # It goes on as what it was: unknown. The changelog keeps saying PARKED with its mark, which means the same.
            attempt.state = State.UNKNOWN
        return True

    def _advance(self, queue: list[Attempt]) -> None:
        """Set the first event of an entity going."""
        if not queue:
            return
        head = queue[0]
        if head.calling or head.state in (State.REJECTED, State.IN_FLIGHT):
            return
        if head.due != _NEVER:
            self._schedule(head, head.due)
        elif not head.waits_for_person:
            self._queue(head)

    def _queue(self, attempt: Attempt) -> None:
        if not attempt.is_queued:
            attempt.is_queued = True
            self._ready.append(attempt)

    def _schedule(self, attempt: Attempt, due: float) -> None:
        attempt.due = due
        heapq.heappush(self._timers, (due, next(self._numbers), attempt))

    def _finish(self, attempt: Attempt, answer: Answer) -> None:
        attempt.state = State.DONE
        attempt.failure = answer.kind.value if answer.kind else ""
        attempt.code = answer.code
        attempt.may_have_landed = False
        self._report(attempt, Outcome.POSTED, reference=answer.reference)
        self._leave(attempt)

    def _leave(self, attempt: Attempt) -> None:
        queue = self._entities[attempt.entity]
        queue.remove(attempt)
        if queue:
            self._advance(queue)
        else:
            del self._entities[attempt.entity]

    def _retry(self, attempt: Attempt, kind: FailureKind | str, code: str, moment: Moment, *, pause: float) -> None:
        attempt.state = State.RETRY_AT
        attempt.failure, attempt.code = str(kind), code
        attempt.retry_at = moment.wall + int(pause * 1000)
        if attempt.is_first_write and not attempt.written:
            # Nothing ever left, so the key's window has not begun.
            attempt.first_write_at = 0
        self._touch(attempt)
        self._schedule(attempt, moment.steady + pause)

    def _doubt(self, attempt: Attempt, code: str, moment: Moment, *, pause: float = 0.0) -> None:
        """The request may have landed: resend it when that is safe, once every earlier write is over."""
        due = max(attempt.settled_at, moment.steady + pause)
        later = Moment(due, moment.wall + int((due - moment.steady) * 1000))
        if not self.policy.may_resend(attempt.first_write_at, later):
            resendable = self.policy.target_class in (TargetClass.A, TargetClass.B)
            self._stop_unknown(attempt, FailureKind.AMBIGUOUS, WINDOW_OVER if resendable else code, moment)
            return
        if attempt.tries >= self.policy.park_after:
            self.park(attempt, FailureKind.AMBIGUOUS, code, moment, pause=due - moment.steady)
            return
        attempt.state = State.UNKNOWN
        attempt.failure, attempt.code = FailureKind.AMBIGUOUS.value, code
        # The changelog still says IN_FLIGHT, which means the same after a restart.
        self._schedule(attempt, due)

    def _stop_unknown(self, attempt: Attempt, kind: FailureKind, code: str, moment: Moment) -> None:
        attempt.state = State.UNKNOWN
        attempt.failure, attempt.code = kind.value, code
        attempt.may_have_landed = True
        attempt.calling = False
        attempt.due = _NEVER
        self._report(attempt, Outcome.UNKNOWN)
        self._stop_entity(attempt, moment)

    def _stop_entity(self, attempt: Attempt, moment: Moment) -> None:
        queue = self._entities.get(attempt.entity, [])
        for later in queue:
            if later.offset > attempt.offset and later.state is State.PENDING:
                self._park_behind(later, moment)

    def _park_behind(self, attempt: Attempt, moment: Moment) -> None:
        attempt.state = State.PARKED
        attempt.failure, attempt.code = "", BEHIND_ENTITY
        attempt.retry_at = moment.wall
        attempt.due = _NEVER
        self._report(attempt, Outcome.PARKED)

    def _touch(self, attempt: Attempt) -> None:
        self._dirty[attempt.event_id] = attempt

    def _report(
        self, attempt: Attempt, outcome: Outcome, *, reference: str = "", field: str = "", dead_letter: bool = False
    ) -> None:
        self._touch(attempt)
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

    def _build_entry(self, attempt: Attempt) -> Entry:
        is_done = attempt.state is State.DONE
        request = None if is_done else attempt.request
        return Entry(
            state=attempt.state.value,
            topic=self.topic,
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
        )

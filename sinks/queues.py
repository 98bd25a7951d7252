"""The events of one ledger: in line strictly in order per entity, entities side by side, and who waits until when.

Events at work are in memory, stopped ones on the shelf. An event on the shelf has no object here: it comes back as
another one, so nobody keeps an event that was put away.
"""

from __future__ import annotations

import heapq
import itertools
from collections import Counter, OrderedDict, deque
from typing import TYPE_CHECKING

from sinks.attempts import NEVER, Attempt, State
from sinks.shelf import Shelf

if TYPE_CHECKING:
    from collections.abc import Iterable

    from schemas.events import MoneyEvent
    from sinks.policy import Moment

_STALE_TIMERS = 64


class Queues:
    """One queue per entity, in offset order; only its first event may begin."""

    def __init__(self, topic: str) -> None:
        self.attempts: dict[str, Attempt] = {}
        """Those in memory, by event id."""
        self.line: OrderedDict[int, Attempt | None] = OrderedDict()
        """What was read and the frontier has not passed, by offset; None: it is on the shelf."""
        self._shelf = Shelf(topic)
        self._entities: dict[str, list[Attempt]] = {}
        self._ready: deque[Attempt] = deque()
        self._timers: list[tuple[float, int, Attempt]] = []
        self._stale_timers = 0
        self._numbers = itertools.count()

    # What is here.

    @property
    def shelved(self) -> int:
        """Events on the shelf."""
        return len(self._shelf)

    def find(self, event_id: str) -> Attempt | None:
        """An event to work on, taken back from the shelf when it lies there."""
        attempt = self.attempts.get(event_id)
        if attempt is None:
            attempt = self._fetch(event_id)
            if attempt is not None and attempt.due != NEVER:
                self.schedule(attempt, attempt.due)
        return attempt

    def peek(self, event_id: str) -> Attempt | None:
        """An event to look at; a copy when it lies on the shelf."""
        return self.attempts.get(event_id) or self._shelf.read(event_id)

    def add(self, attempt: Attempt) -> None:
        """A new event, last in the line of what was read; it is not yet in a queue."""
        self.attempts[attempt.event_id] = self.line[attempt.offset] = attempt

    def meet_again(self, event_id: str, offset: int, event: MoneyEvent | None) -> bool:
        """Whether a record that was read is about an event that is here already.

        At another offset it is a copy: its outcome is that of the first.
        """
        known = self.attempts.get(event_id)
        place = self._shelf.find_offset(event_id) if known is None else known.offset
        if place == offset:
            self.line[offset] = known
            if known is not None:
                known.event = known.event or event
        return place is not None

    def drop(self, event_id: str) -> None:
        """An event that is in no queue is no more."""
        if self.attempts.pop(event_id, None) is None:
            self._shelf.take(event_id)

    def put_away(self, attempt: Attempt) -> None:
        """Put an event on the shelf when it has stopped; a disk that is full costs memory, nothing else."""
        if not attempt.is_stopped or attempt.is_queued or attempt.calling or not self._shelf.put(attempt):
            return
        del self.attempts[attempt.event_id]
        if attempt.offset in self.line:
            self.line[attempt.offset] = None
        self._remove(attempt)
        if attempt.due != NEVER:
            attempt.due = NEVER
            self._stale_timers += 1
            if self._stale_timers > max(_STALE_TIMERS, len(self._timers) // 2):
                self._timers = [timer for timer in self._timers if timer[2].due == timer[0]]
                heapq.heapify(self._timers)
                self._stale_timers = 0

    def restore(self, attempt: Attempt) -> None:
        """Take an event of the changelog, before ``open``."""
        # An entry without the time from which a person may decide gets it when the ledger opens.
        needs_time = attempt.state is State.UNKNOWN and not attempt.decidable_at
        if not attempt.is_stopped or needs_time or not self._shelf.put(attempt):
            self.attempts[attempt.event_id] = attempt

    def open(self, moment: Moment, quiet: float, longest_pause: float) -> list[Attempt]:
        """The restored events that are in memory, in order; see ``Shelf.open`` for the others."""
        self._shelf.open(moment, quiet, longest_pause)
        return sorted(self.attempts.values(), key=lambda attempt: attempt.offset)

    def count_states(self) -> Counter[State]:
        """Events per state."""
        return Counter(attempt.state for attempt in self.attempts.values()) + self._shelf.count_states()

    def find_oldest(self) -> int | None:
        """Wall time since which the oldest unfinished event is here."""
        times: Iterable[int | None] = (a.since for a in self.attempts.values() if a.state is not State.DONE)
        return min((time for time in (*times, self._shelf.find_oldest()) if time is not None), default=None)

    # Order.

    def list_waiting(self) -> list[str]:
        """Entities that have something to begin after a restart, or may have."""
        return list(dict.fromkeys((*self._entities, *self._shelf.list_free())))

    def list_of(self, entity: str) -> list[Attempt]:
        """Its events in memory, in order; a copy."""
        return list(self._entities.get(entity, ()))

    def list_later(self, attempt: Attempt) -> list[Attempt]:
        """Events in memory of its entity that come after it."""
        return [later for later in self._entities.get(attempt.entity, ()) if later.offset > attempt.offset]

    def is_first(self, attempt: Attempt) -> bool:
        """Whether nothing of its entity is before it."""
        queue = self._entities.get(attempt.entity)
        return bool(queue and queue[0] is attempt) and self._shelf.find_before(attempt.entity, attempt.offset) is None

    def insert(self, attempt: Attempt) -> bool | None:
        """Put an event in its place by offset: None when nothing is before it, else whether that has stopped."""
        queue = self._entities.setdefault(attempt.entity, [])
        place = len(queue)
        while place and queue[place - 1].offset > attempt.offset:
            place -= 1
        queue.insert(place, attempt)
        shelved = self._shelf.find_before(attempt.entity, attempt.offset)
        if shelved is not None and (not place or queue[place - 1].offset < shelved):
            return True
        return queue[place - 1].is_stopped if place else None

    def leave(self, attempt: Attempt) -> None:
        """An event is done: the next of its entity is set going."""
        self._remove(attempt)
        self.advance(attempt.entity)

    def advance(self, entity: str) -> None:
        """Set the first event of an entity going."""
        queue = self._entities.get(entity)
        first = self._shelf.find_first(entity)
        if first is not None and (not queue or first.offset < queue[0].offset):
            if first.is_free:
                self._queue(self._fetch(first.event_id))
            return
        if not queue:
            return
        head = queue[0]
        if head.calling or head.state in (State.REJECTED, State.IN_FLIGHT):
            return
        if head.due != NEVER:
            self.schedule(head, head.due)
        elif not head.waits_for_person:
            self._queue(head)

    def schedule(self, attempt: Attempt, due: float) -> None:
        """It may begin at this steady time, not before."""
        attempt.due = due
        heapq.heappush(self._timers, (due, next(self._numbers), attempt))

    def take(self, room: int, moment: Moment) -> list[Attempt]:
        """Up to ``room`` events that may begin now, longest in line first."""
        while self._timers and self._timers[0][0] <= moment.steady:
            due, _, attempt = heapq.heappop(self._timers)
            if attempt.due == due and not attempt.calling:
                self._queue(attempt)
        for event_id in self._shelf.list_due(moment.steady, room):
            self._queue(self._fetch(event_id))
        found: list[Attempt] = []
        while self._ready and len(found) < room:
            attempt = self._ready.popleft()
            attempt.is_queued = False
            if self._may_begin(attempt, moment):
                found.append(attempt)
        return found

    def give_back(self, attempt: Attempt) -> None:
        """An event that was taken is the next to be taken again."""
        attempt.is_queued = True
        self._ready.appendleft(attempt)

    def _may_begin(self, attempt: Attempt, moment: Moment) -> bool:
        if attempt.calling or not self.is_first(attempt):
            return False
        if attempt.state not in (State.PENDING, State.RETRY_AT, State.PARKED, State.UNKNOWN):
            return False
        if attempt.waits_for_person:
            return False
        wait_until = attempt.settled_at if attempt.may_have_landed else 0.0
        if attempt.state in (State.RETRY_AT, State.UNKNOWN) and attempt.due != NEVER:
            wait_until = max(wait_until, attempt.due)
        if moment.steady < wait_until:
            self.schedule(attempt, wait_until)
            return False
        if attempt.state is State.PARKED and attempt.may_have_landed:
            # It goes on as what it was: unknown. The changelog keeps saying PARKED with its mark, which means the same.
            attempt.state = State.UNKNOWN
        return True

    def _queue(self, attempt: Attempt | None) -> None:
        if attempt is not None and not attempt.is_queued:
            attempt.is_queued = True
            self._ready.append(attempt)

    def _fetch(self, event_id: str) -> Attempt | None:
        attempt = self._shelf.take(event_id)
        if attempt is not None:
            self.attempts[event_id] = attempt
            if attempt.offset in self.line:
                self.line[attempt.offset] = attempt
            self.insert(attempt)
        return attempt

    def _remove(self, attempt: Attempt) -> None:
        queue = self._entities[attempt.entity]
        queue.remove(attempt)
        if not queue:
            del self._entities[attempt.entity]

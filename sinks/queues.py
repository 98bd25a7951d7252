"""The events of one ledger in line: strictly in order per entity, entities side by side, and who waits until when."""

from __future__ import annotations

import heapq
import itertools
from collections import deque
from typing import TYPE_CHECKING

from sinks.attempts import NEVER, Attempt, State

if TYPE_CHECKING:
    from sinks.policy import Moment


class Queues:
    """One queue per entity, in offset order; only its first event may begin."""

    def __init__(self) -> None:
        self._entities: dict[str, list[Attempt]] = {}
        self._ready: deque[Attempt] = deque()
        self._timers: list[tuple[float, int, Attempt]] = []
        self._numbers = itertools.count()

    def list_entities(self) -> list[str]:
        """Entities with events that are not done."""
        return list(self._entities)

    def list_of(self, entity: str) -> list[Attempt]:
        """Its events in order; a copy."""
        return list(self._entities.get(entity, ()))

    def list_later(self, attempt: Attempt) -> list[Attempt]:
        """Events of its entity that come after it."""
        return [later for later in self._entities.get(attempt.entity, ()) if later.offset > attempt.offset]

    def is_first(self, attempt: Attempt) -> bool:
        """Whether nothing of its entity is before it."""
        return self._entities[attempt.entity][0] is attempt

    def append(self, attempt: Attempt) -> None:
        """Put an event last; for a ledger that is taken over, whose events come in order."""
        self._entities.setdefault(attempt.entity, []).append(attempt)

    def insert(self, attempt: Attempt) -> Attempt | None:
        """Put an event in its place by offset; the one just before it, or None."""
        queue = self._entities.setdefault(attempt.entity, [])
        place = len(queue)
        while place and queue[place - 1].offset > attempt.offset:
            place -= 1
        queue.insert(place, attempt)
        return queue[place - 1] if place else None

    def leave(self, attempt: Attempt) -> None:
        """An event is done: the next of its entity is set going."""
        queue = self._entities[attempt.entity]
        queue.remove(attempt)
        if queue:
            self.advance(attempt.entity)
        else:
            del self._entities[attempt.entity]

    def advance(self, entity: str) -> None:
        """Set the first event of an entity going."""
        queue = self._entities.get(entity)
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
        queue = self._entities.get(attempt.entity)
        if not queue or queue[0] is not attempt or attempt.calling:
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

    def _queue(self, attempt: Attempt) -> None:
        if not attempt.is_queued:
            attempt.is_queued = True
            self._ready.append(attempt)

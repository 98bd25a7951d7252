"""Whether a call to a target may begin now: its breaker, its waits, and how many calls it bears at once.

Pure: times are steady seconds, passed in. An outage is not poison: while the gate is shut nothing is sent, nothing is
dead-lettered and no event's tries are counted.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients.breaker import Breaker, BreakerState, Ticket
from clients.limits import Backoff, ConcurrencyLimit
from clients.limits import Call as Place
from schemas.failure import FailureKind
from sinks.attempts import WITHDRAWN, Failed
from sinks.contract import Answer, Finding, TargetClass

if TYPE_CHECKING:
    from collections.abc import Callable

    from sinks.policy import Policy

_ABOUT_ONE_CALL = frozenset({FailureKind.AMBIGUOUS, FailureKind.RATE_LIMITED})


@dataclass(frozen=True, slots=True)
class Leave:
    """Leave for one call; give it back by ``Gate.leave``."""

    ticket: Ticket
    place: Place


class Gate:
    """The gate of one target instance.

    Calls in a row that were never made or never answered shut it (``threshold``), and so do refused credentials and an
    answer that names a time; then one call is tried, with growing pauses and full jitter, drawn by ``draw`` in [0, 1).
    RATE_LIMITED shuts it for the time the target asked. The number of calls grows to ``ceiling`` while all goes well,
    and halves when the target is slow, throttles, or leaves many calls without an answer.
    """

    def __init__(
        self, draw: Callable[[], float], *, ceiling: int, threshold: int = 3, probe_seconds: float = 60.0
    ) -> None:
        self._draw = draw
        self._breaker = Breaker(
            draw,
            threshold=threshold,
            # From a second to minutes: many systems lock a user that keeps knocking.
            refused_backoff=Backoff(1.0, 300.0),
            probe_seconds=probe_seconds,
        )
        self._calls = ConcurrencyLimit(ceiling=ceiling, initial=4, shrink=0.5, tolerated=0.25, doubles=True)
        self._throttle = Backoff()
        self._throttled = 0
        self._waits_until = float("-inf")
        self._wait_reason = ""

    @property
    def limit(self) -> int:
        """Calls that the target bears at once, as far as we know."""
        return self._calls.limit

    def is_shut(self, now: float) -> bool:
        """Whether nothing but a probe may begin."""
        return self._breaker.name_state(now) is not BreakerState.CLOSED

    def explain(self, now: float) -> str:
        """Code of what holds calls back; empty when nothing does."""
        if now < self._waits_until:
            return self._wait_reason
        return self._breaker.reason

    def name_state(self, now: float) -> str:
        """``closed`` (calls flow), ``waiting``, ``open``, ``half-open`` or ``refused``, for people."""
        state = self._breaker.name_state(now)
        return "waiting" if state is BreakerState.CLOSED and now < self._waits_until else state.value

    def measure_wait(self, now: float) -> float:
        """Seconds for which the target asked to be left alone because there were too many calls."""
        return max(0.0, self._waits_until - now)

    def count_room(self, now: float) -> int:
        """How many calls may be under way now: all that the target bears, one as a probe, or none."""
        if now < self._waits_until:
            return 0
        if not self.is_shut(now):
            return self._calls.limit
        return 1 if self._breaker.measure_wait(now) == 0 else 0

    def enter(self, now: float) -> Leave | None:
        """Leave for a call that begins now, or None."""
        if now < self._waits_until:
            return None
        place = self._calls.begin(now)
        if place is None:
            return None
        ticket = self._breaker.admit(now)
        if ticket is None:
            self._calls.withdraw()
            return None
        return Leave(ticket, place)

    def leave(
        self, leave: Leave, now: float, result: Answer | Finding | Failed, *, before: float = 0.0, unread: float = 0.0
    ) -> None:
        """Take what a call came to.

        The first ``before`` seconds of it were this process's; for ``unread`` seconds later, it read no answers.
        """
        kind = result.kind if isinstance(result, Answer | Failed) else None
        if kind == WITHDRAWN:
            self._calls.withdraw()
            self._breaker.withdraw(leave.ticket)
            return
        assert kind is None or isinstance(kind, FailureKind)
        if kind is FailureKind.UNAVAILABLE and isinstance(result, Answer) and not result.is_outage:
            kind = None  # it answered, about this event alone
        self._calls.end(leave.place, now, kind, before=before, unread=unread)
        if kind is None or not isinstance(result, Answer | Failed):
            self._breaker.succeed(leave.ticket, now)
        else:
            was_shut = self.is_shut(now)
            asked = 0.0 if kind in _ABOUT_ONE_CALL else result.retry_after
            self._breaker.fail(leave.ticket, now, kind, result.code, retry_after=asked)
            if self.is_shut(now) and not was_shut:
                self._calls.restart()
        self._note_throttle(kind, result, now)

    def _note_throttle(self, kind: FailureKind | None, result: Answer | Finding | Failed, now: float) -> None:
        if kind is not FailureKind.RATE_LIMITED:
            self._throttled = 0
        elif isinstance(result, Answer) or (isinstance(result, Failed) and result.retry_after):
            # Without an answer the wait was for our own limits, which know by themselves when the next call may go.
            if now >= self._waits_until:
                self._throttled += 1
            pause = max(result.retry_after, self._throttle.draw_pause(self._throttled, self._draw))
            self._waits_until = max(self._waits_until, now + pause)
            self._wait_reason = result.code


def make_gate(draw: Callable[[], float], policy: Policy, connections: int) -> Gate:
    """The gate of an instance."""
    # Each call without an answer costs a person's work at class D, elsewhere some waiting: there a few in a row among
    # many are no outage.
    threshold = 3 if policy.target_class is TargetClass.D else max(3, connections // 4)
    return Gate(draw, ceiling=connections, threshold=threshold, probe_seconds=4 * policy.call_deadline + 30)

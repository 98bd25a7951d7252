"""How fast and how many: a credential's rate, an adaptive number of calls under way, pauses between tries.

Pure: times are steady seconds, passed in. ``RateLimiter`` alone waits, on a clock and a sleep it is given.
"""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Awaitable, Callable, Sequence
from dataclasses import dataclass

from schemas.failure import ConfigurationError, FailureKind

_NANO = 1_000_000_000


@dataclass(frozen=True, slots=True)
class Backoff:
    """Exponential back-off with full jitter, in seconds."""

    first: float = 0.5
    longest: float = 30.0

    def draw_pause(self, failures: int, draw: Callable[[], float]) -> float:
        """The pause after that many failures in a row. ``draw`` gives a number in [0, 1).

        At least a tenth of the ceiling: a jitter near zero would be no pause at all.
        """
        ceiling = min(self.longest, self.first * 2.0 ** min(max(failures, 1) - 1, 40))
        return ceiling * max(0.1, draw())


@dataclass(frozen=True, slots=True)
class Rate:
    """At most ``calls`` in any window of ``seconds``, of which ``burst`` may come at once."""

    calls: int
    seconds: float
    burst: int = 1

    def __post_init__(self) -> None:
        if self.calls < 1 or not 1 <= self.burst <= self.calls or not 0 < self.seconds < math.inf:
            raise ValueError("a rate has 1 or more calls, a positive window, and a burst of 1 to its calls")

    def divide(self, processes: int, *, place: str) -> Rate:
        """One process's part, so that all together never exceed the whole in any window.

        Raises ``ConfigurationError`` when there are more processes than calls: no part can then keep the promise.
        ``place`` is the setting it names.
        """
        if processes < 1:
            raise ValueError("there is at least one process")
        if processes > self.calls:
            raise ConfigurationError(
                f"{processes} processes cannot share {self.calls} calls in {self.seconds:g} s.",
                place=place,
                remedy="Let fewer processes use this credential.",
            )
        return Rate(self.calls // processes, self.seconds, max(1, self.burst // processes))


class TokenBucket:
    """A token bucket that never lets more than ``rate.calls`` through in any window of ``rate.seconds``.

    A plain bucket lets a full burst and a full window's refill through in one window, twice the limit when both are
    the vendor's number. Here the refill is what the window has left beside the burst. Counted in whole nanoseconds:
    no rounding adds a call. A clock that goes back gives nothing.
    """

    def __init__(self, rate: Rate) -> None:
        # Taken calls are at most burst + floor(window / interval): one fewer refills than the window has room for.
        refills = rate.calls - rate.burst + 1
        self._interval = math.ceil(rate.seconds * _NANO / refills)
        self._slack = (rate.burst - 1) * self._interval
        self._full_at = -(10**30)
        """When the bucket is full again, in nanoseconds."""

    def measure_wait(self, now: float) -> float:
        """Seconds until a call may begin; 0 when it may begin now."""
        return max(0, self._full_at - self._slack - _tick(now)) / _NANO

    def take(self, now: float) -> bool:
        """Take a token for one call; False when there is none."""
        tick = _tick(now)
        if self._full_at - self._slack > tick:
            return False
        self._full_at = max(self._full_at, tick) + self._interval
        return True

    def drain(self, now: float, pause: float = 0.0) -> None:
        """The target said RATE_LIMITED: no token for ``pause`` seconds, and no burst after them."""
        held = max(self._interval, math.ceil(pause * _NANO))
        self._full_at = max(self._full_at, _tick(now) + held + self._slack)


def _tick(now: float) -> int:
    return int(now * _NANO)


class RateLimiter:
    """The rates of one credential, for all its callers in this process; first come, first served.

    A vendor may have several rates at once (500 a minute and 10 a second); a call waits for all of them. A waiter that
    is cancelled has taken nothing and holds nobody up. Use from one event loop.
    """

    def __init__(
        self,
        rates: Sequence[Rate],
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> None:
        self._buckets = [TokenBucket(rate) for rate in rates]
        self._clock = clock
        self._sleep = sleep
        self._turn = asyncio.Lock()  # wakes its waiters in order

    async def take(self) -> None:
        """Return when a call may begin."""
        async with self._turn:
            # After each sleep all over again: a RATE_LIMITED may have drained the buckets meanwhile.
            while wait := max((bucket.measure_wait(self._clock()) for bucket in self._buckets), default=0.0):
                # Not less than a clock's float can tell apart.
                await self._sleep(max(wait, 1e-4))
            now = self._clock()
            for bucket in self._buckets:
                bucket.take(now)

    def drain(self, pause: float = 0.0) -> None:
        """The target said RATE_LIMITED, with this Retry-After: nobody begins before."""
        now = self._clock()
        for bucket in self._buckets:
            bucket.drain(now, pause)


_PRESSURE = frozenset({FailureKind.RATE_LIMITED, FailureKind.UNAVAILABLE, FailureKind.AMBIGUOUS})


@dataclass(frozen=True, slots=True)
class Call:
    """A call under way, as ``ConcurrencyLimit.begin`` gave it."""

    began: float
    generation: int


class ConcurrencyLimit:
    """How many calls may be under way: up by one when the limit was reached and all went well, down on pressure.

    Pressure is a call that was told to wait, could not be made or was not answered; or a mean latency above
    ``tolerance`` times the usual plus ``slack`` seconds. The mean is over one round of calls, as many as the limit. The
    usual follows the rounds slowly, so that a target that became slower for good is believed after some tens of them.

    An overloaded caller is not an overloaded target. Where an answer may have lain unread, the least that the target
    can have taken is compared with the most that it usually can have taken.

    Up to ``tolerated`` of a round's calls may fail without an answer: with one record in ten that makes a target fall
    over, a limit that falls at each would end at one call. Being told to wait always counts at once.

    The limit stays within ``floor`` and ``ceiling``. It falls to ``shrink`` of itself, once for all the calls that were
    under way when it fell: they say nothing new. It grows only after a whole good round in which every place was in
    use: a quiet hour proves nothing. With ``doubles`` it grows to twice itself until it falls for the first time.
    """

    def __init__(
        self,
        *,
        floor: int = 1,
        ceiling: int = 64,
        initial: int | None = None,
        tolerance: float = 2.0,
        slack: float = 0.05,
        shrink: float = 0.7,
        tolerated: float = 0.0,
        doubles: bool = False,
    ) -> None:
        if not 1 <= floor <= ceiling:
            raise ValueError("1 <= floor <= ceiling")
        self._floor = floor
        self._ceiling = ceiling
        self._initial = min(max(floor if initial is None else initial, floor), ceiling)
        self.limit = self._initial
        """Calls that may be under way now."""
        self.under_way = 0
        self._tolerance = tolerance
        self._slack = slack
        self._shrink = shrink
        self._tolerated = tolerated
        self._doubles = self._is_doubling = doubles
        self._generation = 0
        self._usual: float | None = None
        self._latencies: list[tuple[float, float]] = []
        """Of a round's answered calls: the least and the most that the target can have taken."""
        self._unanswered = 0
        self._reached = False

    def begin(self, now: float) -> Call | None:
        """Take a place; None when there is none."""
        if self.under_way >= self.limit:
            return None
        self.under_way += 1
        self._reached = self._reached or self.under_way == self.limit
        return Call(now, self._generation)

    def end(
        self, call: Call, now: float, kind: FailureKind | None, *, before: float = 0.0, unread: float = 0.0
    ) -> None:
        """Give the place back with what the call came to. Once per call.

        The caller had it for ``before`` seconds before the write; for ``unread`` seconds after, it read no answers.
        """
        self.under_way -= 1
        if call.generation != self._generation:
            return
        if kind in _PRESSURE and (kind is FailureKind.RATE_LIMITED or not self._tolerated):
            self._fall()
            return
        if kind in _PRESSURE:
            self._unanswered += 1
        else:
            most = max(0.0, now - call.began - before)
            self._latencies.append((max(0.0, most - unread), most))
        if len(self._latencies) + self._unanswered >= self.limit:
            self._end_round()

    def withdraw(self) -> None:
        """Give the place back of a call that was never made."""
        self.under_way -= 1

    def restart(self) -> None:
        """Begin as at first: the target was away, and may be weak when it comes back."""
        self.limit = min(self.limit, self._initial)
        self._is_doubling = self._doubles
        self._generation += 1
        self._begin_round()

    def _end_round(self) -> None:
        if self._unanswered > self._tolerated * self.limit:
            self._fall()
            return
        if not self._latencies:
            self._begin_round()
            return
        least, most = (sum(times) / len(times) for times in zip(*self._latencies, strict=True))
        usual = most if self._usual is None else self._usual
        self._usual = usual + 0.1 * (most - usual)
        if least > self._tolerance * usual + self._slack:
            self._fall()
            return
        if self._reached:
            self.limit = min(self._ceiling, self.limit * 2 if self._is_doubling else self.limit + 1)
        self._begin_round()

    def _fall(self) -> None:
        self.limit = max(self._floor, int(self.limit * self._shrink))
        self._is_doubling = False
        self._generation += 1
        self._begin_round()

    def _begin_round(self) -> None:
        self._latencies.clear()
        self._unanswered = 0
        self._reached = False

"""When the group's coordinator last heard from this member: what a deliverer asks just before it writes to a target.

librdkafka sends heartbeats on its own thread and tells nobody of their success, but its statistics count requests sent
to and answers received from the coordinator. A heartbeat counted since the last statistics, with every request answered
and the member still steady in its group, was received by the coordinator after those last statistics were taken: their
time is the time of the lease, never later than the heartbeat itself.

A lease must not look younger than it is, so it grows old while the machine sleeps, too. ``time.monotonic`` stands still
then (Linux: CLOCK_MONOTONIC; macOS: mach_absolute_time); CLOCK_BOOTTIME of Linux and CLOCK_MONOTONIC_RAW of macOS go
on. Waits for what may still land keep ``time.monotonic``: a write that slept with us may land later by as much. A
virtual machine that is stopped with all its clocks, and not told, finds no lease expired.

Under the group protocol ``consumer`` librdkafka 2.16 counts heartbeats among the requests it sends but does not name
them, and does not tell whether the member is steady. Then the nameless ones are taken for them; an answer may also have
been a refusal. That is enough to say that the coordinator answers, not for a write to a target.
"""

from __future__ import annotations

import functools
import sys
import time
from typing import TYPE_CHECKING, Any, NamedTuple

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

STATISTICS_INTERVAL_MS = 500


def read_client_time() -> float:
    """Seconds of the clock by which librdkafka counts its age: CLOCK_MONOTONIC, on macOS the time of day."""
    return time.time() if sys.platform == "darwin" else time.monotonic()


def choose_sleepless_clock(platform: str = sys.platform, clocks: object = time) -> Callable[[], float]:
    """A clock whose seconds also pass while the machine sleeps; ``time.monotonic`` where the system has none."""
    clock: int | None = getattr(clocks, "CLOCK_MONOTONIC_RAW" if platform == "darwin" else "CLOCK_BOOTTIME", None)
    if clock is None:
        return time.monotonic
    try:
        time.clock_gettime(clock)
    except OSError:
        return time.monotonic  # the constant is there, the kernel (or a sandbox) refuses it
    return functools.partial(time.clock_gettime, clock)


read_sleepless_time = choose_sleepless_clock()


class _Note(NamedTuple):
    """At that time of the client's clock, the sleepless clock was so much ahead of it, or more."""

    client: float
    ahead: float


class Lease:
    """Time of the last heartbeat known to have reached the coordinator.

    ``sleepless`` goes on while the machine sleeps, ``client`` is the clock of the client's age; each is ``steady``
    where not given.
    """

    def __init__(
        self,
        steady: Callable[[], float],
        sleepless: Callable[[], float] | None = None,
        client: Callable[[], float] | None = None,
        *,
        is_nameless: bool = False,
    ) -> None:
        self._steady = steady
        self._sleepless = sleepless or steady
        self._client = client or steady
        self._is_nameless = is_nameless
        self._notes = [self._note()]
        self._created_at = self._notes[0].client
        self._known: tuple[int, int, int] | None = None
        self._known_at = 0.0
        self._renewed_at = float("-inf")

    @property
    def renewed_at(self) -> float:
        """When, in steady seconds, as if those had passed while the machine slept, too."""
        return self._steady() - (self._sleepless() - self._renewed_at)

    def begin(self) -> None:
        """The member was just assigned its partitions: the coordinator answered it a moment ago.

        Should that moment have been long, the first transaction is fenced before any call can start.
        """
        self._renewed_at = self._sleepless()

    def take_statistics(self, text: str) -> None:
        """Read one statistics report of the consumer."""
        report: dict[str, Any] = orjson.loads(text)
        coordinator = report.get("brokers", {}).get("GroupCoordinator")
        group = report.get("cgrp") or {}
        if coordinator is None:
            return
        taken_at = self._date(report["age"] / 1e6)
        requests = coordinator["req"]
        heartbeats = requests.get("Heartbeat", 0) + requests.get("ConsumerGroupHeartbeat", 0)
        if self._is_nameless:
            heartbeats += coordinator["tx"] - sum(requests.values())
        now = (heartbeats, coordinator["tx"], coordinator["rx"])
        if coordinator["waitresp_cnt"] or coordinator["outbuf_cnt"]:
            return
        known, known_at = self._known, self._known_at
        self._known, self._known_at = now, taken_at
        is_steady = group.get("state") == "up" and (self._is_nameless or group.get("join_state") == "steady")
        if known is None or not is_steady:
            return
        all_answered = now[1] - known[1] == now[2] - known[2]
        if all_answered and now[0] > known[0]:
            self._renewed_at = max(self._renewed_at, known_at)

    def _date(self, age: float) -> float:
        """Sleepless time at which the client had this age, or a little before.

        The report may have waited for a frozen process, or over a sleep of the machine: the distance of the two clocks
        counts as it was noted last before then. Of a time of day that was set, the distance now is nearer.
        """
        client = self._created_at + age
        now = self._note()
        earlier = [at for at, note in enumerate(self._notes) if note.client <= client]
        del self._notes[: earlier[-1] if earlier else 0]
        ahead = min(self._notes[0].ahead, now.ahead)
        self._notes.append(now)
        return client + ahead

    def _note(self) -> _Note:
        # In this order a sleep between the two makes the distance too small, never too large.
        sleepless = self._sleepless()
        client = self._client()
        return _Note(client, sleepless - client)

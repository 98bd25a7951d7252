"""When the group's coordinator last heard from this member: what a deliverer asks just before it writes to a target.

librdkafka sends heartbeats on its own thread and tells nobody of their success, but its statistics count requests sent
to and answers received from the coordinator. A heartbeat counted since the last statistics, with every request answered
and the member still steady in its group, was received by the coordinator after those last statistics were taken: their
time is the time of the lease, never later than the heartbeat itself. Times are steady seconds (``time.monotonic``).

Under the group protocol ``consumer`` librdkafka 2.16 counts heartbeats among the requests it sends but does not name
them, and does not tell whether the member is steady. Then the nameless ones are taken for them; an answer may also have
been a refusal. That is enough to say that the coordinator answers, not for a write to a target.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import orjson

if TYPE_CHECKING:
    from collections.abc import Callable

STATISTICS_INTERVAL_MS = 500


class Lease:
    """Time of the last heartbeat known to have reached the coordinator."""

    def __init__(self, steady: Callable[[], float] = time.monotonic, *, is_nameless: bool = False) -> None:
        self._steady = steady
        self._is_nameless = is_nameless
        self._created_at = steady()
        self._known: tuple[int, int, int] | None = None
        self._known_at = 0.0
        self.renewed_at = float("-inf")

    def begin(self) -> None:
        """The member was just assigned its partitions: the coordinator answered it a moment ago.

        Should that moment have been long, the first transaction is fenced before any call can start.
        """
        self.renewed_at = self._steady()

    def take_statistics(self, text: str) -> None:
        """Read one statistics report of the consumer."""
        report: dict[str, Any] = orjson.loads(text)
        coordinator = report.get("brokers", {}).get("GroupCoordinator")
        group = report.get("cgrp") or {}
        if coordinator is None:
            return
        # The report may have waited for a frozen process: what counts is when it was taken, by the client's own age.
        taken_at = self._created_at + report["age"] / 1e6
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
            self.renewed_at = max(self.renewed_at, known_at)

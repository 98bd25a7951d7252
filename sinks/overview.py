"""What people and monitors see of one deliverer: events per state, calls, the target's state, the oldest event."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from sinks.attempts import State
from telemetry.metrics import Metric

if TYPE_CHECKING:
    from sinks.calls import Calls
    from sinks.gate import Gate
    from sinks.policy import Moment, Policy
    from sinks.shards import Shards
    from telemetry.metrics import Metrics

_INTERVAL = 1.0
"""Seconds between two measurements."""


class Overview:
    """Reads the others, changes nothing. Use from one event loop."""

    def __init__(
        self, target: str, policy: Policy, shards: Shards, calls: Calls, gate: Gate, *, metrics: Metrics
    ) -> None:
        self._target = target
        self._policy = policy
        self._shards = shards
        self._calls = calls
        self._gate = gate
        self._metrics = metrics
        self._measured_at = float("-inf")

    def describe(self, now: Moment, *, paused: bool) -> dict[str, Any]:
        """Numbers for people; the oldest unfinished event's age in seconds, None when there is none."""
        times = [shard.ledger.queues.find_oldest() for shard in self._shards]
        oldest = min((time for time in times if time is not None), default=None)
        return {
            "target": self._target,
            "class": self._policy.target_class.value,
            "states": self._count_states(),
            "calls": self._calls.on_wire,
            "call_limit": self._gate.limit,
            "oldest_seconds": None if oldest is None else max(0.0, (now.wall - oldest) / 1000),
            "available": not self._gate.is_shut(now.steady),
            "breaker": self._gate.name_state(now.steady),
            "paused": paused,
            "partitions": sorted(f"{shard.topic}[{shard.partition}]" for shard in self._shards),
        }

    def measure(self, now: Moment) -> None:
        """Set the gauges now and then."""
        if now.steady - self._measured_at < _INTERVAL:
            return
        self._measured_at = now.steady
        for state, count in self._count_states().items():
            self._metrics.set(Metric.OPEN_ATTEMPTS, count, target=self._target, state=state)
        self._metrics.set(Metric.TARGET_OPEN, float(not self._gate.is_shut(now.steady)), target=self._target)
        self._metrics.set(Metric.CALL_LIMIT, self._gate.limit, target=self._target)

    def _count_states(self) -> dict[str, int]:
        counts = dict.fromkeys((state.value for state in State), 0)
        for shard in self._shards:
            for state, count in shard.ledger.queues.count_states().items():
                counts[state.value] += count
        del counts[State.DONE.value]
        return counts

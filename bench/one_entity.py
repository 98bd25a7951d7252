"""One entity that fails for an hour: what the others notice. The shipped runner in virtual time.

The world is the one of ``tests.delivery_faults``; events arrive at a steady rate, and latency is from an event's
arrival until the target has applied it, in virtual seconds: the machine's load changes nothing.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Any
from unittest import mock

from bench.meter import find_percentile
from schemas.failure import FailureKind
from sinks.contract import Answer, TargetClass
from tests.delivery_faults import play, virtual_time
from tests.delivery_faults.world import PARTITION, Faults, Group, World
from topics.group import Polled

if TYPE_CHECKING:
    from sinks.contract import Request
    from topics.reading import Record

ENTITIES = 50
RATE = 5.0
"""Events a second, dealt round the entities."""
TAIL = 600.0
"""Seconds of events after the failing hour."""


class _Arriving(World):
    """Events become readable as they arrive; entity 0 may be refused for a time."""

    def __init__(self, *arguments: Any, refused_until: float) -> None:
        super().__init__(*arguments)
        self.refused_until = refused_until
        self.applied_at: dict[int, float] = {}
        self.refusals = 0

    def read(self, first: int, count: int, known: int) -> list[Record]:
        arrived = int(asyncio.get_running_loop().time() * RATE)
        return super().read(first, min(count, max(0, arrived - first)), known)

    def apply(self, request: Request) -> Answer:
        number = int(request.control_id, 16)
        now = asyncio.get_running_loop().time()
        if number % self.entities == 0 and now < self.refused_until:
            self.refusals += 1
            return Answer(FailureKind.UNAVAILABLE, "BUSY")
        answer = super().apply(request)
        self.applied_at.setdefault(number, now)
        return answer


async def _poll_promptly(group: Group, max_records: int, wait: float) -> Polled[Record]:
    """The world's group, asked as often as the real one: here its pauses are what is measured."""
    ready = not group.is_paused and group.is_owner
    found = group.world.read(group.position, max_records, group._known) if ready else []  # noqa: SLF001 - stands in
    await asyncio.sleep(0.001 if found else wait)
    if not group.is_owner:
        return Polled(group.generation, {})
    group.position += len(found)
    group._known = max(group._known, group.position)  # noqa: SLF001
    return Polled(group.generation, {PARTITION: found} if found else {})


def _run(hours: float, *, failing: bool) -> _Arriving:
    seconds = hours * 3600
    events = int((seconds + TAIL) * RATE)
    world = _Arriving(TargetClass.A, events, ENTITIES, Faults(), 1, refused_until=seconds if failing else 0.0)
    with mock.patch.object(Group, "poll", _poll_promptly):
        virtual_time.run(play._play(world, lambda _world: False))  # noqa: SLF001 - the same play, another world
    return world


def measure_one_entity(hours: float) -> dict[str, Any]:
    """Latencies of the others with and without the failing one, in milliseconds of virtual time."""
    figures: dict[str, Any] = {"hours": hours, "entities": ENTITIES, "events_per_second": RATE}
    for name, failing in (("without", False), ("with", True)):
        world = _run(hours, failing=failing)
        broken = {promise: count for promise, count in world.judge().items() if count}
        absent = world.events - len(world.applied_at)
        others = sorted(
            (at - (number + 1) / RATE) * 1000 for number, at in world.applied_at.items() if number % ENTITIES
        )
        figures[name] = {
            "others": len(others),
            "p50_ms": round(find_percentile(others, 0.5), 1),
            "p99_ms": round(find_percentile(others, 0.99), 1),
            "max_ms": round(others[-1], 1),
            "refusals": world.refusals,
            "not_applied": absent,
        }
        if broken or absent:
            figures[name]["error"] = f"broken promises: {broken}, {absent} events not applied"
    figures["p99_ratio"] = round(figures["with"]["p99_ms"] / figures["without"]["p99_ms"], 3)
    return figures

"""Latency at a steady rate: how long until a canonical event is visible, committed, and what of it the worker added."""

from __future__ import annotations

import json
import sys
from typing import TYPE_CHECKING, Any

from bench.ground import RAW, BenchBroken, Ground
from bench.meter import Meter, find_percentile
from topics import catalog

if TYPE_CHECKING:
    from bench.scenario import Scenario

WARM_EVENTS = 20_000


def measure_latency(ground: Ground, scenario: Scenario, *, rate: float, seconds: float) -> dict[str, Any]:
    """Run the worker on a fresh log, warm it, then feed it at ``rate`` events a second. Milliseconds.

    One subscriber reads the raw log and the canonical topic: what the worker added is, event by event, the time
    between the two (reading, deciding, its transaction, and the subscriber's second fetch).
    """
    ground.wipe(raw=True)
    ground.forget_log(RAW)
    ground.load(RAW, WARM_EVENTS)
    count = int(rate * seconds)
    process = ground.start(scenario.command(ground, {}))
    try:
        ground.await_committed(process, scenario.group)
        begins = {topic: ground.read_ends(topic) for topic in (RAW, catalog.PAYMENTS)}
        watch = {
            "bootstrap": ground.bootstrap,
            "raw": RAW,
            "topic": catalog.PAYMENTS,
            "from": begins,
            "count": count,
            "seconds": seconds * 2 + 30,
        }
        watcher = ground.start([sys.executable, "-m", "bench.programs.watch", json.dumps(watch)], pipe=True)
        assert watcher.stdout is not None
        if watcher.stdout.readline() != b"ready\n":
            raise BenchBroken(f"nothing watches:\n{ground.read_log(watcher)}")
        pace = {
            "bootstrap": ground.bootstrap,
            "raw": RAW,
            "first": WARM_EVENTS,
            "last": WARM_EVENTS + count,
            "rate": rate,
            "prepare": True,
            "now": True,
        }
        meter = Meter([process.pid])
        before = meter.read_cpu()
        sender = ground.start([sys.executable, "-m", "bench.programs.pace", json.dumps(pace)], pipe=True)
        assert sender.stdout is not None
        sent = json.loads(sender.stdout.read())
        seen = json.loads(watcher.stdout.read())
        cpu = meter.read_cpu() - before
    finally:
        ground.stop(process)
    if sent["sent"] != count:
        raise BenchBroken(f"{sent['sent']} of {count} events were sent")
    return {
        "events": count,
        "events_per_second": count / sent["seconds"],
        **describe_ages(seen, count),
        "worst_delay_of_sender_ms": sent["latest_tick"] * 1000,
        "cpu_per_million": cpu / count * 1e6,
    }


def describe_ages(seen: dict[str, list[float]], count: int) -> dict[str, float]:
    """Percentiles of what ``programs/watch.py`` saw: sender to subscriber (no prefix), ``raw_``, ``added_``.

    Raises ``BenchBroken`` unless it saw ``count`` events.
    """
    figures = {}
    for prefix, name in (("", "canonical"), ("added_", "added"), ("raw_", "raw")):
        ages = seen[name]
        if len(ages) != count:
            raise BenchBroken(f"{len(ages)} of {count} events came")
        figures[f"{prefix}p50_ms"] = find_percentile(ages, 0.5)
        figures[f"{prefix}p99_ms"] = find_percentile(ages, 0.99)
        figures[f"{prefix}max_ms"] = ages[-1]
    return figures

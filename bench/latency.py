"""Latency at half load: how long from a raw record's ingest time until its canonical event is visible, committed."""

from __future__ import annotations

import contextlib
import json
import sys
import time
from typing import TYPE_CHECKING, Any

from bench.ground import RAW, BenchBroken, Ground
from bench.meter import Meter, find_percentile
from topics import catalog

if TYPE_CHECKING:
    from bench.scenario import Scenario

WARM_EVENTS = 20_000


def measure_latency(ground: Ground, scenario: Scenario, *, rate: float, seconds: float) -> dict[str, Any]:
    """Run the worker on a fresh log, warm it, then feed it at ``rate`` events a second. Milliseconds."""
    ground.wipe(raw=True)
    ground.forget_log(RAW)
    ground.load(RAW, WARM_EVENTS)
    count = int(rate * seconds)
    process = ground.start(scenario.command(ground, {}))
    try:
        _await_warm(ground, scenario, process)
        begins = ground.read_ends(catalog.PAYMENTS)
        watch = {
            "bootstrap": ground.bootstrap,
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
        ages = json.loads(watcher.stdout.read())
        cpu = meter.read_cpu() - before
    finally:
        ground.stop(process)
    if len(ages) != count or sent["sent"] != count:
        raise BenchBroken(f"{sent['sent']} of {count} events were sent and {len(ages)} came")
    return {
        "events": count,
        "events_per_second": count / sent["seconds"],
        "p50_ms": find_percentile(ages, 0.5),
        "p99_ms": find_percentile(ages, 0.99),
        "max_ms": ages[-1],
        "worst_delay_of_sender_ms": sent["latest_tick"] * 1000,
        "cpu_per_million": cpu / count * 1e6,
    }


def _await_warm(ground: Ground, scenario: Scenario, process: Any) -> None:
    ends = ground.read_ends(RAW)
    until = time.monotonic() + 120
    with contextlib.closing(ground.watch(scenario.group, catalog.PAYMENTS)) as progress:
        while not progress.has_committed(RAW, ends):
            if process.poll() is not None or time.monotonic() > until:
                raise BenchBroken(f"the worker does not get warm:\n{ground.read_log(process)}")
            time.sleep(0.1)

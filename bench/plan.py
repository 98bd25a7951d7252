"""How long a bench will take, from the last run's rates, or from careful guesses for a contender without one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.scenarios import SCENARIOS, ours_full

if TYPE_CHECKING:
    import argparse

GUESSED_RATES = {
    "full": 10_000,
    "mapping": 15_000,
    "two-processes": 12_000,
    "kafka-streams": 30_000,
    "quixstreams": 18_000,
    "quixstreams-documented": 12_000,
    "faust": 2_000,
    "faust-tuned": 2_500,
    "passthrough": 40_000,
}
"""Events a second over a whole run."""

START_SECONDS = 20.0
"""Starting the stack, and the patients."""
LOAD_SECONDS = 45e-6
"""Writing one event into the raw log."""
CHECK_SECONDS = 65e-6
"""Reading one event of the output back and comparing it."""
RUN_SECONDS = 6.0
"""Making topics, starting and stopping a contender."""


def estimate_minutes(options: argparse.Namespace, last: dict[str, Any]) -> float:
    """Minutes of a run with these options on a quiet machine; ``last`` are the results of an earlier run."""
    seconds = START_SECONDS + options.events * LOAD_SECONDS
    for scenario in SCENARIOS:
        if scenario.name in options.only:
            events = options.faust_events if scenario.small else options.events
            seconds += _run(scenario.name, events, last)
            if options.profile and scenario.name in ("full", "mapping"):
                seconds += _run(scenario.name, events, last)
    if ours_full.SCENARIO.name in options.only:
        if options.latency_seconds:
            seconds += 2 * (options.latency_seconds + 2 * RUN_SECONDS)
        if not options.no_scaling:
            seconds += options.events / 2 * LOAD_SECONDS
            seconds += sum(_run("full", options.events // part, last) for part in (4, 2))
    return seconds / 60


def _run(name: str, events: int, last: dict[str, Any]) -> float:
    known = last.get("results", {}).get(name, {}).get("whole_run", {}).get("events_per_second")
    rate = float(known or GUESSED_RATES[name])
    return RUN_SECONDS + float(events) / rate + float(events) * CHECK_SECONDS

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
    "kafka-streams-documented": 25_000,
    "quixstreams": 18_000,
    "quixstreams-documented": 12_000,
    "faust": 2_000,
    "faust-tuned": 2_500,
    "passthrough": 40_000,
    "bound": 50_000,
    "bound-full": 40_000,
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
    return float(seconds / 60)


GUESSED_POSTS = {"deliverer": 700, "aiohttp": 1_000, "httpx": 150}
"""Posts a second against a server that answers after 50 ms."""
TRIAL_SECONDS = 12.0
"""Topics, a server and a contender of one posting run, and reading its outcomes."""
ENTITY_SECONDS = 30.0
"""The hour of virtual time."""


def estimate_posting_minutes(options: argparse.Namespace, last: dict[str, Any]) -> float:
    """The same for ``python -m bench.posting``."""
    seconds = 0.0 if options.no_entity else ENTITY_SECONDS * options.hours
    if options.delays:
        seconds += START_SECONDS
    for delay in options.delays:
        known = last.get("results", {}).get(f"{delay}ms", {})
        for name in options.only:
            rate = known.get(name, {}).get("posts_per_second") or GUESSED_POSTS[name]
            seconds += TRIAL_SECONDS + options.events / rate
            seconds += options.latency_seconds + TRIAL_SECONDS if options.latency_seconds else 0.0
    return seconds / 60


def _run(name: str, events: int, last: dict[str, Any]) -> float:
    known = last.get("results", {}).get(name, {}).get("whole_run", {}).get("events_per_second")
    rate = float(known or GUESSED_RATES[name])
    return RUN_SECONDS + float(events) / rate + float(events) * CHECK_SECONDS

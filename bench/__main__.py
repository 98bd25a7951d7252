"""Run the bench: ``python -m bench``. Prints a table, writes ``bench/results/latest.json``."""

from __future__ import annotations

import argparse
import datetime as dt
import os
import sys
import time
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from bench.ground import RAW, SMALL_RAW, BenchBroken, Ground
from bench.latency import measure_latency
from bench.meter import build_ratios
from bench.outputs import WrongOutput
from bench.plan import estimate_minutes
from bench.profiler import sample, write_summary
from bench.report import QUIET_CORES, describe_machine, describe_plan, judge, read_report, write_report
from bench.scenario import Run
from bench.scenarios import SCENARIOS, ours_full, ours_mapping
from bench.webhooks import Traffic

RESULTS = Path(__file__).with_name("results")
LATENCY_SECONDS = 20.0
LOW_RATE = 200.0
"""Events a second at low load."""
REDPANDA_CONNECT = 100.0
"""CPU seconds per million of the same mapping, measured once by hand on this kind of machine; quoted, not run."""

LATENCIES = {
    "added_": "added (raw record visible to event visible)",
    "": "sender to subscriber",
    "raw_": "no worker (sender to subscriber of the raw log)",
}
"""What is printed of latency, by prefix of its keys."""

FLOORS = {
    "cpu_per_event_vs_kafka_streams": (1.0, 0.8),
    "cpu_per_event_vs_quixstreams": (0.5, None),
    "cpu_per_event_vs_faust": (0.04, None),
    "full_cpu_per_event_vs_kafka_streams": (None, 1.0),
    "cpu_per_event_two_processes": (1.1, None),
    "low_load_added_p99_ms": (50.0, None),
    "low_load_p99_ms": (None, 50.0),
}
"""Largest value of the floor and of the goal."""


def main() -> int:
    """Exit code: 0 when every contender that ran wrote the right output, 1 otherwise."""
    options = parse_options()
    console = Console(width=140)
    report = describe_machine("bench", options.events)
    report["quoted"] = {"redpanda_connect_cpu_per_million": REDPANDA_CONNECT}
    report["planned_minutes"] = estimate_minutes(options, read_report(RESULTS / "latest.json"))
    console.print(describe_plan(report))
    if options.plan:
        return 0
    traffic = Traffic(max(options.events, options.faust_events) + int(options.latency_seconds * 200_000), options.seed)
    began = time.monotonic()
    results: dict[str, dict[str, Any]] = {}
    report["results"] = results
    with Ground(traffic) as ground:
        bench = Bench(ground, options, console, report)
        bench.execute()
        report["load_at_end"] = [round(value, 2) for value in os.getloadavg()]
        report["took_minutes"] = (time.monotonic() - began) / 60
        bench.save()
    print_table(console, report)
    console.print(f"took {report['took_minutes']:.0f} minutes; written: {options.out}")
    return 1 if any("error" in result for result in results.values()) else 0


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench", description="Benchmarks of the stream worker.")
    parser.add_argument("--events", type=int, default=1_000_000, help="events for all but Faust (default 1000000)")
    parser.add_argument("--faust-events", type=int, default=20_000, help="events for Faust (default 20000)")
    parser.add_argument("--seed", type=int, default=1)
    names = [scenario.name for scenario in SCENARIOS]
    parser.add_argument("--only", nargs="+", choices=names, default=names, help="run these only")
    parser.add_argument("--no-scaling", action="store_true", help="leave out the runs with 1/4 and 1/2 of the events")
    parser.add_argument("--latency-seconds", type=float, default=LATENCY_SECONDS, help="0 leaves latency out")
    parser.add_argument(
        "--profile", action="store_true", help="profile the worker too: full and mapping, those of --only, in own runs"
    )
    parser.add_argument("--plan", action="store_true", help="only print how many minutes it would take")
    parser.add_argument("--out", type=Path, default=RESULTS / "latest.json")
    options = parser.parse_args()
    if not 8_000 <= options.events <= 4_000_000 or not 1_000 <= options.faust_events <= options.events:
        parser.error("--events must be 8000 to 4000000, --faust-events 1000 to that number")
    if not 0 <= options.latency_seconds <= 120:
        parser.error("--latency-seconds must be 0 to 120")
    return options


class Bench:
    """One run of everything that was chosen; figures go into the report as they come."""

    def __init__(self, ground: Ground, options: argparse.Namespace, console: Console, report: dict[str, Any]) -> None:
        self._ground = ground
        self._options = options
        self._console = console
        self._report = report

    def execute(self) -> None:
        """Every contender on the same whole log, then latency, then ours again on shorter logs, then profiles."""
        only, events = self._options.only, self._options.events
        self._ground.load(RAW, events)
        for scenario in SCENARIOS:
            if scenario.name not in only:
                continue
            if scenario.small and SMALL_RAW not in self._ground.hops:
                self._ground.create_topic(SMALL_RAW)
                self._ground.load(SMALL_RAW, self._options.faust_events)
            self._report["results"][scenario.name] = self._measure(scenario)
            self.save()
        full = self._report["results"].get("full", {})
        if "events_per_second" in full:
            if self._options.latency_seconds:
                self._report["latency"] = {}
                self._measure_latency("half_load", full["events_per_second"] / 2)
                self._measure_latency("low_load", LOW_RATE)
            if not self._options.no_scaling:
                self._scale(full)
        if self._options.profile:
            self._profile()

    def _measure_latency(self, name: str, rate: float) -> None:
        self._tell(f"latency at {name.replace('_', ' ')}, {rate:.0f} events/s")
        seconds = self._options.latency_seconds
        try:
            latency = measure_latency(self._ground, ours_full.SCENARIO, rate=rate, seconds=seconds)
        except BenchBroken as error:
            latency = {"error": str(error)}
            self._console.print(f"latency: {error}", style="red", markup=False)
        self._report["latency"][name] = latency
        self.save()

    def _scale(self, full: dict[str, Any]) -> None:
        """Ours with a quarter and half of the events, beside the whole: CPU per event should not grow."""
        events = self._options.events
        scaling = self._report["scaling"] = {}
        self._empty_log()
        for part in (4, 2):
            self._ground.load(RAW, events // part)
            scaling[str(events // part)] = self._measure(ours_full.SCENARIO)
            self.save()
        scaling[str(events)] = full

    def _empty_log(self) -> None:
        self._ground.wipe(raw=True)
        self._ground.forget_log(RAW)

    def save(self) -> None:
        """Write what is known so far: an interrupted run is not lost."""
        ratios = build_ratios(self._report["results"])
        low = self._report.get("latency", {}).get("low_load", {})
        if "p99_ms" in low:
            ratios["low_load_added_p99_ms"] = low["added_p99_ms"]
            ratios["low_load_p99_ms"] = low["p99_ms"]
        self._report["ratios"] = ratios
        self._report.update(ratios)
        write_report(self._options.out, self._report)

    def _measure(self, scenario: Any) -> dict[str, Any]:
        self._tell(scenario.title)
        try:
            if scenario.output:
                self._ground.wipe()
            figures = Run(self._ground, scenario).execute()
        except (WrongOutput, BenchBroken) as error:
            self._console.print(f"{scenario.name}: {error}", style="red", markup=False)
            return {"title": scenario.title, "error": f"{type(error).__name__}: {error}"}
        self._tell(
            f"  {figures['events']} events right, {figures['events_per_second']:.0f}/s, "
            f"{figures['cpu_per_million']:.1f} CPU s per million"
        )
        return figures

    def _profile(self) -> None:
        """Per-function time of both threads, in runs of their own over the whole log."""
        RESULTS.mkdir(exist_ok=True)
        if len(self._ground.hops.get(RAW, ())) < self._options.events:
            self._empty_log()
            self._ground.load(RAW, self._options.events)
        for scenario in (ours_full.SCENARIO, ours_mapping.SCENARIO):
            if scenario.name not in self._options.only:
                continue
            self._tell(f"profile: {scenario.title}")
            folded = self._ground.folder / f"{scenario.name}.folded"
            self._ground.wipe()
            run = Run(self._ground, scenario, observe=partial(sample, target=folded))
            try:
                figures = run.execute()
            except (WrongOutput, BenchBroken) as error:
                self._console.print(f"profile: {error}", style="red", markup=False)
                continue
            unobserved = self._report["results"].get(scenario.name, {}).get("cpu_per_million")
            self._tell(f"  {figures['cpu_per_million']:.1f} CPU s per million under the profiler"
                       + (f", {unobserved:.1f} without" if unobserved else ""))  # fmt: skip
            summary = write_summary(
                folded.read_text("utf-8"),
                events=figures["measured_events"],
                cpu_per_million=figures["cpu_per_million"],
                threads=figures["threads_cpu_per_million"],
            )
            path = RESULTS / f"profile-{scenario.name}.txt"
            path.write_text(summary, "utf-8")
            self._console.print(f"written: {path}")
            self._console.print(shorten(summary), markup=False, highlight=False)

    def _tell(self, text: str) -> None:
        now = dt.datetime.now(dt.UTC).strftime("%H:%M:%S")
        self._console.print(f"[dim]{now}[/dim] {text}")


def shorten(summary: str, most: int = 15) -> str:
    """A profile's head and, of each thread, the functions that cost most themselves."""
    lines, left = [], most
    for line in summary.splitlines():
        if line.startswith(("==", "itself")):
            left = most
        elif line.startswith("with all"):
            left = 0
        if left > 0:
            lines.append(line)
            left -= 1
    return "\n".join(lines)


def print_table(console: Console, report: dict[str, Any]) -> None:
    """All figures for people."""
    table = Table(title=f"CPU per million events, warm ({report['commit'][:12]}, {report['date']})")
    table.add_column("contender")
    for name in ("events", "events/s", "CPU s/M", "whole run", "broker", "Redis", "peak MiB", "others, cores"):
        table.add_column(name, justify="right")
    rows = list(report["results"].items())
    rows += [(f"full, {count}", figures) for count, figures in report.get("scaling", {}).items()]
    for title, figures in rows:
        if "error" in figures:
            table.add_row(title, *["failed"] * 8)
            continue
        table.add_row(
            title,
            str(figures["events"]),
            f"{figures['events_per_second']:.0f}",
            f"{figures['cpu_per_million']:.1f}",
            f"{figures['whole_run']['cpu_per_million']:.1f}",
            f"{figures['broker_cpu_per_million']:.1f}",
            f"{figures['redis_cpu_per_million']:.1f}",
            f"{figures['peak_rss_mib']:.0f}",
            f"{figures['foreign_cores']:.2f}",
        )
    table.add_row("Redpanda Connect (quoted)", "", "", f"{REDPANDA_CONNECT:.0f}", "", "", "", "", "")
    console.print(table)
    noisy = [title for title, figures in rows if figures.get("foreign_cores", 0.0) > QUIET_CORES]
    if noisy:
        console.print(
            f"[yellow]Not quiet: other processes kept more than {QUIET_CORES} cores busy during {', '.join(noisy)}. "
            "Rates and latencies of these count for little, CPU for less than it looks.[/yellow]"
        )
    for name, latency in report.get("latency", {}).items():
        if "error" not in latency:
            console.print(
                f"{name.replace('_', ' ')}, {latency['events_per_second']:.0f} events/s: "
                + "; ".join(
                    f"{title} p50 {latency[f'{prefix}p50_ms']:.0f} ms, p99 {latency[f'{prefix}p99_ms']:.0f} ms"
                    for prefix, title in LATENCIES.items()
                )
                + f"; the sender was late by up to {latency['worst_delay_of_sender_ms']:.0f} ms"
            )
    for name, ratio in report["ratios"].items():
        floor, goal = FLOORS.get(name, (None, None))
        console.print(f"{name}: {ratio:.3f}{judge(ratio, floor, goal)}")


if __name__ == "__main__":
    sys.exit(main())

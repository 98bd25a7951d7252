"""Does memory stay flat: ``python -m bench.soak``. The shipped worker, full path, at a steady rate for minutes.

Private memory (RssAnon) is what a leak would show in. RssFile is apart: the pages of the local stores that this process
has touched; they belong to the system's cache, grow with the store, and are given back when others need memory.
Writes ``bench/results/soak.json``. Exit code 0 when memory is flat and every event came out right, else 1.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import sys
import time
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.collector import watch_collector
from bench.ground import RAW, BenchBroken, Ground
from bench.meter import Meter, find_percentile, read_busy
from bench.outputs import WrongOutput
from bench.plan import CHECK_SECONDS, START_SECONDS
from bench.report import describe_machine, describe_plan, write_report
from bench.scenario import check_output
from bench.scenarios import ours_full
from bench.trend import average_blocks, find_steps, fit_slope
from bench.webhooks import Traffic
from topics import catalog

if TYPE_CHECKING:
    from collections.abc import Iterator
    from subprocess import Popen

RESULTS = Path(__file__).with_name("results") / "soak.json"
SAMPLE_SECONDS = 5.0
BLOCK_SECONDS = 30.0
LIMIT_BYTES = 1.0
"""Private memory may grow by less than this per event: the smallest object Python can lose is 16 bytes."""

STEP_MIB = 0.5
"""A rise of private memory from one block to the next that is told apart, with the backlog of that time."""

LAG_SECONDS = 5.0
"""A worker further behind than this many seconds of traffic is not at a steady rate: its queues fill, up to a bound."""


def main() -> int:
    """Exit code: see above."""
    options = parse_options()
    count = int(options.rate * options.minutes * 60)
    head = describe_machine("bench.soak", count)
    head["planned_minutes"] = (START_SECONDS + count * CHECK_SECONDS) / 60 + options.minutes
    print(f"{describe_plan(head)}; {count} events at {options.rate:.0f} a second", flush=True)
    with Ground(Traffic(count)) as ground:
        report = head | Soak(ground, options, count).execute()
    write_report(options.out, report)
    print_report(report)
    print(f"written: {options.out}")
    return 0 if report["verdict"] == "flat" and report["output"] == "right" else 1


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.soak", description=__doc__)
    parser.add_argument("--minutes", type=float, default=20.0)
    parser.add_argument("--warm-minutes", type=float, default=3.0, help="readings before this do not count")
    parser.add_argument("--rate", type=float, default=3000.0, help="events a second (default 3000)")
    parser.add_argument("--collector", default="shipped", help="shipped, python, off or a first threshold")
    parser.add_argument("--out", type=Path, default=RESULTS)
    options = parser.parse_args()
    if options.minutes * 60 < options.warm_minutes * 60 + 3 * BLOCK_SECONDS:
        parser.error(f"--minutes must be {3 * BLOCK_SECONDS / 60:g} more than --warm-minutes")
    return options


class Soak:
    """One soak: a sender and the worker, both watched."""

    def __init__(self, ground: Ground, options: argparse.Namespace, count: int) -> None:
        self._ground = ground
        self._options = options
        self._count = count
        self._collector = ground.folder / "collector.json"
        self._readings: list[dict[str, float]] = []

    def execute(self) -> dict[str, Any]:
        """The report. Raises ``BenchBroken`` when the worker ends or stays behind."""
        ground = self._ground
        before = ground.read_ends(RAW)
        command = watch_collector(ours_full.build_command(ground, {}), self._collector, self._options.collector)
        worker = ground.start(command)
        pace = {"bootstrap": ground.bootstrap, "raw": RAW, "first": 0, "last": self._count, "rate": self._options.rate}
        began, busy = time.monotonic(), read_busy()
        sender = ground.start(
            [sys.executable, "-m", "bench.programs.pace", json.dumps(pace | {"prepare": False, "now": False})],
            pipe=True,
        )
        meter = Meter([worker.pid])
        self._watch(worker, sender, began)
        assert sender.stdout is not None
        sent = json.loads(sender.stdout.read())
        if sent["sent"] != self._count:
            raise BenchBroken(f"{sent['sent']} of {self._count} events were sent")
        ground.await_committed(worker, ours_full.SCENARIO.group)
        cpu, seconds = meter.read_cpu(), time.monotonic() - began
        busy = (read_busy() - busy) / seconds
        ground.stop(worker)
        ground.note_hops(RAW, before, self._count)
        return self._build_report(worker.returncode, cpu, busy, sent)

    def _watch(self, worker: Popen[bytes], sender: Popen[bytes], began: float) -> None:
        """A reading every few seconds until the sender is done."""
        told = 0.0
        with contextlib.closing(self._ground.watch(ours_full.SCENARIO.group, RAW)) as progress:
            while sender.poll() is None:
                if worker.poll() is not None:
                    raise BenchBroken(f"the worker ended:\n{self._ground.read_log(worker)}")
                at = time.monotonic() - began
                reading = {"at": at, **read_memory(worker.pid), "lag": float(progress.count_lag(RAW))}
                self._readings.append(reading)
                if at - told >= 60:
                    told = at
                    print(f"{at / 60:5.1f} min  private {reading['anon_mib']:6.1f} MiB  "
                          f"mapped {reading['file_mib']:6.1f} MiB  lag {reading['lag']:.0f}", flush=True)  # fmt: skip
                time.sleep(SAMPLE_SECONDS)

    def _check(self) -> str:
        """``right``, or what is wrong with the output."""
        try:
            check_output(self._ground, ours_full.SCENARIO, catalog.PAYMENTS)
        except WrongOutput as error:
            return str(error)
        return "right"

    def _build_report(self, code: int, cpu: float, busy: float, sent: dict[str, Any]) -> dict[str, Any]:
        counted = [one for one in self._readings if one["at"] >= self._options.warm_minutes * 60]
        hourly = self._options.rate * 3600
        slopes = {}
        for name in ("anon_mib", "file_mib"):
            blocks = average_blocks([(one["at"] / 3600, one[name]) for one in counted], BLOCK_SECONDS / 3600)
            slopes[name] = asdict(fit_slope(blocks))
        anon = slopes["anon_mib"]
        limit = LIMIT_BYTES * hourly / 2**20
        lags = sorted(one["lag"] for one in counted)
        lag = lags[-1]
        if lag > LAG_SECONDS * self._options.rate:
            verdict = "the worker was behind: fetched records filled its queues"
        else:
            verdict = "flat" if anon["high"] < limit else "grows" if anon["low"] > limit else "too short to tell"
        collector = json.loads(self._collector.read_text("ascii"))
        spent = sum(generation["seconds"] for generation in collector["generations"])
        return {
            "events_per_second": self._count / sent["seconds"],
            "output": self._check(),
            "exit_code": code,
            "verdict": verdict,
            "limit_mib_per_hour": limit,
            "private_mib_per_hour": anon,
            "private_bytes_per_event": anon["value"] * 2**20 / hourly,
            "mapped_mib_per_hour": slopes["file_mib"],
            "private_mib_first_counted": counted[0]["anon_mib"],
            "private_mib_last": counted[-1]["anon_mib"],
            "private_mib_peak": max(one["anon_mib"] for one in counted),
            "threads_last": counted[-1]["threads"],
            "largest_lag": lag,
            "lag_p50": find_percentile(lags, 0.5),
            "lag_p99": find_percentile(lags, 0.99),
            "steps": describe_steps(counted),
            "cpu_per_million": cpu / self._count * 1e6,
            "collector": collector,
            "collector_cpu_per_million": spent / self._count * 1e6,
            "collector_share_of_cpu": spent / cpu,
            "busy_cores_of_machine": busy,
            "load": [round(value, 2) for value in os.getloadavg()],
            "readings": [{name: round(value, 2) for name, value in one.items()} for one in self._readings],
        }


def describe_steps(readings: list[dict[str, float]]) -> list[dict[str, float]]:
    """Steps of private memory: minute, height in MiB, and the largest backlog in that block and the one before."""
    blocks = average_blocks([(one["at"], one["anon_mib"]) for one in readings], BLOCK_SECONDS)
    steps = []
    for at, height in find_steps(blocks, STEP_MIB):
        near = [one["lag"] for one in readings if -1.5 * BLOCK_SECONDS <= one["at"] - at <= BLOCK_SECONDS / 2]
        steps.append({"minute": at / 60, "mib": height, "largest_lag": max(near)})
    return steps


def read_memory(pid: int) -> dict[str, float]:
    """Private and mapped resident MiB, and the number of threads, of a process (Linux)."""
    fields = dict(_split(Path(f"/proc/{pid}/status").read_text("utf-8")))
    return {
        "anon_mib": float(fields["RssAnon"].split()[0]) / 1024,
        "file_mib": float(fields["RssFile"].split()[0]) / 1024,
        "threads": float(fields["Threads"]),
    }


def _split(text: str) -> Iterator[tuple[str, str]]:
    for line in text.splitlines():
        name, _, value = line.partition(":")
        yield name, value.strip()


def print_report(report: dict[str, Any]) -> None:
    """The figures for people."""
    anon, mapped, collector = report["private_mib_per_hour"], report["mapped_mib_per_hour"], report["collector"]
    print(f"output: {report['output']}; exit code {report['exit_code']}")
    print(f"backlog: half of the readings below {report['lag_p50']:.0f} records, 99 % below {report['lag_p99']:.0f}, "
          f"largest {report['largest_lag']:.0f}")  # fmt: skip
    print(
        f"private memory: {report['private_mib_last']:.1f} MiB, {anon['value']:+.1f} MiB/h "
        f"(95 %: {anon['low']:+.1f} to {anon['high']:+.1f}), {report['private_bytes_per_event']:+.2f} bytes an event; "
        f"limit {report['limit_mib_per_hour']:.1f} MiB/h: {report['verdict']}"
    )
    steps = (f"{one['mib']:+.1f} MiB at minute {one['minute']:.1f} (backlog up to {one['largest_lag']:.0f})"
             for one in report["steps"])  # fmt: skip
    print(f"steps above {STEP_MIB} MiB: {', '.join(steps) or 'none'}")
    print(f"pages of local stores in memory: {mapped['value']:+.1f} MiB/h")
    runs = ", ".join(
        f"{one['collections']} of generation {number} "
        f"(longest {one['longest'] * 1000:.1f} ms, {one['collected']} freed)"
        for number, one in enumerate(collector["generations"])
    )
    print(
        f"collector: {runs}; {report['collector_share_of_cpu']:.1%} of CPU; "
        f"thresholds {collector['thresholds']}, {collector['frozen']} objects frozen, "
        f"{collector['uncollectable']} uncollectable"
    )
    print(
        f"CPU s per million: {report['cpu_per_million']:.1f}, of it the collector "
        f"{report['collector_cpu_per_million']:.1f}; busy cores of the machine {report['busy_cores_of_machine']:.2f}"
    )


if __name__ == "__main__":
    sys.exit(main())

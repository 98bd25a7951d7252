"""What Python's garbage collector costs the worker: ``python -m bench.collector``. Prints one line a setting.

The full path in the shipped worker: with the shipped thresholds, with Python's own, with others, without a collector.
"""

from __future__ import annotations

import argparse
import json
import sys
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from bench.ground import RAW, Ground
from bench.scenario import Run
from bench.scenarios import ours_full
from bench.webhooks import Traffic

if TYPE_CHECKING:
    from pathlib import Path

MODES = ("shipped", "python", "200000", "off")


def main() -> int:
    """Exit code 0, or a traceback: a run with wrong output has no line."""
    parser = argparse.ArgumentParser(prog="python -m bench.collector", description=__doc__)
    parser.add_argument("--events", type=int, default=100_000)
    parser.add_argument("--modes", nargs="+", default=MODES, help="shipped, python, off, or a first threshold")
    options = parser.parse_args()
    print(f"{'collector':>10} {'CPU s/M':>8} {'of it GC':>8} {'events/s':>8} {'peak MiB':>8}  collections (longest)")
    with Ground(Traffic(options.events)) as ground:
        ground.load(RAW, options.events)
        for mode in options.modes:
            ground.wipe()
            print_line(mode, *measure(ground, mode))
    return 0


def measure(ground: Ground, mode: str) -> tuple[dict[str, Any], dict[str, Any]]:
    """Figures of one run, and the report of its collector."""
    target = ground.folder / f"collector-{mode}.json"

    def build_command(ground: Ground, arguments: dict[str, Any]) -> list[str]:
        return watch_collector(ours_full.build_command(ground, arguments), target, mode)

    figures = Run(ground, replace(ours_full.SCENARIO, command=build_command)).execute()
    return figures, json.loads(target.read_text("ascii"))


def watch_collector(command: list[str], target: Path, mode: str) -> list[str]:
    """The same worker, started by ``programs/collected_worker.py``."""
    python, _, _, *arguments = command
    return [python, "-m", "bench.programs.collected_worker", str(target), mode, *arguments]


def print_line(mode: str, figures: dict[str, Any], report: dict[str, Any]) -> None:
    """One setting. The collector's time is that of the whole run, start included; the rest is warm."""
    spent = sum(generation["seconds"] for generation in report["generations"])
    runs = ", ".join(f"{one['collections']} ({one['longest'] * 1000:.0f} ms)" for one in report["generations"])
    print(
        f"{mode:>10} {figures['cpu_per_million']:8.1f} {spent / figures['events'] * 1e6:8.1f} "
        f"{figures['events_per_second']:8.0f} {figures['peak_rss_mib']:8.0f}  {runs}",
        flush=True,
    )


if __name__ == "__main__":
    sys.exit(main())

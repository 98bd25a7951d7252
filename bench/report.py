"""The reports all benches write: on what machine they ran, what they planned, how figures stand to their limits."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from bench.ground import ROOT

if TYPE_CHECKING:
    from collections.abc import Sequence

QUIET_CORES = 0.2
"""Cores that other processes may keep busy before a table says that the machine was not quiet."""


def describe_machine(program: str, events: int) -> dict[str, Any]:
    """Head of a report: what runs, where, when and on which commit of the worker's packages."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True, check=False)
    changed = subprocess.run(
        ["git", "status", "--porcelain", "schemas", "streams", "topics", "identity", "runtime", "telemetry"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    return {
        "command": describe_command(program, sys.argv[1:]),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "machine": f"{platform.system()} {platform.machine()}, {read_processor()}",
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_start": [round(value, 2) for value in os.getloadavg()],
        "events": events,
    }


def describe_command(program: str, arguments: Sequence[str]) -> str:
    """The command that gives these figures again; without ``--out``, which names a place on this machine."""
    kept = [one for one in arguments if not one.startswith("--out=")]
    if "--out" in kept:
        at = kept.index("--out")
        del kept[at : at + 2]
    return " ".join([f"python -m {program}", *kept])


def read_processor() -> str:
    """Name of the processor, where the system tells."""
    try:
        lines = Path("/proc/cpuinfo").read_text("utf-8").splitlines()
    except OSError:
        return platform.processor()
    return next((line.partition(":")[2].strip() for line in lines if line.startswith("model name")), "unknown")


def describe_plan(report: dict[str, Any]) -> str:
    """The first line a bench prints."""
    return (
        f"planned: {report['planned_minutes']:.0f} minutes on a quiet machine; "
        f"load now {report['load_at_start'][0]:.1f}, {report['processors']} processors"
    )


def judge(value: float, floor: float | None, goal: float | None, *, least: bool = False) -> str:
    """How a figure stands to its floor and goal, in words: its largest values, or with ``least`` its smallest."""
    return "".join(
        f"  {name} {limit:g} {'met' if (value >= limit if least else value <= limit) else 'MISSED'}"
        for name, limit in (("floor", floor), ("goal", goal))
        if limit is not None
    )


def read_report(path: Path) -> dict[str, Any]:
    """A report written before; empty without a readable one."""
    try:
        report: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return report


def write_report(path: Path, report: dict[str, Any]) -> None:
    """Replace a report."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n", "utf-8")

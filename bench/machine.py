"""The machine a bench runs on: what a reader must know of it to judge the figures."""

from __future__ import annotations

import datetime as dt
import json
import os
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

from bench.ground import ROOT

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
        "command": " ".join([f"python -m {program}", *sys.argv[1:]]),
        "date": dt.datetime.now(dt.UTC).isoformat(timespec="seconds"),
        "commit": commit.stdout.strip() + ("+changes" if changed.stdout.strip() else ""),
        "machine": f"{platform.system()} {platform.machine()}, {read_processor()}",
        "processors": os.cpu_count(),
        "python": platform.python_version(),
        "load_at_start": [round(value, 2) for value in os.getloadavg()],
        "events": events,
    }


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


def read_last(path: Path) -> dict[str, Any]:
    """Results of the last run kept here; empty without."""
    try:
        last: dict[str, Any] = json.loads(path.read_text("utf-8"))
    except (OSError, ValueError):
        return {}
    return last

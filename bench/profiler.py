"""Where a running process spends its time: py-spy from outside, summed up by function.

Only samples that hold the interpreter lock count: an idle thread is not work. What C threads cost stands in the meter.
"""

from __future__ import annotations

import subprocess
from collections import Counter
from typing import TYPE_CHECKING

from bench.environments import ensure_environment

if TYPE_CHECKING:
    from pathlib import Path

SECONDS = 15
RATE = 200


def record_profile(pid: int, target: Path) -> None:
    """Sample a process for some seconds; ``target`` gets one line a stack with its number of samples."""
    program = ensure_environment("profile").with_name("py-spy")
    command = [str(program), "record", "--pid", str(pid), "--duration", str(SECONDS), "--rate", str(RATE)]
    subprocess.run([*command, "--gil", "--format", "raw", "--output", str(target)], check=True, capture_output=True)


def sum_up(folded: str) -> tuple[int, Counter[str], Counter[str]]:
    """Samples in all, by function itself, and by function with all it calls (recursion counted once)."""
    total = 0
    own: Counter[str] = Counter()
    whole: Counter[str] = Counter()
    for line in folded.splitlines():
        stack, _, number = line.rpartition(" ")
        if not stack:
            continue
        samples = int(number)
        frames = [_name(frame) for frame in stack.split(";") if not frame.startswith(("thread ", "process "))]
        total += samples
        if frames:
            own[frames[-1]] += samples
        for frame in set(frames):
            whole[frame] += samples
    return total, own, whole


def write_summary(folded: str, most: int = 40) -> str:
    """The two lists as text, in percent of all samples."""
    total, own, whole = sum_up(folded)
    lines = [f"{total} samples at {RATE} a second"]
    for title, counter in (("itself", own), ("with all it calls", whole)):
        lines += ["", title]
        lines += [f"{100 * samples / total:6.1f} %  {name}" for name, samples in counter.most_common(most)]
    return "\n".join(lines) + "\n"


def _name(frame: str) -> str:
    """``function (path/file.py:12)`` without the line."""
    place, _, line = frame.rpartition(":")
    return f"{place})" if place and line.rstrip(")").isdigit() else frame

"""Where a running process spends its time: py-spy from outside, summed up by thread and function.

Only samples that hold the interpreter lock count: an idle thread is not work. The rest of a thread's CPU is C code
outside the lock (librdkafka, compression, LMDB's commit); the summary shows it beside them. A collection of the garbage
collector is counted under the function that set it off. Cython and C functions count under their Python caller.
"""

from __future__ import annotations

import contextlib
import signal
import subprocess
from collections import Counter, defaultdict
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from bench.environments import ensure_environment
from bench.ground import BenchBroken

if TYPE_CHECKING:
    from collections.abc import Iterator
    from pathlib import Path

RATE = 200
"""Samples a second. The process stands still for each, so its rate falls; its CPU hardly changes."""

MOST = 40
"""Functions a list shows."""


@dataclass(slots=True)
class Samples:
    """Samples of one thread: in all, by function itself, and by function with all it calls (recursion counted once)."""

    total: int = 0
    own: Counter[str] = field(default_factory=Counter)
    whole: Counter[str] = field(default_factory=Counter)


@contextlib.contextmanager
def sample(pid: int, target: Path) -> Iterator[None]:
    """Sample a process inside the context; ``target`` then has one line a stack with its number of samples."""
    program = ensure_environment("profile").with_name("py-spy")
    command = [str(program), "record", "--pid", str(pid), "--rate", str(RATE), "--gil", "--threads"]
    sampler = subprocess.Popen(
        [*command, "--format", "raw", "--output", str(target)],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    assert sampler.stdout is not None
    try:
        if "Sampling process" not in sampler.stdout.readline():
            raise BenchBroken(f"py-spy cannot look at the process: {sampler.stdout.read()}")
        yield
    finally:
        sampler.send_signal(signal.SIGINT)
        sampler.communicate(timeout=60)
    if sampler.returncode != 0 or not target.exists():
        raise BenchBroken("py-spy wrote nothing")


def sum_up(folded: str) -> dict[str, Samples]:
    """Samples by thread name."""
    threads: dict[str, Samples] = defaultdict(Samples)
    for line in folded.splitlines():
        stack, _, number = line.rpartition(" ")
        if not stack:
            continue
        count = int(number)
        thread, frames = "all", []
        for frame in stack.split(";"):
            if frame.startswith("thread ("):
                thread = frame.partition("): ")[2] or "without a name"
            elif not frame.startswith("process "):
                frames.append(_name(frame))
        samples = threads[thread]
        samples.total += count
        if frames:
            samples.own[frames[-1]] += count
        for name in set(frames):
            samples.whole[name] += count
    return dict(threads)


def write_summary(folded: str, *, events: float, cpu_per_million: float, threads: dict[str, float]) -> str:
    """Microseconds an event by thread and function, beside what the system says of each thread (CPU s per million).

    ``events`` is the number of events worked off while samples were taken. On a crowded machine a thread is seen with
    the lock while it waits for a core: shares are right then, times are scaled to the CPU of the threads.
    """
    if events <= 0:
        raise ValueError("no events")
    found = sum_up(folded)
    total = sum(samples.total for samples in found.values())
    cost = 1e6 / RATE / events
    python = sum(cpu for name, cpu in threads.items() if name.startswith("python"))
    crowded = 0 < python < total * cost
    if crowded:
        cost = python / total
    lines = [
        f"{total} samples at {RATE} a second over {events:.0f} events, holding the interpreter lock."
        + (
            " Scaled to the CPU of Python's threads: the machine was busy, they waited with the lock."
            if crowded
            else ""
        ),
        f"us an event: {total * cost:.1f} with the lock, {cpu_per_million:.1f} of CPU in all. CPU by system thread:",
        *(f"{cpu:8.2f}  {name}" for name, cpu in threads.items()),
    ]
    for thread, samples in sorted(found.items(), key=lambda item: -item[1].total):
        if samples.total * 100 < total:
            continue
        lines += ["", f"== {thread}: {samples.total * cost:.1f} us an event"]
        for title, counter in (("itself", samples.own), ("with all it calls", samples.whole)):
            lines += ["", f"{title}, us an event"]
            lines += [f"{count * cost:8.2f}  {name}" for name, count in counter.most_common(MOST)]
    return "\n".join(lines) + "\n"


def _name(frame: str) -> str:
    """``function (path/file.py:12)`` without the line."""
    place, _, line = frame.rpartition(":")
    return f"{place})" if place and line.rstrip(")").isdigit() else frame

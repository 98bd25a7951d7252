"""CPU, memory and progress of exactly the processes of one contender."""

from __future__ import annotations

import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import psutil

if TYPE_CHECKING:
    from collections.abc import Iterable


class Meter:
    """CPU seconds (user and system) and memory of some processes with all their children."""

    def __init__(self, pids: Iterable[int]) -> None:
        self._roots = [psutil.Process(pid) for pid in pids]
        self.peak_rss = 0

    def read_cpu(self) -> float:
        """CPU seconds so far, dead children that were waited for included."""
        total = 0.0
        for process in self._list():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                total += times.user + times.system
                total += getattr(times, "children_user", 0.0) + getattr(times, "children_system", 0.0)
        return total

    def read_shares(self) -> dict[int, float]:
        """CPU seconds so far of each process alive, by its id, without its children."""
        shares = {}
        for process in self._list():
            with contextlib.suppress(psutil.NoSuchProcess):
                times = process.cpu_times()
                shares[process.pid] = times.user + times.system
        return shares

    def read_rss(self) -> int:
        """Resident bytes now; ``peak_rss`` keeps the largest value seen."""
        total = 0
        for process in self._list():
            with contextlib.suppress(psutil.NoSuchProcess):
                total += process.memory_info().rss
        self.peak_rss = max(self.peak_rss, total)
        return total

    def read_threads(self) -> dict[str, float]:
        """CPU seconds by thread name, where the system names threads (Linux); Python's are named by a number."""
        total: dict[str, float] = {}
        for process in self._list():
            with contextlib.suppress(psutil.NoSuchProcess, OSError):
                for thread in process.threads():
                    name = Path(f"/proc/{process.pid}/task/{thread.id}/comm").read_text("utf-8").strip()
                    label = f"{name} {thread.id - process.pid}" if name.startswith("python") else name
                    total[label] = total.get(label, 0.0) + thread.user_time + thread.system_time
        return total

    def _list(self) -> list[psutil.Process]:
        found = []
        for root in self._roots:
            with contextlib.suppress(psutil.NoSuchProcess):
                found += [root, *root.children(recursive=True)]
        return found


@dataclass(frozen=True, slots=True)
class Mark:
    """One reading: steady seconds, events written so far, CPU seconds of the contender, of the broker, of Redis."""

    at: float
    events: int
    cpu: float
    broker: float
    redis: float
    threads: dict[str, float] = field(default_factory=dict)
    shares: dict[int, float] = field(default_factory=dict)
    """CPU seconds of each process of the contender."""
    others: float = 0.0
    """CPU seconds of the whole machine outside contender, broker, Redis and bench."""


def compare_marks(first: Mark, last: Mark) -> dict[str, float]:
    """Rates between two readings; ``foreign_cores`` is how many cores the rest of the machine kept busy.

    Raises ``ValueError`` when nothing was written between them.
    """
    events = last.events - first.events
    seconds = last.at - first.at
    if events <= 0 or seconds <= 0:
        raise ValueError("nothing happened between the two readings")
    return {
        "events_per_second": events / seconds,
        "cpu_per_million": (last.cpu - first.cpu) / events * 1e6,
        "broker_cpu_per_million": (last.broker - first.broker) / events * 1e6,
        "redis_cpu_per_million": (last.redis - first.redis) / events * 1e6,
        "foreign_cores": max(0.0, last.others - first.others) / seconds,
    }


def compare_threads(first: Mark, last: Mark) -> dict[str, float]:
    """CPU seconds per million events of each thread between two readings, largest first; those below 0.1 left out."""
    events = last.events - first.events
    spent = {name: (cpu - first.threads.get(name, 0.0)) / events * 1e6 for name, cpu in last.threads.items()}
    return {name: round(cpu, 2) for name, cpu in sorted(spent.items(), key=lambda item: -item[1]) if cpu >= 0.1}


def read_busy() -> float:
    """CPU seconds all cores of the machine were not idle so far."""
    times = psutil.cpu_times()
    waited = getattr(times, "iowait", 0.0)
    # Linux counts the time of guests in user and nice already.
    guests = getattr(times, "guest", 0.0) + getattr(times, "guest_nice", 0.0)
    return float(sum(times) - times.idle - waited - guests)


def find_percentile(ordered: list[float], share: float) -> float:
    """The value below or at which this share of an ordered, non-empty list lies (nearest rank)."""
    if not ordered:
        raise ValueError("no values")
    rank = max(1, -(-len(ordered) * round(share * 1000) // 1000))
    return ordered[rank - 1]


def build_ratios(results: dict[str, dict[str, Any]]) -> dict[str, float]:
    """The comparisons the budgets speak of, of those contenders that have a result (CPU per event, warm).

    The same with ``_whole_run``: start-up, cold caches and the compiling of a JVM count.
    """
    wanted = {
        # Mapping only against the same work in Java; the full path against contenders that only map.
        "cpu_per_event_vs_kafka_streams": ("mapping", "kafka-streams"),
        "full_cpu_per_event_vs_kafka_streams": ("full", "kafka-streams"),
        "cpu_per_event_vs_kafka_streams_documented": ("mapping", "kafka-streams-documented"),
        "full_cpu_per_event_vs_kafka_streams_documented": ("full", "kafka-streams-documented"),
        "cpu_per_event_vs_quixstreams": ("full", "quixstreams"),
        "mapping_cpu_per_event_vs_quixstreams": ("mapping", "quixstreams"),
        "cpu_per_event_vs_quixstreams_documented": ("full", "quixstreams-documented"),
        "cpu_per_event_vs_faust": ("full", "faust"),
        "cpu_per_event_vs_faust_tuned": ("full", "faust-tuned"),
        "cpu_per_event_two_processes": ("two-processes", "full"),
        "bound_cpu_per_event_vs_kafka_streams": ("bound", "kafka-streams"),
        "full_bound_cpu_per_event_vs_quixstreams": ("bound-full", "quixstreams"),
        "mapping_bound_ratio": ("mapping", "bound"),
        "full_bound_ratio": ("full", "bound-full"),
        "passthrough_ratio": ("full", "passthrough"),
        "mapping_passthrough_ratio": ("mapping", "passthrough"),
    }
    ratios = {}
    for name, (ours, other) in wanted.items():
        if "cpu_per_million" in results.get(ours, {}) and "cpu_per_million" in results.get(other, {}):
            warm, against = results[ours], results[other]
            ratios[name] = warm["cpu_per_million"] / against["cpu_per_million"]
            ratios[f"{name}_whole_run"] = warm["whole_run"]["cpu_per_million"] / against["whole_run"]["cpu_per_million"]
    return ratios

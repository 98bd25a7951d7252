"""One contender: what is started, where its output goes, and how it is measured."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.ground import PARTITIONS, RAW, SMALL_RAW, BenchBroken, Ground
from bench.meter import Mark, Meter, compare_marks, compare_threads
from bench.outputs import SCHEMA, Checker, WrongOutput, read_records
from topics import catalog

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from subprocess import Popen

WARM_FROM = 0.25
"""CPU and rate are taken from this share of the events on: start-up and warming up are told apart."""

LEAST_SHARED = 0.25
"""Part of the events during which all processes must have had partitions and work, where there are several."""

_POLL_SECONDS = 0.1
_STALL_SECONDS = 120.0

MUST_BE_EMPTY = (catalog.DLQ, catalog.REVIEWS, catalog.DISPOSITIONS, catalog.SETTLEMENTS)


@dataclass(frozen=True, slots=True, kw_only=True)
class Scenario:
    """``command`` gives the process to start from the program's arguments; it may take its time to prepare."""

    name: str
    title: str
    group: str
    command: Callable[[Ground, dict[str, Any]], list[str]]
    output: str = ""
    """Empty: a topic of its own. Otherwise the product's."""
    transactional: bool
    """Done when the offsets are committed (exactly once), or when all is written (at least once)."""
    check: Literal["mapped", "enriched", "copied", "constant"] = "mapped"
    small: bool = False
    """Gets the small input only, because it is slow."""
    processes: int = 1
    """That many must share the work: readings count from the moment on at which all have partitions."""

    @property
    def raw(self) -> str:
        """The raw log it reads."""
        return SMALL_RAW if self.small else RAW


@dataclass(frozen=True, slots=True)
class Window:
    """Readings of a run: its start, warm, the last at which all processes had work, and its end."""

    start: Mark
    warm: Mark
    last: Mark
    end: Mark


@dataclass(slots=True)
class Run:
    """A contender at work: started, observed, stopped, checked.

    ``observe`` is entered with its pid once it is warm, before the first reading that counts, and left after the last.
    """

    ground: Ground
    scenario: Scenario
    observe: Callable[[int], AbstractContextManager[None]] | None = None

    def execute(self) -> dict[str, Any]:
        """Figures of one run. Raises ``WrongOutput`` or ``BenchBroken``."""
        ground, scenario = self.ground, self.scenario
        output = scenario.output or f"bench.{scenario.name}"
        if not scenario.output:
            ground.create_topic(output)
        arguments: dict[str, Any] = {
            "bootstrap": ground.bootstrap,
            "raw": scenario.raw,
            "raw_id": ground.find_topic_id(scenario.raw),
            "output": output,
            "group": scenario.group,
            "schema": str(SCHEMA),
            "schema_id": ground.schema_ids[f"{catalog.PAYMENTS}-value"],
            "mapping_version": ground.mapping_version,
            "scratch": str(ground.folder / "scratch" / scenario.name),
        }
        Path(arguments["scratch"]).mkdir(parents=True, exist_ok=True)
        process = ground.start(scenario.command(ground, arguments))
        meter = Meter([process.pid])
        try:
            window = self._follow(process, meter, output)
        finally:
            ground.stop(process)
        count = check_output(ground, scenario, output)
        result = {
            "title": scenario.title,
            "events": count,
            "measured_events": window.last.events - window.warm.events,
            **compare_marks(window.warm, window.last),
            "whole_run": compare_marks(replace(window.start, cpu=0.0), window.end),
            "threads_cpu_per_million": compare_threads(window.warm, window.last),
            "peak_rss_mib": meter.peak_rss / 2**20,
            "load": [round(value, 2) for value in os.getloadavg()],
        }
        if scenario.processes > 1:
            result["shares_cpu_seconds"] = compare_shares(window.warm, window.last, scenario.processes)
        if not scenario.output:
            ground.delete_topics([output])
        return result

    def _follow(self, process: Popen[bytes], meter: Meter, output: str) -> Window:
        """Readings at the start, when warm, when the first process ran out of work, and at the end."""
        ground, scenario = self.ground, self.scenario
        observed = contextlib.ExitStack()
        ends = ground.read_ends(scenario.raw)
        total = sum(ends.values())
        start = ground.read_mark(meter, 0)
        warm: Mark | None = None
        last: Mark | None = None
        owners: list[frozenset[int]] = []
        with observed, contextlib.closing(ground.watch(scenario.group, output)) as progress:
            written, moved = 0, time.monotonic()
            while True:
                reached = progress.read_ends()
                if sum(reached.values()) != written:
                    written, moved = sum(reached.values()), time.monotonic()
                if process.poll() is not None or time.monotonic() - moved > _STALL_SECONDS:
                    raise BenchBroken(f"{scenario.name} stopped at {written}:\n{ground.read_log(process)}")
                if warm is None and written >= total * WARM_FROM:
                    owners = self._find_owners()
                if warm is None and owners:
                    if self.observe is not None:
                        observed.enter_context(self.observe(process.pid))
                    warm = ground.read_mark(meter, progress.count_written())
                if last is None and scenario.processes > 1 and has_idle_process(owners, reached, ends):
                    last = ground.read_mark(meter, progress.count_written())
                done = progress.has_committed(scenario.raw, ends) if scenario.transactional else written >= total
                if written >= total and done:
                    end = ground.read_mark(meter, total)
                    return self._build_window(start, warm, last, end)
                meter.read_rss()
                time.sleep(_POLL_SECONDS)

    def _find_owners(self) -> list[frozenset[int]]:
        """Partitions of the raw log by process that has some; empty as long as fewer have than should."""
        scenario = self.scenario
        if scenario.processes == 1:
            return [frozenset(range(PARTITIONS))]
        owners = self.ground.find_owners(scenario.group, scenario.raw)
        return owners if len(owners) == scenario.processes else []

    def _build_window(self, start: Mark, warm: Mark | None, last: Mark | None, end: Mark) -> Window:
        if self.scenario.processes == 1:
            if warm is None or warm.events >= end.events:
                raise BenchBroken("too few events: it was done before it was looked at")
            return Window(start, warm, end, end)
        shared = 0 if warm is None or last is None else last.events - warm.events
        if warm is None or last is None or shared < end.events * LEAST_SHARED:
            raise BenchBroken(f"the processes worked side by side for {shared} of {end.events} events only")
        return Window(start, warm, last, end)


def check_output(ground: Ground, scenario: Scenario, output: str) -> int:
    """Compare all that a contender wrote; number of events. Raises ``WrongOutput``."""
    checker = Checker(
        ground.traffic,
        ground.hops[scenario.raw],
        topic_id=ground.find_topic_id(scenario.raw),
        mapping_version=ground.mapping_version,
        schema_id=ground.schema_ids[f"{catalog.PAYMENTS}-value"],
    )
    records = read_records(ground.bootstrap, output)
    if scenario.check == "copied":
        return checker.check_copies(records)
    full = [topic for topic in MUST_BE_EMPTY if scenario.output and any(ground.read_ends(topic).values())]
    if full:
        raise WrongOutput(f"there are records in {', '.join(full)}")
    if scenario.check == "constant":
        return checker.check_constants(records)
    return checker.check_events(records, enriched=scenario.check == "enriched")


def has_idle_process(owners: list[frozenset[int]], reached: dict[int, int], ends: dict[int, int]) -> bool:
    """Whether a process has written all of its partitions, so that from now on others work alone.

    Raw log and output have the same partitions: a payment's key is that of its record.
    """
    return any(all(reached[partition] >= ends[partition] for partition in owned) for owned in owners)


def compare_shares(warm: Mark, last: Mark, processes: int) -> list[float]:
    """CPU seconds of each process between two readings, largest first. Raises ``BenchBroken`` when one did little."""
    spent = [cpu - warm.shares.get(pid, 0.0) for pid, cpu in last.shares.items()]
    shares = sorted(spent, reverse=True)[:processes]
    if len(shares) < processes or shares[-1] < sum(shares) / processes / 4:
        raise BenchBroken(f"the work was not shared: {', '.join(f'{share:.1f} CPU s' for share in shares)}")
    return shares


def dump_arguments(arguments: dict[str, Any]) -> str:
    """Arguments of a program, as it takes them."""
    return json.dumps(arguments)

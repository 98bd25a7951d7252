"""One contender: what is started, where its output goes, and how it is measured."""

from __future__ import annotations

import contextlib
import json
import os
import time
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from bench.ground import RAW, SMALL_RAW, BenchBroken, Ground
from bench.meter import Mark, Meter, compare_marks, compare_threads
from bench.outputs import SCHEMA, Checker, WrongOutput, read_records
from topics import catalog

if TYPE_CHECKING:
    from collections.abc import Callable
    from contextlib import AbstractContextManager
    from subprocess import Popen

WARM_FROM = 0.25
"""CPU and rate are taken from this share of the events on: start-up and warming up are told apart."""

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
    check: Literal["mapped", "enriched", "copied"] = "mapped"
    small: bool = False
    """Gets the small input only, because it is slow."""
    processes: int = 1
    """That many must share the work."""

    @property
    def raw(self) -> str:
        """The raw log it reads."""
        return SMALL_RAW if self.small else RAW


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
            first, last = self._follow(process, meter, output)
        finally:
            ground.stop(process)
        count = self._check(output)
        result = {
            "title": scenario.title,
            "events": count,
            "measured_events": last.events - first[1].events,
            **compare_marks(first[1], last),
            "whole_run": compare_marks(replace(first[0], cpu=0.0), last),
            "threads_cpu_per_million": compare_threads(first[1], last),
            "peak_rss_mib": meter.peak_rss / 2**20,
            "load": [round(value, 2) for value in os.getloadavg()],
        }
        if scenario.processes > 1:
            spent = [cpu - first[1].shares.get(pid, 0.0) for pid, cpu in last.shares.items()]
            shares = sorted(spent, reverse=True)[: scenario.processes]
            result["shares_cpu_seconds"] = shares
            if len(shares) < scenario.processes or shares[-1] < sum(shares) / scenario.processes / 4:
                raise BenchBroken(f"the work was not shared: {', '.join(f'{share:.1f} CPU s' for share in shares)}")
        if not scenario.output:
            ground.delete_topics([output])
        return result

    def _follow(self, process: Popen[bytes], meter: Meter, output: str) -> tuple[tuple[Mark, Mark], Mark]:
        """Readings at the start, when warm, and at the end."""
        ground, scenario = self.ground, self.scenario
        observed = contextlib.ExitStack()
        ends = ground.read_ends(scenario.raw)
        total = sum(ends.values())
        start = ground.read_mark(meter, 0)
        warm: Mark | None = None
        with observed, contextlib.closing(ground.watch(scenario.group, output)) as progress:
            written, moved = 0, time.monotonic()
            while True:
                now = progress.count_written()
                if now != written:
                    written, moved = now, time.monotonic()
                if process.poll() is not None or time.monotonic() - moved > _STALL_SECONDS:
                    raise BenchBroken(f"{scenario.name} stopped at {written}:\n{ground.read_log(process)}")
                if warm is None and written >= total * WARM_FROM:
                    if self.observe is not None:
                        observed.enter_context(self.observe(process.pid))
                    warm = ground.read_mark(meter, progress.count_written())
                done = progress.has_committed(scenario.raw, ends) if scenario.transactional else written >= total
                if written >= total and done:
                    last = ground.read_mark(meter, total)
                    if warm is None or warm.events >= total:
                        raise BenchBroken("too few events: it was done before it was looked at")
                    return (start, warm), last
                meter.read_rss()
                time.sleep(_POLL_SECONDS)

    def _check(self, output: str) -> int:
        ground, scenario = self.ground, self.scenario
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
        if scenario.output:
            for topic in MUST_BE_EMPTY:
                if any(ground.read_ends(topic).values()):
                    raise WrongOutput(f"there are records in {topic}")
        return checker.check_events(records, enriched=scenario.check == "enriched")


def dump_arguments(arguments: dict[str, Any]) -> str:
    """Arguments of a program, as it takes them."""
    return json.dumps(arguments)

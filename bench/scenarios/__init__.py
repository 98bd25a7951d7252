"""The contenders, one a file, in the order in which they run."""

from __future__ import annotations

from typing import TYPE_CHECKING

from bench.scenarios import (
    bound,
    faust_stock,
    kafka_streams,
    ours_full,
    ours_mapping,
    ours_two_processes,
    passthrough,
    quix,
)

if TYPE_CHECKING:
    from bench.scenario import Scenario

SCENARIOS: tuple[Scenario, ...] = (
    ours_full.SCENARIO,
    ours_mapping.SCENARIO,
    kafka_streams.SCENARIO,
    kafka_streams.DOCUMENTED,
    quix.SCENARIO,
    quix.DOCUMENTED,
    faust_stock.SCENARIO,
    faust_stock.TUNED,
    passthrough.SCENARIO,
    bound.SCENARIO,
    bound.FULL,
    ours_two_processes.SCENARIO,
)

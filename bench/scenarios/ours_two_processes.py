"""Ours, the full path in two worker processes that share the partitions: what a second core costs per event."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench.scenario import Scenario
from runtime.account import WORKER_GROUP
from topics import catalog

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(ground: Ground, _arguments: dict[str, Any]) -> list[str]:
    """``remitstream worker --processes 2``."""
    return [sys.executable, "-m", "runtime.cli", "worker", "--processes", "2", *ground.settings.list_arguments()]


SCENARIO = Scenario(
    name="two-processes",
    title="ours, full path in two processes",
    group=WORKER_GROUP,
    command=build_command,
    output=catalog.PAYMENTS,
    transactional=True,
    check="enriched",
    processes=2,
)

"""Ours, the full path: the shipped worker process with shipped settings (normalise, MRN, dedupe, exactly once)."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench.scenario import Scenario
from runtime.account import WORKER_GROUP
from topics import catalog

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(ground: Ground, _arguments: dict[str, Any]) -> list[str]:
    """``remitstream worker``."""
    return [sys.executable, "-m", "runtime.cli", "worker", *ground.settings.list_arguments()]


SCENARIO = Scenario(
    name="full",
    title="ours: normalise + MRN + dedupe, exactly once",
    group=WORKER_GROUP,
    command=build_command,
    output=catalog.PAYMENTS,
    transactional=True,
    check="enriched",
)

"""Ours, mapping only: the shipped worker with a decider that only maps.

``programs/mapping_only.py`` says what exactly is left out.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench.scenario import Scenario
from runtime.account import WORKER_GROUP
from topics import catalog

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(ground: Ground, _arguments: dict[str, Any]) -> list[str]:
    """The worker with its decider replaced."""
    return [sys.executable, "-m", "bench.programs.mapping_only", *ground.settings.list_arguments()]


SCENARIO = Scenario(
    name="mapping",
    title="ours: mapping only, exactly once",
    group=WORKER_GROUP,
    command=build_command,
    output=catalog.PAYMENTS,
    transactional=True,
)

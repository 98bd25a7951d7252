"""What confluent-kafka alone costs: records are read and ready-made ones written, in the worker's transactions.

``bound`` writes a canonical event for each, as mapping only does; ``bound-full`` the two changelog records too, as the
full path does.
"""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench.outputs import build_constant
from bench.scenario import Scenario, dump_arguments
from topics import catalog

if TYPE_CHECKING:
    from bench.ground import Ground

BATCH = 500
CHANGELOGS = {catalog.name_seen("stripe"): 74, catalog.name_lineage("stripe"): 115}
"""Bytes of a value: with the key of the raw record as many as the worker's key and value."""


def build_command(ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """One record for each."""
    return start(ground, arguments, {})


def build_full_command(ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """Three records for each."""
    return start(ground, arguments, CHANGELOGS)


def start(ground: Ground, arguments: dict[str, Any], changelogs: dict[str, int]) -> list[str]:
    """The command itself."""
    value, headers = build_constant(ground.traffic, ground.mapping_version, arguments["schema_id"])
    written = {"value": value.hex(), "headers": [(name, text.hex()) for name, text in headers]}
    program = dump_arguments(arguments | written | {"batch": BATCH, "changelogs": changelogs})
    return [sys.executable, "-m", "bench.programs.bound", program]


SCENARIO = Scenario(
    name="bound",
    title="bound of mapping only: read, write a ready-made event",
    group="bench-bound",
    command=build_command,
    transactional=True,
    check="constant",
)

FULL = Scenario(
    name="bound-full",
    title="bound of the full path: read, write three ready-made records",
    group="bench-bound-full",
    command=build_full_command,
    output=catalog.PAYMENTS,
    transactional=True,
    check="constant",
)

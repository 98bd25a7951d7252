"""Faust as shipped, doing only the mapping, at least once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.environments import PROGRAMS, ensure_environment
from bench.scenario import Scenario, dump_arguments

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program in its own environment."""
    return [str(ensure_environment("faust")), str(PROGRAMS / "faust_stock.py"), dump_arguments(arguments)]


SCENARIO = Scenario(
    name="faust",
    title="Faust as shipped: mapping only, at least once",
    group="bench-faust",
    command=build_command,
    transactional=False,
    small=True,
)

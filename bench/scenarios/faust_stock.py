"""Faust as shipped, and with its producer tuned, doing only the mapping, at least once."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.environments import PROGRAMS, ensure_environment
from bench.scenario import Scenario, dump_arguments

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program in its own environment."""
    return start(arguments | {"tuned": False})


def build_tuned_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The same with larger batches of its producer."""
    return start(arguments | {"tuned": True})


def start(arguments: dict[str, Any]) -> list[str]:
    """The command itself."""
    return [str(ensure_environment("faust")), str(PROGRAMS / "faust_stock.py"), dump_arguments(arguments)]


SCENARIO = Scenario(
    name="faust",
    title="Faust as shipped: mapping only, at least once",
    group="bench-faust",
    command=build_command,
    transactional=False,
    small=True,
)

TUNED = Scenario(
    name="faust-tuned",
    title="Faust, its producer tuned: mapping only, at least once",
    group="bench-faust-tuned",
    command=build_tuned_command,
    transactional=False,
    small=True,
)

"""quixstreams doing only the mapping, at least once as it is shipped: given bytes, and as its documentation shows."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.environments import PROGRAMS, ensure_environment
from bench.scenario import Scenario, dump_arguments

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program in its own environment."""
    return [str(ensure_environment("quixstreams")), str(PROGRAMS / "quix.py"), dump_arguments(arguments)]


def build_documented_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program that follows its documentation."""
    return [str(ensure_environment("quixstreams")), str(PROGRAMS / "quix_documented.py"), dump_arguments(arguments)]


SCENARIO = Scenario(
    name="quixstreams",
    title="quixstreams, bytes in and out: mapping only, at least once",
    group="bench-quixstreams",
    command=build_command,
    transactional=False,
)

DOCUMENTED = Scenario(
    name="quixstreams-documented",
    title="quixstreams, its own JSON and Avro: mapping only, at least once",
    group="bench-quixstreams-documented",
    command=build_documented_command,
    transactional=False,
)

"""quixstreams doing only the mapping, at least once as it is shipped."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.environments import PROGRAMS, ensure_environment
from bench.scenario import Scenario, dump_arguments

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program in its own environment."""
    return [str(ensure_environment("quixstreams")), str(PROGRAMS / "quix.py"), dump_arguments(arguments)]


SCENARIO = Scenario(
    name="quixstreams",
    title="quixstreams: mapping only, at least once",
    group="bench-quixstreams",
    command=build_command,
    transactional=False,
)

"""librdkafka alone: records copied in transactions. What Kafka itself costs a Python process."""

from __future__ import annotations

import sys
from typing import TYPE_CHECKING, Any

from bench.scenario import Scenario, dump_arguments

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program in our environment."""
    return [sys.executable, "-m", "bench.programs.passthrough", dump_arguments(arguments)]


SCENARIO = Scenario(
    name="passthrough",
    title="librdkafka pass-through in transactions",
    group="bench-passthrough",
    command=build_command,
    transactional=True,
    check="copied",
)

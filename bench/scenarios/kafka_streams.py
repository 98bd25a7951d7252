"""Kafka Streams (Java) doing the same mapping, ``exactly_once_v2``, one stream thread."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.environments import ensure_java_program
from bench.scenario import Scenario

if TYPE_CHECKING:
    from bench.ground import Ground


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The compiled program."""
    names = ("bootstrap", "raw", "output", "group", "raw_id", "schema_id", "mapping_version", "scratch")
    return [*ensure_java_program(), *(str(arguments[name]) for name in names)]


SCENARIO = Scenario(
    name="kafka-streams",
    title="Kafka Streams (Java): mapping only, exactly once",
    group="bench-kafka-streams",
    command=build_command,
    transactional=True,
)

"""Kafka Streams (Java) doing only the mapping, ``exactly_once_v2``, one stream thread: by hand, and as documented."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from bench.environments import ensure_java_program
from bench.scenario import Scenario

if TYPE_CHECKING:
    from bench.ground import Ground

NAMES = ("bootstrap", "raw", "output", "group", "raw_id", "schema_id", "mapping_version", "scratch", "schema")
"""Arguments of both programs, in their order."""


def build_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program made by hand to be fast."""
    return start("kafka-streams", "MoneyMapping", arguments)


def build_documented_command(_ground: Ground, arguments: dict[str, Any]) -> list[str]:
    """The program with Jackson's data binding and Avro's own encoder."""
    return start("kafka-streams-documented", "DocumentedMapping", arguments)


def start(part: str, main: str, arguments: dict[str, Any]) -> list[str]:
    """The command itself."""
    return [*ensure_java_program(part, main), *(str(arguments[name]) for name in NAMES)]


SCENARIO = Scenario(
    name="kafka-streams",
    title="Kafka Streams (Java), by hand: mapping only, exactly once",
    group="bench-kafka-streams",
    command=build_command,
    transactional=True,
)

DOCUMENTED = Scenario(
    name="kafka-streams-documented",
    title="Kafka Streams (Java), Jackson and Avro: mapping only, exactly once",
    group="bench-kafka-streams-documented",
    command=build_documented_command,
    transactional=True,
)

"""Reads a contender's output and compares every event with what it must be."""

from __future__ import annotations

import io
import json
import struct
from pathlib import Path
from typing import TYPE_CHECKING, Any

import fastavro
from confluent_kafka import Consumer, TopicPartition

from bench.webhooks import expect_event, expect_headers, read_number

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from bench.webhooks import Headers, Traffic

SCHEMA = Path(__file__).parents[1] / "schemas" / "money_event.avsc"
_PATIENCE = 30.0


class WrongOutput(Exception):
    """A contender wrote something else than it had to; its time counts for nothing."""


def parse_schema() -> Any:
    """The committed schema, without logical types: times stay milliseconds."""
    text = SCHEMA.read_text("utf-8")
    return fastavro.parse_schema(
        json.loads(text, object_hook=lambda member: {k: v for k, v in member.items() if k != "logicalType"})
    )


def build_frame(schema_id: int) -> bytes:
    """What precedes the Avro body of a value."""
    return struct.pack(">bI", 0, schema_id)


def build_constant(traffic: Traffic, mapping_version: str, schema_id: int) -> tuple[bytes, Headers]:
    """Value and headers of an event of the real size, made once: event 0, as if it lay at a place far into the log."""
    hop = f"{'x' * 22}:0:100000"
    event = expect_event(traffic.draw(0), hop=hop, mapping_version=mapping_version, enriched=True)
    out = io.BytesIO()
    fastavro.schemaless_writer(out, parse_schema(), event)
    return build_frame(schema_id) + out.getvalue(), expect_headers(event)


class Checker:
    """Compares records with expectations: each event exactly once, whole, with key and headers."""

    def __init__(
        self, traffic: Traffic, hops: list[tuple[int, int]], *, topic_id: str, mapping_version: str, schema_id: int
    ) -> None:
        self._traffic = traffic
        self._hops = hops
        self._topic_id = topic_id
        self._mapping_version = mapping_version
        self._schema_id = schema_id
        self._frame = build_frame(schema_id)
        self._schema = parse_schema()

    def check_events(self, records: Iterable[tuple[bytes, bytes, Headers]], *, enriched: bool) -> int:
        """Check canonical events; return their number. Raises ``WrongOutput``."""
        seen = bytearray(len(self._hops))
        for key, value, headers in records:
            if value[:5] != self._frame:
                raise WrongOutput("a value is not framed with the registered schema")
            event: Any = fastavro.schemaless_reader(io.BytesIO(value[5:]), self._schema, None)
            number = self._take(seen, event["object_id"])
            partition, offset = self._hops[number]
            expected = expect_event(
                self._traffic.draw(number),
                hop=f"{self._topic_id}:{partition}:{offset}",
                mapping_version=self._mapping_version,
                enriched=enriched,
            )
            if event != expected:
                names = [name for name in expected if event.get(name) != expected[name]]
                raise WrongOutput(f"event {number} differs in {', '.join(names)}")
            if key != expected["root"].encode() or sorted(headers) != sorted(expect_headers(expected)):
                raise WrongOutput(f"event {number} has a wrong key or wrong headers")
        return self._count(seen)

    def check_copies(self, records: Iterable[tuple[bytes, bytes, Headers]]) -> int:
        """Check records handed through unchanged; return their number. Raises ``WrongOutput``."""
        seen = bytearray(len(self._hops))
        for key, value, _ in records:
            number = self._take(seen, json.loads(value)["data"]["object"]["id"])
            fact = self._traffic.draw(number)
            if value != self._traffic.write_body(fact) or key != fact.root.encode():
                raise WrongOutput(f"record {number} was changed")
        return self._count(seen)

    def check_constants(self, records: Iterable[tuple[bytes, bytes, Headers]]) -> int:
        """Check that one ready-made event was written for each record; return their number. Raises ``WrongOutput``."""
        expected = build_constant(self._traffic, self._mapping_version, self._schema_id)
        seen = bytearray(len(self._hops))
        for key, value, headers in records:
            number = self._take(seen, key.decode().partition("/")[2])
            if (value, headers) != expected:
                raise WrongOutput(f"record {number} is not the ready-made one")
        return self._count(seen)

    def _take(self, seen: bytearray, object_id: str) -> int:
        number = read_number(object_id)
        if not 0 <= number < len(seen):
            raise WrongOutput(f"event {number} was never sent")
        if seen[number]:
            raise WrongOutput(f"event {number} came twice")
        seen[number] = 1
        return number

    @staticmethod
    def _count(seen: bytearray) -> int:
        if not all(seen):
            raise WrongOutput(f"{seen.count(0)} events are missing, event {seen.index(0)} first")
        return len(seen)


def read_records(bootstrap: str, topic: str) -> Iterator[tuple[bytes, bytes, Headers]]:
    """Every committed record of a topic, up to its end now. Raises ``WrongOutput`` when the end is not reached."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": "bench-check",
            "enable.auto.commit": False,
            "enable.partition.eof": True,
            "isolation.level": "read_committed",
            "auto.offset.reset": "earliest",
        }
    )
    try:
        left = set(consumer.list_topics(topic, timeout=20).topics[topic].partitions)
        consumer.assign([TopicPartition(topic, partition, 0) for partition in left])
        while left:
            first = consumer.poll(_PATIENCE)
            if first is None:
                raise WrongOutput(f"{topic} cannot be read to its end")
            messages = [first, *consumer.consume(5000, 0)]
            for message in messages:
                if message.error() is None:
                    yield message.key(), message.value(), message.headers() or []
                else:
                    left.discard(message.partition())
    finally:
        consumer.close()

"""The two clients of the programs that only hand records on, in transactions."""

from __future__ import annotations

from typing import Any

from confluent_kafka import Consumer, Producer


def open_clients(
    arguments: dict[str, Any], reading: dict[str, Any] | None = None, writing: dict[str, Any] | None = None
) -> tuple[Consumer, Producer]:
    """A consumer of the raw topic from its begin and a transactional producer, ready; more settings for each."""
    consumer = Consumer(
        {
            "bootstrap.servers": arguments["bootstrap"],
            "group.id": arguments["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 20,
        }
        | (reading or {})
    )
    producer = Producer(
        {
            "bootstrap.servers": arguments["bootstrap"],
            "transactional.id": arguments["group"],
            "linger.ms": 5,
            "compression.type": "lz4",
            "partitioner": "murmur2_random",
        }
        | (writing or {})
    )
    producer.init_transactions(30)
    consumer.subscribe([arguments["raw"]])
    return consumer, producer

"""Sends webhooks at a steady rate, each with the time it was sent as its ingest time, or with the drawn one."""

from __future__ import annotations

import json
import sys
import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import Producer

from bench.webhooks import Traffic

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from bench.webhooks import Fact

TICK = 0.005


def main() -> None:
    """Send events ``first`` to ``last`` at ``rate`` a second; print how far behind the plan the slowest tick was.

    Bodies are written before the start (``prepare``, for latencies) or while sending (long runs). ``now`` says which
    ingest time is sent.
    """
    arguments = json.loads(sys.argv[1])
    traffic = Traffic(arguments["last"])
    producer = Producer(
        {"bootstrap.servers": arguments["bootstrap"], "partitioner": "murmur2_random", "enable.idempotence": True}
        | {"compression.type": "lz4", "linger.ms": 1, "log_level": 2}
    )
    numbers = range(arguments["first"], arguments["last"])
    bodies = ((fact, traffic.write_body(fact)) for fact in map(traffic.draw, numbers))
    if arguments["prepare"]:
        bodies = iter(list(bodies))
    sent, seconds, late = send(producer, bodies, len(numbers), arguments, traffic.write_headers)
    sys.stdout.write(json.dumps({"sent": sent, "seconds": seconds, "latest_tick": late}))


def send(
    producer: Producer,
    bodies: Iterator[tuple[Fact, bytes]],
    count: int,
    arguments: dict[str, Any],
    write_headers: Callable[[Fact, bytes, int | None], Any],
) -> tuple[int, float, float]:
    """How many were sent and acknowledged, in how many seconds, and the largest delay in seconds."""
    topic, rate, now = arguments["raw"], arguments["rate"], arguments["now"]
    began, sent, late = time.monotonic(), 0, 0.0
    while sent < count:
        due = min(count, int((time.monotonic() - began) * rate))
        while sent < due:
            fact, body = next(bodies)
            headers = write_headers(fact, body, time.time_ns() // 1_000_000 if now else None)
            producer.produce(topic, body, fact.root.encode(), headers=headers)
            sent += 1
        producer.poll(0)
        late = max(late, time.monotonic() - began - sent / rate)
        time.sleep(TICK)
    left = producer.flush(30)
    return sent - left, time.monotonic() - began, late


if __name__ == "__main__":
    main()

"""Sends webhooks at a steady rate, each with the time it was sent as its ingest time."""

from __future__ import annotations

import json
import sys
import time

from confluent_kafka import Producer

from bench.webhooks import Traffic

TICK = 0.005


def main() -> None:
    """Send events ``first`` to ``last`` at ``rate`` a second; print how far behind the plan the slowest tick was."""
    arguments = json.loads(sys.argv[1])
    traffic = Traffic(arguments["last"])
    producer = Producer({"bootstrap.servers": arguments["bootstrap"], "partitioner": "murmur2_random",
                         "compression.type": "lz4", "linger.ms": 1})  # fmt: skip
    number, last, rate = arguments["first"], arguments["last"], arguments["rate"]
    prepared = [(fact, traffic.write_body(fact)) for fact in map(traffic.draw, range(number, last))]
    began, sent, late = time.monotonic(), 0, 0.0
    while sent < len(prepared):
        due = min(len(prepared), int((time.monotonic() - began) * rate))
        for fact, body in prepared[sent:due]:
            headers = traffic.write_headers(fact, body, time.time_ns() // 1_000_000)
            producer.produce(arguments["raw"], body, fact.root.encode(), headers=headers)
        sent = max(sent, due)
        producer.poll(0)
        late = max(late, time.monotonic() - began - sent / rate)
        time.sleep(TICK)
    left = producer.flush(30)
    sys.stdout.write(json.dumps({"sent": sent - left, "seconds": time.monotonic() - began, "latest_tick": late}))


if __name__ == "__main__":
    main()

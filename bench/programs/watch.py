"""A read_committed subscriber of the canonical topic: how old is each event when it becomes visible."""

from __future__ import annotations

import json
import sys
import time

from confluent_kafka import Consumer, TopicPartition


def main() -> None:
    """Read ``count`` events from the given offsets on; print their ages in milliseconds, ordered."""
    arguments = json.loads(sys.argv[1])
    consumer = Consumer(
        {
            "bootstrap.servers": arguments["bootstrap"],
            "group.id": "bench-watch",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "auto.offset.reset": "error",
            "fetch.wait.max.ms": 5,
        }
    )
    consumer.assign(
        [TopicPartition(arguments["topic"], int(partition), offset) for partition, offset in arguments["from"].items()]
    )
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    ages: list[float] = []
    deadline = time.monotonic() + arguments["seconds"]
    while len(ages) < arguments["count"] and time.monotonic() < deadline:
        first = consumer.poll(0.1)
        if first is None:
            continue
        messages = [first, *consumer.consume(4999, 0)]
        now = time.time_ns() / 1e6
        for message in messages:
            if message.error() is not None:
                raise SystemExit(message.error().name())
            ages.append(now - int(dict(message.headers())["ingest_time"]))
    consumer.close()
    sys.stdout.write(json.dumps(sorted(ages)))


if __name__ == "__main__":
    main()

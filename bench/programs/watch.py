"""A read_committed subscriber of the raw log and of the canonical topic: how old is each record when it is visible."""

from __future__ import annotations

import json
import sys
import time

from confluent_kafka import Consumer, TopicPartition


def main() -> None:
    """Read ``count`` records of each topic from the given offsets on; print three lists of milliseconds, ordered.

    ``raw``: age of a raw record, from the time its sender stamped; ``canonical``: age of its event; ``added``: from raw
    record visible to event visible, event by event. Both are read by one consumer, so its own delay is in both.
    """
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
    raw_topic, topic = arguments["raw"], arguments["topic"]
    consumer.assign(
        [
            TopicPartition(name, int(partition), offset)
            for name, begins in arguments["from"].items()
            for partition, offset in begins.items()
        ]
    )
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    # By key, which is one event's alone: when it was seen, and when its sender stamped it.
    raw: dict[bytes, float] = {}
    canonical: dict[bytes, tuple[float, float]] = {}
    count, deadline = arguments["count"], time.monotonic() + arguments["seconds"]
    while (len(raw) < count or len(canonical) < count) and time.monotonic() < deadline:
        first = consumer.poll(0.1)
        if first is None:
            continue
        messages = [first, *consumer.consume(4999, 0)]
        now = time.time_ns() / 1e6
        for message in messages:
            if message.error() is not None:
                raise SystemExit(message.error().name())
            if message.topic() == raw_topic:
                raw[message.key()] = now
            elif message.topic() == topic:
                canonical[message.key()] = now, float(dict(message.headers())["ingest_time"])
    consumer.close()
    both = [(raw[key], seen, stamped) for key, (seen, stamped) in canonical.items() if key in raw]
    report = {
        "raw": sorted(visible - stamped for visible, _, stamped in both),
        "canonical": sorted(seen - stamped for _, seen, stamped in both),
        "added": sorted(seen - visible for visible, seen, _ in both),
    }
    sys.stdout.write(json.dumps(report))


if __name__ == "__main__":
    main()

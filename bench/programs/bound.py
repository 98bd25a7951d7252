"""What the packages alone cost a Python process: each record is read, and ready-made records are written.

Nothing is mapped, looked up or kept; no Faust, no event loop, one thread. Transactions are the worker's: as many
records, the same settings, flushed before the offsets are sent. A worker's own work comes on top.
"""

from __future__ import annotations

import gc
import json
import signal
import sys

from confluent_kafka import TopicPartition

from bench.programs.clients import open_clients


def main() -> None:
    """Run until SIGTERM."""
    arguments = json.loads(sys.argv[1])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    consumer, producer = open_clients(
        arguments,
        {"fetch.queue.backoff.ms": 10, "queued.max.messages.kbytes": 32_768},
        {"queue.buffering.max.messages": 500_000},
    )
    output, batch = arguments["output"], arguments["batch"]
    value = bytes.fromhex(arguments["value"])
    headers = [(name, bytes.fromhex(text)) for name, text in arguments["headers"]]
    changelogs = [(topic, b"." * size) for topic, size in arguments["changelogs"].items()]
    gc.set_threshold(200_000, 20, 20)
    while not stopped:
        first = consumer.poll(0.1)
        if first is None:
            continue
        positions: dict[tuple[str, int], int] = {}
        producer.begin_transaction()
        for message in [first, *consumer.consume(batch - 1, 0)]:
            if message.error() is not None:
                raise SystemExit(message.error().name())
            message.value()
            message.headers()
            key, partition = message.key(), message.partition()
            producer.produce(output, value, key, headers=headers)
            for topic, entry in changelogs:
                producer.produce(topic, entry, key, partition)
            positions[message.topic(), partition] = message.offset() + 1
        offsets = [TopicPartition(topic, partition, offset) for (topic, partition), offset in positions.items()]
        producer.flush(8.0)
        producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata())
        producer.commit_transaction()
    consumer.close()


if __name__ == "__main__":
    main()

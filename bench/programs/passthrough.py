"""librdkafka alone: batches handed from topic to topic in transactions, nothing looked at. The cost of Kafka itself."""

from __future__ import annotations

import json
import signal
import sys

from confluent_kafka import Consumer, Producer, TopicPartition

BATCH = 2000


def main() -> None:
    """Run until SIGTERM."""
    arguments = json.loads(sys.argv[1])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    consumer = Consumer(
        {
            "bootstrap.servers": arguments["bootstrap"],
            "group.id": arguments["group"],
            "auto.offset.reset": "earliest",
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "fetch.wait.max.ms": 20,
        }
    )
    producer = Producer(
        {
            "bootstrap.servers": arguments["bootstrap"],
            "transactional.id": arguments["group"],
            "linger.ms": 5,
            "compression.type": "lz4",
            "partitioner": "murmur2_random",
        }
    )
    producer.init_transactions(30)
    consumer.subscribe([arguments["raw"]])
    while not stopped:
        first = consumer.poll(0.1)
        if first is None:
            continue
        messages = [first, *consumer.consume(BATCH - 1, 0)]
        positions: dict[tuple[str, int], int] = {}
        producer.begin_transaction()
        for message in messages:
            if message.error() is not None:
                raise SystemExit(message.error().name())
            while True:
                try:
                    producer.produce(arguments["output"], message.value(), message.key(), headers=message.headers())
                except BufferError:
                    producer.poll(0.05)
                else:
                    break
            positions[message.topic(), message.partition()] = message.offset() + 1
        offsets = [TopicPartition(topic, partition, offset) for (topic, partition), offset in positions.items()]
        producer.send_offsets_to_transaction(offsets, consumer.consumer_group_metadata())
        producer.commit_transaction()
    consumer.close()


if __name__ == "__main__":
    main()

"""librdkafka alone: batches handed from topic to topic in transactions, nothing looked at. The cost of Kafka itself."""

from __future__ import annotations

import json
import signal
import sys

from confluent_kafka import TopicPartition

from bench.programs.clients import open_clients

BATCH = 2000


def main() -> None:
    """Run until SIGTERM."""
    arguments = json.loads(sys.argv[1])
    stopped = []
    signal.signal(signal.SIGTERM, lambda *_: stopped.append(True))
    consumer, producer = open_clients(arguments)
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

"""The publisher on a real broker."""

from __future__ import annotations

import asyncio
import uuid

import pytest
from confluent_kafka import Consumer, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from tests.ports import find_ports
from topics import publisher as module
from topics.cluster import KafkaSettings, KafkaUnreachable
from topics.publisher import Publisher

pytestmark = pytest.mark.integration


@pytest.fixture
def topic(stack):
    name = f"t{uuid.uuid4().hex[:12]}"
    admin = AdminClient({"bootstrap.servers": stack.kafka_bootstrap})  # kept: its futures fail when it goes
    admin.create_topics([NewTopic(name, 1, 1)])[name].result(20)
    return name


def read(bootstrap, topic):
    """The values of the only partition, from the beginning to its end."""
    consumer = Consumer({"bootstrap.servers": bootstrap, "group.id": uuid.uuid4().hex, "enable.auto.commit": False})
    place = TopicPartition(topic, 0, 0)
    try:
        _, end = consumer.get_watermark_offsets(place, timeout=20)
        consumer.assign([place])
        return [message.value() for message in consumer.consume(end, timeout=20)] if end else []
    finally:
        consumer.close()


async def test_it_goes_on_when_its_client_has_lost_the_brokers(stack, topic, monkeypatch):
    """The first client knows only an address where nobody listens, as one that lost its brokers for good."""
    made = []

    def build(configuration):
        made.append(configuration)
        if len(made) == 1:
            nowhere = {"bootstrap.servers": f"127.0.0.1:{find_ports()}"}
            return Producer(configuration | nowhere | {"delivery.timeout.ms": 500, "request.timeout.ms": 500})
        monkeypatch.setattr(module, "SILENT_SECONDS", 30.0)  # a loaded machine may let the second wait
        return Producer(configuration)

    monkeypatch.setattr(module, "Producer", build)
    monkeypatch.setattr(module, "SILENT_SECONDS", 0.5)
    publisher = Publisher(KafkaSettings(bootstrap=stack.kafka_bootstrap), "publisher-test", timeout_seconds=30.0)
    accepted, refused = [], []
    try:
        async with asyncio.timeout(60):
            while len(accepted) < 3:
                value = f"{len(accepted) + len(refused)}".encode()
                try:
                    await publisher.publish(topic, b"k", value, [("h", b"1")])
                except KafkaUnreachable:
                    refused.append(value)
                else:
                    accepted.append(value)
        assert await asyncio.to_thread(publisher.is_connected, 20.0)
    finally:
        await asyncio.to_thread(publisher.close)
    assert refused
    assert await asyncio.to_thread(read, stack.kafka_bootstrap, topic) == accepted
    assert len(made) == 2

"""The embedded stack on the real parts: what it promises about data, ports and processes."""

import json
import os
import shutil
import signal
import socket
import subprocess
import tempfile
import urllib.request
import uuid
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient, NewTopic

from runtime.stack import EmbeddedStack, embedded
from runtime.stack.errors import PortTakenError
from tests.stacks import CACHE, choose_ports

pytestmark = pytest.mark.integration

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="module")
def stack():
    # a short path of its own: the tests kill components, which nobody else's stack should suffer
    home = Path(tempfile.mkdtemp(prefix="rs-", dir="/tmp"))
    stack = EmbeddedStack(home, CACHE, ports=choose_ports())
    try:
        stack.up()
        yield stack
    finally:
        stack.reset()
        shutil.rmtree(home)


@pytest.fixture
def running(stack):
    """The stack with everything up, whatever the test before did to it."""
    addresses = stack.up()
    yield addresses
    stack.up()


def call_registry(url, path, body=None):
    request = urllib.request.Request(  # noqa: S310 - the address of our own stack
        url + path,
        data=None if body is None else json.dumps(body).encode(),
        headers={"Content-Type": "application/vnd.schemaregistry.v1+json"},
    )
    with DIRECT.open(request, timeout=10) as answer:
        return json.load(answer)


def register(url, subject, schema):
    return call_registry(url, f"/subjects/{subject}/versions", {"schema": json.dumps(schema)})["id"]


def make_topic(bootstrap):
    name = f"t{uuid.uuid4().hex[:12]}"
    admin = AdminClient({"bootstrap.servers": bootstrap})
    admin.create_topics([NewTopic(name, 1, 1)])[name].result(20)
    return name


def make_producer(bootstrap, **settings):
    producer = Producer(
        {"bootstrap.servers": bootstrap, "acks": "all", "transactional.id": "t1", "log_level": 2, **settings}
    )
    producer.init_transactions(30)
    return producer


def write(producer, topic, values, *, commit):
    producer.begin_transaction()
    for value in values:
        producer.produce(topic, value)
    if commit:
        producer.commit_transaction(30)
    else:
        producer.flush(30)
        producer.abort_transaction(30)


def read_all(bootstrap, topic):
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": uuid.uuid4().hex,
            "enable.auto.commit": False,
            "isolation.level": "read_committed",
            "enable.partition.eof": True,
        }
    )
    consumer.assign([TopicPartition(topic, 0, 0)])
    values = []
    try:
        while True:
            message = consumer.poll(20)
            assert message is not None, "the broker did not answer"
            if message.error():
                if message.error().code() == KafkaError._PARTITION_EOF:
                    return values
                raise KafkaException(message.error())
            values.append(message.value())
    finally:
        consumer.close()


def talk_to_redis(url, *lines):
    host, port = url.removeprefix("redis://").removesuffix("/0").split(":")
    with socket.create_connection((host, int(port)), 5) as link:
        answers = []
        for line in lines:
            link.sendall(line + b"\r\n")
            answers.append(link.recv(256))
    return answers


def test_a_transaction_is_seen_whole_or_not_at_all(running):
    topic = make_topic(running.kafka_bootstrap)
    producer = make_producer(running.kafka_bootstrap)
    write(producer, topic, [b"a", b"b"], commit=True)
    write(producer, topic, [b"never"], commit=False)
    write(producer, topic, [b"c"], commit=True)
    assert read_all(running.kafka_bootstrap, topic) == [b"a", b"b", b"c"]


def test_the_broker_makes_no_topic_by_itself(running):
    producer = Producer({"bootstrap.servers": running.kafka_bootstrap, "message.timeout.ms": 3000})
    errors = []
    producer.produce("never-declared", b"x", on_delivery=lambda error, _: errors.append(error))
    producer.flush(10)
    assert errors
    assert errors[0] is not None
    admin = AdminClient({"bootstrap.servers": running.kafka_bootstrap})
    assert "never-declared" not in admin.list_topics(timeout=10).topics


def test_a_member_with_a_session_of_six_seconds_is_let_in(running):
    topic = make_topic(running.kafka_bootstrap)
    for protocol in (
        {"group.protocol": "classic", "session.timeout.ms": 6000, "heartbeat.interval.ms": 1000},
        {"group.protocol": "consumer"},
    ):
        assigned = []
        consumer = Consumer(
            {
                "bootstrap.servers": running.kafka_bootstrap,
                "group.id": uuid.uuid4().hex,
                "auto.offset.reset": "earliest",
                **protocol,
            }
        )
        consumer.subscribe([topic], on_assign=lambda _, partitions, into=assigned: into.extend(partitions))
        for _ in range(100):
            message = consumer.poll(0.2)
            assert message is None or not message.error(), message.error()
            if assigned:
                break
        consumer.close()
        assert [p.topic for p in assigned] == [topic], protocol


def test_a_killed_broker_comes_back_with_every_acknowledged_record(stack, running):
    topic = make_topic(running.kafka_bootstrap)
    producer = make_producer(running.kafka_bootstrap)
    values = [b"%d" % number for number in range(500)]
    write(producer, topic, values, commit=True)
    before = stack.status()["kafka"]
    os.kill(before.pid, signal.SIGKILL)

    after = stack.up()

    assert after == running, "the ports are kept"
    assert stack.status()["kafka"].pid != before.pid
    assert read_all(after.kafka_bootstrap, topic) == values
    write(make_producer(after.kafka_bootstrap), topic, [b"again"], commit=True)
    assert read_all(after.kafka_bootstrap, topic) == [*values, b"again"]


def test_a_schema_keeps_its_id_over_a_clean_stop_and_over_a_crash(stack, running):
    first = {"type": "record", "name": "First", "fields": [{"name": "a", "type": "long"}]}
    second = {"type": "record", "name": "Second", "fields": []}
    third = {"type": "record", "name": "Third", "fields": []}
    number = register(running.registry_url, "first-value", first)
    stack.stop("registry")
    stack.start("registry")
    assert json.loads(call_registry(running.registry_url, f"/schemas/ids/{number}")["schema"]) == first
    other = register(running.registry_url, "second-value", second)
    stack.kill("registry")
    stack.start("registry")
    assert json.loads(call_registry(running.registry_url, f"/schemas/ids/{other}")["schema"]) == second
    assert register(running.registry_url, "first-value", first) == number
    assert len({number, other, register(running.registry_url, "third-value", third)}) == 3, "ids are never used twice"


def test_redis_answers_and_forgets_when_it_is_killed(stack, running):
    assert talk_to_redis(running.redis_url, b"PING", b"SET k v", b"GET k") == [b"+PONG\r\n", b"+OK\r\n", b"$1\r\nv\r\n"]
    stack.kill("redis")
    assert stack.status()["redis"].state == "stopped"
    with pytest.raises(ConnectionRefusedError):
        talk_to_redis(running.redis_url, b"PING")
    stack.start("redis")
    assert talk_to_redis(running.redis_url, b"GET k") == [b"$-1\r\n"]


def test_a_component_that_no_longer_answers_is_replaced(stack, running, monkeypatch):
    monkeypatch.setattr(embedded, "_PATIENCE_WITH_LIVE", 0.2)
    frozen = stack.status()
    monkeypatch.setattr(stack, "_stop_timeout", 0.5)
    os.kill(frozen["redis"].pid, signal.SIGSTOP)
    assert stack.status()["redis"].state == "silent"
    assert stack.up() == running
    assert talk_to_redis(running.redis_url, b"PING") == [b"+PONG\r\n"]
    after = stack.status()
    assert after["redis"].pid != frozen["redis"].pid
    assert after["kafka"].pid == frozen["kafka"].pid


def test_a_start_that_fails_leaves_nothing_running(tmp_path, running):
    taken = int(running.redis_url.removesuffix("/0").rpartition(":")[2])
    other = EmbeddedStack(tmp_path / "home", CACHE, ports={"redis": taken})
    try:
        with pytest.raises(PortTakenError, match=str(taken)):
            other.up()
        assert {s.state for s in other.status().values()} == {"stopped"}
    finally:
        other.down()
    assert talk_to_redis(running.redis_url, b"PING") == [b"+PONG\r\n"]


def test_up_on_a_running_stack_changes_nothing(stack, running):
    before = stack.status()
    assert stack.up() == running
    assert {name: s.pid for name, s in stack.status().items()} == {name: s.pid for name, s in before.items()}
    assert {s.state for s in before.values()} == {"running"}


def test_down_leaves_no_process_and_up_brings_the_data_back(stack, running):
    topic = make_topic(running.kafka_bootstrap)
    write(make_producer(running.kafka_bootstrap), topic, [b"kept"], commit=True)
    number = register(running.registry_url, "kept-value", {"type": "record", "name": "Kept", "fields": []})
    pids = [s.pid for s in stack.status().values()]

    stack.down()

    # one that init has not fetched yet is a zombie: dead, though its number is still taken
    states = [
        subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True).stdout
        for pid in pids
    ]
    assert [state for state in states if state.strip() and not state.startswith("Z")] == []
    assert {s.state for s in stack.status().values()} == {"stopped"}
    after = stack.up()
    assert read_all(after.kafka_bootstrap, topic) == [b"kept"]
    assert json.loads(call_registry(after.registry_url, f"/schemas/ids/{number}")["schema"])["name"] == "Kept"


def test_everything_listens_on_loopback_only(stack, running):
    listening = Path("/proc/net/tcp"), Path("/proc/net/tcp6")
    if not listening[0].exists():
        pytest.skip("no /proc on this system")
    ports = {int(s.address.rpartition(":")[2]) for s in stack.status().values()}
    assert len(ports) == 3
    seen = {}
    for table in listening:
        for line in table.read_text().splitlines()[1:]:
            local, state = line.split()[1], line.split()[3]
            address, _, port = local.rpartition(":")
            if state == "0A":  # LISTEN
                seen.setdefault(int(port, 16), set()).add(address)
    # 127.0.0.1, and the same as IPv4 mapped into IPv6, in the kernel's byte order
    loopback = {"0100007F", "0000000000000000FFFF00000100007F"}
    assert {port for port in ports if seen.get(port)} == ports
    assert all(seen[port] <= loopback for port in ports)

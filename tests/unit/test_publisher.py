"""The publisher replaces a client that no broker answers, and keeps every promise the old one gave."""

import asyncio
import queue
import threading
from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError, KafkaException
from structlog.testing import capture_logs

from topics import publisher as module
from topics.cluster import KafkaSettings, KafkaUnreachable
from topics.publisher import Publisher

PATIENCE = 20.0
"""Seconds until something that must happen counts as missing."""


class Client:
    """What one fake producer was given and is to answer. It outlives the producer."""

    def __init__(self, configuration):
        self.configuration = configuration
        self.outstanding = {}
        self._arrived = asyncio.Queue()
        self.is_full = False
        self.while_producing = lambda: None
        self.list_brokers = list
        self.let_go = threading.Event()
        self.let_go_by = None
        self.reporter = None
        self._due = queue.SimpleQueue()
        self._polls = threading.Semaphore(0)

    async def take(self):
        """The next record it is given: topic, key, value and headers."""
        async with asyncio.timeout(PATIENCE):
            return await self._arrived.get()

    def answer(self, value, error=None):
        """The outcome of a record; the next poll reports it."""
        self._due.put((value, None if error is None else KafkaError(error)))

    def serve(self, seconds):
        self.reporter = threading.current_thread()
        self._polls.release()
        try:
            value, error = self._due.get(timeout=min(seconds, 0.01))
        except queue.Empty:
            return
        self.outstanding.pop(value)(error, None)

    async def go_round(self):
        """Return when all that was told before has been looked at: between two polls lies a whole look."""
        while self._polls.acquire(blocking=False):
            pass
        for _ in range(3):
            assert await asyncio.to_thread(self._polls.acquire, timeout=PATIENCE)


class World:
    """Fake producers in the order they were made, and their clock."""

    def __init__(self):
        self.now = 1000.0
        self.clients = []
        self.made = threading.Semaphore(0)
        self.refusals = []
        world = self

        class FakeProducer:
            def __init__(self, configuration):
                self.client = None
                if world.refusals:
                    raise world.refusals.pop()
                self.client = Client(dict(configuration))
                world.clients.append(self.client)
                world.made.release()

            def produce(self, topic, value, key, *, headers, on_delivery):
                if self.client.is_full:
                    raise BufferError
                self.client.while_producing()
                self.client.outstanding[value] = on_delivery
                self.client._arrived.put_nowait((topic, key, value, headers))

            def poll(self, timeout):
                self.client.serve(timeout)

            def flush(self, timeout):
                del timeout

            def list_topics(self, topic, timeout):
                del topic, timeout
                return SimpleNamespace(brokers=self.client.list_brokers())

            def __len__(self):
                return len(self.client.outstanding)

            def __del__(self):
                if self.client is not None:
                    self.client.let_go_by = threading.current_thread().name
                    self.client.let_go.set()

        self.producer = FakeProducer

    async def wait_for_client(self, number):
        """The client with this number (from 0), as soon as the publisher uses it."""
        while len(self.clients) <= number:
            assert await asyncio.to_thread(self.made.acquire, timeout=PATIENCE)
        await self.clients[number].go_round()  # its reporter begins when it is in use
        return self.clients[number]


@pytest.fixture
def world(monkeypatch):
    made = World()
    monkeypatch.setattr(module, "Producer", made.producer)
    return made


@pytest.fixture
def publisher(world):
    made = Publisher(KafkaSettings(bootstrap="127.0.0.1:9"), "remitstream.receiver.one", clock=lambda: world.now)
    yield made
    made.close(0.1)


def publish(publisher, value=b"v"):
    return asyncio.create_task(publisher.publish("raw.stripe", b"k", value, [("h", b"1")]))


async def settle(task):
    async with asyncio.timeout(PATIENCE):
        await task


async def fail_to_publish(publisher, client, error=KafkaError._MSG_TIMED_OUT):
    task = publish(publisher, b"fails")
    await client.take()
    client.answer(b"fails", error)
    with pytest.raises(KafkaUnreachable):
        await settle(task)


async def fail_to_queue(publisher, client):
    client.is_full = True
    with pytest.raises(KafkaUnreachable, match="full"):
        await publisher.publish("raw.stripe", b"k", b"v", [])
    client.is_full = False


def refuse_to_list():
    raise KafkaException(KafkaError(KafkaError._TRANSPORT))


def refuse_for_good():
    raise KafkaException(KafkaError(KafkaError._FATAL))


async def ask_in_vain(publisher, client):
    client.list_brokers = refuse_to_list
    assert not publisher.is_connected()


async def ask_and_hear_of_no_broker(publisher, client):
    client.list_brokers = list
    assert not publisher.is_connected()


async def publish_well(publisher, client):
    task = publish(publisher, b"good")
    await client.take()
    client.answer(b"good")
    await settle(task)


async def be_refused_by_the_broker(publisher, client):
    await fail_to_publish(publisher, client, KafkaError.NOT_ENOUGH_REPLICAS)


async def ask_well(publisher, client):
    client.list_brokers = lambda: [1]
    assert publisher.is_connected()


@pytest.mark.parametrize("fail", [fail_to_publish, fail_to_queue, ask_in_vain, ask_and_hear_of_no_broker])
async def test_a_client_that_no_broker_answers_for_thirty_seconds_is_replaced(publisher, world, fail):
    with capture_logs() as lines:
        await fail(publisher, world.clients[0])
        world.now += 29.9
        await fail(publisher, world.clients[0])
        await world.clients[0].go_round()
        assert len(world.clients) == 1
        world.now += 0.1
        await fail(publisher, world.clients[0])
        second = await world.wait_for_client(1)
    assert lines == [
        {"event": "client_replaced", "log_level": "warning", "component": "kafka", "client": "remitstream.receiver.one"}
    ]
    assert second.configuration == world.clients[0].configuration
    assert second.configuration["enable.idempotence"] is True
    task = publish(publisher)
    assert await second.take() == ("raw.stripe", b"k", b"v", [("h", b"1")])
    second.answer(b"v")
    await settle(task)
    second.list_brokers = lambda: [1]
    assert publisher.is_connected()


@pytest.mark.parametrize("is_refused_at_once", [True, False])
async def test_a_client_that_has_given_up_is_replaced_at_once(publisher, world, is_refused_at_once):
    """A fatal error of an idempotent client: brokers answer it, and it never sends again."""
    first = world.clients[0]
    if is_refused_at_once:
        first.while_producing = refuse_for_good
        with pytest.raises(KafkaUnreachable, match="_FATAL"):
            await publisher.publish("raw.stripe", b"k", b"v", [])
    else:
        await fail_to_publish(publisher, first, KafkaError._FATAL)
    first.list_brokers = lambda: [1]
    publisher.is_connected()
    second = await world.wait_for_client(1)
    task = publish(publisher)
    await second.take()
    second.answer(b"v")
    await settle(task)
    assert len(world.clients) == 2


@pytest.mark.parametrize("succeed", [publish_well, be_refused_by_the_broker, ask_well])
async def test_an_answer_of_a_broker_begins_the_thirty_seconds_anew(publisher, world, succeed):
    (client,) = world.clients
    await ask_in_vain(publisher, client)
    world.now += 29
    await succeed(publisher, client)
    world.now += 29
    await ask_in_vain(publisher, client)
    world.now += 29
    await ask_in_vain(publisher, client)
    await client.go_round()
    assert len(world.clients) == 1
    world.now += 1
    await ask_in_vain(publisher, client)
    await world.wait_for_client(1)


async def test_in_a_long_outage_there_is_a_new_client_every_thirty_seconds(publisher, world):
    await ask_in_vain(publisher, world.clients[0])
    made = []
    for second in range(1, 101):
        world.now += 1
        current = world.clients[-1]
        await ask_in_vain(publisher, current)
        if publisher._silence.is_too_long:
            await world.wait_for_client(len(world.clients))
        if world.clients[-1] is not current:
            made.append(second)
    # A new one's silence begins when it is asked first, a second after it was made.
    assert made == [30, 61, 92]
    assert all(client.let_go.wait(PATIENCE) for client in world.clients[:-1])
    assert not world.clients[-1].let_go.is_set()
    assert len([thread for thread in publisher._reporters if thread.is_alive()]) <= 2


async def replace(publisher, world):
    """The current client is silent for too long."""
    number = len(world.clients)
    await ask_in_vain(publisher, world.clients[-1])
    world.now += 30
    await ask_in_vain(publisher, world.clients[-1])
    return await world.wait_for_client(number)


async def test_what_the_old_client_was_given_is_settled_by_it_and_given_to_no_other(publisher, world):
    (first,) = world.clients
    written, lost = publish(publisher, b"written"), publish(publisher, b"lost")
    await first.take()
    await first.take()
    second = await replace(publisher, world)
    await publish_well(publisher, second)
    await first.go_round()
    assert not first.let_go.is_set()
    assert not written.done()
    assert not lost.done()
    first.answer(b"written")
    await settle(written)
    await first.go_round()
    assert not first.let_go.is_set()
    first.answer(b"lost", KafkaError._MSG_TIMED_OUT)
    with pytest.raises(KafkaUnreachable, match="_MSG_TIMED_OUT"):
        await settle(lost)
    assert await asyncio.to_thread(first.let_go.wait, PATIENCE)
    assert second.outstanding == {}


async def test_the_old_client_says_nothing_about_the_new_one(publisher, world):
    (first,) = world.clients
    late, last = publish(publisher, b"late"), publish(publisher, b"last")
    await first.take()
    await first.take()
    second = await replace(publisher, world)
    first.answer(b"late", KafkaError._MSG_TIMED_OUT)
    with pytest.raises(KafkaUnreachable):
        await settle(late)
    world.now += 30
    await ask_in_vain(publisher, second)  # the first time that the new one was asked
    await second.go_round()
    assert len(world.clients) == 2
    first.answer(b"last")
    await settle(last)
    world.now += 30
    await ask_in_vain(publisher, second)
    await world.wait_for_client(2)


async def test_a_record_given_while_the_client_is_replaced_is_not_left_with_nobody(publisher, world):
    (first,) = world.clients

    def be_silent_meanwhile():
        first.list_brokers = refuse_to_list
        publisher.is_connected()
        world.now += 30
        publisher.is_connected()
        first.reporter.join(0.3)  # would end if nothing held it: nothing is outstanding yet

    first.while_producing = be_silent_meanwhile
    await first.go_round()
    task = publish(publisher)
    await first.take()
    first.answer(b"v")
    await settle(task)
    await world.wait_for_client(1)


async def test_only_the_threads_of_the_reports_let_go_of_a_client(publisher, world):
    """Letting go closes it and may hang: neither the loop nor the probe of readiness may be the last to do so."""
    (first,) = world.clients
    is_asked, may_answer = threading.Event(), threading.Event()

    def answer_late():
        is_asked.set()
        assert may_answer.wait(PATIENCE)
        return []

    first.list_brokers = answer_late
    probe = asyncio.create_task(asyncio.to_thread(publisher.is_connected))
    assert await asyncio.to_thread(is_asked.wait, PATIENCE)
    await fail_to_publish(publisher, first)
    world.now += 30
    await fail_to_publish(publisher, first)
    await world.wait_for_client(1)
    await asyncio.to_thread(first.reporter.join, 0.3)  # would end if it did not mind the probe
    may_answer.set()
    assert not await probe
    assert await asyncio.to_thread(first.let_go.wait, PATIENCE)
    assert first.let_go_by == "kafka-publisher"


async def test_a_publish_under_way_does_not_keep_the_old_client(publisher, world):
    (first,) = world.clients
    task = publish(publisher)
    await first.take()
    await replace(publisher, world)
    first.answer(b"v")
    # The loop is busy: the caller is not told yet, and what it holds must not be the client.
    assert first.let_go.wait(PATIENCE)
    assert not task.done()
    assert first.let_go_by == "kafka-publisher"
    await settle(task)


def refuse_client(world, _monkeypatch):
    world.refusals.append(KafkaException(KafkaError(KafkaError._INVALID_ARG)))


def refuse_thread(_world, monkeypatch):
    start_other = threading.Thread.start

    def start(thread):
        if thread.name == "kafka-publisher":
            raise RuntimeError("can't start new thread")
        start_other(thread)

    monkeypatch.setattr(threading.Thread, "start", start)


@pytest.mark.parametrize(
    ("refuse", "error"), [(refuse_client, "_INVALID_ARG"), (refuse_thread, "RuntimeError")], ids=["client", "thread"]
)
async def test_when_no_new_client_can_be_made_the_old_one_goes_on(publisher, world, refuse, error):
    (first,) = world.clients
    await ask_in_vain(publisher, first)
    world.now += 30
    with pytest.MonkeyPatch.context() as patched, capture_logs() as lines:
        refuse(world, patched)
        assert not publisher.is_connected()
        await first.go_round()
    assert lines == [
        {
            "event": "client_not_replaced",
            "log_level": "warning",
            "component": "kafka",
            "client": "remitstream.receiver.one",
            "error": error,
        }
    ]
    await publish_well(publisher, first)
    made = len(world.clients)
    await ask_in_vain(publisher, first)
    world.now += 30
    await ask_in_vain(publisher, first)
    current = await world.wait_for_client(made)
    await publish_well(publisher, current)


async def test_closing_waits_for_what_each_client_still_has(publisher, world):
    (first,) = world.clients
    old = publish(publisher, b"old")
    await first.take()
    await replace(publisher, world)
    closing = asyncio.create_task(asyncio.to_thread(publisher.close, PATIENCE))
    await first.go_round()
    assert not closing.done()
    first.answer(b"old")
    await settle(closing)
    async with asyncio.timeout(PATIENCE):
        await old
    assert first.let_go.is_set()

"""The projector against a scripted Redis and topic: what it does when one of them is away, lies or loses data."""

import asyncio
import io
import json
import logging
import sys
import threading
from typing import NamedTuple

import pytest
import structlog

from identity.projection import RedisDown, RedisSettings, Replay
from identity.projector import PatientUnreadable, Projector
from schemas.events import PatientRecord, Reference
from schemas.failure import Failure, FailureKind, TemporaryError
from schemas.keys import HmacKey
from telemetry.log import configure
from telemetry.metrics import Metric, Metrics

KEY = HmacKey(b"sixteen bytes or more")


class Record(NamedTuple):
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None


class FakeTopic:
    """One partition that lives in a list; positions as a consumer has them."""

    def __init__(self, count):
        self.records = [make_record(number) for number in range(count)]
        self.position = 0
        self.closed = False
        self.errors = []
        self.assigned = []

    def partitions(self):
        return [0]

    def assign(self, offsets):
        self.assigned.append(dict(offsets))
        self.position = offsets.get(0, 0)

    def poll(self, max_records, timeout):
        taken = self.records[self.position : self.position + max_records]
        self.position += len(taken)
        if self.errors:
            raise self.errors.pop(0)  # records taken so far are gone, as with a real consumer
        if not taken:
            threading.Event().wait(0.005)
        return taken

    def positions(self):
        return {0: self.position}

    def end_offsets(self, isolation):
        assert isolation == "read_uncommitted"
        return {0: len(self.records)}

    def close(self):
        self.closed = True


class FakeRedis:
    """Applies as the script does, in plain Python: refuses a gap, skips what is below the stored offset."""

    def __init__(self):
        self.data = {}
        self.offset = None
        self.errors = []
        self.closed = False
        self.positions = {}
        self.watch = lambda begins: None

    async def begin(self, partitions):
        if self.offset is None:
            self.offset, self.data = 0, {}
            self.positions = {0: 0}
            return Replay({0: 0}, "MISSING")
        self.positions = {0: self.offset}
        return None

    async def apply(self, changes, begins, next_offsets):
        if self.errors:
            raise self.errors.pop(0)
        self.watch(begins[0])
        if self.offset is None or self.offset < begins[0]:
            return await self.begin([0]) or Replay(dict(self.positions), "BEHIND")
        for change in changes:
            if change.offset >= self.offset:
                self.data[change.key_hash] = change.offset
        self.offset = max(self.offset, next_offsets[0])
        self.positions = {0: self.offset}
        return None

    async def close(self):
        self.closed = True


def identifier(number):
    return Reference("NORTH", "MR", f"P{number}")


def make_record(number):
    return Record(0, number, KEY.hash_identifier(identifier(number)).encode(), str(number).encode())


def decode(value):
    reference = identifier(int(value))
    return PatientRecord(
        tenant="t", facility="f", identifier=reference, status="active", mrn=reference, feed="f", source_event_id="m",
        message_type="ADT^A04", occurred_at=1, received_at=1, mapping_version="1", origin="x:0:0",
    )  # fmt: skip


def build(topic, redis, *, decode=decode, max_records=4, metrics=None):
    metrics = metrics or Metrics(strict=True)
    return Projector(topic, redis, decode, KEY, max_records=max_records, metrics=metrics, check_seconds=0.02)


async def until(condition):
    async with asyncio.timeout(20):
        while not condition():  # noqa: ASYNC110 - what is awaited is the state of the code under test
            await asyncio.sleep(0.005)


class running:  # noqa: N801 - reads as a statement
    def __init__(self, projector):
        self.projector = projector

    async def __aenter__(self):
        self.task = asyncio.create_task(self.projector.run())
        return self.task

    async def __aexit__(self, *_):
        self.projector.stop()
        await asyncio.wait_for(self.task, 20)


def expected(count):
    return {KEY.hash_identifier(identifier(number)): number for number in range(count)}


@pytest.fixture
def log():
    stream = io.StringIO()
    hooks, root = (sys.excepthook, threading.excepthook), logging.getLogger()
    handlers, level = [*root.handlers], root.level
    configure("info", "json", stream=stream)
    yield lambda: [json.loads(line) for line in stream.getvalue().splitlines()]
    sys.excepthook, threading.excepthook = hooks
    root.handlers[:] = handlers
    root.setLevel(level)
    logging.captureWarnings(capture=False)
    structlog.reset_defaults()


async def test_projects_from_the_start_and_becomes_ready_at_the_end():
    topic, redis, metrics = FakeTopic(10), FakeRedis(), Metrics(strict=True)
    projector = build(topic, redis, metrics=metrics)
    assert projector.ready() == (False, {"projection": "starting"})
    async with running(projector):
        await until(lambda: projector.ready()[0])
        assert redis.data == expected(10)
    assert metrics.read(Metric.PROJECTION_APPLIED) == 10
    assert (topic.closed, redis.closed) == (True, True)


async def test_goes_on_from_the_offsets_in_redis():
    topic, redis = FakeTopic(10), FakeRedis()
    redis.offset = 7
    projector = build(topic, redis)
    async with running(projector):
        await until(lambda: projector.ready()[0])
    assert topic.assigned == [{0: 7}]
    assert sorted(redis.data.values()) == [7, 8, 9]


async def test_waits_while_redis_is_down_says_so_and_loses_nothing(log):
    topic, redis, metrics = FakeTopic(10), FakeRedis(), Metrics(strict=True)
    redis.errors = [RedisDown("no answer.", place="x:1")] * 2
    projector = build(topic, redis, metrics=metrics)
    async with running(projector):
        await until(lambda: projector.ready()[1].get("projection") == "RS240 RedisDown")
        assert metrics.read(Metric.PAUSED, role="projector", reason="RedisDown") == 1
        await until(lambda: projector.ready()[0])
    assert redis.data == expected(10)
    events = [line["event"] for line in log()]
    assert events.count("projector_paused") == events.count("projector_resumed") == 1


async def test_a_loss_while_redis_was_away_does_not_lift_the_offsets_over_the_gap():
    """The batch in hand is refused by the emptied Redis, also when it is tried again."""
    topic, redis = FakeTopic(12), FakeRedis()
    projector = build(topic, redis)
    async with running(projector):
        await until(lambda: projector.ready()[0])
        topic.records += [make_record(number) for number in range(12, 14)]
        redis.errors = [RedisDown("no answer.", place="x:1")]
        redis.offset, redis.data = None, {}
        await until(lambda: redis.offset == 14)
        assert redis.data == expected(14)


async def test_flushed_without_new_records_is_seen_and_replayed():
    topic, redis, metrics = FakeTopic(10), FakeRedis(), Metrics(strict=True)
    projector = build(topic, redis, metrics=metrics)
    async with running(projector):
        await until(lambda: projector.ready()[0])
        redis.offset, redis.data = None, {}
        await until(lambda: redis.offset == 10)
        assert redis.data == expected(10)
    assert metrics.read(Metric.PROJECTION_REPLAYS, reason="MISSING") == 1


async def test_set_back_is_replayed_from_where_redis_is():
    topic, redis = FakeTopic(10), FakeRedis()
    projector = build(topic, redis)
    async with running(projector):
        await until(lambda: projector.ready()[0])
        redis.offset = 6
        redis.data = {key: offset for key, offset in redis.data.items() if offset < 6}
        await until(lambda: redis.offset == 10)
        assert redis.data == expected(10)
    assert topic.assigned[-1] == {0: 6}


async def test_not_ready_until_a_replay_is_through():
    topic, redis = FakeTopic(10), FakeRedis()
    projector = build(topic, redis, max_records=1)
    async with running(projector):
        await until(lambda: projector.ready()[0])
        seen = []
        redis.watch = lambda begins: seen.append((begins, projector.ready()[0]))
        redis.offset, redis.data = None, {}
        await until(lambda: redis.offset == 10)
        await until(lambda: projector.ready()[0])
    assert [begins for begins, ready in seen if not ready] == list(range(10))


async def test_a_poll_that_failed_halfway_loses_no_record():
    topic, redis = FakeTopic(10), FakeRedis()
    topic.errors = [TemporaryError("no broker.", place="patients")]
    projector = build(topic, redis)
    async with running(projector):
        await until(lambda: projector.ready()[0])
    assert redis.data == expected(10)


async def test_a_registry_that_is_away_is_waited_for():
    topic, redis = FakeTopic(10), FakeRedis()
    failures = [TemporaryError("no registry.", place="x:1")] * 2

    def decode_later(value):
        if value == b"5" and failures:
            raise failures.pop()
        return decode(value)

    projector = build(topic, redis, decode=decode_later)
    async with running(projector):
        await until(lambda: projector.ready()[0])
    assert redis.data == expected(10)


def refuse(_value):
    raise Failure(FailureKind.INVALID, "NOT_AVRO", "value")


@pytest.mark.parametrize(
    ("record", "reader"),
    [
        (make_record(4), refuse),
        (make_record(4)._replace(key=b"0" * 32), decode),
        (make_record(4)._replace(key=None), decode),
    ],
    ids=["unreadable", "other key", "no key"],
)
async def test_a_record_that_cannot_be_trusted_stops_the_projector(record, reader):
    topic, redis = FakeTopic(4), FakeRedis()
    topic.records.append(record)
    reading = reader if reader is decode else lambda value: refuse(value) if value == b"4" else decode(value)
    with pytest.raises(PatientUnreadable) as caught:
        await asyncio.wait_for(build(topic, redis, decode=reading).run(), 20)
    assert caught.value.place == "patients/0/4"
    assert (redis.offset, topic.closed) == (4, True)  # not passed over
    assert redis.data == expected(4)


async def test_stops_while_redis_is_down_without_moving_on():
    topic, redis = FakeTopic(10), FakeRedis()
    redis.errors = [RedisDown("no answer.", place="x:1")] * 1000
    projector = build(topic, redis)
    async with running(projector):
        await until(lambda: projector.ready()[1].get("projection") == "RS240 RedisDown")
    assert (redis.offset, redis.data) == (0, {})
    assert topic.closed


async def test_lag_counts_what_is_not_applied():
    topic, redis = FakeTopic(10), FakeRedis()
    redis.errors = [RedisDown("no answer.", place="x:1")] * 1000
    projector = build(topic, redis)
    async with running(projector):
        await until(lambda: "RS240" in projector.ready()[1].get("projection", ""))
        assert projector.lag == 10


@pytest.mark.parametrize(
    "url",
    ["http://x:1", "redis://", "redis://user:pw@x:1", "redis://:pw@x:1/0", "redis://x:1/0?socket_timeout=99"],
)
def test_a_url_with_secrets_or_options_is_refused_without_being_quoted(url):
    with pytest.raises(ValueError, match="url"):
        RedisSettings(url=url)


def test_the_place_of_redis_is_host_and_port():
    assert RedisSettings(url="rediss://cache.example:7000/2").place == "cache.example:7000"
    assert RedisSettings(url="redis://cache.example").place == "cache.example:6379"


@pytest.mark.parametrize("prefix", ["", "a b", "a:b", "x" * 65])
def test_a_prefix_is_one_plain_word(prefix):
    with pytest.raises(ValueError):
        RedisSettings(key_prefix=prefix)

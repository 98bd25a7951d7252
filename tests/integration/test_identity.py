"""The patient projection on a real Redis, and the projector between a real Kafka and a real Redis.

A database number of its own keeps FLUSHDB away from what else runs on the same Redis.
"""

import asyncio
import contextlib
import uuid
from urllib.parse import urlsplit, urlunsplit

import msgspec
import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, NewTopic
from redis.asyncio import Redis

from identity.projection import (
    MAX_STALE_MS,
    Change,
    Identities,
    ProjectionBehind,
    ProjectionWriter,
    RedisDown,
    RedisEvicts,
    RedisSettings,
)
from identity.projector import Projector
from identity.resolution import Ambiguous, Known, Unknown
from schemas.events import PatientRecord, Reference
from schemas.keys import HmacKey
from schemas.wire import Decoder, Encoder, load_schema
from telemetry.metrics import Metric, Metrics
from topics.cluster import KafkaSettings
from topics.reading import TopicReader

pytestmark = pytest.mark.integration

KEY = HmacKey(b"integration test key")
NOW = 1_790_000_000_000
MRN_TEXT = "MRN-77-PLAINLY"


@pytest.fixture
async def settings(stack):
    settings = RedisSettings(
        url=urlunsplit(urlsplit(stack.redis_url)._replace(path="/9")), key_prefix=f"t{uuid.uuid4().hex[:8]}"
    )
    async with Redis.from_url(settings.url) as client:
        await client.flushdb()
        yield settings
        await client.flushdb()


@pytest.fixture
async def redis(settings):
    async with Redis.from_url(settings.url) as client:
        yield client


@pytest.fixture
async def make(settings):
    """Writers and readers that are closed at the end."""
    async with contextlib.AsyncExitStack() as opened:

        def build(kind, *arguments, **options):
            made = kind(options.pop("settings", settings), KEY, *arguments, **options)
            opened.push_async_callback(made.close)
            return made

        yield build


def ref(value, authority="NORTH", id_type="MR"):
    return Reference(authority, id_type, value)


def record(identifier, *, status="active", mrn=None, merged_into=None):
    return PatientRecord(
        tenant="t", facility="north", identifier=identifier, status=status, mrn=mrn, merged_into=merged_into,
        feed="f", source_event_id="m1", message_type="ADT^A08", occurred_at=NOW, received_at=NOW,
        mapping_version="1", origin="x:0:0",
    )  # fmt: skip


def active(identifier):
    return record(identifier, mrn=identifier)


def merged(identifier, survivor):
    return record(identifier, status="merged", mrn=identifier, merged_into=survivor)


def changes(*records, offset=0, partition=0):
    return [
        Change(KEY.hash_identifier(r.identifier), r, partition, offset + number) for number, r in enumerate(records)
    ]


def now():
    return NOW


async def fill(make, *records, topic="T1"):
    """A writer that has applied these records, and a reader that requires them."""
    writer = make(ProjectionWriter, topic, now_ms=now)
    await writer.begin([0])
    assert await writer.apply(changes(*records), {0: 0}, {0: len(records)}) is None
    reader = make(Identities, metrics=Metrics(strict=True))
    reader.require({0: len(records)}, topic)
    return writer, reader


async def copy_database(redis):
    return {key: await redis.dump(key) async for key in redis.scan_iter()}


async def restore_database(redis, copy):
    await redis.flushdb()
    for key, value in copy.items():
        await redis.restore(key, 0, value)


async def read_content(redis, prefix):
    """All entries without their epoch, read without our code."""
    content = {}
    async for key in redis.scan_iter(match=f"{prefix}:id:*"):
        content[key] = msgspec.msgpack.decode(await redis.get(key))[1:]
    return content


def str_of(name):
    return name.decode() if isinstance(name, bytes) else name


A, B, C, D = ref("A"), ref("B"), ref("C"), ref("D")


async def test_a_batch_is_resolved_in_order(make):
    loop_a, loop_b = ref("L1"), ref("L2")
    _, reader = await fill(
        make, active(C), merged(B, C), merged(A, B), merged(loop_a, loop_b), merged(loop_b, loop_a), record(D),
        record(ref("V", id_type="VN"), mrn=A), merged(ref("X"), ref("Y")),
    )  # fmt: skip
    found = await reader.resolve([A, B, C, D, loop_a, ref("none"), A, ref("V", id_type="VN"), ref("X")])
    assert found == [
        Known(C), Known(C), Known(C), Ambiguous("MRN_AMBIGUOUS"), Ambiguous("MERGE_CYCLE"),
        Unknown(KEY.hash_identifier(ref("none"))), Known(C), Known(C), Unknown(KEY.hash_identifier(ref("Y"))),
    ]  # fmt: skip
    assert await reader.resolve([]) == []


async def test_the_same_text_under_two_authorities_is_two_patients(make):
    north, south = ref("1001", "NORTH"), ref("1001", "SOUTH")
    _, reader = await fill(make, merged(north, A), active(A), active(south))
    assert await reader.resolve([north, south]) == [Known(A), Known(south)]


async def test_keys_hold_no_identifier_in_clear(make, redis):
    await fill(make, active(ref(MRN_TEXT)))
    keys = [key async for key in redis.scan_iter()]
    assert len(keys) == 2
    assert not [key for key in keys if MRN_TEXT.encode() in key or b"NORTH" in key]


async def test_a_batch_costs_one_round_trip_and_one_more_per_step(make, redis):
    _, reader = await fill(make, active(C), merged(B, C), merged(A, B))
    await reader.check()  # connects
    many = [ref(f"n{number}") for number in range(900)]

    async def count():
        return (await redis.info("commandstats"))["cmdstat_exec"]["calls"]

    before = await count()
    await reader.resolve([C, *many])
    one = await count()
    await reader.resolve([A, *many])
    assert (one - before, await count() - one) == (1, 3)


async def test_a_tombstone_removes_an_identifier(make):
    writer, reader = await fill(make, active(A), active(B))
    assert await writer.apply([Change(KEY.hash_identifier(A), None, 0, 2)], {0: 2}, {0: 3}) is None
    assert await reader.resolve([A, B]) == [Unknown(KEY.hash_identifier(A)), Known(B)]


async def test_a_reader_refuses_until_the_projection_has_what_it_requires(make):
    reader = make(Identities)
    with pytest.raises(ProjectionBehind, match="not known"):
        await reader.resolve([A])
    reader.require({0: 2})
    with pytest.raises(ProjectionBehind, match="no projection"):
        await reader.resolve([A])
    writer = make(ProjectionWriter, "T1", now_ms=now)
    await writer.begin([0])
    await writer.apply(changes(active(A)), {0: 0}, {0: 1})
    with pytest.raises(ProjectionBehind, match="1 records"):
        await reader.resolve([A])
    await writer.apply(changes(active(B), offset=1), {0: 1}, {0: 2})
    assert await reader.resolve([A]) == [Known(A)]
    reader.require({0: 2}, "T2")
    with pytest.raises(ProjectionBehind, match="another topic"):
        await reader.check()


async def test_every_partition_counts(make):
    writer = make(ProjectionWriter, "T1", now_ms=now)
    await writer.begin([0, 1])
    reader = make(Identities)
    reader.require({0: 1, 1: 1})
    await writer.apply(changes(active(A)), {0: 0, 1: 0}, {0: 5, 1: 0})
    with pytest.raises(ProjectionBehind, match="1 records"):
        await reader.resolve([A])


async def test_flushed_is_seen_by_reader_and_writer(make, redis):
    writer, reader = await fill(make, active(A), active(B))
    await redis.flushdb()
    with pytest.raises(ProjectionBehind):
        await reader.resolve([A])
    replay = await writer.apply(changes(active(C), offset=2), {0: 2}, {0: 3})
    assert (replay.offsets, replay.reason) == ({0: 0}, "MISSING")
    with pytest.raises(ProjectionBehind):
        await reader.resolve([A])
    # The batch in hand, tried again, does not jump over the gap.
    assert (await writer.apply(changes(active(C), offset=2), {0: 2}, {0: 3})).reason == "BEHIND"
    assert await writer.apply(changes(active(A), active(B), active(C)), {0: 0}, {0: 3}) is None
    assert await reader.resolve([A, B, C]) == [Known(A), Known(B), Known(C)]


async def test_an_old_snapshot_is_seen_by_reader_and_writer(make, redis):
    writer, reader = await fill(make, active(A), active(B))
    old = await copy_database(redis)
    await writer.apply(changes(merged(A, B), offset=2), {0: 2}, {0: 3})
    assert await reader.resolve([A]) == [Known(B)]  # from here on the reader knows that 3 was applied
    await restore_database(redis, old)
    with pytest.raises(ProjectionBehind, match="1 records"):
        await reader.resolve([A])
    replay = await writer.apply([], {0: 3}, {0: 3})
    assert (replay.offsets, replay.reason) == ({0: 2}, "BEHIND")
    await writer.apply(changes(merged(A, B), offset=2), {0: 2}, {0: 3})
    assert await reader.resolve([A]) == [Known(B)]


async def test_a_reader_that_never_saw_more_would_take_the_old_snapshot(make, redis):
    """Why streams must give the end offsets at start: without them an old snapshot answers, and answers wrongly."""
    writer, _ = await fill(make, active(A), active(B))
    old = await copy_database(redis)
    await writer.apply(changes(merged(A, B), offset=2), {0: 2}, {0: 3})
    await restore_database(redis, old)
    fresh = make(Identities)
    fresh.require({})
    assert await fresh.resolve([A]) == [Known(A)]
    fresh.require({0: 3})
    with pytest.raises(ProjectionBehind):
        await fresh.resolve([A])


async def test_a_slow_second_projector_cannot_bring_an_old_state_back(make, redis, settings):
    writer, reader = await fill(make, active(A), active(B), merged(A, B))
    slow = make(ProjectionWriter, "T1", now_ms=now)
    await slow.begin([0])
    assert await reader.resolve([A]) == [Known(B)]
    assert await slow.apply(changes(active(A)), {0: 0}, {0: 1}) is None
    assert await reader.resolve([A]) == [Known(B)]
    # It may bring what is new, though, in a batch that overlaps.
    overlapping = changes(active(A), active(B), merged(A, B), active(C))
    assert await slow.apply(overlapping, {0: 0}, {0: 4}) is None
    assert await reader.resolve([A, C]) == [Known(B), Known(C)]
    assert (await writer.read_state()).offsets == {0: 4}
    # Control: with the stored offset put back by hand, the very same batch does bring the old state back.
    await redis.hset(f"{settings.key_prefix}:offsets", "0", "0")
    await slow.apply(changes(active(A)), {0: 0}, {0: 4})
    assert await reader.resolve([A]) == [Known(A)]


async def test_a_batch_repeated_after_a_lost_answer_changes_nothing(make, redis, settings):
    writer, _ = await fill(make, active(A), merged(A, B), active(B))
    before = await read_content(redis, settings.key_prefix)
    assert await writer.apply(changes(active(A), merged(A, B), active(B)), {0: 0}, {0: 3}) is None
    assert await read_content(redis, settings.key_prefix) == before


async def test_another_topic_starts_a_new_build_and_leftovers_do_not_answer(make, redis, settings):
    _, old_reader = await fill(make, active(A), active(B))
    writer = make(ProjectionWriter, "T2", now_ms=now)
    assert (await writer.begin([0])).reason == "OTHER_TOPIC"
    await writer.apply(changes(active(B), offset=0), {0: 0}, {0: 2})
    assert await redis.exists(f"{settings.key_prefix}:id:{KEY.hash_identifier(A)}")  # a leftover
    reader = make(Identities)
    reader.require({0: 2}, "T2")
    assert await reader.resolve([A, B]) == [Unknown(KEY.hash_identifier(A)), Known(B)]
    with pytest.raises(ProjectionBehind):
        await old_reader.resolve([A])


async def test_a_writer_of_an_older_build_is_refused(make, redis, settings):
    writer, reader = await fill(make, active(A))
    await redis.delete(f"{settings.key_prefix}:offsets")
    other = make(ProjectionWriter, "T1", now_ms=now)
    assert (await other.begin([0])).reason == "MISSING"
    await other.apply(changes(active(A)), {0: 0}, {0: 1})
    # Offsets fit, the build does not: it takes up the other's build instead of writing into it.
    replay = await writer.apply(changes(merged(A, B), offset=1), {0: 1}, {0: 2})
    assert (replay.offsets, replay.reason) == ({0: 1}, "BEHIND")
    assert await reader.resolve([A]) == [Known(A)]
    await writer.apply(changes(merged(A, B), offset=1), {0: 1}, {0: 2})
    assert await reader.resolve([A]) == [Unknown(KEY.hash_identifier(B))]


async def test_two_writers_that_begin_at_once_share_one_build(make):
    writers = [make(ProjectionWriter, "T1", now_ms=now) for _ in range(5)]
    begun = await asyncio.gather(*(writer.begin([0, 1]) for writer in writers))
    assert sum(replay is not None for replay in begun) == 1
    for writer in writers:
        assert await writer.apply([], {0: 0, 1: 0}, {0: 0, 1: 0}) is None


@pytest.mark.parametrize(
    ("age", "reason"),
    [(MAX_STALE_MS, None), (MAX_STALE_MS + 1, "STALE"), (-3_600_000, None), (-3_600_001, "STALE")],
)
async def test_a_projection_older_than_the_tombstones_is_built_anew(make, age, reason):
    await fill(make, active(A))
    late = make(ProjectionWriter, "T1", now_ms=lambda: NOW + age)
    replay = await late.begin([0])
    assert (replay.reason if replay else None) == reason
    assert late.positions == ({0: 0} if reason else {0: 1})


async def test_an_idle_projection_stays_fresh(make):
    await fill(make, active(A))
    idle = make(ProjectionWriter, "T1", now_ms=lambda: NOW + MAX_STALE_MS)
    await idle.begin([0])
    await idle.apply([], {0: 1}, {0: 1})
    late = make(ProjectionWriter, "T1", now_ms=lambda: NOW + 2 * MAX_STALE_MS)
    assert await late.begin([0]) is None


@pytest.mark.parametrize("harm", ["format", "entry", "partition", "whole"])
async def test_a_damaged_projection_is_refused(make, redis, settings, harm):
    _, reader = await fill(make, active(A))
    offsets = f"{settings.key_prefix}:offsets"
    if harm == "format":
        await redis.hset(offsets, "format", "0")
    elif harm == "entry":
        await redis.set(f"{settings.key_prefix}:id:{KEY.hash_identifier(A)}", b"\xc1nonsense")
    elif harm == "partition":
        await redis.hdel(offsets, "0")
    else:
        await redis.hset(offsets, "fresh_at", "yesterday")
    with pytest.raises(ProjectionBehind):
        await reader.resolve([A])


async def test_a_redis_that_evicts_is_refused(make, redis):
    writer = make(ProjectionWriter, "T1", now_ms=now)
    kept = {str_of(name): value for name, value in (await redis.config_get("maxmemory*")).items()}
    try:
        await redis.config_set("maxmemory", "200mb")
        await redis.config_set("maxmemory-policy", "allkeys-lru")
        with pytest.raises(RedisEvicts, match="allkeys-lru"):
            await writer.begin([0])
    finally:
        await redis.config_set("maxmemory-policy", kept["maxmemory-policy"])
        await redis.config_set("maxmemory", kept["maxmemory"])
    await writer.begin([0])


class Wire:
    """A TCP relay to Redis that can be cut, or hang."""

    def __init__(self, target):
        self.target = target
        self.hanging = False
        self._tasks = set()

    async def __aenter__(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", 0)
        self.port = self._server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        await self.cut()

    async def cut(self):
        self._server.close()
        for task in [*self._tasks]:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)

    async def mend(self):
        self._server = await asyncio.start_server(self._relay, "127.0.0.1", self.port)

    async def _relay(self, reader, writer):
        task = asyncio.current_task()
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)
        parts = urlsplit(self.target)
        far_reader, far_writer = await asyncio.open_connection(parts.hostname, parts.port)
        try:
            await asyncio.gather(self._pump(reader, far_writer), self._pump(far_reader, writer))
        finally:
            writer.close()
            far_writer.close()

    async def _pump(self, source, sink):
        while data := await source.read(65536):
            while self.hanging:  # noqa: ASYNC110 - a test double of a frozen peer
                await asyncio.sleep(0.01)
            sink.write(data)
            await sink.drain()
        sink.close()


@pytest.fixture
async def wire(settings):
    async with Wire(settings.url) as wire:
        yield wire


def through(settings, wire, **changes):
    return settings.model_copy(update={"url": f"redis://127.0.0.1:{wire.port}/9", **changes})


async def test_a_redis_that_is_cut_off_is_down_and_then_works_again(make, settings, wire):
    await fill(make, active(A))
    reader = make(Identities, settings=through(settings, wire))
    reader.require({0: 1})
    assert await reader.resolve([A]) == [Known(A)]
    await wire.cut()
    with pytest.raises(RedisDown) as caught:
        await reader.resolve([A])
    assert caught.value.place == f"127.0.0.1:{wire.port}"
    await wire.mend()
    assert await reader.resolve([A]) == [Known(A)]


async def test_a_redis_that_hangs_is_down_and_its_late_answers_reach_no_one(make, settings, wire):
    await fill(make, active(A), active(B))
    reader = make(Identities, settings=through(settings, wire, socket_timeout_seconds=0.1, deadline_seconds=0.3))
    reader.require({0: 2})
    assert await reader.resolve([A]) == [Known(A)]
    wire.hanging = True
    with pytest.raises(RedisDown):
        await reader.resolve([A])
    wire.hanging = False
    for _ in range(5):
        assert await reader.resolve([B]) == [Known(B)]


async def test_the_deadline_holds_whatever_one_answer_may_take(make, settings, wire):
    reader = make(Identities, settings=through(settings, wire, socket_timeout_seconds=10, deadline_seconds=0.2))
    reader.require({})
    wire.hanging = True
    with pytest.raises(RedisDown):
        async with asyncio.timeout(8):  # without a deadline of its own, this one would strike and not be RedisDown
            await reader.resolve([A])


# --- the projector between Kafka and Redis ---


@pytest.fixture
def topic(stack):
    name = f"patients-{uuid.uuid4().hex[:10]}"
    admin = AdminClient({"bootstrap.servers": stack.kafka_bootstrap})
    admin.create_topics([NewTopic(name, 2, 1)])[name].result(20)
    yield name
    admin.delete_topics([name])[name].result(20)


@pytest.fixture
def produce(stack, topic):
    producer = Producer({"bootstrap.servers": stack.kafka_bootstrap, "transactional.id": topic, "acks": "all"})
    producer.init_transactions(30)
    encoder = Encoder("patient_record", 1)

    def write(*records, commit=True):
        producer.begin_transaction()
        for item in records:
            key = KEY.hash_identifier(item.identifier)
            producer.produce(topic, encoder.encode(item), key, partition=int(key[0], 16) % 2)
        producer.flush(20)
        producer.commit_transaction(20) if commit else producer.abort_transaction(20)

    return write


@pytest.fixture
async def start(stack, topic, settings):
    """Starts projectors; all are stopped at the end, and must have ended without an error."""
    kafka = KafkaSettings(bootstrap=stack.kafka_bootstrap)
    decoder = Decoder("patient_record", PatientRecord, lambda _id: load_schema("patient_record"))
    started = []

    async def begin(redis_settings=settings):
        reader = TopicReader(kafka, topic)
        writer = ProjectionWriter(redis_settings, KEY, await asyncio.to_thread(reader.topic_id))
        projector = Projector(reader, writer, decoder.decode, KEY, metrics=Metrics(strict=True), check_seconds=0.05)
        task = asyncio.create_task(projector.run())
        started.append((projector, task))
        await until(lambda: projector.ready()[0], task)
        return projector, task

    yield begin
    for projector, _ in started:
        projector.stop()
    await asyncio.wait_for(asyncio.gather(*(task for _, task in started)), 30)


async def until(condition, task=None):
    async with asyncio.timeout(30):
        while not condition():
            if task is not None and task.done():
                task.result()
            await asyncio.sleep(0.02)


async def find(reader, wanted, expected):
    """Ask until the answer is as expected; being behind is an answer too."""
    found = None
    async with asyncio.timeout(30):
        while found != expected:
            try:
                found = await reader.resolve(wanted)
            except ProjectionBehind:
                found = None
            await asyncio.sleep(0.02)


async def list_ends(stack, topic):
    reader = TopicReader(KafkaSettings(bootstrap=stack.kafka_bootstrap), topic)
    try:
        return await asyncio.to_thread(reader.end_offsets, "read_uncommitted")
    finally:
        await asyncio.to_thread(reader.close)


def people(count):
    return [active(ref(f"P{number}")) for number in range(count)]


async def test_what_is_committed_reaches_readers_and_what_was_aborted_does_not(make, stack, topic, produce, start):
    produce(*people(50))
    produce(merged(ref("P0"), ref("P1")), commit=False)
    produce(merged(ref("P2"), ref("P3")))
    await start()
    reader = make(Identities)
    reader.require(await list_ends(stack, topic))
    wanted = [ref(f"P{number}") for number in range(50)]
    expected = [Known(ref("P3") if item == ref("P2") else item) for item in wanted]
    assert await reader.resolve(wanted) == expected  # ready means that the end seen at start is applied
    produce(merged(ref("P3"), ref("P4")))
    await find(reader, [ref("P2"), ref("P3")], [Known(ref("P4"))] * 2)


async def test_flushed_under_a_running_projector_comes_back_the_same(
    make, stack, topic, produce, start, redis, settings
):
    produce(*people(200), *(merged(ref(f"P{n}"), ref(f"P{n + 1}")) for n in range(0, 100, 3)))
    projector, task = await start()
    before = await read_content(redis, settings.key_prefix)
    assert len(before) == 200
    reader = make(Identities)
    reader.require(await list_ends(stack, topic))
    await reader.check()
    await redis.flushdb()
    answers = set()
    async with asyncio.timeout(30):
        while True:
            try:
                answers.add(tuple(await reader.resolve([ref("P0"), ref("P150")])))
                break
            except ProjectionBehind:
                await asyncio.sleep(0.005)
    assert answers == {(Known(ref("P1")), Known(ref("P150")))}
    await until(lambda: projector.ready()[0] and projector.lag == 0, task)
    assert await read_content(redis, settings.key_prefix) == before


async def test_a_restart_reads_only_what_is_new(produce, start, redis, settings):
    produce(*people(30))
    first, task = await start()
    first.stop()
    await task
    content = await read_content(redis, settings.key_prefix)
    produce(active(ref("new")))
    second, _ = await start()
    assert second._metrics.read(Metric.PROJECTION_APPLIED) == 1
    assert len(await read_content(redis, settings.key_prefix)) == len(content) + 1


async def test_two_projectors_and_a_flush_end_in_the_same_content(produce, start, redis, settings):
    produce(*people(100))
    first, first_task = await start()
    second, second_task = await start()
    before = await read_content(redis, settings.key_prefix)
    await redis.flushdb()
    produce(merged(ref("P1"), ref("P2")))
    survivor = KEY.hash_identifier(ref("P2"))
    key = f"{settings.key_prefix}:id:{KEY.hash_identifier(ref('P1'))}".encode()
    content = {}
    async with asyncio.timeout(30):
        while content.keys() != before.keys() or content[key][3] != survivor:
            content = await read_content(redis, settings.key_prefix)
            await asyncio.sleep(0.02)
    await until(lambda: first.ready()[0], first_task)
    await until(lambda: second.ready()[0], second_task)
    assert {k: v for k, v in content.items() if k != key} == {k: v for k, v in before.items() if k != key}


async def test_an_old_snapshot_under_a_running_projector_is_brought_up_again(make, stack, topic, produce, start, redis):
    produce(*people(20))
    await start()
    old = await copy_database(redis)
    produce(merged(ref("P1"), ref("P2")))
    reader = make(Identities)
    reader.require(await list_ends(stack, topic))
    await find(reader, [ref("P1")], [Known(ref("P2"))])
    await restore_database(redis, old)
    seen = []
    async with asyncio.timeout(30):
        while not seen:
            with contextlib.suppress(ProjectionBehind):
                seen = await reader.resolve([ref("P1")])
    assert seen == [Known(ref("P2"))]  # at no time Known(P1)


async def test_redis_away_and_back_under_a_running_projector(make, produce, start, settings, wire):
    produce(*people(20))
    projector, task = await start(through(settings, wire))
    await wire.cut()
    produce(merged(ref("P1"), ref("P2")))
    await until(lambda: "RS240" in projector.ready()[1].get("projection", ""), task)
    await wire.mend()
    await until(lambda: projector.ready()[0], task)
    reader = make(Identities)
    reader.require({})
    await find(reader, [ref("P1")], [Known(ref("P2"))])

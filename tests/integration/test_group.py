"""The group consumer and what it stands on, against a real broker: transactions, frontiers, fencing."""

import asyncio
import contextlib
import os
import threading
import time
import uuid
from typing import ClassVar

import pytest
from confluent_kafka import (
    Consumer,
    ConsumerGroupTopicPartitions,
    KafkaError,
    KafkaException,
    Producer,
    TopicPartition,
)
from confluent_kafka.admin import (
    AdminClient,
    AlterConfigOpType,
    ConfigEntry,
    ConfigResource,
    NewPartitions,
    NewTopic,
    ResourceType,
)

from schemas.failure import FatalError, TemporaryError
from topics import group as group_module
from topics import reading as reading_module
from topics.cluster import KafkaSettings, KafkaUnreachable, describe_topic_ids
from topics.footing import PartitionsChanged, PositionBroken, TopicReplaced
from topics.frontier import FrontierLost, FrontierMissing, await_pending_offsets, build_frontier, read_frontiers
from topics.group import GroupConsumer, StaleAssignment
from topics.membership import MemberFenced, Membership
from topics.reading import Record, TopicReader, build_record, read_to_end
from topics.transaction import Output, ProcessFenced, ProducerFailed, RecordRefused, TransactionAborted, Transactor

pytestmark = pytest.mark.integration


class Place:
    """Topics, a group and members of their own on the shared broker."""

    def __init__(self, kafka, partitions):
        self.kafka = kafka
        self.membership = Membership.STICKY
        self.admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
        self.id = uuid.uuid4().hex[:8]
        self.source, self.out, self.group = f"in-{self.id}", f"out-{self.id}", f"g-{self.id}"
        existing = self.admin.list_topics(timeout=10).topics
        wanted = [NewTopic(self.source, partitions, 1), NewTopic(self.out, 1, 1)]
        if "frontiers" not in existing:
            wanted.append(NewTopic("frontiers", 1, 1, config={"cleanup.policy": "compact"}))
        for future in self.admin.create_topics(wanted, operation_timeout=20).values():
            future.result()
        # The controller has answered; the broker may know them a moment later.
        until = time.monotonic() + 20
        while not {topic.topic for topic in wanted} <= self.admin.list_topics(timeout=10).topics.keys():
            assert time.monotonic() < until, "the topics do not appear"
            time.sleep(0.02)
        self.members = []

    @property
    def topic_id(self):
        return describe_topic_ids(self.kafka, [self.source])[self.source]

    def send(self, *values, partition=0, topic=None):
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap})
        for value in values:
            producer.produce(topic or self.source, value.encode(), b"k", partition=partition)
        assert producer.flush(10) == 0

    def read(self, topic=None):
        return [item.value.decode() for item in read_to_end(self.kafka, topic or self.out) if isinstance(item, Record)]

    def read_group_offset(self, partition=0):
        wanted = ConsumerGroupTopicPartitions(self.group, [TopicPartition(self.source, partition)])
        found = self.admin.list_consumer_group_offsets([wanted])[self.group].result()
        return found.topic_partitions[0].offset

    def read_frontier(self, partition=0):
        return read_frontiers(self.kafka, self.group).get((self.topic_id, partition))

    def build_member(self, name, **arguments):
        arguments = {"topics": [self.source], "membership": self.membership} | arguments
        member = GroupConsumer(
            self.kafka,
            group=self.group,
            instance=f"{self.id}-{name}",
            transactional_id=f"{self.id}-{name}",
            build=build_record,
            **arguments,
        )
        self.members.append(member)
        return member

    async def join(self, name="a", **arguments):
        member = self.build_member(name, **arguments)
        await member.start()
        return member

    def positions(self, records):
        found = {}
        for record in records:
            found[self.source, record.partition] = record.offset + 1
        return found

    def answers(self, records):
        return [Output(self.out, b"k", record.value, partition=0) for record in records]

    async def commit(self, member, polled, **arguments):
        await member.commit(polled.number, self.answers(polled.records), self.positions(polled.records), **arguments)


@pytest.fixture
async def make_place(stack):
    kafka = KafkaSettings(bootstrap=stack.kafka_bootstrap, session_timeout_seconds=6)
    places = []

    def make(partitions=1):
        places.append(Place(kafka, partitions))
        return places[-1]

    yield make
    for place in places:
        for member in place.members:
            await member.close()
        names = [place.source, place.out]
        for future in place.admin.delete_topics(names, operation_timeout=10).values():
            with contextlib.suppress(KafkaException):
                future.result()


@pytest.fixture
def place(make_place):
    return make_place()


async def take(member, count, tries=150):
    """Poll until there are records; all of one poll."""
    for _ in range(tries):
        polled = await member.poll(count, 0.2)
        if polled.records:
            return polled
    pytest.fail("no records came")


async def poll_until_ready(member):
    for _ in range(150):
        await member.poll(1, 0.1)
        if member.is_ready():
            return
    pytest.fail("it did not become ready")


async def poll_for_long(member):
    for _ in range(300):
        await member.poll(10, 0.1)


async def test_outputs_frontier_and_offsets_are_visible_together(place):
    place.send("1", "2", "3")
    member = await place.join()
    polled = await take(member, 10)
    assert [record.value for record in polled.records] == [b"1", b"2", b"3"]
    seen_at_commit = []
    await place.commit(member, polled, committed=lambda: seen_at_commit.append(place.read()))
    assert seen_at_commit == [["1", "2", "3"]], "`committed` runs after the commit"
    assert (place.read_group_offset(), place.read_frontier()) == (3, 3)
    assert member.frontiers() == {(place.source, 0): 3}


async def test_a_refused_record_takes_everything_back_however_often(place):
    place.send("1", "2", "3")
    member = await place.join()
    for _ in range(5):
        polled = await take(member, 10)
        assert [record.offset for record in polled.records] == [0, 1, 2], "the batch comes again, nothing is skipped"
        outputs = place.answers(polled.records)
        too_large = Output(place.out, b"k", b"x" * 9_000_000, partition=0, cause="large")
        with pytest.raises(RecordRefused) as refusal:
            await member.commit(polled.number, [*outputs, too_large], place.positions(polled.records))
        assert refusal.value.cause == "large"
        assert (place.read(), place.read_group_offset(), place.read_frontier()) == ([], -1001, None)
    polled = await take(member, 10)
    await place.commit(member, polled)
    place.send("4")
    await place.commit(member, await take(member, 10))
    assert place.read() == ["1", "2", "3", "4"]


async def test_a_record_refused_among_others_is_found_at_the_second_attempt(place):
    resource = ConfigResource(
        ResourceType.TOPIC,
        place.out,
        incremental_configs=[
            ConfigEntry("max.message.bytes", "2000", incremental_operation=AlterConfigOpType.SET),
        ],
    )
    for future in place.admin.incremental_alter_configs([resource]).values():
        future.result()
    place.send("1")
    member = await place.join()
    small = [Output(place.out, b"k", b"small", partition=0, cause="small") for _ in range(5)]
    large = Output(place.out, b"k", os.urandom(5000), partition=0, cause="large")
    found = []
    while len(found) < 2:
        polled = await take(member, 10)
        # After a refused request librdkafka's next transaction may fail once more, over sequence numbers.
        with pytest.raises((RecordRefused, TransactionAborted)) as refusal:
            await member.commit(polled.number, [*small, large, *small], place.positions(polled.records))
        if isinstance(refusal.value, RecordRefused):
            found.append(refusal.value.cause)
    assert found == [None, "large"]
    assert place.read() == []


async def test_an_abort_rewinds_and_skips_nothing(place):
    place.send(*"abcdef")
    member = await place.join()
    polled = await take(member, 3)
    await member.rewind()
    again = await take(member, 3)
    assert again.records[0].offset == polled.records[0].offset == 0
    await place.commit(member, again)
    while member.frontiers()[place.source, 0] < 6:
        await place.commit(member, await take(member, 2))
    assert place.read() == list("abcdef")


@pytest.mark.parametrize("membership", list(Membership))
async def test_a_second_member_makes_a_batch_in_hand_stale(make_place, membership):
    place = make_place(2)
    place.membership = membership
    for partition in (0, 1):
        place.send(*(f"{partition}-{number}" for number in range(20)), partition=partition)
    first = await place.join("a")
    polled = await take(first, 10)
    second = await place.join("b")
    for _ in range(150):
        await second.poll(1, 0.05)
        await first.poll(1, 0.05)
        if first.number != polled.number and second.number:
            break
    with pytest.raises(StaleAssignment):
        await place.commit(first, polled)
    assert place.read() == []

    async def work(member):
        while len(done) < 40:
            polled = await member.poll(7, 0.1)
            if polled.records:
                with contextlib.suppress(StaleAssignment, TransactionAborted):
                    await place.commit(
                        member,
                        polled,
                        committed=lambda polled=polled: done.extend(
                            (member, record.value) for record in polled.records
                        ),
                    )

    done = []
    async with asyncio.timeout(60):
        await asyncio.gather(work(first), work(second))
    assert sorted(place.read()) == sorted(f"{p}-{n}" for p in (0, 1) for n in range(20))
    assert {member for member, _ in done} == {first, second}, "both must have worked, or nothing was shared"


@pytest.mark.parametrize("membership", list(Membership))
async def test_heartbeats_are_known_to_have_arrived(make_place, membership):
    place = make_place()
    member = await place.join(membership=membership)
    async with asyncio.timeout(60):
        while not member.frontiers():
            await member.poll(1, 0.1)
        assigned_at = member.last_heartbeat
        while member.last_heartbeat < assigned_at + 2:
            await member.poll(1, 0.1)


@pytest.mark.parametrize("membership", list(Membership))
async def test_a_member_that_leaves_gives_its_partitions_to_the_rest(make_place, membership):
    place = make_place(3)
    place.membership = membership
    first, second = await place.join("a"), await place.join("b")

    async def await_owned(*members):
        async with asyncio.timeout(60):
            while sum(len(member.frontiers()) for member in members) != 3 or not all(
                member.frontiers() for member in members
            ):
                await asyncio.gather(*(member.poll(1, 0.05) for member in members))

    await await_owned(first, second)
    assert not first.frontiers().keys() & second.frontiers().keys()
    await second.close()
    await await_owned(first)
    for partition in range(3):
        place.send(str(partition), partition=partition)
    while len(place.read()) < 3:
        await place.commit(first, await take(first, 10))
    assert sorted(place.read()) == ["0", "1", "2"]


@pytest.mark.parametrize("membership", [Membership.SPREAD, Membership.SERVER])
async def test_a_late_member_gets_its_share_of_every_topic(make_place, membership):
    """With sticky assignment it would get all partitions of the one and none of the other topic."""
    place, other = make_place(4), make_place(4)
    place.membership = membership
    both = [place.source, other.source]
    members = [place.build_member(name, topics=both) for name in "ab"]
    await members[0].start()
    async with asyncio.timeout(60):
        while len(members[0].frontiers()) != 8:
            await members[0].poll(1, 0.05)
        await members[1].start()
        while sum(len(member.frontiers()) for member in members) != 8 or not members[1].frontiers():
            await asyncio.gather(*(member.poll(1, 0.05) for member in members))
    for member in members:
        assert sorted(topic for topic, _ in member.frontiers()) == sorted(both * 2)


@pytest.mark.parametrize("when", ["before the start", "while it runs"])
async def test_partitions_added_to_a_topic_stop_the_process(make_place, when):
    place = make_place(2)
    add = {place.source: 3}

    def grow():
        for future in place.admin.create_partitions([NewPartitions(*pair) for pair in add.items()]).values():
            future.result()
        while len(place.admin.list_topics(place.source).topics[place.source].partitions) < 3:
            time.sleep(0.05)

    member = place.build_member("a", partitions=2, membership=Membership.SPREAD)
    if when == "before the start":
        grow()
        with pytest.raises(PartitionsChanged) as changed:
            await member.start()
    else:
        await member.start()
        await member.poll(1, 0.1)
        grow()
        other = await place.join("b", membership=Membership.SPREAD)  # whatever makes the group share out again

        async def work():
            while True:
                await asyncio.gather(member.poll(1, 0.1), other.poll(1, 0.1))

        with pytest.raises(PartitionsChanged) as changed:
            await asyncio.wait_for(work(), 60)
    assert place.source in changed.value.place
    assert "3 partitions, not 2" in changed.value.detail


async def test_a_new_process_of_the_same_name_fences_the_old_one(place):
    place.send("1")
    old = await place.join("same")
    polled = await take(old, 10)
    new = await place.join("same")
    with pytest.raises(ProcessFenced):
        await place.commit(old, polled)
    assert place.read() == []
    with pytest.raises(ProcessFenced):
        await old.poll(1, 0.1)
    await place.commit(new, await take(new, 10))
    assert place.read() == ["1"]


async def test_an_idle_process_of_a_taken_name_stops_and_leaves_the_new_one_alone(place):
    old = await place.join("same")
    place.send("1")
    await place.commit(old, await take(old, 10))
    new = await place.join("same")
    with pytest.raises(ProcessFenced):
        await poll_for_long(old)
    place.send("2")
    await place.commit(new, await take(new, 10))
    assert place.read() == ["1", "2"]


@contextlib.contextmanager
def fence(place, member):
    """Take a member's place in the group, as its own request to join does that was sent again: no other process."""
    stranger = Consumer(
        {
            "bootstrap.servers": place.kafka.bootstrap,
            "group.id": place.group,
            "group.instance.id": member,
            "partition.assignment.strategy": "cooperative-sticky",
            "session.timeout.ms": 6000,
        }
    )
    stranger.subscribe([place.source])
    until = time.monotonic() + 20
    while not stranger.assignment():
        assert time.monotonic() < until, "it does not get the place"
        stranger.poll(0.1)
    yield
    stranger.close()


async def commit_next(place, member):
    """What a fenced member polls before it learns of it is rolled back, and comes again."""
    while True:
        polled = await take(member, 10)
        with contextlib.suppress(StaleAssignment, TransactionAborted):
            return await place.commit(member, polled)


async def test_a_member_that_the_group_fenced_joins_again(place):
    released = []
    member = await place.join("a", release=lambda _topic, partition: released.append(partition))
    place.send("1")
    await commit_next(place, member)
    with fence(place, f"{place.id}-a"):
        place.send("2")
        await commit_next(place, member)
    assert released == [0], "its state may be another's now"
    assert place.read() == ["1", "2"]
    assert place.read("frontiers").count("probe") == 0


async def test_a_member_that_is_fenced_again_and_again_stops(place):
    member = await place.join("a")
    place.send("1")
    await commit_next(place, member)
    for number in range(2):
        with fence(place, f"{place.id}-a"):
            place.send(str(number + 2))
            await commit_next(place, member)
    with fence(place, f"{place.id}-a"), pytest.raises(MemberFenced):
        await poll_for_long(member)
    assert place.read() == ["1", "2", "3"]


async def test_offsets_set_back_by_hand_do_not_replay(place):
    place.send(*"abc")
    transactor = Transactor(place.kafka, f"{place.id}-earlier")
    transactor.open()
    producer = Producer({"bootstrap.servers": place.kafka.bootstrap})
    start = build_frontier(place.group, place.topic_id, 0, 2)
    producer.produce(start.topic, start.value, start.key, partition=0)
    assert producer.flush(10) == 0
    reset = ConsumerGroupTopicPartitions(place.group, [TopicPartition(place.source, 0, 0)])
    for future in place.admin.alter_consumer_group_offsets([reset]).values():
        future.result()
    assert place.read_group_offset() == 0
    member = await place.join()
    polled = await take(member, 10)
    assert [record.value for record in polled.records] == [b"c"]
    transactor.close()


async def test_a_group_without_offsets_starts_at_its_frontier_and_a_new_one_at_the_log_start(make_place):
    for known, expected in ((None, b"a"), (2, b"c")):
        place = make_place()
        place.send(*"abc")
        if known is not None:
            start = build_frontier(place.group, place.topic_id, 0, known)
            producer = Producer({"bootstrap.servers": place.kafka.bootstrap})
            producer.produce(start.topic, start.value, start.key, partition=0)
            assert producer.flush(10) == 0
        assert place.read_group_offset() == -1001
        member = await place.join()
        assert (await take(member, 10)).records[0].value == expected


async def test_a_frontier_that_was_lost_stops_with_its_code_and_where_to_go_on(place):
    """From the log's begin all would be decided, and posted, again."""
    place.send(*"abc")
    member = await place.join()
    await place.commit(member, await take(member, 3))
    await member.close()
    producer = Producer({"bootstrap.servers": place.kafka.bootstrap})
    lost = build_frontier(place.group, place.topic_id, 0, 3)
    producer.produce(lost.topic, None, lost.key, partition=0)
    assert producer.flush(10) == 0
    again = await place.join()
    with pytest.raises(FrontierMissing) as missing:
        await take(again, 10)
    assert (missing.value.code, missing.value.place) == ("RS399", f"{place.source}[0]")
    assert "`--to 3`" in missing.value.remedy
    assert place.read() == list("abc")


@pytest.mark.parametrize("where", ["below the log", "above the log"])
async def test_a_frontier_outside_the_log_stops_with_its_code(place, where):
    place.send(*"abcdef")
    start = build_frontier(place.group, place.topic_id, 0, 2 if where == "below the log" else 9)
    producer = Producer({"bootstrap.servers": place.kafka.bootstrap})
    producer.produce(start.topic, start.value, start.key, partition=0)
    assert producer.flush(10) == 0
    for future in place.admin.delete_records([TopicPartition(place.source, 0, 4)]).values():
        future.result()
    member = await place.join()
    with pytest.raises(FrontierLost) as lost:
        await take(member, 10)
    assert lost.value.code == "RS303"
    assert place.source in lost.value.place
    assert not member.is_ready()


@pytest.mark.parametrize("membership", [Membership.SPREAD, Membership.SERVER])
async def test_a_topic_made_anew_under_a_member_stops_it_and_is_read_from_its_begin(place, membership, monkeypatch):
    """Of itself the client of a classic member goes on behind the old position, and leaves out what lies before."""
    monkeypatch.setattr("topics.group.TOPICS_SECONDS", 0.2)
    place.membership = membership
    member = await place.join()
    place.send(*"abc")
    done = 0
    while done < 3:
        polled = await take(member, 10)
        done += len(polled.records)
        await place.commit(member, polled)
    for future in place.admin.delete_topics([place.source], operation_timeout=10).values():
        future.result()
    while place.source in describe_topic_ids(place.kafka, [place.source]):  # noqa: ASYNC110 - a broker has no event for it
        await asyncio.sleep(0.05)
    for future in place.admin.create_topics([NewTopic(place.source, 1, 1)], operation_timeout=10).values():
        future.result()
    place.send(*"klmnopqr")
    with pytest.raises(TopicReplaced) as replaced:
        await poll_for_long(member)
    assert (replaced.value.code, replaced.value.place) == ("RS307", place.source)
    await member.close()
    successor, read = await place.join("b"), []
    while len(read) < 8:
        read += [record.value.decode() for record in (await take(successor, 10)).records]
    assert read == list("klmnopqr")


async def test_a_deleted_topic_is_reported_and_ends_nothing(place, monkeypatch):
    monkeypatch.setattr("topics.group.TOPICS_SECONDS", 0.2)
    reports = []
    member = await place.join(report=lambda event, error: reports.append((event, error.code)))
    place.send("a")
    await take(member, 1)
    for future in place.admin.delete_topics([place.source], operation_timeout=10).values():
        future.result()
    for _ in range(300):
        await member.poll(1, 0.1)
        if ("topics_not_seen", "RS211") in reports:
            break
    else:
        pytest.fail("nobody was told")
    assert member.failure is None
    assert not member.is_ready()
    assert (member.hindrance.code, member.hindrance.place) == ("RS211", place.source)


async def test_a_member_that_is_not_let_in_says_so(place, monkeypatch):
    """Its client asks until the others have gone, and tells nobody but who looks at its events."""
    monkeypatch.setattr("topics.group.TOPICS_SECONDS", float("inf"))
    first = await place.join("a", membership=Membership.SPREAD)
    while not first.frontiers():
        await first.poll(1, 0.1)
    reports = []
    other = await place.join("b", report=lambda event, error: reports.append((event, error.code, error.place)))
    async with asyncio.timeout(60):
        while not reports:
            await asyncio.gather(first.poll(1, 0.1), other.poll(1, 0.1))
        assert reports == [("client_trouble", "RS398", place.group)]
        assert not other.is_ready()
        assert other.hindrance.code == "RS398"
        await first.close()
        while not other.is_ready():
            await other.poll(1, 0.1)
    assert other.hindrance is None


def test_a_producer_that_can_never_begin_says_so(place):
    """The broker refuses the time-out; a client that was refused for good refuses every later attempt by itself."""
    kafka = KafkaSettings.model_construct(**{**dict(place.kafka), "transaction_timeout_seconds": 86_400})
    with pytest.raises(ProducerFailed, match="INVALID_TRANSACTION_TIMEOUT") as error:
        Transactor(kafka, f"{place.id}-x").open()
    assert "transaction.max.timeout.ms" in error.value.remedy


async def test_a_frontier_of_an_earlier_topic_of_that_name_does_not_count(place):
    place.send(*"ab")
    start = build_frontier(place.group, "ZGVsZXRlZC10b3BpYy1pZA", 0, 2)
    producer = Producer({"bootstrap.servers": place.kafka.bootstrap})
    producer.produce(start.topic, start.value, start.key, partition=0)
    assert producer.flush(10) == 0
    member = await place.join()
    assert (await take(member, 10)).records[0].value == b"a"


async def test_a_skipped_record_stops_the_process(place):
    place.send(*"abc")
    member = await place.join()
    await place.commit(member, await take(member, 2))
    # As if a seek had been lost: the client stands at 2, the frontier says 0.
    owned = member._owned[place.source, 0]
    owned.frontier, owned.placed = 0, True
    with pytest.raises(PositionBroken):
        await take(member, 10)
    with pytest.raises(PositionBroken):
        await member.poll(1, 0.1)


async def test_aborted_records_between_are_no_gap(place):
    producer = Producer({"bootstrap.servers": place.kafka.bootstrap, "transactional.id": f"{place.id}-raw"})
    producer.init_transactions(10)
    for value, ends in ((b"aborted", producer.abort_transaction), (b"a", producer.commit_transaction)):
        producer.begin_transaction()
        producer.produce(place.source, value, b"k", partition=0)
        assert producer.flush(10) == 0
        ends()
    member = await place.join()
    polled = await take(member, 10)
    assert [(record.offset, record.value) for record in polled.records] == [(2, b"a")]
    await place.commit(member, polled)


async def test_nothing_is_polled_or_committed_after_a_failure(place):
    place.send(*"ab")
    member = await place.join()
    polled = await take(member, 1)

    def fail():
        raise FatalError("the store is full.", place="here")

    with pytest.raises(FatalError):
        await place.commit(member, polled, committed=fail)
    with pytest.raises(FatalError):
        await member.poll(1, 0.1)
    with pytest.raises(FatalError):
        await place.commit(member, polled)
    assert place.read() == ["a"]


async def test_a_transaction_without_offsets_is_refused(place):
    place.send("a")
    member = await place.join()
    polled = await take(member, 1)
    with pytest.raises(ValueError, match="fences nothing"):
        await member.commit(polled.number, [Output(place.out, b"k", b"v")], {})
    assert place.read() == []


async def test_a_poll_that_is_given_up_loses_nothing(place):
    member = await place.join()
    while not member.frontiers():
        await member.poll(1, 0.1)
    given_up = asyncio.create_task(member.poll(10, 5.0))
    await asyncio.sleep(0.1)
    given_up.cancel()
    place.send(*"abc")
    await member.call(lambda: None)  # that poll has ended
    place.send(*"de")
    while member.frontiers()[place.source, 0] < 5:
        await place.commit(member, await take(member, 10))
    assert place.read() == list("abcde")


async def test_pausing_keeps_membership_and_loses_nothing(place):
    place.send(*"abcd")
    member = await place.join()
    polled = await take(member, 2)
    assert len(polled.records) == 2
    await member.rewind()
    await member.pause()
    for _ in range(5):
        assert (await member.poll(10, 0.1)).records == []
    await member.resume()
    while member.frontiers()[place.source, 0] < 4:
        await place.commit(member, await take(member, 2))
    assert place.read() == list("abcd")


# Loading.


async def test_loading_is_tried_again_and_nothing_is_polled_before_it_is_done(place):
    place.send("a")
    calls, reports = [], []

    def load(topic, partition):
        calls.append((topic, partition))
        if len(calls) < 3:
            raise TemporaryError("not yet.", place="here")

    member = await place.join(load=load, report=lambda event, _error: reports.append((event, len(calls))))
    assert not member.is_ready()
    await take(member, 10)
    assert member.is_ready()
    assert calls == [(place.source, 0)] * 3
    assert reports == [("partition_load_failed", 1), ("partition_load_failed", 2)]


@pytest.mark.parametrize("error", [FatalError("broken.", place="here"), KeyError("bug")])
async def test_a_partition_that_cannot_be_loaded_stops_the_process(place, error):
    def load(_topic, _partition):
        raise error

    member = await place.join(load=load)
    with pytest.raises(FatalError):
        await take(member, 10)


async def test_a_partition_that_comes_back_while_it_is_loaded_is_loaded_by_one_at_a_time(place):
    happened = []
    go = threading.Event()

    def load(_topic, _partition):
        happened.append("load begins")
        assert go.wait(20)
        happened.append("load ends")

    member = place.build_member("a", load=load, release=lambda *_key: happened.append("release"))
    member._consumer = FakeConsumer()
    key = (place.source, 0)
    member._footing.find_starts = lambda keys: dict.fromkeys(keys, 0)
    partitions = [TopicPartition(*key)]
    await member.call(member._on_assign, member._consumer, partitions)
    await member.call(member._on_revoke, member._consumer, partitions)
    await member.call(member._on_assign, member._consumer, partitions)
    go.set()
    for _ in range(200):
        if member.frontiers():
            break
        await asyncio.sleep(0.02)
    assert member.frontiers() == {key: 0}
    # The first release is the revocation; the second gives up what the abandoned loader had loaded.
    assert happened == ["load begins", "release", "load ends", "release", "load begins", "load ends"]
    member._consumer = None


class FakeConsumer:
    def __getattr__(self, _name):
        return lambda *_arguments: None


# A client that lost its brokers. librdkafka does it at some restart of a broker, which no test can bring about at will.


class CutOffClient:
    """A real client up to the moment ``cut``; from then on it reaches no broker and says nothing."""

    made: ClassVar[list["CutOffClient"]] = []

    def __init__(self, configuration, **arguments):
        self.is_cut = False
        listener = configuration.get("stats_cb")
        if listener is not None:
            configuration = configuration | {"stats_cb": lambda text: self.is_cut or listener(text)}
        self._client = Consumer(configuration, **arguments)
        self.made.append(self)

    def __getattr__(self, name):
        return getattr(self._client, name)

    def poll(self, timeout):
        found = self._client.poll(timeout)
        return None if self.is_cut else found

    def list_topics(self, *arguments, **options):
        if self.is_cut:
            raise KafkaException(KafkaError(KafkaError._TRANSPORT))
        return self._client.list_topics(*arguments, **options)


@pytest.fixture
def clients(monkeypatch):
    monkeypatch.setattr(CutOffClient, "made", [])
    monkeypatch.setattr(group_module, "Consumer", CutOffClient)
    monkeypatch.setattr(reading_module, "Consumer", CutOffClient)
    monkeypatch.setattr(group_module, "CUT_OFF_SECONDS", 0)
    monkeypatch.setattr(reading_module, "SILENT_SECONDS", 0.5)
    return CutOffClient.made


@pytest.mark.parametrize("membership", list(Membership))
async def test_a_member_whose_client_lost_its_brokers_gets_a_new_one(place, membership, clients):
    place.membership = membership
    place.send("1")
    reported = []
    member = await place.join(report=lambda event, _error: reported.append(event))
    await place.commit(member, await take(member, 10))
    clients[0].is_cut = True
    place.send("2", "3")
    await place.commit(member, await take(member, 10))
    assert place.read() == ["1", "2", "3"]
    assert reported.count("client_cut_off") == 1


@pytest.mark.parametrize("is_kafka_away", [False, True])
async def test_a_client_that_is_idle_or_without_kafka_is_kept(place, clients, monkeypatch, is_kafka_away):
    member = await place.join()
    await poll_until_ready(member)

    def fail():
        raise KafkaUnreachable("away", place="here")

    if is_kafka_away:
        clients[0].is_cut = True
        monkeypatch.setattr(member._footing, "check", fail)
    # It looks at every poll now.
    monkeypatch.setattr(group_module, "CUT_OFF_SECONDS", -place.kafka.session_timeout_seconds)
    for _ in range(10):
        await member.poll(1, 0.05)
    assert member._consumer is clients[0]


def test_a_reader_whose_client_lost_its_brokers_gets_a_new_one(place, clients):
    place.send("1", "2")
    reader = TopicReader(place.kafka, place.source)
    reader.assign({})

    def read(count):
        found, until = [], time.monotonic() + 30
        while len(found) < count and time.monotonic() < until:
            found += [record.value for record in reader.poll(10, 0.1)]
        return found

    assert read(2) == [b"1", b"2"]
    clients[-1].is_cut = True
    place.send("3")
    assert read(1) == [b"3"]
    clients[-1].is_cut = True
    with pytest.raises(KafkaUnreachable):
        reader.partitions()
    assert reader.partitions() == [0]
    place.send("4")
    assert read(1) == [b"4"]
    reader.close()


# What a start waits for.


@pytest.fixture
def open_transaction(place):
    """A transaction of a predecessor: a frontier and an offset written, the commit not given yet."""
    producer = Producer({"bootstrap.servers": place.kafka.bootstrap, "transactional.id": f"{place.id}-before"})
    producer.init_transactions(10)
    consumer = Consumer({"bootstrap.servers": place.kafka.bootstrap, "group.id": place.group})
    producer.begin_transaction()
    moved = build_frontier(place.group, place.topic_id, 0, 7)
    producer.produce(moved.topic, moved.value, moved.key, partition=0)
    assert producer.flush(10) == 0
    producer.send_offsets_to_transaction([TopicPartition(place.source, 0, 7)], consumer.consumer_group_metadata(), 10)
    yield producer
    with contextlib.suppress(KafkaException):
        producer.abort_transaction(10)
    consumer.close()


def test_undecided_offsets_of_a_predecessor_are_waited_for(place, open_transaction):
    with pytest.raises(KafkaUnreachable):
        await_pending_offsets(place.kafka, place.group, [(place.source, 0)], patience=0.5)
    open_transaction.commit_transaction(10)
    await_pending_offsets(place.kafka, place.group, [(place.source, 0)], patience=10)
    assert place.read_group_offset() == 7


def test_a_frontier_whose_marker_is_on_its_way_is_waited_for(place, open_transaction):
    reader = TopicReader(place.kafka, "frontiers")
    reader.assign({})
    assert reader.end_offsets("read_committed")[0] < reader.end_offsets("read_uncommitted")[0], (
        "the last stable offset lies before the open transaction: reading to it would miss the frontier"
    )
    reader.close()
    found = []
    thread = threading.Thread(target=lambda: found.append(place.read_frontier()))
    thread.start()
    thread.join(1)
    assert found == [], "it must wait for the decision"
    open_transaction.commit_transaction(10)
    thread.join(20)
    assert found == [7]


def test_an_aborted_frontier_is_not_read(place, open_transaction):
    open_transaction.abort_transaction(10)
    assert place.read_frontier() is None


def test_reading_gives_up_without_progress_and_when_told_to(place, open_transaction):
    with pytest.raises(KafkaUnreachable):
        list(read_to_end(place.kafka, "frontiers", deadline_seconds=0.5))
    with pytest.raises(KafkaUnreachable):
        list(read_to_end(place.kafka, "frontiers", stop=lambda: True))

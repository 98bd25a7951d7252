"""How a batch ends: committed, rolled back, given back, or with the worker."""

import asyncio
from types import SimpleNamespace

import pytest

from schemas.events import Fate
from schemas.failure import FatalError, TemporaryError
from streams.decision import Decision, Room
from streams.feeder import DeadLetterRefused, Feeder
from streams.waiting import Held, WaitingDraft, WaitingRoom
from telemetry.metrics import Metrics
from topics.cluster import KafkaSettings
from topics.group import Polled, StaleAssignment
from topics.headers import RawRecord
from topics.reading import TopicMissing
from topics.transaction import Output, RecordRefused, TransactionAborted

RAW = ("raw.stripe", "raw.hl7")


class Group:
    """A group consumer without a broker: answers are queued, calls are noted."""

    def __init__(self):
        self.topic_ids = dict.fromkeys(RAW, "T")
        self.frontier = dict.fromkeys(((topic, 0) for topic in RAW), 0)
        self.polls, self.answers, self.calls = [], [], []
        self.last_heartbeat = float("inf")
        self.hindrance = None

    def frontiers(self):
        return dict(self.frontier)

    async def poll(self, limit, _wait):
        self.calls.append(("poll", limit))
        await asyncio.sleep(0)
        polled = Polled(1)
        for topic, taken in self.polls.pop(0) if self.polls else []:
            polled.partitions.setdefault((topic, taken.partition), []).append(taken)
        return polled

    async def commit(self, number, outputs, positions, *, changelogs, committed):
        self.calls.append(("commit", number, [output.key for output in outputs], dict(positions)))
        answer = self.answers.pop(0) if self.answers else None
        if answer is not None:
            raise answer
        self.frontier.update(positions)
        committed()

    def is_ready(self):
        return self.hindrance is None

    def __getattr__(self, name):
        async def note():
            self.calls.append((name,))

        return note


def record(offset, topic="raw.stripe"):
    return topic, RawRecord(
        hop=f"T:0:{offset}", partition=0, offset=offset, key=b"k", value=b"v", headers=[], timestamp=0
    )


def keep_store():
    """A partition's store in which nothing is to be forgotten."""
    return SimpleNamespace(close=lambda: None, is_purge_due=lambda _now: False)


@pytest.fixture
def feeder(tmp_path, monkeypatch):
    deciders = {name.removeprefix("raw."): SimpleNamespace(source=name.removeprefix("raw.")) for name in RAW}
    feeder = Feeder(
        KafkaSettings(),
        deciders,
        instance="i",
        slot=0,
        state_folder=tmp_path,
        batch_size=100,
        metrics=Metrics(),
    )
    feeder.group = Group()
    feeder.rooms = {(topic, 0): Room(keep_store()) for topic in RAW}
    monkeypatch.setattr("streams.feeder.random.uniform", lambda *_: 0)
    return feeder


def decide(batch, *, hops=()):
    decision = Decision()
    for raw in batch.records:
        decision.outputs.append(Output("payments", raw.hop.encode(), b"", cause=raw.hop))
    decision.outputs += [Output("payments", hop.encode(), b"", cause=hop) for hop in hops]
    return decision


async def test_a_commit_moves_all_partitions_and_applies_afterwards(feeder):
    feeder.group.polls = [[record(4), record(5)]]
    batch = await feeder.next_batch()
    assert [raw.hop for raw in batch.records] == ["T:0:4", "T:0:5"]
    decision, applied = decide(batch), []
    decision.rooms = [
        SimpleNamespace(apply=lambda: applied.append(feeder.group.frontier["raw.stripe", 0]), released=[])
    ]
    assert await batch.commit(decision) is True
    assert feeder.group.calls[-1] == ("commit", 1, [b"T:0:4", b"T:0:5"], {("raw.stripe", 0): 6})
    assert applied == [6]
    assert batch.ended.is_set()


async def test_a_batch_of_nothing_makes_no_transaction(feeder):
    feeder.rooms["raw.stripe", 0].waiting.hold(Held("T:0:1", "e", "PATIENT_UNKNOWN", "p", 0))
    batch = await feeder.next_batch()
    assert batch.records == []
    assert await batch.commit(Decision()) is True
    assert [call[0] for call in feeder.group.calls] == ["poll"]


async def test_one_batch_is_under_way_at_a_time(feeder):
    feeder.group.polls = [[record(0), record(0, "raw.hl7"), record(1)]]
    first, second = await feeder.next_batch(), await feeder.next_batch()
    assert (first.topic, second.topic) == RAW
    assert [len(batch.records) for batch in (first, second)] == [2, 1]
    assert [call[0] for call in feeder.group.calls] == ["poll"]


@pytest.mark.parametrize("answer", [StaleAssignment(), TransactionAborted("x"), RecordRefused("x")])
async def test_what_was_polled_with_a_rolled_back_batch_is_dropped(feeder, answer):
    feeder.group.polls = [[record(0), record(0, "raw.hl7")]]
    batch = await feeder.next_batch()
    feeder.group.answers = [answer]
    assert await batch.commit(decide(batch)) is False
    assert batch.ended.is_set()
    feeder.group.polls = [[record(0), record(0, "raw.hl7")]]
    again = await feeder.next_batch()
    assert (again.topic, again.records) == (batch.topic, batch.records), "the consumer was sought back: all comes again"
    assert [call[0] for call in feeder.group.calls] == ["poll", "commit", "poll"]


async def test_after_an_unexpected_error_no_batch_is_handed_out(feeder):
    feeder.group.polls = [[record(0)]]
    batch = await feeder.next_batch()
    feeder.group.answers = [FatalError("undecided.", place="here")]
    with pytest.raises(FatalError):
        await batch.commit(decide(batch))
    assert not batch.ended.is_set()


async def test_a_refused_record_stays_marked_until_it_is_decided(feeder):
    feeder.group.polls = [[record(0), record(1)]]
    batch = await feeder.next_batch()
    feeder.group.answers = [RecordRefused("MSG_SIZE_TOO_LARGE", "T:0:1")]
    await batch.commit(decide(batch))
    # Another topic's batch comes between: the mark must survive it.
    feeder.group.polls = [[record(0, "raw.hl7")], [record(0), record(1)], [record(2)]]
    other = await feeder.next_batch()
    assert await other.commit(decide(other))
    again = await feeder.next_batch()
    assert again.refused == {"T:0:1"}
    assert await again.commit(decide(again))
    assert (await feeder.next_batch()).refused == set()


async def test_a_refused_release_is_marked_by_its_own_hop(feeder):
    room = feeder.rooms["raw.stripe", 0].waiting
    waiting = Held("T:0:7", "e", "PATIENT_UNKNOWN", "p", 0)
    room.hold(waiting)
    batch = await feeder.next_batch()
    feeder.group.answers = [RecordRefused("MSG_SIZE_TOO_LARGE", "T:0:7")]
    await batch.commit(decide(batch, hops=["T:0:7"]))
    feeder.group.polls = [[record(8)]]
    between = await feeder.next_batch()
    assert await between.commit(decide(between)), "its release is not due in this one"
    feeder._last_idle = 0.0
    again = await feeder.next_batch()
    assert again.refused == {"T:0:7"}
    decision = decide(again, hops=["T:0:7"])
    decision.rooms = [WaitingDraft(room)]
    decision.rooms[0].release(waiting)
    assert await again.commit(decision)
    feeder.group.polls = [[record(9)]]
    assert (await feeder.next_batch()).refused == set()


async def test_an_unknown_culprit_is_searched_and_batches_grow_again(feeder):
    feeder.group.polls = [[record(0), record(1)], [record(0)], [record(1), record(2)]]
    batch = await feeder.next_batch()
    feeder.group.answers = [RecordRefused("MSG_SIZE_TOO_LARGE")]
    await batch.commit(decide(batch))
    for _ in range(2):
        batch = await feeder.next_batch()
        await batch.commit(decide(batch))
    await feeder.next_batch()
    assert [call[1] for call in feeder.group.calls if call[0] == "poll"] == [100, 1, 2, 4]


async def test_the_only_record_of_a_batch_is_not_blamed_for_a_release_beside_it(feeder):
    feeder.group.polls = [[record(9)], [record(9)]]
    batch = await feeder.next_batch()
    feeder.group.answers = [RecordRefused("MSG_SIZE_TOO_LARGE")]
    await batch.commit(decide(batch, hops=["T:0:7"]))
    batch = await feeder.next_batch()
    assert batch.refused == set(), "nobody knows yet which it was"
    feeder.group.answers = [RecordRefused("MSG_SIZE_TOO_LARGE", "T:0:7")]
    await batch.commit(decide(batch, hops=["T:0:7"]))
    feeder.group.polls = [[record(9)]]
    assert (await feeder.next_batch()).refused == {"T:0:7"}


async def test_an_aborted_transaction_is_followed_by_smaller_ones(feeder):
    """One that was too large for its time-out would be tried again for ever."""
    for _ in range(8):
        feeder.group.polls = [[record(0)]]
        feeder.group.answers = [TransactionAborted("a record was not acknowledged")]
        batch = await feeder.next_batch()
        await batch.commit(decide(batch))
    await feeder.next_batch()
    limits = [call[1] for call in feeder.group.calls if call[0] == "poll"]
    assert limits == [100, 50, 25, 12, 6, 3, 1, 1, 1]


async def test_a_full_waiting_room_that_comes_back_within_one_poll_is_paused_again(feeder):
    key, paused = ("raw.stripe", 0), []

    async def pause(partitions):
        paused.append(partitions)

    async def resume(partitions):
        assert partitions == []

    feeder.group.pause, feeder.group.resume = pause, resume
    feeder._waiting_limit = 1
    feeder.rooms[key].waiting.hold(Held("T:0:1", "e", "PATIENT_UNKNOWN", "p", 0))
    full = feeder.rooms[key].waiting
    await feeder.next_batch()
    feeder._release(*key)
    feeder.rooms[key] = Room(keep_store(), full)
    await feeder.next_batch()
    assert paused == [[key], [key]]


async def test_a_store_is_closed_when_its_waiting_room_cannot_be_read(feeder, monkeypatch):
    closed = []
    state = SimpleNamespace(load=lambda _kafka: None, close=lambda: closed.append(1))
    monkeypatch.setattr("streams.feeder.PartitionState", lambda *_: state)

    def rebuild(_room):
        raise TemporaryError("down.", place="registry")

    feeder.deciders["raw.stripe"].rebuild = rebuild
    feeder.rooms.clear()
    with pytest.raises(TemporaryError):
        feeder._load("raw.stripe", 0)
    assert closed == [1]
    assert not feeder.rooms


async def test_suspects_are_read_one_by_one_also_when_their_partition_came_during_the_poll(feeder):
    for _ in range(3):
        feeder.suspects.open()
        feeder.suspects.take({"T:0": (0, 2)}, alone=False)
    feeder.suspects.open()
    frontiers, feeder.group.frontier = {("raw.stripe", 0): 0}, {}

    async def poll(limit, _wait):
        feeder.group.calls.append(("poll", limit))
        feeder.group.frontier = frontiers
        taken = [record(number)[1] for number in range(frontiers["raw.stripe", 0], 3)[:limit]]
        return Polled(1, {("raw.stripe", 0): taken})

    feeder.group.poll = poll
    assert await feeder.next_batch() is None
    for _ in range(3):
        batch = await feeder.next_batch()
        await batch.commit(decide(batch))
    called = [call[-1] for call in feeder.group.calls if call[0] in {"poll", "rewind"}]
    assert called == [100, "rewind", 1, 1, 100]


async def test_a_slow_batch_is_followed_by_smaller_ones_and_only_full_quick_ones_by_larger(feeder, monkeypatch):
    monkeypatch.setattr("streams.feeder.time.perf_counter", lambda: now)
    lengths = {"slow": 2.0, "middling": 0.7, "quick": 0.1}
    position = 0
    for kind, count in (("slow", 100), ("slow", 20), ("middling", 10), ("quick", 9), ("quick", 10), ("quick", 20)):
        now = 1000.0
        feeder.group.polls = [[record(position + number) for number in range(count)]]
        position += count
        batch = await feeder.next_batch()
        batch.begun = now
        now += lengths[kind]
        assert await batch.commit(decide(batch))
    await feeder.next_batch()
    limits = [call[1] for call in feeder.group.calls if call[0] == "poll"]
    assert limits == [100, 50, 10, 10, 10, 20, 40]


async def test_a_refused_dead_letter_stops_the_worker(feeder):
    for _ in range(2):
        feeder.group.polls = [[record(0)]]
        batch = await feeder.next_batch()
        feeder.group.answers = [RecordRefused("MSG_SIZE_TOO_LARGE", "T:0:0")]
        if "T:0:0" in batch.refused:
            with pytest.raises(DeadLetterRefused):
                await batch.commit(decide(batch))
            break
        await batch.commit(decide(batch))
    else:
        pytest.fail("the record was never marked")


async def test_a_batch_given_back_pauses_says_so_and_comes_again(feeder, monkeypatch):
    steady = [100.0]
    monkeypatch.setattr("streams.feeder.time.monotonic", lambda: steady.append(steady[-1] + 0.05) or steady[-1])
    feeder.group.polls = [[record(0), record(0, "raw.hl7")]]
    batch = await feeder.next_batch()
    assert feeder.is_ready() == (True, {})
    await batch.hold(TemporaryError("down.", place="redis:6379"))
    assert batch.ended.is_set()
    calls = [call[0] for call in feeder.group.calls[1:]]
    assert calls[:2] == ["rewind", "pause"]
    assert set(calls[2:-1]) == {"poll"}, "polling goes on, or the group would evict us"
    assert calls[-1] == "resume"
    assert feeder.is_ready() == (False, {"paused": "RS200 at redis:6379"}), "not ready until a batch succeeds"
    feeder.group.polls = [[record(0), record(0, "raw.hl7")]]
    again = await feeder.next_batch()
    assert len(again.records) == 1
    await again.commit(decide(again))
    assert feeder.is_ready() == (True, {})


async def test_what_the_group_waits_for_is_told(feeder):
    feeder.group.hindrance = TopicMissing("the topic was deleted.", place="raw.stripe")
    assert feeder.is_ready() == (False, {"group": "RS211 at raw.stripe"})


async def test_a_record_polled_while_paused_is_not_lost(feeder, monkeypatch):
    steady = [100.0]
    monkeypatch.setattr("streams.feeder.time.monotonic", lambda: steady.append(steady[-1] + 0.05) or steady[-1])
    feeder.group.polls = [[record(0)], [], [record(1)]]
    batch = await feeder.next_batch()
    await batch.hold(TemporaryError("down.", place="here"))
    assert [call[0] for call in feeder.group.calls].count("rewind") == 2


async def test_records_of_a_partition_without_its_state_are_never_dropped_silently(feeder):
    del feeder.rooms["raw.stripe", 0]
    feeder.group.polls = [[record(0)]]
    with pytest.raises(FatalError):
        await feeder.next_batch()


async def test_metrics_count_each_fate(feeder):
    feeder.group.polls = [[record(0)]]
    batch = await feeder.next_batch()
    decision = decide(batch)
    decision.fates[Fate.CANONICAL, "capture"] = 2
    decision.fates[Fate.DEAD_LETTERED, "AMOUNT_MISSING"] = 1
    decision.fates[Fate.IN_REVIEW, "X"] = 1
    await batch.commit(decision)
    text = feeder._metrics.render().decode()
    assert 'fate="canonical"' in text
    assert 'code="AMOUNT_MISSING"' in text


async def test_old_keys_are_forgotten_only_while_nothing_arrives(feeder):
    steps = []

    async def step(states, _call):
        steps.append(states)

    feeder._purge = SimpleNamespace(step=step)
    feeder.group.polls = [[record(0), record(1)]]
    batch = await feeder.next_batch()
    assert len(batch.records) == 2
    assert steps == []
    await batch.commit(decide(batch))
    await feeder.next_batch()
    assert steps == [[room.state for room in feeder.rooms.values()]]


async def test_the_waiting_room_is_measured(feeder):
    room = WaitingRoom()
    room.hold(Held("T:0:1", "e", "PATIENT_UNKNOWN", "p", 0))
    feeder.rooms["raw.stripe", 0].waiting = room
    await feeder.next_batch()
    text = feeder._metrics.render().decode()
    assert 'remitstream_waiting_entries{source="stripe"} 1.0' in text
    assert 'remitstream_waiting_entries{source="hl7"} 0.0' in text
    age = next(
        line for line in text.splitlines() if line.startswith('remitstream_waiting_oldest_seconds{source="stripe"}')
    )
    assert float(age.split()[1]) > 1e9

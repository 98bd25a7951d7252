"""The local store of a partition: a view that may be lost, old, foreign or damaged without harm."""

import asyncio
import os
import shutil
import time
from types import SimpleNamespace

import lmdb
import pytest

from streams import expiry
from streams import state as module
from streams.expiry import KEPT_SECONDS, Purge
from streams.state import LINEAGE, SEEN, WAITING, Draft, Lineage, PartitionState, SeenEntry, StateUnusable
from topics.cluster import KafkaUnreachable
from topics.reading import Record

ENTRY = SeenEntry(b"digest", "T:0:1")


class Log:
    """The changelogs, in place of a broker."""

    def __init__(self):
        self.ids = {"seen.stripe": "S1", "waiting.stripe": "W1", "lineage.stripe": "L1"}
        self.records = {name: [] for name in self.ids}
        self.asked = []
        self.failing = None

    def append(self, topic, key, value):
        offset = len(self.records[topic])
        self.records[topic].append(Record(topic, 0, offset, key, value, [], 0))
        return offset

    def describe(self, _kafka, names, **_arguments):
        return {name: self.ids[name] for name in names if name in self.ids}

    def read(self, _kafka, topic, *, offsets=None, partitions):
        start = (offsets or {}).get(partitions[0], 0)
        self.asked.append((topic, start))
        for record in self.records[topic]:
            if record.offset >= start:
                yield record
        if topic == self.failing:
            raise KafkaUnreachable("gone.", place=topic)
        yield {partitions[0]: max(start, len(self.records[topic]))}

    def commit(self, draft):
        """What the transaction does: append, tell the offsets, apply."""
        for changelog in draft.list_changelogs():
            for key, (value, _) in changelog.entries.items():
                changelog.offset = self.append(changelog.topic, key, value)
        draft.apply()


@pytest.fixture
def log(monkeypatch):
    log = Log()
    monkeypatch.setattr(module, "describe_topic_ids", log.describe)
    monkeypatch.setattr(module, "read_to_end", log.read)
    return log


@pytest.fixture
def open_state(tmp_path, log):
    opened = []

    def open_state(folder=tmp_path, partition=0):
        for earlier in opened:
            earlier.close()
        state = PartitionState(folder, "stripe", partition, (SEEN, WAITING, LINEAGE))
        state.load(None)
        opened.append(state)
        return state

    yield open_state
    for state in opened:
        state.close()


def write_keys(log, state, *names):
    draft = Draft(state)
    for name in names:
        draft.write_seen(name, [SeenEntry(b"d", f"T:0:{name}")])
    log.commit(draft)


def list_keys(state):
    return sorted(key.decode() for key, _ in state.scan(SEEN))


def test_a_draft_changes_nothing_but_itself(open_state):
    state = open_state()
    draft = Draft(state)
    assert draft.read_seen("k") == []
    draft.write_seen("k", [ENTRY])
    draft.write_lineage("root", Lineage("event", patient=("N", "MR", "1")))
    draft.write_waiting("T:0:1", b"entry")
    assert draft.read_seen("k") == [ENTRY]
    assert draft.read_lineage("root").patient == ("N", "MR", "1")
    assert draft.read_waiting("T:0:1") == b"entry"
    other = Draft(state)
    assert (other.read_seen("k"), other.read_lineage("root"), other.read_waiting("T:0:1")) == ([], None, None)


def test_changes_are_written_to_the_own_partition_of_their_changelogs(open_state):
    draft = Draft(open_state(partition=3), cause="T:3:9")
    draft.write_seen("k", [ENTRY])
    draft.write_waiting("T:3:1", None)
    draft.write_lineage("root", Lineage("event"))
    logs = draft.list_changelogs()
    assert [(log.topic, log.partition, list(log.entries)) for log in logs] == [
        ("seen.stripe", 3, [b"k"]),
        ("waiting.stripe", 3, [b"T:3:1"]),
        ("lineage.stripe", 3, [b"root"]),
    ]
    assert logs[1].entries == {b"T:3:1": (None, "T:3:9")}


def test_void_is_a_value_that_counts_as_absent(open_state, log):
    state = open_state()
    draft = Draft(state)
    draft.write_seen("k", [ENTRY])
    draft.write_seen("k", [])
    log.commit(draft)
    assert log.records["seen.stripe"][-1].value is not None
    assert Draft(open_state()).read_seen("k") == []


def test_what_is_applied_is_there_after_a_restart_and_not_read_again(open_state, log):
    write_keys(log, open_state(), "a", "b")
    log.asked.clear()
    state = open_state()
    assert list_keys(state) == ["a", "b"]
    assert log.asked == [("seen.stripe", 2), ("waiting.stripe", 0), ("lineage.stripe", 0)]


def test_what_was_committed_but_not_applied_is_caught_up(open_state, log):
    state = open_state()
    write_keys(log, state, "a")
    draft = Draft(state)
    draft.write_seen("b", [ENTRY])
    draft.write_seen("a", [])
    for changelog in draft.list_changelogs():
        for key, (value, _) in changelog.entries.items():
            log.append(changelog.topic, key, value)
    state = open_state()
    assert list_keys(state) == ["a", "b"]
    assert Draft(state).read_seen("a") == []
    assert Draft(state).read_seen("b") == [ENTRY]


def test_a_tombstone_removes(open_state, log):
    state = open_state()
    for value in (b"entry", None):
        draft = Draft(state)
        draft.write_waiting("T:0:1", value)
        log.commit(draft)
    assert list(state.scan(WAITING)) == []
    shutil.rmtree(state.path)
    assert list(open_state().scan(WAITING)) == []


def test_a_deleted_store_is_read_from_the_start(open_state, log):
    state = open_state()
    write_keys(log, state, "a", "b")
    state.close()
    shutil.rmtree(state.path)
    log.asked.clear()
    assert list_keys(open_state()) == ["a", "b"]
    assert ("seen.stripe", 0) in log.asked


def test_an_older_copy_is_caught_up(open_state, log, tmp_path):
    state = open_state()
    write_keys(log, state, "a")
    state.close()
    shutil.copytree(state.path, tmp_path / "copy")
    write_keys(log, open_state(), "b", "c")
    state.close()
    shutil.rmtree(state.path)
    shutil.copytree(tmp_path / "copy", state.path)
    log.asked.clear()
    assert list_keys(open_state()) == ["a", "b", "c"]
    assert ("seen.stripe", 1) in log.asked


@pytest.mark.parametrize("topic", ["seen.stripe", "waiting.stripe", "lineage.stripe"])
def test_a_store_of_an_earlier_topic_is_dropped(open_state, log, topic):
    write_keys(log, open_state(), "a")
    log.ids[topic] = "another"
    log.records = {name: [] for name in log.ids}
    assert list_keys(open_state()) == []


def test_a_store_of_another_partition_is_dropped(open_state, log, tmp_path):
    state = open_state()
    write_keys(log, state, "a")
    state.close()
    state.path.rename(tmp_path / "stripe-1")
    log.records = {name: [] for name in log.ids}
    assert list_keys(open_state(partition=1)) == []


def test_a_store_that_was_not_current_for_days_is_rebuilt(open_state, log, monkeypatch):
    write_keys(log, open_state(), "a")
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + module.STALE_SECONDS - 10)
    log.asked.clear()
    open_state()
    assert ("seen.stripe", 1) in log.asked
    monkeypatch.setattr(module.time, "time", lambda: now + 2 * module.STALE_SECONDS)
    open_state()
    assert ("seen.stripe", 0) in log.asked


@pytest.mark.parametrize(("ahead", "start"), [(3600 - 10, 1), (3600 + 10, 0)])
def test_a_store_touched_under_a_clock_that_was_ahead_is_rebuilt(open_state, log, monkeypatch, ahead, start):
    """Its real age is unknown: a tombstone may be compacted away that it never saw."""
    now = time.time()
    monkeypatch.setattr(module.time, "time", lambda: now + ahead)
    write_keys(log, open_state(), "a")
    monkeypatch.setattr(module.time, "time", lambda: now)
    log.asked.clear()
    assert list_keys(open_state()) == ["a"]
    assert ("seen.stripe", start) in log.asked


def test_opening_without_catching_up_does_not_make_a_store_current(open_state, log, monkeypatch):
    write_keys(log, open_state(), "a")
    now = time.time()
    log.failing = "lineage.stripe"
    monkeypatch.setattr(module.time, "time", lambda: now + module.STALE_SECONDS - 10)
    with pytest.raises(KafkaUnreachable):
        open_state()
    log.failing = None
    monkeypatch.setattr(module.time, "time", lambda: now + module.STALE_SECONDS + 10)
    log.asked.clear()
    open_state()
    assert ("seen.stripe", 0) in log.asked, "it was last current more than the limit ago"


def test_a_load_that_failed_can_be_tried_again_in_the_same_process(open_state, log):
    log.failing = "waiting.stripe"
    log.append("seen.stripe", b"a", module.VOID)
    with pytest.raises(KafkaUnreachable):
        open_state()
    log.failing = None
    log.append("seen.stripe", b"b", module.VOID)
    assert list_keys(open_state()) == ["a", "b"]


def test_after_a_boot_the_store_is_not_trusted(open_state, log, monkeypatch):
    write_keys(log, open_state(), "a")
    log.asked.clear()
    monkeypatch.setattr(module, "_read_boot_id", lambda: "another boot")
    assert list_keys(open_state()) == ["a"]
    assert ("seen.stripe", 0) in log.asked


@pytest.mark.parametrize("share", [0.0, 0.3, 0.6, 0.95])
def test_a_cut_file_is_rebuilt_and_never_ends_the_process(open_state, log, share):
    state = open_state()
    for number in range(5):
        write_keys(log, state, *(f"{number}-{key}" for key in range(200)))
    state.close()
    file = state.path / "data.mdb"
    os.truncate(file, int(file.stat().st_size * share))
    assert len(list_keys(open_state())) == 1000


def test_a_file_of_something_else_is_rebuilt(open_state, log):
    state = open_state()
    write_keys(log, state, "a")
    state.close()
    (state.path / "data.mdb").write_bytes(b"not a store" * 5000)
    assert list_keys(open_state()) == ["a"]


@pytest.mark.parametrize("store", [SEEN, LINEAGE])
def test_an_entry_that_cannot_be_read_ends_the_process_and_the_next_one_has_a_new_store(open_state, log, store):
    """Were it an error like any other, the record that asked for the entry would be blamed, and the file stay."""
    state = open_state()
    draft = Draft(state)
    draft.write_seen("k", [ENTRY])
    draft.write_lineage("k", Lineage("event"))
    log.commit(draft)
    with state._environment.begin(write=True) as transaction:
        transaction.put(b"k", b"\xc1", db=state._databases[store])
    with pytest.raises(StateUnusable) as error:
        Draft(state).read_seen("k") if store == SEEN else Draft(state).read_lineage("k")
    assert "next start rebuilds" in error.value.remedy
    renewed = Draft(open_state())
    assert renewed.read_seen("k") == [ENTRY]
    assert renewed.read_lineage("k") == Lineage("event")


@pytest.mark.parametrize("use", [lambda s: s.read(SEEN, b"k"), lambda s: list(s.scan(SEEN)), lambda s: s.apply({})])
def test_pages_that_cannot_be_read_end_the_process_and_the_next_one_has_a_new_store(open_state, log, use):
    write_keys(log, open_state(), "a")
    state = open_state()
    environment = state._environment

    def begin(**_):
        raise lmdb.CorruptedError("a page")

    state._environment = SimpleNamespace(begin=begin, close=environment.close)
    with pytest.raises(StateUnusable, match="CorruptedError"):
        use(state)
    log.asked.clear()
    assert list_keys(open_state()) == ["a"]
    assert ("seen.stripe", 0) in log.asked


def test_a_store_that_cannot_be_written_says_so_with_its_place(open_state, tmp_path):
    (tmp_path / "file").write_text("in the way")
    with pytest.raises(StateUnusable) as error:
        open_state(tmp_path / "file")
    assert error.value.code == "RS320"
    assert error.value.place == str(tmp_path / "file" / "stripe-0")


def test_a_full_store_says_so(open_state, log, monkeypatch):
    monkeypatch.setattr(module, "MAP_BYTES", 256 * 1024)
    state = open_state()
    with pytest.raises(StateUnusable):
        write_keys(log, state, *(str(number) for number in range(10_000)))


def test_a_closed_store_is_not_read(open_state):
    state = open_state()
    state.close()
    with pytest.raises(StateUnusable):
        state.read(SEEN, b"k")
    with pytest.raises(StateUnusable):
        state.apply({})
    assert state.purge(1, 1.0) == 0


def test_long_keys_stay_apart(open_state, log):
    state = open_state()
    first, second = "k" * 600 + "1", "k" * 600 + "2"
    draft = Draft(state)
    draft.write_seen(first, [ENTRY])
    log.commit(draft)
    assert Draft(state).read_seen(first) == [ENTRY]
    assert Draft(state).read_seen(second) == []
    assert len(log.records["seen.stripe"][0].key) <= lmdb.Environment.max_key_size(state._environment)


def test_partitions_do_not_share_a_store(open_state, tmp_path):
    first = PartitionState(tmp_path, "stripe", 0, (SEEN,))
    second = PartitionState(tmp_path, "stripe", 1, (SEEN,))
    third = PartitionState(tmp_path, "adyen", 0, (SEEN,))
    assert len({first.path, second.path, third.path}) == 3


# What may be forgotten


class Site:
    """A store that is written as a worker writes it, one record an offset, with a clock and a changelog's start."""

    def __init__(self, open_state, log, monkeypatch):
        self.now = 1_700_000_000.0
        monkeypatch.setattr(module.time, "time", lambda: self.now)
        monkeypatch.setattr(expiry, "MARK_EVERY", 10)
        self.open, self.log, self.state = open_state, log, open_state()
        self.raw = self.start = 0

    def decide(self, *keys):
        """A batch of new facts."""
        draft = Draft(self.state)
        for key in keys:
            draft.cause = f"T:0:{self.raw}"
            draft.write_seen(key, [*draft.read_seen(key), SeenEntry(b"d", draft.cause)])
            self.raw += 1
        self.log.commit(draft)

    def write(self, key, entries):
        """A batch of one write that no new record caused, as a failed release does."""
        draft = Draft(self.state, cause=entries[-1].hop if entries else "T:0:0")
        draft.write_seen(key, entries)
        self.log.commit(draft)

    def pass_window(self):
        """Everything written so far is beyond the window, and the broker has deleted it."""
        self.now += KEPT_SECONDS + 1
        self.start = len(self.log.records["seen.stripe"])

    def purge(self, keys=1000):
        looked = 0
        while step := self.state.purge(self.start, self.now, keys):
            assert step <= keys
            looked += step
        return looked

    @property
    def keys(self):
        return list_keys(self.state)

    @property
    def last(self):
        return self.state._calendar.marks[-1]


@pytest.fixture
def site(open_state, log, monkeypatch):
    return Site(open_state, log, monkeypatch)


def test_keys_beyond_the_window_are_forgotten_and_later_ones_stay(site):
    for number in range(5):
        site.decide(*(f"old-{number}-{key}" for key in range(10)))
    assert not site.state.is_purge_due(site.now + KEPT_SECONDS - 1)
    assert site.state.is_purge_due(site.now + KEPT_SECONDS + 1)
    site.pass_window()
    site.decide("new-0", "old-0-0")
    assert site.purge() == 51
    assert site.keys == ["new-0", "old-0-0"], "a key that was written again is as new as that"
    assert site.purge() == 0
    assert not site.state.is_purge_due(site.now)
    assert len(site.state._calendar.marks) == 1, "marks before the last purge are of no use"
    site.decide(*(f"newer-{key}" for key in range(10)))
    site.pass_window()
    site.decide("newest")
    assert site.purge() == 13
    assert site.keys == ["newest"]


def test_what_the_changelog_still_holds_stays_whatever_the_clock_says(site):
    site.decide("a", "b")
    site.decide(*(f"{number:02}" for number in range(10)))
    site.now += 10 * KEPT_SECONDS
    for start in (0, 1):
        site.start = start
        assert site.purge() == 0
    site.start = 2  # the first batch is gone, of the second the broker still has everything
    site.purge()
    assert site.keys == [f"{number:02}" for number in range(10)]


def test_a_truncated_changelog_alone_removes_nothing(site):
    site.decide("a")
    site.start = 1
    site.now += KEPT_SECONDS - 1
    assert site.purge() == 0
    assert site.keys == ["a"]


def test_what_a_failed_release_writes_lives_from_then_on(site):
    site.decide("void", "left")
    first = Draft(site.state).read_seen("left")
    site.decide(*(f"{number:02}" for number in range(10)))
    site.pass_window()
    site.write("void", [])
    site.write("left", first)  # an old hop, in a record that the changelog keeps
    site.decide("again")
    assert site.purge() > 0
    assert site.keys == ["again", "left", "void"]
    site.decide(*(f"x{number}" for number in range(10)))
    site.pass_window()
    site.decide("last")
    site.purge()
    assert site.keys == ["last"]


def test_records_decided_again_after_a_frontier_was_set_back_live_from_then_on(site):
    site.decide(*(f"{number:02}" for number in range(20)))
    site.pass_window()
    site.raw = 5
    site.decide("once more", "and more")
    site.decide("one")
    site.purge()
    assert site.keys == ["and more", "once more", "one"]


def test_what_another_worker_wrote_meanwhile_lives_as_its_changelog_says(site, log):
    site.decide("kept", "gone")
    held = Draft(site.state).read_seen("kept")
    site.pass_window()
    # Written by the partition's next owner; our copy of the store comes back and reads it.
    log.append("seen.stripe", b"kept", module._encoder.encode(held))
    site.state.close()
    later = site.now
    site.state = PartitionState(site.state.path.parent, "stripe", 0, (SEEN, WAITING, LINEAGE))
    site.now -= KEPT_SECONDS  # or the copy would be too old to be used at all
    site.state.load(None)
    site.now = later
    site.purge()
    assert site.keys == ["kept"]
    site.state.close()


def test_a_walk_is_cut_into_steps_and_goes_on_after_a_crash_anywhere(site, open_state):
    site.decide(*(f"old-{number:03}" for number in range(100)))
    site.pass_window()
    site.decide("new")
    assert site.state.purge(site.start, site.now, 30) == 30
    assert len(site.keys) == 72
    site.state = open_state()
    assert len(site.keys) == 72
    site.purge(7)
    assert site.keys == ["new"]
    assert len(site.state._calendar.marks) <= 2


def test_a_forgotten_store_is_what_a_rebuilt_one_would_be(site, log, open_state):
    site.decide(*(f"old-{number}" for number in range(30)))
    site.pass_window()
    site.decide("new")
    site.purge()
    kept = list(site.state.scan(SEEN))
    site.state.close()
    shutil.rmtree(site.state.path)
    log.records["seen.stripe"] = [record for record in log.records["seen.stripe"] if record.offset >= site.start]
    assert list(open_state().scan(SEEN)) == kept


def test_an_ordinary_batch_leaves_no_notes_and_few_marks(site, monkeypatch):
    looks = []
    read = expiry._read_newest
    monkeypatch.setattr(expiry, "_read_newest", lambda value: looks.append(value) or read(value))
    site.decide("first")
    looks.clear()
    for number in range(9):
        site.decide(f"{number}")
    assert len(looks) == 9, "one look a batch, however many keys"
    assert list(site.state.scan("late")) == []
    assert len(site.state._calendar.marks) == 1


async def test_the_purge_asks_the_broker_seldom_and_beside_the_work(site, monkeypatch):
    asked, steady = [], [0.0]
    told = {"seen.stripe": {}}

    def read_starts(_kafka, topic):
        asked.append(topic)
        return told[topic]

    async def call(function, *arguments):
        return function(*arguments)

    async def step_until(condition):
        for _ in range(1000):
            looked = await purge.step([site.state], call)
            if condition():
                return looked
            await asyncio.sleep(0.001)
        raise AssertionError("not reached")

    monkeypatch.setattr(expiry, "_read_starts", read_starts)
    purge = Purge(None, clock=lambda: site.now, steady=lambda: steady[0])
    site.decide(*(f"old-{number}" for number in range(20)))
    assert await purge.step([site.state], call) == 0
    assert asked == [], "nothing is due"
    site.pass_window()
    assert await purge.step([site.state], call) == 0, "the answer is not waited for"
    await step_until(lambda: asked)
    told["seen.stripe"] = {0: site.start}
    for _ in range(5):
        await asyncio.sleep(0.001)
        assert await purge.step([site.state], call) == 0
    assert asked == ["seen.stripe"]
    steady[0] += expiry.ASK_SECONDS
    await step_until(lambda: not site.keys)
    assert asked == ["seen.stripe"] * 2

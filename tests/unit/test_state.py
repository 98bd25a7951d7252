"""The local store of a partition: a view that may be lost, old, foreign or damaged without harm."""

import os
import shutil
import time
from types import SimpleNamespace

import lmdb
import pytest

from streams import state as module
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

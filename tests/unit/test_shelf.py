"""Stopped events: on disk, found again in every order, and next to nothing of them in memory."""

import gc
import os
import subprocess
import sys
import tracemalloc

import pytest

from sinks.attempts import BEHIND_ENTITY, NEVER, Attempt, Source, State
from sinks.contract import Request, TargetClass
from sinks.ledger import Ledger
from sinks.policy import Moment, Policy
from sinks.shelf import Shelf

NOW = Moment(1000.0, 1_700_000_000_000)


def make_stopped(event_id, offset, entity, state=State.PARKED, code=BEHIND_ENTITY, due=NEVER):
    attempt = Attempt(event_id, offset, entity, Source(b"key", os.urandom(50), [("h", b"\x00")]), None)
    attempt.state, attempt.code, attempt.due = state, code, due
    attempt.since = NOW.wall + offset
    return attempt


def test_what_was_put_comes_back_as_it_was():
    shelf = Shelf("payments")
    given = make_stopped("a", 7, "A", State.UNKNOWN, "NO_ANSWER")
    given.request = Request(os.urandom(100_000), "C", "R", "POST", "https://books.example/x", (("accept", "a/b"),))
    given.may_have_landed, given.settled_at, given.decidable_at = True, 1234.5, NOW.wall + 9
    given.number, given.tries, given.round, given.first_write_at = 3, 2, 1, NOW.wall
    assert shelf.put(given)
    for found in (shelf.read("a"), shelf.take("a")):
        for name in set(Attempt.__slots__) - {"recorded"}:
            assert getattr(found, name) == getattr(given, name), name
        assert found.recorded
    assert len(shelf) == 0
    assert shelf.read("a") is None


def test_entities_are_in_order_of_offset_whatever_the_order_of_arrival():
    shelf = Shelf("payments")
    for offset in (5, 3, 9, 4):
        assert shelf.put(make_stopped(f"e{offset}", offset, "A"))
    assert shelf.put(make_stopped("other", 1, "B", State.REJECTED, "HTTP_422"))
    assert (shelf.find_first("A").event_id, shelf.find_first("A").is_free) == ("e3", True)
    assert not shelf.find_first("B").is_free
    assert [shelf.find_before("A", offset) for offset in (3, 4, 9, 99)] == [None, 3, 5, 9]
    assert shelf.list_free() == ["A"]
    assert [shelf.find_offset(name) for name in ("e9", "other", "absent")] == [9, 1, None]
    assert shelf.count_states() == {State.PARKED: 4, State.REJECTED: 1}
    assert shelf.find_oldest() == NOW.wall + 1


def test_what_is_put_off_is_due_in_its_time_and_has_it_again_after_a_restart():
    shelf = Shelf("payments")
    for offset, due in enumerate((1030.0, 1010.0, 1020.0)):
        attempt = make_stopped(f"e{offset}", offset, f"E{offset}", code="MRN_UNRESOLVED", due=due)
        attempt.retry_at = NOW.wall + int((due - NOW.steady) * 1000)
        attempt.may_have_landed = offset == 0
        assert shelf.put(attempt)
    assert shelf.list_due(1009.9, 10) == []
    assert shelf.list_due(1020.0, 10) == ["e1", "e2"]
    assert shelf.list_due(1030.0, 2) == ["e1", "e2"]
    assert not shelf.find_first("E0").is_free
    # Another machine, started long ago, fifteen seconds later.
    shelf.open(Moment(50_000.0, NOW.wall + 15_000), 50_055.0, 100.0)
    assert shelf.list_due(50_000.0, 10) == ["e1"]
    assert shelf.list_due(50_005.0, 10) == ["e1", "e2"]
    assert [shelf.read(f"e{n}").settled_at for n in range(3)] == [50_055.0, 0.0, 0.0]


def test_a_disk_that_takes_nothing_is_told_by_false(monkeypatch, tmp_path):
    monkeypatch.setattr("tempfile.tempdir", str(tmp_path / "absent"))
    shelf = Shelf("payments")
    assert not shelf.put(make_stopped("a", 1, "A"))
    assert len(shelf) == 0
    assert shelf.read("a") is None


def test_a_disk_that_is_full_keeps_what_is_there():
    shelf = Shelf("payments")
    assert shelf.put(make_stopped("a", 1, "A"))
    (pages,) = shelf._database.execute("PRAGMA page_count").fetchone()
    shelf._database.execute(f"PRAGMA max_page_count = {pages + 20}")
    large = make_stopped("b", 2, "A")
    large.source = Source(b"", os.urandom(200_000))
    assert not shelf.put(large)
    assert (len(shelf), shelf.find_offset("b")) == (1, None)
    assert shelf.put(make_stopped("c", 3, "A"))
    assert (shelf.take("a").offset, shelf.take("c").offset) == (1, 3)


def test_nothing_is_left_open_when_it_goes():
    gc.collect()
    open_before = len(os.listdir("/proc/self/fd")) if os.path.isdir("/proc/self/fd") else None  # noqa: PTH112, PTH208
    if open_before is None:
        pytest.skip("this system does not list its open files")
    shelf = Shelf("payments")
    assert shelf.put(make_stopped("a", 1, "A"))
    assert len(os.listdir("/proc/self/fd")) == open_before + 1  # noqa: PTH208
    del shelf
    gc.collect()
    assert len(os.listdir("/proc/self/fd")) == open_before  # noqa: PTH208


# Memory.


def park_many(count, entities):
    """A ledger with that many parked events: behind one refused event each, or each for a reason of its own."""
    policy = Policy(target_class=TargetClass.C, call_deadline=10, session_timeout=45, looks_up=True)
    ledger = Ledger("payments", policy)
    ledger.open(0, NOW)
    for offset in range(count):
        entity = f"pi_{offset % entities:027}"
        name = f"{offset:064x}"
        attempt = ledger.admit(name, offset, entity, Source(entity.encode(), bytes(1200)), None, NOW)
        ledger.line_up(attempt, NOW)
        if attempt.is_queued:
            (attempt,) = ledger.take(1, NOW)
            ledger.park(attempt, None, "MRN_UNRESOLVED", NOW, pause=3600)
        if not offset % 500:
            ledger.confirm(ledger.flush())
    ledger.confirm(ledger.flush())
    assert ledger.queues.shelved == count
    return ledger


@pytest.mark.parametrize("entities", [20, 10_000])
def test_a_parked_event_costs_at_most_100_bytes_in_memory(entities):
    park_many(10, 2)
    gc.collect()
    tracemalloc.start()
    try:
        ledger = park_many(10_000, entities)
        gc.collect()
        used, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert used / 10_000 <= 100
    assert ledger.queues.shelved == 10_000


_RESIDENT = """
import gc, sys
sys.path.insert(0, sys.argv[1])
from tests.unit.test_shelf import park_many
def read_resident():
    gc.collect()
    return int(open("/proc/self/statm").read().split()[1]) * 4096
first = park_many(2_000, 2_000)
before = read_resident()
second = park_many(10_000, 10_000)
print((read_resident() - before) / 10_000)
"""


def test_nor_does_the_shelf_hide_them_in_memory_that_python_does_not_count():
    if not os.path.exists("/proc/self/statm"):  # noqa: PTH110
        pytest.skip("this system does not tell a process's memory")
    folder = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))  # noqa: PTH100, PTH120
    run = subprocess.run([sys.executable, "-c", _RESIDENT, folder], capture_output=True, text=True, check=True)
    assert float(run.stdout) <= 150

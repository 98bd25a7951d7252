"""Where partitions start: no broker needed."""

from types import SimpleNamespace

import pytest

from topics import footing as module
from topics.cluster import KafkaSettings
from topics.footing import Footing
from topics.frontier import FrontierMissing

PARTITION = ("raw.stripe", 0)
BEGIN, END = 10, 90


@pytest.fixture
def log(monkeypatch):
    """What the broker holds: a log from 10 to 90, the group's frontiers and its committed offsets with their notes."""
    log = SimpleNamespace(frontiers={}, offsets={}, asked=[])

    def tell(what, value):
        log.asked.append(what)
        return value

    reader = SimpleNamespace(
        assign=lambda *_: None, start_offsets=lambda: {0: BEGIN}, end_offsets=lambda: {0: END}, close=lambda: None
    )
    monkeypatch.setattr(module, "describe_topics", lambda _kafka, names: dict.fromkeys(names, ("now", 1)))
    monkeypatch.setattr(module, "TopicReader", lambda *_: reader)
    monkeypatch.setattr(module.frontier, "await_pending_offsets", lambda *_: tell("offsets", log.offsets))
    monkeypatch.setattr(module.frontier, "read_frontiers", lambda *_: tell("frontiers", log.frontiers))
    return log


@pytest.fixture
def footing(log):
    footing = Footing(KafkaSettings(), "g", ["raw.stripe"], None)
    footing.take()
    return footing


@pytest.mark.parametrize(
    ("offset", "note"),
    [
        pytest.param(50, "", id="set by another program"),
        pytest.param(50, "before", id="of an earlier topic of that name"),
        pytest.param(BEGIN, "now", id="nothing was processed"),
        pytest.param(3, "now", id="what was processed is gone from the log"),
    ],
)
def test_an_offset_without_frontier_decides_nothing(footing, log, offset, note):
    log.offsets = {PARTITION: (offset, note)}
    assert footing.find_starts([PARTITION]) == {PARTITION: BEGIN}


def test_an_offset_of_ours_without_its_frontier_stops(footing, log):
    log.offsets = {PARTITION: (BEGIN + 1, "now")}
    with pytest.raises(FrontierMissing) as missing:
        footing.find_starts([PARTITION])
    assert missing.value.place == "raw.stripe[0]"
    assert "move-frontier" in missing.value.remedy
    assert "`--to 11`" in missing.value.remedy


def test_a_frontier_stands_above_every_offset(footing, log):
    log.offsets, log.frontiers = {PARTITION: (80, "now")}, {("now", 0): 20, ("before", 0): 30}
    assert footing.find_starts([PARTITION]) == {PARTITION: 20}


def test_offsets_are_asked_for_before_the_frontiers_are_read(footing, log):
    footing.find_starts([PARTITION])
    assert log.asked == ["offsets", "frontiers"], "else a commit between the two looks like a lost frontier"

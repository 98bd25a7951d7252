"""The account beside the flow: what ends while the books are read is neither lost nor doubled."""

from types import SimpleNamespace

import pytest

from runtime import account
from topics.reading import Record

HOP = "T:0:0"


class Scan:
    """Topics as lists. Before ``moment`` is read for the ``nth`` time, ``act`` changes them."""

    def __init__(self):
        self.topics = {}
        self.moment, self.nth, self.act = "", 0, None

    def __call__(self, _settings):
        return self

    def write(self, topic, key, value, **headers):
        log = self.topics.setdefault(topic, [])
        encoded = [(name, text.encode()) for name, text in headers.items()]
        log.append(Record(topic, 0, len(log), key.encode(), value, encoded, 1))

    def read(self, topic):
        if topic == self.moment:
            self.nth -= 1
            if self.nth == 0:
                self.act()
        return list(self.topics.get(topic, []))

    def find_id(self, _topic):
        return "T"

    def build_decoder(self, _schema, _type):
        return SimpleNamespace(decode=lambda value: value)

    def read_frontiers(self, _group):
        return {("T", 0): 1}


@pytest.fixture
def scan(monkeypatch):
    scan = Scan()
    monkeypatch.setattr(account, "TopicScan", scan)
    scan.write("raw.stripe", "k", b"")
    return scan


def balance():
    settings = SimpleNamespace(sources=["stripe"], targets=[])
    return account.balance_books(settings)


def hold(scan):
    scan.write("waiting.stripe", HOP, SimpleNamespace(hop=HOP, reason="PATIENT_UNKNOWN"))


def ask(scan):
    scan.write("reviews", "e|R", SimpleNamespace(hop=HOP, reason="R"))


def release(scan):
    scan.write("payments", "k", b"", hop=HOP, event_id="e")
    scan.write("waiting.stripe", HOP, None)


def release_to_review(scan):
    ask(scan)
    scan.write("waiting.stripe", HOP, None)


def dismiss(scan):
    scan.write("reviews", "e|R", None)
    scan.write("dispositions", HOP, SimpleNamespace(hop=HOP, fate="ignored", reason="DISMISSED"))


CASES = [(hold, release), (hold, release_to_review), (ask, dismiss)]


@pytest.mark.parametrize(("begin", "end"), CASES)
@pytest.mark.parametrize("nth", [1, 2])
@pytest.mark.parametrize("moment", ["payments", "settlements", "dispositions", "dlq", "reviews", "waiting.stripe"])
def test_what_ends_while_the_books_are_read_has_one_fate(scan, begin, end, moment, nth):
    begin(scan)
    scan.moment, scan.nth, scan.act = moment, nth, lambda: end(scan)
    found = balance()
    assert (found.lost, found.raw.doubled, sum(found.raw.parts.values())) == (0, 0, 1)
    assert found.balanced


@pytest.mark.parametrize(("begin", "topic", "key"), [(hold, "waiting.stripe", HOP), (ask, "reviews", "e|R")])
def test_what_ended_nowhere_is_lost(scan, begin, topic, key):
    begin(scan)
    scan.write(topic, key, None)
    found = balance()
    assert (found.lost, found.raw.missing) == (1, [HOP])


@pytest.mark.parametrize("begin", [hold, ask])
def test_what_is_open_and_ended_is_doubled(scan, begin):
    begin(scan)
    scan.write("payments", "k", b"", hop=HOP, event_id="e")
    found = balance()
    assert (found.raw.doubled, found.balanced) == (1, False)

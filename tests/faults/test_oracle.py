"""The oracle is red for each way to be wrong, and green only when all is right. Without a broker: records are given."""

from __future__ import annotations

from collections import defaultdict

import pytest

from tests.faults.oracle import Oracle, Published
from tests.faults.traffic import RAW_MONEY, Fact

ROOT = "north-card/pi_1"


def build_fact(kind, object_id, minor=5, *, stuck=False):
    return Fact("payments", "north-card", kind, object_id, ROOT, minor, "M1", is_root=kind == "capture", stuck=stuck)


CAPTURE, REFUND = build_fact("capture", "pi_1"), build_fact("refund", "re_1")


def publish(fact, hop, offset, *, mrn="M1", partition=0):
    event = {
        "event_id": f"{fact.kind}{fact.object_id}",
        "account": fact.account,
        "kind": fact.kind,
        "object_id": fact.object_id,
        "root": fact.root,
        "money": {"minor": fact.minor},
        "mrn": {"value": mrn},
    }
    return Published("payments", partition, offset, fact.root, hop, event)


def build_oracle():
    """A refund before its capture, a copy, another copy, and a dead letter: all as it must be."""
    oracle = object.__new__(Oracle)
    meanings = {1: REFUND, 2: CAPTURE, 3: build_fact("capture", "pi_1", 6), 4: "dead_lettered"}
    numbers = {"h0": 1, "h1": 2, "h2": 2, "h3": 3, "h4": 4}
    oracle.raw = {hop: (number, RAW_MONEY, 0, place, b"k") for place, (hop, number) in enumerate(numbers.items())}
    oracle.fates = defaultdict(list)
    for hop, fate in zip(numbers, ("canonical", "canonical", "suppressed", "in_review", "dead_lettered"), strict=True):
        oracle.fates[hop].append(fate)
    oracle.published = [publish(CAPTURE, "h1", 0), publish(REFUND, "h0", 1)]
    oracle._waiting = {}
    return oracle, meanings


def judge(spoil=lambda _oracle: None, sent=5):
    oracle, meanings = build_oracle()
    spoil(oracle)
    return oracle.judge(meanings, sent)


def test_what_is_right_is_green():
    verdict = judge()
    assert verdict.violations == []
    assert (verdict.accepted, verdict.facts) == (5, 2)
    assert verdict.fates == {
        "canonical": 2,
        "suppressed": 1,
        "ignored": 0,
        "patient_update": 0,
        "waiting": 0,
        "in_review": 1,
        "dead_lettered": 1,
    }


def lose(oracle):
    del oracle.fates["h4"]


def double(oracle):
    oracle.fates["h1"].append("canonical")
    oracle.published.append(publish(CAPTURE, "h1", 2))


def swallow(oracle):
    oracle.fates["h0"] = ["suppressed"]
    oracle.published.pop()


def swap(oracle):
    oracle.published = [publish(REFUND, "h0", 0), publish(CAPTURE, "h1", 1)]


def mistake(oracle):
    oracle.published[1] = publish(REFUND, "h0", 1, mrn="M2")


def spread(oracle):
    oracle.published[1] = publish(REFUND, "h0", 1, partition=1)


def keep_waiting(oracle):
    del oracle.fates["h0"]
    oracle._waiting["h0"] = "h0"
    oracle.published.pop()


def invent(oracle):
    oracle.fates["h9"].append("canonical")


@pytest.mark.parametrize(
    ("spoil", "kinds"),
    [
        (lose, {"lost", "equation"}),
        (double, {"doubled", "equation", "event id", "fact twice"}),
        (swallow, {"other fate", "fact missing"}),
        (swap, {"order"}),
        (mistake, {"fact missing", "fact unknown"}),
        (spread, {"partition"}),
        (keep_waiting, {"other fate", "fact missing"}),
        (invent, {"unknown hop"}),
    ],
)
def test_what_is_wrong_is_red(spoil, kinds):
    verdict = judge(spoil)
    assert set(verdict.kinds) == kinds
    assert verdict.violations


def test_a_raw_record_that_was_not_stored_is_found_out():
    assert set(judge(sent=6).kinds) == {"raw"}

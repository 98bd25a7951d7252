"""The judge of postings sees each broken promise: books written by hand, then damaged one by one."""

from __future__ import annotations

import pytest

from runtime.account import FATES, OUTCOMES, Account, Balance
from tests.faults import books
from tests.faults import plan as plans
from tests.faults.posting_oracle import find_open, judge
from tests.faults.targets import RULES, TargetRule

SAFE, ASKED = TargetRule("t", "C", "north", ("capture", "refund")), TargetRule("t", "D", "north", ("capture", "refund"))
EVENTS = [
    ("c1", "north", "capture", "one", "pi_1", 500),
    ("r1", "north", "refund", "one", "re_1", 20),
    ("c2", "north", "capture", "two", "pi_2", 700),
    ("r2", "north", "refund", "two", "re_2", 30),
    ("d2", "north", "dispute_opened", "two", "dp_2", 700),
    ("c3", "harbor", "capture", "three", "pi_3", 900),
]
HELD = [("pi_1", 500), ("pi_2", 700), ("re_1", -20), ("re_2", -30)]
TOLD = {name: ["posted"] for name in ("c1", "r1", "c2", "r2")} | {"d2": ["not_routed"], "c3": ["not_routed"]}
DOUBT = TOLD | {"c2": ["unknown"], "r2": ["parked"]}


def find_kinds(rule, held, told):
    return set(judge(rule, EVENTS, held, told))


@pytest.mark.parametrize("rule", [SAFE, ASKED])
def test_whole_books_are_clean(rule):
    assert find_kinds(rule, HELD, TOLD) == set()


@pytest.mark.parametrize(
    ("held", "told", "kind"),
    [
        ([*HELD, HELD[0]], TOLD, "twice"),
        (HELD[1:], TOLD, "lost"),
        ([*HELD, ("pi_3", 900)], TOLD, "unknown posting"),
        ([*HELD[1:], ("pi_1", 501)], TOLD, "unknown posting"),
        ([HELD[2], *HELD[:2], HELD[3]], TOLD, "order"),
        (HELD, DOUBT, "outcome"),
        (HELD, TOLD | {"r2": ["posted", "posted"]}, "told twice"),
        (HELD, TOLD | {"c3": ["posted"]}, "not routed"),
        (HELD, TOLD | {"d2": []}, "not routed"),
        (HELD, TOLD | {"x": ["posted"]}, "told of nothing"),
    ],
)
def test_each_broken_promise_of_class_c_is_named(held, told, kind):
    assert kind in find_kinds(SAFE, held, told)


@pytest.mark.parametrize("held", [HELD[:3], [HELD[0], HELD[2]]])
def test_at_class_d_a_doubt_that_is_told_is_clean_whether_it_landed_or_not(held):
    assert find_kinds(ASKED, held, DOUBT) == set()


@pytest.mark.parametrize(
    ("held", "told", "kind"),
    [
        ([*HELD, HELD[0]], TOLD, "twice"),
        ([HELD[0], *HELD[2:]], TOLD, "silent"),
        (HELD, TOLD | {"r2": ["parked"]}, "silent"),
        (HELD[:3], TOLD | {"r2": ["rejected"]}, "silent"),
        (HELD[:3], TOLD | {"r2": ["parked"]}, "silent"),
        (HELD, DOUBT | {"r2": ["posted"]}, "behind a doubt"),
        (HELD, DOUBT, "behind a doubt"),
        ([HELD[2], *HELD[:2], HELD[3]], TOLD, "order"),
    ],
)
def test_each_broken_promise_of_class_d_is_named(held, told, kind):
    assert kind in find_kinds(ASKED, held, told)


def test_what_waits_for_no_person_is_still_open():
    assert find_open(ASKED, EVENTS, DOUBT) == []
    assert find_open(ASKED, EVENTS, TOLD | {"r2": ["parked"]}) == [EVENTS[3]]
    assert find_open(ASKED, EVENTS, {name: told for name, told in TOLD.items() if name != "c3"}) == [EVENTS[5]]


def test_the_deliverers_plan_is_drawn_again_from_its_seed_and_large_enough():
    names = [rule.name for rule in RULES]
    plan = plans.draw_deliverer(7, plans.DELIVERER_KILLS, names)
    assert plan == plans.draw_deliverer(7, plans.DELIVERER_KILLS, names)
    assert plan.kills != plans.draw_deliverer(8, plans.DELIVERER_KILLS, names).kills
    assert len(plan.kills) >= 200
    assert {kill.detail for kill in plan.kills} == {(aim, name) for aim in ("blind", "any", "aimed") for name in names}
    assert sum(kill.wait > 7 for kill in plan.kills) >= 20


FATE_COUNTS = dict.fromkeys(FATES, 0) | {"canonical": 3, "suppressed": 1}


def build_account(*, lost=0, raw_pending=0, posted=2, pending=0):
    raw = Balance(4 + lost + raw_pending, dict(FATE_COUNTS), pending=raw_pending, lost=lost)
    parts = dict.fromkeys(OUTCOMES, 0) | {"posted": posted, "unknown": 1}
    return Account(raw, {"t": Balance(3, parts, pending=pending)}, {}, {})


@pytest.mark.parametrize(
    ("changes", "fates", "told", "is_clean"),
    [
        ({}, {}, {"posted": 2, "unknown": 1}, True),
        ({"lost": 1}, {}, {"posted": 2, "unknown": 1}, False),
        ({"raw_pending": 1}, {}, {"posted": 2, "unknown": 1}, False),
        ({"posted": 1}, {}, {"posted": 1, "unknown": 1}, False),
        ({"posted": 1, "pending": 1}, {}, {"posted": 1, "unknown": 1}, False),
        ({}, {"suppressed": 0, "ignored": 1}, {"posted": 2, "unknown": 1}, False),
        ({}, {}, {"posted": 3}, False),
    ],
)
def test_what_the_account_cannot_explain_is_told(monkeypatch, changes, fates, told, is_clean):
    monkeypatch.setattr(books, "balance_books", lambda _settings: build_account(**changes))
    found = books.find_unexplained(None, FATE_COUNTS | fates, {"t": told})
    assert (found == []) is is_clean


def test_where_nothing_is_delivered_all_must_be_pending(monkeypatch):
    target = Balance(3, dict.fromkeys(OUTCOMES, 0), pending=3)
    account = Account(Balance(4, dict(FATE_COUNTS)), {"t": target}, {}, {})
    monkeypatch.setattr(books, "balance_books", lambda _settings: account)
    assert books.find_unexplained(None, FATE_COUNTS) == []
    target.pending, target.lost = 2, 1
    assert books.find_unexplained(None, FATE_COUNTS)

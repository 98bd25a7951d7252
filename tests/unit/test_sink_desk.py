"""What the desk itself says of a decision before anything is written."""

import time

import pytest

from schemas.events import Action, Decision
from schemas.wire import Decoder, load_schema
from sinks.attempts import BEHIND_ENTITY, Entry
from sinks.desk import CLOCK_ERROR_SECONDS, DecisionRefused, Open, build_decision, describe_ruling, find_rival

UNKNOWN = (Action.POSTED, Action.NOT_POSTED)


def build(state, **more):
    return Open("epic", "e1", 0, Entry(state, "payments", 3, "k", **more))


def list_allowed(found):
    allowed = set()
    for action in Action:
        try:
            found.check(action)
        except DecisionRefused:
            continue
        allowed.add(action)
    return allowed


@pytest.mark.parametrize(
    ("found", "allowed"),
    [
        (build("REJECTED"), {Action.REDRIVE, Action.WAIVE}),
        (build("PARKED", code="MRN_UNRESOLVED"), {Action.WAIVE}),
        (build("PARKED", code="MRN_UNRESOLVED", may_have_landed=True), set()),
        (build("PARKED", code=BEHIND_ENTITY), set()),
        (build("UNKNOWN", decidable_at=1), set(UNKNOWN)),
        (build("IN_FLIGHT"), set()),
        (build("RETRY_AT"), set()),
        (build("PENDING"), set()),
    ],
)
def test_what_may_be_decided_in_which_state(found, allowed):
    assert list_allowed(found) == allowed


@pytest.mark.parametrize("action", UNKNOWN)
def test_too_early_is_told_with_the_time_left(action):
    now = time.time_ns() // 1_000_000
    with pytest.raises(DecisionRefused, match="may still land"):
        build("UNKNOWN", decidable_at=now + 3_600_000).check(action)
    build("UNKNOWN", decidable_at=now - int(CLOCK_ERROR_SECONDS * 1000) - 1).check(action)


def test_what_came_of_a_decision():
    asked = build("REJECTED", number=2, round=1, decision="c", ruling="APPLIED")
    assert describe_ruling(None, "d", asked) == "taken"
    assert describe_ruling(asked, "d", asked) == "waiting"
    told = {
        "taken": build("PENDING", number=2, round=2, decision="d", ruling="APPLIED"),
        "refused: TOO_EARLY": build("UNKNOWN", number=2, round=2, decision="d", ruling="TOO_EARLY"),
        "refused: OVERTAKEN": build("REJECTED", number=3, round=2, decision="e", ruling="APPLIED"),
    }
    assert {ruling: describe_ruling(found, "d", asked) for ruling, found in told.items()} == {r: r for r in told}


def decide(decision_id, **more):
    written = build_decision(build("UNKNOWN", **more), Action.POSTED, decision_id, 1).value
    return Decoder("decision", Decision, lambda _: load_schema("decision")).decode(written)


@pytest.mark.parametrize(
    ("decisions", "rival"),
    [
        ([decide("d", number=2, round=1)], None),
        ([decide("e", number=2, round=1), decide("d", number=2, round=1)], "e"),
        ([decide("d", number=2, round=1), decide("e", number=2, round=1)], None),
        # Ours was refused; somebody decided anew, and that ended it.
        ([decide("d", number=2, round=1), decide("e", number=2, round=2)], "e"),
        # Ours sent it once more; the next attempt was another matter.
        ([decide("d", number=2, round=1), decide("e", number=3, round=2)], None),
        ([decide("e", number=2, round=0), decide("d", number=2, round=1)], None),
        ([decide("e", number=2, round=1), decide("f", number=2, round=2), decide("d", number=2, round=1)], "f"),
    ],
)
def test_of_a_finished_event_the_decisions_tell_whose_counted(decisions, rival):
    asked = build("UNKNOWN", number=2, round=1)
    found = find_rival(decisions, "d", asked)
    assert (found and found.decision_id) == rival
    assert describe_ruling(None, "d", asked, decisions) == ("refused: OVERTAKEN" if rival else "taken")
    other = Open("epic", "e2", 0, asked.entry)
    assert find_rival(decisions, "d", other) is None


def test_of_an_event_that_went_on_too():
    asked = build("UNKNOWN", number=2, round=1)
    ours, theirs = decide("d", number=2, round=1), decide("e", number=3, round=2)
    later = build("UNKNOWN", number=3, round=3, decision="e", ruling="APPLIED")
    assert describe_ruling(later, "d", asked, [ours, theirs]) == "taken"
    assert describe_ruling(later, "d", asked, [theirs]) == "refused: OVERTAKEN"
    assert describe_ruling(later, "d", asked, [theirs, ours, decide("f", number=2, round=2)]) == "refused: OVERTAKEN"
    by_itself = build("UNKNOWN", number=3, round=1)
    assert describe_ruling(by_itself, "d", asked, [ours]) == "refused: OVERTAKEN"


def test_a_decision_is_awaited_only_at_the_attempt_it_names():
    found = build("PARKED", code="MRN_UNRESOLVED", number=2, round=1)
    written = build_decision(found, Action.WAIVE, "d", 1).value
    decision = Decoder("decision", Decision, lambda _: load_schema("decision")).decode(written)
    assert found.awaits(decision)
    later = [{"number": 3, "round": 1}, {"number": 2, "round": 2}]
    assert not any(build("PARKED", code="MRN_UNRESOLVED", **more).awaits(decision) for more in later)
    assert not Open("epic", "e2", 0, found.entry).awaits(decision)

"""What the desk itself says of a decision before anything is written."""

import time

import pytest

from schemas.events import Action
from sinks.attempts import BEHIND_ENTITY, Entry
from sinks.desk import CLOCK_ERROR_SECONDS, DecisionRefused, Open, describe_ruling

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
    assert describe_ruling(None, "d") == "taken"
    assert describe_ruling(build("REJECTED"), "d") == "waiting"
    assert describe_ruling(build("PENDING", decision="d", ruling="APPLIED"), "d") == "taken"
    assert describe_ruling(build("UNKNOWN", decision="d", ruling="TOO_EARLY"), "d") == "refused: TOO_EARLY"
    assert describe_ruling(build("UNKNOWN", decision="c", ruling="APPLIED"), "d") == "waiting"

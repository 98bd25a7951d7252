"""A deliverer that dies anywhere on its way: classes A to C once at the target, D left to a person where in doubt.

The short form: once at every place, with and without answers. ``python -m tests.delivery_faults --long`` takes every
place in every situation.
"""

import pytest

from sinks.contract import TargetClass
from tests.delivery_faults.cases import CONTROLS
from tests.delivery_faults.deaths import Way, deliver, sweep_deaths

BOUNDARIES = {
    "polled",
    "before the transaction",
    "the transaction stands",
    "before the last look",
    "looked, not written",
    "written",
}
AWAITS = ("Runner._cycle", "Transactions.commit", "Intake.freeze", "Calls._post")


@pytest.mark.parametrize(
    ("target_class", "loses_answers", "more"),
    [
        (TargetClass.A, True, {"answered"}),
        (TargetClass.B, False, {"answered"}),
        (TargetClass.C, True, {"before the question", "found or not"}),
        (TargetClass.D, False, {"answered"}),
    ],
)
def test_a_death_anywhere_doubles_nothing_and_loses_nothing(target_class, loses_answers, more):
    straight = Way()
    deliver(target_class, straight, loses_answers=loses_answers)
    assert set(straight.places) >= BOUNDARIES | more
    assert [name for name in AWAITS if not any(place.endswith(name) for place in straight.places)] == []
    deaths = sweep_deaths(target_class, loses_answers=loses_answers, every=False)
    assert deaths.wrong == []
    assert deaths.deaths == deaths.places == len(set(straight.places))
    # Of class D alone, and only where the death left a write in doubt.
    assert bool(deaths.unknown) == (target_class is TargetClass.D)


@pytest.mark.parametrize("name", ["blind resend", "acknowledged before the outcome"])
def test_a_rule_left_out_shows(name):
    control = next(control for control in CONTROLS if control.name == name)
    with control.leave_out():
        deaths = sweep_deaths(control.target_class, loses_answers=False, every=False)
    assert deaths.wrong
    assert {wrong.partition(":")[0] for _, found in deaths.wrong for wrong in found} & control.seen_as

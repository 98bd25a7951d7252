"""The short form: the same worlds as ``python -m tests.delivery_faults --long``, with smaller counts."""

import pytest

from sinks.contract import TargetClass
from tests.delivery_faults.cases import CONTROLS, run_control, run_order, run_timeouts


def assert_clean(world):
    assert {name: count for name, count in world.judge().items() if count} == {}


@pytest.mark.parametrize("target_class", list(TargetClass))
def test_answers_lost_after_success_double_nothing_and_lose_nothing(target_class):
    world = run_timeouts(target_class, 150)
    assert_clean(world)
    assert world.books.timeouts_after_success >= 150
    assert world.books.kills
    outcomes = world.count_outcomes()
    if target_class is TargetClass.D:
        assert outcomes["unknown"] >= 150
        assert outcomes["posted"] + outcomes["unknown"] == world.events
    else:
        assert outcomes == {"posted": world.events}


@pytest.mark.parametrize("target_class", list(TargetClass))
def test_each_entity_is_posted_in_order(target_class):
    world = run_order(target_class, 1_500, 75)
    assert_clean(world)
    if target_class is not TargetClass.D:
        assert world.count_outcomes() == {"posted": 1_500}
    else:
        assert {"posted", "unknown", "parked"} <= set(world.count_outcomes())


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_each_rule_left_out_shows(control):
    judgement = run_control(control, 400).judge()
    assert {name for name, count in judgement.items() if count} & control.seen_as

"""The short form: the same worlds as ``python -m tests.delivery_faults --long``, with smaller counts."""

import pytest

from sinks.contract import TargetClass
from tests.delivery_faults.cases import (
    CONTROLS,
    run_blocked,
    run_control,
    run_freeze,
    run_order,
    run_outage,
    run_timeouts,
)


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


@pytest.mark.parametrize("target_class", [TargetClass.A, TargetClass.D])
def test_ten_minutes_of_outage_end_in_no_letter_and_are_drained_in_order(target_class):
    world = run_outage(target_class, 500)
    assert_clean(world)
    assert world.told == {"posted": 500}
    assert world.books.calls == 500


@pytest.mark.parametrize("target_class", list(TargetClass))
def test_a_process_frozen_between_look_and_write_doubles_at_class_c_alone(target_class):
    """The documented hole. A target with a key or an upsert takes the late write for the one it has; at class D nobody
    else wrote."""
    world = run_freeze(target_class, 300)
    judgement = world.judge()
    assert world.books.lost_sessions
    doubled = judgement.pop("doubled")
    assert {name: count for name, count in judgement.items() if count} == {}
    assert bool(doubled) is (target_class is TargetClass.C)


@pytest.mark.parametrize("target_class", [TargetClass.C, TargetClass.D])
def test_five_thousand_done_behind_a_blocked_event_are_not_posted_again_after_kill_9(target_class):
    world = run_blocked(target_class, 5_000)
    assert_clean(world)
    is_d = target_class is TargetClass.D
    # The blocked one never arrived: class C asks and posts it, at class D a person decides.
    assert world.count_outcomes() == ({"posted": 5_000, "unknown": 1} if is_d else {"posted": 5_001})
    assert world.books.calls == (5_001 if is_d else 5_002)


@pytest.mark.parametrize("control", CONTROLS, ids=lambda control: control.name)
def test_each_rule_left_out_shows(control):
    judgement = run_control(control, 400).judge()
    assert {name for name, count in judgement.items() if count} & control.seen_as

"""The short form of the fault run: a handful of each fault, every rule judged. ``make faults`` is the long one."""

from __future__ import annotations

import os

import pytest

from tests.faults import plan as plans
from tests.faults.run import run_plan


@pytest.mark.integration
@pytest.mark.timeout(900)
@pytest.mark.invariant("I1")
@pytest.mark.invariant("I2")
@pytest.mark.invariant("I3")
def test_faults_of_every_kind_and_each_money_fact_once(embedded_stack, tmp_path):
    plan = plans.draw(int(os.environ.get("FAULT_SEED", "1")), plans.SHORT_MINUTES)
    verdict, fault_run = run_plan(tmp_path, embedded_stack, plan)
    assert verdict.violations == [], fault_run.counts
    assert verdict.facts > 500
    assert verdict.accepted == sum(verdict.fates.values())
    assert all(verdict.fates.values()), f"a fate that never came up was not judged: {verdict.fates}"


def test_a_plan_is_drawn_again_from_its_seed():
    assert plans.draw(7, 18) == plans.draw(7, 18)
    assert plans.draw(7, 18) != plans.draw(8, 18)


def test_the_whole_plan_is_large_enough():
    plan = plans.draw(7, plans.FULL_MINUTES)
    faults = [*plan.kills, *plan.zombies, *plan.world]
    kills = [fault for fault in faults if fault.kind == "kill"]
    assert len(kills) >= 200
    assert sum(fault.detail == ("aimed",) for fault in kills) >= 90
    assert sum(fault.kind == "zombie" for fault in faults) >= 50
    assert sum(len(fault.detail) for fault in faults if fault.kind == "storm") >= 50
    kinds = {fault.kind for fault in faults}
    assert kinds >= {"broker", "redis_flush", "redis_restart", "halt", "replay", "redrive"}
    assert {fault.detail for fault in faults if fault.kind == "halt"} >= {("old", "deleted"), ("cut", "reset")}

"""The short form of the run that kills the deliverer: ``make faults`` is the long one."""

from __future__ import annotations

import os

import pytest

from tests.faults import plan as plans
from tests.faults.deliverer import run_deliverer
from tests.faults.targets import RULES


@pytest.mark.integration
@pytest.mark.timeout(600)
@pytest.mark.invariant("I1")
@pytest.mark.invariant("I2")
@pytest.mark.invariant("I3")
@pytest.mark.invariant("I5")
def test_kill_9_of_the_deliverer_at_targets_of_every_class(embedded_stack, tmp_path):
    seed = int(os.environ.get("FAULT_SEED", "1"))
    found = run_deliverer(tmp_path, embedded_stack, plans.draw_deliverer(seed, 4, [rule.name for rule in RULES]))
    assert found.violations == [], found.counts
    for rule in RULES:
        assert found.held[rule.name] > 3
        assert found.outcomes[rule.name]["posted"] > 3
        assert found.outcomes[rule.name].keys() <= {"posted", "not_routed", "unknown", "parked"}

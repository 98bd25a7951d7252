"""A worker that dies, or whose step fails, at any point of a batch: nothing lost, nothing twice, the store right.

The short form: before and after each step of the commit, and a seeded sample of all other points; a death in a
rollback; two around the commit of a batch of admissions. ``CRASH_POINTS=all`` takes every point, ``CRASH_SEED`` another
sample. The points are found, not listed (see ``doors``); one that is not reached fails.
"""

from __future__ import annotations

import os

import pytest

from tests.crash_points.admissions import Admissions
from tests.crash_points.doors import Point
from tests.crash_points.sweep import Sweep, SweepFailed
from tests.crash_points.traffic import Payments
from tests.crash_points.trials import (
    COMMIT_STEPS,
    Trial,
    choose_trials,
    find_batch_trials,
    find_points,
    find_rollback_trials,
    list_trials,
    sweep_all,
)

pytestmark = [pytest.mark.integration, pytest.mark.timeout(2400)]

SHORT = 12
"""Runs of the short form."""
SEED = os.environ.get("CRASH_SEED", "1")
DOORS = (
    *COMMIT_STEPS,
    "Producer.init_transactions",
    "Consumer.subscribe",
    "Consumer.poll",
    "Consumer.pause",
    "Consumer.resume",
    "Consumer.consumer_group_metadata",
    "AdminClientImpl.list_consumer_group_offsets",
    "Environment.begin",
    "Transaction.__exit__",
    "Redis.Pipeline.execute",
    "await",
)
"""What a batch cannot do without: a recording that lacks one of these is blind."""


@pytest.fixture(scope="module")
def sweep(deploy_for_module):
    deployment = deploy_for_module(worker__partitions="1")
    opened = Sweep(deployment, Payments(deployment))
    yield opened
    opened.close()


@pytest.fixture(scope="module")
def points(sweep):
    return find_points(sweep, print)


def test_the_recording_sees_every_kind_of_door(points):
    assert set(DOORS) <= {point.door for point in points}
    assert {point.side for point in points} == {"before", "after", "suspended", "resumed"}


def test_every_point_is_survived(sweep, points, record_property):
    trials = list_trials(points)
    if os.environ.get("CRASH_POINTS") != "all":
        trials = choose_trials(trials, SEED, SHORT)
    summary = sweep_all(sweep, trials, print)
    record_property("sweep", f"seed {SEED}: {summary}")
    assert summary.deaths + summary.failures == len(trials)
    assert {trial.point.door for trial in trials} >= set(COMMIT_STEPS)


def test_a_death_in_a_rollback_is_survived(sweep, points, record_property):
    if os.environ.get("CRASH_POINTS") == "all":
        trials = find_rollback_trials(sweep, points, print)
    else:
        found = find_rollback_trials(sweep, points, print, steps=COMMIT_STEPS[-1:])
        # Aborted and sought: it waits before it decides again.
        trials = [next(t for t in found if (t.point.door, t.point.side) == ("await", "suspended"))]
    summary = sweep_all(sweep, trials, print)
    record_property("sweep", f"rollback: {summary}")
    assert summary.rollbacks == len(trials)


def check_states(admissions):
    """The oracle's own control: a message left out, or two in the other order, are seen."""
    expected = admissions._expect()
    assert admissions.oracle.judge(expected) == []
    merge = next(number for number, (_, planned) in enumerate(expected) if len(planned.states) > 2)
    assert any("found" in wrong for wrong in admissions.oracle.judge(expected[:merge] + expected[merge + 1 :]))
    swapped = [*expected[:merge], expected[merge + 1], expected[merge], *expected[merge + 2 :]]
    assert any("expected" in wrong for wrong in admissions.oracle.judge(swapped))


def test_a_death_in_a_batch_of_admissions_is_survived(sweep, points, record_property):
    admissions = Sweep(sweep.deployment, Admissions(), sweep.nursery)
    try:
        if os.environ.get("CRASH_POINTS") == "all":
            found, trials = find_batch_trials(admissions, print)
            trials += find_rollback_trials(admissions, found, print, steps=COMMIT_STEPS[-1:])
        else:
            # The same two places for every batch.
            commits = [p for p in points if p.door == COMMIT_STEPS[-1]]
            trials = [Trial(next(p for p in commits if p.side == side)) for side in ("before", "after")]
        summary = sweep_all(admissions, trials, print)
        record_property("sweep", f"admissions: {summary}")
        assert summary.deaths + summary.failures == len(trials)
        check_states(admissions)
    finally:
        admissions.close()


def test_a_point_that_is_never_reached_fails_the_sweep(sweep, points, monkeypatch):
    monkeypatch.setattr("tests.crash_points.sweep.TRIES", 1)
    unknown = Point("Producer.commit_transaction", "topics/nowhere.py:1 nothing", "before")
    with pytest.raises(SweepFailed, match="never reached"):
        sweep.try_point(Trial(unknown))


def test_the_oracle_sees_what_is_missing_doubled_and_stale(sweep, points):
    """Its own control: the same records judged against what was not sent, and a store that lacks a key."""
    (folder,) = sweep.deployment.settings.worker.state.glob("*/stripe-0")
    sweep.oracle.follow_to_end()
    assert sweep.oracle.judge_store(folder) == []
    expected = sweep._expect()
    assert sweep.oracle.judge(expected) == []
    offset, planned = next((o, p) for o, p in expected if p.fact is not None)
    assert any("too many" in wrong for wrong in sweep.oracle.judge([p for p in expected if p[0] != offset]))
    assert any("lost" in wrong for wrong in sweep.oracle.judge([*expected, (10**9, planned)]))
    key = next(iter(sweep.oracle.stores["seen"]))
    value = sweep.oracle.stores["seen"].pop(key)
    assert any("store seen differs" in wrong for wrong in sweep.oracle.judge_store(folder))
    sweep.oracle.stores["seen"][key] = value


def test_a_worker_that_changes_its_store_before_the_commit_is_found(deploy_for_module, points):
    """Negative control: such a worker, dying just before a commit, makes its successor suppress what never came out.

    In a sweep of its own, where nothing is on hold yet: the first transaction is then the one with the records.
    """
    deployment = deploy_for_module(worker__partitions="1")
    sweep = Sweep(deployment, Payments(deployment))
    try:
        point = next(p for p in points if (p.door, p.side) == ("Producer.commit_transaction", "before"))
        sweep.options, sweep.patience = {"store_first": True}, 5
        with pytest.raises(SweepFailed, match=r"canonical expected, \['suppressed'\] found"):
            sweep.try_point(Trial(point))
    finally:
        sweep.close()

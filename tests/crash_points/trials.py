"""What is tried: every point of a batch, of a rollback, of a batch of admissions, and every failure of its step."""

from __future__ import annotations

import random
import time
from dataclasses import dataclass

from tests.crash_points.doors import Point, choose_points, find_batch, find_loaders, find_rollback, list_failures
from tests.crash_points.sweep import SweepFailed

COMMIT_STEPS = (
    "Producer.begin_transaction",
    "Producer.produce",
    "Producer.flush",
    "Producer.send_offsets_to_transaction",
    "Producer.commit_transaction",
)
ROLLBACK_STEPS = ("Producer.abort_transaction", "Consumer.seek", "await")
"""What a rollback cannot do without: aborting, seeking, waiting."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What happens in one run: death at a point, or a failure of its step."""

    point: Point
    failure: str = ""
    failed_before: tuple[Point, str] | None = None
    """A failure that came first: the point is passed after it. An empty one: after the passage of that point."""

    @property
    def is_rollback(self):
        return self.failed_before is not None and bool(self.failed_before[1])

    def __str__(self):
        before = f", after failure ({self.failed_before[1]}) {self.failed_before[0]}" if self.is_rollback else ""
        return f"{'death' if not self.failure else f'failure ({self.failure})'} {self.point}{before}"


@dataclass(slots=True)
class Summary:
    """Numbers of a sweep."""

    points: int = 0
    deaths: int = 0
    failures: int = 0
    survived: int = 0
    """Failures that the worker outlived."""
    rollbacks: int = 0
    """Deaths and failures that came after a failure, on the way of its rollback."""
    seconds: float = 0.0

    def __str__(self):
        return (
            f"{self.points} points: {self.deaths} deaths and {self.failures} failures injected"
            f" ({self.survived} outlived by the worker), {self.rollbacks} of them in or after a rollback,"
            f" every one reached, {self.seconds:.0f} s"
        )


def list_trials(points, failed_before=None):
    """Death at every point, and every failure that its step can have."""
    return [Trial(point, failure, failed_before) for point in points for failure in ("", *list_failures(point))]


def choose_trials(trials, seed, count):
    """Death before and after each step of the commit, and a seeded sample of the rest."""
    deaths = [trial for trial in trials if not trial.failure and not trial.is_rollback]
    commit = []
    for step in COMMIT_STEPS:
        taken = [trial for trial in deaths if trial.point.door == step]
        commit.append(next(trial for trial in taken if trial.point.side == "before"))
        commit.append(next(trial for trial in reversed(taken) if trial.point.side == "after"))
    rest = [trial for trial in trials if trial not in commit]
    return commit + random.Random(f"crash points {seed}").sample(rest, max(0, min(len(rest), count - len(commit))))


def find_points(sweep, say):
    """Points of an undisturbed batch, recorded from a worker that finds its store as the last one left it.

    The batch holds every fate, and releases what waited for the patient and for the parent: a recording of a worker
    that did not do all of it is refused.
    """
    sweep.warm_up()
    points = choose_points(sweep.record())
    if not set(COMMIT_STEPS) <= {point.door for point in points}:
        raise SweepFailed("the recorded batch holds no whole commit")
    say(f"{len(points)} points on the way of a batch")
    return points


def find_batch_trials(sweep, say):
    """Points and trials of a batch of other traffic, from where it begins: what comes before is the same for every one.

    So is what loads partitions beside it.
    """
    sweep.warm_up()
    recording = sweep.record()
    begin = find_batch(recording)
    points = choose_points(recording[begin + 1 :], without=find_loaders(recording))
    # A partition is resumed when its loader is done, before the batch of another one or after it.
    points = [point for point in points if point.door != "Consumer.resume"]
    if not set(COMMIT_STEPS) <= {point.door for point in points}:
        raise SweepFailed("the recorded batch holds no whole commit")
    say(f"{len(points)} points on the way of a batch of {sweep.traffic.source}")
    # Passages are counted from there: how often a worker polled before depends on time.
    return points, list_trials(points, (recording[begin][1]._replace(count=1), ""))


def find_rollback_trials(sweep, points, say, *, steps=COMMIT_STEPS, again="Producer.send_offsets_to_transaction"):
    """The step fails and the batch is rolled back: death and failures at every point up to the next poll.

    After the failure of ``again`` also death at every later point: the batch polled, decided and committed once more.
    """
    trials = []
    for step in steps:
        place = next(p for p in reversed(points) if (p.door, p.side, p.count) == (step, "before", 1))
        recording = sweep.record((place, "abort"))
        own = choose_points(recording, find_rollback(recording))
        if not set(ROLLBACK_STEPS) <= {point.door for point in own}:
            raise SweepFailed(f"after a failure {place} nothing was rolled back: {[str(point) for point in own]}")
        found = list_trials(own, (place, "abort"))
        if step == again:
            passed = {point[:3] for point in own}
            later = [point for point in choose_points(recording) if point.count == 1 and point[:3] not in passed]
            found += [Trial(point, "", (place, "abort")) for point in later]
        say(f"{len(own)} points on the way of a rollback after {place}, {len(found)} trials")
        trials += found
    return trials


def sweep_all(sweep, trials, say):
    """Every trial in turn."""
    summary, began = Summary(points=len({(trial.point, trial.failed_before) for trial in trials})), time.monotonic()
    for number, trial in enumerate(trials, 1):
        started = time.monotonic()
        survived = sweep.try_point(trial)
        end = "outlived" if survived else "finished"
        say(f"{number}/{len(trials)} {time.monotonic() - started:.1f} s {end}: {trial}")
        if trial.failure:
            summary.failures += 1
            summary.survived += survived
        else:
            summary.deaths += 1
        summary.rollbacks += trial.is_rollback
    summary.seconds = time.monotonic() - began
    return summary

"""One run for each point: the worker dies (or fails) there, a clean one finishes, the oracle looks at everything."""

from __future__ import annotations

import json
import os
import queue
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

import redis
from confluent_kafka import Producer

from schemas.events import PatientRecord, Reference
from schemas.keys import HmacKey
from schemas.wire import Encoder
from tests.crash_points.doors import DIED, Point, list_failures, read_points
from tests.crash_points.oracle import Oracle
from tests.crash_points.traffic import KNOWN, LATE, name_patient, plan
from topics.registry import Registry, find_ids

ROOT = Path(__file__).parents[2]
TRIES = 3
"""What a run passes through depends a little on timing; a point that is missed is tried again, but not for ever."""
COMMIT_STEPS = (
    "Producer.begin_transaction",
    "Producer.produce",
    "Producer.flush",
    "Producer.send_offsets_to_transaction",
    "Producer.commit_transaction",
)


class SweepFailed(AssertionError):
    """A point was not reached, or what came of it is wrong."""


@dataclass(frozen=True, slots=True)
class Trial:
    """What happens in one run: death at a point, or a failure of its step."""

    point: Point
    failure: str = ""

    def __str__(self):
        return f"{'death' if not self.failure else f'failure ({self.failure})'} {self.point}"


@dataclass(slots=True)
class Summary:
    """Numbers of a sweep."""

    points: int = 0
    deaths: int = 0
    failures: int = 0
    survived: int = 0
    """Failures that the worker outlived."""
    seconds: float = 0.0

    def __str__(self):
        return (
            f"{self.points} points: {self.deaths} deaths and {self.failures} failures injected"
            f" ({self.survived} outlived by the worker), every one reached, {self.seconds:.0f} s"
        )


class Nursery:
    """The parent of the workers, as a process."""

    def __init__(self, deployment):
        self._deployment = deployment
        with (deployment.folder / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.crash_points.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                text=True,
                cwd=ROOT,
            )
        self._answers = queue.Queue()
        self._listener = threading.Thread(target=self._listen, daemon=True)
        self._listener.start()
        self.pid = None

    def _listen(self):
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)

    def start(self, **order):
        order |= {
            "config": str(self._deployment.path),
            "overrides": list(self._deployment.overrides.items()),
            "log": str(self._deployment.folder / "worker.log"),
        }
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        self.pid = self._hear("pid", 60)[1]

    def signal(self, number):
        os.kill(self.pid, number)

    def poll(self):
        """Exit code of the worker, None while it runs."""
        try:
            return self._take(self._answers.get_nowait())
        except queue.Empty:
            return None

    def wait(self, timeout):
        try:
            return self._take(self._answers.get(timeout=timeout))
        except queue.Empty:
            raise SweepFailed("the worker does not end") from None

    def _take(self, answer):
        assert answer is not None, "the nursery died"
        self.pid = None
        return answer[2]

    def _hear(self, kind, timeout):
        answer = self._answers.get(timeout=timeout)
        assert answer is not None, "the nursery died"
        assert answer[0] == kind, answer
        return answer

    def close(self):
        if self.pid is not None:
            self.signal(signal.SIGKILL)
            self.wait(20)
        self._process.stdin.close()
        self._process.wait(20)
        self._listener.join(20)
        self._process.stdout.close()


class Sweep:
    """A deployment with one raw partition, its projector, and everything sent so far."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.run = 0
        self.sent = []
        self.patience = 60
        """Seconds for one worker to finish."""
        self.options = {}
        """Of every worker that is to die or fail."""
        settings = deployment.settings
        self._ids = find_ids(Registry(settings.registry), settings.topics)
        self._hmac = HmacKey(settings.secrets.hmac_key.get_secret_value().encode())
        self._producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "partitioner": "murmur2_random"})
        self._redis = redis.Redis.from_url(settings.redis.url)
        self._admitted = 0
        self.oracle = Oracle(settings.kafka.bootstrap, settings.registry.url)
        deployment.start("project")
        self.nursery = Nursery(deployment)
        self._admit(KNOWN)

    def close(self):
        self.nursery.close()
        self.oracle.close()
        self._redis.close()

    # One run.

    def record(self, name, **order):
        """Points that a worker passes from its start until a batch is done and it has nothing more to do."""
        target = self.deployment.folder / f"{name}.json"
        self._send()
        self.nursery.start(record=str(target), **order)
        code = self.nursery.wait(60)
        if code != 0 or not target.exists():
            raise SweepFailed(f"nothing was recorded, exit code {code}\n{self.deployment.read_logs()}")
        self._finish()
        return read_points(target)

    def try_point(self, trial):
        """One run. Returns whether the worker outlived what happened. Raises ``SweepFailed``."""
        for _ in range(TRIES):
            reached, survived = self._run(trial)
            if reached:
                return survived
        raise SweepFailed(f"never reached: {trial}")

    def _run(self, trial):
        self._send()
        marker = self.deployment.folder / f"reached-{self.run}"
        if trial.failure:
            self.nursery.start(fail=[trial.point, trial.failure, str(marker)], **self.options)
        else:
            self.nursery.start(die=trial.point, **self.options)
        code = self._await_end(lambda: trial.failure and marker.exists())
        reached = marker.exists() if trial.failure else code == DIED
        survived = code is None
        if survived:
            # A step that failed at the very end may end the worker just now.
            survived = self._stop() == 0
            if not survived and not trial.failure:
                raise SweepFailed(f"{trial}: a told worker did not end well\n{self.deployment.read_logs()}")
        elif code not in {DIED, 0} and not trial.failure:
            raise SweepFailed(f"{trial}: the worker ended by itself, exit code {code}\n{self.deployment.read_logs()}")
        if not survived:
            # Also when all is committed: the store of the dead may be behind, that of its successor must not be.
            self._finish(trial)
        self._judge(trial)
        return reached, survived and reached

    def _await_end(self, is_reached):
        """Wait for the worker's end: its exit code, or None when it lives and all is done."""
        until = time.monotonic() + self.patience
        done_at = None
        while time.monotonic() < until:
            code = self.nursery.poll()
            if code is not None:
                return code
            self.oracle.follow(0.02)
            if self._is_done():
                # What is to happen may come after the commit, and its end a little later: a while is given to it.
                done_at = done_at or time.monotonic()
                if time.monotonic() - done_at > (0.5 if is_reached() else 1.5):
                    return None
        raise SweepFailed(f"the worker neither ends nor finishes\n{self.deployment.read_logs()}")

    def _finish(self, trial=None):
        """A clean worker does what is left."""
        self.nursery.start()
        until = time.monotonic() + self.patience
        # Ready means that its store has caught up.
        while not (self._is_done() and self.deployment.is_ready("worker")):
            self.oracle.follow(0.02)
            code = self.nursery.poll()
            if code is not None:
                raise SweepFailed(f"after {trial}: the clean worker ended, {code}\n{self.deployment.read_logs()}")
            if time.monotonic() > until:
                raise SweepFailed(f"after {trial}: the clean worker does not finish\n{self._describe()}")
        code = self._stop()
        if code != 0:
            raise SweepFailed(f"after {trial}: the clean worker ended with {code}\n{self.deployment.read_logs()}")

    def _stop(self):
        """End the worker as an operator does, so that its store is current; its exit code."""
        self.nursery.signal(signal.SIGTERM)
        return self.nursery.wait(30)

    def _expect(self):
        """All that was sent; the last run's late records still wait."""
        held = [index for index, (_, planned) in enumerate(self.sent) if f"_{self.run}_late" in planned.key]
        return [pair for index, pair in enumerate(self.sent) if index not in held[-LATE:]]

    def _is_done(self):
        """Whether the frontier is at the end and only the last run's late records wait."""
        return self.oracle.frontier == len(self.sent) and len(self.oracle.stores["waiting"]) == LATE

    def _judge(self, trial=None):
        self.oracle.follow_to_end()
        waiting = {self.oracle.name_hop(offset).encode() for offset, _ in self.sent} - {
            self.oracle.name_hop(offset).encode() for offset, _ in self._expect()
        }
        wrong = self.oracle.judge(self._expect())
        if set(self.oracle.stores["waiting"]) != waiting:
            wrong.append(f"waiting: {sorted(self.oracle.stores['waiting'])}, expected {sorted(waiting)}")
        for folder in self.deployment.settings.worker.state.glob("*/stripe-0"):
            wrong += self.oracle.judge_store(folder)
        if wrong:
            raise SweepFailed(f"after {trial}:\n" + "\n".join(wrong[:20]) + f"\n{self.deployment.read_logs()}")

    def _describe(self):
        wrong = "\n".join(self.oracle.judge(self._expect())[:20])
        waiting = len(self.oracle.stores["waiting"])
        place = f"frontier {self.oracle.frontier} of {len(self.sent)}, {waiting} waiting"
        return f"{place}\n{wrong}\n{self.deployment.read_logs()}"

    # What is sent.

    def _send(self):
        if self.run:
            self._admit(name_patient(self.run))
        self.run += 1
        offsets = []
        for planned in plan(self.run):
            self._producer.produce(
                "raw.stripe",
                planned.body,
                f"north-card/{planned.key}".encode(),
                headers=[
                    ("source", b"stripe"),
                    ("account", b"north-card"),
                    ("facility", b"north"),
                    ("ingest_time", str(time.time_ns() // 1_000_000).encode()),
                ],
                on_delivery=lambda error, message: offsets.append((error, message.offset())),
            )
        assert self._producer.flush(30) == 0
        assert [error for error, _ in offsets] == [None] * len(offsets)
        assert [offset for _, offset in offsets] == list(range(len(self.sent), len(self.sent) + len(offsets)))
        self.sent += [(offset, planned) for (_, offset), planned in zip(offsets, plan(self.run), strict=True)]

    def _admit(self, mrn):
        """Make a patient known, and wait until the projection has it."""
        encoder = Encoder("patient_record", self._ids["patients-value"])
        reference = Reference("NORTH", "MR", mrn)
        record = PatientRecord(
            tenant="lakeshore",
            facility="north",
            identifier=reference,
            status="active",
            mrn=reference,
            feed="north-adt",
            source_event_id=mrn,
            message_type="ADT^A04",
            occurred_at=1,
            received_at=1,
            mapping_version="1",
            origin="here",
        )
        self._producer.produce(
            "patients", encoder.encode(record), self._hmac.hash_identifier(reference).encode(), headers=[]
        )
        assert self._producer.flush(30) == 0
        self._admitted += 1
        key = f"{self.deployment.settings.redis.key_prefix}:offsets"
        until = time.monotonic() + 60
        while sum(int(value) for name, value in self._redis.hgetall(key).items() if name.isdigit()) < self._admitted:
            if time.monotonic() > until:
                raise SweepFailed(f"the projector is not there\n{self.deployment.read_logs()}")
            time.sleep(0.01)


def list_trials(points):
    """Death at every point, and every failure that its step can have."""
    return [Trial(point, failure) for point in points for failure in ("", *list_failures(point))]


def choose_trials(trials, seed, count):
    """Death before and after each step of the commit, and a seeded sample of the rest."""
    deaths = [trial for trial in trials if not trial.failure]
    commit = []
    for step in COMMIT_STEPS:
        taken = [trial for trial in deaths if trial.point.door == step]
        commit.append(next(trial for trial in taken if trial.point.side == "before"))
        commit.append(next(trial for trial in reversed(taken) if trial.point.side == "after"))
    rest = [trial for trial in trials if trial not in commit]
    return commit + random.Random(f"crash points {seed}").sample(rest, max(0, min(len(rest), count - len(commit))))


def find_points(sweep, say):
    """Points of an undisturbed batch, recorded from a worker that finds its store as the last one left it."""
    sweep.record("first")
    points = sweep.record("straight")
    if not set(COMMIT_STEPS) <= {point.door for point in points}:
        raise SweepFailed("the recorded batch holds no whole commit")
    say(f"{len(points)} points on the way of a batch")
    return points


def sweep_all(sweep, trials, say):
    """Every trial in turn."""
    summary, began = Summary(points=len({trial.point for trial in trials})), time.monotonic()
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
    summary.seconds = time.monotonic() - began
    return summary

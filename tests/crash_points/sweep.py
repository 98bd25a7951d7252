"""One run: the worker dies (or fails) at a point, a clean one finishes, the oracle looks at everything."""

from __future__ import annotations

import signal
import subprocess
import time

from confluent_kafka import Producer

from tests.crash_points.doors import DIED, read_recording
from tests.crash_points.oracle import Oracle
from tests.nursery import Nursery

PATIENCE = 60
"""Seconds for a worker to reach its end."""
TRIES = 3
"""What a run passes through depends a little on timing; a point that is missed is tried again, but not for ever."""


class SweepFailed(AssertionError):
    """A point was not reached, or what came of it is wrong."""


class Sweep:
    """A deployment with one partition for each raw topic, and everything sent so far of one kind of traffic."""

    def __init__(self, deployment, traffic, nursery=None):
        """``nursery``: that of another sweep of the deployment, which ends it."""
        self.deployment = deployment
        self.traffic = traffic
        self._is_guest = nursery is not None
        self.run = 0
        self.sent = []
        self.patience = PATIENCE
        """Seconds for a clean worker to finish once its frontier is at the end."""
        self.options = {}
        """Of every worker that is to die or fail."""
        settings = deployment.settings
        self._hours = 2 * settings.worker.parent_wait_hours
        self._producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "partitioner": "murmur2_random"})
        self.oracle = Oracle(settings.kafka.bootstrap, settings.registry.url, traffic.source, traffic.stores)
        self.nursery = nursery or Nursery("tests.crash_points.nursery", deployment.folder)
        self._worker = None

    def close(self):
        if not self._is_guest:
            self.nursery.close()
        self.oracle.close()
        self.traffic.close()

    # One run.

    def warm_up(self):
        """The first run: an undisturbed worker, so that there is a store, and records that wait."""
        self._send()
        self._finish()

    def record(self, failed_before=None):
        """What a worker passes from its start until a batch is done and it has nothing more to do.

        With ``failed_before`` (a point and a failure) from that failure on.
        """
        target, marker = (self.deployment.folder / f"{name}-{self.run}" for name in ("recording", "failed"))
        self._send()
        order = {"record": str(target)}
        if failed_before is not None:
            order = {"fail": [*failed_before, str(marker)], "then": order}
        self._start(**order)
        code = self._await_exit(60)
        if code != 0 or not target.exists():
            raise SweepFailed(f"nothing was recorded, exit code {code}\n{self.deployment.read_logs()}")
        self.oracle.follow_to_end()
        if not self._is_done():
            raise SweepFailed(f"the recorded worker did not do all\n{self._describe()}")
        self._judge()
        return read_recording(target)

    def try_point(self, trial):
        """One run. Returns whether the worker outlived what happened. Raises ``SweepFailed``."""
        for _ in range(TRIES):
            reached, survived = self._run(trial)
            if reached:
                return survived
        raise SweepFailed(f"never reached: {trial}")

    def _run(self, trial):
        self._send()
        marker, failed = (self.deployment.folder / f"{name}-{self.run}" for name in ("reached", "failed"))
        order = {"fail": [trial.point, trial.failure, str(marker)]} if trial.failure else {"die": trial.point}
        if trial.failed_before is not None:
            order = {"fail": [*trial.failed_before, str(failed)], "then": order}
        self._start(**order, **self.options)
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
        until = time.monotonic() + PATIENCE
        done_at = None
        while time.monotonic() < until:
            code = self._worker.poll()
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
        self._start()
        until = time.monotonic() + PATIENCE
        # Ready means that its store has caught up.
        while not (self._is_done() and self.deployment.is_ready("worker")):
            self.oracle.follow(0.02)
            if self.oracle.frontier == len(self.sent):
                until = min(until, time.monotonic() + self.patience)
            code = self._worker.poll()
            if code is not None:
                raise SweepFailed(f"after {trial}: the clean worker ended, {code}\n{self.deployment.read_logs()}")
            if time.monotonic() > until:
                raise SweepFailed(f"after {trial}: the clean worker does not finish\n{self._describe()}")
        code = self._stop()
        if code != 0:
            raise SweepFailed(f"after {trial}: the clean worker ended with {code}\n{self.deployment.read_logs()}")

    def _start(self, **order):
        order |= {
            "config": str(self.deployment.path),
            "overrides": list(self.deployment.overrides.items()),
            "log": str(self.deployment.folder / "worker.log"),
            "ahead": self.run * self._hours,
        }
        self._worker = self.nursery.fork(order)

    def _await_exit(self, timeout):
        try:
            return self._worker.wait(timeout)
        except subprocess.TimeoutExpired:
            raise SweepFailed("the worker does not end") from None

    def _stop(self):
        """End the worker as an operator does, so that its store is current; its exit code."""
        self._worker.send_signal(signal.SIGTERM)
        return self._await_exit(30)

    def _expect(self):
        """All that was sent; what waits of the last run still does."""
        held = [index for index, (_, planned) in enumerate(self.sent) if planned.waits]
        last = held[len(held) - self.traffic.held :]
        return [pair for index, pair in enumerate(self.sent) if index not in last]

    def _count_waiting(self):
        return len(self.oracle.stores.get("waiting", ()))

    def _is_done(self):
        """Whether the frontier is at the end and only what waits of the last run does."""
        return self.oracle.frontier == len(self.sent) and self._count_waiting() == self.traffic.held

    def _judge(self, trial=None):
        self.oracle.follow_to_end()
        waiting = {self.oracle.name_hop(offset).encode() for offset, _ in self.sent} - {
            self.oracle.name_hop(offset).encode() for offset, _ in self._expect()
        }
        wrong = self.oracle.judge(self._expect())
        found = set(self.oracle.stores.get("waiting", ()))
        if found != waiting:
            wrong.append(f"waiting: {sorted(found)}, expected {sorted(waiting)}")
        for folder in self.deployment.settings.worker.state.glob(f"*/{self.traffic.source}-0"):
            wrong += self.oracle.judge_store(folder)
        if wrong:
            raise SweepFailed(f"after {trial}:\n" + "\n".join(wrong[:20]) + f"\n{self.deployment.read_logs()}")

    def _describe(self):
        wrong = "\n".join(self.oracle.judge(self._expect())[:20])
        place = f"frontier {self.oracle.frontier} of {len(self.sent)}, {self._count_waiting()} waiting"
        return f"{place}\n{wrong}\n{self.deployment.read_logs()}"

    # What is sent.

    def _send(self):
        self.run += 1
        self.traffic.prepare(self.run)
        offsets, planned = [], self.traffic.plan(self.run)
        for record in planned:
            self._producer.produce(
                f"raw.{self.traffic.source}",
                record.body,
                f"{record.account}/{record.key}".encode(),
                headers=[
                    ("source", self.traffic.source.encode()),
                    ("account", record.account.encode()),
                    ("facility", record.facility.encode()),
                    ("ingest_time", str(time.time_ns() // 1_000_000).encode()),
                ],
                on_delivery=lambda error, message: offsets.append((error, message.offset())),
            )
        assert self._producer.flush(30) == 0
        assert [error for error, _ in offsets] == [None] * len(offsets)
        assert [offset for _, offset in offsets] == list(range(len(self.sent), len(self.sent) + len(offsets)))
        self.sent += [(offset, record) for (_, offset), record in zip(offsets, planned, strict=True)]

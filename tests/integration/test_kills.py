"""``kill -9`` of every role during traffic, and of the whole run: the same ledger, nothing lost, nothing twice.

A kill happens when its role has done a seeded share of what it will do in the whole run, read from the topics; not at a
time. All targets dedupe by MSH-10 here, so that every outcome is exact.
"""

from __future__ import annotations

import asyncio
import os
import random
import signal
import sys
import time
from collections import Counter

import psutil
import pytest

from sandbox.expected import Expected, ExpectedRow, compare_ledger
from sinks.attempts import State
from sinks.ledger import Ledger
from tests.integration.test_delivery import Running, Site, count_final, start_program, wait_for_exit, wait_until
from tests.integration.traffic import Home, Offsets, assert_green, wait_for

pytestmark = [pytest.mark.integration, pytest.mark.timeout(600)]

SEED = int(os.environ.get("KILL_SEED", "1"))
EVENTS = 1500
SHARES = ((0.05, 0.30), (0.35, 0.60), (0.65, 0.85))
"""One kill of each role somewhere in each of these shares of its work."""
ALL_DEDUPE = (
    "--set", "targets.epic-valley.duplicate_control=msh10",
    "--set", "targets.epic-valley.duplicate_window_hours=72",
    "--set", "kafka.session_timeout_seconds=6",
)  # fmt: skip
WRITES = {
    "receive": ("raw.stripe",),
    "listen": ("raw.hl7",),
    "worker": ("payments", "dispositions"),
    "project": ("patients",),  # what it reads: it writes to Redis
    "deliver": ("deliveries",),
}
TRANSACTIONAL = ("worker", "deliver")
RESTARTS = {
    "receive": "receiver",
    "listen": "listener",
    "worker": "worker-0",
    "project": "projector",
    "deliver": "deliverer",
}


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("kills") / "home")
    yield home
    assert home.close() == [], "processes were left running"


def choose_points(expected, seed):
    """Role -> the sums of end offsets at which it is killed."""
    counts = expected.counts
    messages = counts["patient_update"] + len(expected.poison["adt_without_pid3"])
    work = {
        "receive": counts["accepted"] - messages,
        "listen": messages,
        "worker": counts["canonical"] + counts["suppressed"] + counts["ignored"] + counts["patient_update"],
        "project": counts["patient_update"],
        "deliver": len(expected.targets) * counts["canonical"],
    }
    chance = random.Random(f"kills {seed}")
    return {role: [round(chance.uniform(*share) * work[role]) for share in SHARES] for role in WRITES}


class Killer:
    """Kills roles of a run at their points."""

    def __init__(self, run, home, points):
        self.kills = Counter()
        self.open_transactions = Counter()
        self._run = run
        self._left = {role: list(chosen) for role, chosen in points.items()}
        self._offsets = Offsets(home.find_address())

    def strike(self):
        """Kill whom it is time for; True when all kills are done."""
        for role, points in self._left.items():
            if points and self._offsets.count(*WRITES[role]) >= points[0]:
                process = self._run.find_role(role)
                if process is not None:
                    process.kill()
                    process.wait(10)
                    points.pop(0)
                    self.kills[role] += 1
                    if role in TRANSACTIONAL:
                        self.open_transactions[role] += self._offsets.has_open_transaction(*WRITES[role])
        return not any(self._left.values())


def tell(text):
    """Shown by ``pytest -s``, and with a failure."""
    sys.stdout.write(text + "\n")


def read_expected_now(home):
    try:
        return home.read_expected()
    except (OSError, ValueError):  # not written, or not whole yet
        return None


def test_kill_9_of_every_role_gives_the_same_ledger(home):
    run = home.start(*ALL_DEDUPE, events=EVENTS, seed=SEED)
    wait_for(lambda: run.is_over or read_expected_now(home) is not None, run.read_output)
    expected = home.read_expected()
    points = choose_points(expected, SEED)
    tell(f"seed {SEED}, kills at {points}")
    killer = Killer(run, home, points)
    wait_for(lambda: run.is_over or killer.strike(), run.read_output, timeout=240)
    finished = run.wait()
    report = finished.report
    tell(f"kills {dict(killer.kills)}, with an open transaction {dict(killer.open_transactions)}")
    assert killer.kills == dict.fromkeys(WRITES, len(SHARES)), finished
    assert_green(home, finished)
    assert all(report["restarts"][RESTARTS[role]] >= len(SHARES) for role in WRITES), report["restarts"]
    assert report["sent"]["retries"] > 0, "no sender noticed"
    assert report["posted"] == len(expected.rows)
    # A refused resend tells nothing about the first copy: such a one is unknown, for a person.
    assert report["rejected"] + report["unknown"] == sum(target.rejected for target in expected.targets.values())
    assert report["parked"] == 0
    assert home.describe_processes() == []
    tell(f"restarts {report['restarts']}, sent {report['sent']}, {report['seconds']} s")


def test_kill_9_of_the_run_itself(home):
    """On Linux its processes die with it. The stack does not; one part of it is killed too. The next run is green."""
    known = len(home.read_postings())
    run = home.start(*ALL_DEDUPE)
    wait_for(lambda: run.is_over or len(home.read_postings()) > known, run.read_output)
    children = psutil.Process(run.pid).children()
    assert len(children) >= len(WRITES) + 1
    run.signal(signal.SIGKILL)
    assert run.wait().code == -signal.SIGKILL
    wait_for(lambda: not any(map(psutil.pid_exists, [child.pid for child in children])), home.describe_processes)
    daemons = home.find_processes()
    assert len(daemons) == 3, home.describe_processes()
    (kafka,) = (daemon for daemon in daemons if daemon.cwd().endswith("/kafka"))
    kafka.kill()
    kafka.wait(10)
    assert_green(home, home.start(*ALL_DEDUPE).wait())
    assert home.describe_processes() == []


async def await_posting(site):
    """The ledger's database belongs to this thread."""
    until = time.monotonic() + 30
    while len(site.read_postings()) != 1:
        assert time.monotonic() < until, "the message that was written did not arrive"
        await asyncio.sleep(0.05)


@pytest.mark.parametrize("forgets", [False, True])
async def test_a_deliverer_that_forgot_its_calls_would_be_found_out(stack, tmp_path, monkeypatch, forgets):
    """The comparison above can fail: without its entries a deliverer killed after a write posts twice."""
    site = Site(stack, tmp_path, dedupe=False)
    await site.billing.start()
    try:
        site.publish([("capture", "pi_1", "pi_1", 500)])
        assert await wait_for_exit(start_program(site, crash_after=1)) == -signal.SIGKILL
        await await_posting(site)
        if forgets:
            restore = Ledger.restore

            def forget_open_calls(ledger, event_id, entry):
                if entry.state != State.IN_FLIGHT:
                    restore(ledger, event_id, entry)

            monkeypatch.setattr(Ledger, "restore", forget_open_calls)
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 1)
        row = ExpectedRow(site.name, site.name, "pi_1", "Npi_1", "NORTH", "PY", 500, "USD")
        expected = Expected(1, "pi_", (row,), {}, {}, {}, {}, {}, ())
        problems = [difference.problem for difference in compare_ledger(expected, site.read_postings())]
        assert problems == (["twice"] if forgets else [])
        assert site.read_last_outcomes() == {"pi_1": ["posted" if forgets else "unknown"]}
    finally:
        await site.billing.stop()

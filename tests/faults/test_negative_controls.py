"""Each protection of the worker, taken out, is found out by the oracle; with it the same fault leaves no trace.

Every scenario is one fault at one exact point. It is run twice: by the shipped worker, then by the same worker with one
protection taken out. Payouts need no patient, so neither Redis nor its projector is under test here.
"""

from __future__ import annotations

import random
import sys
import time
from dataclasses import replace

import pytest

from tests.faults import broken_worker
from tests.faults.fleet import SHIPPED, Site
from tests.faults.oracle import Oracle
from tests.faults.traffic import Sender, Stream
from tests.integration.conftest import ROOT

pytestmark = [
    pytest.mark.integration,
    pytest.mark.timeout(300),
    pytest.mark.invariant("I1"),
    pytest.mark.invariant("I2"),
]

COUNT = 12


def build_program(protection, fault):
    # -P: the folder of the script holds modules of these tests, not of the worker.
    return (sys.executable, "-P", str(ROOT / "tests" / "faults" / "broken_worker.py"), protection, fault)


class Stage:
    """A deployment with one partition per topic, a sender and the oracle."""

    def __init__(self, site):
        self.site = site
        self.sender = Sender(site.stack.kafka_bootstrap, Stream(1), rate=1)
        self.oracle = Oracle(site.stack.kafka_bootstrap, site.stack.registry_url)

    def send(self, *items):
        for item in items:
            self.sender.send(item)
        self.sender.flush()

    def send_payouts(self, count=COUNT):
        self.send(*(self.sender.stream.build_payout("north")[0] for _ in range(count)))

    def await_fates(self, count):
        """Wait until so many raw records have a fate."""

        def have():
            self.oracle.follow()
            return sum(map(bool, self.oracle.fates.values())) >= count

        self.site.wait_until(have, f"{count} records are not decided")

    def await_end(self):
        """All that was sent before one more record has been decided once that one is: it is the same partition."""
        self.send_payouts(1)
        last = self.sender.stream.build_payout("north")[0]
        self.send(last)

        def have():
            self.oracle.follow()
            hops = [hop for hop, raw in self.oracle.raw.items() if raw[0] == last.number]
            return hops and self.oracle.fates[hops[0]]

        self.site.wait_until(have, "the last record is not decided")

    def judge(self):
        self.oracle.follow()
        return self.oracle.judge(self.sender.meanings, self.sender.sent)


@pytest.fixture
def make_stage(embedded_stack, tmp_path):
    opened = []

    def make(**overrides):
        settings = {"worker.partitions": "1"} | {key.replace("__", "."): value for key, value in overrides.items()}
        opened.append(Stage(Site(tmp_path, embedded_stack, settings)))
        return opened[-1]

    yield make
    for stage in opened:
        stage.oracle.close()
        stage.site.close()


def assert_verdict(stage, protection, *kinds):
    verdict = stage.judge()
    if protection == "none":
        assert verdict.violations == []
    else:
        assert set(kinds) <= set(verdict.kinds), f"not found out: {protection}; {verdict.violations}"


@pytest.mark.parametrize("protection", ["none", "offsets_first", "store_before_commit", "seen_outside"])
def test_death_before_the_commit(make_stage, protection):
    stage = make_stage()
    stage.send_payouts()
    slot = stage.site.add_slot(0, build_program(protection, "die_before_commit"))
    slot.start(keep=False)
    assert slot.await_exit() == broken_worker.EXIT
    slot.program = build_program(protection, "none")
    slot.start()
    stage.await_end()
    kind = "lost" if protection == "offsets_first" else "other fate"
    assert_verdict(stage, protection, kind, "fact missing")


@pytest.mark.parametrize("protection", ["none", "dead_letter_marks"])
def test_a_good_copy_after_a_dead_letter(make_stage, protection):
    stage = make_stage()
    stage.site.alter_topic("settlements", "max.message.bytes", "6000")
    noise = random.Random(3).randbytes(9000).hex()
    large = stage.sender.stream.build_payout("north", method=noise)[0]
    fact = large.meaning
    stage.send(replace(large, meaning="dead_lettered"))
    stage.site.add_slot(0, build_program(protection, "none")).start()
    stage.await_fates(1)
    good = replace(large, number=10**6, body=large.body.replace(noise.encode(), b"standard"), meaning=fact)
    stage.send(good)
    stage.await_end()
    assert_verdict(stage, protection, "other fate", "fact missing")


@pytest.mark.parametrize("protection", ["none", "late_metadata"])
def test_a_batch_in_hand_over_a_rebalance(make_stage, protection):
    stage = make_stage()
    stage.send_payouts()
    frozen = stage.site.add_slot(0, build_program(protection, "freeze_with_batch"))
    frozen.start()
    stage.site.wait_until(frozen.is_frozen, "it does not come to its commit")
    stage.site.add_slot(1, SHIPPED).start()
    stage.await_fates(COUNT)
    frozen.thaw()
    log = stage.site.folder / "worker-0.log"
    stage.site.wait_until(
        lambda: (
            "transaction_rolled_back" in log.read_text("utf-8")
            or stage.site.transactions.find_state(frozen.transactional_id) == 4
        ),
        "the batch in hand is neither committed nor given up",
    )
    stage.await_end()
    assert_verdict(stage, protection, "doubled", "fact twice")


@pytest.mark.parametrize("protection", ["none", "reload_to_stable"])
def test_a_transaction_undecided_at_take_over(make_stage, protection):
    stage = make_stage(kafka__transaction_timeout_seconds="60")
    stage.send_payouts()
    frozen = stage.site.add_slot(0, build_program("none", "freeze_before_commit"))
    frozen.start()
    stage.site.wait_until(frozen.is_frozen, "it does not come to its commit")
    assert stage.site.transactions.find_state(frozen.transactional_id) == 1
    successor = stage.site.add_slot(1, build_program(protection, "ignore_pending_offsets"))
    successor.start()
    stage.site.wait_until(
        lambda: (successor.transactional_id, True) in stage.site.list_members() or successor.is_ready(),
        "nobody takes over",
    )
    # One that does not wait for the transaction is ready at once; the other one not before it is decided.
    until = time.monotonic() + 4
    while time.monotonic() < until and not successor.is_ready():
        time.sleep(0.1)
    time.sleep(0.5)
    frozen.thaw()
    stage.await_end()
    assert_verdict(stage, protection, "doubled", "fact twice")

"""Kafka, registry or Redis away under real processes: nothing is answered that is not durable, nothing is decided that
is not known, and all goes on by itself when they are back."""

import json
import os
import signal
import time
import uuid
from concurrent.futures import ThreadPoolExecutor

import pytest
import redis

pytestmark = pytest.mark.integration

ROLES = {
    "receive": "receiver",
    "listen": "listener",
    "project": "projector",
    "worker": "worker",
    "deliver": "deliverer",
}


def build_payment(mrn, number=None):
    number = number or uuid.uuid4().hex[:16]
    intent = {
        "id": f"pi_{number}",
        "amount_received": 12500,
        "currency": "usd",
        "status": "succeeded",
        "metadata": {"mrn": mrn},
    }
    event = {"id": f"evt_{number}", "created": int(time.time()), "type": "payment_intent.succeeded"}
    return json.dumps(event | {"data": {"object": intent}}).encode()


def build_admission(mrn, control_id=None):
    return (
        f"MSH|^~\\&|EPICADT|LSNORTH|REMITSTREAM|LAKESHORE|20260301120000+0000||ADT^A04^ADT_A01|"
        f"{control_id or uuid.uuid4().hex[:16]}|P|2.5.1\rEVN|A04|20260301120000+0000\rPID|1||{mrn}^^^NORTH^MR\r"
    ).encode()


class Site:
    """One deployment with its billing systems, running through all tests, and what must have come of it."""

    def __init__(self, deployment, world, stack):
        self.deployment, self.world, self.stack = deployment, world, stack
        self.expected = {}
        self.posted = 0

    def expect(self, *, posted=0, **fates):
        """From now on these more are due."""
        self.posted += posted
        for fate, count in fates.items():
            self.expected[fate] = self.expected.get(fate, 0) + count

    def admit(self, mrn):
        """Send an admission and wait until the patient is known."""
        known = self.world.read_metric("projector", "projection_applied_total")
        assert b"MSA|AA" in self.world.send_hl7(build_admission(mrn))
        self.expect(patient_update=1)
        self.deployment.wait_until(
            lambda: self.world.read_metric("projector", "projection_applied_total") > known, "nobody is known"
        )

    def count_fates(self):
        counts = {}
        for labels, value in self.world.list_metrics("worker", "records_total").items():
            fate = dict(labels)["fate"]
            counts[fate] = counts.get(fate, 0) + value
        return counts

    def await_reason(self, role, text):
        self.deployment.wait_until(
            lambda: any(text in reason for reason in self.deployment.read_reasons(role).values()),
            f"{role} does not say {text}",
        )

    def read_log(self, command):
        return (self.deployment.folder / f"{command}.log").read_text("utf-8")

    def await_all_ready(self):
        for role in ROLES.values():
            self.deployment.await_ready(role)

    def settle(self):
        """All is done, at the targets too; nothing is lost, nothing is twice, nothing waits or is a dead letter."""
        account = self.deployment.await_account(lambda found: not found.pending, timeout=90)
        assert {fate: count for fate, count in account.raw.parts.items() if count} == self.expected
        assert account.balanced
        assert account.lost == 0
        assert account.targets["epic-north"].parts["posted"] == self.posted
        return account

    def check_alive(self):
        """No process ended: an outage is waited out."""
        ended = {name: process.poll() for name, process in self.deployment.processes.items()}
        assert set(ended.values()) == {None}, f"{ended}\n{self.deployment.read_logs()}"


@pytest.fixture(scope="module")
def running(deploy_for_module, outside, embedded_stack):
    deployment = deploy_for_module()
    for command in ("sandbox", *ROLES):
        deployment.start(command)
    site = Site(deployment, outside(deployment), embedded_stack)
    site.await_all_ready()
    site.admit("N1")
    yield site
    deployment.close()
    embedded_stack.up()


@pytest.fixture
def site(running, stack):
    """Everything runs and is idle; what the test before stopped is up again."""
    running.await_all_ready()
    return running


def send_at_once(*calls):
    """Results of calls made at the same time: each waits for its own timeout."""
    with ThreadPoolExecutor(len(calls)) as pool:
        return [future.result() for future in [pool.submit(call) for call in calls]]


def test_kafka_away(site):
    """503 and no acknowledgement while it is away; afterwards the senders' retries are taken once."""
    assert site.world.deliver(build_payment("N1")) == 200
    site.expect(canonical=1, posted=1)
    before = site.settle().raw.total

    site.stack.kill("kafka")
    payment, admission = build_payment("N1"), build_admission("N2", "CONTROL-7")
    (status, headers, _), acknowledged = send_at_once(
        lambda: site.world.post(payment, signature=site.world.sign(payment)), lambda: site.world.send_hl7(admission)
    )
    assert status == 503
    assert int(headers["retry-after"]) > 0
    assert acknowledged == b""
    assert site.world.read_metric("receiver", "refused_total", source="stripe", reason="not_written") == 1
    assert site.world.read_metric("listener", "refused_total", source="hl7", reason="not_durable") == 1
    for role in ROLES.values():
        site.deployment.wait_until(lambda role=role: not site.deployment.is_ready(role), f"{role} says it is ready")
    site.check_alive()
    # Its clients try to connect twenty times a second; the log tells it once.
    assert 1 <= site.read_log("receive").count("connection_trouble") < 20

    site.stack.start("kafka")
    site.await_all_ready()
    assert b"MSA|AA|CONTROL-7" in site.world.send_hl7(admission)
    assert site.world.deliver(payment) == 200
    site.expect(patient_update=1, canonical=1, posted=1)
    assert site.settle().raw.total == before + 2
    site.check_alive()


def test_what_was_written_without_an_answer_is_suppressed_when_it_comes_again(site):
    """A frozen broker writes what it was sent before: nobody was told, so both senders try again."""
    assert site.world.deliver(build_payment("N1")) == 200
    site.admit("N3")
    site.expect(canonical=1, posted=1)
    site.settle()

    payment, admission = build_payment("N1"), build_admission("N4", "CONTROL-8")
    broker = site.stack.status()["kafka"].pid
    os.kill(broker, signal.SIGSTOP)
    try:
        (status, _, _), acknowledged = send_at_once(
            lambda: site.world.post(payment, signature=site.world.sign(payment)),
            lambda: site.world.send_hl7(admission),
        )
    finally:
        os.kill(broker, signal.SIGCONT)
    assert status == 503
    assert acknowledged == b""
    site.expect(patient_update=1, canonical=1, posted=1)
    site.settle()  # Both are there, though both senders were refused.

    site.await_all_ready()
    assert site.world.deliver(payment) == 200
    assert b"MSA|AA|CONTROL-8" in site.world.send_hl7(admission)
    site.expect(suppressed=2)
    site.settle()
    site.check_alive()


def test_registry_away_stops_nothing(site):
    """Ids and schemas are asked once."""
    site.stack.stop("registry")
    site.admit("N5")
    assert site.world.deliver(build_payment("N5")) == 200
    site.expect(canonical=1, posted=1)
    site.deployment.wait_until(
        lambda: (
            site.posted
            == site.world.read_metric("deliverer", "deliveries_total", target="epic-north", outcome="posted")
        ),
        "it is not posted while the registry is away",
    )
    site.check_alive()
    assert all(site.deployment.is_ready(role) for role in ROLES.values())
    site.stack.start("registry")
    site.settle()


def test_redis_away_pauses_and_decides_nothing(site):
    fates = site.count_fates()
    site.stack.stop("redis")
    assert site.world.deliver(build_payment("N1")) == 200
    site.await_reason("worker", "RS240")
    site.await_reason("projector", "RS240")
    assert site.world.read_metric("worker", "worker_paused", role="worker", reason="RS240") == 1
    assert b"MSA|AA" in site.world.send_hl7(build_admission("N6"))
    for fate in ("canonical", "dead_lettered", "waiting", "in_review"):
        assert site.count_fates().get(fate) == fates.get(fate)
    site.check_alive()
    # It comes back empty.
    site.stack.start("redis")
    site.await_all_ready()
    site.expect(patient_update=1, canonical=1, posted=1)
    site.settle()
    assert sum(site.world.read_ends("waiting.stripe").values()) == 0
    assert sum(site.world.read_ends("dlq").values()) == 0


def test_a_flushed_redis_makes_nobody_unknown(site):
    """The patient is known; an empty projection must not put the payment on hold or give it to a person."""
    fates = site.count_fates()
    replays = sum(site.world.list_metrics("projector", "projection_replays_total").values())
    projector = site.deployment.processes["project"]
    projector.send_signal(signal.SIGSTOP)
    try:
        with redis.Redis.from_url(site.deployment.settings.redis.url) as client:
            client.flushall()
        assert site.world.deliver(build_payment("N1")) == 200
        site.await_reason("worker", "RS241")
        assert site.count_fates() == fates
        assert sum(site.world.read_ends("waiting.stripe").values()) == 0
    finally:
        projector.send_signal(signal.SIGCONT)
    site.expect(canonical=1, posted=1)
    site.settle()
    assert sum(site.world.list_metrics("projector", "projection_replays_total").values()) > replays
    assert sum(site.world.read_ends("waiting.stripe").values()) == 0
    site.check_alive()


def test_every_metric_is_known(running):
    for role in ROLES.values():
        assert running.world.list_metrics(role, "metric_misuse_total") == {}, role

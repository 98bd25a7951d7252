"""Delivery on the real stack against the simulated billing system: nothing lost, nothing twice, in order.

The oracle is the billing system's own ledger and the topic `deliveries`, read without our runner. Run as a program this
file is a deliverer process that the tests can kill.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import subprocess
import sys
import time
import uuid
from collections import Counter
from pathlib import Path

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient

from identity.projection import RedisDown
from identity.resolution import Known, Unknown
from sandbox.billing import BillingSystem, Mode, ModeKind
from sandbox.transactions import Instance
from schemas.events import DeliveryOutcome, MoneyEvent, Reference
from schemas.keys import build_event_id
from schemas.money import Money
from schemas.tenancy import Authority, Facility, Tenancy
from schemas.wire import Decoder, Encoder
from sinks.catalog import load
from sinks.runner import Runner
from sinks.transport import MllpTransport
from topics import catalog, provision
from topics.cluster import KafkaSettings, describe_topic_ids
from topics.frontier import read_frontiers
from topics.reading import Record, read_to_end
from topics.registry import Registry, RegistrySettings, register_schemas

pytestmark = pytest.mark.integration


class EverybodyKnown:
    """Stands in for the patient projection: every reference is its own survivor, except those held back."""

    def __init__(self, unknown=()):
        self.unknown = set(unknown)
        self.error = None

    async def resolve(self, refs):
        if self.error is not None:
            raise self.error
        return [Unknown("x") if ref.value in self.unknown else Known(ref) for ref in refs]


def build_tenancy(facility):
    authority = Authority(name="NORTH")
    return Tenancy(
        tenant="acme",
        facilities=(
            Facility(id=facility, time_zone="America/Chicago", default_authority="NORTH", authorities=(authority,)),
        ),
    )


def build_settings(name, port, *, dedupe, deadline=1.0, connections=4):
    """Instance and facility share their name."""
    target = load("epic_dft")
    return target, target.settings(
        name=name,
        connector="epic_dft",
        facilities=(name,),
        host="127.0.0.1",
        port=port,
        sending_application="REMITSTREAM",
        sending_facility="ACME",
        receiving_application="EPIC",
        receiving_facility="NORTH",
        payment_code="PATPAY",
        refund_as="negative",
        duplicate_control="msh10" if dedupe else "none",
        duplicate_window_hours=24 if dedupe else None,
        call_deadline_seconds=deadline,
        connections=connections,
    )


class Site:
    """One target instance with topics, events, billing system and the facts read back.

    The canonical topics are shared with other tests; a facility of its own keeps their events out of this ledger.
    """

    def __init__(self, stack, tmp_path, *, dedupe):
        # Short sessions: a take-over waits call deadline plus session timeout.
        self.kafka = KafkaSettings(bootstrap=stack.kafka_bootstrap, session_timeout_seconds=6)
        self.registry_settings = RegistrySettings(url=stack.registry_url)
        self.name = f"epic-{uuid.uuid4().hex[:8]}"
        self.dedupe = dedupe
        self.billing = BillingSystem(
            tmp_path / "billing.db",
            [Instance(self.name, duplicate_control="msh10" if dedupe else "none")],
            None,
        )
        topics = catalog.list_topics([], [self.name])
        provision.apply(self.kafka, topics, partitions=count_partitions(self.kafka) or 2, embedded=True)
        self.registry = Registry(self.registry_settings)
        ids = register_schemas(self.registry, topics)
        self.encoder = Encoder("money_event", ids["payments-value"])
        self.events = []

    @property
    def port(self):
        return self.billing.ports[self.name]

    def build_runner(self, patients=None, instance="test", **options):
        target, settings = build_settings(self.name, self.port, dedupe=self.dedupe)
        return Runner(
            self.kafka,
            target,
            settings,
            build_tenancy(self.name),
            registry=self.registry,
            identities=patients or EverybodyKnown(),
            instance=instance,
            **options,
        )

    def publish(self, facts):
        """``facts``: (kind, object id, root, minor). Ids carry the instance's name: the topics are shared by tests."""
        producer = Producer({"bootstrap.servers": self.kafka.bootstrap, "partitioner": "murmur2_random", "acks": "all"})
        for kind, object_id, root, minor in facts:
            key = f"stripe:{self.name}:{kind}:{object_id}"
            event = MoneyEvent(
                event_id=build_event_id(key),
                transaction_key=key,
                tenant="acme",
                facility=self.name,
                source="stripe",
                account=self.name,
                kind=kind,
                status="succeeded",
                money=Money(minor, "USD", 2),
                occurred_at=1_767_225_600_000,
                received_at=1_767_225_600_000,
                object_id=object_id,
                root=root,
                source_event_id=f"evt_{object_id}",
                patient=Reference("NORTH", "MR", f"N{root}"),
                mrn=Reference("NORTH", "MR", f"N{root}"),
                mapping_version="1",
                origin="t:0:0",
            )
            self.events.append(event)
            producer.produce(
                catalog.PAYMENTS,
                self.encoder.encode(event),
                f"{self.name}:{root}".encode(),
                headers=[("event_id", event.event_id.encode())],
            )
        producer.flush()

    def read_postings(self):
        return self.billing.read_ledger()

    def read_outcomes(self):
        """Object id -> outcomes in order, of this site's events."""
        decoder = Decoder("delivery_outcome", DeliveryOutcome, self.registry.find_schema)
        names = {event.event_id: event.object_id for event in self.events}
        found = {event.object_id: [] for event in self.events}
        for item in read_to_end(self.kafka, catalog.DELIVERIES):
            if isinstance(item, Record) and item.key.endswith(f"|{self.name}".encode()):
                outcome = decoder.decode(item.value)
                if outcome.event_id in names:
                    found[names[outcome.event_id]].append(outcome)
        return found

    def read_last_outcomes(self):
        return {name: [o.outcome for o in outcomes][-1:] for name, outcomes in self.read_outcomes().items()}

    def read_dead_letters(self):
        ids = {event.event_id for event in self.events}
        return [
            item
            for item in read_to_end(self.kafka, catalog.DLQ)
            if isinstance(item, Record) and (dict(item.headers).get("event_id") or b"").decode() in ids
        ]

    def read_open_entries(self):
        """Keys of `attempts.<target>` that are not tombstoned."""
        latest = {}
        for item in read_to_end(self.kafka, catalog.name_attempts(self.name)):
            if isinstance(item, Record):
                latest[item.key] = item.value
        return [key for key, value in latest.items() if value is not None]


def count_partitions(kafka):
    """Partitions that `payments` has already; 0 when it does not exist."""
    found = AdminClient({"bootstrap.servers": kafka.bootstrap}).list_topics(timeout=10).topics.get(catalog.PAYMENTS)
    return len(found.partitions) if found else 0


@pytest.fixture(scope="module", autouse=True)
def fresh_topics(embedded_stack):
    """Begin with empty topics: every site reads the canonical ones whole."""
    admin = AdminClient({"bootstrap.servers": embedded_stack.up().kafka_bootstrap})
    known = admin.list_topics(timeout=10).topics
    names = [name for name in known if not name.startswith("_")]
    for future in admin.delete_topics(names, operation_timeout=20).values() if names else ():
        future.result()
    until = time.monotonic() + 20
    while set(names) & set(admin.list_topics(timeout=10).topics):
        assert time.monotonic() < until, "topics are not deleted"
        time.sleep(0.1)


@pytest.fixture
def make_site(stack, tmp_path):
    def make(*, dedupe):
        return Site(stack, tmp_path, dedupe=dedupe)

    return make


async def wait_until(condition, seconds=60.0):
    until = time.monotonic() + seconds
    while not await asyncio.to_thread(condition):
        assert time.monotonic() < until, "not reached in time"
        await asyncio.sleep(0.1)


async def wait_for_postings(site, count):
    """Return as soon as the target has so many, with calls on the wire."""
    until = time.monotonic() + 60
    for _ in iter(lambda: time.monotonic() < until, False):
        if len(site.read_postings()) >= count:
            return
        await asyncio.sleep(0.001)
    pytest.fail("not reached in time")


class Running:
    """A runner as a task; stops it at the end and raises what it raised."""

    def __init__(self, runner):
        self.runner = runner

    async def __aenter__(self):
        self.task = asyncio.create_task(self.runner.run())
        return self.runner

    async def __aexit__(self, *_):
        self.runner.stop()
        await asyncio.wait_for(self.task, 60)


def count_final(site):
    return sum(1 for outcomes in site.read_last_outcomes().values() if outcomes)


async def test_posts_everything_once_in_order(make_site):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        facts = []
        for n in range(40):
            facts += [("capture", f"pi_{n}", f"pi_{n}", 1000 + n), ("refund", f"re_{n}", f"pi_{n}", 100)]
        facts.append(("dispute_opened", "dp_1", "pi_1", 1001))
        site.publish(facts)
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == len(facts))
        postings = site.read_postings()
        assert Counter(row["description"] for row in postings) == Counter(
            f[1] for f in facts if f[0] != "dispute_opened"
        )
        amounts = {row["description"]: row["minor"] for row in postings}
        assert amounts["pi_7"] == 1007
        assert amounts["re_7"] == -100
        places = {row["description"]: place for place, row in enumerate(postings)}
        assert all(places[f"pi_{n}"] < places[f"re_{n}"] for n in range(40))
        outcomes = site.read_outcomes()
        assert [o.outcome for o in outcomes["dp_1"]] == ["not_routed"]
        assert all([o.outcome for o in found] == ["posted"] for name, found in outcomes.items() if name != "dp_1")
        by_control_id = {row["control_id"]: row for row in postings}
        for name, (outcome,) in outcomes.items():
            if name != "dp_1":
                assert by_control_id[outcome.control_id]["transaction_id"] == outcome.reference
        assert site.read_open_entries() == []
    finally:
        await site.billing.stop()


async def test_class_a_resends_the_same_message_and_the_target_posts_once(make_site):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.HANG_AFTER_POSTING, count=1, object_id="pi_3"))
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(6)] + [("refund", "re_3", "pi_3", 200)])
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 7)
        assert Counter(row["description"] for row in site.read_postings()) == {
            **{f"pi_{n}": 1 for n in range(6)},
            "re_3": 1,
        }
        outcomes = site.read_outcomes()
        assert [o.outcome for o in outcomes["pi_3"]] == ["posted"]
        assert outcomes["pi_3"][0].attempt == 2
        assert site.billing.read_health()["instances"][site.name]["duplicates"] == 1
    finally:
        await site.billing.stop()


async def test_class_d_never_resends_and_stops_the_entity(make_site):
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.HANG_AFTER_POSTING, count=1, object_id="pi_3"))
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(6)] + [("refund", "re_3", "pi_3", 200)])
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 7)
        # A second process must not touch it either.
        site.publish([("capture", "pi_9", "pi_9", 500), ("chargeback", "dp_3", "pi_3", 500)])
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 9)
            await asyncio.sleep(2)  # longer than the call deadline
        postings = Counter(row["description"] for row in site.read_postings())
        assert postings == {**{f"pi_{n}": 1 for n in range(6)}, "pi_9": 1}
        last = site.read_last_outcomes()
        assert last["pi_3"] == ["unknown"]
        assert last["re_3"] == last["dp_3"] == ["parked"]
        assert last["pi_9"] == ["posted"]
        assert site.read_dead_letters() == []
        assert len(site.read_open_entries()) == 3
    finally:
        await site.billing.stop()


@pytest.mark.parametrize("hands_over", [True, False])
async def test_answers_on_the_wire_are_recorded_before_partitions_go_to_another_process(make_site, hands_over):
    """Class D: each answer that the old owner does not record would be a person's work. Without the wait, some are."""
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.SLOW, seconds=0.5))
        first, second = (site.build_runner(instance=name) for name in ("first", "second"))
        if not hands_over:
            first._consumer._finish = lambda _keys: None
        async with Running(first):
            await wait_until(lambda: first.ready()[0] and len(first.status()["partitions"]) == 4)
            owned = set(first.status()["partitions"])
            site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(40)])
            await wait_for_postings(site, 4)
            async with Running(second):
                await wait_until(lambda: count_final(site) == 40)
                taken = set(second.status()["partitions"])
                assert taken
                assert taken < owned
        postings = Counter(row["description"] for row in site.read_postings())
        assert max(postings.values()) == 1
        last = Counter(outcome for outcomes in site.read_last_outcomes().values() for outcome in outcomes)
        if hands_over:
            assert last == {"posted": 40}
            assert site.read_open_entries() == []
        else:
            assert last["unknown"] > 0
    finally:
        await site.billing.stop()


async def test_a_refusal_stops_its_entity_and_no_other(make_site):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.REJECT, object_id="pi_2"))
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(5)] + [("refund", "re_2", "pi_2", 1)])
        site.publish([("refund", "re_1", "pi_1", 1)])
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 7)
        last = site.read_last_outcomes()
        assert last["pi_2"] == ["rejected"]
        assert last["re_2"] == ["parked"]
        assert last["re_1"] == ["posted"]
        assert {row["description"] for row in site.read_postings()} == {"pi_0", "pi_1", "pi_3", "pi_4", "re_1"}
        (letter,) = site.read_dead_letters()
        reasons = {name: value.decode() for name, value in letter.headers if name.startswith("dead_letter")}
        assert reasons["dead_letter_stage"] == site.name
        assert reasons["dead_letter_kind"] == "REJECTED"
        assert reasons["dead_letter_code"] == "MSA_AR_207"
        assert letter.value == site.encoder.encode(next(e for e in site.events if e.object_id == "pi_2"))
    finally:
        await site.billing.stop()


async def test_an_outage_is_waited_out_and_drained_in_order(make_site):
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.REFUSE_CONNECTIONS))
        site.publish(
            [("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(20)]
            + [("refund", f"re_{n}", f"pi_{n}", 100) for n in range(20)]
        )
        async with Running(site.build_runner()) as runner:
            await wait_until(lambda: runner.ready()[1].get("target") == "CONNECT_FAILED")
            await asyncio.sleep(2)
            assert site.read_postings() == []
            assert count_final(site) == 0
            await site.billing.reset()
            await wait_until(lambda: count_final(site) == 40)
            assert runner.ready() == (True, {})
        assert site.read_dead_letters() == []
        postings = [row["description"] for row in site.read_postings()]
        assert len(postings) == len(set(postings)) == 40
        assert all(postings.index(f"pi_{n}") < postings.index(f"re_{n}") for n in range(20))
    finally:
        await site.billing.stop()


async def test_an_unknown_patient_is_parked_and_posted_when_known(make_site):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        patients = EverybodyKnown(unknown={"Npi_1"})
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(3)] + [("refund", "re_1", "pi_1", 1)])
        async with Running(site.build_runner(patients)):
            await wait_until(lambda: count_final(site) == 4)
            assert site.read_last_outcomes()["pi_1"] == ["parked"]
            assert {row["description"] for row in site.read_postings()} == {"pi_0", "pi_2"}
            patients.unknown.clear()
            await wait_until(lambda: all(found == ["posted"] for found in site.read_last_outcomes().values()))
        postings = [row["description"] for row in site.read_postings()]
        assert sorted(postings) == ["pi_0", "pi_1", "pi_2", "re_1"]
        assert postings.index("pi_1") < postings.index("re_1")
        assert site.read_open_entries() == []
    finally:
        await site.billing.stop()


async def test_nobody_is_posted_while_identity_cannot_be_decided(make_site):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        patients = EverybodyKnown()
        patients.error = RedisDown("no answer.", place="redis")
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(3)])
        async with Running(site.build_runner(patients)) as runner:
            await wait_until(lambda: "paused" in runner.ready()[1])
            await asyncio.sleep(0.5)
            assert count_final(site) == 0
            patients.error = None
            await wait_until(lambda: count_final(site) == 3)
        assert all(found == ["posted"] for found in site.read_last_outcomes().values())
        assert site.read_dead_letters() == []
    finally:
        await site.billing.stop()


def start_program(site, *, crash_after=0, freeze_before=0, instance="test", lease=True):
    """A deliverer process.

    It kills itself (SIGKILL) just after its ``crash_after``-th socket write, stops (SIGSTOP) just before its
    ``freeze_before``-th, before the last look.
    """
    options = {
        "kafka": site.kafka.bootstrap,
        "registry": site.registry_settings.url,
        "name": site.name,
        "port": site.port,
        "dedupe": site.dedupe,
        "crash_after": crash_after,
        "freeze_before": freeze_before,
        "instance": instance,
        "lease": lease,
    }
    return subprocess.Popen(
        [sys.executable, __file__, json.dumps(options)],
        cwd=Path(__file__).parents[2],
        env={**os.environ, "PYTHONPATH": str(Path(__file__).parents[2])},
    )


async def wait_for_exit(process, seconds=60.0):
    await wait_until(lambda: process.poll() is not None, seconds)
    return process.returncode


@pytest.mark.parametrize("crash_after", [1, 7, 23])
async def test_kill_9_loses_nothing_and_doubles_nothing(make_site, crash_after):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        facts = [("capture", f"pi_{n}", f"pi_{n}", 500 + n) for n in range(30)]
        facts += [("refund", f"re_{n}", f"pi_{n}", 100 + n) for n in range(30)]
        site.publish(facts)
        assert await wait_for_exit(start_program(site, crash_after=crash_after)) == -signal.SIGKILL
        assert len(site.read_postings()) < 60
        survivor = start_program(site, crash_after=0)
        try:
            await wait_until(lambda: count_final(site) == 60)
        finally:
            survivor.terminate()
            assert await wait_for_exit(survivor) == 0
        postings = [row["description"] for row in site.read_postings()]
        assert sorted(postings) == sorted(fact[1] for fact in facts)
        assert all(postings.index(f"pi_{n}") < postings.index(f"re_{n}") for n in range(30))
        assert all([o.outcome for o in found] == ["posted"] for found in site.read_outcomes().values())
        assert site.read_open_entries() == []
    finally:
        await site.billing.stop()


async def test_kill_9_at_a_target_without_dedupe_doubles_nothing_and_asks_a_person(make_site):
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500 + n) for n in range(30)])
        assert await wait_for_exit(start_program(site, crash_after=9)) == -signal.SIGKILL
        survivor = start_program(site, crash_after=0)
        try:
            await wait_until(lambda: count_final(site) == 30)
        finally:
            survivor.terminate()
            assert await wait_for_exit(survivor) == 0
        postings = Counter(row["description"] for row in site.read_postings())
        assert set(postings.values()) == {1}
        last = site.read_last_outcomes()
        assert {found[0] for found in last.values()} == {"posted", "unknown"}
        # What is not known to be posted was in flight; the rest was posted by one process or the other.
        unknown = {name for name, found in last.items() if found == ["unknown"]}
        assert set(last) - unknown <= set(postings)
        assert len(unknown) <= 8
    finally:
        await site.billing.stop()


@pytest.mark.parametrize("lease", [True, False])
async def test_a_frozen_process_that_was_replaced_writes_nothing_more(make_site, lease):
    """Without the lease (the control) it does write, so the test can see it."""
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.SLOW, seconds=0.05))
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500 + n) for n in range(120)])
        frozen = start_program(site, instance="one", lease=lease, freeze_before=21)
        successor = None
        try:
            await wait_until(lambda: os.waitid(os.P_PID, frozen.pid, os.WSTOPPED | os.WNOHANG | os.WNOWAIT))
            successor = start_program(site, instance="two")
            await wait_until(lambda: count_final(site) == 120)
            await wait_for_postings(site, 112)
            before = len(site.read_postings())
            frozen.send_signal(signal.SIGCONT)
            await asyncio.sleep(3)
            assert (len(site.read_postings()) == before) is lease
        finally:
            for process in filter(None, (frozen, successor)):
                process.send_signal(signal.SIGCONT)
                process.terminate()
                await wait_for_exit(process)
        descriptions = [row["description"] for row in site.read_postings()]
        assert len(descriptions) == len(set(descriptions))
        last = Counter(found[0] for found in site.read_last_outcomes().values())
        # In flight when it froze: two for each of four connections at most.
        assert last["unknown"] <= 8
        assert last["posted"] + last["unknown"] == 120
    finally:
        await site.billing.stop()


async def test_a_clean_stop_leaves_nothing_unknown(make_site):
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500 + n) for n in range(200)])
        for _ in range(3):  # stopped with calls on the wire and calls about to be made
            before = len(site.read_postings())
            async with Running(site.build_runner()):
                await wait_for_postings(site, before + 1)
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 200)
        assert all([o.outcome for o in found] == ["posted"] for found in site.read_outcomes().values())
        assert len(site.read_postings()) == 200
    finally:
        await site.billing.stop()


async def test_a_rewind_in_the_middle_loses_and_doubles_nothing(make_site):
    site = make_site(dedupe=False)
    await site.billing.start()
    try:
        await site.billing.set_mode(Mode(ModeKind.SLOW, count=1, object_id="pi_0", seconds=0.8))
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(300)])
        async with Running(site.build_runner()) as runner:
            await wait_for_postings(site, 50)
            # pi_0 holds its partition's frontier; all behind it is read again while it finishes.
            for _ in range(5):
                await runner._consumer.rewind()
                await asyncio.sleep(0.2)
            await wait_until(lambda: count_final(site) == 300)
        assert len(site.read_postings()) == 300
        assert all([o.outcome for o in found] == ["posted"] for found in site.read_outcomes().values())
        assert site.read_open_entries() == []
    finally:
        await site.billing.stop()


async def test_the_frontier_is_the_end_when_all_is_done(make_site):
    site = make_site(dedupe=True)
    await site.billing.start()
    try:
        site.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(10)])
        async with Running(site.build_runner()):
            await wait_until(lambda: count_final(site) == 10)
        frontiers = read_frontiers(site.kafka, f"remitstream.deliver.{site.name}")
        ids = describe_topic_ids(site.kafka, [catalog.PAYMENTS])
        last = {}
        for item in read_to_end(site.kafka, catalog.PAYMENTS):
            if isinstance(item, Record):
                last[item.partition] = item.offset
        assert last
        assert all(frontiers[ids[catalog.PAYMENTS], p] == offset + 1 for p, offset in last.items())
    finally:
        await site.billing.stop()


class _CrashingTransport(MllpTransport):
    """Kills this process just after a socket write, when the message may be anywhere; or freezes it just before one."""

    def __init__(self, settings, options):
        super().__init__(settings)
        self.writes = 0
        self.options = options

    async def send(self, request, before_write):
        def note():
            self.writes += 1
            if self.writes == self.options["freeze_before"]:
                os.kill(os.getpid(), signal.SIGSTOP)
            before_write()
            if self.writes == self.options["crash_after"]:
                asyncio.get_running_loop().call_soon(os.kill, os.getpid(), signal.SIGKILL)

        return await super().send(request, note)


async def run_program(options):
    target, settings = build_settings(options["name"], options["port"], dedupe=options["dedupe"])
    runner = Runner(
        KafkaSettings(bootstrap=options["kafka"], session_timeout_seconds=6),
        target,
        settings,
        build_tenancy(options["name"]),
        registry=Registry(RegistrySettings(url=options["registry"])),
        identities=EverybodyKnown(),
        instance=options["instance"],
        transport=_CrashingTransport(settings, options),
    )
    if not options["lease"]:
        runner._is_lease_fresh = runner._calls._is_lease_fresh = lambda: True
    asyncio.get_running_loop().add_signal_handler(signal.SIGTERM, runner.stop)
    await runner.run()


if __name__ == "__main__":
    asyncio.run(run_program(json.loads(sys.argv[1])))

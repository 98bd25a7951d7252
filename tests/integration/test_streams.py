"""The stream worker as a process, on the real stack: killed, robbed of its state, given what the broker refuses.

What must come out is worked out here from what was sent, by code that shares nothing with the worker.
"""

import json
import os
import random
import shutil
import time
from collections import Counter

import pytest
from confluent_kafka import Producer
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from schemas.events import MoneyEvent
from schemas.wire import Decoder
from topics.reading import Record, TopicReader, read_to_end
from topics.registry import Registry, SchemaBreak, SchemaMissing

pytestmark = pytest.mark.integration

ACCOUNT, FACILITY = b"north-card", b"north"


def build_body(kind, name, amount, *, mrn=None, parent=None, **more):
    item = {"id": name, "amount": amount, "currency": "usd", "status": "succeeded", "metadata": {}} | more
    if kind == "payment_intent.succeeded" and amount is not None:
        item["amount_received"] = amount
    if amount is None:
        del item["amount"]
    if mrn:
        item["metadata"]["mrn"] = mrn
    if parent:
        item["payment_intent"] = parent
    return json.dumps({"id": "evt", "type": kind, "created": 1_767_225_600, "data": {"object": item}}).encode()


class Plant:
    """A deployment with the writers of its raw and patient topics replaced by this test."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.kafka = deployment.settings.kafka
        self.registry = Registry(deployment.settings.registry)
        self.producer = Producer({"bootstrap.servers": self.kafka.bootstrap, "partitioner": "murmur2_random"})

    def send(self, entity, body):
        self.producer.produce(
            "raw.stripe",
            body,
            f"north-card/{entity}".encode(),
            headers=[
                ("source", b"stripe"),
                ("account", ACCOUNT),
                ("facility", FACILITY),
                ("ingest_time", str(time.time_ns() // 1_000_000).encode()),
            ],
        )
        self.producer.poll(0)

    def admit(self, *numbers):
        for key, value in self.deployment.build_patients(*numbers):
            self.producer.produce("patients", value, key, headers=[])
        self.flush()

    def flush(self):
        assert self.producer.flush(30) == 0

    def read(self, topic):
        return [item for item in read_to_end(self.kafka, topic) if isinstance(item, Record)]

    def read_events(self):
        decoder = Decoder("money_event", MoneyEvent, self.registry.find_schema)
        return [decoder.decode(record.value) for record in self.read("payments")]

    def count(self, topic):
        reader = TopicReader(self.kafka, topic)
        try:
            return sum(reader.end_offsets("read_committed").values())
        finally:
            reader.close()

    def await_count(self, topic, wanted):
        self.deployment.wait_until(lambda: self.count(topic) >= wanted, f"{topic} does not reach {wanted}")

    @property
    def state_folder(self):
        (folder,) = self.deployment.settings.worker.state.iterdir()
        return folder

    def start(self):
        self.deployment.start("worker")

    def kill(self):
        assert self.deployment.stop("worker", kill=True) == -9


def plan_traffic(seed, entities):
    """(entity, body) in order, and what must come of it: facts in canonical form, and a count of every fate."""
    dice = random.Random(seed)
    lanes, facts, fates = [], Counter(), Counter()
    for number in range(entities):
        entity, mrn = f"pi_{number}", f"M{number}"
        capture = build_body("payment_intent.succeeded", entity, 1000 + number, mrn=mrn)
        refund = build_body("refund.created", f"re_{number}", 7, parent=entity)
        lane = [capture, refund]
        facts["capture", entity, 1000 + number, mrn] += 1
        facts["refund", f"re_{number}", 7, mrn] += 1
        if number % 5 == 0:
            lane.reverse()
        if number % 3 == 0:
            lane.append(dice.choice(lane))
            fates["suppressed"] += 1
        if number % 10 == 1:
            lane.append(build_body("payment_intent.succeeded", entity, 5, mrn=mrn))
            lane.append(lane[-1])
            fates["in_review"] += 1
            fates["suppressed"] += 1
        if number % 10 == 2:
            lane.insert(0, build_body("payment_intent.succeeded", entity, None, mrn=mrn))
            fates["dead_lettered"] += 1
        if number % 10 == 3:
            lane.append(build_body("charge.succeeded", f"ch_{number}", 5, parent=entity))
            fates["ignored"] += 1
        lanes.append([(entity, body) for body in lane])
    fates["canonical"] = facts.total()
    sequence = []
    while lanes:
        lane = dice.choice(lanes[:40])
        sequence.append(lane.pop(0))
        if not lane:
            lanes.remove(lane)
    return sequence, facts, fates


def test_kills_and_lost_old_foreign_and_cut_state(deploy):
    deployment = deploy(worker__partitions="2", worker__batch_records="25")
    plant = Plant(deployment)
    entities = 700
    sequence, facts, fates = plan_traffic(11, entities)
    # Every seventh patient comes at the end.
    plant.admit(*(f"M{number}" for number in range(entities) if number % 7))
    deployment.start("project")
    deployment.await_ready("projector")
    plant.start()
    deployment.await_ready("worker")
    # The kills fall into the middle of the work: only this much is there before each of them.
    parts = [sequence[n * len(sequence) // 3 : (n + 1) * len(sequence) // 3] for n in range(3)]
    copies = deployment.folder / "old"
    for number, part in enumerate(parts):
        before = plant.count("payments")
        for entity, body in part:
            plant.send(entity, body)
        plant.flush()
        plant.await_count("payments", before + 60)
        plant.kill()
        stores = sorted(plant.state_folder.glob("stripe-*"))
        assert len(stores) == 2
        if number == 0:
            shutil.copytree(plant.state_folder, copies)
            for store in stores:
                shutil.rmtree(store)
        elif number == 1:
            for store in stores:
                shutil.rmtree(store)
                shutil.copytree(copies / store.name, store)
        else:
            # Each partition finds the other's store, and one of them is cut.
            stores[0].rename(stores[0].with_suffix(".moved"))
            stores[1].rename(stores[0])
            stores[0].with_suffix(".moved").rename(stores[1])
            os.truncate(stores[1] / "data.mdb", (stores[1] / "data.mdb").stat().st_size // 2)
        plant.start()
    plant.admit(*(f"M{number}" for number in range(0, entities, 7)))
    account = deployment.await_account(lambda account: not account.raw.pending and not account.raw.parts["waiting"])
    assert account.balanced, account.build_report()
    assert account.lost == 0
    assert account.raw.total == len(sequence)
    assert {fate: count for fate, count in account.raw.parts.items() if count} == dict(fates)
    events = plant.read_events()
    assert Counter((e.kind, e.object_id, e.money.minor, e.mrn.value) for e in events) == facts
    position = {(event.kind, event.root): number for number, event in enumerate(events)}
    for number in range(entities):
        root = f"north-card/pi_{number}"
        assert position["capture", root] < position["refund", root], f"{root}: the refund went first"
    assert deployment.stop("worker") == 0


def test_what_the_broker_refuses_is_a_dead_letter_and_the_rest_flows(deploy):
    deployment = deploy(worker__partitions="2")
    plant = Plant(deployment)
    resource = ConfigResource(
        ResourceType.TOPIC,
        "payments",
        incremental_configs=[
            ConfigEntry("max.message.bytes", "6000", incremental_operation=AlterConfigOpType.SET),
        ],
    )
    admin = AdminClient({"bootstrap.servers": plant.kafka.bootstrap})
    for future in admin.incremental_alter_configs([resource]).values():
        future.result()
    noise = random.Random(3).randbytes(9000).hex()
    for number in range(60):
        large = {"statement_descriptor_suffix": noise} if number in {7, 30} else {}
        body = build_body("payment_intent.succeeded", f"pi_{number}", 100, mrn=f"M{number}", **large)
        plant.send(f"pi_{number}", body)
    # Waits for its patient, and is refused only when it is released.
    plant.flush()
    plant.admit(*(f"M{number}" for number in range(60) if number != 30))
    deployment.start("project")
    deployment.await_ready("projector")
    plant.start()
    deployment.await_account(lambda account: account.raw.parts["waiting"] == 1 and not account.raw.pending)
    plant.admit("M30")
    account = deployment.await_account(lambda account: not account.raw.parts["waiting"] and not account.raw.pending)
    assert account.balanced
    assert account.raw.parts["canonical"] == 58
    assert account.reasons == {"dead_lettered:REFUSED_BY_BROKER": 2}
    stages = {dict(record.headers)["dead_letter_stage"] for record in plant.read("dlq")}
    assert stages == {b"normalise", b"release"}
    assert all(noise.encode() in record.value for record in plant.read("dlq"))
    # Redriven in a form that fits, both pass: a dead letter left no key behind.
    for number in (7, 30):
        plant.send(f"pi_{number}", build_body("payment_intent.succeeded", f"pi_{number}", 100, mrn=f"M{number}"))
    plant.flush()
    deployment.await_account(lambda account: account.raw.parts["canonical"] == 60)


def test_a_full_waiting_room_stops_intake_until_patients_arrive(deploy):
    deployment = deploy(worker__partitions="2", worker__batch_records="5", worker__waiting_limit="10")
    plant = Plant(deployment)
    for number in range(40):
        # One raw key, so one partition.
        body = build_body("payment_intent.succeeded", f"pi_{number}", 100, mrn=f"M{number}")
        plant.send("pi_crowd", body)
    plant.flush()
    deployment.start("project")
    deployment.await_ready("projector")
    plant.start()
    deployment.wait_until(lambda: "waiting room full" in deployment.read_reasons("worker"), "intake is not stopped")
    held = deployment.account()
    assert held.balanced
    assert 10 <= held.raw.parts["waiting"] < 20
    assert held.raw.pending == 40 - held.raw.parts["waiting"]
    plant.admit(*(f"M{number}" for number in range(40)))
    account = deployment.await_account(lambda account: not account.raw.parts["waiting"] and not account.raw.pending)
    assert account.balanced
    assert account.raw.parts["canonical"] == 40
    deployment.await_ready("worker")
    assert deployment.stop("worker") == 0


@pytest.fixture
def subject(deployment):
    """A subject of the deployment, taken out of the registry; put back afterwards."""
    registry = Registry(deployment.settings.registry)
    name = "reviews-value"
    for suffix in ("", "?permanent=true"):
        registry._call("DELETE", f"/subjects/{name}{suffix}")
    yield name
    for suffix in ("", "?permanent=true"):
        registry._call("DELETE", f"/subjects/{name}{suffix}")


def test_a_start_without_its_schema_is_refused(deployment, subject):
    process = deployment.start("worker")
    assert process.wait(60) == 78
    assert SchemaMissing.code in deployment.read_logs()
    assert subject in deployment.read_logs()


def test_a_start_with_a_schema_that_breaks_readers_is_refused(deployment, subject):
    registry = Registry(deployment.settings.registry)
    other = {"type": "record", "name": "Review", "namespace": "remitstream", "fields": [{"name": "id", "type": "long"}]}
    registry.register(subject, json.dumps(other))
    process = deployment.start("worker")
    assert process.wait(60) == 1
    assert SchemaBreak.code in deployment.read_logs()
    assert subject in deployment.read_logs()

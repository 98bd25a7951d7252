"""The conservation account sees what was lost and what was doubled: books written by hand, then damaged."""

import time

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from runtime.account import WORKER_GROUP, balance_books, name_delivery_group
from schemas.events import DeliveryOutcome, Disposition, MoneyEvent, Review, WaitingEntry
from schemas.money import Money
from schemas.wire import Encoder
from topics.cluster import describe_topic_ids
from topics.frontier import build_frontier
from topics.registry import Registry, find_ids

pytestmark = pytest.mark.integration

TARGET = "epic-north"


class Books:
    """Eight raw records of one partition, one of each fate, three of them payments; two targets are all done."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.kafka = deployment.settings.kafka
        self.ids = find_ids(Registry(deployment.settings.registry), deployment.settings.topics)
        self.topic_ids = describe_topic_ids(self.kafka, ["raw.stripe", "payments", "settlements"])
        self.producer = Producer({"bootstrap.servers": self.kafka.bootstrap})
        self.targets = [target.name for target in deployment.settings.targets]

    def hop(self, offset):
        return f"{self.topic_ids['raw.stripe']}:0:{offset}"

    def write(self, topic, key, value, headers=(), partition=0):
        self.producer.produce(topic, value, key.encode(), partition=partition, headers=list(headers))

    def encode(self, topic, schema, event):
        return Encoder(schema, self.ids[f"{topic}-value"]).encode(event)

    def flush(self):
        assert self.producer.flush(10) == 0

    def publish(self, offset):
        event = MoneyEvent(
            **dict.fromkeys(
                (
                    "transaction_key",
                    "tenant",
                    "facility",
                    "source",
                    "account",
                    "kind",
                    "status",
                    "object_id",
                    "root",
                    "source_event_id",
                    "mapping_version",
                    "origin",
                ),
                "x",
            ),
            event_id=f"e{offset}",
            money=Money(1, "USD", 2),
            occurred_at=1,
            received_at=1,
        )
        headers = [("hop", self.hop(offset).encode()), ("event_id", event.event_id.encode())]
        self.write("payments", "k", self.encode("payments", "money_event", event), headers)

    def dispose(self, offset, fate):
        disposition = Disposition(
            hop=self.hop(offset),
            fate=fate,
            reason="R",
            source="stripe",
            facility="f",
            event_type="t",
            linked="",
            decided_at=1,
        )
        self.write("dispositions", self.hop(offset), self.encode("dispositions", "disposition", disposition))

    def review(self, offset):
        review = Review(
            event_id=f"e{offset}",
            reason="R",
            hop=self.hop(offset),
            source="stripe",
            facility="f",
            transaction_key="k",
            root="r",
            event_type="t",
            created_at=1,
        )
        self.write("reviews", f"e{offset}|R", self.encode("reviews", "review", review))

    def hold(self, offset, *, ended=False):
        entry = WaitingEntry(
            hop=self.hop(offset),
            entity="e",
            reason="PATIENT_UNKNOWN",
            awaited="a",
            event_id="e",
            transaction_key="k",
            since=1,
            raw_key=b"",
            raw_value=b"",
            raw_headers=[],
        )
        value = None if ended else self.encode("waiting.stripe", "waiting_entry", entry)
        self.write("waiting.stripe", self.hop(offset), value)

    def bury(self, offset, stage="normalise"):
        headers = [
            ("hop", self.hop(offset).encode()),
            ("dead_letter_stage", stage.encode()),
            ("dead_letter_code", b"AMOUNT_MISSING"),
        ]
        self.write("dlq", "k", b"", headers)

    def tell(self, offset, target, outcome="posted"):
        told = DeliveryOutcome(
            **dict.fromkeys(("tenant", "facility", "root", "kind", "failure", "code", "control_id", "reference"), "x"),
            event_id=f"e{offset}",
            target=target,
            outcome=outcome,
            attempt=1,
            decided_at=1,
        )
        self.write("deliveries", f"e{offset}|{target}", self.encode("deliveries", "delivery_outcome", told))

    def move(self, group, topic, offset):
        moved = build_frontier(group, self.topic_ids[topic], 0, offset)
        self.producer.produce(moved.topic, moved.value, moved.key, partition=0)

    def fill(self):
        for number in range(8):
            self.write("raw.stripe", "k", b"%d" % number)
        for offset in range(3):
            self.publish(offset)
            for target in self.targets:
                self.tell(offset, target, "posted" if target == TARGET else "not_routed")
        self.dispose(3, "suppressed")
        self.dispose(4, "ignored")
        self.review(5)
        self.bury(6)
        self.hold(7)
        self.move(WORKER_GROUP, "raw.stripe", 8)
        for target in self.targets:
            self.move(name_delivery_group(target), "payments", 3)
        self.flush()

    def damage(self, topic, before):
        admin = AdminClient({"bootstrap.servers": self.kafka.bootstrap})
        for future in admin.delete_records([TopicPartition(topic, 0, before)]).values():
            future.result()

    def balance(self):
        self.flush()
        return self.deployment.account()


@pytest.fixture(scope="module")
def books(deploy_for_module):
    """One deployment for the file; each test has new topics."""
    return deploy_for_module(worker__partitions="1")


@pytest.fixture
def filled(books):
    books.provision()
    filled = Books(books)
    filled.fill()
    return filled


def test_whole_books_balance(filled):
    account = filled.balance()
    assert account.balanced
    assert (account.lost, account.pending) == (0, 0)
    assert account.raw.total == 8
    assert account.raw.parts == {
        "canonical": 3,
        "suppressed": 1,
        "ignored": 1,
        "patient_update": 0,
        "waiting": 1,
        "in_review": 1,
        "dead_lettered": 1,
    }
    assert account.targets[TARGET].parts["posted"] == 3
    assert account.targets["epic-harbor"].parts["not_routed"] == 3
    report = account.build_report()
    assert report["accepted"] == sum(report[fate] for fate in account.raw.parts) == 8
    assert report["lost"] == 0
    assert report["balanced"] is True

    # None of these changes that.
    filled.tell(2, "epic-harbor", "unknown")
    filled.tell(2, "epic-harbor", "posted")
    filled.bury(0, stage=TARGET)
    producer = Producer({"bootstrap.servers": filled.kafka.bootstrap, "transactional.id": "account-test"})
    producer.init_transactions(10)
    producer.begin_transaction()
    headers = [("hop", filled.hop(0).encode()), ("event_id", b"e0")]
    producer.produce("payments", b"", b"k", partition=0, headers=headers)
    assert producer.flush(10) == 0
    producer.abort_transaction(10)
    account = filled.balance()
    assert account.balanced
    assert account.raw.parts["dead_lettered"] == 1, "a target's dead letter is no fate of the raw record"
    assert account.targets["epic-harbor"].parts["posted"] == 1, "the last outcome is in force"
    assert account.targets["epic-harbor"].parts["unknown"] == 0


def test_every_deleted_record_is_a_loss_with_its_name(filled):
    """The first record each of payments, dispositions, dead letters and deliveries is gone."""
    filled.damage("payments", 1)
    account = filled.balance()
    assert (account.balanced, account.raw.lost, account.raw.missing) == (False, 1, [filled.hop(0)])
    assert account.raw.parts["canonical"] == 2
    for topic in ("dispositions", "dlq", "deliveries"):
        filled.damage(topic, 1 if topic != "deliveries" else 1 + len(filled.targets))
    account = filled.balance()
    assert account.raw.missing == [filled.hop(offset) for offset in (0, 3, 6)]
    # Of event 0 nothing is left to deliver; the delivery of event 1 to the first target is missing there alone.
    assert {name: b.lost for name, b in account.targets.items() if b.lost} == {filled.targets[0]: 1}
    assert f"{filled.targets[0]}:e1" in account.build_report()["missing"]
    assert account.lost == 4


def test_everything_doubled_is_told(filled):
    filled.dispose(0, "suppressed")
    account = filled.balance()
    assert (account.raw.doubled, account.balanced, account.lost) == (1, False, 0)
    filled.publish(1)
    account = filled.balance()
    assert account.raw.doubled == 3, "as a second fate of its record, and as a second event of its id"
    filled.tell(1, TARGET)
    account = filled.balance()
    assert account.targets[TARGET].doubled == 1
    assert account.lost == 0


def test_the_same_event_of_two_records_is_told(filled):
    filled.write("raw.stripe", "k", b"again")
    filled.write("payments", "k", b"", [("hop", filled.hop(8).encode()), ("event_id", b"e1")])
    account = filled.balance()
    assert (account.raw.doubled, account.balanced) == (1, False)


def test_a_waiting_entry_that_ended_without_a_fate_is_a_loss(filled):
    filled.hold(7, ended=True)
    account = filled.balance()
    assert (account.raw.lost, account.raw.missing) == (1, [filled.hop(7)])
    filled.publish(7)
    account = filled.balance()
    assert (account.raw.lost, account.raw.parts["canonical"]) == (0, 4)
    assert account.pending == len(filled.targets), "it lies beyond the targets' frontiers"
    assert account.balanced


def test_what_no_process_has_reached_is_pending_not_lost(filled):
    now = time.time_ns() // 1_000_000
    for minutes in (20, 30):
        filled.producer.produce("raw.stripe", b"new", b"k", partition=0, timestamp=now + minutes * 60_000)
    account = filled.balance()
    assert (account.raw.pending, account.lost, account.balanced) == (2, 0, True)
    filled.move(WORKER_GROUP, "raw.stripe", 9)
    account = filled.balance()
    assert (account.raw.pending, account.raw.lost, account.raw.missing) == (1, 1, [filled.hop(8)])
    since = balance_books(filled.deployment.settings, since_ms=now + 25 * 60_000)
    assert (since.raw.total, since.raw.pending, since.lost) == (1, 1, 0)

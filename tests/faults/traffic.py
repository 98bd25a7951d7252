"""A seeded stream of raw records without end, and what each of them means.

The meaning is written down when a record is made, before anything is sent; ``oracle`` compares it with what came out.
"""

from __future__ import annotations

import random
import threading
import time
from dataclasses import dataclass

from confluent_kafka import Producer

from sandbox import stripe_objects
from sandbox.adt import Envelope, Patient, write_admission

RAW_MONEY, RAW_PATIENTS = "raw.stripe", "raw.hl7"
FACILITIES = ("north", "harbor")
OPEN_LANES = 60
"""Entities under way at once: their records come mixed."""
POOL = 40
"""Patients of each facility that are admitted before the first payment."""
CREATED = 1_767_225_600


@dataclass(frozen=True, slots=True)
class Fact:
    """A money fact. ``stuck``: it can never be decided (its patient or its parent never comes)."""

    topic: str
    account: str
    kind: str
    object_id: str
    root: str
    minor: int
    mrn: str | None
    is_root: bool
    stuck: bool = False

    @property
    def name(self):
        return self.account, self.kind, self.object_id

    @property
    def content(self):
        return (*self.name, self.root, self.minor)


@dataclass(frozen=True, slots=True)
class Item:
    """One raw record. ``meaning`` is a fact, or the fate it has by itself."""

    number: int
    topic: str
    key: str
    body: bytes
    account: str
    facility: str
    meaning: Fact | str


class Stream:
    """Records in the order they are sent; the same seed gives the same records."""

    def __init__(self, seed, lanes=OPEN_LANES):
        self.name = f"s{seed}"
        self._open_lanes = lanes
        self.repairs = {}
        """Number of a dead letter -> the record as a person would correct it."""
        self._dice = random.Random(f"traffic {seed}")
        self._numbers = 0
        self._entities = 0
        self._lanes = []
        self.admissions = [self._admit(facility, f"P{n}") for facility in FACILITIES for n in range(POOL)]

    def take(self):
        """The next record."""
        while len(self._lanes) < self._open_lanes:
            self._lanes.append(self._open_lane())
        place = self._dice.randrange(len(self._lanes))
        lane = self._lanes[place]
        item = lane.pop(0)
        if not lane:
            del self._lanes[place]
        return item

    def drain(self):
        """What is left of the entities that were begun."""
        while self._lanes:
            yield from self._lanes.pop(0)

    def _open_lane(self):
        self._entities += 1
        facility = self._dice.choice(FACILITIES)
        if self._dice.random() < 0.06:
            return self.build_payout(facility)
        if self._dice.random() < 0.04:
            return self._open_broken(facility)
        return self._open_payment(facility)

    def _open_payment(self, facility):
        dice = self._dice
        account, intent = f"{facility}-card", f"pi_{self.name}{self._entities}"
        payment = self._invent(intent, f"P{dice.randrange(POOL)}")
        patient = dice.choices(("known", "late", "never", "orphan"), (80, 15, 2, 3))[0]
        if patient != "known":
            payment.metadata["mrn"] = f"N{self.name}{self._entities}"
        mrn, stuck = payment.metadata["mrn"], patient in ("never", "orphan")

        def build(kind, event_type, subject, object_id, minor, *, is_root=False):
            fact = Fact(
                "payments", account, kind, object_id, f"{account}/{intent}", minor, mrn, is_root=is_root, stuck=stuck
            )
            return self._wrap(facility, intent, event_type, subject, fact)

        capture = self._build_intent(payment)
        lane = []
        if patient != "orphan":
            lane.append(build("capture", "payment_intent.succeeded", capture, intent, payment.amount, is_root=True))
        for number in range(dice.choices((0, 1, 2), (30, 50, 20))[0] or patient == "orphan"):
            refund, minor = f"re_{intent[3:]}x{number}", 10 + number
            subject = stripe_objects.build_refund(payment, refund, minor, CREATED)
            lane.append(build("refund", "refund.created", subject, refund, minor))
        if dice.random() < 0.1:
            dispute = f"dp_{intent[3:]}"
            for kind, end, withdrawn in (
                ("dispute_opened", "created", False),
                ("chargeback", "funds_withdrawn", True),
            ):
                subject = stripe_objects.build_dispute(payment, dispute, CREATED, withdrawn=withdrawn)
                lane.append(build(kind, f"charge.dispute.{end}", subject, dispute, payment.amount))
        if dice.random() < 0.2 and len(lane) > 1:
            lane.insert(1 + dice.randrange(len(lane) - 1), lane.pop(0))  # children before their parent
        for _ in range(dice.choices((0, 1, 3), (70, 22, 8))[0]):
            lane.append(dice.choice(lane))  # the same delivery again
        if dice.random() < 0.05 and patient != "orphan":
            other = capture | {"amount": 5, "amount_received": 5}
            copy = build("capture", "payment_intent.succeeded", other, intent, 5, is_root=True)
            lane += [copy, copy] if dice.random() < 0.5 else [copy]
        if dice.random() < 0.05:
            lane.insert(dice.randrange(len(lane) + 1), self._break(facility, intent, capture))
        if dice.random() < 0.05:
            charge = stripe_objects.build_charge(payment) | {"payment_intent": intent}
            lane.append(self._wrap(facility, intent, "charge.succeeded", charge, "ignored"))
        if patient == "late":
            lane.insert(dice.randrange(len(lane) + 1), self._admit(facility, mrn))
        return lane

    def build_payout(self, facility, **more):
        """A payout, sometimes twice. It needs no patient. ``more`` are members of its object."""
        self._entities += 1
        payout = f"po_{self.name}{self._entities}"
        account, minor = f"{facility}-card", self._dice.randrange(100, 90_000)
        subject = stripe_objects.build_payout(payout, minor, "usd", CREATED) | more
        fact = Fact("settlements", account, "payout", payout, f"{account}/{payout}", minor, None, is_root=True)
        item = self._wrap(facility, payout, "payout.paid", subject, fact)
        return [item] * self._dice.choice((1, 1, 2))

    def _open_broken(self, facility):
        """A capture that cannot be mapped, with nothing else of its entity; a person may correct and redrive it."""
        intent, mrn = f"pi_{self.name}{self._entities}", f"P{self._dice.randrange(POOL)}"
        payment = self._invent(intent, mrn)
        subject = self._build_intent(payment)
        broken = self._break(facility, intent, subject)
        account = f"{facility}-card"
        fact = Fact("payments", account, "capture", intent, f"{account}/{intent}", payment.amount, mrn, is_root=True)
        self.repairs[broken.number] = self._wrap(facility, intent, "payment_intent.succeeded", subject, fact)
        return [broken]

    def _invent(self, intent, mrn):
        return stripe_objects.Payment(
            intent_id=intent,
            charge_id=f"ch_{intent[3:]}",
            amount=self._dice.randrange(100, 90_000),
            currency="usd",
            created=CREATED,
            payer="Orrin Quollmarrow",
            description=None,
            metadata={"mrn": mrn},
            postal_code="60000",
            last4="4242",
        )

    def _build_intent(self, payment):
        return stripe_objects.build_payment_intent(payment, status="succeeded", api_version=stripe_objects.NEW_API)

    def _break(self, facility, intent, subject):
        if self._dice.random() < 0.3:
            return self._add(RAW_MONEY, f"{facility}-card/{intent}", b'{"id": "evt', facility, "dead_lettered")
        left = {name: part for name, part in subject.items() if not name.startswith("amount")}
        return self._wrap(facility, intent, "payment_intent.succeeded", left, "dead_lettered")

    def _wrap(self, facility, entity, event_type, subject, meaning):
        event = stripe_objects.build_event(
            f"evt_{self.name}{self._numbers}", event_type, CREATED, subject, api_version=stripe_objects.NEW_API
        )
        return self._add(RAW_MONEY, f"{facility}-card/{entity}", stripe_objects.write_event(event), facility, meaning)

    def _admit(self, facility, mrn):
        envelope = Envelope(
            application="EPICADT",
            facility=f"LS{facility.upper()}",
            control_id=f"{self.name}{self._numbers}",
            time=CREATED,
            authority=facility.upper(),
        )
        patient = Patient(facility=facility, mrn=mrn, given="Ada", family="Quollmarrow", account_number=f"A{mrn}")
        body = write_admission(envelope, "A04", patient)
        return self._add(RAW_PATIENTS, f"{facility}-adt", body, facility, "patient_update")

    def _add(self, topic, key, body, facility, meaning):
        self._numbers += 1
        account = f"{facility}-{'adt' if topic == RAW_PATIENTS else 'card'}"
        return Item(self._numbers, topic, key, body, account, facility, meaning)


class Sender:
    """Writes raw records as receiver and listener would, at a steady rate; keeps what each one means."""

    def __init__(self, bootstrap, stream, rate):
        self.stream = stream
        self.rate = rate
        self.meanings = {}
        self.sent = 0
        self.failure = None
        self._over = threading.Event()
        self._lock = threading.Lock()
        self._thread = threading.Thread(target=self._run, name="sender", daemon=True)
        self._producer = Producer(
            {
                "bootstrap.servers": bootstrap,
                "enable.idempotence": True,
                "partitioner": "murmur2_random",
                "linger.ms": 5,
                "compression.type": "lz4",
                "message.timeout.ms": 0,  # a broker that restarts is waited for
                "log_level": 2,
                "error_cb": lambda _error: None,
            }
        )

    def start(self):
        """Begin the steady stream."""
        self._thread.start()

    def finish(self):
        """End the stream with what is left of its entities, and wait until all of it is stored."""
        self._over.set()
        if self._thread.is_alive():
            self._thread.join()
        for item in self.stream.drain():
            self.send(item)
        self.flush()
        if self.failure is not None:
            raise AssertionError(f"a record was not stored: {self.failure}")

    def burst(self, count):
        """As many records at once."""
        for _ in range(count):
            with self._lock:
                item = self.stream.take()
            self.send(item)

    def send(self, item):
        """Send one record."""
        self.meanings[item.number] = item.meaning
        headers = [
            ("ingest_time", str(time.time_ns() // 1_000_000).encode()),
            ("source", b"hl7" if item.topic == RAW_PATIENTS else b"stripe"),
            ("account", item.account.encode()),
            ("facility", item.facility.encode()),
            ("content-type", b"application/json"),
            ("delivery_id", str(item.number).encode()),
        ]
        self.publish(item.topic, item.key.encode(), item.body, headers)

    def publish(self, topic, key, body, headers):
        """Send bytes and headers as they are."""
        while True:
            try:
                self._producer.produce(topic, body, key, headers=headers, on_delivery=self._note)
            except BufferError:
                self._producer.poll(0.1)
                continue
            break
        self.sent += 1
        self._producer.poll(0)

    def flush(self):
        """Wait until everything is stored."""
        until = time.monotonic() + 120
        while self._producer.flush(5):
            if time.monotonic() > until:
                raise AssertionError("Kafka does not take the raw records")

    def _note(self, error, _message):
        if error is not None:
            self.failure = error.name()

    def _run(self):
        due, size = time.monotonic(), max(1, self.rate // 20)
        while not self._over.is_set():
            self.burst(size)
            due = max(due + size / self.rate, time.monotonic() - 0.5)
            self._over.wait(max(0.0, due - time.monotonic()))

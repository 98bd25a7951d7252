"""Workers of a stream over the broker in memory, taken step by step, and a judge that knows the protocol's promises."""

from __future__ import annotations

import asyncio
import io
import json
from collections import Counter, defaultdict
from pathlib import Path

import fastavro

from identity.resolution import Known, Unknown
from schemas.events import Reference, WaitingEntry
from schemas.keys import HmacKey
from schemas.tenancy import Account, Authority, Facility, Tenancy
from schemas.wire import Decoder, Encoder, load_schema
from streams.decide import MoneyDecider
from streams.decision import Codecs
from streams.feeder import Feeder
from streams.normalise import Normaliser
from telemetry.metrics import Metrics
from tests.models.kafka import Death, Kafka
from topics.cluster import KafkaSettings

RAW = "raw.stripe"
SCHEMAS = ("money_event", "patient_record", "disposition", "review", "waiting_entry")
KEY = HmacKey(b"model test key 1")
TENANCY = Tenancy(
    tenant="riverside",
    facilities=(
        Facility(
            id="north", time_zone="America/Chicago", default_authority="NORTH", authorities=(Authority(name="NORTH"),)
        ),
    ),
    accounts=(Account(name="cards", source="stripe", facility="north", secrets=("not-used-here",)),),
)
NORMALISER = Normaliser.load("stripe", TENANCY)
FOLDER = Path(__file__).parents[2] / "schemas"


def _encoder(name):
    return Encoder(name, SCHEMAS.index(name) + 1)


CODECS = Codecs(
    money={"payments": _encoder("money_event"), "settlements": _encoder("money_event")},
    patient=_encoder("patient_record"),
    disposition=_encoder("disposition"),
    review=_encoder("review"),
    waiting=_encoder("waiting_entry"),
    waiting_reader=Decoder("waiting_entry", WaitingEntry, lambda number: load_schema(SCHEMAS[number - 1])),
)


def build_body(kind, item):
    return json.dumps({"id": "evt", "type": kind, "created": 1_767_225_600, "data": {"object": item}}).encode()


def capture(name, amount=100, mrn="M-known"):
    item = {"id": name, "amount": amount, "amount_received": amount, "currency": "usd", "status": "succeeded"}
    return build_body("payment_intent.succeeded", item | {"metadata": {"mrn": mrn}})


def refund(name, parent):
    item = {"id": name, "amount": 5, "currency": "usd", "status": "succeeded", "payment_intent": parent}
    return build_body("refund.created", item | {"metadata": {}})


K1, K2, K3 = capture("pi_1"), capture("pi_2", mrn="M-late"), refund("re_2", "pi_2")
"""A fact of a known patient, one of a patient who comes later, and a later one of the same entity."""
POISON = capture("pi_1")
"""A copy of the first that the broker does not take; see ``Story.refuse``."""


class Patients:
    """Who is known; shared by all workers."""

    def __init__(self):
        self._found = {}
        self.admit("M-known")

    def admit(self, mrn):
        reference = Reference("NORTH", "MR", mrn)
        self._found[KEY.hash_identifier(reference)] = Known(reference)

    async def resolve_hashes(self, hashes):
        return [self._found.get(name, Unknown(name)) for name in hashes]


class Clock:
    """Every look at the steady time is a second later, so that the waiting room is looked at in every batch."""

    def __init__(self):
        self._steady = 1000.0

    def now_ms(self):
        return 1_770_000_000_000

    def monotonic(self):
        self._steady += 1
        return self._steady


class Worker:
    """A worker process: the shipped feeder and decider; its agent is written here, step by step."""

    def __init__(self, story, name, size):
        self.story, self.name = story, name
        self.decider = MoneyDecider(
            NORMALISER,
            identities=story.patients,
            hmac_key=KEY,
            codecs=CODECS,
            parent_wait_seconds=3600,
            clock=Clock(),
        )
        self.feeder = Feeder(
            KafkaSettings(),
            {"stripe": self.decider},
            instance=name,
            slot=0,
            state_folder=story.folder,
            batch_size=size,
            metrics=Metrics(strict=True),
        )
        self.is_dead = False

    @property
    def txid(self):
        return f"remitstream.worker.{self.name}.0"

    async def start(self):
        await self.feeder.start()
        return self

    async def fetch(self):
        """The next batch that holds records or can release some."""
        for _ in range(400):
            batch = await self.feeder.next_batch()
            if batch is not None:
                return batch
        raise AssertionError("no batch comes")

    async def look(self):
        """Poll until the assignment is known and loaded; gives no batch out."""
        for _ in range(400):
            await self.feeder.group.poll(1, 0)
            await self.feeder.group.rewind()
            if self.feeder.group.is_ready() or self.feeder.group.failure:
                return
            await asyncio.sleep(0.005)

    async def decide(self, batch):
        return await self.decider.decide(batch.rooms, batch.records, batch.refused)

    async def commit(self, batch, decision):
        """Whether it stands. Dies where the story says so."""
        try:
            return await batch.commit(decision)
        except Death:
            self.die()
            return False

    async def step(self):
        """One batch from poll to commit; False when there is nothing to do."""
        batch = await self.feeder.next_batch()
        if batch is None:
            return False
        before = self.story.before_commit
        decision = await self.decide(batch)
        await before(self, batch, decision)
        done = await self.commit(batch, decision)
        return done and bool(batch.records or decision.list_outputs())

    async def run(self, until=lambda: False):
        """Batches until nothing happens any more."""
        idle = 0
        while idle < 12 and not self.is_dead and not until():
            idle = 0 if await self.step() else idle + 1

    def die(self):
        """``kill -9``: nothing is said to anybody; files stay."""
        self.is_dead = True
        group = self.feeder.group
        group._transactor._producer.is_dead = True
        group._consumer.close()
        for room in self.feeder.rooms.values():
            room.state.close()
        self.feeder.rooms.clear()
        self.feeder.suspects.close()

    async def close(self):
        if not self.is_dead:
            await self.feeder.close()
            return
        group = self.feeder.group
        group._closed = True
        group._thread.shutdown(wait=False)
        group._loaders.shutdown(wait=False, cancel_futures=True)


class Story:
    """Raw records, workers, and what the broker holds in the end."""

    def __init__(self, monkeypatch, folder, *raw):
        self.kafka = Kafka()
        self.kafka.install(monkeypatch)
        self.patch = monkeypatch.setattr
        self.folder = folder
        self.patients = Patients()
        self.workers = []
        self.refused = set()
        self.kafka.refuses = self._refuses
        monkeypatch.setattr("streams.feeder.IDLE_SECONDS", 0.01)
        monkeypatch.setattr("streams.feeder.random.uniform", lambda *_: 0.0)
        for body in raw:
            self.send(body)

    async def before_commit(self, worker, batch, decision):
        """A story may put something between deciding and committing."""

    def send(self, body):
        """A raw record; a replay is the same body once more."""
        self.kafka.append(
            RAW,
            b"cards/pi",
            body,
            [
                ("source", b"stripe"),
                ("account", b"cards"),
                ("facility", b"north"),
                ("ingest_time", b"1770000000000"),
            ],
        )

    def refuse(self, hop):
        """The broker does not take the canonical event of this raw offset."""
        self.refused.add(f"id-{RAW}:0:{hop}")

    def _refuses(self, topic, key, value, headers):
        return topic == "payments" and dict(headers)["hop"].decode() in self.refused

    async def start(self, name, size=2):
        worker = Worker(self, name, size)
        self.workers.append(worker)
        return await worker.start()

    def give_to(self, name):
        """A rebalance."""
        self.kafka.rebalance("remitstream.worker", f".{name}.")

    async def close(self):
        for worker in self.workers:
            await worker.close()

    # The judge.

    def list_fates(self):
        """Raw offset -> fates."""
        found = defaultdict(list)
        for _, entry in self.kafka.read("payments"):
            found[_find_hop(entry)].append("canonical")
        for _, entry in self.kafka.read("dlq"):
            found[_find_hop(entry)].append("dead_lettered")
        for _, entry in self.kafka.read("reviews"):
            found[_find_hop(entry)].append("in_review")
        for _, entry in self.kafka.read("dispositions"):
            found[int(entry.key.decode().rsplit(":", 1)[1])].append(_decode("disposition", entry.value)["fate"])
        for hop in self.list_waiting():
            found[hop].append("waiting")
        return {hop: found.get(hop, []) for hop, _ in self.kafka.read(RAW)}

    def list_waiting(self):
        last = {entry.key: entry.value for _, entry in self.kafka.read("waiting.stripe")}
        return [int(key.decode().rsplit(":", 1)[1]) for key, value in last.items() if value is not None]

    def list_published(self):
        return [_decode("money_event", entry.value)["object_id"] for _, entry in self.kafka.read("payments")]

    def judge(self):
        """Every promise that does not hold at the end."""
        wrong = []
        for hop, fates in self.list_fates().items():
            if len(fates) != 1 or fates == ["waiting"]:
                wrong.append(f"hop {hop} has {fates or 'no fate'}")
        published = self.list_published()
        wrong += [f"{name} {count} times in canonical" for name, count in Counter(published).items() if count > 1]
        if "re_2" in published and "pi_2" not in published[: published.index("re_2")]:
            wrong.append("re_2 before pi_2")
        kept = {*published, *(_decode("review", e.value)["root"] for _, e in self.kafka.read("reviews"))}
        for _, entry in self.kafka.read(RAW):
            name = json.loads(entry.value)["data"]["object"]["id"]
            if not any(name in place for place in kept):
                wrong.append(f"{name} is nowhere")
        reviews = Counter(entry.key for _, entry in self.kafka.read("reviews"))
        wrong += [f"asked {count} times about one copy" for count in reviews.values() if count > 1]
        return wrong


def _find_hop(entry):
    return int(dict(entry.headers)["hop"].decode().rsplit(":", 1)[1])


def _decode(name, value):
    schema = fastavro.parse_schema(json.loads((FOLDER / f"{name}.avsc").read_text("utf-8")))
    return fastavro.schemaless_reader(io.BytesIO(value[5:]), schema)

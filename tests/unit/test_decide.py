"""The decision on every raw record: one fate each, each money fact once, refunds after their capture.

``World`` is a partition without a broker: the real decider, the real local store, and a list in place of each topic.
"""

import asyncio
import gc
import json
from collections import Counter
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.resolution import Ambiguous, Known, Unknown
from schemas.events import DeliveryOutcome, Disposition, MoneyEvent, Reference, Review, WaitingEntry
from schemas.keys import HmacKey
from schemas.tenancy import Account, Authority, Facility, Tenancy
from schemas.wire import Decoder, Encoder, load_schema
from streams import decide
from streams.decide import MoneyDecider
from streams.decision import Codecs, Decision, Room
from streams.normalise import Normaliser
from streams.state import LINEAGE, SEEN, WAITING, PartitionState, SeenEntry, StateUnusable
from topics.headers import RawRecord, find_header
from topics.transaction import Output

SCHEMAS = ("money_event", "patient_record", "disposition", "review", "waiting_entry", "delivery_outcome")
TYPES = {
    "money_event": MoneyEvent,
    "disposition": Disposition,
    "review": Review,
    "waiting_entry": WaitingEntry,
    "delivery_outcome": DeliveryOutcome,
}
KEY = HmacKey(b"unit test key 16")
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
PARENT_WAIT = 3600


def find_schema(number):
    return load_schema(SCHEMAS[number - 1])


def encoder(name):
    return Encoder(name, SCHEMAS.index(name) + 1)


CODECS = Codecs(
    money={"payments": encoder("money_event"), "settlements": encoder("money_event")},
    patient=encoder("patient_record"),
    disposition=encoder("disposition"),
    review=encoder("review"),
    waiting=encoder("waiting_entry"),
    waiting_reader=Decoder("waiting_entry", WaitingEntry, find_schema),
)
DECODERS = {name: Decoder(name, kind, find_schema) for name, kind in TYPES.items()}


def capture(entity, amount=1000, *, mrn="self", event="evt"):
    metadata = {} if mrn is None else {"mrn": f"M-{entity}" if mrn == "self" else mrn}
    money = {} if amount is None else {"amount_received": amount}
    return build_body(
        "payment_intent.succeeded",
        {"id": f"pi_{entity}", **money, "currency": "usd", "status": "succeeded", "metadata": metadata},
        event,
    )


def refund(entity, number=1, amount=100, *, mrn=None, event="evt"):
    return build_body(
        "refund.created",
        {
            "id": f"re_{entity}_{number}",
            **({} if amount is None else {"amount": amount}),
            "currency": "usd",
            "status": "succeeded",
            "payment_intent": f"pi_{entity}",
            "metadata": {} if mrn is None else {"mrn": mrn},
        },
        event,
    )


def payout(name="po_1"):
    return build_body("payout.paid", {"id": name, "amount": 5, "currency": "usd", "status": "paid", "arrival_date": 1})


def build_body(event_type, item, event="evt"):
    return json.dumps({"id": event, "type": event_type, "created": 1_767_225_600, "data": {"object": item}}).encode()


class Identities:
    """Patients by name; the real one asks Redis."""

    def __init__(self):
        self.found = {}
        self.asked = []

    def learn(self, mrn, resolution=None):
        reference = Reference("NORTH", "MR", mrn)
        self.found[KEY.hash_identifier(reference)] = resolution or Known(reference)

    async def resolve_hashes(self, hashes):
        self.asked.append(list(hashes))
        return [self.found.get(name, Unknown(name)) for name in hashes]


class World:
    """One partition of `raw.stripe` and everything written from it."""

    def __init__(self, folder):
        self.identities = Identities()
        self.clock = SimpleNamespace(ms=1_770_000_000_000, steady=1000.0)
        self.clock.now_ms = lambda: self.clock.ms
        self.clock.monotonic = lambda: self.clock.steady
        self.topics = {}
        self.offset = 0
        self.state = PartitionState(folder, "stripe", 0, (SEEN, WAITING, LINEAGE))
        self.restart()

    def restart(self):
        """A new process over the same store."""
        self.state._open()
        self.room = Room(self.state)
        self.decider = MoneyDecider(
            NORMALISER,
            identities=self.identities,
            hmac_key=KEY,
            codecs=CODECS,
            parent_wait_seconds=PARENT_WAIT,
            clock=self.clock,
        )
        self.decider.rebuild(self.room)

    def take(self, *bodies):
        """Raw records with the next offsets."""
        records = []
        for body in bodies:
            records.append(
                RawRecord(
                    hop=f"T:0:{self.offset}",
                    partition=0,
                    offset=self.offset,
                    key=b"k",
                    value=body,
                    headers=[
                        ("source", b"stripe"),
                        ("account", b"cards"),
                        ("facility", b"north"),
                        ("ingest_time", b"1770000000000"),
                    ],
                    timestamp=1,
                )
            )
            self.offset += 1
        return records

    async def decide(self, records, refused=()):
        self.clock.steady += 1
        return await self.decider.decide({0: self.room}, records, frozenset(refused))

    def commit(self, decision):
        """What the transaction and the group consumer do with a decision."""
        for output in decision.list_outputs():
            self.topics.setdefault(output.topic, []).append(output)
        for changelog in decision.list_changelogs():
            log = self.topics.setdefault(changelog.topic, [])
            log += [Output(changelog.topic, key, value) for key, (value, _) in changelog.entries.items()]
            changelog.offset = len(log) - 1
        decision.apply()

    async def run(self, *bodies, refused=()):
        """One batch, committed; its decision."""
        decision = await self.decide(self.take(*bodies), refused)
        self.commit(decision)
        return decision

    def read(self, topic, schema):
        return [DECODERS[schema].decode(output.value) for output in self.topics.get(topic, [])]

    @property
    def payments(self):
        return [(event.kind, event.object_id, event.money.minor) for event in self.read("payments", "money_event")]

    @property
    def dispositions(self):
        return [(item.hop, item.reason, item.linked) for item in self.read("dispositions", "disposition")]

    @property
    def reviews(self):
        return [(item.hop, item.reason) for item in self.read("reviews", "review")]

    @property
    def dead_letters(self):
        return [
            (find_header(o.headers, "hop"), find_header(o.headers, "dead_letter_code"))
            for o in self.topics.get("dlq", [])
        ]

    @property
    def waiting(self):
        latest = {output.key: output.value for output in self.topics.get("waiting.stripe", [])}
        return {
            key.decode(): DECODERS["waiting_entry"].decode(value).reason
            for key, value in latest.items()
            if value is not None
        }

    def list_fates(self):
        """(hop, fate) of everything in the topics."""
        fates = [(find_header(o.headers, "hop"), "canonical") for o in self.topics.get("payments", [])]
        fates += [(find_header(o.headers, "hop"), "canonical") for o in self.topics.get("settlements", [])]
        fates += [(item.hop, item.fate) for item in self.read("dispositions", "disposition")]
        fates += [(hop, "in_review") for hop, _ in self.reviews]
        fates += [(hop, "dead_lettered") for hop, _ in self.dead_letters]
        return fates + [(hop, "waiting") for hop in self.waiting]


@pytest.fixture
def world(tmp_path):
    world = World(tmp_path)
    yield world
    world.state.close()


# Duplicates and conflicting copies.


async def test_a_copy_in_a_later_batch_is_suppressed_and_names_the_deciding_hop(world):
    world.identities.learn("M-a")
    await world.run(capture("a", event="evt_1"))
    await world.run(capture("a", event="evt_2"))
    assert world.payments == [("capture", "pi_a", 1000)]
    assert world.dispositions == [("T:0:1", "DUPLICATE", "T:0:0")]


async def test_a_copy_in_the_same_batch_is_suppressed(world):
    world.identities.learn("M-a")
    await world.run(capture("a"), capture("a"), capture("a"))
    assert len(world.payments) == 1
    assert world.dispositions == [("T:0:1", "DUPLICATE", "T:0:0"), ("T:0:2", "DUPLICATE", "T:0:0")]


async def test_copies_that_contradict_go_to_review_once_per_content(world):
    world.identities.learn("M-a")
    await world.run(capture("a", 1000))
    await world.run(capture("a", 2000), capture("a", 1000))
    await world.run(capture("a", 2000), capture("a", 3000), capture("a", 3000))
    assert world.payments == [("capture", "pi_a", 1000)]
    assert world.reviews == [("T:0:1", "CONFLICTING_COPY"), ("T:0:4", "CONFLICTING_COPY")]
    assert len({output.key for output in world.topics["reviews"]}) == 2, "one review must not replace the other"
    assert world.dispositions == [
        ("T:0:2", "DUPLICATE", "T:0:0"),
        ("T:0:3", "DUPLICATE", "T:0:1"),
        ("T:0:5", "DUPLICATE", "T:0:4"),
    ]


async def test_the_same_event_always_has_the_same_id_and_bytes(world, tmp_path):
    other = World(tmp_path / "other")
    for one in (world, other):
        one.identities.learn("M-a")
        await one.run(capture("a"))
    assert [o.value for o in world.topics["payments"]] == [o.value for o in other.topics["payments"]]
    assert [o.key for o in world.topics["payments"]] == [b"cards/pi_a"]
    other.state.close()


async def test_nothing_changes_before_the_decision_is_applied(world):
    world.identities.learn("M-a")
    records = world.take(capture("a"), refund("a"), refund("b"))
    first = await world.decide(records)
    assert list(world.state.scan(SEEN)) == []
    assert list(world.state.scan(WAITING)) == []
    assert len(world.room.waiting) == 0
    again = await world.decide(records)
    assert [(o.topic, o.key, o.value) for o in again.list_outputs()] == [
        (o.topic, o.key, o.value) for o in first.list_outputs()
    ]
    world.commit(again)
    assert len(list(world.state.scan(SEEN))) == 3
    assert world.waiting == {"T:0:2": "PARENT_UNKNOWN"}
    assert len(world.room.waiting) == 1


# Dead letters.


async def test_a_dead_letter_leaves_no_key_so_that_a_good_copy_passes(world):
    world.identities.learn("M-a")
    await world.run(capture("a", None))
    assert world.dead_letters == [("T:0:0", "AMOUNT_MISSING")]
    assert "seen.stripe" not in world.topics
    await world.run(capture("a", 1000))
    assert world.payments == [("capture", "pi_a", 1000)]


async def test_a_dead_letter_keeps_bytes_and_headers(world):
    await world.run(b"{not json")
    letter = world.topics["dlq"][0]
    assert letter.value == b"{not json"
    assert letter.key == b"k"
    assert ("account", b"cards") in letter.headers
    assert find_header(letter.headers, "dead_letter_stage") == "normalise"
    assert find_header(letter.headers, "origin") == "T:0:0"


async def test_a_dead_letter_does_not_keep_its_batch_alive(world):
    """The collector comes rarely: what an error's traceback holds on to would pile up, bodies of patients included."""
    world.identities.learn("M-a")
    gc.collect()
    gc.disable()
    try:
        for number in range(3):
            await world.run(capture(f"a{number}"), b"{not json", capture("b", None))
        left = sum(isinstance(one, Decision) for one in gc.get_objects())
    finally:
        gc.enable()
    assert len(world.dead_letters) == 6
    assert left == 0


async def test_a_record_the_broker_refuses_is_a_dead_letter_and_a_copy_of_it_passes(world):
    world.identities.learn("M-a")
    records = world.take(capture("a"), capture("a"))
    world.commit(await world.decide(records, refused=["T:0:0"]))
    assert world.dead_letters == [("T:0:0", "REFUSED_BY_BROKER")]
    assert world.payments == [("capture", "pi_a", 1000)]
    assert world.dispositions == []


async def test_an_event_that_cannot_be_encoded_is_a_dead_letter_not_a_crash(world):
    world.identities.learn("M-a")
    records = world.take(capture("a"), capture("b"))
    # Far beyond 64 bits: every other part of the record is good.
    records[0].headers[-1] = ("ingest_time", b"9" * 40)
    world.commit(await world.decide(records))
    assert [hop for hop, _ in world.dead_letters] == ["T:0:0"]
    assert find_header(world.topics["dlq"][0].headers, "dead_letter_kind") == "INTERNAL"
    assert world.waiting == {"T:0:1": "PATIENT_UNKNOWN"}
    await world.run(capture("a"))
    assert len(world.payments) == 1


# The waiting room.


async def test_an_unknown_patient_holds_the_event_and_all_that_follow_it(world):
    await world.run(capture("a"))
    await world.run(refund("a", 1), refund("a", 2))
    assert world.waiting == {"T:0:0": "PATIENT_UNKNOWN", "T:0:1": "BEHIND_ENTITY", "T:0:2": "BEHIND_ENTITY"}
    await world.run()
    assert world.payments == []
    world.identities.learn("M-a")
    await world.run()
    assert world.payments == [("capture", "pi_a", 1000), ("refund", "re_a_1", 100), ("refund", "re_a_2", 100)]
    assert [event.mrn.value for event in world.read("payments", "money_event")] == ["M-a"] * 3
    assert world.waiting == {}
    assert len(world.room.waiting) == 0


async def test_a_copy_of_a_waiting_event_is_suppressed(world):
    await world.run(capture("a"))
    await world.run(capture("a"))
    assert world.dispositions == [("T:0:1", "DUPLICATE", "T:0:0")]
    world.identities.learn("M-a")
    await world.run(capture("a"))
    assert len(world.payments) == 1
    assert world.dispositions[1:] == [("T:0:2", "DUPLICATE", "T:0:0")]


async def test_the_waiting_room_survives_a_restart(world):
    await world.run(capture("a"), refund("a"))
    world.restart()
    assert len(world.room.waiting) == 2
    world.identities.learn("M-a")
    await world.run()
    assert [kind for kind, *_ in world.payments] == ["capture", "refund"]


async def release_all(world, monkeypatch, batches):
    """Records ended in each of so many batches without time passing between them, three at most in one."""
    monkeypatch.setattr(decide, "RELEASE_LIMIT", 3)
    ended = []
    world.clock.steady += 1
    for _ in range(batches):
        world.clock.steady -= 1
        decision = await world.run()
        ended.append([held.hop for room in decision.rooms for held in room.released])
    return ended


async def test_many_that_wait_for_one_patient_are_released_over_several_batches(world, monkeypatch):
    """All at once would be a transaction without bound. An entity stays in one piece."""
    await world.run(*(capture(number, mrn="M") for number in range(4)), refund(1, 1), refund(1, 2), refund(1, 3))
    world.identities.learn("M")
    assert await release_all(world, monkeypatch, 4) == [
        ["T:0:0", "T:0:1", "T:0:4", "T:0:5", "T:0:6"],
        ["T:0:2", "T:0:3"],
        [],
        [],
    ]
    assert world.waiting == {}


async def test_parents_that_never_came_are_given_up_over_several_batches(world, monkeypatch):
    await world.run(*(refund(number) for number in range(7)))
    world.clock.ms += PARENT_WAIT * 1000 + 1
    world.clock.steady += 10
    assert await release_all(world, monkeypatch, 4) == [
        ["T:0:0", "T:0:1", "T:0:2"],
        ["T:0:3", "T:0:4", "T:0:5"],
        ["T:0:6"],
        [],
    ]
    assert [reason for _, reason in world.reviews] == ["PARENT_NEVER_CAME"] * 7


@pytest.mark.parametrize("when", ["start", "release"])
async def test_a_waiting_entry_that_cannot_be_read_ends_the_process_and_its_store(world, when):
    """No record is to blame for a damaged store, and none is decided from it; the changelog has the entry whole."""
    await world.run(capture(1))
    entries = {SEEN: [], WAITING: [(b"T:0:0", b"rot")]}
    world.state._put(entries, world.state._applied)
    world.identities.learn("M-1")
    with pytest.raises(StateUnusable) as error:
        world.restart() if when == "start" else await world.run(capture(2))
    assert "next start rebuilds" in error.value.remedy
    assert not world.state.path.exists()


async def test_a_refund_before_its_capture_is_released_in_the_captures_batch_after_it(world):
    world.identities.learn("M-a")
    await world.run(refund("a", 1), refund("a", 2))
    assert world.waiting == {"T:0:0": "PARENT_UNKNOWN", "T:0:1": "PARENT_UNKNOWN"}
    await world.run(capture("a"))
    assert world.payments == [("capture", "pi_a", 1000), ("refund", "re_a_1", 100), ("refund", "re_a_2", 100)]
    assert world.waiting == {}


async def test_a_refund_takes_the_patient_of_its_capture(world):
    world.identities.learn("M-a")
    await world.run(capture("a"), refund("a"))
    first, second = world.read("payments", "money_event")
    assert second.mrn == first.mrn == Reference("NORTH", "MR", "M-a")
    assert world.identities.asked == [[KEY.hash_identifier(Reference("NORTH", "MR", "M-a"))]]


async def test_a_refund_that_names_a_known_patient_itself_does_not_wait(world):
    world.identities.learn("M-a")
    world.identities.learn("M-other")
    await world.run(capture("a"))
    await world.run(refund("a", mrn="M-other"))
    assert world.waiting == {}
    assert [event.mrn.value for event in world.read("payments", "money_event")] == ["M-a", "M-other"]


async def test_the_root_is_released_first_although_its_refund_came_earlier(world):
    await world.run(refund("a"))
    await world.run(capture("a"))
    assert world.waiting == {"T:0:0": "PARENT_UNKNOWN", "T:0:1": "PATIENT_UNKNOWN"}
    world.identities.learn("M-a")
    await world.run()
    assert [kind for kind, *_ in world.payments] == ["capture", "refund"]
    assert world.waiting == {}


async def test_a_parent_that_never_came_is_a_review(world):
    await world.run(refund("a"))
    world.clock.ms += PARENT_WAIT * 1000 - 1
    world.clock.steady += 10
    await world.run()
    assert world.waiting == {"T:0:0": "PARENT_UNKNOWN"}
    world.clock.ms += 2
    world.clock.steady += 10
    await world.run()
    assert world.waiting == {}
    assert world.reviews == [("T:0:0", "PARENT_NEVER_CAME")]
    world.identities.learn("M-a")
    await world.run(capture("a"), refund("a"))
    assert world.payments == [("capture", "pi_a", 1000)], "the refund is a person's to decide"


async def test_a_refund_whose_parent_came_and_waits_never_expires(world):
    await world.run(refund("a"))
    await world.run(capture("a"))
    world.clock.ms += 10 * PARENT_WAIT * 1000
    world.clock.steady += 10
    await world.run()
    assert world.reviews == []
    world.identities.learn("M-a")
    await world.run()
    assert [kind for kind, *_ in world.payments] == ["capture", "refund"]


async def test_an_ambiguous_patient_is_a_review_at_once_and_at_release(world):
    world.identities.learn("M-a", Ambiguous("MRN_AMBIGUOUS"))
    await world.run(capture("a"), capture("b"))
    assert world.reviews == [("T:0:0", "MRN_AMBIGUOUS")]
    world.identities.learn("M-b", Ambiguous("MERGE_CYCLE"))
    await world.run()
    assert world.reviews == [("T:0:0", "MRN_AMBIGUOUS"), ("T:0:1", "MERGE_CYCLE")]
    assert world.waiting == {}
    assert world.payments == []


async def test_a_patient_that_nobody_names_is_a_review(world):
    await world.run(capture("a", mrn=None), refund("a"))
    assert world.reviews == [("T:0:0", "PATIENT_NOT_NAMED"), ("T:0:1", "PATIENT_NOT_NAMED")]


async def test_settlements_need_no_patient(world):
    await world.run(payout(), payout())
    assert [event.kind for event in world.read("settlements", "money_event")] == ["payout"]
    assert world.identities.asked == []
    assert world.dispositions == [("T:0:1", "DUPLICATE", "T:0:0")]


async def test_other_entities_do_not_wait(world):
    world.identities.learn("M-b")
    await world.run(capture("a"), capture("b"), refund("b"), refund("a"))
    assert [name for _, name, _ in world.payments] == ["pi_b", "re_b_1"]


# A release that fails.


async def test_a_release_that_fails_is_a_dead_letter_with_tombstone_and_void(world):
    await world.run(capture("a"), refund("a"))
    world.identities.learn("M-a")
    await world.run(refused=["T:0:0"])
    assert world.dead_letters == [("T:0:0", "REFUSED_BY_BROKER")]
    assert find_header(world.topics["dlq"][0].headers, "dead_letter_stage") == "release"
    tombstones = [o.key for o in world.topics["waiting.stripe"] if o.value is None]
    assert b"T:0:0" in tombstones
    void = [o for o in world.topics["seen.stripe"] if o.key == b"stripe:cards:capture:pi_a"][-1]
    assert void.value is not None, "a tombstone could be missed by a store that was behind"
    await world.run(capture("a"))
    assert ("capture", "pi_a", 1000) in world.payments, "a good copy or a redrive passes"
    await world.run(capture("a"))
    assert world.dispositions == [("T:0:3", "DUPLICATE", "T:0:2")]


async def test_a_failed_release_keeps_what_is_in_review_already(world):
    await world.run(capture("a", 1000), capture("a", 2000))
    world.identities.learn("M-a")
    await world.run(refused=["T:0:0"])
    await world.run(capture("a", 2000))
    assert world.reviews == [("T:0:1", "CONFLICTING_COPY")]
    assert world.dispositions == [("T:0:2", "DUPLICATE", "T:0:1")]
    assert world.payments == []
    assert Counter(hop for hop, _ in world.list_fates()) == {"T:0:0": 1, "T:0:1": 1, "T:0:2": 1}


async def test_a_mapping_that_no_longer_takes_a_waiting_record_is_a_dead_letter(world, monkeypatch):
    await world.run(capture("a"))
    world.identities.learn("M-a")
    ignored = decide.Ignored("NOT_MONEY", "payment_intent.succeeded", "")
    monkeypatch.setattr(world.decider._normaliser, "normalise", lambda _record: ignored)
    await world.run()
    assert world.dead_letters == [("T:0:0", "NO_LONGER_MAPPED")]
    assert world.waiting == {}


@pytest.mark.parametrize("name", ["origin", "facility", "source", "x", "reviewed_hop", "named_patient"])
@pytest.mark.parametrize("copies", [1, 2])
async def test_a_header_without_a_value_ends_nothing(world, name, copies):
    """Kafka knows such headers; whatever becomes of the record, it has one fate and its process goes on."""
    world.identities.learn("M-1")
    records = world.take(*[capture(1)] * copies)
    for record in records:
        record.headers = [*((key, value) for key, value in record.headers if key != name), (name, None)]
    if name == "named_patient":
        records[-1].headers.append(("reviewed_hop", None))
    world.commit(await world.decide(records))
    assert sorted(hop for hop, _ in world.list_fates()) == [record.hop for record in records]


async def test_an_unexpected_exception_is_that_records_dead_letter(world, monkeypatch):
    def explode(_record):
        raise ZeroDivisionError("text that might hold payload")

    monkeypatch.setattr(world.decider._normaliser, "normalise", explode)
    await world.run(capture("a"))
    assert world.dead_letters == [("T:0:0", "ZeroDivisionError")]
    assert not any(b"payload" in value for _, value in world.topics["dlq"][0].headers)
    monkeypatch.undo()


# Any order of anything. The oracle knows bodies and arrival order only.


def list_bodies(draw_kind, entity, amount):
    return {
        "capture": lambda: capture(entity, amount),
        "refund": lambda: refund(entity, 1, amount),
        "second_refund": lambda: refund(entity, 2, amount),
        "poison": lambda: capture(entity, None),
        "poison_refund": lambda: refund(entity, 1, None),
        "sister": lambda: build_body("charge.refunded", {"id": f"ch_{entity}"}),
    }[draw_kind]()


SENT = st.tuples(
    st.just("send"),
    st.sampled_from(("capture", "refund", "second_refund", "poison", "poison_refund", "sister")),
    st.sampled_from("ab"),
    st.sampled_from((1000, 2000)),
)
STEPS = st.one_of(
    SENT,
    SENT,
    SENT,
    st.tuples(st.just("batch"), st.integers(0, 4)),
    st.tuples(st.just("abort"), st.integers(0, 4)),
    st.tuples(st.just("refuse"), st.integers(1, 3)),
    st.tuples(st.just("patient"), st.sampled_from("ab")),
    st.tuples(st.just("restart")),
)


async def run_plan(world, plan):
    """Play a plan; then everybody arrives and everything is worked off. Return what was sent and what was refused."""
    sent, refused, queue = [], set(), []
    for step, *values in [*plan, ("patient", "a"), ("patient", "b")]:
        if step == "send":
            sent.append(tuple(values))
            queue += world.take(list_bodies(*values))
        elif step == "batch":
            taken, queue = queue[: values[0]], queue[values[0] :]
            world.commit(await world.decide(taken, refused))
        elif step == "abort":
            await world.decide(queue[: values[0]], refused)
        elif step == "refuse" and queue:
            refused.add(queue[0].hop)
            taken, queue = queue[: values[0]], queue[values[0] :]
            world.commit(await world.decide(taken, refused))
        elif step == "patient":
            world.identities.learn(f"M-{values[0]}")
        elif step == "restart":
            world.restart()
    world.commit(await world.decide(queue, refused))
    await world.run()
    return sent, refused


def expect(sent, refused):
    """Per hop what must have become of it, by reading the records in order, and (linked hops, waiting for ever)."""
    first, fates, links = {}, {}, {}
    captured = set()
    for number, (kind, entity, amount) in enumerate(sent):
        hop = f"T:0:{number}"
        if hop in refused or kind.startswith("poison"):
            fates[hop] = "dead_lettered"
        elif kind == "sister":
            fates[hop] = "ignored"
        else:
            copies = first.setdefault((kind, entity), {})
            if amount in copies:
                fates[hop], links[hop] = "suppressed", copies[amount]
            else:
                fates[hop] = "in_review" if copies else "canonical"
                copies[amount] = hop
            if kind == "capture":
                captured.add(entity)
    for hop, fate in fates.items():
        kind, entity, _ = sent[int(hop.rsplit(":", 1)[1])]
        if fate == "canonical" and entity not in captured:
            fates[hop] = "waiting"
    return fates, links


def check(world, sent, refused):
    """Compare the topics with the oracle."""
    fates, links = expect(sent, refused)
    found = world.list_fates()
    assert sorted(found) == sorted(fates.items())
    assert {hop: linked for hop, reason, linked in world.dispositions if reason == "DUPLICATE"} == links
    published = [find_header(o.headers, "hop") for o in world.topics.get("payments", [])]
    for entity in "ab":
        mine = [hop for hop in published if sent[int(hop.rsplit(":", 1)[1])][1] == entity]
        kinds = [sent[int(hop.rsplit(":", 1)[1])][0] for hop in mine]
        assert "capture" not in kinds[1:], f"a refund went before its capture: {kinds}"
        offsets = [int(hop.rsplit(":", 1)[1]) for hop in mine[1:]]
        assert offsets == sorted(offsets), f"refunds changed places: {offsets}"
    events = world.read("payments", "money_event")
    assert len({event.event_id for event in events}) == len(events)
    assert all(event.mrn.value == f"M-{event.root[-1]}" for event in events)
    waiting = {hop for hop, fate in fates.items() if fate == "waiting"}
    assert {held.hop for held in world.room.waiting} == waiting
    assert {key.decode() for key, _ in world.state.scan(WAITING)} == waiting


@settings(max_examples=150, deadline=None)
@given(plan=st.lists(STEPS, max_size=30))
def test_every_record_has_one_fate_and_every_fact_is_published_once(tmp_path_factory, plan):
    play(tmp_path_factory, plan)


def play(factory, plan):
    async def run():
        world = World(factory.mktemp("world"))
        try:
            check(world, *await run_plan(world, plan))
        finally:
            world.state.close()

    asyncio.run(run())


# Each control breaks one rule, and the oracle must see it.


def apply_before_commit(monkeypatch):
    decided = World.decide

    async def decide_and_apply(self, records, refused=()):
        decision = await decided(self, records, refused)
        for draft in decision.drafts:
            draft.apply()
        return decision

    monkeypatch.setattr(World, "decide", decide_and_apply)


def dead_letter_writes_its_key(monkeypatch):
    dead_letter = decide.Writer.dead_letter
    lanes = []
    build = decide._Lane.__init__

    def remember(lane, *arguments):
        lanes.append(lane)
        build(lane, *arguments)

    def write(writer, record, failure, stage):
        item = json.loads(record.value)["data"]["object"]
        digest = KEY.hash_facts("capture", item["id"], f"cards/{item['id']}", "1000", "USD", "succeeded")
        lanes[-1]._draft.write_seen(f"stripe:cards:capture:{item['id']}", [SeenEntry(digest, record.hop)])
        dead_letter(writer, record, failure, stage)

    monkeypatch.setattr(decide._Lane, "__init__", remember)
    monkeypatch.setattr(decide.Writer, "dead_letter", write)


def waiting_writes_no_key(monkeypatch):
    write = decide.Draft.write_seen
    hold = decide._Lane._hold
    held = set()

    def note(lane, record, *arguments):
        held.add(record.hop)
        return hold(lane, record, *arguments)

    monkeypatch.setattr(decide._Lane, "_hold", note)
    monkeypatch.setattr(
        decide.Draft,
        "write_seen",
        lambda draft, key, entries: None if {e.hop for e in entries} & held else write(draft, key, entries),
    )


def a_review_replaces_the_copies_known(monkeypatch):
    write = decide.Draft.write_seen
    monkeypatch.setattr(decide.Draft, "write_seen", lambda draft, key, entries: write(draft, key, entries[-1:]))


def nothing_waits_behind_its_entity(monkeypatch):
    monkeypatch.setattr(decide.WaitingDraft, "list_entity", lambda _draft, _entity: [])


def children_are_released_before_their_root(monkeypatch):
    monkeypatch.setattr(decide._Lane, "_is_root", lambda _lane, _held: False)


def the_waiting_room_is_not_reloaded(monkeypatch):
    monkeypatch.setattr(MoneyDecider, "rebuild", lambda _decider, _room: None)


def a_release_leaves_its_entry(monkeypatch):
    monkeypatch.setattr(decide._Lane, "_end", lambda lane, held: lane.room.release(held))


def copies_of_one_batch_do_not_count(monkeypatch):
    monkeypatch.setattr(decide.Draft, "_read", lambda draft, store, key: draft.state.read(store, key))


def a_parent_is_not_asked_for(monkeypatch):
    monkeypatch.setattr(decide._Lane, "_inherit", lambda _lane, event: setattr(event, "patient", PATIENT_A) or True)


PATIENT_A = Reference("NORTH", "MR", "M-a")
KNOWN = ("patient", "a")
COPY = ("send", "capture", "a", 1000)
OTHER_COPY = ("send", "capture", "a", 2000)
REFUND = ("send", "refund", "a", 1000)
POISON = ("send", "poison", "a", 1000)
BATCH = ("batch", 4)

CONTROLS = [
    (apply_before_commit, [KNOWN, COPY, ("abort", 1), BATCH]),
    (dead_letter_writes_its_key, [KNOWN, POISON, BATCH, COPY, BATCH]),
    (waiting_writes_no_key, [COPY, BATCH, COPY, BATCH]),
    (a_review_replaces_the_copies_known, [KNOWN, COPY, OTHER_COPY, BATCH, COPY, BATCH]),
    (nothing_waits_behind_its_entity, [COPY, BATCH, KNOWN, REFUND, BATCH]),
    (children_are_released_before_their_root, [REFUND, BATCH, COPY, BATCH, KNOWN]),
    (the_waiting_room_is_not_reloaded, [COPY, BATCH, ("restart",), KNOWN]),
    (a_release_leaves_its_entry, [COPY, BATCH, KNOWN]),
    (copies_of_one_batch_do_not_count, [KNOWN, COPY, COPY, BATCH]),
    (a_parent_is_not_asked_for, [KNOWN, REFUND, BATCH, COPY, BATCH]),
]


@pytest.mark.parametrize(("control", "plan"), CONTROLS, ids=lambda value: getattr(value, "__name__", ""))
def test_the_oracle_sees_every_broken_rule(tmp_path_factory, monkeypatch, control, plan):
    play(tmp_path_factory, plan)
    control(monkeypatch)
    with pytest.raises(AssertionError):
        play(tmp_path_factory, plan)


# What a person decided in a review.


def republish(world, body, reviewed, named=None, **more):
    """A record that takes the place of one in review; ``named`` is the MRN the person gave."""
    (record,) = world.take(body)
    hash_ = [] if named is None else [("named_patient", KEY.hash_identifier(Reference("NORTH", "MR", named)).encode())]
    record.headers = [("origin", b"T:0:0"), *record.headers, *hash_, ("reviewed_hop", reviewed.encode())]
    return record


async def decide_one(world, record):
    world.commit(await world.decide([record]))


async def test_a_named_patient_ends_the_hold_of_the_payment_and_of_its_children(world):
    world.identities.learn("M-x")
    await world.run(capture("a", mrn=None))
    assert world.reviews == [("T:0:0", "PATIENT_NOT_NAMED")]
    await decide_one(world, republish(world, capture("a", mrn=None), "T:0:0", "M-x"))
    await world.run(refund("a"))
    events = world.read("payments", "money_event")
    assert [(event.kind, event.mrn, event.patient) for event in events] == [
        (kind, Reference("NORTH", "MR", "M-x"), Reference("NORTH", "MR", "M-x")) for kind in ("capture", "refund")
    ]
    assert events[0].origin == "T:0:0"


async def test_a_reviewed_record_passes_once_and_its_copies_are_copies(world):
    world.identities.learn("M-x")
    await world.run(capture("a", mrn=None))
    for _ in range(2):
        await decide_one(world, republish(world, capture("a", mrn=None), "T:0:0", "M-x"))
    await world.run(capture("a", mrn=None))
    assert len(world.payments) == 1
    assert world.dispositions == [("T:0:2", "DUPLICATE", "T:0:1"), ("T:0:3", "DUPLICATE", "T:0:1")]


@pytest.mark.parametrize("reviewed", ["T:0:7", "T:1:0", ""])
async def test_a_record_that_names_another_review_is_a_copy(world, reviewed):
    await world.run(capture("a", mrn=None))
    await decide_one(world, republish(world, capture("a", mrn=None), reviewed, "M-x"))
    assert world.payments == []
    assert world.dispositions == [("T:0:1", "DUPLICATE", "T:0:0")]


async def test_another_content_does_not_pass_in_the_place_of_the_reviewed_one(world):
    world.identities.learn("M-x")
    await world.run(capture("a", mrn=None))
    await decide_one(world, republish(world, capture("a", 5, mrn=None), "T:0:0", "M-x"))
    assert world.payments == []
    assert world.reviews[-1] == ("T:0:1", "CONFLICTING_COPY")


async def test_a_named_patient_nobody_knows_is_waited_for_over_a_restart(world):
    await world.run(capture("a", mrn=None))
    await decide_one(world, republish(world, capture("a", mrn=None), "T:0:0", "M-x"))
    await world.run(refund("a"))
    assert world.waiting == {"T:0:1": "PATIENT_UNKNOWN", "T:0:2": "BEHIND_ENTITY"}
    world.restart()
    world.identities.learn("M-x")
    await world.run()
    assert [(kind, name) for kind, name, _ in world.payments] == [("capture", "pi_a"), ("refund", "re_a_1")]
    assert {event.mrn.value for event in world.read("payments", "money_event")} == {"M-x"}
    assert world.waiting == {}


async def test_a_person_names_another_patient_than_the_ambiguous_one(world):
    world.identities.learn("M-a", Ambiguous("MRN_AMBIGUOUS"))
    world.identities.learn("M-x")
    await world.run(capture("a"))
    assert world.reviews == [("T:0:0", "MRN_AMBIGUOUS")]
    await decide_one(world, republish(world, capture("a"), "T:0:0", "M-x"))
    (event,) = world.read("payments", "money_event")
    assert event.mrn.value == event.patient.value == "M-x"


async def test_a_retry_whose_patient_is_still_ambiguous_is_a_review_again(world):
    world.identities.learn("M-a", Ambiguous("MRN_AMBIGUOUS"))
    await world.run(capture("a"))
    await decide_one(world, republish(world, capture("a"), "T:0:0"))
    assert world.reviews == [("T:0:0", "MRN_AMBIGUOUS"), ("T:0:1", "MRN_AMBIGUOUS")]
    world.identities.learn("M-a")
    await decide_one(world, republish(world, capture("a"), "T:0:1"))
    assert len(world.payments) == 1

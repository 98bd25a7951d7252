"""The deliverer's cycle over a group that lives in memory: what is durable before a call, and what stops a call.

The group commits, aborts, revokes and grows old on command. Requests go to a real MLLP receiver on loopback.
"""

import asyncio
import contextlib
import threading
import time

import pytest

from identity.projection import RedisDown
from identity.resolution import Ambiguous, Known
from schemas import wire
from schemas.events import Action, Decision, DeliveryOutcome, MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.keys import build_event_id
from schemas.money import Money
from schemas.tenancy import Authority, Facility, Tenancy
from sinks import runner as module
from sinks import shards
from sinks.attempts import Entry, decode_entry, encode_entry
from sinks.catalog import load
from sinks.contract import Absent, Answer, Found, HttpHead, LookUp, Target, TargetClass, use_nothing
from sinks.policy import Limits, LookUpMissing
from sinks.runner import Runner
from sinks.transactions import LedgerRefused
from sinks.transport import MllpTransport
from telemetry.metrics import Metrics
from topics import catalog
from topics.cluster import KafkaSettings
from topics.group import Polled, StaleAssignment
from topics.reading import Record, TopicMissing
from topics.transaction import RecordRefused, TransactionAborted

PAYMENTS = (catalog.PAYMENTS, 0)
TENANCY = Tenancy(
    tenant="acme",
    facilities=(
        Facility(
            id="north", time_zone="America/Chicago", default_authority="NORTH", authorities=(Authority(name="NORTH"),)
        ),
    ),
)


class Registry:
    """Schema id 1 is the outcome, 2 the event."""

    def find_id(self, subject, schema):
        return 1

    def find_schema(self, schema_id):
        return wire.load_schema({1: "delivery_outcome", 2: "money_event"}[schema_id])


class Broker:
    """One partition of `payments`, and everything that was committed."""

    def __init__(self):
        self.records = []
        self.committed = []
        self.attempts = {}
        self.frontier = 0
        self.aborts = 0
        self.commits = 0
        self.heartbeat_age = 0.0
        self.number = 1
        self.owned = True
        self.paused = False
        self.before_commit = lambda: None
        self.refuses = lambda output: False
        self.is_searching = False
        self.last_work = None

    def publish(self, name, root, kind="capture", value=None, padding="e"):
        key = f"stripe:acct:{kind}:{name}"
        event = MoneyEvent(
            event_id=build_event_id(key), transaction_key=key, tenant="acme", facility="north", source="stripe",
            account="acct", kind=kind, status="succeeded", money=Money(100, "USD", 2), occurred_at=1, received_at=1,
            object_id=name, root=root, source_event_id=padding, patient=Reference("NORTH", "MR", f"N-{root}"),
            mapping_version="1", origin="t:0:0",
        )  # fmt: skip
        encoded = wire.Encoder("money_event", 2).encode(event) if value is None else value
        headers = [("event_id", event.event_id.encode())]
        self.records.append(Record(catalog.PAYMENTS, 0, len(self.records), root.encode(), encoded, headers, 1))
        return event.event_id

    def outcomes(self):
        decoder = wire.Decoder("delivery_outcome", DeliveryOutcome, Registry().find_schema)
        found = [decoder.decode(output.value) for output in self.committed if output.topic == catalog.DELIVERIES]
        return {outcome.event_id: (outcome.outcome, outcome.code) for outcome in found}

    def letters(self):
        return [dict(output.headers) for output in self.committed if output.topic == catalog.DLQ]


class Group:
    """The part of ``GroupConsumer`` that the runner uses, over a ``Broker``."""

    def __init__(self, kafka, *, load, release, hand_over, keeps_records, **_):
        self.load, self.release, self.hand_over = load, release, hand_over
        assert keeps_records
        self.broker = Group.broker
        self.position = None
        self.topic_ids = {catalog.PAYMENTS: "P", catalog.SETTLEMENTS: "S"}
        self.hindrance = None
        self.loaded = False

    @property
    def number(self):
        return self.broker.number

    @property
    def last_heartbeat(self):
        return time.monotonic() - self.broker.heartbeat_age

    async def start(self):
        self.broker.number = 1

    def is_ready(self):
        return self.hindrance is None

    def frontiers(self):
        return {PAYMENTS: self.broker.frontier} if self.broker.owned and self.loaded else {}

    async def poll(self, max_records, wait):
        await asyncio.sleep(0.001)
        if not self.broker.owned:
            if self.loaded:
                self.broker.last_work = await asyncio.to_thread(self.hand_over, [PAYMENTS])
                self.loaded = False
                self.release(*PAYMENTS)
            return Polled(self.number)
        if not self.loaded:
            await asyncio.to_thread(self.load, *PAYMENTS)
            self.loaded, self.position = True, self.broker.frontier
        if self.broker.paused:
            return Polled(self.number)
        found = self.broker.records[self.position : self.position + max_records]
        self.position += len(found)
        return Polled(self.number, {PAYMENTS: found} if found else {})

    async def call(self, function, *arguments):
        return function(*arguments)

    async def commit(self, number, outputs, positions):
        self.broker.before_commit()
        if number != self.broker.number:
            await self.rewind()
            raise StaleAssignment
        assert positions
        if self.broker.aborts:
            self.broker.aborts -= 1
            await self.rewind()
            raise TransactionAborted("TEST")
        for output in outputs:
            if self.broker.refuses(output):
                # First known only to be among them, then by name, as the producer does it.
                self.broker.is_searching = not self.broker.is_searching
                raise RecordRefused("MSG_SIZE_TOO_LARGE", None if self.broker.is_searching else output.cause)
        self.broker.commits += 1
        self.broker.committed += outputs
        for output in outputs:
            if output.topic.startswith("attempts."):
                assert output.partition == 0
                if output.value is None:
                    self.broker.attempts.pop(output.key.decode(), None)
                else:
                    self.broker.attempts[output.key.decode()] = decode_entry(output.value)
        self.broker.frontier = positions[PAYMENTS]

    async def rewind(self):
        self.position = self.broker.frontier

    async def pause(self, partitions=None):
        self.broker.paused = True

    async def resume(self, partitions=None):
        self.broker.paused = False

    async def close(self):
        pass


class Feed:
    """Decisions of people, given to the runner once."""

    def __init__(self, decided):
        self.decided = decided

    def read(self, partitions):
        found, self.decided[:] = list(self.decided), []
        return found

    def close(self):
        pass


class Receiver:
    """An MLLP receiver: counts what it was sent, answers as told."""

    def __init__(self):
        self.received = []
        self.silent = set()
        self.code = "AA"
        self.on_message = lambda name: None

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.port = self.server.sockets[0].getsockname()[1]
        return self

    async def __aexit__(self, *_):
        self.server.close()

    async def serve(self, reader, writer):
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                frame = await reader.readuntil(b"\x1c\r")
                lines = frame.decode().split("\r")
                control_id = lines[0].split("|")[9]
                name = next(line for line in lines if line.startswith("FT1")).split("|")[8]
                self.received.append(name)
                self.on_message(name)
                if name in self.silent:
                    continue
                ack = f"\x0bMSH|^~\\&|A|B|C|D|20260101||ACK|1|P|2.5.1\rMSA|{self.code}|{control_id}\r\x1c\r"
                writer.write(ack.encode())
        writer.close()


class Patients:
    def __init__(self):
        self.error = None
        self.ambiguous = set()

    async def resolve(self, refs):
        if self.error:
            raise self.error
        return [Ambiguous("MRN_AMBIGUOUS") if ref.value in self.ambiguous else Known(ref) for ref in refs]


@pytest.fixture
async def world(monkeypatch):
    async with Receiver() as receiver:
        yield World(monkeypatch, receiver)


class World:
    def __init__(self, monkeypatch, receiver):
        self.broker, self.receiver, self.patients = Broker(), receiver, Patients()
        self.metrics = Metrics(strict=True)
        Group.broker = self.broker
        monkeypatch.setattr(module, "GroupConsumer", Group)
        monkeypatch.setattr(shards, "read_to_end", lambda *_args, **_options: [])
        self.decided = []
        monkeypatch.setattr(module, "DecisionFeed", lambda *_args: Feed(self.decided))
        self.target = load("epic_dft")

    def build(self, *, target=None, dedupe=False, transport=None, limits=None, deadline=0.3, connections=2):
        settings = self.target.settings(
            name="epic", connector="epic_dft", facilities=("north",), host="127.0.0.1", port=self.receiver.port,
            sending_application="A", sending_facility="B", receiving_application="C", receiving_facility="D",
            payment_code="P", refund_as="negative", duplicate_control="msh10" if dedupe else "none",
            duplicate_window_hours=24 if dedupe else None, call_deadline_seconds=deadline, connections=connections,
        )  # fmt: skip
        return Runner(
            KafkaSettings(), target or self.target, settings, TENANCY, registry=Registry(), identities=self.patients,
            instance="i", transport=transport(settings) if transport else None, metrics=self.metrics, limits=limits,
            draw=lambda: 0.0,
        )  # fmt: skip

    @contextlib.asynccontextmanager
    async def running(self, **options):
        runner = self.build(**options)
        task = asyncio.create_task(runner.run())
        try:
            yield runner
        finally:
            runner.stop()
            await asyncio.wait_for(task, 20)

    async def until(self, condition):
        until = time.monotonic() + 20
        for _ in iter(lambda: time.monotonic() < until, False):
            if condition():
                return
            await asyncio.sleep(0.002)
        pytest.fail("not reached in time")


async def test_the_entry_is_committed_before_the_message_arrives(world):
    event_id = world.broker.publish("pi_1", "pi_1")
    seen = []
    world.receiver.on_message = lambda name: seen.append(world.broker.attempts[event_id].state)
    async with world.running():
        await world.until(world.broker.outcomes)
    assert seen == ["IN_FLIGHT"]
    assert world.broker.outcomes() == {event_id: ("posted", "MSA_AA")}
    assert world.broker.attempts == {}
    assert world.broker.frontier == 1
    assert world.metrics.read("deliveries_total", target="epic", outcome="posted") == 1
    assert world.metrics.read("attempts_total", target="epic", kind="ok") == 1


async def test_no_call_begins_while_its_commit_is_rolled_back(world):
    world.broker.publish("pi_1", "pi_1")
    world.broker.aborts = 4
    seen = []
    world.receiver.on_message = lambda name: seen.append(world.broker.aborts)
    async with world.running():
        await world.until(world.broker.outcomes)
    assert seen == [0]
    assert world.receiver.received == ["pi_1"]


async def test_an_answer_whose_commit_is_rolled_back_is_neither_lost_nor_repeated(world):
    event_id = world.broker.publish("pi_1", "pi_1")
    world.receiver.on_message = lambda name: setattr(world.broker, "aborts", 3)
    async with world.running():
        await world.until(world.broker.outcomes)
    assert world.receiver.received == ["pi_1"]
    assert world.broker.outcomes() == {event_id: ("posted", "MSA_AA")}


async def test_an_old_lease_begins_nothing_and_a_fresh_one_goes_on(world):
    world.broker.publish("pi_1", "pi_1")
    world.broker.heartbeat_age = 60.0  # session timeout 45 s
    async with world.running() as runner:
        await asyncio.sleep(0.1)
        assert world.receiver.received == []
        assert "lease" in runner.ready()[1]
        world.broker.heartbeat_age = 0.0
        await world.until(world.broker.outcomes)
    assert world.receiver.received == ["pi_1"]


class HeldTransport(MllpTransport):
    """Runs ``HeldTransport.hook`` at the last moment before the look before the write."""

    hook = staticmethod(lambda: None)

    async def send(self, request, before_write):
        def look():
            HeldTransport.hook()
            before_write()

        return await super().send(request, look)


@pytest.mark.parametrize("dedupe", [True, False])
async def test_a_lease_that_grows_old_before_the_write_withdraws_the_call(world, dedupe):
    event_id = world.broker.publish("pi_1", "pi_1")
    ages = [60.0, 0.0]

    def age():
        world.broker.heartbeat_age = ages.pop(0) if ages else 0.0

    HeldTransport.hook = staticmethod(age)
    async with world.running(dedupe=dedupe, transport=HeldTransport):
        await world.until(lambda: world.broker.heartbeat_age)
        await asyncio.sleep(0.05)
        assert world.receiver.received == []
        world.broker.heartbeat_age = 0.0
        await world.until(world.broker.outcomes)
    assert world.receiver.received == ["pi_1"]
    assert world.broker.outcomes() == {event_id: ("posted", "MSA_AA")}


async def test_a_revoked_partition_withdraws_what_is_not_written(world):
    world.broker.publish("pi_1", "pi_1")
    reached = threading.Event()
    async with world.running(transport=HeldTransport) as runner:

        def revoke():
            # As the group does: on its own thread, while the call is about to write.
            world.broker.owned = False
            runner._shards.release(*PAYMENTS)
            reached.set()

        HeldTransport.hook = staticmethod(revoke)
        await world.until(reached.is_set)
        await asyncio.sleep(0.05)
    assert world.receiver.received == []
    assert world.broker.outcomes() == {}
    (entry,) = world.broker.attempts.values()
    assert entry.state == "IN_FLIGHT"  # the next owner decides


async def test_an_answer_after_the_revoke_is_not_committed(world):
    world.broker.publish("pi_1", "pi_1")

    def revoke(_name):
        world.broker.owned = False
        world.broker.number += 1

    HeldTransport.hook = staticmethod(lambda: None)
    world.receiver.on_message = revoke
    async with world.running():
        await world.until(lambda: world.receiver.received)
        await asyncio.sleep(0.05)
    assert world.broker.outcomes() == {}


async def test_a_record_that_is_no_event_is_a_dead_letter_and_stops_only_its_entity(world):
    bad = world.broker.publish("pi_1", "pi_1", value=b"\x00\x00")
    behind = world.broker.publish("re_1", "pi_1", kind="refund")
    other = world.broker.publish("pi_2", "pi_2")
    async with world.running():
        await world.until(lambda: len(world.broker.outcomes()) == 3)
    outcomes = world.broker.outcomes()
    assert outcomes[bad] == ("dead_lettered", "NOT_AVRO")
    assert outcomes[behind] == ("parked", "BEHIND_ENTITY")
    assert outcomes[other] == ("posted", "MSA_AA")
    (letter,) = world.broker.letters()
    assert letter["dead_letter_stage"] == b"epic"
    assert letter["hop"] == b"P:0:0"


def replace(target, **changes):
    return Target(**{name: changes.get(name, getattr(target, name)) for name in target.__dataclass_fields__})


@pytest.mark.parametrize(
    ("error", "kind", "code"),
    [
        (ZeroDivisionError(), b"INTERNAL", b"ZeroDivisionError"),
        (Failure(FailureKind.UNMAPPED, "FIELD_MISSING", "PID-3.1"), b"UNMAPPED", b"FIELD_MISSING"),
    ],
)
@pytest.mark.parametrize("function", ["freeze", "routes"])
async def test_a_connector_that_raises_makes_a_dead_letter_not_a_crash(world, function, error, kind, code):
    event_id = world.broker.publish("pi_1", "pi_1")
    original = getattr(world.target, function)

    def fail(event, *rest):
        if event.object_id == "pi_1":
            raise error
        return original(event, *rest)

    other = world.broker.publish("pi_2", "pi_2")
    async with world.running(target=replace(world.target, **{function: fail})):
        await world.until(lambda: len(world.broker.outcomes()) == 2)
    assert world.broker.outcomes()[event_id] == ("dead_lettered", code.decode())
    assert world.broker.outcomes()[other][0] == "posted"
    (letter,) = world.broker.letters()
    assert (letter["dead_letter_kind"], letter["dead_letter_code"]) == (kind, code)


@pytest.mark.parametrize("dedupe", [True, False])
async def test_an_answer_that_cannot_be_judged_is_in_doubt(world, dedupe):
    event_id = world.broker.publish("pi_1", "pi_1")
    answers = []

    def fail_once(answer, request, settings):
        answers.append(request.body)
        if len(answers) == 1:
            raise ZeroDivisionError
        return Answer(None, "OK")

    async with world.running(target=replace(world.target, verdict=fail_once), dedupe=dedupe):
        await world.until(world.broker.outcomes)
    if dedupe:
        assert world.broker.outcomes() == {event_id: ("posted", "OK")}
        assert len(answers) == 2
        assert answers[0] == answers[1]
    else:
        assert world.broker.outcomes() == {event_id: ("unknown", "ZeroDivisionError")}
        assert len(answers) == 1


async def test_a_target_that_answers_nothing_does_not_eat_the_backlog(world):
    for n in range(40):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    world.receiver.silent = {f"pi_{n}" for n in range(40)}
    async with world.running(deadline=0.05) as runner:
        await world.until(lambda: runner.ready()[1].get("target") == "NO_ANSWER")
        received = len(world.receiver.received)
        assert received <= 8
        assert not [o for o in world.broker.outcomes().values() if o[0] in {"rejected", "dead_lettered"}]
        world.receiver.silent = set()
        await world.until(lambda: len(world.broker.outcomes()) == 40)
    posted = [outcome for outcome in world.broker.outcomes().values() if outcome[0] == "posted"]
    assert len(posted) >= 20
    assert len(world.receiver.received) == len(set(world.receiver.received))


class JudgingTransport:
    """Writes nothing anywhere and judges by itself, as HTTP does; ``answers`` come first, then all is taken."""

    connections, call_deadline = 2, 0.05

    def __init__(self, answers):
        self.answers = answers
        self.sent = []

    async def send(self, request, before_write):
        before_write()
        self.sent.append(request.control_id)
        return self.answers.pop(0) if self.answers else Answer(None, "HTTP_200")

    async def close(self):
        """Nothing is open."""


def open_attempts(world):
    return [outcome for outcome in world.broker.outcomes().values() if outcome[0] != "posted"]


async def test_a_redrive_goes_out_under_a_key_of_its_own(world):
    event_id = world.broker.publish("pi_1", "pi_1")
    transport = JudgingTransport([Answer(FailureKind.REJECTED, "HTTP_400"), Answer(FailureKind.REJECTED, "HTTP_400")])
    async with world.running(transport=lambda _settings: transport):
        for decided in range(2):
            await world.until(lambda number=decided + 1: len(transport.sent) == number)
            await world.until(lambda: world.broker.attempts[event_id].state == "REJECTED")
            entry = world.broker.attempts[event_id]
            world.decided.append(
                Decision(
                    decision_id=f"d{decided}", target="epic", event_id=event_id, topic=entry.topic, offset=entry.offset,
                    attempt=entry.number, round=entry.round, action=Action.REDRIVE, reference="", decided_at=0,
                )
            )  # fmt: skip
        await world.until(lambda: world.broker.outcomes()[event_id] == ("posted", "HTTP_200"))
    assert len(transport.sent) == len(set(transport.sent)) == 3


@pytest.mark.parametrize(
    "answer",
    [
        Answer(FailureKind.UNAVAILABLE, "HTTP_503", is_outage=True),
        Answer(FailureKind.AUTH, "HTTP_401"),
        Answer(FailureKind.RATE_LIMITED, "HTTP_429", retry_after=0.05),
    ],
)
async def test_an_answer_about_the_whole_target_pauses_it_and_parks_nothing(world, answer):
    for n in range(20):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    # More than are called at once, so that probes meet it too.
    transport = JudgingTransport([answer] * 6)
    async with world.running(transport=lambda _settings: transport) as runner:
        await world.until(lambda: runner.ready()[1].get("target") == answer.code)
        await world.until(lambda: len(world.broker.outcomes()) == 20)
    assert open_attempts(world) == []
    assert len(transport.sent) == 20 + 6


async def test_nothing_stays_in_flight_over_a_long_wait(world):
    for n in range(20):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    transport = JudgingTransport([Answer(FailureKind.RATE_LIMITED, "HTTP_429", retry_after=300.0)] * 2)
    async with world.running(transport=lambda _settings: transport) as runner:
        await world.until(lambda: len(transport.sent) == 2 and "target" in runner.ready()[1])
        await world.until(lambda: not runner.status()["states"]["IN_FLIGHT"])
        assert len(transport.sent) == 2
        assert {entry.state for entry in world.broker.attempts.values()} <= {"RETRY_AT", "IN_FLIGHT"}
    assert world.broker.outcomes() == {}


async def test_a_target_that_falls_over_at_every_event_does_not_eat_the_backlog(world):
    for n in range(40):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    transport = JudgingTransport([Answer(FailureKind.AMBIGUOUS, "HTTP_502")] * 6)
    async with world.running(transport=lambda _settings: transport) as runner:
        await world.until(lambda: runner.ready()[1].get("target") == "HTTP_502")
        await world.until(lambda: len(world.broker.outcomes()) == 40)
    assert open_attempts(world) == [("unknown", "HTTP_502")] * 6
    assert len(transport.sent) == 40


async def test_identity_that_is_down_holds_and_loses_nothing(world):
    world.broker.publish("pi_1", "pi_1")
    world.patients.error = RedisDown("no answer.", place="redis")
    async with world.running() as runner:
        await world.until(lambda: runner.ready()[1].get("paused") == "RS240 at redis")
        assert world.receiver.received == []
        world.patients.error = None
        await world.until(world.broker.outcomes)
        assert runner.ready() == (True, {})
    assert world.receiver.received == ["pi_1"]


async def test_what_the_group_waits_for_is_told(world):
    async with world.running() as runner:
        await world.until(lambda: runner.ready() == (True, {}))
        runner._consumer.hindrance = TopicMissing("the topic was deleted.", place="payments")
        assert runner.ready() == (False, {"group": "RS211 at payments"})


async def test_an_ambiguous_patient_is_parked_and_later_posted(world):
    event_id = world.broker.publish("pi_1", "pi_1")
    world.patients.ambiguous = {"N-pi_1"}
    async with world.running():
        await world.until(world.broker.outcomes)
        assert world.broker.outcomes() == {event_id: ("parked", "MRN_UNRESOLVED")}
        assert world.broker.frontier == 1
        world.patients.ambiguous = set()
        await world.until(lambda: world.broker.outcomes()[event_id][0] == "posted")
    assert world.broker.attempts == {}


async def test_intake_pauses_when_too_much_is_held_and_goes_on(world):
    for n in range(60):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    world.patients.error = RedisDown("no answer.", place="redis")
    async with world.running(limits=Limits(poll_records=10, open_events=20)) as runner:
        await world.until(lambda: runner.status()["paused"])
        assert runner.status()["states"]["PENDING"] <= 30
        world.patients.error = None
        await world.until(lambda: len(world.broker.outcomes()) == 60)
        assert not runner.status()["paused"]
    assert sorted(world.receiver.received) == sorted(f"pi_{n}" for n in range(60))


@pytest.mark.parametrize("stopped_events", [1000, 20])
async def test_what_is_parked_holds_intake_only_past_a_bound_of_its_own(world, stopped_events):
    for n in range(60):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    world.patients.ambiguous = {f"N-pi_{n}" for n in range(60)}
    limits = Limits(poll_records=10, open_events=20, stopped_events=stopped_events)
    async with world.running(limits=limits) as runner:
        if stopped_events == 20:
            await world.until(lambda: runner.status()["paused"] and len(world.broker.outcomes()) >= 20)
            assert len(world.broker.outcomes()) < 60
        else:
            await world.until(lambda: len(world.broker.outcomes()) == 60)
            assert world.broker.frontier == 60
        world.patients.ambiguous = set()
        await world.until(lambda: [o for o, _ in world.broker.outcomes().values()] == ["posted"] * 60)
    assert sorted(world.receiver.received) == sorted(f"pi_{n}" for n in range(60))


async def test_more_finished_work_above_the_frontier_than_may_be_held_does_not_stop_intake_after_a_restart(
    world, monkeypatch
):
    ids = [world.broker.publish(f"pi_{n}", f"pi_{n}") for n in range(40)]
    entries = [
        Record(
            "attempts.epic", 0, n, ids[n].encode(), encode_entry(Entry("DONE", catalog.PAYMENTS, n, f"pi_{n}")), [], 1
        )
        for n in range(1, 40)
    ]
    monkeypatch.setattr(shards, "read_to_end", lambda *_args, **_options: entries)
    async with world.running(limits=Limits(poll_records=5, open_events=20)):
        await world.until(lambda: world.broker.frontier == 40)
    assert world.receiver.received == ["pi_0"]


async def test_many_events_share_a_commit(world):
    for n in range(400):
        world.broker.publish(f"pi_{n}", f"pi_{n}")
    async with world.running(dedupe=True, connections=8):
        await world.until(lambda: len(world.broker.outcomes()) == 400)
    assert world.broker.commits < 200


async def test_status_counts_what_is_open(world):
    world.broker.publish("pi_1", "pi_1")
    world.broker.publish("re_1", "pi_1", kind="refund")
    world.receiver.code = "AR"
    async with world.running() as runner:
        await world.until(lambda: len(world.broker.outcomes()) == 2)
        status = runner.status()
    assert status["states"]["REJECTED"] == 1
    assert status["states"]["PARKED"] == 1
    assert status["oldest_seconds"] >= 0
    assert status["class"] == "D"


@pytest.mark.parametrize("limit", [1400, 1000])
async def test_a_record_the_broker_refuses_is_a_dead_letter_and_the_others_go_on(world, limit):
    bad = world.broker.publish("pi_1", "pi_1", padding="9" * 900)
    others = [world.broker.publish(f"pi_{n}", f"pi_{n}") for n in range(2, 30)]
    world.broker.refuses = lambda output: len(output.value or b"") > limit
    async with world.running():
        await world.until(lambda: len(world.broker.outcomes()) == 29)
        await world.until(lambda: len(world.broker.attempts) == 1)
    outcomes = world.broker.outcomes()
    assert outcomes[bad] == ("dead_lettered", "MSG_SIZE_TOO_LARGE")
    assert {outcomes[other] for other in others} == {("posted", "MSA_AA")}
    assert sorted(world.receiver.received) == sorted(f"pi_{n}" for n in range(2, 30))
    (letter,) = world.broker.letters()
    assert letter["hop"] == b"P:0:0"
    (value,) = [output.value for output in world.broker.committed if output.topic == catalog.DLQ]
    # Where even the event alone is too large, the hop says where it is.
    assert (value == b"") == (limit == 1000)


async def test_a_record_that_cannot_be_made_smaller_stops_the_deliverer(world):
    world.broker.publish("pi_1", "pi_1")
    world.broker.refuses = lambda output: output.topic.startswith("attempts.")
    with pytest.raises(LedgerRefused):
        await asyncio.wait_for(world.build().run(), 20)
    assert world.receiver.received == []


class AskedTransport(JudgingTransport):
    """Can be asked; ``findings`` come first, then nothing is ever there."""

    def __init__(self, answers, findings):
        super().__init__(answers)
        self.findings = findings
        self.asked = []

    async def find(self, request, first_write_at, before_write):
        before_write()
        assert first_write_at > 1_600_000_000_000
        self.asked.append(request.control_id)
        finding = self.findings.pop(0) if self.findings else Absent()
        if isinstance(finding, Exception):
            raise finding
        return finding


def make_asked(target):
    head = HttpHead(
        sandbox="", production="", rates=(), credential=lambda _settings, _url: use_nothing(),
        examine=lambda *_: None, look_up=LookUp(ask=lambda request, *_: request, read=lambda *_: None),
    )  # fmt: skip
    return replace(target, classify=lambda _settings: TargetClass.C, http=head)


@pytest.mark.parametrize("finding", [Found("doc-1"), Absent(), Failure(FailureKind.UNAVAILABLE, "CONNECT_FAILED")])
async def test_class_c_is_asked_before_it_is_posted_again(world, finding):
    event_id = world.broker.publish("pi_1", "pi_1")
    transport = AskedTransport([Answer(FailureKind.AMBIGUOUS, "HTTP_502")], [finding])
    async with world.running(target=make_asked(world.target), transport=lambda _settings: transport):
        await world.until(world.broker.outcomes)
    is_found = isinstance(finding, Found)
    assert world.broker.outcomes() == {event_id: ("posted", "SEEN_THERE" if is_found else "HTTP_200")}
    assert len(transport.sent) == (1 if is_found else 2)
    assert len(transport.asked) == (2 if isinstance(finding, Failure) else 1)
    assert world.broker.attempts == {}


async def test_an_old_lease_withdraws_a_look_up(world):
    world.broker.publish("pi_1", "pi_1")
    transport = AskedTransport([Answer(FailureKind.AMBIGUOUS, "HTTP_502")], [])
    async with world.running(target=make_asked(world.target), transport=lambda _settings: transport):
        await world.until(lambda: transport.sent)
        world.broker.heartbeat_age = 60.0
        await asyncio.sleep(0.2)
        assert transport.asked == []
        world.broker.heartbeat_age = 0.0
        await world.until(world.broker.outcomes)
    assert len(transport.asked) == 1


async def test_class_c_without_a_look_up_is_refused_at_the_start(world):
    with pytest.raises(LookUpMissing, match="class C"):
        world.build(target=replace(world.target, classify=lambda _settings: TargetClass.C))


@pytest.mark.parametrize("is_answered", [True, False])
async def test_partitions_that_are_taken_away_wait_for_answers_and_write_nothing_more(world, is_answered):
    ids = [world.broker.publish(f"pi_{n}", f"pi_{n}") for n in range(6)]
    answer = asyncio.Event()

    class Slow:
        """Says that it wrote, and answers when told."""

        call_deadline = 0.3
        connections = 2

        def __init__(self, _settings):
            self.written = []

        async def send(self, request, before_write):
            before_write()
            self.written.append(request)
            await answer.wait()
            return Answer(None, "AA")

        async def close(self):
            pass

    slow = Slow(None)
    async with world.running(transport=lambda _settings: slow) as runner:
        await world.until(lambda: len(slow.written) == 2)
        asyncio.get_running_loop().call_later(0.05, answer.set if is_answered else lambda: None)
        world.broker.owned = False
        await world.until(lambda: world.broker.last_work is not None)
        answer.set()
        await world.until(lambda: not runner._calls.under_way)
    assert len(slow.written) == 2
    work = world.broker.last_work
    entries = {o.key.decode(): o.value for o in work.outputs if o.topic.startswith("attempts.")}
    states = {event_id: decode_entry(value).state for event_id, value in entries.items() if value is not None}
    # What was durable and not written is no doubt of the next owner.
    assert {states.get(event_id) for event_id in ids[2:]} <= {"RETRY_AT", None}
    assert "IN_FLIGHT" not in states.values()
    assert work.positions == {PAYMENTS: 2 if is_answered else 0}
    reported = [output for output in work.outputs if output.topic == catalog.DELIVERIES]
    assert len(reported) == (2 if is_answered else 0)

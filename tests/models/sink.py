"""Deliverers over the broker in memory, a network that keeps requests, targets of every class, and time by hand.

The runner, its ledger, group consumer and transactions are the shipped ones. Nothing here moves unless a story says so:
time stands still, and a request does what the story wants of it.
"""

from __future__ import annotations

import asyncio
import contextlib
import io
import json
from collections import Counter, defaultdict
from dataclasses import dataclass
from pathlib import Path

import fastavro

from identity.resolution import Known
from schemas import wire
from schemas.events import Decision, MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.keys import build_event_id
from schemas.money import Money
from schemas.tenancy import Authority, Facility, Tenancy
from sinks.contract import Absent, Answer, Found, HttpHead, LookUp, Request, Target, TargetClass, TargetSettings
from sinks.policy import Moment
from sinks.runner import Runner
from telemetry.metrics import Metrics
from tests.models.kafka import Death, Kafka
from topics import catalog
from topics.cluster import KafkaSettings

FOLDER = Path(__file__).parents[2] / "schemas"
GROUP = "remitstream.deliver.t"
ATTEMPTS = "attempts.t"
DEADLINE, SESSION, WINDOW = 10.0, 45.0, 3600.0
TENANCY = Tenancy(
    tenant="riverside",
    facilities=(
        Facility(
            id="north", time_zone="America/Chicago", default_authority="NORTH", authorities=(Authority(name="NORTH"),)
        ),
    ),
)
X0, Y0, X1 = ("x0", "x", "capture"), ("y0", "y", "capture"), ("x1", "x", "refund")
"""A parent, one of another entity, and the parent's child: (object id, root, kind)."""


class Registry:
    """Schema id 1 is the outcome, 2 the event, 3 a person's decision."""

    def find_id(self, subject, schema):
        return 1

    def find_schema(self, number):
        return wire.load_schema({1: "delivery_outcome", 2: "money_event", 3: "decision"}[number])


class Patients:
    async def resolve(self, references):
        return [Known(reference) for reference in references]


@dataclass(eq=False)
class Sent:
    """A request on the wire: applied when the network says so, whoever still waits for its answer."""

    name: str
    body: bytes
    key: str


class Site:
    """The target, by class: what it does with a request it gets. ``wrong`` holds what must never happen."""

    def __init__(self, kind):
        self.kind = kind
        self.applied = []
        self.keys = {}
        self.wrong = []

    def take(self, sent):
        if self.kind == "A":
            if sent.key in self.keys:
                if self.keys[sent.key] != sent.body:
                    self.wrong.append(f"the key of {sent.name} came again with other bytes")
                return
            self.keys[sent.key] = sent.body
        if sent.name == "x0" and "x1" in self.applied and self.kind == "BE":
            self.wrong.append("an older state of x overwrote a later one")
        if sent.name == "x1" and "x0" not in self.applied:
            self.wrong.append("x1 came before x0")
        if self.kind in ("B", "BE") and sent.name in self.applied:
            return
        if sent.name in self.applied:
            self.wrong.append(f"{sent.name} was applied twice")
        self.applied.append(sent.name)

    def forget_keys(self):
        """The window of the idempotency keys is over."""
        self.keys.clear()


class Wire:
    """The transport of one process. The story's ``plan`` says for each request of a name what becomes of it, in turn.

    ``ok``: applied and answered. ``late``: no answer by the deadline; the target gets it when the story delivers it.
    ``lost``: applied, the answer is lost. ``reject``: refused. ``hang``: no end until the story lets go. ``held``: not
    looked at and not written until the story lets go, then as ``late`` or ``ok``.
    """

    connections = 4

    def __init__(self, story, deadline):
        self.story = story
        self.call_deadline = deadline

    async def send(self, request, before_write):
        story, name = self.story, request.reference
        fate = story.plan[name].pop(0) if story.plan[name] else "ok"
        story.begun.append(name)
        if fate.startswith("held"):
            story.holding.append(name)
            await story.gates[name].wait()
            fate = fate.partition(" ")[2]
        before_write()
        sent = Sent(name, request.body, request.control_id)
        story.written.append(sent)
        if fate == "hang":
            await story.gates[name].wait()
            raise Failure(FailureKind.AMBIGUOUS, "NO_ANSWER")
        if fate == "late":
            story.wire.append(sent)
        elif fate in ("ok", "lost"):
            story.site.take(sent)
        if fate in ("late", "lost"):
            raise Failure(FailureKind.AMBIGUOUS, "NO_ANSWER")
        return Answer(FailureKind.REJECTED, "NO") if fate == "reject" else Answer(None, "OK", "there")

    async def find(self, request, first_write_at, before_write):
        before_write()
        self.story.asked.append(request.reference)
        return Found("there") if request.reference in self.story.site.applied else Absent()

    async def close(self):
        """Nothing is open."""


def build_target(story, kind):
    head = HttpHead(
        sandbox="https://target.example",
        production="https://target.example",
        credential=lambda settings, url: None,
        rates=(),
        examine=lambda response, request, settings: None,
        look_up=LookUp(ask=lambda *_: None, read=lambda *_: None) if kind == "C" else None,
    )
    return Target(
        name="t",
        display_name="T",
        status="test",
        documentation="",
        transport="http",
        settings=TargetSettings,
        classify=lambda settings: TargetClass(kind[0]),
        routes=lambda event, settings: True,
        freeze=lambda event, context, settings: Request(
            f"mapping {story.mapping}: {event.object_id}".encode(), f"key-{event.object_id}", event.object_id
        ),
        http=head,
        capabilities={},
        window=lambda settings: WINDOW,
    )


class Story:
    """One target, its site, the topics, and the processes that deliver."""

    def __init__(self, monkeypatch, kind, *events):
        self.patch = monkeypatch.setattr
        self.kafka = Kafka()
        self.kafka.install(monkeypatch)
        self.site = Site(kind)
        self.kind = kind
        self.steady, self.wall = 1000.0, 1_770_000_000_000
        self.plan = defaultdict(list)
        self.gates = defaultdict(asyncio.Event)
        self.begun, self.holding, self.written, self.wire, self.asked = [], [], [], [], []
        self.mapping = 0
        self.deadline = DEADLINE
        self.out_of_touch = set()
        """Processes whose coordinator has not heard from them."""
        self.fresh_for_ever = False
        self.runners = {}
        self.tasks = {}
        monkeypatch.setattr("sinks.runner._IDLE_WAIT", 0.002)
        monkeypatch.setattr("sinks.runner.random.uniform", lambda *_: 0.0)
        monkeypatch.setattr("topics.group.GroupConsumer.last_heartbeat", property(self._find_heartbeat))
        for event in events:
            self.publish(*event)

    def _find_heartbeat(self, consumer):
        is_lost = any(runner._consumer is consumer for n, runner in self.runners.items() if n in self.out_of_touch)
        return float("-inf") if is_lost and not self.fresh_for_ever else self.steady

    def publish(self, name, root, kind):
        key = f"stripe:acct:{kind}:{name}"
        event = MoneyEvent(
            event_id=build_event_id(key),
            transaction_key=key,
            tenant="riverside",
            facility="north",
            source="stripe",
            account="acct",
            kind=kind,
            status="succeeded",
            money=Money(100, "USD", 2),
            occurred_at=1,
            received_at=1,
            object_id=name,
            root=root,
            source_event_id="e",
            patient=Reference("NORTH", "MR", f"N-{root}"),
            mapping_version="1",
            origin="t:0:0",
        )
        value = wire.Encoder("money_event", 2).encode(event)
        self.kafka.append(catalog.PAYMENTS, root.encode(), value, [("event_id", event.event_id.encode())])

    def decide(self, event_id, **about):
        """A person's decision, made now, in its topic."""
        decision = Decision(
            decision_id=str(self.wall),
            target="t",
            event_id=event_id,
            topic=catalog.PAYMENTS,
            reference="",
            decided_at=self.wall,
            **about,
        )
        value = wire.Encoder("decision", 3).encode(decision)
        self.kafka.append("decisions.t", event_id.encode(), value)

    # Processes.

    async def start(self, name):
        story = self

        class Clock:
            def now(self):
                return Moment(story.steady, story.wall)

        runner = Runner(
            KafkaSettings(session_timeout_seconds=int(SESSION)),
            build_target(self, self.kind),
            TargetSettings(name="t", connector="t", facilities=("north",)),
            TENANCY,
            registry=Registry(),
            identities=Patients(),
            instance=name,
            transport=Wire(self, self.deadline),
            metrics=Metrics(strict=True),
            clock=Clock(),
            draw=lambda: 0.0,
        )
        self.runners[name] = runner
        self.tasks[name] = asyncio.create_task(self._run(name, runner))
        await self.until(lambda: runner._consumer.number or runner._consumer._consumer is not None)
        return runner

    async def _run(self, name, runner):
        with contextlib.suppress(Death):
            await runner.run()

    async def kill(self, name):
        """``kill -9``: nothing is committed or told any more; what is on the wire stays there."""
        runner = self.runners.pop(name)
        consumer = runner._consumer
        consumer._transactor._producer.is_dead = True
        consumer._consumer.close()
        consumer._closed = True
        task = self.tasks.pop(name)
        for call in list(runner._calls._running):
            call.cancel()
        self.patch(runner, "_close", _do_nothing)
        task.cancel()
        await asyncio.gather(task, return_exceptions=True)
        consumer._thread.shutdown(wait=False)
        consumer._loaders.shutdown(wait=False, cancel_futures=True)
        self.kafka.time_out(f"{GROUP}.{name}.0")

    def give_to(self, name, *, deaf=()):
        """A rebalance; deaf processes do not learn of it."""
        for one in deaf:
            self.runners[one]._consumer._consumer.is_deaf = True
        self.kafka.rebalance(GROUP, f".{name}.")

    async def take_over(self, name, *, deaf=()):
        """A process starts, has everything, and has loaded it."""
        await self.start(name)
        self.give_to(name, deaf=deaf)
        await self.until(lambda: self.has_loaded(name))

    def has_loaded(self, name):
        return any(shard.topic == catalog.PAYMENTS for shard in self.runners[name]._shards)

    async def close(self):
        for gate in self.gates.values():
            gate.set()
        for runner in self.runners.values():
            runner._consumer._consumer.is_deaf = False
            runner.stop()
        self.steady += 1e6
        await asyncio.wait_for(asyncio.gather(*self.tasks.values(), return_exceptions=True), 20)

    # Time and waiting.

    def wait(self, seconds):
        """Nothing happens for so long."""
        self.steady += seconds
        self.wall += int(seconds * 1000)

    async def until(self, condition, seconds=10):
        """Let everybody work until this holds."""
        until = asyncio.get_running_loop().time() + seconds
        while not condition():
            for name, task in self.tasks.items():
                assert not task.done() or task.cancelled(), f"{name} ended: {task.exception()}"
            assert asyncio.get_running_loop().time() < until, (
                f"not reached: {self.list_outcomes()} {self.list_entries()} applied {self.site.applied}"
            )
            await asyncio.sleep(0.001)

    async def settle(self, cycles=8):
        """Let everybody do what can be done at this time: so many cycles each, but for who is held up by the story."""
        loop = asyncio.get_running_loop()
        consumers = [runner._consumer for runner in self.runners.values()]
        wanted = {consumer: consumer._consumer.polls + cycles for consumer in consumers}
        last, moved_at = None, loop.time()
        while loop.time() - moved_at < 0.25:
            left = [c for c in consumers if c._consumer.polls < wanted[c] or not self._is_loaded(c)]
            if not left:
                return
            now = [c._consumer.polls for c in left]
            if now != last:
                last, moved_at = now, loop.time()
            await asyncio.sleep(0.001)

    def _is_loaded(self, consumer):
        membership = self.kafka.groups[GROUP]
        return membership.owner is not consumer._consumer or consumer._consumer.is_deaf or consumer.is_ready()

    async def live(self, seconds, step=13.0):
        """Time passes, and everybody works meanwhile."""
        while seconds > 0:
            self.wait(min(step, seconds))
            seconds -= step
            await self.settle()

    def deliver(self):
        """The network hands over what it kept."""
        kept, self.wire = self.wire, []
        for sent in kept:
            self.site.take(sent)

    # The judge.

    def list_outcomes(self):
        """Outcomes in `deliveries`, by object id, in order."""
        found = defaultdict(list)
        for _, entry in self.kafka.read(catalog.DELIVERIES):
            record = _decode("delivery_outcome", entry.value)
            found[self._name(record["event_id"])].append(record["outcome"])
        return dict(found)

    def _name(self, event_id):
        for _, entry in self.kafka.read(catalog.PAYMENTS):
            if dict(entry.headers)["event_id"].decode() == event_id:
                return _decode("money_event", entry.value)["object_id"]
        raise KeyError(event_id)

    def list_entries(self):
        """States in the ledger's changelog, by object id."""
        last = {entry.key.decode(): entry.value for _, entry in self.kafka.read(ATTEMPTS)}
        return {self._name(key): read_state(value) for key, value in last.items() if value is not None}

    def get_frontier(self):
        values = [
            int(e.value)
            for _, e in self.kafka.read(catalog.FRONTIERS)
            if e.key.decode() == f"{GROUP}|id-{catalog.PAYMENTS}|0"
        ]
        return values[-1] if values else 0

    def judge(self):
        """Every promise that does not hold when all is quiet."""
        wrong = list(self.site.wrong)
        outcomes, entries, applied = self.list_outcomes(), self.list_entries(), Counter(self.site.applied)
        for _, entry in self.kafka.read(catalog.PAYMENTS):
            name = self._name(dict(entry.headers)["event_id"].decode())
            told = outcomes.get(name, [])
            final = [outcome for outcome in told if outcome in ("posted", "rejected")]
            if len(final) > 1:
                wrong.append(f"{name} has two final outcomes")
            elif final == ["posted"] and not applied[name]:
                wrong.append(f"{name} is said to be posted and is not")
            elif final == ["rejected"] and applied[name]:
                wrong.append(f"{name} is said to be rejected and is posted")
            elif not final and entries.get(name) not in ("PARKED", "UNKNOWN"):
                wrong.append(f"{name} has neither outcome nor anybody who cares")
        return sorted(set(wrong))


async def _do_nothing():
    """The process is gone."""


def read_state(value):
    """State of an entry: the first member of a MessagePack array, a short text."""
    begin = next(place for place in range(1, 4) if 0xA0 <= value[place] < 0xC0)
    return value[begin + 1 : begin + 1 + (value[begin] & 0x1F)].decode()


def _decode(name, value):
    schema = fastavro.parse_schema(json.loads((FOLDER / f"{name}.avsc").read_text("utf-8")))
    return fastavro.schemaless_reader(io.BytesIO(value[5:]), schema)

"""One partition of canonical events, a broker that fences, a target of any class, and the books that judge.

What may go wrong is drawn from a seed: answers lost after the target has applied a request, requests lost or applied
late, refusals for now and for good, outages, calls that stand still before their write, processes that are killed, and
processes that lose their session without noticing.
"""

from __future__ import annotations

import asyncio
import collections
import random
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

from identity.resolution import Known
from schemas import wire
from schemas.events import DeliveryOutcome, MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.money import Money
from schemas.tenancy import Authority, Facility, Tenancy
from sinks.contract import Absent, Answer, Found, HttpHead, LookUp, Request, Target, TargetClass, use_nothing
from sinks.policy import Moment
from sinks.transport import CallSettings
from topics import catalog
from topics.group import Polled, StaleAssignment
from topics.reading import Record
from topics.transaction import TransactionAborted

TOPIC = catalog.PAYMENTS
PARTITION = (TOPIC, 0)
DEADLINE, SESSION = 10.0, 45.0
START = 1_700_000_000_000
TENANCY = Tenancy(
    tenant="acme",
    facilities=(
        Facility(id="north", time_zone="UTC", default_authority="NORTH", authorities=(Authority(name="NORTH"),)),
    ),
)
PATIENT = Reference("NORTH", "MR", "N1")


@dataclass(kw_only=True)
class Faults:
    """Chances per call (the sum stays below 1) and mean seconds between faults of whole processes (0: never)."""

    timeout_after_success: float = 0.0
    timeout_unapplied: float = 0.0
    refused_for_now: float = 0.0
    rejected: float = 0.0
    down: float = 0.0
    stalled: float = 0.0
    """Stands still between being begun and the last look, for up to four sessions."""
    frozen: float = 0.0
    """Stands still between the last look and the write, for up to four sessions: the documented hole."""
    down_until: float = 0.0
    """Seconds for which nobody can connect."""
    blocked: frozenset[int] = frozenset()
    """Events whose first request is written, never arrives, and is never answered."""
    aborts: float = 0.0
    """Chance per transaction."""
    kill_every: float = 0.0
    lose_session_every: float = 0.0


class Virtual:
    """The runner's clock, on the loop's."""

    def now(self) -> Moment:
        """Virtual steady and wall time."""
        steady = asyncio.get_running_loop().time()
        return Moment(steady, START + int(steady * 1000))


class Registry:
    """Schema id 1 is the outcome, 2 the event."""

    def find_id(self, _subject: str, _schema: str) -> int:
        """The outcome's."""
        return 1

    def find_schema(self, schema_id: int) -> str:
        """By id."""
        return wire.load_schema({1: "delivery_outcome", 2: "money_event"}[schema_id])


class Patients:
    """Everybody is known."""

    async def resolve(self, refs: Any) -> list[Any]:
        """Himself."""
        return [Known(ref) for ref in refs]


def name_event(number: int) -> str:
    """Event id of the event at that offset."""
    return f"{number:032x}"


@dataclass
class Books:
    """What really happened at the target, in the world's own words."""

    applied: collections.Counter[int] = field(default_factory=collections.Counter)
    """Applications by event number; a repeated key or upsert is none."""
    bodies: dict[int, bytes] = field(default_factory=dict)
    rejected: set[int] = field(default_factory=set)
    blocked: set[int] = field(default_factory=set)
    wrong_bytes: int = 0
    out_of_order: int = 0
    timeouts_after_success: int = 0
    calls: int = 0
    look_ups: int = 0
    kills: int = 0
    lost_sessions: int = 0


class World:
    """``events`` events of ``entities`` entities, dealt round; each entity's in the order of their numbers."""

    def __init__(self, target_class: TargetClass, events: int, entities: int, faults: Faults, seed: int) -> None:
        self.target_class = target_class
        self.events = events
        self.entities = entities
        self.faults = faults
        self.random = random.Random(seed)
        self.books = Books()
        self.attempts: dict[bytes, bytes] = {}
        self.frontier = 0
        self.outcomes: dict[str, str] = {}
        self.told: collections.Counter[str] = collections.Counter()
        """All outcomes that were told, also those that another one followed."""
        self.final_twice = 0
        self.generation = 0
        self.owner: Group | None = None
        self._encoder = wire.Encoder("money_event", 2)
        self._decoder = wire.Decoder("delivery_outcome", DeliveryOutcome, Registry().find_schema)
        self.network: set[asyncio.Task[Any]] = set()

    # The canonical topic and the ledger's, as the broker keeps them.

    def read(self, first: int, count: int, known: int) -> list[Record]:
        """Canonical records from an offset on, made as they are read; empty where the reader knows them already."""
        return [self._build_record(number, number < known) for number in range(first, min(first + count, self.events))]

    def _build_record(self, number: int, is_known: bool) -> Record:
        root = f"root-{number % self.entities}"
        if is_known:
            # After a rewind: nobody may look into it again.
            return Record(TOPIC, 0, number, root.encode(), b"", [], 1)
        event = MoneyEvent(
            event_id=name_event(number), transaction_key=str(number), tenant="acme", facility="north", source="s",
            account="a", kind="capture", status="succeeded", money=Money(100, "USD", 2), occurred_at=1, received_at=1,
            object_id=str(number), root=root, source_event_id="e", patient=PATIENT, mapping_version="1", origin="t:0:0",
        )  # fmt: skip
        return Record(TOPIC, 0, number, root.encode(), self._encoder.encode(event), [], 1)

    def read_ledger(self, *_: Any, **__: Any) -> list[Record]:
        """The compacted changelog."""
        return [Record("attempts.sim", 0, 0, key, value, [], 1) for key, value in self.attempts.items()]

    def commit(self, outputs: Any, frontier: int) -> None:
        """A transaction stands."""
        for output in outputs:
            if output.topic.startswith("attempts."):
                if output.value is None:
                    self.attempts.pop(output.key, None)
                else:
                    self.attempts[output.key] = output.value
            elif output.topic == catalog.DELIVERIES:
                self._note(self._decoder.decode(output.value))
        self.frontier = frontier

    def _note(self, outcome: DeliveryOutcome) -> None:
        final = {"posted", "rejected", "dead_lettered"}
        if outcome.outcome in final and self.outcomes.get(outcome.event_id) in final:
            self.final_twice += 1
        self.outcomes[outcome.event_id] = outcome.outcome
        self.told[outcome.outcome] += 1

    # The target.

    def apply(self, request: Request) -> Answer:
        """The target carries out a request that reached it."""
        number, books = int(request.control_id, 16), self.books
        if number in books.rejected:
            return Answer(FailureKind.REJECTED, "NO")
        before = number - self.entities
        if before >= 0 and not books.applied[before]:
            books.out_of_order += 1
        repeated = bool(books.applied[number])
        if repeated and self.target_class is TargetClass.A:
            books.wrong_bytes += books.bodies[number] != request.body
        elif not (repeated and self.target_class is TargetClass.B):
            books.applied[number] += 1
            books.bodies[number] = request.body
        return Answer(None, "OK", f"doc-{number}")

    # Judgement.

    def judge(self) -> dict[str, int]:
        """Counts by the names of the promises; all but the last group must be zero."""
        posted = [number for number in range(self.events) if self.outcomes.get(name_event(number)) == "posted"]
        known = {"posted", "unknown", "rejected", "parked", "dead_lettered"}
        silent = [
            number
            for number, times in self.books.applied.items()
            if times and self.outcomes.get(name_event(number)) not in {"posted", "unknown"}
        ]
        return {
            "doubled": sum(times - 1 for times in self.books.applied.values() if times > 1),
            "lost": sum(self.outcomes.get(name_event(number)) not in known for number in range(self.events)),
            "posted_but_absent": sum(not self.books.applied[number] for number in posted),
            "silent": len(silent),
            "out_of_order": self.books.out_of_order,
            "wrong_bytes": self.books.wrong_bytes,
            "final_twice": self.final_twice,
        }

    def count_progress(self) -> tuple[int, ...]:
        """Changes as long as anything happens."""
        return (self.frontier, len(self.outcomes), self.books.calls, self.books.look_ups)

    def is_settled(self) -> bool:
        """Whether nothing is left to the machine: everything is posted, or waits for a person or behind one."""
        if self.frontier < self.events or len(self.outcomes) < self.events:
            return False
        return all(
            outcome != "parked" or self._is_behind_stopped(int(event_id, 16))
            for event_id, outcome in self.outcomes.items()
        )

    def _is_behind_stopped(self, number: int) -> bool:
        earlier = range(number % self.entities, number, self.entities)
        return any(self.outcomes[name_event(n)] in {"unknown", "rejected", "dead_lettered"} for n in earlier)

    def count_outcomes(self) -> collections.Counter[str]:
        """Last outcomes of all events."""
        return collections.Counter(self.outcomes.values())


class NobodyDecides:
    """The feed of people's decisions, empty."""

    def __init__(self, *_: Any) -> None:
        pass

    def read(self, _partitions: Any) -> list[Any]:
        return []

    def close(self) -> None:
        """Nothing is open."""


class Group:
    """The part of ``GroupConsumer`` that the runner uses. One instance at a time owns the partition."""

    world: World

    def __init__(self, _kafka: Any, *, load: Any, release: Any, **_: Any) -> None:
        self.world = Group.world
        self._load, self._release = load, release
        self.generation = -1
        self.is_heard = True
        """Whether the coordinator hears this member."""
        self._heard_at = 0.0
        self.is_paused = False
        self.position = 0
        self._known = 0
        self.topic_ids = {TOPIC: "P"}
        self.hindrance = None

    @property
    def is_owner(self) -> bool:
        return self.generation == self.world.generation

    @property
    def number(self) -> int:
        return self.generation

    @property
    def last_heartbeat(self) -> float:
        if self.is_heard:
            self._heard_at = asyncio.get_running_loop().time()
        return self._heard_at

    async def start(self) -> None:
        self._heard_at = asyncio.get_running_loop().time()
        self.world.generation += 1
        self.generation = self.world.generation
        self.world.owner = self
        self._load(*PARTITION)
        self.position = self.world.frontier

    def lose(self) -> None:
        """It learns that the partition is gone."""
        self._release(*PARTITION)

    def is_ready(self) -> bool:
        return True

    def frontiers(self) -> dict[Any, int]:
        # One that has lost its session does not know it yet.
        return {PARTITION: self.world.frontier} if self.is_owner or not self.is_heard else {}

    async def poll(self, max_records: int, wait: float) -> Polled[Record]:
        found = [] if self.is_paused or not self.is_owner else self.world.read(self.position, max_records, self._known)
        # Coarser than the real one: idle turns cost the machine's time, and none of the world's.
        await asyncio.sleep(0.001 if found else 25 * wait)
        if not self.is_owner:
            return Polled(self.generation, {})
        self.position += len(found)
        self._known = max(self._known, self.position)
        return Polled(self.generation, {PARTITION: found} if found else {})

    async def call(self, function: Any, *arguments: Any) -> Any:
        return function(*arguments)

    async def commit(self, number: int, outputs: Any, positions: Any) -> None:
        await asyncio.sleep(0.003)
        if not self.is_owner or number != self.generation:
            raise StaleAssignment
        if self.world.random.random() < self.world.faults.aborts:
            await self.rewind()
            raise TransactionAborted("SIMULATED")
        self.world.commit(outputs, positions[PARTITION])

    async def rewind(self) -> None:
        self.position = self.world.frontier

    async def pause(self, _partitions: Any = None) -> None:
        self.is_paused = True

    async def resume(self, _partitions: Any = None) -> None:
        self.is_paused = False

    async def close(self) -> None:
        """Nothing is open."""


class Wire:
    """The connection of one process to the target. What it wrote travels on when the process is gone."""

    call_deadline = DEADLINE

    def __init__(self, world: World, connections: int = 64) -> None:
        self.world = world
        self.connections = connections

    async def send(self, request: Request, before_write: Any) -> Answer:
        world, faults, draw = self.world, self.world.faults, self.world.random.random
        chance = draw()
        if chance < faults.stalled:
            await asyncio.sleep(draw() * 4 * SESSION)
        chance -= faults.stalled
        is_down = asyncio.get_running_loop().time() < faults.down_until
        if 0 <= chance < faults.down or is_down:
            await asyncio.sleep(0.001)
            raise Failure(FailureKind.UNAVAILABLE, "CONNECT_FAILED")
        chance -= faults.down
        before_write()
        world.books.calls += 1
        number = int(request.control_id, 16)
        if number in faults.blocked and number not in world.books.blocked:
            world.books.blocked.add(number)
            await asyncio.Event().wait()
        if 0 <= chance < faults.frozen:
            await asyncio.sleep(draw() * 4 * SESSION)
        chance -= faults.frozen
        if 0 <= chance < faults.timeout_after_success:
            # Applied at any time before the deadline; the answer is lost.
            self._travel(request, draw() * DEADLINE * 0.999)
            world.books.timeouts_after_success += 1
            await asyncio.sleep(DEADLINE)
            raise Failure(FailureKind.AMBIGUOUS, "NO_ANSWER")
        chance -= faults.timeout_after_success
        if 0 <= chance < faults.timeout_unapplied:
            await asyncio.sleep(DEADLINE)
            raise Failure(FailureKind.AMBIGUOUS, "NO_ANSWER")
        chance -= faults.timeout_unapplied
        if 0 <= chance < faults.refused_for_now:
            await asyncio.sleep(0.02)
            return Answer(FailureKind.UNAVAILABLE, "BUSY")
        chance -= faults.refused_for_now
        if 0 <= chance < faults.rejected and not world.books.applied[number]:
            world.books.rejected.add(number)
        return await asyncio.shield(self._travel(request, 0.01 + 0.04 * draw()))

    async def find(self, request: Request, _first_write_at: int, before_write: Any) -> Any:
        await asyncio.sleep(0.005)
        before_write()
        self.world.books.look_ups += 1
        await asyncio.sleep(0.02)
        number = int(request.control_id, 16)
        return Found(f"doc-{number}") if self.world.books.applied[number] else Absent()

    async def close(self) -> None:
        """Nothing to close: what is on the way stays there."""

    def _travel(self, request: Request, seconds: float) -> asyncio.Task[Answer]:
        async def arrive() -> Answer:
            await asyncio.sleep(seconds)
            return self.world.apply(request)

        task = asyncio.create_task(arrive())
        self.world.network.add(task)
        task.add_done_callback(self.world.network.discard)
        return task


def _freeze(event: MoneyEvent, context: Any, _settings: Any) -> Request:
    return Request(f"{event.event_id} at {context.frozen_at}".encode(), event.event_id, event.event_id[-16:])


def _no_examination(*_: Any) -> None:
    return None


def build_target(target_class: TargetClass) -> Target:
    """A connector of that class; the world's wire does without its HTTP."""
    look_up = LookUp(ask=lambda request, _at, _settings: request, read=_no_examination)
    return Target(
        name="simulated",
        display_name="Simulated",
        status="test",
        documentation="https://example.com",
        transport="http",
        settings=CallSettings,
        classify=lambda _settings: target_class,
        window=lambda _settings: 86_400.0 * 365,
        routes=lambda _event, _settings: True,
        freeze=_freeze,
        http=HttpHead(
            sandbox="",
            production="",
            credential=lambda _settings, _url: use_nothing(),
            rates=(),
            examine=_no_examination,
            look_up=look_up if target_class is TargetClass.C else None,
        ),
        capabilities={},
    )


SETTINGS = CallSettings(name="sim", connector="simulated", facilities=("north",))
KAFKA = SimpleNamespace(session_timeout_seconds=SESSION)

"""Delivers canonical events to one target instance: effectively once, in order per entity, several entities at a time.

One cycle: poll; take the answers of finished calls; admit new events; freeze what may start; commit everything as one
transaction (ledger entries, outcomes, dead letters, frontiers, offsets); only then start the calls. Answers wait for
the next cycle, so the cost of a commit is shared by all that happened meanwhile. ``sinks.ledger`` holds the rules.

Just before a request is written, a call looks once more: the partition is still ours, the group's coordinator heard
from us within half the session timeout, the key's window is open. If not, the call is withdrawn.

The documented hole: a process frozen between that look and the socket write, for longer than call deadline and session
timeout together, can post a second time at a target that does not recognise the repetition.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import threading
import time
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

import msgspec

from identity.resolution import Known
from schemas.events import Outcome
from schemas.failure import Failure, FailureKind, FatalError, TemporaryError
from schemas.wire import load_schema
from sinks import ledger as book
from sinks.availability import Availability
from sinks.contract import Answer, PostingContext, TargetClass
from sinks.ledger import Attempt, Failed, Flush, Ledger, Moment, Policy, Source, State
from sinks.reports import SCHEMA, SUBJECT, Codecs, build_outcome, build_report_letter
from sinks.transport import open_transport
from telemetry.log import get_log
from telemetry.metrics import METRICS, Metric, Metrics
from topics import catalog
from topics.group import GroupConsumer, StaleAssignment
from topics.headers import EVENT_ID, find_header
from topics.reading import Record, read_to_end
from topics.registry import SchemaMissing
from topics.transaction import Output, RecordRefused, TransactionAborted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from identity.resolution import Resolution
    from schemas.events import MoneyEvent, Reference
    from schemas.failure import OperatorError
    from schemas.tenancy import Tenancy
    from sinks.contract import Target, TargetSettings
    from sinks.transport import Transport
    from topics.cluster import KafkaSettings
    from topics.group import Partition
    from topics.registry import Registry

MRN_UNRESOLVED = "MRN_UNRESOLVED"
"""Parked: the patient is unknown or ambiguous just now; asked again later."""
PATIENT_MISSING = "PATIENT_MISSING"

_UNANSWERED_OUTAGE = 3
_BUSY_WAIT = 0.004
_IDLE_WAIT = 0.1


class LedgerUnreadable(FatalError):
    """An entry of the attempt ledger cannot be read."""

    code = "RS330"
    meaning = "An entry of a target's attempt ledger cannot be read; posting without it could post twice."
    default_remedy = "Run the version that wrote it, or ask for help with the named partition; do not delete the topic."


class LedgerRefused(FatalError):
    """The broker refuses a record of a delivery transaction."""

    code = "RS331"
    meaning = "The broker refuses a ledger entry, outcome or dead letter, for example because it is too large."
    default_remedy = "Raise `max.message.bytes` of the named topic; `remitstream topics check` compares the settings."


class Withdrawn(Exception):
    """A call was given up just before its write. ``code`` says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is held at once. ``calls_ahead``: calls made durable per connection, those on the wire included."""

    poll_records: int = 1000
    open_events: int = 20_000
    calls_ahead: int = 8
    calls_ahead_class_d: int = 2
    """Fewer where nothing can be resent: all of them become a person's work when the process is killed."""


class Patients(Protocol):
    """What the runner asks about patients: ``identity.projection.Identities``."""

    async def resolve(self, refs: Sequence[Reference]) -> list[Resolution]:
        """The patients now; raises ``TemporaryError`` when that cannot be decided."""


class Clock:
    """Steady seconds and wall milliseconds of this machine."""

    def now(self) -> Moment:
        """Both, at once."""
        return Moment(time.monotonic(), time.time_ns() // 1_000_000)


@dataclass(eq=False, slots=True)
class _Shard:
    """One owned partition of one canonical topic. ``owned`` turns false, for good, when it is taken away."""

    topic: str
    partition: int
    ledger: Ledger
    owned: bool = True


@dataclass(frozen=True, slots=True)
class _Call:
    shard: _Shard
    attempt: Attempt


class Runner:
    """Delivers to one instance. ``run`` returns after ``stop``, or raises an ``OperatorError``.

    ``registry`` and ``identities`` are asked; ``transport`` replaces the connection (tests). The group is
    ``remitstream.deliver.<instance name>``; ``instance`` and ``slot`` name this process, stable over restarts.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        target: Target,
        settings: TargetSettings,
        tenancy: Tenancy,
        *,
        registry: Registry,
        identities: Patients,
        instance: str,
        slot: int = 0,
        limits: Limits | None = None,
        transport: Transport | None = None,
        metrics: Metrics = METRICS,
        clock: Clock | None = None,
        draw: Callable[[], float] = random.random,
    ) -> None:
        self.name = settings.name
        self.target = target
        self._kafka = kafka
        self._settings = settings
        self._tenancy = tenancy
        self._registry = registry
        self._identities = identities
        self._limits = limits or Limits()
        self._metrics = metrics
        self._clock = clock or Clock()
        self._log = get_log("deliverer", target=self.name)
        self._transport = transport or open_transport(target, settings)
        target_class = target.classify(settings)
        self._policy = Policy(
            target_class=target_class,
            call_deadline=self._transport.call_deadline,
            session_timeout=kafka.session_timeout_seconds,
            window=target.window(settings),
        )
        ahead = self._limits.calls_ahead if target_class in _RESENDABLE else self._limits.calls_ahead_class_d
        self._call_limit = self._transport.connections * ahead
        self._availability = Availability(draw)
        self._attempts_topic = catalog.name_attempts(self.name)
        group = f"remitstream.deliver.{self.name}"
        process = f"{group}.{instance}.{slot}"
        self._consumer = GroupConsumer(
            kafka,
            group=group,
            topics=catalog.CANONICAL_MONEY,
            instance=process,
            transactional_id=process,
            load=self._load,
            release=self._release,
            report=self._report_load,
            keeps_records=True,
        )
        self._codecs: Codecs | None = None
        self._lock = threading.Lock()
        self._loaded: dict[Partition, Ledger] = {}
        self._epochs: dict[Partition, int] = {}
        self._shards: dict[Partition, _Shard] = {}
        self._backlog: deque[_Call] = deque()
        self._running: dict[asyncio.Task[None], _Call] = {}
        self._results: list[tuple[_Call, Answer | Failed]] = []
        self._committed_calls: list[_Call] = []
        self._identity_pause = 0.0
        self._identity_asked_again = 0.0
        self._held: TemporaryError | None = None
        self._failures = 0
        self._unanswered = 0
        self._measured_at = 0.0
        self._is_paused = False
        self._stopping = asyncio.Event()
        self._draining = False

    # For the process that runs it.

    async def run(self) -> None:
        """Deliver until ``stop``. Raises ``OperatorError``; what was under way is settled after the restart."""
        try:
            await self._persist(self._prepare)
            await self._persist(self._consumer.start)
            while not self._stopping.is_set():
                await self._cycle()
            if self._consumer.number:
                await self._drain()
        finally:
            await self._close()

    def stop(self) -> None:
        """Finish: withdraw what is not written, wait for answers, commit, leave the group."""
        self._stopping.set()

    def ready(self) -> tuple[bool, dict[str, str]]:
        """Whether events are being delivered, and if not, why. Safe to call from the event loop at any time."""
        reasons: dict[str, str] = {}
        if not self._consumer.is_ready() or self._codecs is None:
            reasons["group"] = "joining, or loading the ledger"
        if self._held is not None:
            reasons["paused"] = f"{self._held.code} at {self._held.place}"
        if not self._is_lease_fresh():
            reasons["lease"] = "the group's coordinator has not answered lately"
        if not self._availability.is_open:
            reasons["target"] = self._availability.reason
        return not reasons, reasons

    def status(self) -> dict[str, Any]:
        """Numbers for people: events per state, calls on the wire, age of the oldest unfinished event in seconds."""
        oldest: int | None = None
        for shard in list(self._shards.values()):
            since = shard.ledger.find_oldest()
            oldest = since if oldest is None or (since is not None and since < oldest) else oldest
        now = self._clock.now().wall
        return {
            "target": self.name,
            "class": self._policy.target_class.value,
            "states": self._count_states(),
            "calls": len(self._running),
            "oldest_seconds": None if oldest is None else max(0.0, (now - oldest) / 1000),
            "available": self._availability.is_open,
            "paused": self._is_paused,
            "partitions": sorted(f"{topic}[{partition}]" for topic, partition in self._shards),
        }

    def _count_states(self) -> dict[str, int]:
        counts = dict.fromkeys((state.value for state in State if state is not State.DONE), 0)
        for shard in list(self._shards.values()):
            for state, count in shard.ledger.count_states().items():
                counts[state.value] += count
        return counts

    # One cycle.

    async def _prepare(self) -> None:
        schema = load_schema(SCHEMA)
        schema_id = await asyncio.to_thread(self._registry.find_id, SUBJECT, schema)
        if schema_id is None:
            raise SchemaMissing("the schema of outcomes is not registered.", place=SUBJECT)
        self._codecs = Codecs(self._registry, schema_id)

    async def _persist(self, step: Callable[[], Awaitable[None]]) -> None:
        """Take a step of the start, waiting out whatever is temporary."""
        pause = 0.5
        while not self._stopping.is_set():
            try:
                await step()
            except TemporaryError as error:
                self._held = error
                self._log.warning("waiting", code=error.code, place=error.place)
            else:
                self._held = None
                return
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stopping.wait(), pause)
            pause = min(pause * 2, 10.0)

    async def _cycle(self) -> bool:
        """Whether everything decided so far is committed."""
        busy = bool(self._running or self._backlog or self._results)
        polled = await self._consumer.poll(self._limits.poll_records, _BUSY_WAIT if busy else _IDLE_WAIT)
        number, frontiers = await self._consumer.call(self._look)
        moment = self._clock.now()
        await self._follow_assignment(frontiers, moment)
        self._settle(moment)
        if number == polled.number:
            await self._admit(polled.records, moment)
        starting = [] if self._draining else await self._begin(moment)
        if await self._commit(number):
            self._backlog.extend(call for call in [*self._committed_calls, *starting] if call.shard.owned)
            self._committed_calls.clear()
            self._pump()
            is_committed = True
        else:
            self._committed_calls.extend(starting)
            is_committed = False
        await self._throttle()
        self._measure(moment)
        return is_committed

    def _look(self) -> tuple[int, dict[Partition, int]]:
        return self._consumer.number, self._consumer.frontiers()

    async def _follow_assignment(self, frontiers: dict[Partition, int], moment: Moment) -> None:
        """Drop partitions that were taken away, take up those that are loaded."""
        for key in [key for key, shard in self._shards.items() if not shard.owned or key not in frontiers]:
            self._shards.pop(key).owned = False
        for key, frontier in frontiers.items():
            if key in self._shards:
                continue
            with self._lock:
                ledger = self._loaded.pop(key, None)
            if ledger is None:
                await asyncio.to_thread(self._load, *key)
                with self._lock:
                    ledger = self._loaded.pop(key)
            await self._decode_restored(ledger)
            ledger.open(frontier, moment)
            self._shards[key] = _Shard(*key, ledger)
        self._backlog = deque(call for call in self._backlog if call.shard.owned)
        self._committed_calls = [call for call in self._committed_calls if call.shard.owned]

    def _settle(self, moment: Moment) -> None:
        results, self._results = self._results, []
        for call, result in results:
            kind = "ok" if result.kind is None else str(result.kind)
            if kind != "WITHDRAWN":
                self._metrics.add(Metric.ATTEMPTS, 1, target=self.name, kind=kind)
            self._judge_target(result, moment)
            if call.shard.owned:
                call.shard.ledger.settle(call.attempt, result, moment)
        if not self._availability.is_open:
            # What has not begun waits for the target without being IN_FLIGHT.
            while self._backlog:
                call = self._backlog.popleft()
                call.shard.ledger.settle(call.attempt, Failed("WITHDRAWN", "TARGET_UNAVAILABLE"), moment)

    def _judge_target(self, result: Answer | Failed, moment: Moment) -> None:
        was_open = self._availability.is_open
        is_outage = isinstance(result, Failed) or result.is_outage
        if result.kind is FailureKind.AMBIGUOUS:
            # One event may make a target hang or fall over; several in a row are an outage, and each costs an unknown
            # outcome.
            self._unanswered += 1
            if self._unanswered >= _UNANSWERED_OUTAGE:
                self._availability.fail(moment.steady, result.code)
        elif isinstance(result, Answer):
            self._unanswered = 0
        is_down = result.kind is FailureKind.UNAVAILABLE and is_outage
        if is_down or result.kind in (FailureKind.AUTH, FailureKind.RATE_LIMITED):
            wait = result.retry_after if isinstance(result, Answer) else 0.0
            self._availability.fail(moment.steady, result.code, wait)
        elif isinstance(result, Answer) and result.kind is not FailureKind.AMBIGUOUS:
            self._availability.succeed()
        if was_open != self._availability.is_open:
            self._metrics.set(Metric.TARGET_OPEN, float(self._availability.is_open), target=self.name)
            self._log.warning(
                "target_available" if self._availability.is_open else "target_unavailable", reason=result.code
            )

    async def _admit(self, records: Sequence[Record], moment: Moment) -> None:
        for record in records:
            shard = self._shards.get((record.topic, record.partition))
            if shard is None or record.offset < shard.ledger.position:
                continue
            event, failure = await self._decode(record.value or b"")
            event_id = event.event_id if event else find_header(record.headers, EVENT_ID)
            hop = self._name_hop(shard, record.offset)
            entity = (record.key or b"").decode("utf-8", "replace") or hop
            attempt = shard.ledger.admit(
                event_id or hop,
                record.offset,
                entity,
                Source(record.key or b"", record.value or b"", record.headers),
                event,
                moment,
            )
            if attempt is None:
                continue
            routed = False
            if event is not None:
                routed, failure = self._route(event)
                if not routed and failure is None:
                    shard.ledger.skip(attempt)
                    continue
            if failure is not None:
                shard.ledger.reject(
                    attempt, failure.kind, failure.code, moment, field=failure.field, outcome=Outcome.DEAD_LETTERED
                )
            shard.ledger.line_up(attempt, moment)

    def _route(self, event: MoneyEvent) -> tuple[bool, Failure | None]:
        try:
            return self.target.routes(event, self._settings), None
        except Failure as failure:
            return False, failure
        except Exception as error:  # noqa: BLE001 - a connector's fault is this record's dead letter, not a crash
            return False, Failure(FailureKind.INTERNAL, type(error).__name__)

    async def _decode(self, value: bytes) -> tuple[MoneyEvent | None, Failure | None]:
        assert self._codecs is not None
        while True:
            try:
                return self._codecs.decode(value), None
            except Failure as failure:
                return None, failure
            except TemporaryError as error:
                # A writer's schema we have not met, and the registry is down: wait, the group is polled meanwhile.
                await self._wait_for(error)

    async def _decode_restored(self, ledger: Ledger) -> None:
        for attempt in ledger.attempts.values():
            if attempt.source.value and attempt.event is None:
                attempt.event, _ = await self._decode(attempt.source.value)

    async def _wait_for(self, error: TemporaryError) -> None:
        self._held = error
        self._log.warning("paused", code=error.code, place=error.place)
        await self._consumer.pause()
        until = time.monotonic() + 1.0
        while time.monotonic() < until and not self._stopping.is_set():
            await self._consumer.poll(1, _IDLE_WAIT)
        await self._consumer.rewind()
        await self._consumer.resume()
        self._is_paused = False
        if self._stopping.is_set():
            raise error
        self._held = None

    # Beginning calls.

    async def _begin(self, moment: Moment) -> list[_Call]:
        """Take what may begin, freeze what is not yet frozen; the calls to start after the commit."""
        if not self._is_lease_fresh():
            return []
        under_way = len(self._running) + len(self._backlog) + len(self._committed_calls)
        room = self._availability.limit_calls(moment.steady, self._call_limit) - under_way
        calls: list[_Call] = []
        fresh: list[_Call] = []
        for shard in self._list_shards_in_turn():
            if room <= 0:
                break
            for attempt in shard.ledger.take(room, moment):
                room -= 1
                call = _Call(shard, attempt)
                if attempt.state is State.UNKNOWN:
                    if shard.ledger.resend(attempt, moment):
                        calls.append(call)
                elif attempt.request is not None:
                    shard.ledger.start(attempt, attempt.request, moment)
                    calls.append(call)
                else:
                    fresh.append(call)
        calls.extend(await self._freeze(fresh, moment))
        return calls

    def _list_shards_in_turn(self) -> list[_Shard]:
        """Every partition gets to be the first: a long queue in one must not starve the others."""
        shards = list(self._shards.values())
        if shards:
            first = next(iter(self._shards))
            self._shards[first] = self._shards.pop(first)
        return shards

    async def _freeze(self, fresh: list[_Call], moment: Moment) -> list[_Call]:
        if not fresh:
            return []
        if moment.steady < self._identity_asked_again:
            return self._put_back(fresh)
        references = [_choose_reference(call.attempt.event) for call in fresh]
        wanted = list({reference: None for reference in references if reference is not None})
        try:
            resolutions = await self._identities.resolve(wanted) if wanted else []
        except TemporaryError as error:
            self._hold_for_identity(error, moment)
            return self._put_back(fresh)
        self._identity_pause = 0.0
        self._held = None
        found = dict(zip(wanted, resolutions, strict=True))
        calls = []
        for call, reference in zip(fresh, references, strict=True):
            if reference is None:
                self._dead_letter(call, Failure(FailureKind.UNMAPPED, PATIENT_MISSING, "patient"), moment)
                continue
            resolution = found[reference]
            if not isinstance(resolution, Known):
                call.attempt.tries += 1
                pause = self._policy.choose_pause(call.attempt.tries)
                call.shard.ledger.park(call.attempt, None, MRN_UNRESOLVED, moment, pause=pause)
            elif self._build_request(call, resolution.mrn, moment):
                calls.append(call)
        return calls

    def _build_request(self, call: _Call, mrn: Reference, moment: Moment) -> bool:
        event = call.attempt.event
        assert event is not None, "an event without one was dead-lettered when it was admitted"
        try:
            context = PostingContext(self._tenancy.get_facility(event.facility), mrn, moment.wall)
            request = self.target.freeze(event, context, self._settings)
        except Failure as failure:
            self._dead_letter(call, failure, moment)
        except Exception as error:  # noqa: BLE001 - a connector's fault is this record's dead letter, not a crash
            self._dead_letter(call, Failure(FailureKind.INTERNAL, type(error).__name__), moment)
        else:
            call.attempt.tries = 0
            call.shard.ledger.start(call.attempt, request, moment)
            return True
        return False

    @staticmethod
    def _dead_letter(call: _Call, failure: Failure, moment: Moment) -> None:
        call.shard.ledger.reject(
            call.attempt, failure.kind, failure.code, moment, field=failure.field, outcome=Outcome.DEAD_LETTERED
        )

    @staticmethod
    def _put_back(fresh: list[_Call]) -> list[_Call]:
        for call in reversed(fresh):
            call.shard.ledger.give_back(call.attempt)
        return []

    def _hold_for_identity(self, error: TemporaryError, moment: Moment) -> None:
        if self._held is None:
            self._log.warning("paused", code=error.code, place=error.place)
        self._held = error
        self._identity_pause = min(5.0, max(0.2, self._identity_pause * 2))
        self._identity_asked_again = moment.steady + self._identity_pause

    # Committing.

    async def _commit(self, number: int) -> bool:
        """Write everything decided since the last commit. False: nothing of it is visible, it is tried again."""
        flushes = [
            (shard, flush)
            for shard in self._shards.values()
            if shard.owned and (shard.ledger.has_changes or shard.ledger.position != shard.ledger.frontier)
            for flush in (shard.ledger.flush(),)
            if flush.records or flush.reports or flush.frontier != shard.ledger.frontier
        ]
        if not flushes:
            return True
        now_ms = self._clock.now().wall
        outputs = [output for shard, flush in flushes for output in self._build_outputs(shard, flush, now_ms)]
        # A partition whose frontier does not move sends it all the same: an offset is what fences a zombie.
        positions = {(shard.topic, shard.partition): flush.frontier for shard, flush in flushes}
        try:
            await self._consumer.commit(number, outputs, positions)
        except StaleAssignment:
            return False
        except TransactionAborted as error:
            self._failures += 1
            self._metrics.add(Metric.ABORTS, 1, role="deliverer", reason=str(error))
            self._log.warning("transaction_rolled_back", reason=str(error))
            await asyncio.sleep(random.uniform(0, min(5.0, 0.1 * 2 ** min(self._failures, 6))))  # noqa: S311 - jitter
            return False
        except RecordRefused as error:
            topic = outputs[error.index].topic if error.index is not None else self._attempts_topic
            raise LedgerRefused(f"refused with {error.code}.", place=topic) from None
        self._failures = 0
        for shard, flush in flushes:
            shard.ledger.confirm(flush)
            self._count(flush)
        return True

    def _build_outputs(self, shard: _Shard, flush: Flush, now_ms: int) -> list[Output]:
        assert self._codecs is not None
        outputs = [
            Output(
                self._attempts_topic,
                event_id.encode(),
                value,
                partition=shard.partition,
                cause=f"{shard.topic}[{shard.partition}]",
            )
            for event_id, value in flush.records
        ]
        for report in flush.reports:
            outputs.append(build_outcome(report, self.name, self._codecs, now_ms))
            if report.dead_letter:
                hop = self._name_hop(shard, report.attempt.offset)
                outputs.append(build_report_letter(report, self.name, hop, now_ms))
        return outputs

    def _count(self, flush: Flush) -> None:
        for report in flush.reports:
            self._metrics.add(Metric.DELIVERIES, 1, target=self.name, outcome=report.outcome.value)
            if report.dead_letter:
                self._metrics.add(Metric.DEAD_LETTERS, 1, stage=self.name, code=report.code)
            if report.outcome in _FOR_PEOPLE:
                self._log.error(
                    f"event_{report.outcome.value}",
                    event_id=report.attempt.event_id,
                    failure=report.failure,
                    code=report.code,
                    attempt=report.number,
                )

    async def _throttle(self) -> None:
        """Intake stops when too much is held here; polling goes on, or the group would throw us out."""
        held = sum(len(shard.ledger.attempts) for shard in self._shards.values())
        if not self._is_paused and held >= self._limits.open_events:
            await self._consumer.pause()
            self._is_paused = True
        elif self._is_paused and held < self._limits.open_events // 2:
            await self._consumer.resume()
            self._is_paused = False

    def _measure(self, moment: Moment) -> None:
        if moment.steady - self._measured_at < 1:
            return
        self._measured_at = moment.steady
        for state, count in self._count_states().items():
            self._metrics.set(Metric.OPEN_ATTEMPTS, count, target=self.name, state=state)
        self._metrics.set(Metric.TARGET_OPEN, float(self._availability.is_open), target=self.name)

    # Calls.

    def _pump(self) -> None:
        while self._backlog and len(self._running) < self._transport.connections:
            call = self._backlog.popleft()
            task = asyncio.create_task(self._call(call))
            self._running[task] = call
            task.add_done_callback(self._end_call)

    def _end_call(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if not task.cancelled() and task.exception() is None:
            self._pump()

    async def _call(self, call: _Call) -> None:
        attempt = call.attempt
        assert attempt.request is not None
        started = time.perf_counter()
        result: Answer | Failed
        try:
            answer = await self._transport.send(attempt.request, lambda: self._check_lease(call))
        except Withdrawn as withdrawal:
            result = Failed("WITHDRAWN", withdrawal.code)
        except Failure as failure:
            result = Failed(failure.kind, failure.code)
        except asyncio.CancelledError:
            raise
        except Exception as error:  # noqa: BLE001 - whatever it was, after the write the request may have left
            kind = FailureKind.INTERNAL if attempt.written else FailureKind.UNAVAILABLE
            result = Failed(kind, type(error).__name__)
        else:
            result = answer if isinstance(answer, Answer) else self._judge(answer, call)
        self._metrics.observe(Metric.ATTEMPT_SECONDS, time.perf_counter() - started, target=self.name)
        self._results.append((call, result))

    def _judge(self, answer: bytes, call: _Call) -> Answer:
        assert call.attempt.request is not None
        try:
            assert self.target.verdict is not None, "only a transport that judges by itself does without"
            return self.target.verdict(answer, call.attempt.request, self._settings)
        except Exception as error:  # noqa: BLE001 - an answer nobody can read says nothing about the posting
            return Answer(FailureKind.AMBIGUOUS, type(error).__name__)

    def _check_lease(self, call: _Call) -> None:
        moment = self._clock.now()
        if not call.shard.owned:
            raise Withdrawn("REVOKED")
        if self._draining:
            raise Withdrawn("STOPPING")
        if not self._is_lease_fresh():
            raise Withdrawn("LEASE_OLD")
        if not call.shard.ledger.may_write(call.attempt, moment):
            raise Withdrawn("WINDOW")

    def _is_lease_fresh(self) -> bool:
        """Whether the group's coordinator heard from us within half the session timeout."""
        return time.monotonic() - self._consumer.last_heartbeat < self._kafka.session_timeout_seconds / 2

    # Ending.

    async def _drain(self) -> None:
        self._draining = True
        await self._consumer.pause()
        for call in self._backlog:
            self._results.append((call, Failed("WITHDRAWN", "STOPPING")))
        for call in self._committed_calls:
            self._results.append((call, Failed("WITHDRAWN", "STOPPING")))
        self._backlog.clear()
        self._committed_calls.clear()
        until = time.monotonic() + self._transport.call_deadline + 5
        while time.monotonic() < until:
            if await self._cycle() and not self._running and not self._results:
                break

    async def _close(self) -> None:
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self._transport.close()
        await self._consumer.close()

    # Called by the group: on a loader thread, and on the consumer's thread.

    def _load(self, topic: str, partition: int) -> None:
        key = (topic, partition)
        with self._lock:
            epoch = self._epochs.setdefault(key, 0)
        ledger = Ledger(topic, self._policy)
        for item in read_to_end(self._kafka, self._attempts_topic, partitions=[partition]):
            if not isinstance(item, Record):
                continue
            event_id = (item.key or b"").decode()
            if item.value is None:
                ledger.forget(event_id)
                continue
            try:
                entry = book.decode_entry(item.value)
            except msgspec.MsgspecError:
                raise LedgerUnreadable(
                    f"offset {item.offset} cannot be read.", place=f"{self._attempts_topic}[{partition}]"
                ) from None
            if entry.topic == topic:
                ledger.restore(event_id, entry)
        with self._lock:
            # Taken away while it was read: another owner may have written since.
            if self._epochs[key] == epoch:
                self._loaded[key] = ledger

    def _release(self, topic: str, partition: int) -> None:
        key = (topic, partition)
        with self._lock:
            self._epochs[key] = self._epochs.get(key, 0) + 1
            self._loaded.pop(key, None)
        shard = self._shards.get(key)
        if shard is not None:
            # From here on no call of it passes the last look before its write.
            shard.owned = False

    def _report_load(self, event: str, error: OperatorError) -> None:
        self._log.warning(event, code=error.code, place=error.place)

    def _name_hop(self, shard: _Shard, offset: int) -> str:
        return f"{self._consumer.topic_ids.get(shard.topic, shard.topic)}:{shard.partition}:{offset}"


_RESENDABLE = frozenset({TargetClass.A, TargetClass.B})
_FOR_PEOPLE = frozenset({Outcome.REJECTED, Outcome.DEAD_LETTERED, Outcome.UNKNOWN})


def _choose_reference(event: MoneyEvent | None) -> Reference | None:
    """The patient as named: it resolves through visits and merges; the number found at publishing may be retired."""
    if event is None:
        return None
    return event.patient or event.mrn

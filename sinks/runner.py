"""Delivers canonical events to one target instance: effectively once, in order per entity, several entities at a time.

One cycle: poll; take the answers of finished calls; admit new events; freeze what may start; commit everything as one
transaction (ledger entries, outcomes, dead letters, frontiers, offsets); only then start the calls. Answers wait for
the next cycle, so the cost of a commit is shared by all that happened meanwhile. ``sinks.ledger`` holds the rules,
``sinks.calls`` the last look before a write, ``sinks.gate`` how many calls the target bears.

The documented hole: a process frozen between that look and the socket write, for longer than call deadline and session
timeout together, can post a second time at a target that does not recognise the repetition. A machine that slept finds
its lease expired at that look; a virtual machine that was stopped with all its clocks does not.
"""

from __future__ import annotations

import asyncio
import contextlib
import random
import time
from concurrent.futures import CancelledError
from typing import TYPE_CHECKING, Any

from schemas.failure import TemporaryError
from schemas.wire import load_schema
from sinks.attempts import WITHDRAWN, Failed, State
from sinks.calls import Call, Calls, Result
from sinks.contract import Answer, TargetClass
from sinks.decisions import DecisionFeed, Decisions
from sinks.gate import make_gate
from sinks.intake import Intake, Patients
from sinks.overview import Overview
from sinks.policy import Limits, Moment, Step, derive_policy
from sinks.reports import SCHEMA, SUBJECT, Codecs
from sinks.shards import Shards
from sinks.transactions import Transactions
from sinks.transport import open_transport
from telemetry.log import get_log
from telemetry.metrics import METRICS, Metric, Metrics
from topics import catalog
from topics.group import GroupConsumer, LastWork
from topics.reading import Record, build_record
from topics.registry import SchemaMissing

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Sequence

    from pydantic import SecretStr

    from schemas.events import MoneyEvent
    from schemas.failure import Failure, OperatorError
    from schemas.tenancy import Tenancy
    from sinks.attempts import Attempt
    from sinks.contract import Target, TargetSettings
    from sinks.ledger import Ledger
    from sinks.transport import Transport
    from topics.cluster import KafkaSettings
    from topics.footing import Partition
    from topics.registry import Registry

_BUSY_WAIT = 0.004
_IDLE_WAIT = 0.1
_LONG_WAIT = 2.0
"""Seconds of a target's own wait, past which what stands in line is put back into the ledger."""


_HAND_OVER_SECONDS = 5.0
"""At most, for the answers of partitions that are taken away."""


class Clock:
    """Steady seconds and wall milliseconds of this machine."""

    def now(self) -> Moment:
        """Both, at once."""
        return Moment(time.monotonic(), time.time_ns() // 1_000_000)


class Runner:
    """Delivers to one instance. ``run`` returns after ``stop``, or raises an ``OperatorError``.

    ``registry`` and ``identities`` are asked; ``transport`` replaces the connection (tests); ``vault_key`` seals
    refresh tokens. The group is ``remitstream.deliver.<instance name>``; ``instance`` and ``slot`` name this process,
    stable over restarts.
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
        vault_key: SecretStr | None = None,
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
        self._transport = transport or open_transport(target, settings, vault_key)
        self._policy = derive_policy(target, settings, self._transport, kafka.session_timeout_seconds)
        is_d = self._policy.target_class is TargetClass.D
        self._ahead = self._limits.calls_ahead_class_d if is_d else self._limits.calls_ahead
        self._gate = make_gate(draw, self._policy, self._transport.connections)
        self._calls = Calls(
            self._transport,
            target,
            settings,
            self._gate,
            now=self._clock.now,
            is_lease_fresh=self._is_lease_fresh,
            metrics=metrics,
        )
        attempts_topic = catalog.name_attempts(self.name)
        self._shards = Shards(kafka, attempts_topic, self._policy)
        self._overview = Overview(self.name, self._policy, self._shards, self._calls, self._gate, metrics=metrics)
        group = f"remitstream.deliver.{self.name}"
        process = f"{group}.{instance}.{slot}"
        self._consumer = GroupConsumer(
            kafka,
            group=group,
            topics=catalog.CANONICAL_MONEY,
            instance=process,
            transactional_id=process,
            build=build_record,
            load=self._shards.load,
            release=self._shards.release,
            hand_over=self._hand_over,
            report=self._report_load,
            keeps_records=True,
        )
        self._transactions = Transactions(
            self._consumer,
            self._shards,
            target=self.name,
            attempts_topic=attempts_topic,
            decode=self._decode_fetched,
            metrics=metrics,
            log=self._log,
        )
        self._decisions = Decisions(DecisionFeed(kafka, self.name, registry.find_schema), self.name)
        self._intake: Intake | None = None
        self._committed_calls: list[Call] = []
        self._identity_pause = 0.0
        self._identity_asked_again = 0.0
        self._held: TemporaryError | None = None
        self._was_shut = False
        self._is_paused = False
        self._stopping = asyncio.Event()
        self._draining = False
        self._loop: asyncio.AbstractEventLoop | None = None
        self._is_at_rest = False

    # For the process that runs it.

    async def run(self) -> None:
        """Deliver until ``stop``. Raises ``OperatorError``; what was under way is settled after the restart."""
        self._loop = asyncio.get_running_loop()
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
        if not self._consumer.is_ready() or self._intake is None:
            hindrance = self._consumer.hindrance
            known = f"{hindrance.code} at {hindrance.place}" if hindrance else ""
            reasons["group"] = known or "joining, or loading the ledger"
        if self._held is not None:
            reasons["paused"] = f"{self._held.code} at {self._held.place}"
        if not self._is_lease_fresh():
            reasons["lease"] = "the group's coordinator has not answered lately"
        held_by = self._gate.explain(self._clock.now().steady)
        if held_by:
            reasons["target"] = held_by
        return not reasons, reasons

    def status(self) -> dict[str, Any]:
        """Numbers for people; see ``Overview.describe``."""
        return self._overview.describe(self._clock.now(), paused=self._is_paused)

    # One cycle.

    async def _prepare(self) -> None:
        schema = load_schema(SCHEMA)
        schema_id = await asyncio.to_thread(self._registry.find_id, SUBJECT, schema)
        if schema_id is None:
            raise SchemaMissing("the schema of outcomes is not registered.", place=SUBJECT)
        codecs = self._transactions.codecs = Codecs(self._registry, schema_id)
        self._intake = Intake(
            self.target,
            self._settings,
            self._tenancy,
            self._policy,
            codecs=codecs,
            patients=self._identities,
        )

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
        busy = bool(self._calls.under_way or self._calls.has_results)
        # Only here is all that was decided in the ledgers, so only here may partitions be handed over.
        self._is_at_rest = True
        try:
            polled = await self._consumer.poll(self._limits.poll_records, _BUSY_WAIT if busy else _IDLE_WAIT)
        finally:
            self._is_at_rest = False
        number, frontiers = await self._consumer.call(self._look)
        moment = self._clock.now()
        await self._follow_assignment(frontiers, moment)
        self._settle(moment)
        if self._intake is not None:
            await self._decisions.act(self._shards, self._intake, moment)
        if number == polled.number:
            await self._admit(polled.records, moment)
        if not self._draining:
            self._committed_calls += await self._begin(moment)
        is_committed = await self._transactions.commit(number, moment)
        if is_committed:
            # Not those whose entry the broker refused, nor those taken away.
            ready = [call for call in self._committed_calls if call.shard.owned and call.attempt.calling]
            self._committed_calls.clear()
            self._calls.line_up(ready)
        await self._throttle()
        self._overview.measure(moment)
        return is_committed

    def _look(self) -> tuple[int, dict[Partition, int]]:
        return self._consumer.number, self._consumer.frontiers()

    async def _follow_assignment(self, frontiers: dict[Partition, int], moment: Moment) -> None:
        """Drop partitions that were taken away, take up those that are loaded."""
        self._shards.drop_lost(frontiers)
        for key in self._shards.list_new(frontiers):
            ledger = self._shards.take_loaded(key)
            if ledger is None:
                await asyncio.to_thread(self._shards.load, *key)
                ledger = self._shards.take_loaded(key)
                if ledger is None:
                    continue  # taken away again
            await self._decode_restored(ledger)
            ledger.open(frontiers[key], moment)
            self._shards.take_up(key, ledger)
        self._calls.drop_lost()
        self._committed_calls = [call for call in self._committed_calls if call.shard.owned]

    def _settle(self, moment: Moment) -> None:
        self._note_gate(moment)
        if self._was_shut or self._gate.measure_wait(moment.steady) > _LONG_WAIT:
            # What has not begun waits for the target without being IN_FLIGHT: after a crash that would be a doubt.
            self._calls.withdraw_line("TARGET_UNAVAILABLE")
        for call, result in self._calls.take_results():
            kind = (result.kind or "ok") if isinstance(result, Answer | Failed) else type(result).__name__.lower()
            if kind != WITHDRAWN:
                self._metrics.add(Metric.ATTEMPTS, 1, target=self.name, kind=str(kind))
            if call.shard.owned:
                self._take_result(call, result, moment)
            elif kind != WITHDRAWN:
                # The new owner decides; this is for people who compare.
                self._log.warning("late_answer", event_id=call.attempt.event_id, kind=str(kind))

    @staticmethod
    def _take_result(call: Call, result: Result, moment: Moment) -> None:
        ledger, attempt = call.shard.ledger, call.attempt
        if attempt.asks:
            ledger.settle_look_up(attempt, result, moment)
        else:
            assert isinstance(result, Answer | Failed)
            ledger.settle(attempt, result, moment)

    def _note_gate(self, moment: Moment) -> None:
        is_shut = self._gate.is_shut(moment.steady)
        if is_shut == self._was_shut:
            return
        self._was_shut = is_shut
        self._metrics.set(Metric.TARGET_OPEN, float(not is_shut), target=self.name)
        if is_shut:
            self._log.warning("target_unavailable", reason=self._gate.explain(moment.steady))
        else:
            self._log.warning("target_available")

    async def _admit(self, records: Sequence[Record], moment: Moment) -> None:
        assert self._intake is not None
        for record in records:
            shard = self._shards.find(record.topic, record.partition)
            if shard is None or record.offset < shard.ledger.position:
                continue
            hop = self._transactions.name_hop(shard, record.offset)
            while True:
                try:
                    self._intake.admit(shard, record, hop, moment)
                except TemporaryError as error:
                    # A writer's schema we have not met, and the registry is down: wait, the group is polled meanwhile.
                    await self._wait_for(error)
                else:
                    break

    async def _decode_restored(self, ledger: Ledger) -> None:
        for attempt in ledger.queues.attempts.values():
            await self._decode_fetched(attempt)

    async def _decode_fetched(self, attempt: Attempt) -> None:
        """An event that comes from the ledger or its shelf comes as bytes."""
        if attempt.event is None and attempt.source.value:
            attempt.event, _ = await self._decode(attempt.source.value)

    async def _decode(self, value: bytes) -> tuple[MoneyEvent | None, Failure | None]:
        """An event, or why there is none; waits out whatever is temporary."""
        assert self._intake is not None
        while True:
            try:
                return self._intake.decode(value)
            except TemporaryError as error:
                await self._wait_for(error)

    async def _wait_for(self, error: TemporaryError) -> None:
        self._held = error
        self._log.warning("paused", code=error.code, place=error.place)
        await self._consumer.pause()
        until = self._clock.now().steady + 1.0
        while self._clock.now().steady < until and not self._stopping.is_set():
            await self._consumer.poll(1, _IDLE_WAIT)
        await self._consumer.rewind()
        await self._consumer.resume()
        self._is_paused = False
        if self._stopping.is_set():
            raise error
        self._held = None

    # Beginning calls.

    async def _begin(self, moment: Moment) -> list[Call]:
        """Take what may begin, freeze what is not yet frozen; the calls to start after the commit."""
        if not self._is_lease_fresh():
            return []
        room = self._gate.count_room(moment.steady)
        if not self._was_shut:
            room *= self._ahead
        room -= self._calls.under_way + len(self._committed_calls)
        calls: list[Call] = []
        fresh: list[Call] = []
        for shard in self._shards.list_in_turn():
            if room <= 0:
                break
            for attempt in shard.ledger.take(room, moment):
                room -= 1
                await self._decode_fetched(attempt)
                call = Call(shard, attempt)
                if attempt.state is State.UNKNOWN:
                    if shard.ledger.resume(attempt, moment) is not Step.PERSON:
                        calls.append(call)
                elif attempt.request is not None:
                    shard.ledger.start(attempt, attempt.request, moment)
                    calls.append(call)
                else:
                    fresh.append(call)
        calls.extend(await self._freeze(fresh, moment))
        return calls

    async def _freeze(self, fresh: list[Call], moment: Moment) -> list[Call]:
        if not fresh:
            return []
        assert self._intake is not None
        if moment.steady >= self._identity_asked_again:
            try:
                calls = await self._intake.freeze(fresh, moment)
            except TemporaryError as error:
                self._hold_for_identity(error, moment)
            else:
                self._identity_pause = 0.0
                self._held = None
                return calls
        for call in reversed(fresh):
            call.shard.ledger.give_back(call.attempt)
        return []

    def _hold_for_identity(self, error: TemporaryError, moment: Moment) -> None:
        if self._held is None:
            self._log.warning("paused", code=error.code, place=error.place)
        self._held = error
        self._identity_pause = min(5.0, max(0.2, self._identity_pause * 2))
        self._identity_asked_again = moment.steady + self._identity_pause

    # Holding back.

    async def _throttle(self) -> None:
        """Intake stops when too much is held here; polling goes on, or the group would throw us out."""
        stopped = sum(shard.ledger.queues.shelved for shard in self._shards)
        held = sum(len(shard.ledger.queues.line) for shard in self._shards)
        limits = self._limits
        if not self._is_paused and (held >= limits.open_events or stopped >= limits.stopped_events):
            await self._consumer.pause()
            self._is_paused = True
        elif self._is_paused and held < limits.open_events // 2 and stopped < limits.stopped_events:
            await self._consumer.resume()
            self._is_paused = False

    def _is_lease_fresh(self) -> bool:
        """Whether the group's coordinator heard from us within half the session timeout."""
        return self._clock.now().steady - self._consumer.last_heartbeat < self._kafka.session_timeout_seconds / 2

    # Ending.

    async def _drain(self) -> None:
        self._draining = True
        await self._consumer.pause()
        self._calls.drain()
        moment = self._clock.now()
        self._withdraw_committed(lambda _call: True, "STOPPING", moment)
        until = moment.steady + self._transport.call_deadline + 5
        while self._clock.now().steady < until:
            if await self._cycle() and not self._calls.under_way and not self._calls.has_results:
                break

    async def _finish_leaving(self, partitions: Sequence[Partition]) -> LastWork:
        """The work of partitions that are taken away, after the answers of what is on the wire."""
        if not self._is_at_rest:
            return LastWork()  # what is on the wire is unknown to the next owner, as after a kill
        shards = [shard for key in partitions for shard in (self._shards.find(*key),) if shard is not None]
        for shard in shards:
            shard.is_leaving = True
        self._withdraw_committed(lambda call: call.shard.is_leaving, "REVOKED", self._clock.now())
        await self._calls.finish_leaving(self._hand_over_seconds)
        moment = self._clock.now()
        self._settle(moment)
        return self._transactions.build_last(shards, moment)

    def _withdraw_committed(self, chosen: Callable[[Call], bool], code: str, moment: Moment) -> None:
        """Give up calls that wait for their commit or their place in line."""
        for call in self._committed_calls:
            if chosen(call) and call.attempt.calling:
                self._take_result(call, Failed(WITHDRAWN, code), moment)
        self._committed_calls = [call for call in self._committed_calls if not chosen(call)]

    @property
    def _hand_over_seconds(self) -> float:
        """How long partitions that are taken away wait for answers: the whole group waits with them."""
        return min(self._transport.call_deadline, _HAND_OVER_SECONDS, self._kafka.session_timeout_seconds / 4)

    async def _close(self) -> None:
        await self._calls.close()
        await asyncio.to_thread(self._decisions.close)
        await self._consumer.close()

    # Called by the group: on the consumer's thread, which stands still meanwhile, and on a loader thread.

    def _hand_over(self, partitions: Sequence[Partition]) -> LastWork:
        assert self._loop is not None
        finishing = asyncio.run_coroutine_threadsafe(self._finish_leaving(partitions), self._loop)
        try:
            return finishing.result(self._hand_over_seconds + 1.0)
        except (TimeoutError, CancelledError):
            finishing.cancel()
            return LastWork()

    def _report_load(self, event: str, error: OperatorError) -> None:
        self._log.warning(event, code=error.code, place=error.place)

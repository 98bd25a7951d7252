"""Feeds batches of a worker's raw topics: group membership (``topics.group``), local state, pauses and back-off."""

from __future__ import annotations

import asyncio
import random
import time
from collections import Counter
from typing import TYPE_CHECKING, Any, Literal

from schemas.events import Fate
from schemas.failure import Failure, FailureKind, FatalError, OperatorError, TemporaryError
from streams.batch import Batch
from streams.decision import Decision, Room
from streams.expiry import Purge
from streams.slot import name_folder
from streams.state import LINEAGE, SEEN, WAITING, PartitionState, StateUnusable
from streams.suspects import EXITS, Suspects
from telemetry.log import get_log
from telemetry.metrics import METRICS, Metric, Metrics
from topics import catalog
from topics.dead_letter import build_dead_letter
from topics.footing import PositionBroken
from topics.group import GroupConsumer, Polled
from topics.headers import RawRecord, read_headers
from topics.membership import Membership

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from streams.decision import Decider
    from topics.cluster import KafkaSettings

IDLE_SECONDS = 0.1
"""An empty batch is handed out this often while nothing arrives, so that the waiting room is looked at."""

LONG_SECONDS = 1.0
"""A batch that took longer is followed by smaller ones: a third of the 3 s in which a batch must be done, or a worker
that freezes holds back every read_committed reader for longer than that."""

SETTLE_SECONDS = 1.0
"""After a pause, nothing having arrived for this long means that the held records are another worker's now."""


class Feeder:
    """Feeds batches of one worker: consumes its raw topics, keeps their local state, pauses while something is down."""

    def __init__(
        self,
        kafka: KafkaSettings,
        deciders: Mapping[str, Decider],
        *,
        instance: str,
        slot: int,
        state_folder: Path,
        batch_size: int,
        waiting_limit: int = 100_000,
        partitions: int | None = None,
        group_protocol: Literal["classic", "consumer"] = "classic",
        metrics: Metrics = METRICS,
    ) -> None:
        self.deciders = {catalog.name_raw(source): decider for source, decider in deciders.items()}
        self.paused: TemporaryError | None = None
        self.rooms: dict[tuple[str, int], Room] = {}
        self._kafka = kafka
        self._metrics = metrics
        self._log = get_log("worker", slot=slot)
        self._state_folder = name_folder(state_folder, instance, slot)
        self.suspects = Suspects(self._state_folder)
        self._batch_size = batch_size
        self._limit = batch_size
        self._waiting_limit = waiting_limit
        self._crowded: frozenset[tuple[str, int]] = frozenset()
        self._refused: frozenset[str] = frozenset()
        self._failures = 0
        self._pending: list[Batch] = []
        self._last_idle = 0.0
        self._measured_at = 0.0
        self._resumed_at = 0.0
        self._purge = Purge(kafka)
        self.group = GroupConsumer(
            kafka,
            group="remitstream.worker",
            topics=list(self.deciders),
            instance=f"remitstream.worker.{instance}.{slot}",
            transactional_id=f"remitstream.worker.{instance}.{slot}",
            build=self._build,
            load=self._load,
            release=self._release,
            report=self._report,
            membership=Membership.SERVER if group_protocol == "consumer" else Membership.SPREAD,
            partitions=partitions,
        )

    async def start(self) -> None:
        """Join the group, waiting for Kafka as long as it takes."""
        self._open_suspects()
        wait = 0.5
        while True:
            try:
                await self.group.start()
            except TemporaryError as error:
                self.paused = error
                self._report("kafka_unreachable", error)
                await asyncio.sleep(wait)
                wait = min(wait * 2, 10)
            else:
                self.paused = None
                return

    async def next_batch(self) -> Batch | None:
        """The next batch; None when there is nothing to do. Polls at most 0.1 s, once per batch of every raw topic."""
        if not self._pending:
            await self._limit_intake()
            self._measure_waiting()
            limit = 1 if self._is_suspicious() else self._limit
            polled = await self.group.poll(limit, IDLE_SECONDS)
            if limit > 1 and self._is_suspicious():
                # The partition became ours during the poll.
                await self.group.rewind()
                return None
            if not polled.partitions:
                active = self.group.frontiers()
                states = [room.state for key, room in list(self.rooms.items()) if key in active]
                await self._purge.step(states, self.group.call)
            if polled.partitions or time.monotonic() - self._last_idle >= IDLE_SECONDS:
                self._last_idle = time.monotonic()
                self._pending = self._split(polled)
            if not self._pending:
                if time.monotonic() - self._resumed_at > SETTLE_SECONDS:
                    self._unpause()
                return None
        batch = self._pending.pop(0)
        self._take_in_hand(batch)
        return batch

    def succeed(self, batch: Batch, decision: Decision) -> None:
        """A batch is committed."""
        self._failures = 0
        self._unpause()
        if self._refused:
            released = {held.hop for room in decision.rooms for held in room.released}
            self._refused -= released.union(record.hop for record in batch.records)
        seconds = time.perf_counter() - batch.begun
        self._adapt_limit(len(batch.records), seconds)
        self._acquit(batch)
        source = self.deciders[batch.topic].source
        if batch.records:
            self._metrics.set(Metric.BATCH_RECORDS, len(batch.records), source=source)
            self._metrics.observe(Metric.BATCH_SECONDS, seconds, source=source)
        for room in decision.rooms:
            for held in room.released:
                self._metrics.add(Metric.RELEASED, 1, source=source, reason=held.reason)
        for (fate, reason), count in decision.fates.items():
            self._metrics.add(Metric.RECORDS, count, source=source, fate=fate.value, reason=reason)
            if fate is Fate.DEAD_LETTERED:
                self._metrics.add(Metric.DEAD_LETTERS, count, stage="normalise", code=reason)
            elif fate is Fate.IN_REVIEW:
                self._metrics.add(Metric.REVIEWS, count, source=source, reason=reason)

    def _adapt_limit(self, records: int, seconds: float) -> None:
        """Small after a slow batch, larger again after a quick one that was full."""
        if seconds > LONG_SECONDS:
            self._limit = max(1, min(self._limit, records) // 2)
        elif records >= self._limit and seconds < LONG_SECONDS / 2:
            self._limit = min(self._batch_size, self._limit * 2)

    def roll_back(self, reason: str) -> None:
        """A transaction was rolled back; say so. The partitions were sought: what was polled with it comes again."""
        self._pending.clear()
        self._metrics.add(Metric.ABORTS, 1, role="worker", reason=reason)
        self._log.warning("transaction_rolled_back", reason=reason)

    def refuse(self, batch: Batch, hop: str | None) -> None:
        """The broker refused a record of the batch.

        When it is not known which, the next transaction sends one by one and finds it: also of a batch with one record,
        for beside it there may be releases. Raises ``DeadLetterRefused``.
        """
        if hop is None:
            self._limit = 1
        elif hop in batch.refused:
            raise DeadLetterRefused("it was refused by the broker, too.", place=hop)
        else:
            self._refused |= {hop}

    async def back_off(self) -> None:
        """Wait after an aborted transaction: longer each time, with jitter, so that workers do not march in step.

        The next one holds half as many records: perhaps this one was too much for its time-out.
        """
        self._limit = max(1, self._limit // 2)
        self._failures += 1
        await asyncio.sleep(random.uniform(0, min(5.0, 0.1 * 2 ** min(self._failures, 6))))  # noqa: S311 - jitter

    async def hold(self, error: TemporaryError) -> None:
        """Pause all partitions for a while; polling goes on, or the group would evict us.

        The worker counts as paused until a batch succeeds or none is left.
        """
        self.suspects.put_down()
        self._unpause()
        self.paused = error
        self._pending.clear()
        self._failures += 1
        self._metrics.set(Metric.PAUSED, 1, role="worker", reason=error.code)
        self._report("paused", error)
        await self.group.rewind()
        await self.group.pause()
        until = time.monotonic() + min(5.0, 0.2 * 2 ** min(self._failures, 5))
        while time.monotonic() < until:
            if (await self.group.poll(1, 0.1)).partitions:
                await self.group.rewind()
        await self.group.resume()
        self._resumed_at = time.monotonic()

    async def _limit_intake(self) -> None:
        """Partitions whose waiting room is full get no new records until it is half empty; releases go on."""
        crowded = frozenset(
            key
            for key, room in list(self.rooms.items())
            if len(room.waiting) >= (self._waiting_limit if key not in self._crowded else self._waiting_limit // 2 + 1)
        )
        if crowded == self._crowded:
            return
        for topic, partition in crowded - self._crowded:
            self._log.warning("waiting_room_full", place=f"{topic}[{partition}]", limit=self._waiting_limit)
        await self.group.pause(sorted(crowded - self._crowded))
        await self.group.resume(sorted(self._crowded - crowded))
        # What was polled of a partition just paused is read again when it resumes; nothing of it is in hand here.
        self._metrics.set(Metric.PAUSED, float(bool(crowded)), role="worker", reason="WAITING_ROOM_FULL")
        self._crowded = crowded

    def _unpause(self) -> None:
        if self.paused is not None:
            self._metrics.set(Metric.PAUSED, 0, role="worker", reason=self.paused.code)
            self.paused = None

    def is_ready(self) -> tuple[bool, dict[str, str]]:
        """Whether records are being processed, and if not, why."""
        reasons = {}
        if self.paused is not None:
            reasons["paused"] = f"{self.paused.code} at {self.paused.place}"
        if self._crowded:
            full = ", ".join(f"{topic}[{partition}]" for topic, partition in sorted(self._crowded))
            reasons["waiting room full"] = full
        if not self.group.is_ready():
            hindrance = self.group.hindrance
            reasons["group"] = f"{hindrance.code} at {hindrance.place}" if hindrance else "joining, or loading state"
        elif time.monotonic() - self.group.last_heartbeat > self._kafka.session_timeout_seconds:
            reasons["group"] = "the group's coordinator has not answered lately"
        return not reasons, reasons

    def _measure_waiting(self) -> None:
        """How many records are on hold and since when, per source; looked at once a second."""
        if time.monotonic() - self._measured_at < 1:
            return
        self._measured_at = time.monotonic()
        for topic, decider in self.deciders.items():
            rooms = [room.waiting for (name, _), room in list(self.rooms.items()) if name == topic]
            since = [oldest for oldest in (room.find_oldest() for room in rooms) if oldest is not None]
            age = max(0.0, time.time() - min(since) / 1000) if since else 0.0
            self._metrics.set(Metric.WAITING, sum(len(room) for room in rooms), source=decider.source)
            self._metrics.set(Metric.WAITING_AGE, age, source=decider.source)

    async def close(self) -> None:
        """Leave the group and give up the stores."""
        self.suspects.close()
        await self.group.close()
        for room in self.rooms.values():
            room.state.close()
        self.rooms.clear()

    def _split(self, polled: Polled[RawRecord]) -> list[Batch]:
        frontiers = self.group.frontiers()
        for key in polled.partitions:
            if key not in self.rooms:
                # Leaving it out would let the next commit jump over it.
                raise PositionBroken("a record without its state.", place=f"{key[0]}[{key[1]}]")
        batches = []
        for topic in self.deciders:
            rooms = {p: room for (t, p), room in self.rooms.items() if t == topic and (t, p) in frontiers}
            taken = {p: records for (t, p), records in polled.partitions.items() if t == topic and p in rooms}
            waiting = any(len(room.waiting) for room in rooms.values())
            if not taken and not waiting:
                continue
            positions = {partition: frontiers[topic, partition] for partition in rooms}
            for partition, records in taken.items():
                positions[partition] = records[-1].offset + 1
            raw = [record for records in taken.values() for record in records]
            batches.append(Batch(topic, polled.number, raw, rooms, positions, self._refused, self))
        return batches

    # A record that ends the process (see ``streams.suspects``).

    def _open_suspects(self) -> None:
        try:
            known = self.suspects.open()
        except OSError as error:
            raise StateUnusable(f"{type(error).__name__}.", place=str(self._state_folder)) from None
        for partition, suspicion in known.items():
            if suspicion.exits >= EXITS:
                self._log.error(
                    "record_by_record",
                    place=f"{partition}:{suspicion.begin}",
                    exits=suspicion.exits,
                    records=suspicion.end - suspicion.begin,
                )

    def _is_suspicious(self) -> bool:
        return bool(self.suspects.known) and self.suspects.is_suspected(self._list_frontiers())

    def _list_frontiers(self) -> dict[str, int]:
        ids = self.group.topic_ids
        return {f"{ids[topic]}:{partition}": at for (topic, partition), at in self.group.frontiers().items()}

    def _take_in_hand(self, batch: Batch) -> None:
        """Note the batch's records for a successor; one that is known to end the process is not decided again."""
        if not batch.records:
            return
        topic_id = self.group.topic_ids[batch.topic]
        ranges: dict[str, tuple[int, int]] = {}
        for record in batch.records:
            key = f"{topic_id}:{record.partition}"
            if key not in ranges:
                ranges[key] = (record.offset, batch.positions[record.partition])
        alone = len(batch.records) == 1 and self._is_suspicious()
        if alone and self.suspects.is_culprit(*next((key, begin) for key, (begin, _) in ranges.items())):
            batch.verdict = self._condemn(batch.records[0])
        else:
            self.suspects.take(ranges, alone=alone)

    def _condemn(self, record: RawRecord) -> Decision:
        self._log.error("record_ends_the_process", code="CRASHED_WORKER", place=record.hop)
        letter = build_dead_letter(
            key=record.key,
            value=record.value,
            original=record.headers,
            failure=Failure(FailureKind.INTERNAL, "CRASHED_WORKER", "record"),
            stage="normalise",
            hop=record.hop,
            origin=record.origin,
            now_ms=time.time_ns() // 1_000_000,
        )
        return Decision(dead_letters=[letter], fates=Counter({(Fate.DEAD_LETTERED, "CRASHED_WORKER"): 1}))

    def _acquit(self, batch: Batch) -> None:
        if self.suspects.known:
            self.suspects.acquit(self._list_frontiers(), found=batch.verdict is not None)

    def _build(self, message: Any, topic: str, partition: int, offset: int) -> RawRecord:
        # By position: keywords would cost as much as the rest.
        return RawRecord(
            f"{self.group.topic_ids[topic]}:{partition}:{offset}",
            partition,
            offset,
            message.key() or b"",
            message.value() or b"",
            read_headers(message),
            message.timestamp()[1],
        )

    def _report(self, event: str, error: OperatorError) -> None:
        self._log.warning(event, code=error.code, place=error.place)

    # Called by the group on a loader thread, and on the consumer's thread.

    def _load(self, topic: str, partition: int) -> None:
        decider = self.deciders[topic]
        stores = (SEEN,) if decider.source == catalog.HL7 else (SEEN, WAITING, LINEAGE)
        state = PartitionState(self._state_folder, decider.source, partition, stores)
        state.load(self._kafka)
        room = Room(state)
        try:
            decider.rebuild(room)
        except BaseException:
            state.close()
            raise
        self.rooms[topic, partition] = room

    def _release(self, topic: str, partition: int) -> None:
        room = self.rooms.pop((topic, partition), None)
        # Should it come back at once, it is not paused and must be found full anew.
        self._crowded -= {(topic, partition)}
        if room is not None:
            room.state.close()


class DeadLetterRefused(FatalError):
    """Not even the dead letter of a record can be written."""

    code = "RS306"
    meaning = "The broker refused a record's outputs, and then its dead letter or its waiting entry."
    default_remedy = (
        "Run `remitstream topics check`: `dlq` and `waiting.*` must take larger records than `raw.*`; the worker goes "
        "on with the same record."
    )

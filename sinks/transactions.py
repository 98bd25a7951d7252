"""The transactions of a target instance: ledger entries, outcomes, dead letters and frontiers, all of it or nothing."""

from __future__ import annotations

import asyncio
import random
from typing import TYPE_CHECKING

from schemas.events import Outcome
from schemas.failure import FatalError
from sinks.reports import build_outcome, build_report_letter
from telemetry.metrics import Metric
from topics.group import LastWork, StaleAssignment
from topics.transaction import Output, RecordRefused, TransactionAborted

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable

    from structlog.typing import FilteringBoundLogger

    from sinks.attempts import Attempt, Flush
    from sinks.policy import Moment
    from sinks.reports import Codecs
    from sinks.shards import Shard, Shards
    from telemetry.metrics import Metrics
    from topics.group import GroupConsumer
    from topics.reading import Record

_FOR_PEOPLE = frozenset({Outcome.REJECTED, Outcome.DEAD_LETTERED, Outcome.UNKNOWN})


class LedgerRefused(FatalError):
    """The broker refuses a record of a delivery transaction that cannot be made smaller."""

    code = "RS331"
    meaning = "The broker refuses a ledger entry or outcome that must be written, for example because it is too large."
    default_remedy = "Raise `max.message.bytes` of the named topic; `remitstream topics check` compares the settings."


class Transactions:
    """Writes what the ledgers of one instance decided. ``codecs`` must be set before the first commit.

    ``decode`` gives an attempt that comes from the ledger its event, however long that takes.
    """

    codecs: Codecs

    def __init__(
        self,
        consumer: GroupConsumer[Record],
        shards: Shards,
        *,
        target: str,
        attempts_topic: str,
        decode: Callable[[Attempt], Awaitable[None]],
        metrics: Metrics,
        log: FilteringBoundLogger,
    ) -> None:
        self._consumer = consumer
        self._shards = shards
        self._target = target
        self._attempts_topic = attempts_topic
        self._decode = decode
        self._metrics = metrics
        self._log = log
        self._failures = 0

    def name_hop(self, shard: Shard, offset: int) -> str:
        """Where a record is: topic id, partition and offset."""
        return f"{self._consumer.topic_ids.get(shard.topic, shard.topic)}:{shard.partition}:{offset}"

    async def commit(self, number: int, moment: Moment) -> bool:
        """Write everything decided since the last commit. False: nothing of it is visible, it is tried again."""
        flushes = _collect(self._shards)
        if not flushes:
            return True
        for _, flush in flushes:
            for report in flush.reports:
                await self._decode(report.attempt)
        try:
            await self._consumer.commit(number, self._build_outputs(flushes, moment.wall), _list_positions(flushes))
        except StaleAssignment:
            return False
        except TransactionAborted as error:
            self._failures += 1
            self._metrics.add(Metric.ABORTS, 1, role="deliverer", reason=str(error))
            self._log.warning("transaction_rolled_back", reason=str(error))
            await asyncio.sleep(random.uniform(0, min(5.0, 0.1 * 2 ** min(self._failures, 6))))  # noqa: S311 - jitter
            return False
        except RecordRefused as refusal:
            self._take_refusal(refusal, moment)
            return False
        self._failures = 0
        for shard, flush in flushes:
            shard.ledger.confirm(flush)
            self._count(flush)
        return True

    def build_last(self, shards: Iterable[Shard], moment: Moment) -> LastWork:
        """The last transaction of partitions that are given up; their ledgers are not used after it."""
        flushes = _collect(shards)
        attempts = [report.attempt for _, flush in flushes for report in flush.reports]
        if any(attempt.event is None and attempt.source.value for attempt in attempts):
            return LastWork()  # from the ledger and not decoded yet: the next owner does it, with nothing on the wire

        def count() -> None:
            for _, flush in flushes:
                self._count(flush)

        return LastWork(self._build_outputs(flushes, moment.wall), _list_positions(flushes), count)

    def _take_refusal(self, refusal: RecordRefused, moment: Moment) -> None:
        """The broker does not take a record for what it is: its event becomes a dead letter, the others go on."""
        self._metrics.add(Metric.ABORTS, 1, role="deliverer", reason="record_refused")
        if not refusal.cause:
            return  # known only to be among them: the next attempt sends one by one
        self._log.warning("record_refused", event_id=refusal.cause, code=refusal.code)
        for shard in self._shards:
            attempt = shard.ledger.queues.find(refusal.cause)
            if attempt is not None and shard.ledger.refuse(attempt, refusal.code, moment):
                return
        raise LedgerRefused(f"refused with {refusal.code}.", place=self._attempts_topic)

    def _build_outputs(self, flushes: list[tuple[Shard, Flush]], now_ms: int) -> list[Output]:
        outputs: list[Output] = []
        for shard, flush in flushes:
            outputs += [
                Output(self._attempts_topic, event_id.encode(), value, partition=shard.partition, cause=event_id)
                for event_id, value in flush.records
            ]
            for report in flush.reports:
                outputs.append(build_outcome(report, self._target, self.codecs, now_ms))
                if report.dead_letter:
                    hop = self.name_hop(shard, report.attempt.offset)
                    outputs.append(build_report_letter(report, self._target, hop, now_ms))
        return outputs

    def _count(self, flush: Flush) -> None:
        for report in flush.reports:
            self._metrics.add(Metric.DELIVERIES, 1, target=self._target, outcome=report.outcome.value)
            if report.dead_letter:
                self._metrics.add(Metric.DEAD_LETTERS, 1, stage=self._target, code=report.code)
            if report.outcome in _FOR_PEOPLE:
                self._log.error(
                    f"event_{report.outcome.value}",
                    event_id=report.attempt.event_id,
                    failure=report.failure,
                    code=report.code,
                    attempt=report.number,
                )


def _collect(shards: Iterable[Shard]) -> list[tuple[Shard, Flush]]:
    return [
        (shard, flush)
        for shard in shards
        if shard.owned and (shard.ledger.has_changes or shard.ledger.position != shard.ledger.frontier)
        for flush in (shard.ledger.flush(),)
        if flush.records or flush.reports or flush.frontier != shard.ledger.frontier
    ]


def _list_positions(flushes: list[tuple[Shard, Flush]]) -> dict[tuple[str, int], int]:
    # A partition whose frontier does not move sends it all the same: an offset is what fences a zombie.
    return {(shard.topic, shard.partition): flush.frontier for shard, flush in flushes}

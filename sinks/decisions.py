"""Decisions of people about events at a target: read from `decisions.<target>`, acted on in the ledger.

The topic has the partitions of the attempts, so the owner of an event reads what is decided about it. It is read from
its beginning whenever the owned partitions change: a decision names the attempt it is about, and the entry counts the
decisions taken, so one that was taken already is about an attempt that is no more.
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING, Protocol

from schemas.events import Action, Decision, Outcome
from schemas.failure import Failure, OperatorError, TemporaryError
from schemas.wire import Decoder
from sinks import rulings
from sinks.attempts import Ruling, Source
from telemetry.log import get_log
from topics.catalog import name_decisions
from topics.reading import Record, TopicReader

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Mapping

    from sinks.attempts import Attempt
    from sinks.intake import Intake
    from sinks.ledger import Ledger
    from sinks.policy import Moment
    from sinks.shards import Shard
    from topics.cluster import KafkaSettings
    from topics.footing import Partition

LOOK_INTERVAL = 0.5
"""Seconds between two looks into the topic."""
_COMPLAINT_INTERVAL = 30.0


class Feed(Protocol):
    """Where decisions come from."""

    def read(self, partitions: frozenset[Partition]) -> list[Decision]:
        """New decisions for these partitions of canonical topics; all there are when the partitions changed.

        Blocking. Raises ``OperatorError``; the next call then gives everything again.
        """

    def close(self) -> None:
        """Give up the connection."""


class DecisionFeed:
    """The topic of one target instance. Connects at the first look."""

    def __init__(self, kafka: KafkaSettings, target: str, find_schema: Callable[[int], str]) -> None:
        self._kafka = kafka
        self._topic = name_decisions(target)
        self._decoder = Decoder("decision", Decision, find_schema)
        self._reader: TopicReader | None = None
        self._followed: frozenset[Partition] = frozenset()

    def read(self, partitions: frozenset[Partition]) -> list[Decision]:
        """See ``Feed``."""
        if self._reader is None:
            self._reader = TopicReader(self._kafka, self._topic, fetch_wait=1000)
        try:
            if partitions != self._followed:
                self._reader.assign({}, sorted({partition for _, partition in partitions}))
                self._followed = partitions
            return [found for record in self._reader.poll(1000, 0.0) for found in self._decode(record)]
        except OperatorError:
            self._followed = frozenset()
            raise

    def close(self) -> None:
        """See ``Feed``."""
        if self._reader is not None:
            self._reader.close()

    def _decode(self, record: Record) -> list[Decision]:
        try:
            return [self._decoder.decode(record.value or b"")]
        except Failure as failure:
            place = f"{record.topic}[{record.partition}]@{record.offset}"
            get_log("deliverer").error("decision_unreadable", code=failure.code, place=place)
            return []


class Decisions:
    """Acts on decisions between two transactions of a runner; what it changes is in the next transaction."""

    def __init__(self, feed: Feed, target: str) -> None:
        self._feed = feed
        self._log = get_log("deliverer", target=target)
        self._open: list[Decision] = []
        self._looked_at = float("-inf")
        self._complained_at = float("-inf")

    async def act(self, shards: Iterable[Shard], intake: Intake, moment: Moment) -> None:
        """Look for new decisions now and then, and act on those whose time has come."""
        ledgers = {(shard.topic, shard.partition): shard.ledger for shard in shards}
        if ledgers and moment.steady - self._looked_at >= LOOK_INTERVAL:
            self._looked_at = moment.steady
            try:
                self._open += await asyncio.to_thread(self._feed.read, frozenset(ledgers))
            except OperatorError as error:
                if moment.steady - self._complained_at >= _COMPLAINT_INTERVAL:
                    self._complained_at = moment.steady
                    self._log.warning("decisions_unreachable", code=error.code, place=error.place)
        self._open = [decision for decision in self._open if not self._take(decision, ledgers, intake, moment)]

    def close(self) -> None:
        """Give up the connection."""
        self._feed.close()

    def _take(self, decision: Decision, ledgers: Mapping[Partition, Ledger], intake: Intake, moment: Moment) -> bool:
        """Whether the decision is dealt with."""
        for ledger in ledgers.values():
            attempt = rulings.find_decided(ledger, decision)
            if attempt is None:
                continue
            ruling = rulings.rule(ledger, attempt, decision, moment)
            if ruling is Ruling.APPLIED:
                ruling = self._apply(ledger, attempt, decision, intake, moment)
            if ruling is Ruling.WAIT:
                return False
            if ruling is not Ruling.APPLIED:
                rulings.refuse_decision(ledger, attempt, decision, ruling)
            self._log.info(
                "decision_taken",
                event_id=decision.event_id,
                decision=decision.decision_id,
                action=decision.action,
                ruling=ruling.value,
            )
            return True
        # About an event that is finished, or an attempt that is over.
        return True

    def _apply(self, ledger: Ledger, attempt: Attempt, decision: Decision, intake: Intake, moment: Moment) -> Ruling:
        try:
            if attempt.event is None:
                # Its outcome tells facility and kind.
                attempt.event, _ = intake.decode(attempt.source.value)
            if decision.action == Action.REDRIVE:
                return self._redrive(ledger, attempt, decision, intake, moment)
        except TemporaryError:
            # A writer's schema we have not met, and the registry is down: nothing was changed.
            return Ruling.WAIT
        if decision.action == Action.NOT_POSTED:
            rulings.send_again(ledger, attempt, decision, moment)
        else:
            outcome = Outcome.WAIVED if decision.action == Action.WAIVE else Outcome.POSTED
            rulings.end_by_person(ledger, attempt, decision, outcome)
        return Ruling.APPLIED

    @staticmethod
    def _redrive(ledger: Ledger, attempt: Attempt, decision: Decision, intake: Intake, moment: Moment) -> Ruling:
        source = attempt.source
        if decision.value is not None:
            source = Source(source.key, decision.value, source.headers)
        event, failure = intake.decode(source.value)
        if decision.value is not None and (event is None or event.event_id != attempt.event_id):
            return Ruling.EDIT_UNUSABLE
        routed = False
        if event is not None:
            routed, failure = intake.route(event)
            if not routed and failure is None:
                attempt.event = event
                rulings.end_by_person(ledger, attempt, decision, Outcome.NOT_ROUTED)
                return Ruling.APPLIED
        rulings.begin_again(ledger, attempt, decision, source, event, moment)
        if failure is not None:
            ledger.reject(
                attempt, failure.kind, failure.code, moment, field=failure.field, outcome=Outcome.DEAD_LETTERED
            )
        return Ruling.APPLIED

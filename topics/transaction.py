"""One Kafka transaction: outputs, frontiers and input offsets together, or nothing.

Blocking; called on the thread that owns the group's consumer (``topics.group``).
"""

from __future__ import annotations

import contextlib
import threading
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import msgspec
from confluent_kafka import KafkaError, KafkaException, Producer

from schemas.failure import FatalError
from topics.cluster import PRODUCER, KafkaSettings, KafkaUnreachable, name_error

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from confluent_kafka import TopicPartition

    from topics.headers import Headers


class ProcessFenced(FatalError):
    """Another process took over this transactional id."""

    code = "RS301"
    meaning = "Another process with the same transactional id took over; this one must not write any more."
    default_remedy = "Give every process its own instance name, or let only the newer one run."


class ProducerFailed(FatalError):
    """The transactional producer can do nothing any more."""

    code = "RS308"
    meaning = "The transactional producer failed for good; what was open is rolled back."
    default_remedy = (
        "The restarted process goes on. If it repeats, check this user's rights on the transactional id, and that "
        "`kafka.transaction_timeout_seconds` is not above the broker's `transaction.max.timeout.ms`."
    )


class TransactionAborted(Exception):
    """The transaction was rolled back; rewind to the frontier and decide again."""


class RecordRefused(Exception):
    """The broker (or client) refuses one record for what it is (too large, invalid); the transaction was rolled back.

    ``cause`` is the hop it comes from; None when only the whole attempt is known to hold it: the next attempt then
    sends the records one by one.
    """

    def __init__(self, code: str, cause: str | None = None) -> None:
        super().__init__(code)
        self.code = code
        self.cause = cause


class Output(msgspec.Struct, gc=False):
    """A record to write. ``partition`` -1 lets the key decide (murmur2). ``cause`` is the hop it comes from."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = msgspec.field(default_factory=list)
    partition: int = -1
    cause: str = ""


@dataclass(slots=True)
class Changelog:
    """Changes of one partition of a changelog topic: per key the value (None removes it) and the hop it comes from."""

    topic: str
    partition: int
    entries: dict[bytes, tuple[bytes | None, str]] = field(default_factory=dict)
    offset: int = -1
    """Of the last record written; set when the transaction has committed."""


_REFUSALS = frozenset(
    {
        KafkaError.MSG_SIZE_TOO_LARGE,
        KafkaError.INVALID_MSG,
        KafkaError.INVALID_MSG_SIZE,
        KafkaError.INVALID_RECORD,
        KafkaError.RECORD_LIST_TOO_LARGE,
    }
)
_OFFSETS_SECONDS = 5.0

MARKER_SECONDS = 0.006
"""A transaction begins no sooner after the last one's commit. Until the coordinator has written that one's markers it
refuses the next (CONCURRENT_TRANSACTIONS), and librdkafka then waits 20 ms and more. A batch of some hundred records is
decided for longer than this anyway; only small ones wait."""

_FENCED = frozenset({KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED})  # noqa: SLF001


class Transactor:
    """A transactional producer: one per process and slot.

    A producer whose transaction can be neither begun, finished nor aborted is replaced: the successor's first call
    makes the broker abort what the old one left open. Never after a commit was asked for: then only the log can tell.
    """

    def __init__(self, kafka: KafkaSettings, transactional_id: str) -> None:
        self.transactional_id = transactional_id
        self._bootstrap = kafka.bootstrap
        self._configuration = (
            kafka.build_client(transactional_id)
            | PRODUCER
            | {
                "transactional.id": transactional_id,
                "transaction.timeout.ms": kafka.transaction_timeout_seconds * 1000,
                "delivery.timeout.ms": kafka.transaction_timeout_seconds * 1000,
                "linger.ms": 5,
                "queue.buffering.max.messages": 500_000,
            }
        )
        self._producer: Any = Producer(self._configuration)
        self._is_open = False
        self._one_by_one = False
        self._committed_at = float("-inf")

    def open(self, timeout: float = 30.0) -> None:
        """Fence every earlier process of this id.

        Raises ``KafkaUnreachable``, or ``ProducerFailed`` when asking again would not help: the client refuses it too.
        """
        try:
            self._producer.init_transactions(timeout)
        except KafkaException as error:
            self._stop_if_over(error.args[0])
            raise KafkaUnreachable(f"no transaction ({name_error(error)}).", place=self._bootstrap) from None
        self._is_open = True

    def commit(
        self,
        outputs: Sequence[Output],
        offsets: list[TopicPartition],
        group_metadata: object,
        changelogs: Sequence[Changelog] = (),
    ) -> None:
        """Write all outputs, changelogs and the input offsets in one transaction; set each changelog's ``offset``.

        Everything is flushed and acknowledged before the offsets are sent: the last step before the commit.
        Raises ``TransactionAborted``, ``RecordRefused`` or ``ProcessFenced``; then nothing of it is visible.
        """
        if not self._is_open:
            try:
                self.open(8.0)
            except KafkaUnreachable as error:
                # Nothing is open, so nothing is lost with it; a client can lose its brokers for good (`TopicReader`).
                self._replace()
                raise TransactionAborted(error.detail) from None
        # Of this transaction: a late report of a replaced producer goes into the old ones.
        reports = [_Reports() for _ in range(len(changelogs) + 1)]
        time.sleep(max(0.0, self._committed_at + MARKER_SECONDS - time.monotonic()))
        with self._rolled_back_on_error():
            self._producer.begin_transaction()
            if self._one_by_one:
                self._produce_one_by_one(outputs, changelogs, reports)
            else:
                self._produce(outputs, reports[-1])
                for changelog, report in zip(changelogs, reports, strict=False):
                    self._produce_changelog(changelog, report)
                is_flushed = self._producer.flush(8.0) == 0
                self._check_reports(reports, outputs, changelogs, is_flushed=is_flushed)
            self._send_offsets(offsets, group_metadata)
        self._commit()
        self._committed_at = time.monotonic()
        self._one_by_one = False
        for changelog, report in zip(changelogs, reports, strict=False):
            changelog.offset = report[None].offset() if changelog.entries else -1

    def prove(self, probe: Output) -> None:
        """Return when no newer process has this transactional id: ``probe`` is written, and rolled back.

        Raises ``ProcessFenced`` when there is one, ``TransactionAborted`` when Kafka does not tell.
        """
        if not self._is_open:
            return
        report = _Reports()
        time.sleep(max(0.0, self._committed_at + MARKER_SECONDS - time.monotonic()))
        with self._rolled_back_on_error():
            self._producer.begin_transaction()
            self._produce([probe], report)
            self._producer.flush(8.0)
        self._abort()
        self._committed_at = time.monotonic()
        if None not in report:
            raise TransactionAborted("the probe was not acknowledged")

    def close(self) -> None:
        """Abort what is open. Fenced or unanswered, the coordinator does it by itself."""
        self._producer.purge()
        with contextlib.suppress(KafkaException):
            self._producer.abort_transaction(8.0)

    def _send_offsets(self, offsets: list[TopicPartition], group_metadata: object) -> None:
        """Add the offsets. When the call hangs, the producer is replaced and the transaction rolled back.

        librdkafka's own timeout does not hold while it waits for a coordinator that it knew before a broker restarted
        (its issues 5456 and 5511): without this the process would stand still for good.
        """
        producer, outcome = self._producer, list[Exception | None]()

        def send() -> None:
            try:
                producer.send_offsets_to_transaction(offsets, group_metadata, _OFFSETS_SECONDS)
            except Exception as error:  # noqa: BLE001 - raised again below, on the thread that waits
                outcome.append(error)
            else:
                outcome.append(None)

        thread = threading.Thread(target=send, name="kafka-offsets", daemon=True)
        thread.start()
        thread.join(_OFFSETS_SECONDS + 1)
        if not outcome:
            self._replace()
            raise TransactionAborted("_TIMED_OUT")
        if outcome[0] is not None:
            raise outcome[0]

    def _replace(self) -> None:
        """Give the producer up; nothing of its open transaction will ever be visible."""
        abandoned = [self._producer]
        # Closing it may take as long as the call that hangs.
        threading.Thread(target=abandoned.clear, name="kafka-abandoned", daemon=True).start()
        self._producer = Producer(self._configuration)
        self._is_open = False

    def _produce(self, outputs: Sequence[Output], report: _Reports) -> None:
        produce, note = self._producer.produce, report.__setitem__
        for output in outputs:
            try:
                if output.headers:
                    produce(output.topic, output.value, output.key, output.partition, note, headers=output.headers)
                else:
                    produce(output.topic, output.value, output.key, output.partition, note)
            except (BufferError, KafkaException) as error:
                self._insist(error, output, note)

    def _produce_changelog(self, changelog: Changelog, report: _Reports) -> None:
        produce, note = self._producer.produce, report.__setitem__
        topic, partition = changelog.topic, changelog.partition
        for key, (value, cause) in changelog.entries.items():
            try:
                produce(topic, value, key, partition, note)
            except (BufferError, KafkaException) as error:
                self._insist(error, Output(topic, key, value, partition=partition, cause=cause), note)

    def _produce_one_by_one(
        self, outputs: Sequence[Output], changelogs: Sequence[Changelog], reports: list[_Reports]
    ) -> None:
        """Know of each record whether the broker takes it."""
        for output in outputs:
            self._produce([output], reports[-1])
            self._check_one(reports[-1], output.cause)
        for changelog, report in zip(changelogs, reports, strict=False):
            for key, entry in changelog.entries.items():
                self._produce_changelog(Changelog(changelog.topic, changelog.partition, {key: entry}), report)
                self._check_one(report, entry[1])

    def _check_one(self, report: _Reports, cause: str) -> None:
        is_flushed = self._producer.flush(8.0) == 0
        errors = [error for error in report if error is not None]
        if is_flushed and not errors:
            return
        self._abort()
        if errors and errors[0].code() in _REFUSALS:
            self._one_by_one = False
            raise RecordRefused(errors[0].name(), cause)
        raise TransactionAborted("a record was not acknowledged")

    def _insist(self, error: BufferError | KafkaException, output: Output, note: Any) -> None:
        """Produce a record for which the client's queue had no room, or say that the client refuses it."""
        while isinstance(error, BufferError):
            self._producer.poll(0.05)
            try:
                self._producer.produce(
                    output.topic, output.value, output.key, output.partition, note, headers=output.headers
                )
            except (BufferError, KafkaException) as again:
                error = again
            else:
                return
        if error.args[0].code() in _REFUSALS:
            self._abort()
            raise RecordRefused(name_error(error), output.cause) from None
        raise error

    def _check_reports(
        self,
        reports: Sequence[_Reports],
        outputs: Sequence[Output],
        changelogs: Sequence[Changelog],
        *,
        is_flushed: bool,
    ) -> None:
        errors = [(error, message) for report in reports for error, message in report.items() if error is not None]
        if is_flushed and not errors:
            return
        self._abort()
        refused = [error for error, _ in errors if error.code() in _REFUSALS]
        if not refused:
            raise TransactionAborted("a record was not acknowledged")
        # The broker refuses a whole produce request, and one report stands for all with the same error: only sending
        # one by one tells which record it is, unless there is just one.
        if len(outputs) + sum(len(changelog.entries) for changelog in changelogs) == 1:
            raise RecordRefused(refused[0].name(), _find_only_cause(outputs, changelogs))
        self._one_by_one = True
        raise RecordRefused(refused[0].name())

    def _commit(self) -> None:
        for _ in range(3):
            try:
                self._producer.commit_transaction(8.0)
            except KafkaException as error:
                cause = error.args[0]
                # Retriable means the outcome is open: asking again is the only right thing.
                if cause.retriable():
                    continue
                if cause.txn_requires_abort():
                    # The coordinator refused to commit. Only a confirmed abort may follow; a new producer would hide
                    # which of the two it was.
                    self._confirm_abort()
                    raise TransactionAborted(cause.name()) from None
                self._stop_if_over(cause)
                break
            return
        raise UndecidedCommit("the coordinator does not say whether the transaction stands.", place=self._bootstrap)

    def _confirm_abort(self) -> None:
        try:
            self._producer.abort_transaction(8.0)
        except KafkaException as error:
            raise UndecidedCommit(
                f"after a refused commit the abort is not confirmed ({name_error(error)}).", place=self._bootstrap
            ) from None

    @contextlib.contextmanager
    def _rolled_back_on_error(self) -> Iterator[None]:
        """What fails before a commit was asked for ends the transaction."""
        try:
            yield
        except KafkaException as error:
            self._fail(error)
        except SystemError as error:
            # Of a fatal error the client makes an exception, and then calls the delivery reports over it.
            if not isinstance(error.__cause__, KafkaException):
                raise
            self._fail(error.__cause__)

    def _fail(self, error: KafkaException) -> None:
        """Roll back what failed before a commit was asked for."""
        cause = error.args[0]
        self._stop_if_over(cause)
        self._abort()
        raise TransactionAborted(cause.name()) from None

    def _stop_if_over(self, cause: KafkaError) -> None:
        if cause.code() in _FENCED:
            raise ProcessFenced("a newer process is running.", place=self.transactional_id) from None
        if cause.fatal():
            raise ProducerFailed(f"the client gave up ({cause.name()}).", place=self.transactional_id) from None

    def _abort(self) -> None:
        self._producer.purge()
        try:
            self._producer.abort_transaction(8.0)
        except KafkaException as error:
            cause = error.args[0]
            self._stop_if_over(cause)
            if cause.retriable():
                self._replace()


_Reports = dict[Any, Any]
"""Delivery reports by error (None for success), the last message of each: a dictionary's own method takes them at a
third of the cost of a function, and only the last offset and the kinds of error are wanted."""


def _find_only_cause(outputs: Sequence[Output], changelogs: Sequence[Changelog]) -> str:
    if outputs:
        return outputs[0].cause
    return next(cause for changelog in changelogs for _, cause in changelog.entries.values())


class UndecidedCommit(FatalError):
    """It is not known whether a transaction committed; a restart asks the log."""

    code = "RS302"
    meaning = "The coordinator did not answer whether a transaction committed; only a restart can tell from the log."
    default_remedy = "Nothing by hand: the process manager restarts the process, which reads the frontier."

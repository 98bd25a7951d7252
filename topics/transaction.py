"""One Kafka transaction: outputs, frontiers and input offsets together, or nothing.

Blocking; called on the thread that owns the group's consumer (``topics.group``).
"""

from __future__ import annotations

import contextlib
import threading
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException, Producer

from schemas.failure import FatalError
from topics.cluster import PRODUCER, KafkaSettings, KafkaUnreachable, name_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from confluent_kafka import TopicPartition

    from topics.headers import Headers


class ProcessFenced(FatalError):
    """Another process took over this transactional id."""

    code = "RS301"
    meaning = "Another process with the same transactional id took over; this one must not write any more."
    default_remedy = "Give every process its own instance name, or let only the newer one run."


class TransactionAborted(Exception):
    """The transaction was rolled back; rewind to the frontier and decide again."""


class RecordRefused(Exception):
    """The broker (or client) refuses one record for what it is (too large, invalid); the transaction was rolled back.

    ``index`` is its place in the outputs, or None when only the whole attempt is known to hold it; the next attempt
    then sends the records one by one to find it.
    """

    def __init__(self, index: int | None, code: str) -> None:
        super().__init__(code)
        self.index = index
        self.code = code


@dataclass(slots=True)
class Output:
    """A record to write. ``partition`` None lets the key decide (murmur2). ``cause`` is the hop it comes from."""

    topic: str
    key: bytes
    value: bytes | None
    headers: Headers = field(default_factory=list)
    partition: int | None = None
    cause: str = ""
    offset: int = -1
    """Where it was written; set when the transaction has committed."""


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

_FENCED = frozenset({KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED})  # noqa: SLF001


class Transactor:
    """A transactional producer: one per process and slot.

    A producer whose transaction can be neither finished nor aborted is replaced: the successor's first call makes the
    broker abort what the old one left open. Never after a commit was asked for: then only the log can tell.
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
        self._delivered: list[tuple[Output, int]] = []
        self._errors: list[tuple[Output | None, Any]] = []
        self._one_by_one = False

    def open(self, timeout: float = 30.0) -> None:
        """Fence every earlier process of this id. Raises ``KafkaUnreachable``."""
        try:
            self._producer.init_transactions(timeout)
        except KafkaException as error:
            if error.args[0].code() in _FENCED:
                raise ProcessFenced("a newer process is running.", place=self.transactional_id) from None
            raise KafkaUnreachable(f"no transaction ({name_error(error)}).", place=self._bootstrap) from None
        self._is_open = True

    def commit(self, outputs: Sequence[Output], offsets: list[TopicPartition], group_metadata: object) -> None:
        """Write all outputs and the input offsets in one transaction; set each output's ``offset``.

        Everything is flushed and acknowledged before the offsets are sent: the last step before the commit.
        Raises ``TransactionAborted``, ``RecordRefused`` or ``ProcessFenced``; then nothing of it is visible.
        """
        if not self._is_open:
            try:
                self.open(8.0)
            except KafkaUnreachable as error:
                raise TransactionAborted(error.detail) from None
        # Lists of this transaction: a late report of a replaced producer goes into the old ones.
        self._delivered, self._errors = [], []
        try:
            self._producer.begin_transaction()
            for index, output in enumerate(outputs):
                self._produce(index, output)
                if self._one_by_one and (self._producer.flush(8.0) or self._errors):
                    break
            if self._producer.flush(8.0):
                self._errors.append((None, None))
            if self._errors:
                self._raise_delivery_error(outputs)
            self._send_offsets(offsets, group_metadata)
        except KafkaException as error:
            self._fail(error)
        self._commit()
        self._one_by_one = False
        for output, offset in self._delivered:
            output.offset = offset

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

    def _produce(self, index: int, output: Output) -> None:
        arguments: dict[str, Any] = {"headers": output.headers, "on_delivery": self._build_reporter(output)}
        if output.partition is not None:
            arguments["partition"] = output.partition
        while True:
            try:
                self._producer.produce(output.topic, output.value, output.key, **arguments)
            except BufferError:
                self._producer.poll(0.05)
                continue
            except KafkaException as error:
                code = error.args[0].code()
                if code in _REFUSALS:
                    self._abort()
                    raise RecordRefused(index, name_error(error)) from None
                raise
            return

    def _build_reporter(self, output: Output) -> Any:
        delivered, errors = self._delivered, self._errors

        def report(error: Any, message: Any) -> None:
            if error is None:
                delivered.append((output, message.offset()))
            else:
                errors.append((output, error))

        return report

    def _raise_delivery_error(self, outputs: Sequence[Output]) -> None:
        refused = [(output, error) for output, error in self._errors if error is not None and error.code() in _REFUSALS]
        self._abort()
        if refused:
            output, error = refused[0]
            # The broker refuses a whole produce request: only a lone record is known to be the culprit.
            self._one_by_one = len(refused) > 1
            index = next((i for i, known in enumerate(outputs) if known is output), None)
            raise RecordRefused(None if self._one_by_one else index, error.name())
        raise TransactionAborted("a record was not acknowledged")

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
            raise FatalError(f"the producer failed for good ({cause.name()}).", place=self.transactional_id) from None

    def _abort(self) -> None:
        self._producer.purge()
        try:
            self._producer.abort_transaction(8.0)
        except KafkaException as error:
            cause = error.args[0]
            self._stop_if_over(cause)
            if cause.retriable():
                self._replace()


class UndecidedCommit(FatalError):
    """It is not known whether a transaction committed; a restart asks the log."""

    code = "RS302"
    meaning = "The coordinator did not answer whether a transaction committed; only a restart can tell from the log."
    default_remedy = "Nothing by hand: the process manager restarts the process, which reads the frontier."

"""One Kafka transaction: outputs, frontiers and input offsets together, or nothing.

Blocking; called on the thread that owns the group's consumer (``topics.group``).
"""

from __future__ import annotations

import contextlib
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
_FENCED = frozenset({KafkaError._FENCED, KafkaError.INVALID_PRODUCER_EPOCH, KafkaError.PRODUCER_FENCED})  # noqa: SLF001


class Transactor:
    """A transactional producer: one per process and slot."""

    def __init__(self, kafka: KafkaSettings, transactional_id: str) -> None:
        self.transactional_id = transactional_id
        self._bootstrap = kafka.bootstrap
        self._producer = Producer(
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

    def commit(self, outputs: Sequence[Output], offsets: list[TopicPartition], group_metadata: object) -> None:
        """Write all outputs and the input offsets in one transaction; set each output's ``offset``.

        Everything is flushed and acknowledged before the offsets are sent: the last step before the commit.
        Raises ``TransactionAborted``, ``RecordRefused`` or ``ProcessFenced``; then nothing of it is visible.
        """
        self._delivered.clear()
        self._errors.clear()
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
            self._producer.send_offsets_to_transaction(offsets, group_metadata, 8.0)
            self._commit()
        except KafkaException as error:
            self._fail(error)
        self._one_by_one = False
        for output, offset in self._delivered:
            output.offset = offset

    def close(self) -> None:
        """Abort what is open. Fenced or unanswered, the coordinator does it by itself."""
        with contextlib.suppress(FatalError):
            self._abort()

    def _produce(self, index: int, output: Output) -> None:
        arguments: dict[str, Any] = {"headers": output.headers, "on_delivery": self._reporter(output)}
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

    def _reporter(self, output: Output) -> Any:
        def report(error: Any, message: Any) -> None:
            if error is None:
                self._delivered.append((output, message.offset()))
            else:
                self._errors.append((output, error))

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
                # Retriable means the outcome is open: asking again is the only right thing.
                if error.args[0].retriable():
                    continue
                raise
            return
        raise UndecidedCommit("the coordinator does not say whether the transaction stands.", place=self._bootstrap)

    def _fail(self, error: KafkaException) -> None:
        cause = error.args[0]
        if cause.code() in _FENCED:
            raise ProcessFenced("a newer process is running.", place=self.transactional_id) from None
        if cause.fatal():
            raise FatalError(f"the producer failed for good ({cause.name()}).", place=self.transactional_id) from None
        self._abort()
        raise TransactionAborted(cause.name()) from None

    def _abort(self) -> None:
        self._producer.purge()
        try:
            self._producer.abort_transaction(8.0)
        except KafkaException as error:
            cause = error.args[0]
            if cause.code() in _FENCED:
                raise ProcessFenced("a newer process is running.", place=self.transactional_id) from None
            if cause.fatal():
                raise FatalError(
                    f"the producer failed for good ({cause.name()}).", place=self.transactional_id
                ) from None
            if cause.retriable():
                raise UndecidedCommit("the abort is not confirmed.", place=self._bootstrap) from None


class UndecidedCommit(FatalError):
    """It is not known whether a transaction committed; a restart asks the log."""

    code = "RS302"
    meaning = "The coordinator did not answer whether a transaction committed; only a restart can tell from the log."
    default_remedy = "Nothing by hand: the process manager restarts the process, which reads the frontier."

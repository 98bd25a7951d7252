"""Reading a topic without a group: from given offsets up to where it ends now.

Changelogs, frontiers, projections and accounts read this way. Blocking; run it in a thread.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any, Literal

import msgspec
from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from schemas.failure import TemporaryError
from topics.cluster import KafkaSettings, KafkaUnreachable, describe_topic_ids, name_error, reaches_broker
from topics.headers import Headers, read_headers

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator, Mapping

Isolation = Literal["read_committed", "read_uncommitted"]


_LISTINGS = 5
_LEADER_MOVED = frozenset(
    {
        KafkaError.NOT_LEADER_FOR_PARTITION,
        KafkaError.LEADER_NOT_AVAILABLE,
        KafkaError.FENCED_LEADER_EPOCH,
        KafkaError.UNKNOWN_LEADER_EPOCH,
    }
)
"""Just after a topic was made, or a leader changed; the next answer is right."""


class TopicMissing(TemporaryError):
    """A topic that must exist does not."""

    code = "RS211"
    meaning = "A topic of the catalog does not exist."
    default_remedy = "Run `remitstream topics apply`."


class Record(msgspec.Struct, gc=False):
    """One record as read; ``timestamp`` in milliseconds since the epoch."""

    topic: str
    partition: int
    offset: int
    key: bytes | None
    value: bytes | None
    headers: Headers
    timestamp: int


def build_record(message: Any, topic: str, partition: int, offset: int) -> Record:
    """The record of a Kafka message."""
    return Record(
        topic, partition, offset, message.key(), message.value(), read_headers(message), message.timestamp()[1]
    )


SILENT_SECONDS = 30.0
"""A reader that heard nothing for so long looks whether its client still reaches a broker."""


class TopicReader:
    """Reads all or some partitions of one topic. Positions move over transaction markers and aborted records.

    librdkafka 2.16 can lose all its brokers for good when one restarts, while a new client reaches them: a client that
    reaches none is replaced, and goes on from the positions.
    ``fetch_wait`` is how long, in milliseconds, the broker holds a question to which there is no answer yet: a reader
    that mostly waits asks less often with a longer one; a new record is answered at once all the same.
    """

    def __init__(
        self, kafka: KafkaSettings, topic: str, *, isolation: Isolation = "read_committed", fetch_wait: int = 50
    ) -> None:
        self._kafka = kafka
        self.topic = topic
        self._positions: dict[int, int] = {}
        self._admin: AdminClient | None = None
        self._configuration = kafka.build_client(f"remitstream-read-{topic}") | {
            # A group id is required by the client; nothing is ever committed under it.
            "group.id": "remitstream-reader",
            "enable.auto.commit": False,
            "enable.auto.offset.store": False,
            "enable.partition.eof": True,
            "isolation.level": isolation,
            "auto.offset.reset": "earliest",
            "fetch.wait.max.ms": fetch_wait,
            "fetch.queue.backoff.ms": 10,
        }
        self._consumer = Consumer(self._configuration)
        self._heard_at = time.monotonic()

    def partitions(self) -> list[int]:
        """Partition numbers of the topic. Raises ``KafkaUnreachable`` or ``TopicMissing``."""
        try:
            metadata = self._consumer.list_topics(self.topic, timeout=10).topics[self.topic]
        except (KafkaException, KeyError) as error:
            self._replace()
            raise KafkaUnreachable(f"no metadata ({name_error(error)}).", place=self.topic) from None
        if metadata.error is not None or not metadata.partitions:
            raise TopicMissing("the topic does not exist.", place=self.topic)
        return sorted(metadata.partitions)

    def topic_id(self) -> str:
        """The topic's id; another id under the same name means it was deleted and made again."""
        ids = describe_topic_ids(self._kafka, [self.topic])
        if self.topic not in ids:
            raise TopicMissing("the topic does not exist.", place=self.topic)
        return ids[self.topic]

    def assign(self, offsets: Mapping[int, int], partitions: Iterable[int] | None = None) -> None:
        """Read these partitions (all by default) from the given next offsets; a missing one begins at log start."""
        chosen = self.partitions() if partitions is None else list(partitions)
        self._positions = {partition: offsets.get(partition, 0) for partition in chosen}
        self._place()

    def poll(self, max_records: int, timeout: float) -> list[Record]:
        """Up to ``max_records`` records, waiting at most ``timeout`` seconds for the first."""
        records: list[Record] = []
        first = self._consumer.poll(timeout)
        if first is None:
            self._look_after_silence()
            return records
        messages = [first, *self._consumer.consume(max_records - 1, 0)] if max_records > 1 else [first]
        for message in messages:
            error = message.error()
            if error is not None:
                if error.code() == KafkaError._PARTITION_EOF:  # noqa: SLF001 - the public name of that constant
                    self._heard_at = time.monotonic()
                    self._move(message.partition(), message.offset())
                    continue
                if error.retriable() or error.code() in (KafkaError._ALL_BROKERS_DOWN, KafkaError._TRANSPORT):  # noqa: SLF001
                    continue
                raise KafkaUnreachable(f"reading failed ({error.name()}).", place=self.topic)
            self._heard_at = time.monotonic()
            partition, offset = message.partition(), message.offset()
            self._move(partition, offset + 1)
            records.append(build_record(message, self.topic, partition, offset))
        return records

    def positions(self) -> dict[int, int]:
        """Next offset of each assigned partition."""
        return dict(self._positions)

    def end_offsets(self, isolation: Isolation = "read_uncommitted") -> dict[int, int]:
        """End of each assigned (or every) partition: high watermark, or last stable offset for ``read_committed``."""
        level = IsolationLevel.READ_COMMITTED if isolation == "read_committed" else IsolationLevel.READ_UNCOMMITTED
        return self._list_offsets(OffsetSpec.latest(), level)

    def start_offsets(self) -> dict[int, int]:
        """Log start of each assigned (or every) partition."""
        return self._list_offsets(OffsetSpec.earliest(), IsolationLevel.READ_UNCOMMITTED)

    def close(self) -> None:
        """Give up the connection."""
        self._consumer.close()

    def _list_offsets(self, spec: OffsetSpec, level: IsolationLevel) -> dict[int, int]:
        partitions = list(self._positions) or self.partitions()
        requests = {TopicPartition(self.topic, partition): spec for partition in partitions}
        for attempt in range(_LISTINGS):
            if self._admin is None:
                self._admin = AdminClient(self._kafka.build_client("remitstream-offsets"))
            try:
                futures = self._admin.list_offsets(requests, isolation_level=level, request_timeout=10)
                return {tp.partition: future.result().offset for tp, future in futures.items()}
            except KafkaException as error:
                # It would keep asking under the leader it knows, minutes after the leader has changed or restarted.
                self._admin = None
                if attempt == _LISTINGS - 1 or error.args[0].code() not in _LEADER_MOVED:
                    raise KafkaUnreachable(
                        f"offsets cannot be listed ({name_error(error)}).", place=self.topic
                    ) from None
            time.sleep(0.2)
        raise AssertionError("the last attempt returns or raises")

    def _look_after_silence(self) -> None:
        """A topic to which nobody writes is silent, too; a client without brokers has no metadata."""
        if time.monotonic() - self._heard_at < SILENT_SECONDS:
            return
        self._heard_at = time.monotonic()
        if not reaches_broker(self._consumer, self.topic):
            self._replace()

    def _replace(self) -> None:
        self._consumer.close()
        self._consumer = Consumer(self._configuration)
        self._place()

    def _place(self) -> None:
        # Position 0 is the log's start, which is later when old segments are gone.
        self._consumer.assign(
            [
                TopicPartition(self.topic, partition, offset or OFFSET_BEGINNING)
                for partition, offset in self._positions.items()
            ]
        )

    def _move(self, partition: int, offset: int) -> None:
        if offset > self._positions.get(partition, 0):
            self._positions[partition] = offset


def keep_latest(records: Iterable[Record]) -> dict[bytes, Record]:
    """Of a compacted topic the last record of each key that is not deleted."""
    latest: dict[bytes, Record] = {}
    for record in records:
        if record.value is None:
            latest.pop(record.key or b"", None)
        else:
            latest[record.key or b""] = record
    return latest


def read_to_end(
    kafka: KafkaSettings,
    topic: str,
    *,
    offsets: Mapping[int, int] | None = None,
    partitions: Iterable[int] | None = None,
    deadline_seconds: float = 60.0,
    stop: Callable[[], bool] = lambda: False,
) -> Iterator[Record | dict[int, int]]:
    """Yield every committed record up to the high watermark seen at the start, then the final positions (a dict).

    The watermark is taken read-uncommitted and the records read_committed until the position reaches it: an entry of a
    transaction whose marker is still on the way is waited for, not missed. Raises ``KafkaUnreachable`` when that takes
    longer than the deadline without progress.
    """
    reader = TopicReader(kafka, topic)
    try:
        reader.assign(offsets or {}, partitions)
        ends = reader.end_offsets("read_uncommitted")
        starts = reader.start_offsets()
        behind = {partition: end for partition, end in ends.items() if end > starts[partition]}
        patience = time.monotonic() + deadline_seconds
        while any(reader.positions()[partition] < end for partition, end in behind.items()):
            if stop():
                raise KafkaUnreachable("reading was stopped.", place=topic)
            before = reader.positions()
            yield from reader.poll(5000, 0.2)
            if reader.positions() != before:
                patience = time.monotonic() + deadline_seconds
            elif time.monotonic() > patience:
                raise KafkaUnreachable("the end of the topic is not reached.", place=topic)
        yield {partition: max(position, ends[partition]) for partition, position in reader.positions().items()}
    finally:
        reader.close()

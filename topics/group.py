"""A consumer of one group that owns positions, fences itself, and commits with its outputs in one transaction.

The rules (each answers a way to lose or double a record):

* One thread owns the consumer and the transactional producer; polling, rebalance callbacks and commits run on it.
* Every assign, revoke and lost raises the assignment number. A batch is committed only under the number it was polled
  under; the group metadata is taken right after that check, on the same thread.
* A partition starts at its frontier, after its state was loaded, and after no predecessor's transaction is undecided.
* After any rebalance and after any abort every kept partition is sought to its frontier; nothing is skipped.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from enum import Enum
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition

from schemas.failure import ConfigurationError, FatalError, OperatorError, TemporaryError
from topics import catalog, frontier
from topics.cluster import COMPLAINT_SECONDS, KafkaUnreachable, describe_topics
from topics.lease import STATISTICS_INTERVAL_MS, Lease, read_client_time, read_sleepless_time
from topics.reading import TopicMissing, TopicReader
from topics.transaction import Changelog, Output, RecordRefused, TransactionAborted, Transactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from topics.cluster import KafkaSettings

T = TypeVar("T")
R = TypeVar("R")
Partition = tuple[str, int]
"""Topic name and partition number."""


_STANDSTILL = frozenset(
    {
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    }
)
"""The client goes on asking, in vain until somebody acts, and nobody else would tell."""

TOPICS_SECONDS = 30.0
"""How often a member looks whether its topics are still the ones it began with."""


REJOINS = 2
FENCED_SECONDS = 60.0
"""A member that the group fences joins it again, at most this often within so many seconds."""


class StaleAssignment(Exception):
    """The batch was polled under an earlier assignment; it was dropped and will be read again by whoever owns it."""


class PositionBroken(FatalError):
    """A batch does not begin at the frontier."""

    code = "RS304"
    meaning = "Records came out of order with the frontier; going on could skip or repeat some."
    default_remedy = "Nothing by hand: the process manager restarts the process; report it if it repeats."


class PartitionsChanged(ConfigurationError):
    """A topic has another number of partitions than the settings say."""

    code = "RS134"
    meaning = "A topic's partition count is not `worker.partitions`: the same key would go to two partitions."
    default_remedy = (
        "Correct `worker.partitions` if it is the setting that is wrong. If partitions were added to a topic, its "
        "order and dedupe are broken: stop all writers and move to a new generation of topics."
    )


class TopicReplaced(FatalError):
    """A topic was deleted and made again under a running process."""

    code = "RS307"
    meaning = "A topic was deleted and made again while this process ran; its offsets mean other records now."
    default_remedy = (
        "The restarted process reads the new topic from its begin. What the old one held and was not processed is gone "
        "with it: a gateway can send it again."
    )


class MemberFenced(FatalError):
    """The group does not let this member in any more."""

    code = "RS309"
    meaning = "The group's coordinator fenced this member again and again: another one of its name is in the group."
    default_remedy = "Give every process its own instance name and slot; look for one that was started twice."


class Membership(Enum):
    """How a group shares its partitions out."""

    STICKY = "classic, cooperative-sticky"
    """Each member keeps what it has; whoever joins gets the first topics' partitions, of the last ones perhaps none."""
    SPREAD = "classic, roundrobin"
    """Every member gets its share of every topic; all partitions pause when a member joins or leaves."""
    SERVER = "consumer"
    """KIP-848: the broker shares out, by ranges of every topic, and sets the session time-out. No static ids there: a
    killed static member would block its successor until the session ends."""

    def build_client(self, instance: str, session_ms: int) -> dict[str, Any]:
        """Configuration of the consumer. librdkafka refuses session settings and assignors of ours with ``SERVER``."""
        if self is Membership.SERVER:
            return {"group.protocol": "consumer", "group.remote.assignor": "range"}
        return {
            "group.instance.id": instance,
            "partition.assignment.strategy": "roundrobin" if self is Membership.SPREAD else "cooperative-sticky",
            "session.timeout.ms": session_ms,
            "heartbeat.interval.ms": min(3000, session_ms // 6),
        }


@dataclass(slots=True)
class Polled(Generic[R]):
    """Records of one poll by partition, in offset order, with the assignment number they belong to."""

    number: int
    partitions: dict[Partition, list[R]] = field(default_factory=dict)

    @property
    def records(self) -> list[R]:
        """All records, partition after partition."""
        return [record for records in self.partitions.values() for record in records]


@dataclass(slots=True)
class _Owned:
    """What is known of an assigned partition; ``frontier`` is the next offset to be processed."""

    frontier: int
    active: bool = False
    paused: bool = False
    placed: bool = True
    """Just assigned or sought: the first record is checked against the frontier."""


@dataclass(frozen=True, slots=True)
class LastWork:
    """What is committed for partitions just before they are given up; ``committed`` runs after it."""

    outputs: Sequence[Output] = ()
    positions: Mapping[Partition, int] = field(default_factory=dict)
    committed: Callable[[], None] = lambda: None


class GroupConsumer(Generic[R]):
    """A member of a consumer group with exactly-once positions.

    ``build`` makes the caller's record of a message, its topic, partition and offset (``topics.reading.build_record``).
    ``load`` is called in a worker thread for each newly assigned partition, before its first record, and returns when
    the partition's local state is current (it may raise ``TemporaryError`` to be called again). ``release`` is called
    on the consumer's thread when a partition is taken away. ``hand_over`` is called on it before that, while the group
    waits and gives the partitions to nobody: what it returns is committed under the assignment number that still holds.
    It is not called when they are lost already, nor by ``close``. It must return well before the session ends.
    ``keeps_records`` says that the caller keeps records above the frontier over a rewind and finishes them meanwhile:
    then those that come again below it are dropped.
    ``membership`` says how partitions are shared out; ``partitions`` is the count every topic must have.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        group: str,
        topics: Sequence[str],
        instance: str,
        transactional_id: str,
        build: Callable[[Any, str, int, int], R],
        load: Callable[[str, int], None] = lambda _topic, _partition: None,
        release: Callable[[str, int], None] = lambda _topic, _partition: None,
        hand_over: Callable[[Sequence[Partition]], LastWork] = lambda _partitions: LastWork(),
        report: Callable[[str, OperatorError], None] = lambda _event, _error: None,
        keeps_records: bool = False,
        membership: Membership = Membership.STICKY,
        partitions: int | None = None,
    ) -> None:
        self.group = group
        self.topics = list(topics)
        self.number = 0
        self.failure: OperatorError | None = None
        self._kafka = kafka
        self._instance = instance
        self._build = build
        self._load = load
        self._release = release
        self._hand_over = hand_over
        self._report = report
        self._keeps_records = keeps_records
        self._membership = membership
        self._lease = self._make_lease()
        self._partitions = partitions
        self._owned: dict[Partition, _Owned] = {}
        self.topic_ids: dict[str, str] = {}
        self._consumer: Any = None
        self._transactor = Transactor(kafka, transactional_id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kafka-{group}")
        self._loaders = ThreadPoolExecutor(4, thread_name_prefix=f"load-{group}")
        self._load_locks: dict[Partition, Lock] = {}
        self._topics_seen_at = time.monotonic()
        self._told: dict[tuple[str, int], float] = {}
        self._fenced_at: list[float] = []
        self._is_fenced = False
        """The client has given up its membership for good."""
        self._all_paused = False
        self._is_placing = False
        self._closed = False

    async def start(self) -> None:
        """Fence predecessors, subscribe. Raises ``KafkaUnreachable``."""
        await self._call(self._open)

    async def poll(self, max_records: int, wait: float) -> Polled[R]:
        """Records of active partitions; empty after ``wait`` seconds without any. Raises ``FatalError``."""
        return await self._call(self._poll, max_records, wait)

    async def commit(
        self,
        number: int,
        outputs: Sequence[Output],
        positions: Mapping[Partition, int],
        *,
        changelogs: Sequence[Changelog] = (),
        committed: Callable[[], None] = lambda: None,
    ) -> None:
        """One transaction: outputs, changelogs, frontiers and offsets of ``positions`` (next offset per partition).

        ``committed`` runs on the consumer's thread right after the commit, before any later poll. Raises
        ``StaleAssignment``, ``TransactionAborted`` or ``RecordRefused``: the partitions are then back at their frontier
        and nothing is visible. ``positions`` must not be empty: an offset is what fences a zombie.
        """
        await self._call(self._commit, number, outputs, changelogs, positions, committed)

    async def rewind(self) -> None:
        """Seek every active partition to its frontier (a batch was given up)."""
        await self._call(self._rewind)

    async def call(self, function: Callable[..., T], *arguments: object) -> T:
        """Run a function on the consumer's thread."""
        return await self._call(function, *arguments)

    def is_ready(self) -> bool:
        """Subscribed, and every assigned partition is loaded."""
        placed = self.number > 0 and not self._is_placing
        return self.failure is None and placed and all(owned.active for owned in list(self._owned.values()))

    @property
    def last_heartbeat(self) -> float:
        """When a heartbeat last reached the coordinator under this membership, as far as is known.

        In steady seconds, and as if they had passed while the machine slept, too.
        """
        return self._lease.renewed_at

    def frontiers(self) -> dict[Partition, int]:
        """Frontier of every active partition."""
        return {key: owned.frontier for key, owned in list(self._owned.items()) if owned.active}

    async def pause(self, partitions: Sequence[Partition] | None = None) -> None:
        """Stop delivering from these (default all) partitions; polling goes on so that the group keeps us."""
        await self._call(self._set_paused, partitions, True)  # noqa: FBT003

    async def resume(self, partitions: Sequence[Partition] | None = None) -> None:
        """Deliver again."""
        await self._call(self._set_paused, partitions, False)  # noqa: FBT003

    async def close(self) -> None:
        """Leave the group; what was not committed is read again by the next owner."""
        if self._closed:
            return
        self._closed = True
        await asyncio.get_running_loop().run_in_executor(self._thread, self._shut)
        self._thread.shutdown(wait=False)
        self._loaders.shutdown(wait=False, cancel_futures=True)

    # Everything below runs on the consumer's thread.

    async def _call(self, function: Callable[..., T], *arguments: object) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, lambda: function(*arguments))

    def _open(self) -> None:
        self.topic_ids = self._describe_topics()
        missing = sorted(set(self.topics) - set(self.topic_ids))
        if missing:
            raise TopicMissing("the topics do not exist.", place=", ".join(missing))
        self._transactor.open()
        self._join()

    def _make_lease(self) -> Lease:
        is_nameless = self._membership is Membership.SERVER
        return Lease(time.monotonic, read_sleepless_time, read_client_time, is_nameless=is_nameless)

    def _join(self) -> None:
        self._lease = self._make_lease()
        session = self._kafka.session_timeout_seconds * 1000
        self._consumer = Consumer(
            self._kafka.build_client(self._instance)
            | self._membership.build_client(self._instance, session)
            | {
                "group.id": self.group,
                "max.poll.interval.ms": max(300_000, session),
                "enable.auto.commit": False,
                "enable.auto.offset.store": False,
                # A position is always set from the frontier; a missing offset must never decide anything.
                "auto.offset.reset": "error",
                "isolation.level": "read_committed",
                "fetch.wait.max.ms": 20,
                "fetch.queue.backoff.ms": 10,
                "queued.max.messages.kbytes": 32_768,
                "statistics.interval.ms": STATISTICS_INTERVAL_MS,
                "stats_cb": self._lease.take_statistics,
            }
        )
        self._consumer.subscribe(
            self.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
        )

    def _poll(self, max_records: int, wait: float) -> Polled[R]:
        with self._once_failed_for_good():
            if not self._is_fenced:
                polled = self._consume(max_records, wait)
                if not self._is_fenced:
                    return polled
            self._rejoin()
            return Polled(self.number)

    def _rejoin(self) -> None:
        """Be a new member, without any partition, unless another process has taken over.

        The coordinator also fences a member for what it sent itself: after a broker was away, requests to join that
        were sent again can overtake each other, and only the last one counts.
        """
        now = time.monotonic()
        self._fenced_at = [at for at in self._fenced_at if now - at < FENCED_SECONDS]
        if len(self._fenced_at) >= REJOINS:
            raise MemberFenced(f"{len(self._fenced_at) + 1} times within {FENCED_SECONDS:.0f} s.", place=self.group)
        self._fenced_at.append(now)
        self._prove_name()
        if self._closed:
            return
        self._report("member_fenced", TemporaryError("it joins the group again.", place=self.group))
        self.number += 1
        lost = list(self._owned)
        self._owned.clear()
        for key in lost:
            self._release(*key)
        self._is_placing = True
        self._consumer.close()
        self._is_fenced = False
        self._join()

    def _prove_name(self) -> None:
        """Raise ``ProcessFenced`` when a newer process works under our name: joining again would fence it in turn."""
        wait = 0.2
        while not self._closed:
            try:
                # Rolled back, and so never read.
                self._transactor.prove(Output(catalog.FRONTIERS, b"probe", None, partition=0))
            except TransactionAborted as error:
                self._report("member_fenced", TemporaryError(str(error), place=self.group))
                time.sleep(wait)
                wait = min(wait * 2, 2.0)
            else:
                return

    @contextlib.contextmanager
    def _once_failed_for_good(self) -> Iterator[None]:
        """After an error positions, frontiers or state may disagree: nothing is polled or committed any more."""
        if self.failure is not None:
            raise self.failure
        try:
            yield
        except OperatorError as error:
            self.failure = error
            raise
        except (StaleAssignment, TransactionAborted, RecordRefused):
            raise
        except Exception as error:
            self.failure = FatalError(f"{type(error).__name__} was raised.", place=self.group)
            raise

    def _consume(self, max_records: int, wait: float) -> Polled[R]:
        if time.monotonic() - self._topics_seen_at > TOPICS_SECONDS and not self._closed:
            self._topics_seen_at = time.monotonic()
            self._loaders.submit(self._watch_topics)
        first = self._consumer.poll(wait)
        number = self.number
        if first is None:
            return Polled(number)
        messages = [first, *self._consumer.consume(max_records - 1, 0)] if max_records > 1 else [first]
        if self.number != number:
            # A rebalance was served between the two calls; all of it is read again from the frontiers.
            self._rewind()
            return Polled(self.number)
        build = self._build
        partitions: dict[Partition, list[R]] = {}
        lowest: dict[Partition, int] = {}
        for message in messages:
            error = message.error()
            if error is not None:
                self._judge(message, error)
                continue
            topic, partition, offset = message.topic(), message.partition(), message.offset()
            key = (topic, partition)
            records = partitions.get(key)
            if records is None:
                lowest[key] = self._begin(key, offset)
                records = partitions[key] = []
            if offset >= lowest[key]:
                records.append(build(message, topic, partition, offset))
        return Polled(number, partitions)

    def _judge(self, message: Any, error: KafkaError) -> None:
        """An event in place of a record: most are for librdkafka to mend."""
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001 - the public name of that constant
            self._is_fenced = True
            return
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):  # noqa: SLF001
            raise frontier.FrontierLost(
                "the position is outside the log.", place=f"{message.topic()}[{message.partition()}]"
            )
        if error.code() in _STANDSTILL:
            self._tell(error, message.topic() or self.group)

    def _tell(self, error: KafkaError, place: str) -> None:
        now = time.monotonic()
        if now - self._told.get((place, error.code()), float("-inf")) >= COMPLAINT_SECONDS:
            self._told[place, error.code()] = now
            remedy = "Check this user's rights on the topic and on the group, and that the topic exists."
            self._report("client_trouble", KafkaUnreachable(f"{error.name()}.", place=place, remedy=remedy))

    def _begin(self, key: Partition, offset: int) -> int:
        """Check the first record of a partition; offsets only rise after it. Return the lowest one wanted."""
        owned = self._owned.get(key)
        if owned is None or not owned.active:
            raise PositionBroken("a record of a partition that is not active.", place=key[0])
        if offset < owned.frontier:
            if not self._keeps_records:
                raise PositionBroken(f"offset {offset} below {owned.frontier}.", place=f"{key[0]}[{key[1]}]")
            # Read again after a rewind, and finished meanwhile.
        elif owned.placed:
            self._check_gap(*key, owned.frontier, offset)
        owned.placed = False
        return owned.frontier

    def _check_gap(self, topic: str, partition: int, start: int, offset: int) -> None:
        """Between a position we set and the first record may lie transaction markers and aborted records only."""
        if offset == start:
            return
        reader = TopicReader(self._kafka, topic)
        try:
            reader.assign({partition: start}, [partition])
            while reader.positions()[partition] < offset:
                skipped = [record for record in reader.poll(1, 0.2) if record.offset < offset]
                if skipped:
                    raise PositionBroken(f"offset {skipped[0].offset} was skipped.", place=f"{topic}[{partition}]")
        finally:
            reader.close()

    def _commit(
        self,
        number: int,
        outputs: Sequence[Output],
        changelogs: Sequence[Changelog],
        positions: Mapping[Partition, int],
        committed: Callable[[], None],
    ) -> None:
        if not positions:
            raise ValueError("a transaction without offsets fences nothing")
        with self._once_failed_for_good():
            self._transact(number, outputs, changelogs, positions)
            committed()

    def _transact(
        self,
        number: int,
        outputs: Sequence[Output],
        changelogs: Sequence[Changelog],
        positions: Mapping[Partition, int],
    ) -> None:
        if number != self.number:
            self._rewind()
            raise StaleAssignment
        offsets = [TopicPartition(topic, partition, offset) for (topic, partition), offset in positions.items()]
        frontiers = [
            frontier.build_frontier(self.group, self.topic_ids[topic], partition, offset)
            for (topic, partition), offset in positions.items()
        ]
        metadata = self._consumer.consumer_group_metadata()
        try:
            self._transactor.commit([*outputs, *frontiers], offsets, metadata, changelogs)
        except (TransactionAborted, RecordRefused):
            self._rewind()
            raise
        for key, offset in positions.items():
            self._owned[key].frontier = offset

    def _rewind(self) -> None:
        for (topic, partition), owned in self._owned.items():
            if owned.active:
                if not self._seek(topic, partition, owned.frontier):
                    # The client has it no more and told nobody, or will at the next poll.
                    self._is_fenced = True
                    return
                owned.placed = True

    def _seek(self, topic: str, partition: int, offset: int) -> bool:
        for _ in range(50):
            try:
                self._consumer.seek(TopicPartition(topic, partition, offset))
            except KafkaException:
                # Right after an assignment the client may not have started the partition yet.
                time.sleep(0.02)
            else:
                return True
        return False

    def _on_assign(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        self.number += 1
        self._lease.begin()
        keys = [(partition.topic, partition.partition) for partition in partitions]
        self._is_placing = True
        try:
            starts = self._await_starts(keys)
        except OperatorError as error:
            self.failure = error
            starts = dict.fromkeys(keys, OFFSET_END)
        # The position is exact from the first fetch on; a seek just after an assignment may be lost in the client.
        placed = [TopicPartition(*key, offset) for key, offset in starts.items()]
        if self._membership is Membership.SPREAD:
            consumer.assign(placed)
        else:
            consumer.incremental_assign(placed)
        consumer.pause(partitions)
        self._rewind()
        if self.failure is None:
            for key in keys:
                self._owned[key] = owned = _Owned(starts[key])
                self._loaders.submit(self._prepare, key, owned)
        self._is_placing = False

    def _on_revoke(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        self._finish([(partition.topic, partition.partition) for partition in partitions])
        self._on_lost(consumer, partitions)

    def _finish(self, keys: Sequence[Partition]) -> None:
        """The last transaction of partitions that are given up.

        Nobody else has them before this callback returns: the group's next generation needs our answer. Should it have
        gone on without us, its coordinator refuses the offsets, and with them all of the transaction.
        """
        active = [key for key in keys if key in self._owned and self._owned[key].active]
        if not active or self._closed or self.failure is not None:
            return
        try:
            with self._once_failed_for_good():
                work = self._hand_over(active)
                if work.positions:
                    self._transact(self.number, work.outputs, (), work.positions)
                    work.committed()
        except (TransactionAborted, RecordRefused) as error:
            self._report("hand_over_rolled_back", TemporaryError(str(error), place=self.group))
        except Exception:  # noqa: BLE001 - kept in ``failure``: nothing may be raised through the client
            return

    def _on_lost(self, consumer: Any, partitions: list[TopicPartition]) -> None:
        self.number += 1
        for partition in partitions:
            if self._owned.pop((partition.topic, partition.partition), None) is not None:
                self._release(partition.topic, partition.partition)
        if self._membership is Membership.SPREAD:
            consumer.unassign()
        else:
            consumer.incremental_unassign(partitions)
        self._rewind()

    def _set_paused(self, partitions: Sequence[Partition] | None, paused: bool) -> None:  # noqa: FBT001
        if partitions is None:
            self._all_paused = paused
        for key in partitions or ():
            if key in self._owned:
                self._owned[key].paused = paused
        chosen: dict[bool, list[TopicPartition]] = {True: [], False: []}
        for key, owned in self._owned.items():
            if owned.active:
                chosen[self._all_paused or owned.paused].append(TopicPartition(*key))
        self._consumer.pause(chosen[True])
        self._resume(chosen[False])

    def _resume(self, partitions: list[TopicPartition]) -> None:
        self._consumer.resume(partitions)
        for partition in partitions:
            # librdkafka notices a resumed partition when its broker thread wakes, up to a second later; any request
            # to that broker wakes it.
            try:
                self._consumer.get_watermark_offsets(partition, timeout=0.5)
            except KafkaException:
                return

    def _shut(self) -> None:
        if self._consumer is not None:
            self._consumer.close()
        self._transactor.close()

    def _await_starts(self, keys: Sequence[Partition]) -> dict[Partition, int]:
        """Frontiers of just assigned partitions, however long Kafka is away: without them there is nothing to do.

        Not polling meanwhile costs at worst the membership, which comes back with Kafka.
        """
        wait = 0.2
        while True:
            try:
                return self._find_starts(keys)
            except TemporaryError as error:
                if self._closed:
                    raise
                self._report("assignment_waits", error)
            time.sleep(wait)
            wait = min(wait * 2, 2.0)

    def _describe_topics(self) -> dict[str, str]:
        """Topic ids. Raises ``PartitionsChanged``: keys, order and local state hang on the count."""
        found = describe_topics(self._kafka, self.topics)
        for topic, (_, count) in found.items():
            if self._partitions is not None and count != self._partitions:
                raise PartitionsChanged(f"it has {count} partitions, not {self._partitions}.", place=topic)
        return {topic: topic_id for topic, (topic_id, _) in found.items()}

    def _check_ids(self, current: Mapping[str, str]) -> None:
        """Raise ``TopicMissing`` or ``TopicReplaced`` unless the topics are those that this process began with."""
        for topic, topic_id in self.topic_ids.items():
            if topic not in current:
                raise TopicMissing("the topic was deleted.", place=topic)
            if current[topic] != topic_id:
                raise TopicReplaced("its id is another one than at the start of this process.", place=topic)

    def _find_starts(self, keys: Sequence[Partition]) -> dict[Partition, int]:
        """Frontier of each partition, after every predecessor's transaction on it is decided."""
        if not keys:
            return {}
        current = self._describe_topics()
        self._check_ids(current)
        frontier.await_pending_offsets(self._kafka, self.group, keys)
        known = frontier.read_frontiers(self._kafka, self.group)
        starts: dict[Partition, int] = {}
        for topic in {topic for topic, _ in keys}:
            reader = TopicReader(self._kafka, topic)
            try:
                reader.assign({}, [partition for name, partition in keys if name == topic])
                begins, ends = reader.start_offsets(), reader.end_offsets()
            finally:
                reader.close()
            for partition, begin in begins.items():
                start = known.get((current[topic], partition), begin)
                if not begin <= start <= ends[partition]:
                    raise frontier.FrontierLost(
                        f"frontier {start}, log from {begin} to {ends[partition]}.", place=f"{topic}[{partition}]"
                    )
                starts[topic, partition] = start
        return starts

    # These run on a loader thread; the second hands over to the consumer's thread.

    def _watch_topics(self) -> None:
        """Look whether the topics are still the same.

        A classic member is not told: its client goes on in a topic made anew from the offset of the old one.
        """
        try:
            self._check_ids(self._describe_topics())
        except TemporaryError as error:
            self._report("topics_not_seen", error)
        except OperatorError as error:
            self.failure = error

    def _prepare(self, key: Partition, owned: _Owned) -> None:
        # A partition that was taken away and came back while it was being loaded: one store, one loader at a time.
        with self._load_locks.setdefault(key, Lock()):
            self._load_until_current(key, owned)

    def _load_until_current(self, key: Partition, owned: _Owned) -> None:
        wait = 0.2
        while self._owned.get(key) is owned and not self._closed:
            try:
                self._load(*key)
            except TemporaryError as error:
                self._report("partition_load_failed", error)
                time.sleep(wait)
                wait = min(wait * 2, 5.0)
            except OperatorError as error:
                self.failure = error
                return
            except Exception as error:  # noqa: BLE001 - a loader thread must not die silently
                self.failure = FatalError(f"loading raised {type(error).__name__}.", place=f"{key[0]}[{key[1]}]")
                return
            else:
                if not self._closed:
                    self._thread.submit(self._activate, key, owned).result()
                return

    def _activate(self, key: Partition, owned: _Owned) -> None:
        if self._owned.get(key) is not owned:
            self._release(*key)
            return
        owned.active = True
        if not owned.paused and not self._all_paused:
            self._resume([TopicPartition(*key)])

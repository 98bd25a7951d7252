"""A consumer of one group that owns positions, fences itself, and commits with its outputs in one transaction.

The rules (each answers a way to lose or double a record):

* One thread owns the consumer and the transactional producer; polling, rebalance callbacks and commits run on it.
* Every assign, revoke and lost raises the assignment number. A batch is committed only under the number it was polled
  under; the group metadata is taken right after that check, on the same thread.
* A partition starts at its frontier, after its state was loaded, and after no predecessor's transaction is undecided.
* After any rebalance and after any abort every kept partition is sought to its frontier; nothing is skipped.

Where partitions start, and whether the topics are still the same: ``topics.footing``. How the group shares out, and
what its client complains of: ``topics.membership``.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from threading import Lock
from typing import TYPE_CHECKING, Any, Generic, TypeVar

from confluent_kafka import OFFSET_END, Consumer, KafkaError, KafkaException, TopicPartition

from schemas.failure import FatalError, OperatorError, TemporaryError
from topics import catalog, frontier
from topics.cluster import reaches_broker
from topics.footing import Footing, Partition, PositionBroken
from topics.lease import Lease, read_client_time, read_sleepless_time
from topics.membership import Complaints, Fences, Membership
from topics.reading import TopicMissing
from topics.transaction import Changelog, Output, RecordRefused, TransactionAborted, Transactor

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Mapping, Sequence

    from topics.cluster import KafkaSettings

T = TypeVar("T")
R = TypeVar("R")

TOPICS_SECONDS = 30.0
"""How often a member looks whether its topics are still the ones it began with."""


CUT_OFF_SECONDS = 30.0
"""A member whose session is over for so long without an answer looks whether its client still reaches a broker."""


class StaleAssignment(Exception):
    """The batch was polled under an earlier assignment; it was dropped and will be read again by whoever owns it."""


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
        self.number = 0
        self.failure: OperatorError | None = None
        self.hindrance: OperatorError | None = None
        """What it waits for though it has not failed: a topic that is gone, or to be let in."""
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
        self._footing = Footing(kafka, group, topics, partitions)
        self._owned: dict[Partition, _Owned] = {}
        self.topic_ids: dict[str, str] = {}
        self._consumer: Any = None
        self._transactor = Transactor(kafka, transactional_id)
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=f"kafka-{group}")
        self._loaders = ThreadPoolExecutor(4, thread_name_prefix=f"load-{group}")
        self._load_locks: dict[Partition, Lock] = {}
        self._topics_seen_at = time.monotonic()
        self._complaints = Complaints(report)
        self._fences = Fences(group)
        self._is_fenced = False
        """The client has given up its membership for good, or all brokers."""
        self._reached_at = time.monotonic()
        self._all_paused = False
        self._is_placing = False
        self._closed = False

    async def start(self) -> None:
        """Fence predecessors, subscribe. Raises ``KafkaUnreachable``."""
        await self._call(self._open)

    async def poll(self, max_records: int, wait: float) -> Polled[R]:
        """Records of active partitions; empty after ``wait`` seconds without any. Raises ``FatalError``.

        Cancelled, it loses nothing: what is still polled for nobody is read again.
        """
        try:
            return await self._call(self._poll, max_records, wait)
        except asyncio.CancelledError:
            with contextlib.suppress(RuntimeError):  # it is closed
                self._thread.submit(self._rewind)
            raise

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
        """Subscribed, every assigned partition is loaded, and no topic is missing."""
        placed = self.number > 0 and not self._is_placing
        unhindered = self.failure is None and self.hindrance is None
        return unhindered and placed and all(owned.active for owned in list(self._owned.values()))

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
        self.topic_ids = self._footing.take()
        self._transactor.open()
        self._join()

    def _make_lease(self) -> Lease:
        is_nameless = self._membership is Membership.SERVER
        return Lease(time.monotonic, read_sleepless_time, read_client_time, is_nameless=is_nameless)

    def _join(self) -> None:
        self._lease = self._make_lease()
        self._reached_at = time.monotonic()
        self._consumer = Consumer(
            self._membership.build_client(self._kafka, self.group, self._instance)
            | {"stats_cb": self._lease.take_statistics}
        )
        self._consumer.subscribe(
            self._footing.topics, on_assign=self._on_assign, on_revoke=self._on_revoke, on_lost=self._on_lost
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
        self._fences.note()
        with contextlib.suppress(TemporaryError):
            self._persist(self._prove_name, "member_fenced")
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
        try:
            # Rolled back, and so never read.
            self._transactor.prove(Output(catalog.FRONTIERS, b"probe", None, partition=0))
        except TransactionAborted as error:
            raise TemporaryError(str(error), place=self.group) from None

    def _persist(self, step: Callable[[], T], event: str, longest: float = 2.0) -> T:
        """Take a step however long Kafka is away, waiting up to ``longest`` seconds between.

        On the consumer's thread: without this step there is nothing to do, and not polling meanwhile costs at worst the
        membership, which comes back with Kafka. Raises ``TemporaryError`` once this is closed.
        """
        wait = 0.2
        while True:
            try:
                return step()
            except TemporaryError as error:
                if self._closed:
                    raise
                self._report(event, error)
            time.sleep(wait)
            wait = min(wait * 2, longest)

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
            self._is_fenced = self._is_fenced or self._is_cut_off()
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

    def _is_cut_off(self) -> bool:
        """Whether this client reaches no broker while a new one does: librdkafka 2.16 can lose all of them for good."""
        patience = self._kafka.session_timeout_seconds + CUT_OFF_SECONDS
        if time.monotonic() - max(self._lease.renewed_at, self._reached_at) < patience:
            return False
        self._reached_at = time.monotonic()
        if reaches_broker(self._consumer, self._footing.topics[0]):
            return False
        try:
            self._footing.check()
        except TemporaryError:
            return False  # Kafka is away for everybody
        self._report("client_cut_off", TemporaryError("its client lost all brokers.", place=self.group))
        return True

    def _judge(self, message: Any, error: KafkaError) -> None:
        """An event in place of a record: most are for librdkafka to mend."""
        if error.fatal() or error.code() == KafkaError._FATAL:  # noqa: SLF001 - the public name of that constant
            self._is_fenced = True
            return
        if error.code() in (KafkaError._AUTO_OFFSET_RESET, KafkaError.OFFSET_OUT_OF_RANGE):  # noqa: SLF001
            raise frontier.FrontierLost(
                "the position is outside the log.", place=f"{message.topic()}[{message.partition()}]"
            )
        self.hindrance = self._complaints.hear(error, message.topic() or self.group) or self.hindrance

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
            self._footing.check_gap(*key, owned.frontier, offset)
        owned.placed = False
        return owned.frontier

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
        # The id tells a successor that this offset had a frontier, should that one be gone.
        offsets = [
            TopicPartition(topic, partition, offset, self.topic_ids[topic])
            for (topic, partition), offset in positions.items()
        ]
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
        self.hindrance = None
        self._lease.begin()
        keys = [(partition.topic, partition.partition) for partition in partitions]
        self._is_placing = True
        try:
            starts = self._persist(lambda: self._footing.find_starts(keys), "assignment_waits")
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

    # These run on a loader thread; the second hands over to the consumer's thread.

    def _watch_topics(self) -> None:
        try:
            self._footing.check()
        except TemporaryError as error:
            self._report("topics_not_seen", error)
            if isinstance(error, TopicMissing):
                self.hindrance = error
        except OperatorError as error:
            self.failure = error
        else:
            self.hindrance = None

    def _prepare(self, key: Partition, owned: _Owned) -> None:
        # A partition that was taken away and came back while it was being loaded: one store, one loader at a time.
        with self._load_locks.setdefault(key, Lock()):
            self._load_until_current(key, owned)

    def _load_until_current(self, key: Partition, owned: _Owned) -> None:
        def load() -> bool:
            is_ours = self._owned.get(key) is owned and not self._closed
            if is_ours:
                self._load(*key)
            return is_ours

        try:
            is_loaded = self._persist(load, "partition_load_failed", 5.0)
        except TemporaryError:
            return  # it is closed
        except OperatorError as error:
            self.failure = error
        except Exception as error:  # noqa: BLE001 - a loader thread must not die silently
            self.failure = FatalError(f"loading raised {type(error).__name__}.", place=f"{key[0]}[{key[1]}]")
        else:
            if is_loaded and not self._closed:
                self._thread.submit(self._activate, key, owned).result()

    def _activate(self, key: Partition, owned: _Owned) -> None:
        if self._owned.get(key) is not owned:
            self._release(*key)
            return
        owned.active = True
        if not owned.paused and not self._all_paused:
            self._resume([TopicPartition(*key)])

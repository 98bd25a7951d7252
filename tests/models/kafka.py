"""A Kafka in memory at the door of confluent-kafka: one partition a topic, and everything late comes when it is told.

What a real broker does in its own time is a call here: when the markers of a committed transaction are written (for
data and for offsets apart), when a rebalance happens, when a transaction times out. Rules are the broker's: a
generation is checked at ``send_offsets_to_transaction`` and only there, ``init_transactions`` aborts what its
predecessor left open and waits for what it has prepared, read_committed ends at the last stable offset.
"""

from __future__ import annotations

import concurrent.futures
import threading
import time
from dataclasses import dataclass, field
from types import SimpleNamespace

from confluent_kafka import OFFSET_BEGINNING, OFFSET_END, IsolationLevel, KafkaError, KafkaException, TopicPartition
from confluent_kafka.admin import OffsetSpec

from topics import cluster, frontier, group, reading, transaction


class Death(BaseException):
    """The process ends here."""


@dataclass(eq=False)
class Transaction:
    """``open``, ``prepared`` (the coordinator has decided to commit), ``committed`` or ``aborted``."""

    txid: str
    state: str = "open"
    touched: set[str] = field(default_factory=set)
    offsets: dict[tuple[str, str], int] = field(default_factory=dict)
    offsets_pending: bool = False
    marked: set[str] = field(default_factory=set)
    """Topics whose marker is written while others are still on the way."""

    def is_undecided(self, topic):
        return self.state in ("open", "prepared") and topic not in self.marked

    def is_committed(self, topic):
        return self.state == "committed" or topic in self.marked


@dataclass
class Entry:
    """One offset of a log. ``marker`` entries are never delivered."""

    key: bytes | None = None
    value: bytes | None = None
    headers: list = field(default_factory=list)
    transaction: Transaction | None = None
    marker: bool = False


@dataclass
class Membership:
    """A group: who owns everything, in which generation, and the committed offsets."""

    owner: object = None
    generation: int = 0
    members: list = field(default_factory=list)
    offsets: dict[str, int] = field(default_factory=dict)
    notes: dict[str, str] = field(default_factory=dict)
    """What was committed beside each offset."""


def fail(code, *, abortable=False, retriable=False):
    return KafkaException(KafkaError(code, "", False, retriable, abortable))


def answer(value):
    future = concurrent.futures.Future()
    if isinstance(value, Exception):
        future.set_exception(value)
    else:
        future.set_result(value)
    return future


class Kafka:
    """The broker, and the switches of the traces."""

    def __init__(self):
        self.lock = threading.RLock()
        self.logs: dict[str, list[Entry]] = {}
        self.groups: dict[str, Membership] = {}
        self.producers: dict[str, object] = {}
        self.transactions: list[Transaction] = []
        self.holds_markers = False
        """Committed transactions stay ``prepared`` until ``write_markers``."""
        self.refuses = lambda topic, key, value, headers: False
        self.before = lambda step, txid: None
        """Called before each step of a transaction, on the thread that takes it."""
        self.ends_at_stable = set()
        """Topics whose end is given as the last stable offset, whatever is asked."""
        self.hides = set()
        """Topics whose end is given as their beginning."""
        self.flushes_late = False
        """Records leave the producer at the commit, and pending offsets are not told of."""
        self.seeks = True
        self.fences_unmoved = True
        """Whether a transaction whose offsets do not move is fenced."""
        self.rewrites = lambda topic, value: value
        """What a producer makes of a value."""

    def install(self, monkeypatch):
        """In place of confluent-kafka, in every module that opens a client."""
        doors = {
            "Producer": lambda config, **_: Producer(self, config),
            "Consumer": lambda config, **_: Consumer(self, config),
            "AdminClient": lambda config, **_: Admin(self),
        }
        for module in (cluster, frontier, group, reading, transaction):
            for name, door in doors.items():
                if hasattr(module, name):
                    monkeypatch.setattr(module, name, door)

    # Logs.

    def log(self, topic):
        return self.logs.setdefault(topic, [])

    def append(self, topic, key, value, headers=(), transaction=None):
        with self.lock:
            self.log(topic).append(Entry(key, value, list(headers), transaction))
            if transaction is not None:
                transaction.touched.add(topic)
            return len(self.log(topic)) - 1

    def find_stable_end(self, topic):
        for offset, entry in enumerate(self.log(topic)):
            if entry.transaction is not None and entry.transaction.is_undecided(topic):
                return offset
        return len(self.log(topic))

    def read(self, topic):
        """Committed records as (offset, entry): what a reader sees."""
        with self.lock:
            return [
                (offset, entry)
                for offset, entry in enumerate(self.log(topic)[: self.find_stable_end(topic)])
                if not entry.marker and (entry.transaction is None or entry.transaction.is_committed(topic))
            ]

    # Transactions.

    def resolve(self, transaction, state):
        with self.lock:
            if transaction.state not in ("open", "prepared"):
                return
            transaction.state = state
            for topic in transaction.touched - transaction.marked:
                self.log(topic).append(Entry(marker=True))
            self.resolve_offsets(transaction)

    def compact(self, topic):
        """Keep the last record of each key, and remove tombstones."""
        with self.lock:
            last = {entry.key: entry for entry in self.log(topic) if not entry.marker}
            for entry in self.log(topic):
                entry.marker |= last.get(entry.key) is not entry or entry.value is None

    def resolve_offsets(self, transaction):
        """The offsets' markers may come first."""
        with self.lock:
            if transaction.offsets_pending and transaction.state != "aborted":
                for (name, topic), at in transaction.offsets.items():
                    self.groups[name].offsets[topic] = at.offset
                    self.groups[name].notes[topic] = at.metadata
            transaction.offsets_pending = False

    def write_markers(self):
        """Of every prepared transaction."""
        with self.lock:
            for transaction in self.transactions:
                if transaction.state == "prepared":
                    self.resolve(transaction, "committed")

    def write_first_markers(self, *topics):
        """Of every prepared transaction, for its offsets and these topics only."""
        with self.lock:
            for transaction in self.transactions:
                if transaction.state == "prepared":
                    self.resolve_offsets(transaction)
                    for topic in transaction.touched & set(topics):
                        transaction.marked.add(topic)
                        self.log(topic).append(Entry(marker=True))

    def time_out(self, txid):
        """The coordinator aborts what an id left open."""
        with self.lock:
            for transaction in self.transactions:
                if transaction.txid == txid and transaction.state == "open":
                    self.resolve(transaction, "aborted")

    # Groups.

    def rebalance(self, name, owner):
        """A new generation; ``owner`` (part of a member's instance name) has everything in it."""
        with self.lock:
            membership = self.groups[name]
            membership.generation += 1
            membership.owner = next(member for member in membership.members if owner in member.instance)


class Producer:
    """The transactional producer."""

    def __init__(self, kafka, config):
        self.kafka = kafka
        self.txid = config.get("transactional.id", "")
        self.current = None
        self.queue = []
        self.is_dead = False
        """Its process is gone: what it left open is the coordinator's."""

    def init_transactions(self, timeout=-1):
        with self.kafka.lock:
            self.kafka.producers[self.txid] = self
            self.kafka.time_out(self.txid)
        until = time.monotonic() + timeout
        while any(t.txid == self.txid and t.state == "prepared" for t in self.kafka.transactions):
            if time.monotonic() > until:
                raise fail(KafkaError._TIMED_OUT, retriable=True)
            time.sleep(0.005)

    def begin_transaction(self):
        self.kafka.before("begin", self.txid)
        with self.kafka.lock:
            self._check_fenced()
            self.current = Transaction(self.txid)
            self.kafka.transactions.append(self.current)

    def produce(self, topic, value=None, key=None, partition=-1, on_delivery=None, timestamp=0, headers=None):
        self.queue.append((topic, self.kafka.rewrites(topic, value), key, on_delivery, headers or []))

    def poll(self, timeout=0):
        return 0

    def flush(self, timeout=-1):
        self.kafka.before("flush", self.txid)
        if not self.kafka.flushes_late:
            self._send()
        return 0

    def _send(self):
        queue, self.queue = self.queue, []
        with self.kafka.lock:
            for topic, value, key, on_delivery, headers in queue:
                if self.kafka.refuses(topic, key, value, headers):
                    on_delivery(KafkaError(KafkaError.MSG_SIZE_TOO_LARGE), None)
                else:
                    offset = self.kafka.append(topic, key, value, headers, self.current)
                    on_delivery(None, SimpleNamespace(offset=lambda offset=offset: offset))

    def send_offsets_to_transaction(self, offsets, metadata, timeout=-1):
        self.kafka.before("send_offsets", self.txid)
        with self.kafka.lock:
            self._check_open()
            name, generation, member = metadata
            membership = self.kafka.groups[name]
            moved = any(membership.offsets.get(at.topic, 0) != at.offset for at in offsets)
            is_current = generation == membership.generation and membership.owner is member
            if not is_current and (moved or self.kafka.fences_unmoved):
                raise fail(KafkaError.ILLEGAL_GENERATION, abortable=True)
            self.current.offsets = {(name, at.topic): at for at in offsets}
            self.current.offsets_pending = True

    def commit_transaction(self, timeout=-1):
        self.kafka.before("commit", self.txid)
        with self.kafka.lock:
            self._check_open()
            self._send()
            self.current.state = "prepared"
            if not self.kafka.holds_markers:
                self.kafka.resolve(self.current, "committed")
            self.current = None
        self.kafka.before("committed", self.txid)

    def abort_transaction(self, timeout=-1):
        with self.kafka.lock:
            if self.current is not None and not self.is_dead:
                self.kafka.resolve(self.current, "aborted")
            self.current = None

    def purge(self):
        self.queue = []

    def _check_fenced(self):
        if self.kafka.producers.get(self.txid) is not self:
            raise fail(KafkaError._FENCED)

    def _check_open(self):
        self._check_fenced()
        if self.current is None or self.current.state != "open":
            raise fail(KafkaError.INVALID_TXN_STATE, abortable=True)


class Message:
    """A record, or the end of a partition."""

    def __init__(self, topic, offset, entry=None):
        self._topic, self._offset, self._entry = topic, offset, entry

    def error(self):
        return None if self._entry else KafkaError(KafkaError._PARTITION_EOF)

    def topic(self):
        return self._topic

    def partition(self):
        return 0

    def offset(self):
        return self._offset

    def key(self):
        return self._entry.key

    def value(self):
        return self._entry.value

    def headers(self):
        return self._entry.headers

    def timestamp(self):
        return 1, 1


class Consumer:
    """A member of a group, or a plain reader."""

    def __init__(self, kafka, config):
        self.kafka = kafka
        self.name = config["group.id"]
        self.instance = config.get("client.id", "") + config.get("group.instance.id", "")
        self.is_committed_only = config.get("isolation.level") != "read_uncommitted"
        self.tells_ends = config.get("enable.partition.eof", False)
        self.positions = {}
        self.paused = set()
        self.told_end = {}
        self.callbacks = None
        self.generation = None
        self.owned = False
        self.polls = 0
        self.is_deaf = False
        """It does not learn of rebalances."""

    # Readers.

    def list_topics(self, topic=None, timeout=-1):
        return SimpleNamespace(topics={topic: SimpleNamespace(error=None, partitions={0: None})})

    def assign(self, partitions):
        for at in partitions:
            begin = at.offset if at.offset >= 0 else len(self.kafka.log(at.topic)) if at.offset == OFFSET_END else 0
            assert at.offset >= 0 or at.offset in (OFFSET_BEGINNING, OFFSET_END), at.offset
            self.positions[at.topic] = begin
            self.told_end.pop(at.topic, None)

    def poll(self, timeout=0):
        until = time.monotonic() + min(timeout, 0.02)
        self.polls += 1
        while True:
            if self.callbacks is not None and not self.is_deaf:
                self._notice()
            message = self._fetch()
            if message is not None or time.monotonic() >= until:
                return message
            time.sleep(0.001)

    def consume(self, count, timeout=0):
        found = []
        while len(found) < count and (message := self._fetch()) is not None:
            found.append(message)
        return found

    def _fetch(self):
        with self.kafka.lock:
            for topic in list(self.positions):
                if topic in self.paused:
                    continue
                log = self.kafka.log(topic)
                end = self.kafka.find_stable_end(topic) if self.is_committed_only else len(log)
                while self.positions[topic] < end:
                    offset = self.positions[topic]
                    self.positions[topic] = offset + 1
                    entry = log[offset]
                    is_aborted = entry.transaction is not None and entry.transaction.state == "aborted"
                    if not entry.marker and not is_aborted:
                        return Message(topic, offset, entry)
                if self.tells_ends and self.told_end.get(topic) != self.positions[topic]:
                    self.told_end[topic] = self.positions[topic]
                    return Message(topic, self.positions[topic])
        return None

    def close(self):
        with self.kafka.lock:
            membership = self.kafka.groups.get(self.name)
            if membership is not None and self in membership.members:
                membership.members.remove(self)

    # Members.

    def subscribe(self, topics, on_assign, on_revoke, on_lost):
        self.callbacks = (topics, on_assign, on_revoke)
        with self.kafka.lock:
            membership = self.kafka.groups.setdefault(self.name, Membership())
            membership.members.append(self)
            if membership.owner is None:
                membership.owner = self
                membership.generation += 1

    def _notice(self):
        topics, on_assign, on_revoke = self.callbacks
        with self.kafka.lock:
            membership = self.kafka.groups[self.name]
            if membership.generation == self.generation:
                return
            had, self.owned = self.owned, membership.owner is self
            is_next = self.generation is not None and membership.generation == self.generation + 1
            self.generation = membership.generation
        places = [TopicPartition(topic, 0) for topic in topics]
        if had and not (self.owned and is_next):
            on_revoke(self, places)
            had = False
        if self.owned:
            on_assign(self, [] if had else places)

    def incremental_assign(self, partitions):
        self.assign(partitions)

    def incremental_unassign(self, partitions):
        for at in partitions:
            self.positions.pop(at.topic, None)

    def unassign(self):
        self.positions.clear()

    def seek(self, at):
        if self.kafka.seeks:
            self.positions[at.topic] = at.offset

    def pause(self, partitions):
        self.paused |= {at.topic for at in partitions}

    def resume(self, partitions):
        self.paused -= {at.topic for at in partitions}

    def get_watermark_offsets(self, at, timeout=-1, cached=False):
        return 0, len(self.kafka.log(at.topic))

    def consumer_group_metadata(self):
        return self.name, self.generation, self


class Admin:
    """The part of the admin client that is used."""

    def __init__(self, kafka):
        self.kafka = kafka

    def describe_topics(self, topics, request_timeout=-1):
        names = topics.topic_names
        return {name: answer(SimpleNamespace(topic_id=f"id-{name}", partitions=[0])) for name in names}

    def list_offsets(self, wanted, isolation_level=None, request_timeout=-1):
        found = {}
        with self.kafka.lock:
            for at, spec in wanted.items():
                stable = isolation_level == IsolationLevel.READ_COMMITTED or at.topic in self.kafka.ends_at_stable
                end = self.kafka.find_stable_end(at.topic) if stable else len(self.kafka.log(at.topic))
                is_end = spec == OffsetSpec.latest()
                found[at] = answer(SimpleNamespace(offset=end if is_end and at.topic not in self.kafka.hides else 0))
        return found

    def list_consumer_group_offsets(self, wanted, require_stable=False, request_timeout=-1):
        (asked,) = wanted
        with self.kafka.lock:
            undecided = (
                require_stable
                and not self.kafka.flushes_late
                and any(t.offsets_pending and t.state in ("open", "prepared") for t in self.kafka.transactions)
            )
        error = KafkaError(KafkaError.UNSTABLE_OFFSET_COMMIT) if undecided else None
        known = self.kafka.groups[asked.group_id]
        places = [
            SimpleNamespace(
                error=error,
                topic=place.topic,
                partition=place.partition,
                offset=known.offsets.get(place.topic, -1001),
                metadata=known.notes.get(place.topic),
            )
            for place in asked.topic_partitions
        ]
        return {asked.group_id: answer(SimpleNamespace(topic_partitions=places))}

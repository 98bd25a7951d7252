"""The partitions a deliverer owns: their ledgers, loaded from the changelog before the first event is read."""

from __future__ import annotations

import threading
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from schemas.failure import FatalError
from sinks.attempts import decode_entry
from sinks.ledger import Ledger
from topics.reading import Record, read_to_end

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

    from sinks.policy import Policy
    from topics.cluster import KafkaSettings
    from topics.footing import Partition


class LedgerUnreadable(FatalError):
    """An entry of the attempt ledger cannot be read."""

    code = "RS330"
    meaning = "An entry of a target's attempt ledger cannot be read; posting without it could post twice."
    default_remedy = "Run the version that wrote it, or ask for help with the named partition; do not delete the topic."


@dataclass(eq=False, slots=True)
class Shard:
    """One owned partition of one canonical topic. ``owned`` turns false, for good, when it is taken away.

    ``is_leaving``: it is about to be; answers are still taken, nothing more is written.
    """

    topic: str
    partition: int
    ledger: Ledger
    owned: bool = True
    is_leaving: bool = False


class Shards:
    """All shards of one instance; iterating gives those in hand.

    ``load`` and ``release`` are called by the group on threads of its own, the rest by the event loop.
    """

    def __init__(self, kafka: KafkaSettings, attempts_topic: str, policy: Policy) -> None:
        self._kafka = kafka
        self._attempts_topic = attempts_topic
        self._policy = policy
        self._lock = threading.Lock()
        self._loaded: dict[Partition, Ledger] = {}
        self._epochs: dict[Partition, int] = {}
        self._shards: dict[Partition, Shard] = {}

    def __iter__(self) -> Iterator[Shard]:
        return iter(list(self._shards.values()))

    def find(self, topic: str, partition: int) -> Shard | None:
        """The shard in hand, or None."""
        return self._shards.get((topic, partition))

    def drop_lost(self, frontiers: Mapping[Partition, int]) -> None:
        """Let go of what was taken away."""
        for key in [key for key, shard in self._shards.items() if not shard.owned or key not in frontiers]:
            self._shards.pop(key).owned = False

    def list_new(self, frontiers: Mapping[Partition, int]) -> list[Partition]:
        """Partitions that are ours and not yet in hand."""
        return [key for key in frontiers if key not in self._shards]

    def take_loaded(self, key: Partition) -> Ledger | None:
        """The ledger that ``load`` made, once."""
        with self._lock:
            return self._loaded.pop(key, None)

    def take_up(self, key: Partition, ledger: Ledger) -> None:
        """Take a partition in hand; its ledger is open."""
        self._shards[key] = Shard(*key, ledger)

    def list_in_turn(self) -> list[Shard]:
        """Every partition gets to be the first: a long queue in one must not starve the others."""
        shards = list(self._shards.values())
        if shards:
            first = next(iter(self._shards))
            self._shards[first] = self._shards.pop(first)
        return shards

    def load(self, topic: str, partition: int) -> None:
        """Read a partition's ledger to its end; blocking. Raises ``LedgerUnreadable``, ``TemporaryError``."""
        key = (topic, partition)
        with self._lock:
            epoch = self._epochs.setdefault(key, 0)
        ledger = Ledger(topic, self._policy)
        for item in read_to_end(self._kafka, self._attempts_topic, partitions=[partition]):
            if not isinstance(item, Record):
                continue
            event_id = (item.key or b"").decode()
            if item.value is None:
                ledger.forget(event_id)
                continue
            try:
                entry = decode_entry(item.value)
            except msgspec.MsgspecError:
                raise LedgerUnreadable(
                    f"offset {item.offset} cannot be read.", place=f"{self._attempts_topic}[{partition}]"
                ) from None
            if entry.topic == topic:
                ledger.restore(event_id, entry)
        with self._lock:
            # Taken away while it was read: another owner may have written since.
            if self._epochs[key] == epoch:
                self._loaded[key] = ledger

    def release(self, topic: str, partition: int) -> None:
        """The group takes a partition away: from here on no call of it passes the last look before its write."""
        key = (topic, partition)
        with self._lock:
            self._epochs[key] = self._epochs.get(key, 0) + 1
            self._loaded.pop(key, None)
        shard = self._shards.get(key)
        if shard is not None:
            shard.owned = False

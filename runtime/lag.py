"""Lag and age of every stage, measured outside the processes, from the topics alone.

Frontiers are read first, then end offsets: the other order would show negative lag. A partition without a frontier was
never processed and counts whole. Age is that of the oldest record not done yet, by its own timestamp.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from topics import catalog
from topics.cluster import KafkaUnreachable
from topics.reading import TopicReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from topics.cluster import KafkaSettings

_FRONTIER_PATIENCE = 10.0
"""Seconds after which reading the frontiers is given up."""


@dataclass(frozen=True, slots=True)
class Lag:
    """Records behind and the age of the oldest of them, in seconds (0 when nothing is behind)."""

    records: int
    seconds: float


class LagMeter:
    """Measures groups of one cluster. Blocking; use it from one thread."""

    def __init__(self, kafka: KafkaSettings) -> None:
        self._kafka = kafka
        self._frontiers = TopicReader(kafka, catalog.FRONTIERS)
        self._frontiers.assign({})
        self._known: dict[tuple[str, str, int], int] = {}
        self._readers: dict[str, tuple[TopicReader, str]] = {}

    def measure(self, group: str, topics: Sequence[str]) -> Lag:
        """Lag of a group over some topics. Raises ``KafkaUnreachable``."""
        self._read_frontiers()
        records, age = 0, 0.0
        for topic in topics:
            reader, topic_id = self._find_reader(topic)
            # Without an assignment the listing covers all partitions, and nothing is fetched.
            reader.assign({}, [])
            starts, ends = reader.start_offsets(), reader.end_offsets("read_committed")
            behind = {}
            for partition, end in ends.items():
                start = max(self._known.get((group, topic_id, partition), 0), starts[partition])
                if start < end:
                    behind[partition] = start
            found, oldest = self._look(reader, behind, ends)
            records += found
            age = max(age, oldest)
        return Lag(records, age)

    def close(self) -> None:
        """Give up the connections."""
        self._frontiers.close()
        for reader, _ in self._readers.values():
            reader.close()

    def _read_frontiers(self) -> None:
        """Read on to where the topic ends now; an empty poll alone says nothing on a busy machine."""
        ends = self._frontiers.end_offsets("read_committed")
        until = time.monotonic() + _FRONTIER_PATIENCE
        while any(self._frontiers.positions()[partition] < end for partition, end in ends.items()):
            if time.monotonic() > until:
                raise KafkaUnreachable("the frontiers cannot be read to their end.", place=catalog.FRONTIERS)
            for record in self._frontiers.poll(5000, 0.05):
                group, topic_id, partition = (record.key or b"").decode().rsplit("|", 2)
                self._known[group, topic_id, int(partition)] = int(record.value or b"0")

    def _find_reader(self, topic: str) -> tuple[TopicReader, str]:
        if topic not in self._readers:
            reader = TopicReader(self._kafka, topic)
            self._readers[topic] = (reader, reader.topic_id())
        return self._readers[topic]

    def _look(self, reader: TopicReader, behind: dict[int, int], ends: dict[int, int]) -> tuple[int, float]:
        """Records really there (not transaction markers), and the age of the oldest, looking at each partition once."""
        if not behind:
            return 0, 0.0
        reader.assign(behind, list(behind))
        first: dict[int, tuple[int, int]] = {}
        until = time.monotonic() + 2
        while time.monotonic() < until:
            open_partitions = [p for p in behind if p not in first and reader.positions()[p] < ends[p]]
            if not open_partitions:
                break
            for record in reader.poll(100, 0.1):
                first.setdefault(record.partition, (record.offset, record.timestamp))
        reader.assign({}, [])  # else it would go on fetching in the background
        now_ms = time.time() * 1000
        records = sum(ends[partition] - offset for partition, (offset, _) in first.items())
        oldest = max((now_ms - timestamp for _, timestamp in first.values()), default=0.0)
        return records, max(0.0, oldest / 1000)

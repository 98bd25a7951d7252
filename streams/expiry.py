"""When a key of `seen` may be forgotten: when its changelog has forgotten it, and never before.

The store keeps no time for each key; that would cost on every event. It keeps *marks* instead: now and then, how far
the changelog and the raw topic had come, and when. A key is written while the record of its newest hop is decided, so
every key up to a mark's hop was written to the changelog below the mark's offset. Where that does not hold (a void,
what a failed release leaves, records decided again after an offset was set back), the key is noted as *late*, with the
changelog's offset.

A key goes when the changelog's own start lies beyond its mark: the broker has deleted all it knew of the key. And the
mark must be older than the window by our clock: a truncated changelog, or a clock that runs ahead, removes nothing.
"""

from __future__ import annotations

import asyncio
import math
import time
from typing import TYPE_CHECKING

import msgspec

from schemas.failure import TemporaryError
from topics.catalog import SEEN_RETENTION_MS
from topics.reading import TopicReader

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterable, Sequence

    from streams.state import PartitionState
    from topics.cluster import KafkaSettings

    Call = Callable[[Callable[[int, float], int], int, float], Awaitable[int]]

KEPT_SECONDS = SEEN_RETENTION_MS / 1000

MARK_EVERY = 100_000
"""Records of a changelog from one mark to the next."""

STEP_KEYS = 2_000
"""Keys looked at in one step, about 4 ms."""

ASK_SECONDS = 3_600.0
"""How often the broker is asked where a changelog starts, while something might be forgotten."""


class Mark(msgspec.Struct, frozen=True, array_like=True):
    """How far things had come: every key up to the hop ``topic_id``, ``offset`` was written below ``next_offset``."""

    at: float
    """Seconds since the epoch."""
    next_offset: int
    """Of the changelog."""
    topic_id: str
    offset: int
    """Of the raw topic's partition."""

    def covers(self, value: bytes) -> bool:
        """Whether the newest copy in a value of `seen` was decided by then. A void has none."""
        hop = _read_newest(value)
        return hop is not None and hop[0] == self.topic_id and hop[1] <= self.offset

    def is_after(self, value: bytes, note: bytes | None) -> bool:
        """Whether this mark was made after a key's last write; ``note`` is what was noted of a late one."""
        if note is None:
            return self.covers(value)
        return int(note) < self.next_offset and (_is_void(value) or self.covers(value))


class Calendar:
    """The marks of one store, oldest first."""

    def __init__(self, encoded: bytes | None = None) -> None:
        """Raises ``msgspec.MsgspecError`` for what ``encode`` did not write."""
        self.marks: list[Mark] = [] if encoded is None else _marks_decoder.decode(encoded)

    def encode(self, marks: Sequence[Mark]) -> bytes:
        """These marks, to be kept."""
        return _encoder.encode(marks)

    def find_late(
        self, written: Sequence[tuple[bytes, bytes | None]], next_offset: int, *, in_order: bool
    ) -> list[tuple[bytes, bytes | None]]:
        """Keys whose hop does not tell when they were written, with the changelog's offset that does.

        ``in_order``: as one batch writes them, late ones first; then an ordinary batch costs one look.
        """
        if in_order and written and not self._is_late(written[0][1]):
            return []
        note = b"%d" % next_offset
        return [(key, note) for key, value in written if self._is_late(value)]

    def propose(self, written: Sequence[tuple[bytes, bytes | None]], next_offset: int, now: float) -> Mark | None:
        """A mark after these changes, when one is due and they tell how far the raw topic is decided."""
        if self.marks and next_offset < self.marks[-1].next_offset + MARK_EVERY:
            return None
        hops = [hop for _, value in written if value is not None and (hop := _read_newest(value))]
        return Mark(now, next_offset, *max(hops, key=lambda hop: hop[1])) if hops else None

    def find_horizon(self, log_start: int, now: float) -> Mark | None:
        """The newest mark before which everything is beyond the window, and gone from the changelog."""
        found = None
        for mark in self.marks:  # few: those before the last purge are dropped
            if mark.next_offset > log_start or mark.at > now - KEPT_SECONDS:
                break
            found = mark
        return found

    def _is_late(self, value: bytes | None) -> bool:
        if value is None:
            return False
        return self.marks[-1].covers(value) or _is_void(value) if self.marks else _is_void(value)


class Purge:
    """Forgets keys of a worker's stores, a step at a time, while nothing arrives. It never waits for the broker."""

    def __init__(
        self,
        kafka: KafkaSettings,
        *,
        clock: Callable[[], float] = time.time,
        steady: Callable[[], float] = time.monotonic,
    ) -> None:
        self._kafka = kafka
        self._clock = clock
        self._steady = steady
        self._starts: dict[str, dict[int, int]] = {}
        self._asked: dict[str, float] = {}
        self._asking: dict[str, asyncio.Task[dict[int, int]]] = {}

    async def step(self, states: Iterable[PartitionState], call: Call) -> int:
        """Look at some keys of one store that is due; return how many. Raises ``StateUnusable``.

        ``call`` runs a function on the thread that also gives stores up: nothing is read of one while it is closed.
        """
        now = self._clock()
        for state in states:
            if state.is_purge_due(now):
                start = self._find_start(state.seen_topic, state.partition)
                if start is not None and state.is_purge_due(now, start):
                    return await call(state.purge, start, now)
        return 0

    def _find_start(self, topic: str, partition: int) -> int | None:
        """Where the changelog starts, as last told."""
        task = self._asking.get(topic)
        if task is not None and task.done():
            del self._asking[topic]
            if not task.cancelled() and task.exception() is None:
                self._starts[topic] = task.result()
        elif task is None and self._steady() - self._asked.get(topic, -math.inf) >= ASK_SECONDS:
            self._asked[topic] = self._steady()
            self._asking[topic] = asyncio.create_task(asyncio.to_thread(_read_starts, self._kafka, topic))
        return self._starts.get(topic, {}).get(partition)


def _read_starts(kafka: KafkaSettings, topic: str) -> dict[int, int]:
    reader = TopicReader(kafka, topic)
    try:
        return reader.start_offsets()
    except TemporaryError:
        return {}  # asked again in an hour
    finally:
        reader.close()


_encoder = msgspec.msgpack.Encoder()
_marks_decoder = msgspec.msgpack.Decoder(list[Mark])
_copies_decoder = msgspec.msgpack.Decoder(list[tuple[bytes, str]])
_VOID = _encoder.encode([])


def _is_void(value: bytes) -> bool:
    return value == _VOID


def _read_newest(value: bytes) -> tuple[str, int] | None:
    """Topic id and offset of the newest copy's hop; None for a void, and for what is no such value."""
    try:
        copies = _copies_decoder.decode(value)
    except msgspec.MsgspecError:
        return None
    if not copies:
        return None
    topic_id, _, rest = copies[-1][1].partition(":")
    offset = rest.rpartition(":")[2]
    return (topic_id, int(offset)) if offset.isdigit() else None

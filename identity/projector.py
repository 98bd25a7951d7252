"""Keeps the projection in Redis up to date with the topic `patients`.

Reads read_committed from the offsets stored in Redis, without a consumer group: the offsets live where the data is.
When Redis is down it waits, says so and goes on; when Redis lost data it reads again from where Redis is now.
"""

from __future__ import annotations

import asyncio
import contextlib
from concurrent.futures import ThreadPoolExecutor
from typing import TYPE_CHECKING, Literal, Protocol, TypeVar

from identity.projection import Change, ProjectionWriter, Replay
from schemas.failure import Failure, FatalError, TemporaryError
from telemetry.log import get_log
from telemetry.metrics import METRICS, Metric, Metrics

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping, Sequence

    from schemas.events import PatientRecord
    from schemas.keys import HmacKey

T = TypeVar("T")

_PAUSE_SECONDS = 0.2
_LONGEST_PAUSE_SECONDS = 5.0
_LAG_SECONDS = 5.0


class PatientUnreadable(FatalError):
    """A record of `patients` cannot be applied; skipping it could give a payment to the wrong patient."""

    code = "RS340"
    meaning = "A record of `patients` cannot be read, or was keyed with another secret."
    default_remedy = "Check that every process uses the same HMAC key and schemas; then rebuild `patients` by a replay."


class PatientSource(Protocol):
    """What is read of a record of `patients`."""

    @property
    def partition(self) -> int:
        """Its partition."""

    @property
    def offset(self) -> int:
        """Its offset."""

    @property
    def key(self) -> bytes | None:
        """Keyed hash of the identifier."""

    @property
    def value(self) -> bytes | None:
        """Framed Avro; None is a tombstone."""


class PatientReader(Protocol):
    """The topic `patients`, read blocking, without a group (``topics.reading.TopicReader``)."""

    def partitions(self) -> list[int]:
        """All partitions."""

    def assign(self, offsets: Mapping[int, int]) -> None:
        """Read from these next offsets; a missing one begins at log start."""

    def poll(self, max_records: int, timeout: float) -> Sequence[PatientSource]:
        """Up to so many records, waiting so many seconds for the first."""

    def positions(self) -> dict[int, int]:
        """Next offsets."""

    def end_offsets(self, isolation: Literal["read_uncommitted"]) -> dict[int, int]:
        """High watermarks."""

    def close(self) -> None:
        """Give up the connection."""


class Projector:
    """One projector. ``run`` until ``stop``; a second one beside it does no harm.

    ``decode`` turns a value into a ``PatientRecord``; it may raise ``TemporaryError`` (registry down) or ``Failure``.
    Without new records, Redis is asked every ``check_seconds`` whether it still holds what was applied. ``run`` closes
    the reader and the writer at its end.
    """

    def __init__(
        self,
        reader: PatientReader,
        writer: ProjectionWriter,
        decode: Callable[[bytes], PatientRecord],
        key: HmacKey,
        *,
        metrics: Metrics = METRICS,
        max_records: int = 500,
        poll_seconds: float = 0.2,
        check_seconds: float = 1.0,
    ) -> None:
        self._reader = reader
        self._writer = writer
        self._decode = decode
        self._key = key
        self._metrics = metrics
        self._max_records = max_records
        self._poll_seconds = poll_seconds
        self._check_seconds = check_seconds
        self._stopping = asyncio.Event()
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="projector")  # the consumer stays on one thread
        self._log = get_log("projector")
        self._positions: dict[int, int] = {}
        self._target: dict[int, int] = {}
        self._ends: dict[int, int] = {}
        self._caught_up = False
        self._trouble = "starting"

    async def run(self) -> None:
        """Project until ``stop``. Raises ``PatientUnreadable``, ``RedisEvicts``; waits out whatever is temporary."""
        try:
            if await self._persist(self._take_up):
                await self._project()
        finally:
            await asyncio.get_running_loop().run_in_executor(self._thread, self._reader.close)
            self._thread.shutdown()
            await self._writer.close()
            self._log.info("projector_stopped", offsets=self._positions)

    def stop(self) -> None:
        """Ask ``run`` to end after the batch in hand."""
        self._stopping.set()

    def ready(self) -> tuple[bool, dict[str, str]]:
        """Whether the projection has reached the end of `patients` seen at start or replay, and why not."""
        if self._trouble:
            return False, {"projection": self._trouble}
        if not self._caught_up:
            return False, {"projection": f"{self.lag} records behind"}
        return True, {}

    @property
    def lag(self) -> int:
        """Records of `patients` not applied yet, by the end offsets last seen (markers count as records)."""
        positions = self._positions
        return sum(max(0, end - positions.get(partition, 0)) for partition, end in self._ends.items())

    async def _take_up(self) -> bool:
        partitions = await self._in_thread(self._reader.partitions)
        replay = await self._writer.begin(partitions)
        await self._assign()
        reason = replay.reason if replay is not None else ""
        self._log.info("projector_started", offsets=self._positions, built_anew=reason, behind=self.lag)
        return True

    async def _assign(self) -> bool:
        """Read from where Redis is; the end seen now is what must be reached to be ready."""
        self._caught_up = False
        self._positions = self._writer.positions
        # Offset 0 means the log start, which is later when old segments are gone.
        offsets = {partition: offset for partition, offset in self._positions.items() if offset}
        await self._in_thread(lambda: self._reader.assign(offsets))
        self._target = self._ends = await self._in_thread(lambda: self._reader.end_offsets("read_uncommitted"))
        self._metrics.set(Metric.PROJECTION_BEHIND, self.lag)
        return True

    async def _project(self) -> None:
        loop = asyncio.get_running_loop()
        checked = measured = loop.time()
        while not self._stopping.is_set():
            try:
                records = await self._in_thread(lambda: self._reader.poll(self._max_records, self._poll_seconds))
            except TemporaryError as error:
                # The failed poll may have taken records with it: read again from what was applied.
                self._trouble = _name(error)
                await self._persist(self._assign)
                continue
            reached = await self._in_thread(self._reader.positions)
            if records or reached != self._positions or loop.time() - checked >= self._check_seconds:
                await self._apply(records, reached)
                checked = loop.time()
            if loop.time() - measured >= _LAG_SECONDS:
                await self._persist(self._measure)
                measured = loop.time()
            self._note_progress()

    async def _apply(self, records: Sequence[PatientSource], reached: dict[int, int]) -> None:
        """Apply a batch, however long Redis or the registry is away; after a loss, read again from where Redis is.

        When stopped meanwhile, the batch is not applied; the next start reads it again.
        """
        changes = await self._persist(lambda: self._in_thread(lambda: [self._read_change(r) for r in records]))
        if changes is None:
            return
        begins = self._positions
        outcome = await self._persist(lambda: self._write(changes, begins, reached))
        if isinstance(outcome, Replay):
            self._metrics.count(Metric.PROJECTION_REPLAYS.value.name, reason=outcome.reason)
            self._log.warning("projection_replay", reason=outcome.reason, offsets=outcome.offsets)
            await self._persist(self._assign)
        elif outcome:
            self._positions = reached
            self._metrics.add(Metric.PROJECTION_APPLIED, len(changes))

    async def _write(self, changes: list[Change], begins: dict[int, int], reached: dict[int, int]) -> Replay | bool:
        return await self._writer.apply(changes, begins, reached) or True

    def _read_change(self, record: PatientSource) -> Change:
        place = f"patients/{record.partition}/{record.offset}"
        key_hash = (record.key or b"").decode("ascii", "replace")
        if record.value is None:
            return Change(key_hash, None, record.partition, record.offset)
        try:
            patient = self._decode(record.value)
        except Failure as failure:
            raise PatientUnreadable(f"not readable ({failure.code}).", place=place) from None
        if self._key.hash_identifier(patient.identifier) != key_hash:
            raise PatientUnreadable("its key is not the keyed hash of its identifier.", place=place)
        return Change(key_hash, patient, record.partition, record.offset)

    async def _measure(self) -> bool:
        self._ends = await self._in_thread(lambda: self._reader.end_offsets("read_uncommitted"))
        self._metrics.set(Metric.PROJECTION_BEHIND, self.lag)
        return True

    def _note_progress(self) -> None:
        if self._caught_up:
            return
        self._caught_up = all(self._positions.get(partition, 0) >= end for partition, end in self._target.items())
        if self._caught_up:
            self._log.info("projection_caught_up", offsets=self._positions)

    async def _persist(self, work: Callable[[], Awaitable[T]]) -> T | None:
        """Do the work, again and again while something is temporarily away. None when stopped before it was done."""
        pause = _PAUSE_SECONDS
        while not self._stopping.is_set():
            try:
                done = await work()
            except TemporaryError as error:
                if pause == _PAUSE_SECONDS:
                    self._log.warning("projector_paused", reason=_name(error), exc_info=error)
                self._trouble = _name(error)
                self._metrics.set(Metric.PAUSED, 1, role="projector", reason=type(error).__name__)
                await self._wait(pause)
                self._metrics.set(Metric.PAUSED, 0, role="projector", reason=type(error).__name__)
                pause = min(pause * 2, _LONGEST_PAUSE_SECONDS)
            else:
                if pause > _PAUSE_SECONDS:
                    self._log.info("projector_resumed")
                self._trouble = ""
                return done
        return None

    async def _wait(self, seconds: float) -> None:
        """Wait, but not longer than until ``stop``."""
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(self._stopping.wait(), seconds)

    async def _in_thread(self, work: Callable[[], T]) -> T:
        return await asyncio.get_running_loop().run_in_executor(self._thread, work)


def _name(error: TemporaryError) -> str:
    return f"{error.code} {type(error).__name__}"

"""Partition state: a local store that is a view of changelog topics, and nothing else.

One store per (source, partition), on local disk (LMDB): seen keys, waiting room, lineage. It changes in two ways only:
by reading the changelogs, and after the transaction that wrote the same entries to them has committed. Losing it costs
start-up time, never correctness. The store keeps the next changelog offset to read in the same write as the data.
"""

from __future__ import annotations

import contextlib
import hashlib
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar, cast

import lmdb
import msgspec

from schemas.failure import FatalError
from streams.expiry import STEP_KEYS, Calendar, Mark
from topics import catalog
from topics.cluster import describe_topic_ids
from topics.reading import Record, read_to_end
from topics.transaction import Changelog

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator, Mapping, Sequence

    from topics.cluster import KafkaSettings

T = TypeVar("T")

SEEN = "seen"
WAITING = "waiting"
LINEAGE = "lineage"
_META = "meta"
_LATE = "late"
_TOPIC_NAMES = {SEEN: catalog.name_seen, WAITING: catalog.name_waiting, LINEAGE: catalog.name_lineage}

MAP_BYTES = 64 * 1024**3
"""Address space of a store; the file only grows with its data."""

STALE_SECONDS = 3 * 86_400
"""A store not current for this long is rebuilt: it must stay well below the changelogs' delete.retention (7 days)."""

_DAMAGE = (
    lmdb.CorruptedError,
    lmdb.CursorFullError,
    lmdb.InvalidError,
    lmdb.PageFullError,
    lmdb.PageNotFoundError,
    lmdb.PanicError,
)
"""What only a damaged file gives; a full one or a full disk gives others."""

AHEAD_SECONDS = 3600
"""A store that was current so much later than now was touched under a wrong clock: its age is not known."""


class StateUnusable(FatalError):
    """The local store cannot be written, or was damaged."""

    code = "RS320"
    meaning = "The local state store cannot be written (disk full, no rights), or what it holds is damaged."
    default_remedy = "Free disk space or correct `worker.state`; the store is rebuilt from Kafka."


class SeenEntry(msgspec.Struct, frozen=True, array_like=True):
    """One decided copy of a fact: its digest, and the hop that decided."""

    digest: bytes
    hop: str


class Lineage(msgspec.Struct, frozen=True, array_like=True):
    """What a child event needs of its root. ``patient`` is (authority, id type, value)."""

    event_id: str
    patient: tuple[str, str, str] | None = None
    guarantor_account: tuple[str, str, str] | None = None
    visit: tuple[str, str, str] | None = None
    claim: str | None = None
    invoice: str | None = None


_seen_decoder = msgspec.msgpack.Decoder(list[SeenEntry])
_lineage_decoder = msgspec.msgpack.Decoder(Lineage)
_encoder = msgspec.msgpack.Encoder()

VOID = _encoder.encode([])
"""Value of a key whose release failed: counts as absent, but survives compaction (a tombstone could be missed)."""


class Draft:
    """Reads and changes of one batch on one partition; earlier records of the batch count for later ones.

    ``cause`` is the hop of the record under decision; its changelog records name it when the broker refuses one.
    """

    __slots__ = ("_fetched", "_logs", "cause", "state")

    def __init__(self, state: PartitionState, cause: str = "") -> None:
        self.state = state
        self.cause = cause
        self._logs = {store: Changelog(topic, state.partition) for store, topic in state.topics.items()}
        self._fetched: dict[str, dict[bytes, bytes | None]] = {}

    def fetch(self, seen: Iterable[str], roots: Iterable[str]) -> None:
        """Read what the batch will ask for in one go: keys of facts, and roots of children."""
        wanted = {SEEN: list(map(_shorten, seen)), LINEAGE: list(map(_shorten, roots))}
        self._fetched = self.state.read_many({store: keys for store, keys in wanted.items() if keys})

    def read_seen(self, key: str) -> list[SeenEntry]:
        """Decided copies of a fact; empty when absent or void."""
        return self._decode(SEEN, key, _seen_decoder) or []

    def write_seen(self, key: str, entries: Sequence[SeenEntry]) -> None:
        """Replace the decided copies of a fact; none means void."""
        self._write(SEEN, _shorten(key), _encoder.encode(entries))

    def read_lineage(self, root: str) -> Lineage | None:
        """What is known of a root transaction."""
        return self._decode(LINEAGE, root, _lineage_decoder)

    def write_lineage(self, root: str, lineage: Lineage) -> None:
        """Record a root transaction."""
        self._write(LINEAGE, _shorten(root), _encoder.encode(lineage))

    def read_waiting(self, hop: str) -> bytes | None:
        """Encoded entry of a record on hold."""
        return self._read(WAITING, hop.encode())

    def write_waiting(self, hop: str, entry: bytes | None) -> None:
        """Put a record on hold, or (None) end its hold."""
        self._write(WAITING, hop.encode(), entry)

    def list_changelogs(self) -> list[Changelog]:
        """What changed, by changelog; of several changes of a key the last."""
        return [log for log in self._logs.values() if log.entries]

    def apply(self) -> None:
        """Take the changes over into the store: after their transaction has committed."""
        changed = {store: log for store, log in self._logs.items() if log.entries}
        if changed:
            self.state.apply(changed)

    def _decode(self, store: str, key: str, decoder: msgspec.msgpack.Decoder[T]) -> T | None:
        value = self._read(store, _shorten(key))
        if value is None:
            return None
        try:
            return decoder.decode(value)
        except msgspec.MsgspecError:
            raise self.state.discard(f"an entry of `{store}` is not readable") from None

    def _read(self, store: str, key: bytes) -> bytes | None:
        change = self._logs[store].entries.get(key)
        if change is not None:
            return change[0]
        fetched = self._fetched.get(store, _NOTHING)
        return fetched[key] if key in fetched else self.state.read(store, key)

    def _write(self, store: str, key: bytes, value: bytes | None) -> None:
        self._logs[store].entries[key] = (value, self.cause)


_NOTHING: dict[bytes, bytes | None] = {}


class PartitionState:
    """The store of one partition of one source. Used from one thread at a time."""

    def __init__(self, folder: Path, source: str, partition: int, stores: Sequence[str]) -> None:
        self.source = source
        self.partition = partition
        self.path = folder / f"{source}-{partition}"
        self.topics = {store: _TOPIC_NAMES[store](source) for store in stores}
        """Changelog of each store."""
        self._stores = tuple(stores)
        self._environment: lmdb.Environment | None = None
        self._databases: dict[str, Any] = {}
        self._applied: dict[str, int] = {}
        self._topic_ids: dict[str, str] = {}
        self._calendar = Calendar()
        self._walk: Mark | None = None
        self._place = b""
        self._purged: Mark | None = None

    @property
    def seen_topic(self) -> str:
        """Changelog of the decided keys."""
        return self.topics[SEEN]

    def load(self, kafka: KafkaSettings) -> None:
        """Open the store and catch up with its changelogs. Raises ``KafkaUnreachable`` or ``StateUnusable``."""
        ids = describe_topic_ids(kafka, self.topics.values())
        self._topic_ids = {store: ids.get(topic, "") for store, topic in self.topics.items()}
        self._open()
        try:
            for store, topic in self.topics.items():
                self._catch_up(kafka, store, topic)
            self._put({}, self._applied, current=True)
        except BaseException:
            self.close()
            raise

    def read(self, store: str, key: bytes) -> bytes | None:
        """Value of a key."""
        with self._begin() as transaction:
            value = transaction.get(key, db=self._databases[store])
            return None if value is None else bytes(value)

    def read_many(self, wanted: Mapping[str, Sequence[bytes]]) -> dict[str, dict[bytes, bytes | None]]:
        """Values by store and key, None for an absent one; one read transaction."""
        with self._begin() as transaction:
            values: dict[str, dict[bytes, bytes | None]] = {}
            for store, keys in wanted.items():
                values[store] = dict.fromkeys(keys)
                # The stubs do not know that without ``buffers`` all is bytes.
                values[store].update(cast("Any", transaction.cursor(self._databases[store]).getmulti(keys)))
            return values

    def scan(self, store: str) -> Iterable[tuple[bytes, bytes]]:
        """All entries of a store."""
        with self._begin() as transaction:
            for key, value in transaction.cursor(db=self._databases[store]):
                yield bytes(key), bytes(value)

    def apply(self, changes: Mapping[str, Changelog]) -> None:
        """Take over the changes of a committed transaction, by store."""
        entries: dict[str, list[tuple[bytes, bytes | None]]] = {}
        applied = dict(self._applied)
        for store, log in changes.items():
            entries[store] = [(key, value) for key, (value, _) in log.entries.items()]
            applied[store] = max(applied[store], log.offset + 1)
        mark = None
        if SEEN in entries:
            written = entries[SEEN]
            late = self._calendar.find_late(written, applied[SEEN], in_order=True)
            if late:
                entries[_LATE] = late
            mark = self._calendar.propose(written, applied[SEEN], time.time())
        marks = self._calendar.marks if mark is None else [*self._calendar.marks, mark]
        if mark is not None:
            entries[_META] = [(b"marks", self._calendar.encode(marks))]
        self._put(entries, applied, current=True)
        self._calendar.marks = marks

    def is_purge_due(self, now: float, log_start: int = sys.maxsize) -> bool:
        """Whether ``purge`` may find something; without ``log_start``, as far as the clock tells. Reads no file."""
        horizon = self._walk or self._calendar.find_horizon(log_start, now)
        return horizon is not None and horizon != self._purged

    def purge(self, log_start: int, now: float, keys: int = STEP_KEYS) -> int:
        """Remove what the changelog of `seen`, which starts at ``log_start``, holds no longer; look at some keys only.

        The next call goes on where this one ended. Returns how many keys were looked at; 0 when nothing can be removed
        now. One write; a crash leaves the store as before it or after it. The file does not shrink, its space is used
        again. Raises ``StateUnusable``.
        """
        if self._environment is None or not self.is_purge_due(now, log_start):
            return 0
        if self._walk is None:
            self._walk, self._place = self._calendar.find_horizon(log_start, now), b""
        assert self._walk is not None, "it is due"
        removed: list[tuple[bytes, bytes | None]] = []
        looked = 0
        with self._begin() as transaction:
            cursor = transaction.cursor(db=self._databases[SEEN])
            more = cursor.set_range(self._place)
            while more and looked < keys:
                looked += 1
                key = bytes(cursor.key())
                note = transaction.get(key, db=self._databases[_LATE])
                if self._walk.is_after(bytes(cursor.value()), None if note is None else bytes(note)):
                    removed.append((key, None))
                more = cursor.next()
            self._place = bytes(cursor.key()) if more else b""
        entries: dict[str, list[tuple[bytes, bytes | None]]] = {SEEN: removed, _LATE: removed}
        marks = self._calendar.marks
        if not more:
            marks = marks[marks.index(self._walk) :]
            entries[_META] = [(b"marks", self._calendar.encode(marks))]
        if removed or not more:
            self._put(entries, self._applied)
        if not more:
            self._calendar.marks, self._purged, self._walk = marks, self._walk, None
        return looked

    def discard(self, reason: str) -> StateUnusable:
        """Remove the damaged store, so that the next process rebuilds it; return the error to end this one with.

        No record is to blame for it: what it would decide from such a store would be wrong.
        """
        self.close()
        shutil.rmtree(self.path, ignore_errors=True)
        remedy = "Nothing by hand: the next start rebuilds the store from Kafka. Look at the disk if it repeats."
        return StateUnusable(f"damaged ({reason}).", place=str(self.path), remedy=remedy)

    def close(self) -> None:
        """Give up the store; its files stay."""
        if self._environment is not None:
            self._environment.close()
            self._environment = None

    def _open(self) -> None:
        self.close()
        marks = {
            b"boot": _read_boot_id().encode(),
            b"topics": _encoder.encode(self._topic_ids),
            b"partition": self.path.name.encode(),
        }
        for attempt in range(2):
            try:
                self.path.mkdir(parents=True, exist_ok=True)
                # No fsync: after a power loss the boot id differs and the store is rebuilt from its changelogs.
                environment = lmdb.open(
                    str(self.path), map_size=MAP_BYTES, max_dbs=8, sync=False, metasync=False, readahead=False
                )
                self._environment = environment
                self._check_length(environment)
                self._databases = {
                    store: environment.open_db(store.encode()) for store in (*self._stores, _LATE, _META)
                }
                meta = self._read_meta(environment)
                age = time.time() - float(meta.get(b"touched", b"0"))
                applied = {store: int(meta.get(b"next:" + store.encode(), b"0")) for store in self._stores}
                self._calendar, self._walk, self._purged = Calendar(meta.get(b"marks")), None, None
            except (lmdb.Error, OSError, ValueError, msgspec.MsgspecError) as error:
                self.close()
                if attempt:
                    raise StateUnusable(f"{type(error).__name__}.", place=str(self.path)) from None
                shutil.rmtree(self.path, ignore_errors=True)
                continue
            usable = all(meta.get(name) == value for name, value in marks.items())
            if meta and not (usable and -AHEAD_SECONDS <= age <= STALE_SECONDS):
                self.close()
                shutil.rmtree(self.path, ignore_errors=True)
                continue
            self._put({_META: list(marks.items())}, applied)
            return
        raise StateUnusable("the store cannot be made anew.", place=str(self.path))

    def _check_length(self, environment: lmdb.Environment) -> None:
        # Reading a page that a cut file no longer has would end the process (SIGBUS), again at every restart.
        pages = environment.info()["last_pgno"] + 1
        if (self.path / "data.mdb").stat().st_size < pages * environment.stat()["psize"]:
            raise lmdb.CorruptedError("the file was cut")

    def _catch_up(self, kafka: KafkaSettings, store: str, topic: str) -> None:
        start = {self.partition: self._applied[store]} if self._applied[store] else {}
        chunk: list[tuple[bytes, bytes | None]] = []
        applied = dict(self._applied)
        for item in read_to_end(kafka, topic, offsets=start, partitions=[self.partition]):
            if isinstance(item, Record):
                if item.key:
                    chunk.append((item.key, item.value))
                applied[store] = item.offset + 1
                if len(chunk) >= 5000:
                    self._put(self._date(store, chunk, applied), applied)
                    chunk.clear()
            else:
                applied[store] = item[self.partition]
        self._put(self._date(store, chunk, applied), applied)

    def _date(
        self, store: str, chunk: list[tuple[bytes, bytes | None]], applied: Mapping[str, int]
    ) -> dict[str, list[tuple[bytes, bytes | None]]]:
        late = self._calendar.find_late(chunk, applied[store], in_order=False) if store == SEEN else []
        return {store: chunk, _LATE: late}

    def _put(
        self,
        entries: Mapping[str, Sequence[tuple[bytes, bytes | None]]],
        applied: dict[str, int],
        *,
        current: bool = False,
    ) -> None:
        if self._environment is None:
            raise StateUnusable("the store is closed.", place=str(self.path))
        try:
            with self._environment.begin(write=True) as transaction:
                for store, changes in entries.items():
                    _write(transaction.cursor(self._databases[store]), changes)
                meta = self._databases[_META]
                for store, offset in applied.items():
                    transaction.put(b"next:" + store.encode(), str(offset).encode(), db=meta)
                if current:
                    transaction.put(b"touched", str(time.time()).encode(), db=meta)
        except _DAMAGE as error:
            raise self.discard(type(error).__name__) from None
        except (lmdb.Error, OSError) as error:
            raise StateUnusable(f"{type(error).__name__}.", place=str(self.path)) from None
        self._applied = applied

    def _read_meta(self, environment: lmdb.Environment) -> dict[bytes, bytes]:
        with environment.begin() as transaction:
            return {bytes(key): bytes(value) for key, value in transaction.cursor(db=self._databases[_META])}

    @contextlib.contextmanager
    def _begin(self) -> Iterator[lmdb.Transaction]:
        if self._environment is None:
            raise StateUnusable("the store is closed.", place=str(self.path))
        try:
            with self._environment.begin() as transaction:
                yield transaction
        except lmdb.Error as error:
            raise self.discard(type(error).__name__) from None


def _write(cursor: lmdb.Cursor, changes: Sequence[tuple[bytes, bytes | None]]) -> None:
    """Put and remove, in order."""
    removed = [number for number, (_, value) in enumerate(changes) if value is None]
    begin = 0
    for number in (*removed, len(changes)):
        if number > begin:
            cursor.putmulti(cast("Any", changes[begin:number]))
        if number < len(changes) and cursor.set_key(changes[number][0]):
            cursor.delete()
        begin = number + 1


def _shorten(key: str) -> bytes:
    """LMDB takes keys up to 511 bytes; a longer one is replaced by its hash."""
    text = key.encode()
    return text if len(text) <= 480 else b"sha256:" + hashlib.sha256(text).digest()


def _read_boot_id() -> str:
    linux = Path("/proc/sys/kernel/random/boot_id")
    if linux.exists():
        return linux.read_text("ascii").strip()
    answer = subprocess.run(["sysctl", "-n", "kern.boottime"], capture_output=True, text=True, check=False)
    return answer.stdout.strip() or "unknown"

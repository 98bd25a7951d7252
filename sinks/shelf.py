"""Stopped events of one ledger: on disk instead of in memory, for the life of that ledger.

The changelog is what outlives the process; this is a copy, in a file that has no name and is gone with its last user.
It lies in the folder for temporary files (``TMPDIR``), which belongs on an encrypted disk: requests hold what a target
is told about patients. Memory holds half a megabyte of its pages, however many events there are.
"""

from __future__ import annotations

import os
import sqlite3
import tempfile
import weakref
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from sinks.attempts import NEVER, Attempt, State, build_entry, decode_entry, encode_entry, restore_attempt

if TYPE_CHECKING:
    from sinks.policy import Moment

_SET_UP = (
    "PRAGMA locking_mode = EXCLUSIVE",
    # In memory, not off: a statement that finds the disk full is undone.
    "PRAGMA journal_mode = MEMORY",
    "PRAGMA synchronous = OFF",
    "PRAGMA cache_size = -512",
    "BEGIN",
    # ``due`` and ``quiet_from`` in steady seconds; ``retry_at`` in wall milliseconds, of what is put off.
    """CREATE TABLE stopped (
        event_id TEXT NOT NULL UNIQUE, entity TEXT NOT NULL, offset INTEGER NOT NULL, state TEXT NOT NULL,
        since INTEGER NOT NULL, due REAL, quiet_from REAL NOT NULL, retry_at INTEGER, may_have_landed INTEGER NOT NULL,
        entry BLOB NOT NULL)""",
    "CREATE INDEX by_entity ON stopped (entity, offset)",
    "CREATE INDEX by_due ON stopped (due) WHERE due IS NOT NULL",
    "CREATE INDEX by_since ON stopped (since)",
    "COMMIT",
)


@dataclass(frozen=True, slots=True)
class First:
    """The first event of an entity on the shelf. ``is_free``: only the events before it held it back."""

    event_id: str
    offset: int
    is_free: bool


class Shelf:
    """Events by id, in order per entity, and by the time at which they are tried again.

    All but ``put`` raise ``sqlite3.Error`` when the disk fails. Used by one thread at a time.
    """

    def __init__(self, topic: str) -> None:
        self._topic = topic
        self._database: sqlite3.Connection | None = None
        self._counts: Counter[State] = Counter()

    def __len__(self) -> int:
        return self._counts.total()

    def put(self, attempt: Attempt) -> bool:
        """Put an event there, whose object is then used no more. False when the disk does not take it."""
        row = (
            attempt.event_id,
            attempt.entity,
            attempt.offset,
            attempt.state.value,
            attempt.since,
            None if attempt.due == NEVER else attempt.due,
            attempt.settled_at,
            attempt.retry_at if attempt.is_put_off else None,
            attempt.may_have_landed,
            encode_entry(build_entry(attempt, self._topic)),
        )
        try:
            if self._database is None:
                self._database = self._create()
            self._database.execute("INSERT INTO stopped VALUES (?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        except (sqlite3.OperationalError, OSError):
            return False
        self._counts[attempt.state] += 1
        return True

    def open(self, moment: Moment, quiet: float, longest_pause: float) -> None:
        """After a restart: no earlier write can land from ``quiet`` on, and what was put off has its time again."""
        if not self:
            return
        self._ask("UPDATE stopped SET quiet_from = ? WHERE may_have_landed OR state = ?", quiet, State.UNKNOWN.value)
        self._ask(
            "UPDATE stopped SET due = ? + min(?, max(0, retry_at - ?) / 1000.0) WHERE retry_at IS NOT NULL",
            moment.steady,
            longest_pause,
            moment.wall,
        )

    def read(self, event_id: str) -> Attempt | None:
        """A copy of the event, to look at; the event itself is decoded by whoever needs it."""
        rows = self._ask("SELECT entry, due, quiet_from FROM stopped WHERE event_id = ?", event_id)
        if not rows:
            return None
        ((entry, due, quiet_from),) = rows
        attempt = restore_attempt(event_id, decode_entry(entry))
        attempt.due = NEVER if due is None else due
        attempt.settled_at = quiet_from
        return attempt

    def take(self, event_id: str) -> Attempt | None:
        """Take an event back."""
        attempt = self.read(event_id)
        if attempt is not None:
            self._ask("DELETE FROM stopped WHERE event_id = ?", event_id)
            self._counts[attempt.state] -= 1
        return attempt

    def find_offset(self, event_id: str) -> int | None:
        """The offset of an event; None when it is not here."""
        rows = self._ask("SELECT offset FROM stopped WHERE event_id = ?", event_id)
        return rows[0][0] if rows else None

    def find_first(self, entity: str) -> First | None:
        """The first event of an entity."""
        rows = self._ask(
            "SELECT event_id, offset, state = ? AND due IS NULL FROM stopped WHERE entity = ? ORDER BY offset LIMIT 1",
            State.PARKED.value,
            entity,
        )
        return First(rows[0][0], rows[0][1], bool(rows[0][2])) if rows else None

    def find_before(self, entity: str, offset: int) -> int | None:
        """The last offset of an entity's events before that one."""
        rows = self._ask("SELECT max(offset) FROM stopped WHERE entity = ? AND offset < ?", entity, offset)
        return rows[0][0] if rows else None

    def list_free(self) -> list[str]:
        """Entities whose first event here was held back only by events before it."""
        rows = self._ask(
            "SELECT entity FROM stopped s WHERE state = ? AND due IS NULL"
            " AND NOT EXISTS (SELECT 1 FROM stopped e WHERE e.entity = s.entity AND e.offset < s.offset)",
            State.PARKED.value,
        )
        return [entity for (entity,) in rows]

    def list_due(self, steady: float, room: int) -> list[str]:
        """Up to ``room`` events whose time has come, the longest due first."""
        rows = self._ask("SELECT event_id FROM stopped WHERE due <= ? ORDER BY due LIMIT ?", steady, room)
        return [event_id for (event_id,) in rows]

    def count_states(self) -> Counter[State]:
        """Events per state."""
        return +self._counts

    def find_oldest(self) -> int | None:
        """Wall time since which the oldest event is here."""
        rows = self._ask("SELECT min(since) FROM stopped")
        return rows[0][0] if rows else None

    def _ask(self, statement: str, *values: object) -> list[tuple]:  # type: ignore[type-arg]
        if self._database is None or not self:
            return []
        return self._database.execute(statement, values).fetchall()

    def _create(self) -> sqlite3.Connection:
        descriptor, path = tempfile.mkstemp(prefix="remitstream-")
        os.close(descriptor)
        try:
            # It is loaded by one thread and then used by another.
            database = sqlite3.connect(path, isolation_level=None, check_same_thread=False)
            for statement in _SET_UP:
                database.execute(statement)
        finally:
            os.unlink(path)  # noqa: PTH108 - the file lives as long as it is open
        weakref.finalize(self, database.close)
        return database

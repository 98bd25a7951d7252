"""The billing system's own book: SQLite, one commit per message, made before the message is answered."""

from __future__ import annotations

import hashlib
import sqlite3
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_SCHEMA = """
CREATE TABLE IF NOT EXISTS postings (
  id INTEGER PRIMARY KEY AUTOINCREMENT,
  instance TEXT NOT NULL, facility TEXT NOT NULL, message_type TEXT NOT NULL, control_id TEXT NOT NULL,
  transaction_id TEXT NOT NULL, transaction_time TEXT NOT NULL, type TEXT NOT NULL, code TEXT NOT NULL,
  description TEXT NOT NULL, minor INTEGER NOT NULL, currency TEXT NOT NULL,
  mrn TEXT NOT NULL, authority TEXT NOT NULL, raw_sha256 TEXT NOT NULL
) STRICT;
CREATE TABLE IF NOT EXISTS answers (
  instance TEXT NOT NULL, sender TEXT NOT NULL, control_id TEXT NOT NULL, raw_sha256 TEXT NOT NULL,
  answer BLOB NOT NULL, PRIMARY KEY (instance, sender, control_id)
) STRICT, WITHOUT ROWID;
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class Posting:
    """One posted transaction (one FT1)."""

    instance: str
    facility: str
    """MSH-6, or the instance's name when the message names none."""
    message_type: str
    control_id: str
    transaction_id: str
    transaction_time: str
    type: str
    code: str
    description: str
    """FT1-8."""
    minor: int
    """Amount in minor units, signed."""
    currency: str
    mrn: str
    authority: str
    raw_sha256: str


class Ledger:
    """Postings and the answers given for them; survives a kill of the process and of the machine (full sync)."""

    def __init__(self, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self._database = sqlite3.connect(path, isolation_level=None)
        self._database.row_factory = sqlite3.Row
        self._database.execute("PRAGMA journal_mode = WAL")
        self._database.execute("PRAGMA synchronous = FULL")
        self._database.executescript(_SCHEMA)

    def close(self) -> None:
        """Close the file."""
        self._database.close()

    def post(self, postings: Sequence[Posting], *, sender: str, answer: bytes | None) -> None:
        """Write a message's postings, and the answer to repeat when the instance dedupes, in one commit."""
        first = postings[0]
        self._database.execute("BEGIN IMMEDIATE")
        try:
            for posting in postings:
                row = asdict(posting)
                names = ", ".join(row)
                marks = ", ".join(f":{name}" for name in row)
                self._database.execute(f"INSERT INTO postings ({names}) VALUES ({marks})", row)  # noqa: S608 - own names
            if answer is not None:
                self._database.execute(
                    "INSERT INTO answers VALUES (?, ?, ?, ?, ?)",
                    (first.instance, sender, first.control_id, first.raw_sha256, answer),
                )
            self._database.execute("COMMIT")
        except BaseException:
            self._database.execute("ROLLBACK")
            raise

    def find_answer(self, instance: str, sender: str, control_id: str) -> tuple[bytes, str] | None:
        """The answer once given to this control id of this sender, and the hash of the message it was given to."""
        row = self._database.execute(
            "SELECT answer, raw_sha256 FROM answers WHERE instance = ? AND sender = ? AND control_id = ?",
            (instance, sender, control_id),
        ).fetchone()
        return None if row is None else (bytes(row["answer"]), str(row["raw_sha256"]))

    def read(self, *, instance: str | None = None, after: int = 0) -> list[dict[str, Any]]:
        """Postings in order: the fields of ``Posting`` and ``id``, which must be above ``after``."""
        rows = self._database.execute(
            "SELECT * FROM postings WHERE id > ? AND (? IS NULL OR instance = ?) ORDER BY id",
            (after, instance, instance),
        )
        return [dict(row) for row in rows]

    def count(self, instance: str) -> int:
        """Number of postings of an instance."""
        row = self._database.execute("SELECT count(*) FROM postings WHERE instance = ?", (instance,)).fetchone()
        return int(row[0])

    def clear(self, instance: str | None) -> None:
        """Forget everything of one instance, or of all."""
        for table in ("postings", "answers"):
            self._database.execute(
                f"DELETE FROM {table} WHERE ? IS NULL OR instance = ?",  # noqa: S608 - two fixed names
                (instance, instance),
            )


def hash_message(raw: bytes) -> str:
    """sha256 of a message, hex."""
    return hashlib.sha256(raw).hexdigest()

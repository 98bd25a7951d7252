"""Which record ends the process: found without a cost to the hot path, by a mark that outlives the process.

Some ends are no exception: a crash in native code, the kernel taking the process because memory is short. Then the same
batch would end the next process too, for ever. So every batch is noted, before it is decided, in a page of memory that
belongs to a file (a few microseconds, no system call); the note is wiped before the transaction. A process that finds
its predecessor's note knows what that one held when it ended.

* ``EXITS`` ends over the same records: from then on the worker takes one record at a time, until these are done.
* ``ALONE`` further ends with one and the same record alone in hand: that record is dead-lettered unseen
  (``CRASHED_WORKER``), and the worker goes on at full speed.

An end during the transaction, or while nothing is in hand, counts for nothing: no record is to blame for it. Whoever
kills the process by hand five times, each time while it decides the same records and twice while it holds the same one
alone, makes a dead letter of it; redrive brings it back.
"""

from __future__ import annotations

import mmap
import os
import struct
from typing import TYPE_CHECKING, Final

import msgspec

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

EXITS: Final = 3
ALONE: Final = 2
_PAGE: Final = 64 * 1024
_HEADER: Final = struct.Struct("<BI")

_Ranges = dict[str, tuple[int, int]]
"""``<topic id>:<partition>`` -> first offset and the one after the last."""


class Suspicion(msgspec.Struct):
    """Offsets of one partition among which a record is that ended ``exits`` processes.

    ``alone`` processes ended with the record at ``begin_alone`` as the only one in hand.
    """

    begin: int
    end: int
    exits: int = 0
    begin_alone: int = -1
    alone: int = 0


class Suspects:
    """The note of what is in hand, and what earlier processes of the same slot ended over.

    ``folder`` belongs to this process alone (``streams.slot``).
    """

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._notes = folder / "suspects.json"
        self._page: mmap.mmap | None = None
        self.known: dict[str, Suspicion] = {}
        """What is suspected, by ``<topic id>:<partition>``; empty but for hard times."""
        self._encoder = msgspec.msgpack.Encoder()

    def open(self) -> dict[str, Suspicion]:
        """Read the predecessor's note; return what is suspected now, by ``<topic id>:<partition>``."""
        self._folder.mkdir(parents=True, exist_ok=True)
        handle = os.open(self._folder / "in_hand", os.O_RDWR | os.O_CREAT, 0o600)
        try:
            os.ftruncate(handle, _PAGE)
            self._page = mmap.mmap(handle, _PAGE)
        finally:
            os.close(handle)
        try:
            self.known = msgspec.json.decode(self._notes.read_bytes(), type=dict[str, Suspicion])
        except (FileNotFoundError, msgspec.MsgspecError):
            self.known = {}  # cut by a full disk: at worst the count begins anew
        self.blame()
        return dict(self.known)

    def take(self, ranges: _Ranges, *, alone: bool) -> None:
        """These records are in hand from now on."""
        if self._page is None:
            return
        note = self._encoder.encode((alone, ranges))
        if len(note) > _PAGE - _HEADER.size:
            return
        self._page[0] = 0
        self._page[_HEADER.size : _HEADER.size + len(note)] = note
        _HEADER.pack_into(self._page, 0, 1, len(note))

    def put_down(self) -> None:
        """Nothing is in hand: an end from here on is no record's fault."""
        if self._page is not None:
            self._page[0] = 0

    def blame(self) -> None:
        """Count an end of the process for the records in hand, durably, and put them down."""
        if self._page is None:
            return
        is_held, length = _HEADER.unpack_from(self._page)
        if is_held:
            try:
                alone, ranges = msgspec.msgpack.decode(
                    self._page[_HEADER.size : _HEADER.size + length], type=tuple[bool, _Ranges]
                )
            except msgspec.MsgspecError:
                ranges = {}
            for partition, (begin, end) in ranges.items():
                self._count(partition, begin, end, alone=alone)
            if ranges:
                self._save()
        self.put_down()

    def is_suspected(self, frontiers: Mapping[str, int]) -> bool:
        """Whether any of these partitions, at these frontiers, must be read record by record."""
        for partition, frontier in frontiers.items():
            known = self.known.get(partition)
            # A frontier below the first of these records has only markers in between.
            if known is not None and known.exits >= EXITS and frontier < known.end:
                return True
        return False

    def is_culprit(self, partition: str, offset: int) -> bool:
        """Whether this record has ended the process often enough while it was alone in hand."""
        known = self.known.get(partition)
        return known is not None and known.begin_alone == offset and known.alone >= ALONE

    def acquit(self, frontiers: Mapping[str, int], *, found: bool) -> None:
        """Forget what these frontiers have passed; everything, when the culprit was found: it explains all."""
        left = {
            partition: known
            for partition, known in self.known.items()
            if not found and frontiers.get(partition, known.begin) < known.end
        }
        if left != self.known:
            self.known = left
            self._save()

    def close(self) -> None:
        """An orderly end blames nobody."""
        if self._page is not None:
            self.put_down()
            self._page.close()
            self._page = None

    def _count(self, partition: str, begin: int, end: int, *, alone: bool) -> None:
        known = self.known.get(partition)
        if known is None or not known.begin <= begin < known.end:
            # Other records than last time: what lay before is done, so it was not to blame.
            self.known[partition] = known = Suspicion(begin, end)
        if alone:
            known.alone = known.alone + 1 if known.begin_alone == begin else 1
            known.begin_alone = begin
        else:
            # It lies in both batches: what is below `begin` has been committed since.
            known.begin, known.end = begin, min(end, known.end)
            known.exits += 1

    def _save(self) -> None:
        draft = self._notes.with_suffix(".new")
        draft.write_bytes(msgspec.json.encode(self.known))
        draft.replace(self._notes)

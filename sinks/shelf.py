"""Bytes of events that cannot finish soon: on disk instead of in memory, for the life of one ledger.

The changelog is what outlives the process; this is a copy, in a file that has no name and is gone with its last user.
It lies in the folder for temporary files (``TMPDIR``), which belongs on an encrypted disk: requests hold what a target
is told about patients.
"""

from __future__ import annotations

import os
import tempfile
import weakref

_LENGTH_BITS = 28
"""Of a place: the length of what is there. No record of the broker comes near 256 MiB."""


class Shelf:
    """A file that only grows; what is taken back and unchanged keeps its place."""

    def __init__(self) -> None:
        self._descriptor = -1
        self._end = 0

    def put(self, data: bytes) -> int:
        """The place where it is found again. Raises ``OSError`` when the disk is full."""
        if self._descriptor < 0:
            file = tempfile.TemporaryFile(prefix="remitstream-")  # noqa: SIM115 - open as long as the ledger lives
            weakref.finalize(self, file.close)
            self._descriptor = file.fileno()
        place = self._end << _LENGTH_BITS | len(data)
        written = os.pwrite(self._descriptor, data, self._end)
        if written != len(data):
            raise OSError(f"only {written} of {len(data)} bytes were written")
        self._end += len(data)
        return place

    def get(self, place: int) -> bytes:
        """What was put there. Raises ``OSError``."""
        length = place & (1 << _LENGTH_BITS) - 1
        data = os.pread(self._descriptor, length, place >> _LENGTH_BITS)
        if len(data) != length:
            raise OSError(f"{len(data)} of {length} bytes are left")
        return data

"""MLLP framing: ``0x0B`` message ``0x1C 0x0D`` (HL7 Minimal Lower Layer Protocol, release 1). Bytes only; no I/O."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Iterator

START = b"\x0b"
END = b"\x1c\r"

_HEAD = 8192
"""Bytes kept of a message that is too long: enough for the header that an answer needs."""


@dataclass(frozen=True, slots=True)
class Frame:
    """Content of one MLLP frame; of a frame over the limit only its beginning."""

    content: bytes
    is_whole: bool = True


class Deframer:
    """Cuts a byte stream into frames. What is not inside a frame is skipped and counted, one per run."""

    def __init__(self, limit: int) -> None:
        self._limit = limit
        self._head_length = min(limit, _HEAD)
        self._buffer = bytearray()
        self._inside = False
        self._searched = 0
        self._head: bytes | None = None
        self._in_garbage = False
        self.garbage = 0
        """Runs of bytes outside frames, and beginnings of messages that their sender abandoned."""
        self.dropped = 0
        """Bytes dropped of the message that is over the limit just now."""

    @property
    def pending(self) -> bool:
        """Whether a frame has begun and not ended."""
        return self._inside

    def feed(self, data: bytes) -> Iterator[Frame]:
        """Take received bytes; yield the frames that are complete now."""
        self._buffer += data
        while True:
            if not self._inside and not self._find_start():
                return
            end = self._buffer.find(END, self._searched)
            if end < 0:
                self._keep_open()
                return
            content = bytes(self._buffer[:end])
            del self._buffer[: end + len(END)]
            head, self._head = self._head, None
            self._inside, self._searched, self.dropped = False, 0, 0
            if head is not None:
                yield Frame(head, is_whole=False)
            elif end > self._limit:
                yield Frame(content[: self._head_length], is_whole=False)
            else:
                yield Frame(self._skip_abandoned(content))

    def _find_start(self) -> bool:
        start = self._buffer.find(START)
        skipped = self._buffer if start < 0 else self._buffer[:start]
        # Line ends between frames are a habit of some senders, not a fault.
        if skipped.strip(b"\r\n") and not self._in_garbage:
            self._in_garbage = True
            self.garbage += 1
        if start < 0:
            self._buffer.clear()
            return False
        del self._buffer[: start + len(START)]
        self._inside, self._in_garbage = True, False
        return True

    def _keep_open(self) -> None:
        if self._head is None and len(self._buffer) > self._limit:
            self._head = bytes(self._buffer[: self._head_length])
        if self._head is not None:
            # The last byte may be the first half of the end mark.
            self.dropped += max(len(self._buffer) - 1, 0)
            del self._buffer[:-1]
        self._searched = max(len(self._buffer) - 1, 0)

    def _skip_abandoned(self, content: bytes) -> bytes:
        again = content.rfind(START + b"MSH")
        if again < 0:
            return content
        self.garbage += 1
        return content[again + len(START) :]

"""MLLP framing of the sandbox: 0x0B, message, 0x1C 0x0D."""

from __future__ import annotations

import asyncio

START = b"\x0b"
END = b"\x1c\r"
LARGEST_FRAME = 1 << 20


def wrap_frame(message: bytes) -> bytes:
    """The message with its framing bytes."""
    return START + message + END


async def read_frame(reader: asyncio.StreamReader) -> bytes | None:
    """The next message without framing, or None when the other side closed (also in the middle of a message).

    Bytes before 0x0B are skipped. The reader's limit must be ``LARGEST_FRAME``; a longer message counts as a close.
    """
    try:
        await reader.readuntil(START)
        framed = await reader.readuntil(END)
    except (asyncio.IncompleteReadError, asyncio.LimitOverrunError, ConnectionError):
        return None
    return framed[: -len(END)]

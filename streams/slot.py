"""The folder of one worker process, held by one process at a time.

The lock is the kernel's (``flock``): it ends with its process, however that ends. Two processes of one name on a host
would fence each other at the broker again and again; the second one is told instead.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import time
from pathlib import Path
from typing import TYPE_CHECKING, Final

from schemas.failure import TemporaryError
from streams.state import StateUnusable

if TYPE_CHECKING:
    from collections.abc import AsyncIterator

PATIENCE: Final = 10.0
"""Seconds a predecessor that is just ending is waited for."""


class SlotTaken(TemporaryError):
    """Another process has this slot's folder."""

    code = "RS234"
    meaning = "Another worker process of the same instance and slot runs on this host."
    default_remedy = (
        "Give this one another `--slot` (or another `worker.instance` and `worker.state`), or end the other one; a "
        "process that was stopped (SIGSTOP) and is not wanted any more ends with `kill -9` only."
    )


def name_folder(state: Path, instance: str, slot: int) -> Path:
    """Folder of a slot's local stores and notes."""
    return state / f"{instance}-{slot}"


@contextlib.asynccontextmanager
async def hold(folder: Path, *, patience: float = PATIENCE) -> AsyncIterator[None]:
    """Hold a slot's folder.

    Raises ``SlotTaken``, naming the other process, after ``patience`` seconds, and ``StateUnusable``.
    """
    handle = _open(folder)
    try:
        until = time.monotonic() + patience
        while not _try_lock(handle):
            if time.monotonic() > until:
                raise SlotTaken(_describe(os.pread(handle, 32, 0)), place=str(folder))
            await asyncio.sleep(0.1)
        os.ftruncate(handle, 0)
        os.pwrite(handle, str(os.getpid()).encode(), 0)
        yield
    finally:
        os.close(handle)


def _open(folder: Path) -> int:
    try:
        folder.mkdir(parents=True, exist_ok=True)
        return os.open(folder / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
    except OSError as error:
        raise StateUnusable(f"{type(error).__name__}.", place=str(folder)) from None


def _try_lock(handle: int) -> bool:
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError as error:
        if error.errno in (errno.EAGAIN, errno.EACCES):
            return False
        raise
    return True


def _describe(holder: bytes) -> str:
    number = holder.decode("ascii", "replace").strip()
    if not number.isdigit():
        return "held by another process."
    try:
        # The state letter stands behind the name, which is in brackets and may hold anything.
        state = Path(f"/proc/{number}/stat").read_text("ascii", "replace").rpartition(")")[2].split()[0]
    except (OSError, IndexError):
        state = ""
    return f"held by process {number}{', which is stopped (SIGSTOP)' if state in ('T', 't') else ''}."

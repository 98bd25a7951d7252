"""Python's cycle collector, run between batches.

A batch is some hundred thousand objects that reference counting frees at its end. A collection in the middle of one
walks all of them and finds nothing; just after one there is next to nothing to walk.
"""

from __future__ import annotations

import gc
import time

YOUNG_LIMIT = 2_000_000
"""Allocations after which Python collects by itself: only when batches do not come to their end."""
FULL_SECONDS = 60.0
"""Seconds between two searches of everything that is not frozen."""


class Garbage:
    """Collects when told to. Making one puts off Python's own collections in this process."""

    def __init__(self) -> None:
        self._full_at = time.monotonic()
        gc.set_threshold(YOUNG_LIMIT, 20, 20)

    def collect(self) -> None:
        """Search what was made since the last call and, once in a while, everything."""
        now = time.monotonic()
        if now - self._full_at >= FULL_SECONDS:
            self._full_at = now
            gc.collect()
        else:
            gc.collect(0)

"""How long this process kept its own calls waiting: the event loop was busy, or the machine had no core for it."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

TICK = 0.02
"""Seconds between two looks of the timer."""


class Stalls:
    """A timer that comes late by as much as everything else does. It runs while ``is_needed`` says so."""

    def __init__(self, is_needed: Callable[[], object]) -> None:
        self._is_needed = is_needed
        self._loop: asyncio.AbstractEventLoop | None = None
        self._late = 0.0
        self._due = 0.0

    def watch(self) -> None:
        """Have the timer run. Call it in the event loop."""
        if self._loop is None:
            self._loop = asyncio.get_running_loop()
            self._arm(self._loop)

    def measure(self) -> float:
        """Seconds by which the loop was late, all together; those of just now are among them."""
        return self._late if self._loop is None else self._late + max(0.0, self._loop.time() - self._due)

    def _arm(self, loop: asyncio.AbstractEventLoop) -> None:
        self._due = loop.time() + TICK
        loop.call_at(self._due, self._look)

    def _look(self) -> None:
        self._late = self.measure()
        loop, self._loop = self._loop, None
        if loop is not None and self._is_needed():
            self._loop = loop
            self._arm(loop)

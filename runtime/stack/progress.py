"""What the stack tells while it works, so that a terminal can draw it."""

from __future__ import annotations

from typing import Protocol


class Progress(Protocol):
    """Receives news from a download or a start. Calls come from several threads, one at a time."""

    def download(self, file: str, done: int, total: int) -> None:
        """``done`` of ``total`` bytes of one file are on disk. Every file of the download is told once at the start."""

    def step(self, component: str, state: str) -> None:
        """A component changed: ``unpacking``, ``starting``, ``ready`` or ``running`` (it already was)."""


class SilentProgress:
    """Says nothing."""

    def download(self, file: str, done: int, total: int) -> None:
        """Do nothing."""

    def step(self, component: str, state: str) -> None:
        """Do nothing."""

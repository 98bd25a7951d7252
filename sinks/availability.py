"""Whether calls to a target may begin: closed for a while after it could not be reached, then one probe, then open.

Pure: times are steady seconds, passed in.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable


class Availability:
    """Exponential back-off with full jitter over the whole target. An outage is not poison: nothing is dead-lettered.

    ``draw`` gives a number in [0, 1): the jitter. Pauses grow from ``first`` to ``longest`` seconds.
    """

    def __init__(self, draw: Callable[[], float], *, first: float = 0.5, longest: float = 30.0) -> None:
        self._draw = draw
        self._first = first
        self._longest = longest
        self._failures = 0
        self._closed_until = 0.0
        self.reason = ""

    @property
    def is_open(self) -> bool:
        """Whether the last thing heard of the target was good."""
        return not self._failures

    def limit_calls(self, steady: float, wanted: int) -> int:
        """How many calls may be under way now: all, one as a probe, or none."""
        if not self._failures:
            return wanted
        return 1 if steady >= self._closed_until else 0

    def fail(self, steady: float, reason: str, wait: float = 0.0) -> None:
        """The target could not be reached, refuses our credentials, or told us to wait that many seconds.

        Failures of one closed time count once; the longest wait among them holds.
        """
        if steady < self._closed_until:
            self._closed_until = max(self._closed_until, steady + wait)
            return
        self._failures += 1
        self.reason = reason
        ceiling = min(self._longest, self._first * 2 ** min(self._failures - 1, 20))
        # At least a tenth: a jitter near zero would be no pause at all.
        self._closed_until = steady + max(wait, ceiling * max(0.1, self._draw()))

    def succeed(self) -> None:
        """It answered."""
        self._failures = 0
        self._closed_until = 0.0
        self.reason = ""

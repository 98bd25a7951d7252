"""Whether calls to a target may begin: a circuit breaker with one probe at a time. Pure: steady seconds, passed in.

An outage is not poison: while the breaker is not closed nothing is sent and nothing is dead-lettered. Refused
credentials open it until the credential changed or a person says so; with ``refused_backoff`` one call is also tried
now and then, because a person may have mended it at the target, where nobody tells us.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from enum import StrEnum

from clients.limits import Backoff
from schemas.failure import FailureKind


class BreakerState(StrEnum):
    """The states, as people see them."""

    CLOSED = "closed"
    """Calls flow."""
    OPEN = "open"
    """The target is down; the next try waits for its time."""
    HALF_OPEN = "half-open"
    """One call is tried; the rest waits for it."""
    REFUSED = "refused"
    """The target refuses our credentials; a person must look."""


@dataclass(frozen=True, slots=True)
class Ticket:
    """Leave for one call. Give it back by ``succeed``, ``fail`` or ``withdraw``."""

    term: int
    credential: int
    probe: bool
    number: int


_DOWN = frozenset({FailureKind.UNAVAILABLE, FailureKind.AMBIGUOUS})


class Breaker:
    """The breaker of one target instance.

    ``threshold`` calls in a row that never arrived or were never answered open it. It then waits by ``backoff`` (full
    jitter, drawn by ``draw`` in [0, 1)), at least as long as the target asked, and lets one probe through: its success
    closes, its failure opens for longer. A probe that nobody reports within ``probe_seconds`` is given up.

    What calls of an earlier term report (begun before it last opened or closed) changes nothing: their news is old.
    An AUTH counts only when the call carried the credential in force.
    """

    def __init__(
        self,
        draw: Callable[[], float],
        *,
        threshold: int = 3,
        backoff: Backoff | None = None,
        refused_backoff: Backoff | None = None,
        probe_seconds: float = 60.0,
    ) -> None:
        if threshold < 1:
            raise ValueError("the threshold is 1 or more")
        self._draw = draw
        self._threshold = threshold
        self._backoff = backoff or Backoff()
        self._refused_backoff = refused_backoff
        self._probe_seconds = probe_seconds
        self._state = BreakerState.CLOSED
        self._term = 0
        self._number = 0
        self._failures = 0
        self._openings = 0
        self._opens_until = 0.0
        self._credential = 0
        self._probe: tuple[int, float] | None = None
        self.reason = ""
        """Code of what opened it; empty when closed."""
        self.since = 0.0
        """When the state last changed between closed and not closed."""

    def name_state(self, now: float) -> BreakerState:
        """The state for the console."""
        if self._state is BreakerState.OPEN and self._is_probing(now):
            return BreakerState.HALF_OPEN
        return self._state

    def admit(self, now: float) -> Ticket | None:
        """Leave for one call that begins now, or None."""
        if self._state is BreakerState.CLOSED:
            return self._issue(probe=False)
        if self._waits_for_person or now < self._opens_until or self._is_probing(now):
            return None
        ticket = self._issue(probe=True)
        self._probe = (ticket.number, now)
        return ticket

    def measure_wait(self, now: float) -> float | None:
        """Seconds until ``admit`` may give leave; None when only a person or a new credential can say."""
        if self._waits_for_person:
            return None
        if self._state is BreakerState.CLOSED:
            return 0.0
        probe = self._probe[1] + self._probe_seconds - now if self._probe is not None else 0.0
        return max(0.0, self._opens_until - now, probe)

    def succeed(self, ticket: Ticket, now: float) -> None:
        """The target answered this call, with whatever verdict on the record."""
        if not self._is_current(ticket):
            return
        self._failures = 0
        if ticket.probe:
            self._begin_term(now, BreakerState.CLOSED, "")
            self._openings = 0

    def fail(
        self,
        ticket: Ticket,
        now: float,
        kind: FailureKind,
        code: str,
        *,
        retry_after: float = 0.0,
        credential: int | None = None,
    ) -> None:
        """This call did not end well. Kinds about one record (REJECTED, DUPLICATE) and RATE_LIMITED are an answer.

        ``credential`` is the one the call carried, when it was renewed on the way.
        """
        if kind is FailureKind.INTERNAL or kind in {FailureKind.INVALID, FailureKind.UNMAPPED}:
            self.withdraw(ticket)  # nothing was sent, or our own reading failed: no news of the target
        elif kind is FailureKind.AUTH:
            self._refuse(ticket, now, code, ticket.credential if credential is None else credential)
        elif kind not in _DOWN:
            self.succeed(ticket, now)
        elif self._is_current(ticket):
            self._failures += 1
            # A target that names a time has spoken for itself.
            if ticket.probe or retry_after > 0 or self._failures >= self._threshold:
                self._open(now, code, retry_after)

    def withdraw(self, ticket: Ticket) -> None:
        """This call was not made after all; a probe's place is free again."""
        if self._probe is not None and ticket.probe and self._probe[0] == ticket.number:
            self._probe = None

    def change_credential(self, credential: int, now: float) -> None:
        """The credential in force, as a number that grows with each new token. A new one earns a probe at once."""
        if credential <= self._credential:
            return
        self._credential = credential
        if self._state is BreakerState.REFUSED:
            self.allow_probe(now)

    def allow_probe(self, now: float) -> None:
        """A person says: try now. A closed breaker stays closed, a probe under way stays the only one."""
        if self._state is BreakerState.CLOSED:
            return
        self._state = BreakerState.OPEN
        self._opens_until = now

    @property
    def _waits_for_person(self) -> bool:
        return self._state is BreakerState.REFUSED and self._refused_backoff is None

    def _issue(self, *, probe: bool) -> Ticket:
        self._number += 1
        return Ticket(self._term, self._credential, probe, self._number)

    def _is_probing(self, now: float) -> bool:
        return self._probe is not None and now < self._probe[1] + self._probe_seconds

    def _is_current(self, ticket: Ticket) -> bool:
        if ticket.term != self._term:
            return False
        return not ticket.probe or (self._probe is not None and self._probe[0] == ticket.number)

    def _refuse(self, ticket: Ticket, now: float, code: str, credential: int) -> None:
        # An older credential's refusal is no news. Neither is one from before a probe was allowed: the probe will tell.
        if credential < self._credential or (ticket.term != self._term and self._state is BreakerState.OPEN):
            self.withdraw(ticket)
            return
        self._credential = credential
        if self._state is not BreakerState.REFUSED or ticket.probe:
            self._openings += 1
            if self._refused_backoff is not None:
                self._opens_until = now + self._refused_backoff.draw_pause(self._openings, self._draw)
            self._begin_term(now, BreakerState.REFUSED, code)

    def _open(self, now: float, code: str, retry_after: float) -> None:
        self._openings += 1
        self._opens_until = now + max(retry_after, self._backoff.draw_pause(self._openings, self._draw))
        self._begin_term(now, BreakerState.OPEN, code)

    def _begin_term(self, now: float, state: BreakerState, reason: str) -> None:
        if (state is BreakerState.CLOSED) != (self._state is BreakerState.CLOSED):
            self.since = now
        self._state = state
        self._term += 1
        self._failures = 0
        self._probe = None
        self.reason = reason

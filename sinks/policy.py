"""How a target instance is treated: its class, its times, and what may be done when an outcome is unknown. Pure."""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING

from schemas.failure import ConfigurationError
from sinks.contract import TargetClass
from sinks.transport import Finder

if TYPE_CHECKING:
    from sinks.contract import Target, TargetSettings
    from sinks.transport import Transport


class LookUpMissing(ConfigurationError):
    """A target claims class C and cannot be asked."""

    code = "RS420"
    meaning = "A target connector says that it can be asked for our reference (class C), and has no look-up."
    default_remedy = "Declare `look_up` in the connector's `HttpHead`, or let `classify` say D."


@dataclass(frozen=True, slots=True, kw_only=True)
class Limits:
    """How much is held at once. ``calls_ahead``: calls made durable per connection, those on the wire included."""

    poll_records: int = 1000
    open_events: int = 20_000
    """Events at work or about to be."""
    stopped_events: int = 200_000
    """Parked, refused and unknown ones. They are on disk; past the frontier, memory holds nothing of them."""
    calls_ahead: int = 8
    calls_ahead_class_d: int = 2
    """Fewer where nothing can be resent: all of them become a person's work when the process is killed."""


@dataclass(frozen=True, slots=True)
class Moment:
    """Now: ``steady`` seconds for waiting, ``wall`` milliseconds since the epoch for what outlives the process.

    Steady seconds do not pass while the machine sleeps: a write that slept with us may still land afterwards.
    """

    steady: float
    wall: int

    def after(self, seconds: float) -> Moment:
        """That many seconds later."""
        return Moment(self.steady + seconds, self.wall + int(seconds * 1000))

    def count_wait(self, until_wall: int, longest: float) -> float:
        """Steady time at which that wall time is reached, at most ``longest`` seconds from now."""
        return self.steady + min(longest, max(0, until_wall - self.wall) / 1000)


class Step(StrEnum):
    """What comes next for a request that may have landed, once no write of it can still land."""

    RESEND = "RESEND"
    LOOK_UP = "LOOK_UP"
    PERSON = "PERSON"


@dataclass(frozen=True, slots=True, kw_only=True)
class Policy:
    """How one target instance is treated. Times in seconds.

    ``window`` is how long the target remembers an idempotency key; None means that nobody knows.
    """

    target_class: TargetClass
    call_deadline: float
    session_timeout: float
    window: float | None = None
    looks_up: bool = False
    """Whether the target can be asked for our reference: always so at class C."""
    visible_after: float = 0.0
    """How long the target may take to show what it took."""
    clock_error: float = 5.0
    retry_first: float = 0.5
    retry_longest: float = 60.0
    park_after: int = 6
    """Refusals for now of one event, after which it is parked and no longer holds the frontier."""
    ask_person_after: int = 12
    """Tries of one event without a clear end (no answer, unclear look-ups), after which a person decides."""

    def choose_step(self, first_write_at: int, moment: Moment) -> Step:
        """What may be done at this moment with a request whose first write was not before that wall time."""
        if self.may_resend(first_write_at, moment):
            return Step.RESEND
        return Step.LOOK_UP if self.looks_up else Step.PERSON

    def may_resend(self, first_write_at: int, moment: Moment) -> bool:
        """Whether a request that may have landed is safe to send again at this moment."""
        if self.target_class is TargetClass.B:
            return True
        if self.target_class is not TargetClass.A or self.window is None or not first_write_at:
            return False
        if moment.wall + self.clock_error * 1000 < first_write_at:
            return False  # the clock was set back, and how much of the window is over nobody knows
        margin = self.call_deadline + self.session_timeout + self.clock_error
        return moment.wall + margin * 1000 <= first_write_at + self.window * 1000

    @property
    def longest_pause(self) -> float:
        """No event is put off for longer; one that seems to be was put off by a clock that was ahead."""
        return self.retry_longest + self.call_deadline + self.session_timeout + self.visible_after

    def choose_pause(self, tries: int) -> float:
        """Exponential pause before the next try of one event, without jitter (only this event waits for it)."""
        return float(min(self.retry_longest, self.retry_first * 2 ** min(tries, 20)))


def derive_policy(target: Target, settings: TargetSettings, transport: Transport, session_timeout: float) -> Policy:
    """The policy of an instance. Raises ``LookUpMissing``."""
    target_class = target.classify(settings)
    look_up = None if target.http is None else target.http.look_up
    if target_class is TargetClass.C and (look_up is None or not isinstance(transport, Finder)):
        raise LookUpMissing("it is of class C without a look-up.", place=f"targets.{settings.name}")
    return Policy(
        target_class=target_class,
        call_deadline=transport.call_deadline,
        session_timeout=session_timeout,
        window=target.window(settings),
        looks_up=look_up is not None,
        visible_after=0.0 if look_up is None else look_up.visible_after,
    )

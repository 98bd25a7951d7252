"""The promises at scale, and the rules left out on purpose: with each of those the judgement must not be clean."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any
from unittest import mock

from sinks import policy
from sinks.attempts import Flush, State, decode_entry
from sinks.calls import Calls
from sinks.contract import TargetClass
from sinks.ledger import Ledger
from sinks.policy import Policy, Step
from tests.delivery_faults.play import play, play_kill
from tests.delivery_faults.world import Faults

if TYPE_CHECKING:
    from tests.delivery_faults.world import World


def run_timeouts(target_class: TargetClass, timeouts: int, seed: int = 1) -> World:
    """At least so many answers lost after the target had applied the request, with kills and lost sessions between."""
    # A take-over reads everything that is open: in a longer run there is more of it, so it comes more rarely.
    scale = max(1.0, timeouts / 1000)
    faults = Faults(
        # Fewer than the gate takes for trouble: else it lets so few calls through that nothing is tried at once.
        timeout_after_success=0.19, timeout_unapplied=0.01, refused_for_now=0.02, down=0.01, stalled=0.001, aborts=0.01,
        kill_every=100.0 * scale, lose_session_every=150.0 * scale,
    )  # fmt: skip
    # Each event has its own entity: one that waits for a person holds nobody.
    events = int(timeouts / 0.17) + 50
    return play(target_class, events=events, entities=events, faults=faults, seed=seed)


def run_order(target_class: TargetClass, events: int, entities: int, seed: int = 1) -> World:
    """Many events of each entity under faults of every kind."""
    scale = max(1.0, events / 20_000)
    faults = Faults(
        timeout_after_success=0.004, timeout_unapplied=0.002, refused_for_now=0.02, down=0.01, stalled=0.0002,
        rejected=0.0 if target_class is not TargetClass.D else 0.0005, aborts=0.01,
        kill_every=40.0 * scale, lose_session_every=80.0 * scale,
    )  # fmt: skip
    return play(target_class, events=events, entities=entities, faults=faults, seed=seed)


OUTAGE = 600.0


def run_outage(target_class: TargetClass, events: int, seed: int = 1) -> World:
    """Nobody can connect for ten minutes."""
    return play(target_class, events=events, entities=events // 5, faults=Faults(down_until=OUTAGE), seed=seed)


def run_freeze(target_class: TargetClass, events: int, seed: int = 1) -> World:
    """Processes that stand still between the last look and the write, for longer than everything that is waited for."""
    return play(
        target_class, events=events, entities=events, faults=Faults(frozen=0.1, lose_session_every=60.0), seed=seed
    )


def run_blocked(target_class: TargetClass, done: int) -> World:
    """The first event is never answered; so many behind it are done; then kill -9."""
    return play_kill(
        target_class,
        events=done + 1,
        faults=Faults(blocked=frozenset({0})),
        ready=lambda world: world.told["posted"] == done,
    )


@dataclass(frozen=True)
class Control:
    """A rule left out: how, and where that must show."""

    name: str
    leave_out: Callable[[], contextlib.AbstractContextManager[object]]
    target_class: TargetClass
    seen_as: frozenset[str]
    faults: Faults = field(default_factory=lambda: Faults(timeout_after_success=0.1, kill_every=40.0))


def run_control(control: Control, events: int, seed: int = 1) -> World:
    """A world in which the rule matters, without the rule."""

    def is_seen(world: World) -> bool:
        judgement = world.judge()
        # What is missing may still come; the rest is final.
        return any(judgement[name] for name in control.seen_as - {"lost", "silent"})

    with control.leave_out():
        return play(
            control.target_class, events=events, entities=events // 4, faults=control.faults, seed=seed, seen=is_seen
        )


def _blind_resend() -> contextlib.AbstractContextManager[object]:
    return mock.patch.object(Policy, "choose_step", return_value=Step.RESEND)


@contextlib.contextmanager
def _resend_anything() -> Iterator[None]:
    with _blind_resend(), mock.patch.object(Policy, "may_resend", return_value=True):
        yield


def _patch_flush(change: Callable[[Ledger, Flush], Flush]) -> contextlib.AbstractContextManager[object]:
    original = Ledger.flush

    def flush(self: Ledger) -> Flush:
        return change(self, original(self))

    return mock.patch.object(Ledger, "flush", flush)


def _acknowledge_before_the_outcome(ledger: Ledger, flush: Flush) -> Flush:
    """The frontier moves over everything read, and what is in flight is forgotten."""
    records = [
        (event_id, None if value is None or decode_entry(value).state == State.IN_FLIGHT else value)
        for event_id, value in flush.records
    ]
    return Flush(records, flush.reports, ledger.position, flush.passed, flush.dirty)


def _tombstone_at_once(_ledger: Ledger, flush: Flush) -> Flush:
    records = [
        (event_id, None if value is None or decode_entry(value).state == State.DONE else value)
        for event_id, value in flush.records
    ]
    return Flush(records, flush.reports, flush.frontier, flush.passed, flush.dirty)


def _forget_the_waits(**members: Any) -> Policy:
    return Policy(**members | {"call_deadline": 0.0, "session_timeout": 0.0})


CONTROLS = (
    Control("blind resend", _resend_anything, TargetClass.C, frozenset({"doubled"})),
    Control(
        "acknowledged before the outcome",
        lambda: _patch_flush(_acknowledge_before_the_outcome),
        TargetClass.C,
        frozenset({"lost", "silent"}),
    ),
    Control("tombstone at once", lambda: _patch_flush(_tombstone_at_once), TargetClass.C, frozenset({"doubled"})),
    Control(
        "tombstone at once, with a key",
        lambda: _patch_flush(_tombstone_at_once),
        TargetClass.A,
        frozenset({"wrong_bytes", "final_twice"}),
    ),
    Control(
        "no lease check",
        lambda: mock.patch.object(Calls, "_check_lease", return_value=None),
        TargetClass.C,
        frozenset({"doubled"}),
        Faults(stalled=0.2, lose_session_every=30.0),
    ),
    Control(
        "look-up while a write is open",
        lambda: mock.patch.object(policy, "Policy", _forget_the_waits),
        TargetClass.C,
        frozenset({"doubled"}),
        # A write must be on its way when its process is killed: that is seen at every seed only when many are.
        Faults(timeout_after_success=0.1, kill_every=5.0),
    ),
)

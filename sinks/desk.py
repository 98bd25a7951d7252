"""A target's side of the desk: its ledger as people see it, and decisions as its deliverer reads them.

Everything is read from `attempts.<target>`; the deliverer need not run. What the ledger says is what its deliverer last
committed: an event that is IN_FLIGHT here may be answered already.
"""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

import msgspec

from schemas.events import Action, Decision
from schemas.failure import Failure, FatalError
from schemas.wire import Decoder, Encoder
from sinks.attempts import BEHIND_ENTITY, Entry, Ruling, State, decode_entry
from topics import catalog
from topics.reading import Record, read_to_end
from topics.transaction import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator, Sequence

    from topics.cluster import KafkaSettings

CLOCK_ERROR_SECONDS = 5.0
"""As far as the clocks of the desk and the deliverer may differ: the deliverer refuses what is nearer to the limit."""


class DecisionRefused(FatalError):
    """A decision about an event at a target is not possible."""

    code = "RS402"
    meaning = "The event at the target is not in a state in which this can be decided."
    default_remedy = "Look at it with `remitstream dlq show` or `remitstream unknown show`; nothing was changed."


@dataclass(frozen=True, slots=True)
class Open:
    """An unfinished event at a target."""

    target: str
    event_id: str
    partition: int
    entry: Entry

    @property
    def is_refused(self) -> bool:
        """Dead-lettered: the target surely does not have it."""
        return self.entry.state == State.REJECTED

    @property
    def is_unknown(self) -> bool:
        """A person must say whether the target has it."""
        return self.entry.state == State.UNKNOWN

    @property
    def is_put_off(self) -> bool:
        """Parked for a reason of its own (its patient is not resolved), and surely not at the target."""
        entry = self.entry
        return entry.state == State.PARKED and entry.code != BEHIND_ENTITY and not entry.may_have_landed

    def awaits(self, decision: Decision) -> bool:
        """Whether its deliverer has this decision still to take; one about an attempt that is over it never takes."""
        entry = self.entry
        named = (decision.event_id, decision.topic, decision.offset, decision.attempt, decision.round)
        return named == (self.event_id, entry.topic, entry.offset, entry.number, entry.round)

    def check(self, action: Action) -> None:
        """Raise ``DecisionRefused`` when the deliverer would refuse this decision now."""
        entry = self.entry
        if action in (Action.REDRIVE, Action.WAIVE):
            if self.is_unknown:
                raise DecisionRefused(
                    "its outcome is unknown: the target may have it.",
                    place=f"{self.target} {self.event_id}",
                    remedy="Look it up at the target, then use `remitstream unknown decide`.",
                )
            if not self.is_refused and not (action is Action.WAIVE and self.is_put_off):
                raise DecisionRefused(f"it is {entry.state}, not refused.", place=f"{self.target} {self.event_id}")
            return
        if not self.is_unknown:
            raise DecisionRefused(f"it is {entry.state}, not unknown.", place=f"{self.target} {self.event_id}")
        wait = (entry.decidable_at - _now()) / 1000 + CLOCK_ERROR_SECONDS
        if wait > 0:
            raise DecisionRefused(
                f"its last write may still land for {wait:.0f} s; what you saw at the target does not count yet.",
                place=f"{self.target} {self.event_id}",
                remedy="Wait that long, look at the target again, then decide.",
            )


class TargetBook:
    """The unfinished events of one target instance (of some partitions, where given), read once."""

    def __init__(self, kafka: KafkaSettings, target: str, partitions: Sequence[int] | None = None) -> None:
        self.target = target
        self._kafka = kafka
        self._decided: frozenset[str] | None = None
        self._events: dict[str, Open] = {}
        for item in read_to_end(kafka, catalog.name_attempts(target), partitions=partitions):
            if not isinstance(item, Record):
                continue
            event_id = (item.key or b"").decode()
            if item.value is None:
                self._events.pop(event_id, None)
                continue
            try:
                entry = decode_entry(item.value)
            except msgspec.MsgspecError:
                raise DecisionRefused(
                    "the ledger cannot be read by this version.", place=f"{item.topic}[{item.partition}]@{item.offset}"
                ) from None
            if entry.state == State.DONE:
                self._events.pop(event_id, None)
            else:
                self._events[event_id] = Open(target, event_id, item.partition, entry)

    def find(self, event_id: str) -> Open | None:
        """An unfinished event; None when it is finished here, or was never admitted."""
        return self._events.get(event_id)

    def list_decided(self, find_schema: Callable[[int], str]) -> frozenset[str]:
        """Events about which a decision is on its way to the deliverer; read once, after the events."""
        if self._decided is None:
            events = (
                (self.find(made.event_id), made) for made in read_decisions(self._kafka, self.target, find_schema)
            )
            self._decided = frozenset(
                found.event_id for found, made in events if found is not None and found.awaits(made)
            )
        return self._decided

    def list_unknown(self) -> list[Open]:
        """Events whose outcome a person must find out, oldest first."""
        return sorted((known for known in self._events.values() if known.is_unknown), key=lambda k: k.entry.since)

    def list_stopped(self) -> list[Open]:
        """Refused and put off events, oldest first: they hold up their entity."""
        found = (known for known in self._events.values() if known.is_refused or known.is_put_off)
        return sorted(found, key=lambda known: (known.partition, known.entry.offset))

    def count_behind(self, found: Open) -> int:
        """Later events of the same entity that wait behind it."""
        return sum(
            known.entry.entity == found.entry.entity and known.entry.code == BEHIND_ENTITY
            for known in self._events.values()
        )


def read_decisions(
    kafka: KafkaSettings, target: str, find_schema: Callable[[int], str], partitions: Sequence[int] | None = None
) -> Iterator[Decision]:
    """Every decision about events at a target, in the order in which its deliverer reads those of a partition."""
    decoder = Decoder("decision", Decision, find_schema)
    for item in read_to_end(kafka, catalog.name_decisions(target), partitions=partitions):
        if isinstance(item, Record):
            # One that cannot be read its deliverer cannot read either, and goes on without it.
            with contextlib.suppress(Failure):
                yield decoder.decode(item.value or b"")


OVERTAKEN = "OVERTAKEN"
"""Another decision was taken first, or the event went on by itself."""


def describe_ruling(found: Open | None, decision_id: str, asked: Open, decisions: Sequence[Decision] = ()) -> str:
    """What came of a decision about ``asked``: ``taken``, ``waiting``, or why it was refused.

    ``found`` is what the ledger tells now. It keeps nothing of an event that is finished, and only the last decision of
    one that goes on: there ``decisions``, as its deliverer reads them, tell whether this one counted.
    """
    if found is not None:
        entry = found.entry
        if entry.decision == decision_id:
            return "taken" if entry.ruling == Ruling.APPLIED else f"refused: {entry.ruling}"
        if (entry.number, entry.round) == (asked.entry.number, asked.entry.round):
            return "waiting"
        is_read = any(made.decision_id == decision_id for made in decisions)
        if not is_read or entry.round == asked.entry.round:
            return f"refused: {OVERTAKEN}"
    return "taken" if find_rival(decisions, decision_id, asked) is None else f"refused: {OVERTAKEN}"


def find_rival(decisions: Sequence[Decision], decision_id: str, asked: Open) -> Decision | None:
    """The decision of somebody else that counted in place of this one; None when this one was taken.

    Of the decisions of one round the first is used up, and the rest name a round that is over. A later round about the
    same attempt says that the deliverer had refused this one.
    """
    entry = asked.entry
    named = (asked.event_id, entry.topic, entry.offset, entry.number)
    about = [made for made in decisions if (made.event_id, made.topic, made.offset, made.attempt) == named]
    first = next((made for made in about if made.round == entry.round), None)
    others = [made for made in about if made.decision_id != decision_id and made.round >= entry.round]
    if first is not None and first.decision_id == decision_id:
        others = [made for made in others if made.round > entry.round]
    return others[-1] if others else None


def build_decision(
    found: Open,
    action: Action,
    decision_id: str,
    schema_id: int,
    *,
    reference: str = "",
    value: bytes | None = None,
) -> Output:
    """The record for `decisions.<target>`, in the partition whose owner has the event. ``schema_id`` is the topic's."""
    decision = Decision(
        decision_id=decision_id,
        target=found.target,
        event_id=found.event_id,
        topic=found.entry.topic,
        offset=found.entry.offset,
        attempt=found.entry.number,
        round=found.entry.round,
        action=action.value,
        reference=reference,
        value=value,
        decided_at=_now(),
    )
    return Output(
        catalog.name_decisions(found.target),
        found.event_id.encode(),
        Encoder("decision", schema_id).encode(decision),
        partition=found.partition,
    )


def _now() -> int:
    return time.time_ns() // 1_000_000

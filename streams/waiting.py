"""The waiting room of one partition: which records are on hold, in which order, and what would release them.

Memory holds ids, entities and identities only; the records themselves are in the partition's store. Release happens at
the head of the batch loop, in the same transaction as everything else.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Collection, Iterator

PATIENT_UNKNOWN = "PATIENT_UNKNOWN"
PARENT_UNKNOWN = "PARENT_UNKNOWN"
BEHIND_ENTITY = "BEHIND_ENTITY"


@dataclass(frozen=True, slots=True)
class Held:
    """One record on hold. ``since`` is milliseconds since the epoch."""

    hop: str
    entity: str
    reason: str
    awaited: str
    since: int

    @property
    def order(self) -> tuple[int, str]:
        """Arrival order inside the partition."""
        return int(self.hop.rsplit(":", 1)[1]), self.hop


@dataclass(slots=True)
class WaitingRoom:
    """Index of the records on hold in one partition."""

    _entities: dict[str, dict[str, Held]] = field(default_factory=dict)
    _awaited: dict[str, dict[str, set[str]]] = field(default_factory=dict)
    """Identity hash -> entity -> hops that wait for it."""
    _count: int = 0

    def __len__(self) -> int:
        return self._count

    def hold(self, held: Held) -> None:
        """Add a record, or change what it waits for."""
        self.release(held.entity, held.hop)
        self._entities.setdefault(held.entity, {})[held.hop] = held
        self._count += 1
        if held.reason == PATIENT_UNKNOWN:
            self._awaited.setdefault(held.awaited, {}).setdefault(held.entity, set()).add(held.hop)

    def release(self, entity: str, hop: str) -> None:
        """Forget a record."""
        waiting = self._entities.get(entity, {})
        held = waiting.pop(hop, None)
        if held is None:
            return
        self._count -= 1
        if not waiting:
            del self._entities[entity]
        if held.reason == PATIENT_UNKNOWN:
            entities = self._awaited[held.awaited]
            entities[entity].discard(hop)
            if not entities[entity]:
                del entities[entity]
            if not entities:
                del self._awaited[held.awaited]

    def get_entity(self, entity: str) -> dict[str, Held]:
        """Records of an entity on hold, by hop; not to be changed."""
        return self._entities.get(entity, {})

    def list_awaited(self) -> Collection[str]:
        """Identity hashes something waits for."""
        return self._awaited.keys()

    def list_entities(self, awaited: str) -> list[str]:
        """Entities that wait for an identity, in a stable order."""
        return sorted(self._awaited.get(awaited, {}))

    def list_expired(self, before_ms: int) -> list[Held]:
        """Records that wait for a parent since before a time."""
        return [held for held in self if held.reason == PARENT_UNKNOWN and held.since < before_ms]

    def find_oldest(self) -> int | None:
        """When the oldest record on hold came, in milliseconds; None when nothing waits."""
        return min((held.since for held in self), default=None)

    def __iter__(self) -> Iterator[Held]:
        for waiting in self._entities.values():
            yield from waiting.values()


@dataclass(slots=True)
class WaitingDraft:
    """A waiting room as it will be after the batch under decision; the room itself changes only after the commit."""

    room: WaitingRoom
    held: list[Held] = field(default_factory=list)
    released: list[Held] = field(default_factory=list)
    _touched: dict[str, dict[str, Held]] = field(default_factory=dict)

    def hold(self, held: Held) -> None:
        """Add a record, or change what it waits for."""
        self._touch(held.entity)[held.hop] = held
        self.held.append(held)

    def release(self, held: Held) -> None:
        """Forget a record."""
        self._touch(held.entity).pop(held.hop, None)
        self.released.append(held)

    @property
    def changes(self) -> int:
        """How many records were put on hold, or had their hold changed or ended."""
        return len(self.held) + len(self.released)

    @property
    def is_empty(self) -> bool:
        """Nothing is on hold, and nothing of this batch was or is: the ordinary case, told at no cost."""
        return not self._touched and not len(self.room)

    def list_entity(self, entity: str) -> list[Held]:
        """Records of an entity on hold, in order of arrival."""
        waiting = self._touched.get(entity)
        return sorted((self.room.get_entity(entity) if waiting is None else waiting).values(), key=lambda h: h.order)

    def apply(self) -> None:
        """Take the draft over into the room: after the commit."""
        for held in self.held:
            self.room.hold(held)
        for held in self.released:
            self.room.release(held.entity, held.hop)

    def _touch(self, entity: str) -> dict[str, Held]:
        if entity not in self._touched:
            self._touched[entity] = dict(self.room.get_entity(entity))
        return self._touched[entity]

"""What becomes of each raw record: the one decision per record, in order, for a whole batch.

A record ends in exactly one fate: canonical, suppressed, ignored, waiting, in review or dead-lettered. Nothing here
does I/O but two things per batch: one look-up of identities and reads of the partition's local store. Nothing changes
outside the returned decision; the caller commits it and only then applies it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from identity.resolution import Ambiguous, Known, Resolution
from schemas.events import Fate, MoneyEvent, Reference, WaitingEntry
from schemas.failure import Failure, FailureKind, OperatorError
from streams.decision import Clock, Codecs, Decision, Printer, Room, Writer, as_failure, guard
from streams.normalise import Ignored, Normalised, Normaliser
from streams.state import Draft, Lineage, PartitionState, SeenEntry
from streams.waiting import BEHIND_ENTITY, PARENT_UNKNOWN, PATIENT_UNKNOWN, Held, WaitingDraft
from topics import headers
from topics.headers import RawRecord, find_header

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from identity.projection import Identities
    from schemas.keys import HmacKey

RELEASE_CHUNK = 1000
"""Identities of the waiting room looked up at once."""

RELEASE_LIMIT = 1000
"""Records on hold decided again in one batch, or one entity's when it has more; the next batch goes on. A patient that
a hundred thousand wait for would make a transaction that never ends in its time, and is then tried again for ever."""

RELEASE_INTERVAL = 0.25
"""Seconds between two looks into the waiting room. When more identities than a chunk wait, each is asked for less and
less often, up to the cap."""

RELEASE_INTERVAL_CAP = 60.0

EXPIRY_INTERVAL = 5.0
"""Seconds between two searches for records whose parent never came."""

_Candidate = tuple[RawRecord, Normalised | Ignored | Failure]
"""A record of the batch after mapping: what it is, or why it is a dead letter."""


class MoneyDecider:
    """Decides batches of one payment gateway's raw topic."""

    def __init__(
        self,
        normaliser: Normaliser,
        *,
        identities: Identities,
        hmac_key: HmacKey,
        codecs: Codecs,
        parent_wait_seconds: float,
        clock: Clock | None = None,
    ) -> None:
        self.source = normaliser.source
        self._normaliser = normaliser
        self._identities = identities
        self._hmac_key = hmac_key
        self._codecs = codecs
        self._parent_wait_ms = int(parent_wait_seconds * 1000)
        self._clock = clock or Clock()
        self._printer = Printer(codecs)
        self._hashes: dict[Reference, str] = {}
        self._next_look: dict[str, tuple[float, float]] = {}
        self._last_look = float("-inf")
        self._last_expiry = float("-inf")

    async def decide(
        self, rooms: dict[int, Room], records: Sequence[RawRecord], refused: frozenset[str] = frozenset()
    ) -> Decision:
        """Decide every record of a batch, and release what can be released from the waiting rooms of ``rooms``.

        ``refused`` are hops whose outputs the broker did not take: they become dead letters. Raises ``TemporaryError``
        when identities cannot be looked up; nothing has changed then.
        """
        now_ms = self._clock.now_ms()
        writer = Writer(self._codecs, self._printer, self.source, now_ms)
        self._hashes.clear()
        drafts = {partition: Draft(room.state) for partition, room in rooms.items()}
        candidates = self._map_all(records, refused)
        for partition, taken in candidates.items():
            drafts[partition].fetch(*_list_keys(taken))
        due = self._list_due(rooms)
        expire = self._clock.monotonic() - self._last_expiry >= EXPIRY_INTERVAL
        found = await self._resolve(self._collect_hashes(candidates, drafts), due)
        held: list[WaitingDraft] = []
        left = RELEASE_LIMIT
        for partition, room in rooms.items():
            lane = _Lane(self, writer, drafts[partition], WaitingDraft(room.waiting), found, refused, now_ms)
            if expire:
                left = lane.expire(now_ms - self._parent_wait_ms, left)
            left = lane.release_known(due, left)
            for record, mapped in candidates.get(partition, ()):
                lane.decide(record, mapped)
            held.append(lane.room)
        if left <= 0:
            # The next batch looks again at once, at the same ones first.
            self._last_look = float("-inf")
            for name in due:
                self._next_look.pop(name, None)
        elif expire:
            self._last_expiry = self._clock.monotonic()
        decision = writer.finish()
        decision.rooms = held
        decision.drafts = list(drafts.values())
        return decision

    def read_waiting_entry(self, state: PartitionState, value: bytes) -> WaitingEntry:
        """A record on hold, as stored. Raises ``StateUnusable``, and removes the store, when it cannot be read."""
        try:
            entry: WaitingEntry = self._codecs.waiting_reader.decode(value)
        except Failure as failure:
            raise state.discard(f"an entry of `waiting` is not readable, {failure.code}") from None
        return entry

    def encode_waiting_entry(self, entry: WaitingEntry) -> bytes:
        """The stored form of a record on hold."""
        assert self._codecs.waiting is not None, "every gateway has a waiting room"
        return self._codecs.waiting.encode(entry)

    def rebuild(self, room: Room) -> None:
        """Fill the waiting room's index from the store."""
        for _, value in room.state.scan("waiting"):
            entry = self.read_waiting_entry(room.state, value)
            room.waiting.hold(Held(entry.hop, entry.entity, entry.reason, entry.awaited, entry.since))

    def hash_reference(self, reference: Reference) -> str:
        """Keyed hash of an identifier, made once in a batch."""
        known = self._hashes.get(reference)
        if known is None:
            known = self._hashes[reference] = self._hmac_key.hash_identifier(reference)
        return known

    def hash_facts(self, facts: Iterable[str]) -> bytes:
        """Digest of money facts."""
        return self._hmac_key.hash_facts(*facts)

    def remap(self, entry: WaitingEntry, refused: frozenset[str]) -> tuple[RawRecord, Normalised | Ignored | Failure]:
        """The record on hold and what it maps to now."""
        topic_id, partition, offset = entry.hop.rsplit(":", 2)
        del topic_id
        record = RawRecord(
            hop=entry.hop,
            partition=int(partition),
            offset=int(offset),
            key=entry.raw_key,
            value=entry.raw_value,
            headers=entry.raw_headers,
            timestamp=entry.since,
        )
        return record, self._map(record, refused)

    def _map_all(self, records: Sequence[RawRecord], refused: frozenset[str]) -> dict[int, list[_Candidate]]:
        """Every record of a batch by partition, mapped."""
        candidates: dict[int, list[_Candidate]] = {}
        for record in records:
            taken = candidates.get(record.partition)
            if taken is None:
                taken = candidates[record.partition] = []
            taken.append((record, self._map(record, refused)))
        return candidates

    def _map(self, record: RawRecord, refused: frozenset[str]) -> Normalised | Ignored | Failure:
        if refused and record.hop in refused:
            return Failure(FailureKind.INVALID, "REFUSED_BY_BROKER", "record")
        return guard(self._normaliser.normalise, record)

    def _list_due(self, rooms: dict[int, Room]) -> list[str]:
        now = self._clock.monotonic()
        if now - self._last_look < RELEASE_INTERVAL:
            return []
        self._last_look = now
        awaited = {awaited for room in rooms.values() for awaited in room.waiting.list_awaited()}
        for gone in set(self._next_look) - awaited:
            del self._next_look[gone]
        if len(awaited) <= RELEASE_CHUNK:
            return sorted(awaited)
        due = sorted(name for name in awaited if self._next_look.get(name, (now, 0.0))[0] <= now)[:RELEASE_CHUNK]
        for name in due:
            wait = self._next_look.get(name, (now, RELEASE_INTERVAL))[1]
            self._next_look[name] = (now + wait, min(wait * 2, RELEASE_INTERVAL_CAP))
        return due

    def _collect_hashes(self, candidates: dict[int, list[_Candidate]], drafts: dict[int, Draft]) -> set[str]:
        """Keyed hashes of the identifiers this batch may need: of roots as named, of children as their root did."""
        roots: dict[str, Reference | None] = {}
        hashes = set()
        for partition, taken in candidates.items():
            for record, mapped in taken:
                if not isinstance(mapped, Normalised) or not mapped.needs_patient:
                    continue
                if named := _find_named(record):
                    hashes.add(named)
                reference, root = mapped.event.patient, mapped.event.root
                if mapped.is_root:
                    roots[root] = reference
                elif reference is None:
                    if root in roots:
                        reference = roots[root]
                    else:
                        lineage = drafts[partition].read_lineage(root)
                        reference = _as_reference(lineage.patient) if lineage is not None else None
                if reference is not None:
                    hashes.add(self.hash_reference(reference))
        return hashes

    async def _resolve(self, hashes: set[str], due: Sequence[str]) -> dict[str, Resolution]:
        wanted = list(hashes.union(due))
        if not wanted:
            return {}
        return dict(zip(wanted, await self._identities.resolve_hashes(wanted), strict=True))


class _Lane:
    """Decides the records of one partition of a batch, in order."""

    def __init__(
        self,
        decider: MoneyDecider,
        writer: Writer,
        draft: Draft,
        room: WaitingDraft,
        found: dict[str, Resolution],
        refused: frozenset[str],
        now_ms: int,
    ) -> None:
        self.room = room
        self._decider = decider
        self._writer = writer
        self._draft = draft
        self._found = found
        self._refused = refused
        self._now_ms = now_ms

    def expire(self, before_ms: int, left: int) -> int:
        """End the hold of up to ``left`` records whose parent never came: a person decides. Return how many are left.

        In order of arrival.
        """
        for held in sorted(self.room.room.list_expired(before_ms), key=lambda held: held.order):
            if left <= 0:
                break
            # A parent that came and waits for its patient releases its children itself.
            if self._draft.read_lineage(held.entity) is None:
                self._release(held, expired=True)
                left -= 1
        return left

    def release_known(self, due: Sequence[str], left: int) -> int:
        """Release, in order, entities whose awaited identity is decided now, while ``left`` records may be.

        Return how many are left; an entity is released in one piece.
        """
        for awaited in due:
            if isinstance(self._found.get(awaited), (Known, Ambiguous)):
                for entity in self.room.room.list_entities(awaited):
                    if left <= 0:
                        return left
                    before = self.room.changes
                    self._release_entity(entity)
                    left -= self.room.changes - before
        return left

    def decide(self, record: RawRecord, mapped: Normalised | Ignored | Failure) -> None:
        """Decide one new record."""
        self._draft.cause = record.hop
        if isinstance(mapped, Failure):
            self._writer.dead_letter(record, mapped, "normalise")
            return
        if isinstance(mapped, Ignored):
            self._writer.dispose(record, Fate.IGNORED, mapped.reason, mapped.event_type, mapped.linked)
            return
        event = mapped.event
        digest = self._decider.hash_facts(mapped.facts)
        seen = self._draft.read_seen(event.transaction_key)
        others = _leave_out_reviewed(seen, record, digest)
        if seen and others is seen:
            for entry in seen:
                if entry.digest == digest:
                    self._writer.dispose(record, Fate.SUPPRESSED, "DUPLICATE", event.kind, entry.hop)
                    return
            self._writer.review(record, event, "CONFLICTING_COPY", digest.hex())
            self._draft.write_seen(event.transaction_key, [*seen, SeenEntry(digest, record.hop)])
            return
        try:
            ended = self._settle(record, mapped, held=None)
        except OperatorError:
            raise
        except Exception as error:  # noqa: BLE001 - as in guard: encoding is part of what a record may fail at
            self._writer.dead_letter(record, as_failure(error), "normalise")
            return
        self._draft.write_seen(event.transaction_key, [*others, SeenEntry(digest, record.hop)])
        if mapped.is_root and ended and not self.room.is_empty:
            self._release_entity(event.root)

    def _settle(self, record: RawRecord, mapped: Normalised, held: Held | None) -> bool:
        """Publish, hold or ask about one record whose key is free. Return whether its way ended here.

        Raises before anything was written when the event cannot be encoded.
        """
        ended = self._place(record, mapped, held)
        if mapped.needs_patient and mapped.is_root:
            self._draft.write_lineage(mapped.event.root, _describe_root(mapped.event))
        return ended

    def _place(self, record: RawRecord, mapped: Normalised, held: Held | None) -> bool:
        event = mapped.event
        if not mapped.needs_patient:
            self._writer.publish(record, mapped)
            return True
        if not mapped.is_root:
            if not self._inherit(event):
                return self._hold(record, event, PARENT_UNKNOWN, event.root, held)
            if held is None and not self.room.is_empty and self.room.list_entity(event.root):
                return self._hold(record, event, BEHIND_ENTITY, event.root, held)
        awaited = named = _find_named(record)
        if not named:
            if event.patient is None:
                self._writer.review(record, event, "PATIENT_NOT_NAMED")
                return True
            awaited = self._decider.hash_reference(event.patient)
        resolution = self._found.get(awaited)
        if isinstance(resolution, Known):
            event.mrn = resolution.mrn
            if named:
                # Only the keyed hash of what the person named travels; the MRN it stands for is the reference.
                event.patient = resolution.mrn
            self._writer.publish(record, mapped)
            return True
        if isinstance(resolution, Ambiguous):
            self._writer.review(record, event, resolution.reason)
            return True
        return self._hold(record, event, PATIENT_UNKNOWN, awaited, held)

    def _inherit(self, event: MoneyEvent) -> bool:
        """Give a child what its root said; False when the root is not known yet."""
        lineage = self._draft.read_lineage(event.root)
        if lineage is None:
            return False
        event.patient = event.patient or _as_reference(lineage.patient)
        event.guarantor_account = event.guarantor_account or _as_reference(lineage.guarantor_account)
        event.visit = event.visit or _as_reference(lineage.visit)
        event.claim = event.claim or lineage.claim
        event.invoice = event.invoice or lineage.invoice
        return True

    def _hold(self, record: RawRecord, event: MoneyEvent, reason: str, awaited: str, held: Held | None) -> bool:
        if held is not None and (held.reason, held.awaited) == (reason, awaited):
            return False
        since = held.since if held is not None else self._now_ms
        entry = WaitingEntry(
            hop=record.hop,
            entity=event.root,
            reason=reason,
            awaited=awaited,
            event_id=event.event_id,
            transaction_key=event.transaction_key,
            since=since,
            raw_key=record.key,
            raw_value=record.value,
            raw_headers=record.headers,
        )
        self._draft.write_waiting(record.hop, self._decider.encode_waiting_entry(entry))
        self.room.hold(Held(record.hop, event.root, reason, awaited, since))
        if held is None:
            self._writer.wait(reason)
        return False

    def _release_entity(self, entity: str) -> None:
        """Release an entity's records in order, its root first, until one must wait on."""
        waiting = self.room.list_entity(entity)
        roots = [held for held in waiting if held.reason == PATIENT_UNKNOWN and self._is_root(held)]
        for held in [*roots, *(held for held in waiting if held not in roots)]:
            if not self._release(held):
                return

    def _is_root(self, held: Held) -> bool:
        lineage = self._draft.read_lineage(held.entity)
        value = self._draft.read_waiting(held.hop)
        if lineage is None or value is None:
            return False
        return self._decider.read_waiting_entry(self._draft.state, value).event_id == lineage.event_id

    def _release(self, held: Held, *, expired: bool = False) -> bool:
        """Decide a record on hold again; True when its hold ended (with an event, a review or a dead letter)."""
        self._draft.cause = held.hop
        value = self._draft.read_waiting(held.hop)
        if value is None:
            return True
        entry = self._decider.read_waiting_entry(self._draft.state, value)
        record, mapped = self._decider.remap(entry, self._refused)
        if isinstance(mapped, Ignored):
            # The mapping changed and no longer takes it for money: that is a fault of the mapping, not of the record.
            mapped = Failure(FailureKind.UNMAPPED, "NO_LONGER_MAPPED", mapped.reason)
        if isinstance(mapped, Failure):
            self._end_as_dead_letter(held, entry, record, mapped)
            return True
        try:
            if expired:
                self._writer.review(record, mapped.event, "PARENT_NEVER_CAME")
            elif not self._settle(record, mapped, held):
                return False
        except OperatorError:
            raise
        except Exception as error:  # noqa: BLE001 - as in guard
            self._end_as_dead_letter(held, entry, record, as_failure(error))
            return True
        self._end(held)
        return True

    def _end_as_dead_letter(self, held: Held, entry: WaitingEntry, record: RawRecord, failure: Failure) -> None:
        self._writer.dead_letter(record, failure, "release")
        seen = self._draft.read_seen(entry.transaction_key)
        others = [copy for copy in seen if copy.hop != entry.hop]
        if len(others) < len(seen):
            # Void, in the same transaction: a good copy or a redrive must pass. Copies in review stay known.
            self._draft.write_seen(entry.transaction_key, others)
        self._end(held)

    def _end(self, held: Held) -> None:
        self._draft.write_waiting(held.hop, None)
        self.room.release(held)


def _as_reference(parts: tuple[str, str, str] | None) -> Reference | None:
    return None if parts is None else Reference(*parts)


def _as_parts(reference: Reference | None) -> tuple[str, str, str] | None:
    return None if reference is None else (reference.authority, reference.id_type, reference.value)


def _describe_root(event: MoneyEvent) -> Lineage:
    return Lineage(
        event_id=event.event_id,
        patient=_as_parts(event.patient),
        guarantor_account=_as_parts(event.guarantor_account),
        visit=_as_parts(event.visit),
        claim=event.claim,
        invoice=event.invoice,
    )


def _leave_out_reviewed(seen: list[SeenEntry], record: RawRecord, digest: bytes) -> list[SeenEntry]:
    """Seen copies without the one that went to review and whose place this record takes, by a person's decision.

    The same list when there is none such: the record is a copy like any other.
    """
    if not seen or not _is_reviewed(record):
        return seen
    reviewed = find_header(record.headers, headers.REVIEWED_HOP)
    others = [entry for entry in seen if (entry.hop, entry.digest) != (reviewed, digest)]
    return others if len(others) < len(seen) else seen


def _is_reviewed(record: RawRecord) -> bool:
    """Whether a person sent this record in the place of one in review: the header is then the last, so told at once."""
    return bool(record.headers) and record.headers[-1][0] == headers.REVIEWED_HOP


def _find_named(record: RawRecord) -> str:
    """Keyed hash of the identifier that a person named for this record; empty for all but a few."""
    if not _is_reviewed(record):
        return ""
    return find_header(record.headers, headers.NAMED_PATIENT) or ""


def _list_keys(candidates: Iterable[_Candidate]) -> tuple[list[str], list[str]]:
    """Keys of the facts of a partition's records, and the roots of those that are children."""
    facts, roots = [], []
    for _, mapped in candidates:
        if isinstance(mapped, Normalised):
            facts.append(mapped.event.transaction_key)
            if mapped.needs_patient and not mapped.is_root:
                roots.append(mapped.event.root)
    return facts, roots

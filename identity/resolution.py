"""How an identifier becomes a medical record number, or does not. Pure: no I/O, no clock.

An identifier is known by its keyed hash (``schemas.keys``), which covers the assigning authority and the type: the same
MRN text under two authorities is two patients. Each identifier has at most one ``Entry``, its full state. From an
identifier we walk:

* no entry                      -> ``Unknown``: hold the event; an admission message may bring it.
* merged into another           -> on to that identifier; chains are followed to their end.
* merged into one without entry -> ``Unknown``: the survivor is not here yet; the retired number is never used instead.
* inactive                      -> ``Ambiguous("PATIENT_INACTIVE")``.
* active, MRN null              -> ``Ambiguous("MRN_AMBIGUOUS")``: the sender named several, or none.
* active, MRN is this identifier -> ``Known``.
* active, MRN is another one (a visit or account number of that patient) -> on to that MRN, because it may have been
  merged since. An MRN without an entry of its own was never merged: ``Known``.
* a circle                      -> ``Ambiguous("MERGE_CYCLE")``; more than 16 steps -> ``Ambiguous("MERGE_TOO_DEEP")``.
* merged without a survivor, active with one, or a status we do not know -> ``Ambiguous("RECORD_CONTRADICTORY")``.

``Ambiguous`` is for a person: no event is posted for it. An unmerge is a new full state (active, no survivor), so it
needs no rule of its own.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import msgspec

from schemas.events import PatientRecord, Reference

if TYPE_CHECKING:
    from schemas.keys import HmacKey

MAX_STEPS = 16
"""Longest chain followed. Real chains have one or two steps; a longer one is a loop of mistakes for a person."""

ACTIVE = "active"
MERGED = "merged"
INACTIVE = "inactive"


class Known(msgspec.Struct, frozen=True):
    """The patient, by medical record number, after all merges."""

    mrn: Reference


class Unknown(msgspec.Struct, frozen=True):
    """No such identifier yet. ``missing`` is the keyed hash of the one without entry (the survivor, after a merge)."""

    missing: str


class Ambiguous(msgspec.Struct, frozen=True):
    """A person must decide. ``reason`` is one of the codes above; it holds no identifier."""

    reason: str


Resolution = Known | Unknown | Ambiguous


class Entry(msgspec.Struct, frozen=True, array_like=True):
    """State of one identifier as the projection keeps it. ``epoch`` names the build of the projection it belongs to."""

    epoch: str
    status: str
    mrn: Reference | None
    mrn_hash: str | None
    """Keyed hash of ``mrn``: lets a reader follow it without the key."""
    merged_into: str | None
    """Keyed hash of the surviving identifier."""


def build_entry(record: PatientRecord, key: HmacKey, epoch: str) -> Entry:
    """The entry of a record of `patients`."""
    return Entry(
        epoch=epoch,
        status=record.status,
        mrn=record.mrn,
        mrn_hash=key.hash_identifier(record.mrn) if record.mrn is not None else None,
        merged_into=key.hash_identifier(record.merged_into) if record.merged_into is not None else None,
    )


def is_own_number(entry: Entry, key_hash: str) -> bool:
    """Whether an identifier is itself its patient's medical record number, neither merged nor retired."""
    return entry.mrn_hash == key_hash and entry.status == ACTIVE and entry.merged_into is None


class Walk:
    """The way from one identifier to its patient.

    Fetch ``wanted``, give what was found to ``step``, until ``result`` is set. The caller fetches, so that the walks of
    a whole batch share their round trips.
    """

    __slots__ = ("_mrn", "_visited", "begin", "result", "wanted")

    def __init__(self, key_hash: str) -> None:
        self.begin = key_hash
        self.wanted = key_hash
        self.result: Resolution | None = None
        self._visited = {key_hash}
        self._mrn: Reference | None = None  # set while we look whether this MRN was merged away

    def step(self, entry: Entry | None) -> None:
        """Take the entry of ``wanted`` (None when there is none) and go on, or set ``result``."""
        if entry is None:
            self.result = Unknown(self.wanted) if self._mrn is None else Known(self._mrn)
        elif entry.status == MERGED and entry.merged_into is not None:
            self._go_on(entry.merged_into, None)
        elif entry.status == INACTIVE:
            self.result = Ambiguous("PATIENT_INACTIVE")
        elif entry.status != ACTIVE or entry.merged_into is not None:
            self.result = Ambiguous("RECORD_CONTRADICTORY")
        elif entry.mrn is None or entry.mrn_hash is None:
            self.result = Ambiguous("MRN_AMBIGUOUS")
        elif is_own_number(entry, self.wanted):
            self.result = Known(entry.mrn)
        else:
            self._go_on(entry.mrn_hash, entry.mrn)

    def take_result(self) -> Resolution:
        """What the walk came to. Only after ``result`` was set."""
        assert self.result is not None, "the caller steps until then"
        return self.result

    def _go_on(self, key_hash: str, mrn: Reference | None) -> None:
        if key_hash in self._visited:
            self.result = Ambiguous("MERGE_CYCLE")
        elif len(self._visited) > MAX_STEPS:
            self.result = Ambiguous("MERGE_TOO_DEEP")
        else:
            self._visited.add(key_hash)
            self._mrn = mrn
            self.wanted = key_hash

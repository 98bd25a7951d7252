"""What normalising gives, and the participants it knows: accounts with their facilities."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import msgspec

from schemas.events import MoneyEvent

if TYPE_CHECKING:
    from schemas.mapping import Attribute
    from schemas.tenancy import Account, Facility

VISIT_TYPE: Final = "VN"
GUARANTOR_TYPE: Final = "AN"
"""HL7 table 0203: visit number, account number."""


class Normalised(msgspec.Struct, gc=False):
    """A canonical event and what the batch loop needs beside it.

    ``facts`` are the money facts for the digest, in a fixed order, without PHI. ``is_root`` says the event begins its
    lineage. ``needs_patient`` is false for settlements; ``patient_named`` says the event itself names the patient (a
    child need not: its lineage does).
    """

    topic: str
    event: MoneyEvent
    facts: tuple[str, ...]
    is_root: bool
    needs_patient: bool
    patient_named: bool
    event_type: str


class Ignored(msgspec.Struct, frozen=True, gc=False):
    """A record that is no money fact of its own.

    ``reason`` is EVIDENCE (sister of an authoritative event), NOT_MONEY or UNKNOWN_TYPE. ``linked`` is the event id of
    the fact it is evidence of, empty when the record does not name one.
    """

    reason: str
    event_type: str
    linked: str


@dataclass(frozen=True, slots=True)
class Participant:
    """An account with its facility and that facility's own attributes."""

    account: Account
    facility: Facility
    attributes: tuple[Attribute, ...]
    public: tuple[Attribute, ...]
    """Those of the attributes that are not PHI: all that a settlement may carry."""

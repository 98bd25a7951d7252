"""What traffic to make (inputs), and traffic as it was made: phases of items with the expected result."""

from __future__ import annotations

from dataclasses import dataclass, field
from enum import StrEnum
from typing import TYPE_CHECKING

from sandbox.transactions import REJECT_MARKER

if TYPE_CHECKING:
    from sandbox.expected import Expected

FEWEST_EVENTS = 200
"""Below this a plan cannot hold one of everything."""


@dataclass(frozen=True, slots=True, kw_only=True)
class FacilityPlan:
    """One facility: its account at the gateway, its HL7 feed, and how its target posts money that goes back."""

    id: str
    account: str
    webhook_secret: str = field(repr=False)
    sending_application: str
    sending_facility: str
    assigning_authority: str
    authority_aliases: tuple[str, ...] = ()
    """Other names of the authority, used now and then in metadata and PID-3.4."""
    mrn_key: str = "mrn"
    authority_key: str = "assigning_authority"
    currencies: tuple[str, ...] = ("USD",)
    """The first one is the usual one."""
    target: str = ""
    """Name of the target instance; empty means ``epic-<id>``."""
    payment_type: str = "PY"
    refund_type: str = "PY"
    """FT1-6 of refunds and chargebacks at this facility's target."""
    refund_sign: int = -1
    """Sign of FT1-11 for refunds and chargebacks."""

    @property
    def target_name(self) -> str:
        """Name of the facility's target instance."""
        return self.target or f"epic-{self.id}"


@dataclass(frozen=True, slots=True, kw_only=True)
class TrafficPlan:
    """What to generate. Equal plans give equal bytes, apart from the signatures made at sending.

    ``events`` is about how many webhook deliveries and ADT messages there are together. ``seed`` decides every id and
    every MRN: a system that keeps its data needs another seed for each run. ``webhook_url`` holds ``{account}``.
    ``start`` is the time of the first event in seconds since the epoch.
    """

    facilities: tuple[FacilityPlan, ...]
    events: int
    seed: int
    webhook_url: str
    mllp_host: str
    mllp_port: int
    start: int = 1_767_225_600
    reject_marker: str = REJECT_MARKER

    def __post_init__(self) -> None:
        if self.events < FEWEST_EVENTS:
            raise ValueError(f"a traffic plan needs at least {FEWEST_EVENTS} events")
        if not self.facilities or len({facility.id for facility in self.facilities}) != len(self.facilities):
            raise ValueError("a traffic plan needs facilities with different ids")
        if "{account}" not in self.webhook_url:
            raise ValueError("webhook_url must hold {account}")


class Channel(StrEnum):
    """How an item travels."""

    WEBHOOK = "webhook"
    ADMISSION = "admission"


class Fate(StrEnum):
    """What must become of an item's raw record (names of the conservation equation)."""

    CANONICAL = "canonical"
    SUPPRESSED = "suppressed"
    IGNORED = "ignored"
    PATIENT_UPDATE = "patient_update"
    DEAD_LETTERED = "dead_lettered"


@dataclass(frozen=True, slots=True)
class Item:
    """One delivery. ``identity`` is the event id or MSH-10, ``after`` the number of an item to be accepted first."""

    number: int
    channel: Channel
    facility: str
    kind: str
    """Event type (``charge.succeeded``) or trigger (``A04``)."""
    identity: str
    fate: Fate
    after: int | None
    body: bytes = field(repr=False)


@dataclass(frozen=True, slots=True)
class Phase:
    """Items that may travel together, in order of their start."""

    name: str
    items: tuple[Item, ...]


@dataclass(frozen=True, slots=True)
class Traffic:
    """A plan made concrete, with what must come of it. Between phases everything must have settled, postings too."""

    plan: TrafficPlan
    phases: tuple[Phase, ...]
    expected: Expected

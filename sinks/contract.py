"""What a target connector declares. One file per target: a head and pure functions.

A target is a connector; an *instance* of it (a hospital's interface, a realm) comes from the configuration and has its
own consumer group, ledger, limits and quarantine. Pure means: no I/O, no clock, no logging, no randomness. The frozen
request holds everything that must be equal over all attempts (timestamps and idempotency keys included).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any

from pydantic import BaseModel, ConfigDict, Field

from schemas.events import MoneyEvent, Reference
from schemas.failure import FailureKind
from schemas.tenancy import Facility, Name


class TargetClass(StrEnum):
    """What may be done when a write's outcome is unknown (a timeout after the request left)."""

    A = "A"
    """Idempotency key: resend the same bytes with the same key, inside its window."""
    B = "B"
    """Upsert or conditional create: resend."""
    C = "C"
    """Look up by our reference; post only if absent."""
    D = "D"
    """Nothing: stop the entity, a person decides."""


class TargetSettings(BaseModel):
    """Settings every target instance has; connectors add their own. Unknown keys are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    name: Name = Field(description="Name of the instance; its consumer group and topics are named after it.")
    connector: Name = Field(description="The target connector, for example `epic_dft`.")
    facilities: tuple[Name, ...] = Field(min_length=1, description="Facilities whose events this instance posts.")


@dataclass(frozen=True, slots=True)
class Request:
    """A frozen request: in the ledger before the call, sent unchanged at every attempt. Its repr hides the body."""

    body: bytes = field(repr=False)
    control_id: str
    """Idempotency key, or MSH-10."""
    reference: str
    """Our short reference at the target (kept map to the event id)."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a target said about one request. ``kind`` None means done."""

    kind: FailureKind | None
    code: str
    reference: str = ""
    """The target's own reference of the posting."""


@dataclass(frozen=True, slots=True)
class PostingContext:
    """What a request may be made of, beside the event: read at freezing time, then frozen."""

    facility: Facility
    mrn: Reference = field(repr=False)
    """The survivor of all merges known when the request is frozen."""
    frozen_at: int
    """Milliseconds since the epoch."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """Head of a target connector: its module in ``sinks/targets/`` holds one as ``TARGET``."""

    name: str
    display_name: str
    status: str
    documentation: str
    transport: str
    """``mllp`` or ``http``."""
    settings: type[TargetSettings]
    classify: Callable[[Any], TargetClass]
    """The class of an instance, from its settings (a site decides whether its receiver dedupes)."""
    routes: Callable[[MoneyEvent, Any], bool]
    """Whether this event is posted at this instance at all; False gives ``not_routed``."""
    freeze: Callable[[MoneyEvent, PostingContext, Any], Request]
    """Build the request. Raises ``Failure`` UNMAPPED or INVALID when the event cannot become one."""
    verdict: Callable[[bytes, Request, Any], Answer]
    """Read the target's answer to a request."""
    capabilities: Mapping[str, str]
    """Generated docs table; each claim is proved by a fixture."""
    accepts_phi: bool = True
    window: Callable[[Any], float | None] = lambda _settings: None
    """Class A: for how many seconds the target remembers an idempotency key, from an instance's settings; None: nobody
    knows, and then nothing is resent."""

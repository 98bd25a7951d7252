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

from clients.auth import (
    FixedCredential,
    TokenRecipe,
    make_recipe,
    read_grant,
    use_api_key,
    use_basic,
    use_bearer,
    use_nothing,
)
from clients.http import HttpRequest, HttpResponse
from clients.limits import Rate
from clients.verdict import Verdict, pick_record, speaks_of_record
from schemas.events import MoneyEvent, Reference
from schemas.failure import FailureKind
from schemas.tenancy import Facility, Name

__all__ = [
    "Absent",
    "Answer",
    "Completion",
    "Finding",
    "FixedCredential",
    "Found",
    "HttpHead",
    "HttpRequest",
    "HttpResponse",
    "LookUp",
    "NextPage",
    "PostingContext",
    "Rate",
    "Request",
    "Target",
    "TargetClass",
    "TargetSettings",
    "TokenRecipe",
    "Unclear",
    "Verdict",
    "make_recipe",
    "pick_record",
    "read_grant",
    "speaks_of_record",
    "use_api_key",
    "use_basic",
    "use_bearer",
    "use_nothing",
]


class TargetClass(StrEnum):
    """What may be done when a write's outcome is unknown (a timeout after the request left)."""

    A = "A"
    """Idempotency key: resend the same bytes with the same key, inside its window."""
    B = "B"
    """Upsert or conditional create: resend."""
    C = "C"
    """Look up by our reference (``HttpHead.look_up``); post only if absent."""
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
    """A frozen request: in the ledger before the call, sent unchanged at every attempt.

    Its repr hides the body, URL and headers. Over HTTP only the authorisation is added at each attempt.
    """

    body: bytes = field(repr=False)
    control_id: str
    """Idempotency key, or MSH-10."""
    reference: str
    """Our short reference at the target (kept map to the event id)."""
    method: str = ""
    """HTTP only, as are ``url`` and ``headers``."""
    url: str = field(default="", repr=False)
    """Whole: an instance that is later pointed elsewhere must not send old requests there."""
    headers: tuple[tuple[str, str], ...] = field(default=(), repr=False)
    """Without authorisation."""


@dataclass(frozen=True, slots=True)
class Answer:
    """What a target said about one request. ``kind`` None means done."""

    kind: FailureKind | None
    code: str
    reference: str = ""
    """The target's own reference of the posting."""
    retry_after: float = 0.0
    """Seconds for which the target asked to be left alone."""
    is_outage: bool = False
    """With UNAVAILABLE: about the target as a whole (503), not about this event (its account is locked just now)."""


@dataclass(frozen=True, slots=True)
class Found:
    """The look-up saw our posting. ``reference`` is the target's own."""

    reference: str = field(repr=False)


@dataclass(frozen=True, slots=True)
class Absent:
    """The look-up saw everything it had to see, and our posting is not there: it is posted."""


@dataclass(frozen=True, slots=True)
class NextPage:
    """Not decided by this answer: ask this next."""

    request: Request


@dataclass(frozen=True, slots=True)
class Unclear:
    """The answer does not decide it (two postings with our reference, a list cut short). Asked again later."""

    code: str


Finding = Found | Absent | Unclear
"""What a look-up came to."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LookUp:
    """How a target without idempotency key is asked whether a request that may have landed is there. Pure.

    It is asked only when no earlier write of the event can still land, and the event is posted only after ``Absent``.
    So ``Absent`` needs proof: a whole list, or a search by our reference that this target is known to answer
    truthfully. In doubt ``Unclear``.
    """

    ask: Callable[[Request, int, Any], Request]
    """The look-up for a frozen request, given the wall time (milliseconds since the epoch) before which nothing of it
    was written, and the instance's settings. It changes nothing at the target."""
    read: Callable[[HttpResponse, Request, Request, Any], Found | Absent | NextPage | Unclear | None]
    """Read an answer, given the look-up, the frozen request and the settings; None leaves it to the table of statuses,
    where 2xx is no answer to the question (``Unclear``). What it raises is ``Unclear``."""
    visible_after: float = 0.0
    """Seconds after which the target shows what it has taken: a list that lags behind must not say ``Absent``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """What a request cannot know when it is frozen: the id that the target gave to the parent's posting. Pure.

    Read from the target before each write of a request that needs it. The URL is all that may differ from what was
    frozen: body, key and reference stay.
    """

    ask: Callable[[Request, Any], Request | None]
    """The question, which changes nothing at the target; None when the request is whole as it was frozen."""
    read: Callable[[HttpResponse, Request, Request, Any], str | Verdict | NextPage | None]
    """Read an answer, given the question, the frozen request and the settings: the whole URL to write to, what to ask
    next, or why nothing is written: UNAVAILABLE (not there yet) or REJECTED. None leaves it to the table of statuses,
    where 2xx is UNAVAILABLE. What it raises is UNAVAILABLE."""


@dataclass(frozen=True, slots=True)
class PostingContext:
    """What a request may be made of, beside the event: read at freezing time, then frozen."""

    facility: Facility
    mrn: Reference = field(repr=False)
    """The survivor of all merges known when the request is frozen."""
    frozen_at: int
    """Milliseconds since the epoch."""
    generation: int = 0
    """Higher for each request that a person's redrive leads to, after one that was surely refused."""

    def mark_key(self, seed: str) -> str:
        """The seed of an idempotency key, changed by a redrive.

        A target may answer an old key with the refusal it gave then, or acknowledge (MSH-10) without filing. References
        and the keys of an upsert stay the same, so they do not go through this.
        """
        return f"{seed}|{self.generation}" if self.generation else seed


@dataclass(frozen=True, slots=True, kw_only=True)
class HttpHead:
    """What the HTTP transport must know of a target. Calls go to these hosts and nowhere else.

    Where the vendor has no common host (a server of the site's own, a region) the settings override
    ``choose_base`` and ``choose_token_url``.
    """

    sandbox: str
    """Base URL of the vendor's test system, without a slash at the end; empty when each site has its own."""
    production: str
    credential: Callable[[Any, str], FixedCredential | TokenRecipe]
    """How calls are authorised, from the settings and the URL of the token endpoint: fixed headers, or the recipe for
    a token. ``sinks.transport`` has the usual ones (``use_refresh_token``, ``use_client_credentials``)."""
    token_url: str = ""
    """Token endpoint, where there is one."""
    scheme: str = "Bearer"
    """The word before the token in the authorisation header."""
    rates: tuple[Rate, ...]
    """The vendor's limits per credential."""
    examine: Callable[[HttpResponse, Request, Any], Verdict | None]
    """Read an answer to a request, given the instance's settings; None leaves it to the table of statuses. What it
    raises at 2xx is AMBIGUOUS."""
    overlay: Mapping[int, FailureKind | None] = field(default_factory=dict)
    """Statuses that mean something else here than in the table."""
    completion: Completion | None = None
    """For requests that lack an id when they are frozen."""
    regions: tuple[str, ...] = ()
    """Further origins that the settings may choose (data centres), for the list of hosts that are called."""
    look_up: LookUp | None = None
    """Needed at class C. A class A target that has one is asked when its key's window is over."""


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
    verdict: Callable[[bytes, Request, Any], Answer] | None = None
    """Read the target's answer to a request (``mllp``)."""
    http: HttpHead | None = None
    """Needed with ``http``."""
    capabilities: Mapping[str, str]
    """Generated docs table; each claim is proved by a fixture."""
    accepts_phi: bool = True
    window: Callable[[Any], float | None] = lambda _settings: None
    """Class A: for how many seconds the target remembers an idempotency key, from an instance's settings; None: nobody
    knows, and then nothing is resent."""

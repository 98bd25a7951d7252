"""What source mapping files and overlays hold: their members, as pydantic models.

A source mapping declares what one gateway's raw events mean; an overlay declares one facility's own attributes.
``schemas.mapping_reading`` compiles and runs them; docs/mappings.md shows them by example.
"""

from __future__ import annotations

from typing import Any, Final, Literal

from pydantic import Field, field_validator, model_validator

from schemas.events import Kind
from schemas.mapping_files import Part

SETTLEMENTS: Final = "settlements"
TOPICS: Final = frozenset({"payments", SETTLEMENTS})
"""Topics a source mapping may write to."""
FACTS: Final = ("kind", "object_id", "root", "minor", "currency", "status")
"""Money facts that go into the digest of an event, unless the file names fewer."""


class AttributeRule(Part):
    """One attribute: where it is read, whether it must be there, whether it is PHI."""

    expr: str
    required: bool = False
    sensitivity: Literal["none", "phi"] = "none"
    kinds: tuple[Kind, ...] = ()

    @model_validator(mode="before")
    @classmethod
    def _accept_text(cls, value: Any) -> Any:
        return {"expr": value} if isinstance(value, str) else value


class RuleFields(Part):
    """Members a rule may set and `defaults` may set for all rules; each but the flags is an expression."""

    topic: str | None = None
    minor: str | None = None
    major: str | None = None
    currency: str | None = None
    status: str | None = None
    object_id: str | None = None
    root: str | None = None
    occurred_at: str | None = None
    token_reference: str | None = None
    may_be_negative: bool | None = None
    attributes: dict[str, AttributeRule] = Field(default_factory=dict)


class EventRule(RuleFields):
    """The rule of one authoritative event type."""

    kind: Kind
    when: str | None = None


class Evidence(Part):
    """A sister event: of which fact it is evidence, where that can be read."""

    of: Kind | None = None
    object_id: str | None = None


class Envelope(Part):
    """Where the body names the event's type, id and time (milliseconds since the epoch)."""

    type: str
    id: str
    occurred_at: str


class Example(Part):
    """An executed example."""

    name: str
    given: dict[str, Any]
    then: dict[str, Any]


class SourceFile(Part):
    """A source mapping file."""

    source: str = Field(pattern=r"^[a-z][a-z0-9_]{1,30}$")
    version: int = Field(ge=1)
    envelope: Envelope
    object: str = "@"
    metadata: str | None = None
    facts: tuple[Literal["kind", "object_id", "root", "minor", "currency", "status"], ...] = FACTS
    tables: dict[str, dict[str, str]] = Field(default_factory=dict)
    defaults: RuleFields = RuleFields()
    events: dict[str, list[EventRule]] = Field(min_length=1)
    evidence: dict[str, Evidence] = Field(default_factory=dict)
    not_money: list[str] = Field(default_factory=list)
    examples: list[Example] = Field(min_length=1)

    @field_validator("events", mode="before")
    @classmethod
    def _accept_one_rule(cls, value: Any) -> Any:
        if not isinstance(value, dict):
            return value
        return {name: [rule] if isinstance(rule, dict) else rule for name, rule in value.items()}

    @field_validator("evidence", mode="before")
    @classmethod
    def _accept_bare_names(cls, value: Any) -> Any:
        return (
            {name: {} if sister is None else sister for name, sister in value.items()}
            if isinstance(value, dict)
            else value
        )


class OverlayPart(Part):
    """A facility's attributes for the events of one source."""

    attributes: dict[str, AttributeRule] = Field(min_length=1)
    tables: dict[str, dict[str, str]] = Field(default_factory=dict)
    examples: list[Example] = Field(min_length=1)


class OverlayFile(Part):
    """An overlay file: one facility's own attributes, by source. It cannot touch any other field."""

    facility: str
    sources: dict[str, OverlayPart] = Field(min_length=1)

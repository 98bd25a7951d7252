"""Reading raw events by a source mapping: a body becomes a money fact, or a reason why it is none.

Nothing here knows accounts, facilities or patients; ``streams.normalise`` adds them.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import TYPE_CHECKING, Any, Final

import msgspec

from schemas.card_data import CARD_TEXT, MEMBER_TEXT, SECURITY_CODE_TEXT, TRACK_TEXT
from schemas.events import Kind
from schemas.failure import Failure, FailureKind
from schemas.mapping_expressions import Expression, ExpressionError, is_false
from schemas.money import Money, read_major, read_minor

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

CARD_TEXTS: Final = tuple(text.decode() for text in (CARD_TEXT, TRACK_TEXT, SECURITY_CODE_TEXT))
"""What the edge writes in place of card data; a needed field that holds it is a dead letter."""
_EMPTIED: Final = MEMBER_TEXT.decode()
LATEST_MS: Final = 4_102_444_800_000
"""The year 2100: later times are most likely not milliseconds."""

JSON_OPTIONS: Final[Mapping[str, Any]] = {"float_hook": str}
"""How bodies are decoded: a number with a fraction stays text, so that it becomes money digit by digit."""
_decoder = msgspec.json.Decoder(**JSON_OPTIONS)


class Reason(StrEnum):
    """Why a raw event is no money fact of its own."""

    EVIDENCE = "EVIDENCE"
    """A sister of the authoritative event of a fact."""
    NOT_MONEY = "NOT_MONEY"
    """Known, and moves no money."""
    UNKNOWN_TYPE = "UNKNOWN_TYPE"
    """The mapping does not know this type; it is counted and kept raw."""


class Reading(msgspec.Struct, kw_only=True):
    """A money fact as a body states it. ``object_id`` and ``root`` are the gateway's own ids."""

    event_type: str
    source_event_id: str
    kind: Kind
    topic: str
    status: str
    money: Money
    object_id: str
    root: str
    occurred_at: int
    token_reference: str | None
    attributes: dict[str, str]
    object: Any
    """The JSON value that overlays read."""
    metadata: dict[str, Any]

    def outline(self) -> dict[str, Any]:
        """The fact as plain data, for examples and previews: no metadata, so no patient."""
        return {
            "event_type": self.event_type,
            "source_event_id": self.source_event_id,
            "kind": self.kind.value,
            "topic": self.topic,
            "status": self.status,
            "minor": self.money.minor,
            "currency": self.money.currency,
            "exponent": self.money.exponent,
            "object_id": self.object_id,
            "root": self.root,
            "occurred_at": self.occurred_at,
            "token_reference": self.token_reference,
            "attributes": self.attributes,
        }


class Skipped(msgspec.Struct, frozen=True):
    """A body that states no money fact of its own; ``kind`` and ``object_id`` name the fact it is evidence of."""

    reason: Reason
    event_type: str
    kind: str = ""
    object_id: str = ""

    def outline(self) -> dict[str, Any]:
        """The reason as plain data, for examples and previews."""
        return {
            "event_type": self.event_type,
            "ignored": self.reason.value,
            "evidence_of": f"{self.kind}:{self.object_id}" if self.object_id else None,
        }


@dataclass(frozen=True, slots=True)
class Attribute:
    """A compiled attribute; no ``kinds`` means every kind."""

    name: str
    expression: Expression
    required: bool
    phi: bool
    kinds: tuple[Kind, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Rule:
    """A compiled rule. ``decimal`` says the amount is text in major units."""

    kind: Kind
    topic: str
    when: Expression | None
    amount: Expression
    decimal: bool
    may_be_negative: bool
    currency: Expression
    status: Expression
    object_id: Expression
    root: Expression
    occurred_at: Expression | None
    token_reference: Expression | None
    attributes: tuple[Attribute, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Sister:
    """A compiled evidence entry."""

    kind: str
    object_id: Expression | None


@dataclass(frozen=True, slots=True, kw_only=True)
class SourceMapping:
    """A compiled source mapping."""

    source: str
    version: int
    digest: str
    """Sha256 of the file's bytes, in hex."""
    event_type: Expression
    event_id: Expression
    occurred_at: Expression
    object: Expression
    metadata: Expression | None
    facts: tuple[str, ...]
    rules: Mapping[str, tuple[Rule, ...]]
    evidence: Mapping[str, Sister]
    not_money: frozenset[str]

    def read(self, body: bytes) -> Reading | Skipped:
        """Read one body. The same bytes always give the same answer.

        Raises ``Failure``: BODY_INVALID, FIELD_MISSING, FIELD_INVALID, FIELD_REDACTED, PAN_IN_REFERENCE, TIME_INVALID,
        AMOUNT_MISSING, AMOUNT_INVALID, UNKNOWN_CURRENCY.
        """
        data = decode(body)
        event_type = read_text(self.event_type, data, "event_type")
        for rule in self.rules.get(event_type, ()):
            # Conditions read the object; a rule without one always holds.
            if rule.when is None or not is_false(_evaluate(rule.when, self._focus(data), "when")):
                return self._read_fact(rule, event_type, data)
        sister = self.evidence.get(event_type)
        if sister is not None:
            named = None
            if sister.object_id is not None:
                named = _evaluate(sister.object_id, self._focus(data), "object_id")
            linked = named if isinstance(named, str) else ""
            return Skipped(Reason.EVIDENCE, event_type, sister.kind if linked else "", linked)
        return Skipped(Reason.NOT_MONEY if event_type in self.not_money else Reason.UNKNOWN_TYPE, event_type)

    def _focus(self, data: Any) -> Any:
        focus = _evaluate(self.object, data, "object")
        if focus is None:
            raise Failure(FailureKind.UNMAPPED, "FIELD_MISSING", "object")
        return focus

    def _read_fact(self, rule: Rule, event_type: str, data: Any) -> Reading:
        focus = self._focus(data)
        if rule.occurred_at is None:
            moment = _evaluate(self.occurred_at, data, "occurred_at")
        else:
            moment = _evaluate(rule.occurred_at, focus, "occurred_at")
        if moment is None:
            raise Failure(FailureKind.UNMAPPED, "FIELD_MISSING", "occurred_at")
        if type(moment) is not int or not 0 < moment < LATEST_MS:
            raise Failure(FailureKind.INVALID, "TIME_INVALID", "occurred_at")
        token = rule.token_reference
        metadata = None if self.metadata is None else _evaluate(self.metadata, focus, "metadata")
        return Reading(
            event_type=event_type,
            source_event_id=read_text(self.event_id, data, "source_event_id"),
            kind=rule.kind,
            topic=rule.topic,
            status=read_text(rule.status, focus, "status"),
            money=_read_money(rule, focus),
            object_id=read_text(rule.object_id, focus, "object_id"),
            root=read_text(rule.root, focus, "root"),
            occurred_at=moment,
            token_reference=None
            if token is None
            else read_optional_text(_evaluate(token, focus, "token_reference"), "token_reference"),
            attributes=read_attributes(rule.attributes, focus, rule.kind),
            object=focus,
            metadata=metadata if isinstance(metadata, dict) else {},
        )


def decode(body: bytes) -> dict[str, Any]:
    """JSON object of a body; numbers with a fraction as text. Raises ``Failure`` BODY_INVALID."""
    try:
        data = _decoder.decode(body)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Failure(FailureKind.INVALID, "BODY_INVALID") from None
    if not isinstance(data, dict):
        raise Failure(FailureKind.INVALID, "BODY_INVALID")
    return data


def read_text(expression: Expression, view: Any, field: str) -> str:
    """Text that must be there. Raises ``Failure`` FIELD_MISSING, FIELD_INVALID or PAN_IN_REFERENCE."""
    text = read_optional_text(_evaluate(expression, view, field), field)
    if text is None:
        raise Failure(FailureKind.UNMAPPED, "FIELD_MISSING", field)
    return text


def read_optional_text(value: Any, field: str) -> str | None:
    """Text of a JSON value, None when it is null or empty; whole numbers are ids too.

    Raises ``Failure`` FIELD_INVALID for any other type, PAN_IN_REFERENCE when the edge redacted card data in it,
    FIELD_REDACTED when the connector declares the member sensitive, so that the edge emptied it.
    """
    if value is None:
        return None
    if type(value) is int:
        return str(value)
    if not isinstance(value, str):
        raise Failure(FailureKind.INVALID, "FIELD_INVALID", field)
    if "redacted]" in value:
        if value == _EMPTIED:
            raise Failure(FailureKind.INVALID, "FIELD_REDACTED", field)
        if any(text in value for text in CARD_TEXTS):
            raise Failure(FailureKind.INVALID, "PAN_IN_REFERENCE", field)
    return value if value.strip() else None


def read_attributes(attributes: Iterable[Attribute], view: Any, kind: Kind) -> dict[str, str]:
    """Attributes that apply to ``kind`` and are there, as text (true and false in lower case).

    Raises ``Failure`` FIELD_MISSING or PAN_IN_REFERENCE for a required one, FIELD_INVALID for a list or an object.
    """
    found: dict[str, str] = {}
    for attribute in attributes:
        if attribute.kinds and kind not in attribute.kinds:
            continue
        value = _evaluate(attribute.expression, view, f"attributes.{attribute.name}")
        if isinstance(value, bool):
            value = "true" if value else "false"
        # Redacted text is fit to read, so only an attribute that must be there refuses it.
        if attribute.required or not isinstance(value, str):
            value = read_optional_text(value, f"attributes.{attribute.name}")
        if value:
            found[attribute.name] = value
        elif attribute.required:
            raise Failure(FailureKind.UNMAPPED, "FIELD_MISSING", f"attributes.{attribute.name}")
    return found


def _read_money(rule: Rule, focus: Any) -> Money:
    amount = _evaluate(rule.amount, focus, "amount")
    currency = _evaluate(rule.currency, focus, "currency")
    if rule.decimal and type(amount) is int:
        amount = str(amount)  # 12 in major units is as exact as "12"
    money = read_major(amount, currency) if rule.decimal else read_minor(amount, currency)
    if money.minor <= 0 and not rule.may_be_negative:
        # The kind says the direction; a negative amount would turn it round.
        raise Failure(FailureKind.INVALID, "AMOUNT_INVALID", "amount")
    return money


def _evaluate(expression: Expression, view: Any, field: str) -> Any:
    try:
        return expression.evaluate(view)
    except ExpressionError:
        raise Failure(FailureKind.INVALID, "FIELD_INVALID", field) from None

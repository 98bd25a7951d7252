"""The named functions mapping expressions may call, beside those of JMESPath itself.

JMESPath has no dates, no money and no tables; these close that gap. Users write no code: what a function cannot say
belongs in the connector's file. Every function gives null for null, so that an absent optional field stays absent.
``FUNCTIONS`` describes each with an example that the tests run and docs/mappings.md shows.
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from decimal import Decimal
from typing import TYPE_CHECKING, Any, Final
from zoneinfo import ZoneInfo

from jmespath import functions

from schemas.money import Money

if TYPE_CHECKING:
    from collections.abc import Mapping

REFUSED: Final[Mapping[str, str]] = {
    "to_number": "it makes floats, and a float may lose cents",
    "sum": "money is never added inside a mapping",
    "avg": "money is never divided inside a mapping",
}
"""Functions of JMESPath that are not available, and why."""

_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)
_VISIBLE = 4  # characters that mask() leaves readable

_TEXT: Final[Any] = {"types": ["string", "null"]}
_MILLISECONDS: Final[Any] = {"types": ["number", "null"]}


@dataclass(frozen=True, slots=True)
class Function:
    """One named function: how it is called, what it gives, and an example that holds."""

    call: str
    meaning: str
    expression: str
    given: Mapping[str, Any]
    result: Any

    @property
    def name(self) -> str:
        """The function's name."""
        return self.call.partition("(")[0]


class MappingFunctions(functions.Functions):
    """JMESPath's functions without the refused ones, plus ours. ``tables`` are those of the mapping file."""

    def __init__(self, tables: Mapping[str, Mapping[str, str]] | None = None) -> None:
        self.tables = tables or {}

    @functions.signature({"types": ["object", "null"]})
    def _func_major(self, money: dict[str, Any] | None) -> str | None:
        if money is None:
            return None
        minor, exponent = money["minor"], money["exponent"]
        if type(minor) is not int or type(exponent) is not int or exponent < 0:
            raise TypeError("major() takes money: {minor, currency, exponent}")
        return Money(minor, money["currency"], exponent).major()

    @functions.signature(_MILLISECONDS)
    def _func_iso_date(self, milliseconds: int | None) -> str | None:
        return None if milliseconds is None else _at(milliseconds, UTC).date().isoformat()

    @functions.signature(_MILLISECONDS, {"types": ["string"]})
    def _func_local_date(self, milliseconds: int | None, zone: str) -> str | None:
        return None if milliseconds is None else _at(milliseconds, ZoneInfo(zone)).date().isoformat()

    @functions.signature(_MILLISECONDS, {"types": ["string"]})
    def _func_hl7_time(self, milliseconds: int | None, zone: str) -> str | None:
        return None if milliseconds is None else _at(milliseconds, ZoneInfo(zone)).strftime("%Y%m%d%H%M%S%z")

    @functions.signature({"types": ["number", "string", "null"]})
    def _func_epoch_ms(self, seconds: int | str | None) -> int | None:
        if seconds is None or type(seconds) is int:
            return None if seconds is None else seconds * 1000
        if isinstance(seconds, str):
            # A JSON number with a fraction reaches mappings as its text.
            return int(Decimal(seconds) * 1000)
        raise TypeError("epoch_ms() takes whole seconds or decimal text")

    @functions.signature(_TEXT)
    def _func_iso_ms(self, text: str | None) -> int | None:
        if text is None:
            return None
        moment = datetime.fromisoformat(text)
        if moment.tzinfo is None:
            raise ValueError("iso_ms() takes a time with its offset")
        return (moment - _EPOCH) // _MILLISECOND

    @functions.signature(_TEXT)
    def _func_upper(self, text: str | None) -> str | None:
        return None if text is None else text.upper()

    @functions.signature(_TEXT)
    def _func_lower(self, text: str | None) -> str | None:
        return None if text is None else text.lower()

    @functions.signature(_TEXT, {"types": ["string"]})
    def _func_lookup(self, key: str | None, table: str) -> str | None:
        return None if key is None else self.tables[table].get(key)

    @functions.signature(_TEXT)
    def _func_mask(self, text: str | None) -> str | None:
        if text is None:
            return None
        kept = text[-_VISIBLE:] if len(text) > _VISIBLE else ""
        return "*" * (len(text) - len(kept)) + kept

    @functions.signature(_TEXT)
    def _func_digest(self, text: str | None) -> str | None:
        return None if text is None else hashlib.sha256(text.encode()).hexdigest()[:32]

    @functions.signature({"types": ["string", "number", "null"], "variadic": True})
    def _func_concat(self, *parts: str | int | None) -> str | None:
        for part in parts:
            if part is not None and type(part) not in {str, int}:
                raise TypeError("concat() takes texts and whole numbers")
        return None if all(part is None for part in parts) else "".join(str(part) for part in parts if part is not None)

    @functions.signature({"types": []}, {"types": []})
    def _func_default(self, value: Any, fallback: Any) -> Any:
        return fallback if value is None or value == "" else value

    @functions.signature({"types": ["string", "object", "null"]})
    def _func_id_of(self, reference: str | dict[str, Any] | None) -> Any:
        return reference.get("id") if isinstance(reference, dict) else reference


for _name in REFUSED:
    MappingFunctions.FUNCTION_TABLE.pop(_name)  # type: ignore[attr-defined, unused-ignore]


def _at(milliseconds: int, zone: Any) -> datetime:
    if type(milliseconds) is not int:
        raise TypeError("a time is whole milliseconds since the epoch")
    return (_EPOCH + milliseconds * _MILLISECOND).astimezone(zone)


EXAMPLE_TABLES: Final[Mapping[str, Mapping[str, str]]] = {"sites": {"N": "North", "S": "South"}}
"""The tables that the examples of ``lookup`` read."""

FUNCTIONS: Final[tuple[Function, ...]] = (
    Function(
        "major(money)",
        "Decimal text in major units with the currency's own number of digits.",
        "major(money)",
        {"money": {"minor": 12345, "currency": "KWD", "exponent": 3}},
        "12.345",
    ),
    Function("iso_date(ms)", "Date in UTC.", "iso_date(t)", {"t": 1_767_225_599_999}, "2025-12-31"),
    Function(
        "local_date(ms, zone)",
        "Date in an IANA time zone.",
        "local_date(t, 'America/Chicago')",
        {"t": 1_767_225_600_000},
        "2025-12-31",
    ),
    Function(
        "hl7_time(ms, zone)",
        "HL7 v2 time with its offset.",
        "hl7_time(t, 'America/Chicago')",
        {"t": 1_767_225_600_000},
        "20251231180000-0600",
    ),
    Function(
        "epoch_ms(seconds)",
        "Milliseconds from seconds since the epoch; the text of a number with a fraction is read exactly.",
        "[epoch_ms(a), epoch_ms(b)]",
        {"a": 1_767_225_600, "b": "1767225600.125"},
        [1_767_225_600_000, 1_767_225_600_125],
    ),
    Function(
        "iso_ms(text)",
        "Milliseconds from an ISO 8601 time; a time without offset is refused.",
        "iso_ms(t)",
        {"t": "2026-01-01T01:00:00.250+01:00"},
        1_767_225_600_250,
    ),
    Function("upper(text)", "Upper case.", "upper(x)", {"x": "usd"}, "USD"),
    Function("lower(text)", "Lower case.", "lower(x)", {"x": "VISA"}, "visa"),
    Function(
        "lookup(key, 'table')",
        "Entry of a table of the same file (`tables:`); null when the key is not in it.",
        "lookup(site, 'sites')",
        {"site": "N"},
        "North",
    ),
    Function(
        "mask(text)",
        "All but the last four characters as `*`; text of four or fewer is masked whole. What it reads stays PHI.",
        "mask(x)",
        {"x": "AB12345"},
        "***2345",
    ),
    Function(
        "digest(text)",
        "32 hex digits of sha256, to shorten a reference. It hides nothing: what it reads stays PHI.",
        "digest(x)",
        {"x": "abc"},
        "ba7816bf8f01cfea414140de5dae2223",
    ),
    Function(
        "concat(a, b, ...)",
        "Texts and whole numbers after one another; null counts as empty, all null gives null.",
        "concat(a, '-', b, c)",
        {"a": "INV", "b": 17, "c": None},
        "INV-17",
    ),
    Function(
        "default(x, y)",
        "`y` where `x` is null or empty text; false and 0 stay.",
        "[default(a, 'none'), default(b, 'none')]",
        {"a": "", "b": False},
        ["none", False],
    ),
    Function(
        "id_of(x)",
        "The id of a reference that may be expanded: the text itself, or its member `id`.",
        "[id_of(a), id_of(b)]",
        {"a": "pi_1", "b": {"id": "pi_2"}},
        ["pi_1", "pi_2"],
    ),
)
"""Every named function of ours."""

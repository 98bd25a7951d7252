"""Money as integer minor units with its ISO 4217 currency: exact, never a float.

Exponents (0, 2, 3 or 4 digits) come from ``iso4217.csv``: the current codes of ISO 4217 list one that have a minor
unit.
"""

from __future__ import annotations

import csv
import re
from importlib.resources import files
from typing import TYPE_CHECKING

import msgspec

from schemas.failure import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping


def _read_exponents() -> Mapping[str, int]:
    with files("schemas").joinpath("iso4217.csv").open(encoding="ascii") as lines:
        return {row["code"]: int(row["exponent"]) for row in csv.DictReader(lines)}


EXPONENTS: Mapping[str, int] = _read_exponents()
"""ISO 4217 code -> number of decimal digits of its minor unit."""

LARGEST_MINOR = 10**15
"""Amounts beyond this many minor units are refused as garbage; no payment is that large in any currency."""

_DECIMAL = re.compile(r"(-?)([0-9]{1,16})(?:\.([0-9]{1,6}))?\Z")


class Money(msgspec.Struct, frozen=True, order=False, gc=False):
    """An amount: ``minor`` units (cents, yen, fils), ISO 4217 ``currency``, and that currency's ``exponent``."""

    minor: int
    currency: str
    exponent: int

    def major(self) -> str:
        """Decimal text in major units with exactly ``exponent`` digits: ``12.50``, ``1250``, ``-0.005``."""
        sign = "-" if self.minor < 0 else ""
        digits = str(abs(self.minor)).rjust(self.exponent + 1, "0")
        if not self.exponent:
            return sign + digits
        return f"{sign}{digits[: -self.exponent]}.{digits[-self.exponent :]}"

    def negated(self) -> Money:
        """The same amount with the other sign."""
        return Money(-self.minor, self.currency, self.exponent)


def find_exponent(currency: object) -> tuple[str, int]:
    """Return (upper-case code, exponent), or raise ``Failure`` UNKNOWN_CURRENCY."""
    # Only ASCII: other letters may become a code by upper-casing.
    code = currency.upper() if isinstance(currency, str) and currency.isascii() else ""
    exponent = EXPONENTS.get(code)
    if exponent is None:
        raise Failure(FailureKind.INVALID, "UNKNOWN_CURRENCY", "currency")
    return code, exponent


def read_minor(minor: object, currency: object) -> Money:
    """Money from an integer in minor units, as most gateways send it.

    Raises ``Failure`` AMOUNT_MISSING for null, AMOUNT_INVALID for a non-integer (a float too: it may have lost cents).
    """
    if minor is None:
        raise Failure(FailureKind.UNMAPPED, "AMOUNT_MISSING", "amount")
    if isinstance(minor, bool) or not isinstance(minor, int) or abs(minor) > LARGEST_MINOR:
        raise Failure(FailureKind.INVALID, "AMOUNT_INVALID", "amount")
    code, exponent = find_exponent(currency)
    return Money(minor, code, exponent)


def read_major(text: object, currency: object) -> Money:
    """Money from decimal text in major units (``"12.50"``); digits the currency does not have are refused."""
    if text is None:
        raise Failure(FailureKind.UNMAPPED, "AMOUNT_MISSING", "amount")
    code, exponent = find_exponent(currency)
    match = _DECIMAL.match(text) if isinstance(text, str) else None
    if match is None:
        raise Failure(FailureKind.INVALID, "AMOUNT_INVALID", "amount")
    sign, whole, fraction = match[1], match[2], match[3] or ""
    if len(fraction.rstrip("0")) > exponent:
        raise Failure(FailureKind.INVALID, "AMOUNT_INVALID", "amount")
    minor = int(whole + fraction[:exponent].ljust(exponent, "0"))
    if minor > LARGEST_MINOR:
        raise Failure(FailureKind.INVALID, "AMOUNT_INVALID", "amount")
    return Money(-minor if sign else minor, code, exponent)

"""Money of the sandbox: integers in minor units and a short table of its own of how many decimals a currency has."""

from __future__ import annotations

import re

DECIMALS = {
    **dict.fromkeys(("USD", "EUR", "GBP", "CAD", "AUD", "MXN", "INR", "CHF", "SEK", "NOK", "DKK", "PLN", "AED"), 2),
    **dict.fromkeys(("JPY", "KRW", "CLP", "VND", "XAF", "XOF"), 0),
    **dict.fromkeys(("KWD", "BHD", "OMR", "JOD", "TND"), 3),
}
"""Currency -> decimals, for the currencies this simulator deals in."""

_AMOUNT = re.compile(r"([+-]?)([0-9]{1,12})(?:\.([0-9]{1,6}))?\Z")


def parse_amount(text: str, currency: str) -> int | None:
    """Minor units of decimal text (``-12.50``), or None: unknown currency, no number, or more decimals than it has."""
    decimals = DECIMALS.get(currency)
    match = _AMOUNT.match(text)
    if decimals is None or match is None:
        return None
    sign, whole, fraction = match[1], match[2], match[3] or ""
    if len(fraction) > decimals:
        return None
    minor = int(whole + fraction.ljust(decimals, "0"))
    return -minor if sign == "-" else minor

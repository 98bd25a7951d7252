"""Short references of ours: functions of a text, and so the same at every attempt and after every restart."""

from __future__ import annotations

import hashlib

_BASE32 = "0123456789ABCDEFGHJKMNPQRSTVWXYZ"  # no I, L, O, U: read aloud on the phone without mistakes


def derive(text: str, length: int) -> str:
    """``length`` characters (at most 51), 5 bits each, of the text's sha256."""
    number = int.from_bytes(hashlib.sha256(text.encode()).digest(), "big")
    return "".join(_BASE32[number >> (5 * place) & 31] for place in range(length))

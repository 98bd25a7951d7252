"""Keys and digests: functions of the input alone, so that the same bytes always give the same events.

``HmacKey`` wraps the deployment's secret. Everything that could identify a patient passes through it before it becomes
a Kafka key, a Redis key or a header.
"""

from __future__ import annotations

import hashlib
from typing import TYPE_CHECKING, Final

if TYPE_CHECKING:
    from schemas.events import Reference

_BLOCK: Final = 64
_SHORT: Final = tuple(f"\0\0\0{chr(length)}" for length in range(128))
"""Lengths of short ASCII parts: four bytes, big end first."""


def build_transaction_key(source: str, account: str, kind: str, object_id: str) -> str:
    """Name the money fact (never the delivery): every copy of the fact, by whatever route, has the same key."""
    return f"{source}:{account}:{kind}:{object_id}"


def build_event_id(transaction_key: str) -> str:
    """The event id of a money fact: 32 hex digits of sha256 over its transaction key."""
    return hashlib.sha256(transaction_key.encode()).hexdigest()[:32]


class HmacKey:
    """The deployment's secret for keyed hashes: HMAC-SHA256 (RFC 2104). Its repr never shows it."""

    __slots__ = ("_facts", "_identifier", "_inner", "_outer")

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 16:  # 128 bits: below that a patient id can be found by trying
            raise ValueError("the HMAC key needs at least 16 bytes")
        block = (hashlib.sha256(secret).digest() if len(secret) > _BLOCK else secret).ljust(_BLOCK, b"\0")
        # A hash object that has taken in the key is copied for every message: less than half the cost of a new HMAC.
        self._inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in block))
        self._outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in block))
        self._facts, self._identifier = self._inner.copy(), self._inner.copy()
        self._facts.update(_frame("facts"))
        self._identifier.update(_frame("identifier"))

    def __repr__(self) -> str:
        return "HmacKey(...)"

    def hash_identifier(self, reference: Reference) -> str:
        """Key of a patient identifier (assigning authority, id type, value): 32 hex digits."""
        inner = self._identifier.copy()
        inner.update(_join((reference.authority, reference.id_type, reference.value)))
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.hexdigest()[:32]

    def hash_facts(self, *facts: str) -> bytes:
        """Digest of the declared money facts of an event: 16 bytes. Equal facts, equal digest; holds no PHI."""
        inner = self._facts.copy()
        inner.update(_join(facts))
        outer = self._outer.copy()
        outer.update(inner.digest())
        return outer.digest()[:16]

    def hash_bytes(self, received: bytes) -> str:
        """Keyed hash of bytes as received, before redaction: 64 hex digits."""
        inner, outer = self._inner.copy(), self._outer.copy()
        inner.update(b"bytes\x00")
        inner.update(received)
        outer.update(inner.digest())
        return outer.hexdigest()


def _frame(part: str) -> bytes:
    # Length before each part: ("ab", "c") and ("a", "bc") must differ.
    data = part.encode()
    return len(data).to_bytes(4, "big") + data


def _join(parts: tuple[str, ...]) -> bytes:
    """All parts, framed."""
    try:
        text = "".join([_SHORT[len(part)] + part for part in parts])
    except IndexError:
        text = "\x80"
    # In ASCII characters are bytes; the lengths are ASCII too.
    return text.encode() if text.isascii() else b"".join([_frame(part) for part in parts])

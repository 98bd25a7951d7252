"""Keys and digests: functions of the input alone, so that the same bytes always give the same events.

``HmacKey`` wraps the deployment's secret. Everything that could identify a patient passes through it before it becomes
a Kafka key, a Redis key or a header.
"""

from __future__ import annotations

import hashlib
import hmac

from schemas.events import Reference


def build_transaction_key(source: str, account: str, kind: str, object_id: str) -> str:
    """Name the money fact (never the delivery): every copy of the fact, by whatever route, has the same key."""
    return f"{source}:{account}:{kind}:{object_id}"


def build_event_id(transaction_key: str) -> str:
    """The event id of a money fact: 32 hex digits of sha256 over its transaction key."""
    return hashlib.sha256(transaction_key.encode()).hexdigest()[:32]


class HmacKey:
    """The deployment's secret for keyed hashes. Its repr never shows it."""

    __slots__ = ("_secret",)

    def __init__(self, secret: bytes) -> None:
        if len(secret) < 16:  # 128 bits: below that a patient id can be found by trying
            raise ValueError("the HMAC key needs at least 16 bytes")
        self._secret = secret

    def __repr__(self) -> str:
        return "HmacKey(...)"

    def hash_identifier(self, reference: Reference) -> str:
        """Key of a patient identifier (assigning authority, id type, value): 32 hex digits."""
        return self._hash("identifier", reference.authority, reference.id_type, reference.value)[:32]

    def hash_facts(self, *facts: str) -> bytes:
        """Digest of the declared money facts of an event: 16 bytes. Equal facts, equal digest; holds no PHI."""
        return bytes.fromhex(self._hash("facts", *facts))[:16]

    def hash_bytes(self, received: bytes) -> str:
        """Keyed hash of bytes as received, before redaction: 64 hex digits."""
        return hmac.new(self._secret, b"bytes\x00" + received, hashlib.sha256).hexdigest()

    def _hash(self, *parts: str) -> str:
        # Length before each part: ("ab", "c") and ("a", "bc") must differ.
        message = b"".join(len(data).to_bytes(4, "big") + data for data in (part.encode() for part in parts))
        return hmac.new(self._secret, message, hashlib.sha256).hexdigest()

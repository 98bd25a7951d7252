"""Headers of our records: what they are called, what they mean, how they are written and read.

Raw records carry CloudEvents 1.0 attributes for Kafka (binary mode, prefix ``ce_``) beside our own. No header ever
holds a patient id or payload text.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import msgspec

from schemas.failure import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Sequence

Headers = list[tuple[str, bytes]]

INGEST_TIME = "ingest_time"
"""Milliseconds since the epoch when the receiver accepted the record: decimal text."""
SOURCE = "source"
ACCOUNT = "account"
FACILITY = "facility"
CONTENT_TYPE = "content-type"
VERDICT = "verdict"
"""How the sender was verified: ``scheme;key=<key id>;signed_at=<s>``; never the signature or secret."""
RECEIVED_HMAC = "received_hmac"
"""Keyed HMAC of the bytes as received, before redaction."""
STORED_SHA256 = "stored_sha256"
"""Plain sha256 of the bytes stored in the record."""
REDACTED = "redacted"
"""Number of redactions made at the edge; absent when none was."""
DELIVERY_ID = "delivery_id"
"""The sender's id of the delivery (event id, MSH-10)."""
ORIGIN = "origin"
"""Hop of the first raw record; only on redrive and replay."""
HOP = "hop"
"""On canonical records, dead letters and reviews: hop of the raw record they are the fact of."""
EVENT_ID = "event_id"
MAPPING_VERSION = "mapping_version"

REVIEWED_HOP = "reviewed_hop"
"""Hop of the record in review that this one takes the place of; always the last header."""
NAMED_PATIENT = "named_patient"
"""Keyed hash of the identifier a person named in a review."""
EDITED_FROM = "edited_from"
"""On a dead letter: ``partition:offset`` of the one it is an edited version of. It is no fate of its own."""

DEAD_LETTER_STAGE = "dead_letter_stage"
"""``normalise``, ``release`` or the name of a target."""
DEAD_LETTER_KIND = "dead_letter_kind"
DEAD_LETTER_CODE = "dead_letter_code"
DEAD_LETTER_FIELD = "dead_letter_field"
DEAD_LETTER_TIME = "dead_letter_time"


class RawRecord(msgspec.Struct, gc=False):
    """A record of a raw topic as a stream sees it. ``hop`` is ``topic id:partition:offset``."""

    hop: str
    partition: int
    offset: int
    key: bytes
    value: bytes
    headers: Headers
    timestamp: int

    def read_header(self, name: str) -> str:
        """Text of a header; raises ``Failure`` HEADER_MISSING when the record lacks it (not written by a receiver)."""
        text = find_header(self.headers, name)
        if text is None:
            raise Failure(FailureKind.INVALID, "HEADER_MISSING", name)
        return text

    @property
    def origin(self) -> str:
        """Hop of the first raw record of this fact."""
        return find_header(self.headers, ORIGIN) or self.hop


def find_header(headers: Sequence[tuple[str, bytes | None]] | None, name: str) -> str | None:
    """Text of the last header of that name, or None; a header that Kafka holds without a value is empty text."""
    for key, value in reversed(headers or ()):
        if key == name:
            return "" if value is None else value.decode("utf-8", "replace")
    return None


def read_headers(message: Any) -> Headers:
    """Headers of a Kafka message.

    Empty when a name is not UTF-8: the client cannot give them (nor be asked again), and a record without our headers
    is a dead letter, where one that cannot be read would stop its partition.
    """
    try:
        return message.headers() or []
    except (SystemError, UnicodeDecodeError):
        return []


def build_cloudevent(*, event_id: str, source: str, event_type: str, time: str) -> Headers:
    """CloudEvents 1.0 attributes in Kafka binary mode. ``time`` is RFC 3339."""
    return [
        ("ce_specversion", b"1.0"),
        ("ce_id", event_id.encode()),
        ("ce_source", source.encode()),
        ("ce_type", event_type.encode()),
        ("ce_time", time.encode()),
    ]

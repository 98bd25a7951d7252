"""Dead letters: the original bytes and headers with the reason as codes, never as text from the payload."""

from __future__ import annotations

from typing import TYPE_CHECKING

from topics import catalog, headers
from topics.transaction import Output

if TYPE_CHECKING:
    from schemas.failure import Failure
    from topics.headers import Headers

_OURS = frozenset(
    {
        headers.DEAD_LETTER_STAGE,
        headers.DEAD_LETTER_KIND,
        headers.DEAD_LETTER_CODE,
        headers.DEAD_LETTER_FIELD,
        headers.DEAD_LETTER_TIME,
        headers.HOP,
        headers.ORIGIN,
    }
)


def build_dead_letter(
    *,
    key: bytes,
    value: bytes,
    original: Headers,
    failure: Failure,
    stage: str,
    hop: str,
    origin: str,
    now_ms: int,
) -> Output:
    """The record for `dlq`. Reasons of an earlier life (after a redrive) are replaced, not kept beside the new ones."""
    reasons = [
        (headers.DEAD_LETTER_STAGE, stage.encode()),
        (headers.DEAD_LETTER_KIND, failure.kind.value.encode()),
        (headers.DEAD_LETTER_CODE, failure.code.encode()),
        (headers.DEAD_LETTER_FIELD, failure.field.encode()),
        (headers.DEAD_LETTER_TIME, str(now_ms).encode()),
        (headers.HOP, hop.encode()),
        (headers.ORIGIN, origin.encode()),
    ]
    kept = [(name, text) for name, text in original if name not in _OURS]
    return Output(catalog.DLQ, key, value, [*kept, *reasons], cause=hop)

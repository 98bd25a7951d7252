"""What a log line may show. Everything else is replaced by ``<masked>``.

Keys decide first (``mrn``, ``password``, ``patient_...``), then types (bytes show their size, unknown objects their
type), then text (card numbers, HL7 segments, credentials). Masking is a net under the rule that no one logs payload; it
is not a licence to log it.
"""

from __future__ import annotations

import re
import traceback
from collections.abc import Mapping, Sequence
from collections.abc import Set as AbstractSet
from datetime import date, time, timedelta
from decimal import Decimal
from enum import Enum
from itertools import islice
from pathlib import PurePath
from types import TracebackType
from typing import Any
from uuid import UUID

from schemas.card_data import find_card_data
from schemas.failure import Failure, OperatorError

MASKED = "<masked>"
MAX_TEXT = 500
"""Characters of one value; the rest is cut, and the line says so."""
MAX_ITEMS = 50
MAX_DEPTH = 5

_SHOWN_AS_TEXT = (str, Decimal, date, time, timedelta, UUID, PurePath)

_WORD = re.compile(r"[A-Z]+(?=[A-Z][a-z])|[A-Z]?[a-z0-9]+|[A-Z]+")
# fmt: off
_SENSITIVE_WORDS = frozenset({
    "secret", "secrets", "token", "tokens", "password", "passwd", "passphrase", "authorization", "credential",
    "credentials", "cookie", "signature", "apikey", "mrn", "patient", "person", "guarantor", "subscriber",
    "insured", "ssn", "dob", "birth", "birthdate", "address", "street", "phone", "email", "pan", "cvv", "cvc",
    "card", "track", "pin", "body", "payload",
})
_NAMES_OF_PEOPLE = frozenset({
    "first", "last", "given", "family", "middle", "maiden", "full", "patient", "legal", "holder",
})
_KEYS_THAT_OPEN = frozenset({"api", "hmac", "private", "secret", "signing", "access", "encryption"})
# fmt: on
_NOT_SENSITIVE = frozenset({"patient_update"})
"""Names of counts that hold a sensitive word."""

_SEGMENT = re.compile(r"(?:^|[\r\n\x0b\s'\"])(?:MSH|EVN|PID|PD1|NK1|MRG|PV1|PV2|GT1|IN1|FT1|DG1|OBX)\|")
_CREDENTIAL = re.compile(
    r"(?:sk|rk|pk)_(?:live|test)_\w+|whsec_\w+|(?i:bearer|basic)\s+[\w.+/=-]{12,}|://[^/\s:@]+:[^/\s@]+@"
)


def is_sensitive(key: str) -> bool:
    """Whether the values under this key are never shown, whatever they are."""
    words = [word.lower() for word in _WORD.findall(key)]
    if "_".join(words) in _NOT_SENSITIVE or not words:
        return False
    if words == ["name"] or (words[-1] in {"name", "names"} and _NAMES_OF_PEOPLE.intersection(words)):
        return True
    if words[-1] in {"key", "keys"} and _KEYS_THAT_OPEN.intersection(words):
        return True
    return bool(_SENSITIVE_WORDS.intersection(words))


def mask_text(text: str) -> str:
    """The text, or ``<masked>`` when any part of it looks like a card number, an HL7 segment or a credential."""
    if len(text) > MAX_TEXT:
        text = text[:MAX_TEXT] + "...<cut>"
    if _SEGMENT.search(text) or _CREDENTIAL.search(text) or find_card_data(text):
        return MASKED
    return text


def mask_value(value: object, *, depth: int = 0) -> Any:
    """A value that may be shown: numbers, masked text, and containers of them. Never the text of an exception."""
    if isinstance(value, Enum):  # before str and int, which some enums are
        return value.value
    if value is None or isinstance(value, bool | float):
        return value
    if isinstance(value, int):
        return MASKED if find_card_data(str(value)) else value
    if isinstance(value, _SHOWN_AS_TEXT):
        return mask_text(str(value))
    if isinstance(value, bytes | bytearray | memoryview):
        return f"<{len(value)} bytes>"
    return _mask_container(value, depth + 1)


def _mask_container(value: object, depth: int) -> Any:
    if isinstance(value, Mapping | Sequence | AbstractSet) and depth > MAX_DEPTH:
        return MASKED
    if isinstance(value, Mapping):
        return mask_members(value, depth=depth)
    if isinstance(value, Sequence | AbstractSet):
        items = [mask_value(item, depth=depth) for item in islice(value, MAX_ITEMS)]
        return [*items, f"<{len(value) - MAX_ITEMS} more>"] if len(value) > MAX_ITEMS else items
    return type(value).__name__ if isinstance(value, BaseException) else f"<{type(value).__name__}>"


def mask_members(members: Mapping[Any, Any], *, depth: int = 0) -> dict[str, Any]:
    """A mapping with the values of sensitive keys masked, and all others as ``mask_value`` gives them."""
    shown: dict[str, Any] = {}
    for key, value in members.items():
        name = key if isinstance(key, str) else str(mask_value(key, depth=depth))
        # A key is text too: a mapping keyed by patient id must not slip through.
        shown[mask_text(name)] = MASKED if is_sensitive(name) and value is not None else mask_value(value, depth=depth)
    return shown


def describe_exception(error: BaseException) -> dict[str, Any]:
    """What a log line says of an exception: its type, our codes, where it was raised, the types of its causes.

    Never its message: libraries quote their input there.
    """
    described: dict[str, Any] = {"error": type(error).__name__, "place": _find_place(error.__traceback__)}
    if isinstance(error, OperatorError):
        described |= {"code": error.code, "setting": mask_text(error.place), "detail": mask_text(error.detail)}
    elif isinstance(error, Failure):
        described |= {"kind": error.kind.value, "code": mask_text(error.code), "field": mask_text(error.field)}
    causes: list[str] = []
    cause = error.__cause__ or error.__context__
    while cause is not None and len(causes) < MAX_DEPTH:
        causes.append(type(cause).__name__)
        cause = cause.__cause__ or cause.__context__
    if causes:
        described["causes"] = causes
    return described


def _find_place(trace: TracebackType | None) -> str:
    """Innermost frame as ``file:line function``; the source line itself is not shown, it may hold literals."""
    frames = traceback.extract_tb(trace, limit=-1) if trace is not None else []
    if not frames:
        return ""
    frame = frames[-1]
    return f"{PurePath(frame.filename).name}:{frame.lineno} {frame.name}"

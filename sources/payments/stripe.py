"""Stripe: snapshot and thin events, signed with the endpoint's secret.

Read 2026: docs.stripe.com/webhooks and the official Python library (``_webhook.py``). Quirks: only scheme ``v1``
counts; while a secret is rolled the header holds several ``v1``; the official check lets a timestamp from the future
pass, this one does not; events come in no order, and one change may come as several event types. Events of API v2
(``object`` is ``v2.core.event``) carry no resource.
"""

from __future__ import annotations

import hashlib
import hmac
import re
from collections.abc import Mapping, Sequence
from datetime import datetime
from typing import Any

import msgspec

from schemas.failure import Failure, FailureKind
from sources.contract import Gateway, RawEvent, Refusal, Status, Verdict

SIGNATURE_HEADER = "stripe-signature"
SCHEME = "stripe-v1"

_SECONDS = re.compile(r"[0-9]{1,12}\Z", re.ASCII)
_THIN = "v2.core.event"
_LONGEST_ID = 255  # far above any id of theirs; keeps a record's key and headers small


class _Resource(msgspec.Struct):
    id: Any = None
    payment_intent: Any = None
    charge: Any = None


class _Data(msgspec.Struct):
    object: _Resource | None = None


class _Event(msgspec.Struct):
    id: Any = None
    object: Any = None
    type: Any = None
    created: Any = None
    data: msgspec.Raw = msgspec.Raw(b"null")


_read_event = msgspec.json.Decoder(_Event).decode
_read_data = msgspec.json.Decoder(_Data | None).decode


def verify(
    body: bytes, headers: Mapping[str, str], *, secrets: Sequence[bytes], now: float, tolerance: float
) -> Verdict:
    """Check ``Stripe-Signature: t=<seconds>,v1=<hex>[,v1=<hex>]``: HMAC-SHA256 over ``<t>.<raw body>``.

    The key is the endpoint's secret as text, ``whsec_`` included. Every secret is tried against every ``v1``. A right
    signature older, or further in the future, than ``tolerance`` seconds is stale. Two header lines (joined by a comma)
    name two times and are malformed.
    """
    header = headers.get(SIGNATURE_HEADER)
    if not header:
        return Verdict(Refusal.SIGNATURE_MISSING, SCHEME)
    signed_at, signatures = _read_signature(header)
    if signed_at is None or not signatures:
        return Verdict(Refusal.SIGNATURE_MALFORMED, SCHEME)
    signed = b"%d.%b" % (signed_at, body)
    key_id = ""
    for number, secret in enumerate(secrets, 1):
        expected = hmac.new(secret, signed, hashlib.sha256).hexdigest().encode()
        for signature in signatures:
            # No early exit: how long it takes must not tell which secret or signature matched.
            if hmac.compare_digest(expected, signature) and not key_id:
                key_id = str(number)
    if not key_id:
        return Verdict(Refusal.SIGNATURE_WRONG, SCHEME, signed_at=signed_at)
    if abs(now - signed_at) > tolerance:
        return Verdict(Refusal.TIMESTAMP_STALE, SCHEME, key_id, signed_at)
    return Verdict(None, SCHEME, key_id, signed_at)


def _read_signature(header: str) -> tuple[int | None, list[bytes]]:
    """The time, None unless there is exactly one, and every ``v1``."""
    times: list[str] = []
    signatures: list[bytes] = []
    for part in header.split(","):
        name, _, value = part.partition("=")
        if name == "t":
            times.append(value)
        elif name == "v1":
            signatures.append(value.encode("utf-8", "replace"))
    signed_at = int(times[0]) if len(times) == 1 and _SECONDS.match(times[0]) else None
    return signed_at, signatures


def split(body: bytes) -> list[RawEvent]:
    """The one event of a body, keyed by its root transaction: payment intent, else charge, else the object itself.

    A thin event names no resource here and is keyed by its own id. Raises ``Failure`` INVALID when the body is not JSON
    or has no ``data.object.id``.
    """
    try:
        event = _read_event(body)
        thin = event.object == _THIN
        data = None if thin else _read_data(event.data)
    except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
        raise Failure(FailureKind.INVALID, "BODY_UNPARSABLE") from None
    if thin:
        key = _read_id(event.id, "id")
    else:
        resource = (data.object if data else None) or _Resource()
        key = _read_id(resource.id, "data.object.id")
        for parent in (resource.payment_intent, resource.charge):
            reference = parent.get("id") if isinstance(parent, dict) else parent  # an expanded object
            if isinstance(reference, str) and reference:
                key = _read_id(reference, "data.object")
                break
    return [
        RawEvent(
            key=key,
            body=body,
            delivery_id=_read_text(event.id),
            event_type=_read_text(event.type),
            occurred_at=_read_time(event.created),
        )
    ]


def _read_id(value: Any, field: str) -> str:
    if not isinstance(value, str) or not value:
        raise Failure(FailureKind.INVALID, "OBJECT_ID_MISSING", field)
    if len(value) > _LONGEST_ID:
        raise Failure(FailureKind.INVALID, "OBJECT_ID_TOO_LONG", field)
    return value


def _read_text(value: Any) -> str:
    return value if isinstance(value, str) and len(value) <= _LONGEST_ID else ""


def _read_time(created: Any) -> float | None:
    """Seconds since the epoch: snapshot events write an integer, thin events ISO 8601."""
    if isinstance(created, int | float) and not isinstance(created, bool):
        return float(created) if abs(created) < 1e12 else None
    if isinstance(created, str):
        try:
            return datetime.fromisoformat(created).timestamp()
        except (ValueError, OverflowError, OSError):
            return None
    return None


GATEWAY = Gateway(
    name="stripe",
    display_name="Stripe",
    status=Status.SANDBOX,
    documentation="https://docs.stripe.com/webhooks",
    verify=verify,
    split=split,
    # Names, addresses, contacts and free text of payer and evidence, bank account numbers, and members that are
    # credentials (client_secret, links that open a receipt or an invoice). Ids, amounts, states, times, card brand and
    # last four digits stay; so does metadata, which is the user's own.
    sensitive_members=frozenset({
        "account_holder_name", "account_number", "billing_address", "buyer_email", "city", "client_secret",
        "customer_address", "customer_email", "customer_email_address", "customer_name", "customer_phone",
        "customer_purchase_ip", "description", "email", "hosted_invoice_url", "iban", "invoice_pdf", "ip_address",
        "line1", "line2", "name", "phone", "postal_code", "product_description", "receipt_email", "receipt_url",
        "shipping_address", "uncategorized_text", "verified_email", "verified_name", "verified_phone",
    }),
)  # fmt: skip

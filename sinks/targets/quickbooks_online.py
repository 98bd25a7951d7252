"""QuickBooks Online: a capture becomes a Payment, a refund a RefundReceipt, in one company (realm).

Facts read 2026 from Intuit's API reference and developer blog: ``POST /v3/company/{realm}/{entity}``; the query
parameter ``requestid`` (at most 50 characters, unique per company) makes the service answer a repeated request with the
stored first answer; errors come as ``Fault`` with codes, also at HTTP 200; 500 requests a minute, 10 a second and 10 at
once per company; ``DocNumber`` has at most 21 characters.

Quirks:

* No figure is published for how long a ``requestid`` is remembered. A site that found one says so
  (``requestid_window_hours``) and has class A; without it nothing is resent (class D).
* A Payment is not linked to an invoice: it is the customer's credit until somebody applies it.
* QuickBooks has no document for chargebacks and reversals: the site decides whether they are left out or become dead
  letters.
* A Fault at 5xx says nothing about the posting (AMBIGUOUS, as the status); one at 200 that we do not know, neither.
* No patient is named: amounts go to a customer of the settings, with the gateway's own id as the note.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import urlsplit
from zoneinfo import ZoneInfo

import msgspec
from pydantic import Field, FilePath, model_validator

from schemas.events import Kind, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.mapping import FieldMapping, build_view
from schemas.tenancy import Name
from sinks.contract import (
    HttpHead,
    HttpResponse,
    PostingContext,
    Rate,
    Request,
    Target,
    TargetClass,
    Verdict,
    speaks_of_record,
)
from sinks.references import derive
from sinks.transport import RefreshTokenSettings, use_refresh_token

_MAPPING = Path(__file__).parent.parent / "mappings" / "quickbooks_online.yaml"
_PLACE = re.compile(r"([A-Z][A-Za-z]{1,40})(\.value)?\Z")
_OWN: Final = frozenset(
    {"Id", "SyncToken", "TotalAmt", "Line", "DepositToAccountRef", "PaymentRefNum", "DocNumber", "CurrencyRef"}
)
"""Members that the connector fills: the amount and what tells postings apart."""
_ENTITIES: Final = {Kind.CAPTURE: "payment", Kind.REFUND: "refundreceipt"}
_MEMBERS: Final = {"payment": "Payment", "refundreceipt": "RefundReceipt"}
_OTHERS: Final = frozenset({Kind.REFUND_REVERSAL, Kind.CHARGEBACK, Kind.CHARGEBACK_REVERSAL})
_NUMBER = re.compile(r"0*([1-9][0-9]{0,5})\Z")
_encoder = msgspec.json.Encoder(decimal_format="number")

_FAULTS: Final = {
    "120": FailureKind.AUTH,
    "3200": FailureKind.AUTH,
    "6190": FailureKind.AUTH,  # the subscription lapsed: nothing of this company can be posted until a person acts
    "3001": FailureKind.RATE_LIMITED,
    "5010": FailureKind.UNAVAILABLE,  # somebody else changed the object: not applied
    **dict.fromkeys(
        ("500", "610", "2020", "2170", "2500", "6000", "6140", "6210", "6240", "6540"), FailureKind.REJECTED
    ),
}
"""Codes of a Fault, without leading zeros. 6140 (document number taken) is a refusal: that it is our own document can
only be assumed."""


class QuickBooksSettings(RefreshTokenSettings):
    """One company in QuickBooks Online."""

    connections: int = Field(default=4, ge=1, le=10, description="Calls under way at once; Intuit allows 10.")
    realm: str = Field(pattern=r"^[0-9]{1,20}$", description="Company id (realm).")
    home_currency: str = Field(pattern=r"^[A-Z]{3}$", description="The company's home currency, ISO 4217.")
    multicurrency: bool = Field(
        default=False,
        description="Whether the company uses multicurrency. Without it an amount in another currency is a dead "
        "letter: it would be booked as home currency.",
    )
    customer: str = Field(pattern=r"^[0-9]{1,20}$", description="Id of the customer that amounts are booked to.")
    facility_customers: dict[Name, str] = Field(
        default_factory=dict, description="Customer ids by facility, where they differ."
    )
    deposit_account: str = Field(
        pattern=r"^[0-9]{1,20}$",
        description="Id of the account (bank or other current asset) for the money.",
    )
    refund_item: str = Field(pattern=r"^[0-9]{1,20}$", description="Id of the item on the line of a refund receipt.")
    other_movements: Literal["skip", "dead_letter"] = Field(
        description="Chargebacks and reversals, for which QuickBooks has no document: `skip` when they are booked "
        "elsewhere, `dead_letter` when a person shall see each."
    )
    requestid_window_hours: float | None = Field(
        default=None,
        gt=0,
        description="How long a repeated `requestid` is surely recognised. Intuit publishes no figure; without one, a "
        "request whose outcome is unknown is not sent again and a person decides.",
    )
    mapping_overlay: FilePath | None = Field(
        default=None, description="YAML file with more fields (see docs/adding-a-target.md)."
    )

    @model_validator(mode="after")
    def _agree(self) -> QuickBooksSettings:
        for part in _load_mapping(self.mapping_overlay).fields:
            match = _PLACE.match(part.to)
            if match is None or match[1] in _OWN:
                raise ValueError(f"mapping_overlay: {part.to} is not a member that a mapping may fill")
        return self


def classify(settings: QuickBooksSettings) -> TargetClass:
    """A with a known window of ``requestid``, else D."""
    return TargetClass.D if window(settings) is None else TargetClass.A


def window(settings: QuickBooksSettings) -> float | None:
    """How many seconds a repeated ``requestid`` is recognised; None when nobody knows."""
    hours = settings.requestid_window_hours
    return None if hours is None else hours * 3600


def routes(event: MoneyEvent, settings: QuickBooksSettings) -> bool:
    """Captures and refunds of its facilities; chargebacks and reversals when each shall become a dead letter."""
    if event.facility not in settings.facilities:
        return False
    return event.kind in _ENTITIES or (event.kind in _OTHERS and settings.other_movements == "dead_letter")


def freeze(event: MoneyEvent, context: PostingContext, settings: QuickBooksSettings) -> Request:
    """The document. ``requestid`` and our reference are functions of the event and the company.

    They do not depend on the instance's name: who renames it, or names a company twice, meets the stored answers.
    """
    entity = _ENTITIES.get(Kind(event.kind))
    if entity is None:
        raise Failure(FailureKind.UNMAPPED, "KIND_WITHOUT_DOCUMENT", "kind")
    money = event.money
    if money.minor <= 0:
        raise Failure(FailureKind.INVALID, "AMOUNT_NOT_POSITIVE", "money.minor")
    if money.currency != settings.home_currency and not settings.multicurrency:
        raise Failure(FailureKind.UNMAPPED, "CURRENCY_FOREIGN", "money.currency")
    seed = f"quickbooks|{settings.realm}|{entity}|{event.event_id}"
    request_id, reference = derive(context.mark_key(f"requestid|{seed}"), 40), derive(f"reference|{seed}", 16)
    zone = ZoneInfo(context.facility.time_zone)
    day = datetime.fromtimestamp(event.occurred_at / 1000, UTC).astimezone(zone)
    view = build_view(
        event,
        posting={
            "customer": settings.facility_customers.get(event.facility, settings.customer),
            "date": day.strftime("%Y-%m-%d"),
        },
    )
    # Exact: a Decimal is written with its own digits, no float is made of it.
    amount = Decimal(money.major())
    document = _arrange(_load_mapping(settings.mapping_overlay).apply(view))
    if settings.multicurrency:
        document["CurrencyRef"] = {"value": money.currency}
    document["DepositToAccountRef"] = {"value": settings.deposit_account}
    if entity == "payment":
        document |= {"PaymentRefNum": reference, "TotalAmt": amount}
    else:
        detail = {"ItemRef": {"value": settings.refund_item}}
        document["DocNumber"] = reference
        document["Line"] = [{"Amount": amount, "DetailType": "SalesItemLineDetail", "SalesItemLineDetail": detail}]
    return Request(
        _encoder.encode(document),
        request_id,
        reference,
        "POST",
        f"{settings.choose_base(_HTTP)}/v3/company/{settings.realm}/{entity}?minorversion=75&requestid={request_id}",
        (("accept", "application/json"), ("content-type", "application/json")),
    )


def examine(response: HttpResponse, request: Request, _settings: QuickBooksSettings) -> Verdict | None:
    """A Fault by its code, where the status leaves it open; done only with the posted document's Id."""
    if not speaks_of_record(response.status):
        return None
    body = msgspec.json.decode(response.body)
    good = response.status // 100 == 2
    if "Fault" in body:
        return _read_fault(body["Fault"], good=good)
    if not good:
        return None
    entity = urlsplit(request.url).path.rpartition("/")[2]
    document_id = body[_MEMBERS[entity]]["Id"]
    if not isinstance(document_id, str) or not document_id:
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_ID")
    return Verdict(None, f"HTTP_{response.status}", reference=document_id)


def _read_fault(fault: Any, *, good: bool) -> Verdict:
    errors = fault.get("Error") if isinstance(fault, dict) else None
    given = [error.get("code") for error in errors if isinstance(error, dict)] if isinstance(errors, list) else []
    numbers = [match[1] for code in given if (match := _NUMBER.match(str(code)))]
    code = f"QBO_{numbers[0]}" if numbers else "QBO_FAULT"
    kinds = {_FAULTS.get(number) for number in numbers}
    if len(kinds) == 1 and len(numbers) == len(given) and (kind := kinds.pop()) is not None:
        return Verdict(kind, code)
    # Unknown, or several meanings: the status decides, and 200 with a Fault is no success.
    return Verdict(FailureKind.AMBIGUOUS if good else FailureKind.REJECTED, code)


def _arrange(mapped: dict[str, Any]) -> dict[str, Any]:
    """Mapped names as members: ``CustomerRef.value`` is a member of a member."""
    found: dict[str, Any] = {}
    for name, value in mapped.items():
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise Failure(FailureKind.UNMAPPED, "FIELD_NOT_TEXT", name)
        member, _, inner = name.partition(".")
        found[member] = {inner: str(value)} if inner else value
    return found


@lru_cache(maxsize=64)
def _load_mapping(overlay: Path | None) -> FieldMapping:
    return FieldMapping.load(_MAPPING, overlay, accepts_phi=TARGET.accepts_phi)


_HTTP = HttpHead(
    sandbox="https://sandbox-quickbooks.api.intuit.com",
    production="https://quickbooks.api.intuit.com",
    credential=use_refresh_token,
    token_url="https://oauth.platform.intuit.com/oauth2/v1/tokens/bearer",  # noqa: S106 - an address
    rates=(Rate(500, 60.0, burst=10), Rate(10, 1.0)),
    examine=examine,
)

TARGET = Target(
    name="quickbooks_online",
    display_name="QuickBooks Online (Payment, RefundReceipt)",
    status="sandbox",
    documentation="https://developer.intuit.com/app/developer/qbo/docs/api/accounting/all-entities/payment",
    transport="http",
    settings=QuickBooksSettings,
    classify=classify,
    window=window,
    routes=routes,
    freeze=freeze,
    http=_HTTP,
    accepts_phi=False,
    capabilities={
        "capture": "Payment, not linked to an invoice",
        "refund": "RefundReceipt from the deposit account",
        "multicurrency": "CurrencyRef, where the company uses it",
        "duplicate control": "same requestid and bytes at every attempt",
    },
)
"""Head of this connector."""

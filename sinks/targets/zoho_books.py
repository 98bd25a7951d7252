"""Zoho Books: a capture becomes a customer payment, a refund a refund of that payment, in one organisation.

Facts read 2026 from Zoho's OpenAPI documents (customer payments) and its help pages: ``PUT /customerpayments`` with
``X-Unique-Identifier-Key``, ``X-Unique-Identifier-Value`` and ``X-Upsert: true`` updates the payment whose unique
custom field has that value, or creates it; every call names ``organization_id``; the token goes as
``Zoho-oauthtoken``; ``POST /customerpayments/{id}/refunds`` refunds what a payment has not been applied to; answers
hold ``code`` (0 is success); 100 calls a minute per organisation, beside a plan's daily cap; ten new tokens in ten
minutes, refused with ``Access Denied`` at HTTP 200; each data centre has its own hosts.

Quirks:

* The unique field is made by a person (a custom field of payments that refuses duplicates). The value is in the body,
  too: whether the header alone stores it is not documented.
* A refund has no such field. It is posted to the payment's own id, which is read from Zoho by our reference just
  before, and looked up in that payment's refunds after an unknown outcome: an instance that posts refunds has class C,
  one that does not class B.
* Zoho refunds only what is not applied to invoices, so posting refunds and applying payments exclude each other.
* The codes for a refused token (14, 57) and too many calls (43, 44, 45) are not in the documents read. Taken so, they
  pause the target; nothing is lost should they mean something else.
* Zoho's list does not say that it repeats ``reference_number``; where it does, it must be ours.
* A payment in another currency than the organisation's is a dead letter: its exchange rate is not ours to choose.
* No patient is named: amounts go to a customer of the settings, with the gateway's own id as the description.
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from decimal import Decimal
from functools import lru_cache
from pathlib import Path
from typing import Any, Final, Literal
from urllib.parse import quote, urlencode, urlsplit
from zoneinfo import ZoneInfo

import msgspec
from pydantic import Field, FilePath, model_validator

from schemas.events import Kind, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.mapping import FieldMapping, build_view
from schemas.tenancy import Name
from sinks.contract import (
    Absent,
    Completion,
    Found,
    HttpHead,
    HttpResponse,
    LookUp,
    NextPage,
    PostingContext,
    Rate,
    Request,
    Target,
    TargetClass,
    TokenRecipe,
    Unclear,
    Verdict,
    make_recipe,
    speaks_of_record,
)
from sinks.references import derive
from sinks.transport import RefreshTokenSettings

_MAPPING = Path(__file__).parent.parent / "mappings" / "zoho_books.yaml"
_PLACE = re.compile(r"(payment|refund)\.([a-z][a-z_]{1,40})\Z")
_OWN: Final = frozenset(
    {"amount", "reference_number", "invoices", "custom_fields", "account_id", "from_account_id", "exchange_rate"}
)
"""Members that the connector fills: the amount and what tells postings apart."""
_ROOT_LENGTH: Final = 12
_OTHERS: Final = frozenset({Kind.REFUND_REVERSAL, Kind.CHARGEBACK, Kind.CHARGEBACK_REVERSAL})
_ID = re.compile(r"[0-9]{1,40}\Z")
_PAGE: Final = 200
_PAYMENTS: Final = "/books/v3/customerpayments"
_SEVERAL: Final = "SEVERAL_PAYMENTS"
_INEXACT: Final = "SEARCH_INEXACT"
"""Records of a page, as Zoho gives by default."""
_READ: Final = (("accept", "application/json"),)
_WRITE: Final = (("accept", "application/json"), ("content-type", "application/json"))
_encoder = msgspec.json.Encoder(decimal_format="number")

_CODES: Final = {
    14: FailureKind.AUTH,
    57: FailureKind.AUTH,
    43: FailureKind.RATE_LIMITED,
    44: FailureKind.RATE_LIMITED,
    45: FailureKind.RATE_LIMITED,
}


class ZohoSettings(RefreshTokenSettings):
    """One organisation in Zoho Books. Zoho has no test system: a sandbox is another organisation."""

    data_center: Literal["com", "eu", "in", "com.au", "sa"] = Field(
        description="Domain of the data centre that holds the organisation, as in `books.zoho.COM`."
    )
    organization: str = Field(pattern=r"^[0-9]{1,20}$", description="Id of the organisation.")
    currency: str = Field(pattern=r"^[A-Z]{3}$", description="The organisation's currency, ISO 4217.")
    customer: str = Field(pattern=r"^[0-9]{1,20}$", description="Id of the customer that amounts are booked to.")
    facility_customers: dict[Name, str] = Field(
        default_factory=dict, description="Customer ids by facility, where they differ."
    )
    account: str = Field(
        pattern=r"^[0-9]{1,20}$", description="Id of the cash or bank account for the money, in and out."
    )
    payment_mode: str = Field(
        default="creditcard", min_length=1, max_length=50, description="How the money moved, in Zoho's words."
    )
    unique_field: str = Field(
        pattern=r"^cf_[a-z0-9_]{1,60}$",
        description="API name of the custom field of payments that refuses duplicate values. Without such a field "
        "payments would be doubled after a timeout.",
    )
    unique_label: str = Field(min_length=1, max_length=100, description="Label of that custom field.")
    apply_to_invoices: bool = Field(
        default=False,
        description="Apply a payment to the invoice whose Zoho id the event carries as its invoice. Without it a "
        "payment is the customer's credit until somebody applies it.",
    )
    refunds: Literal["post", "skip", "dead_letter"] = Field(
        description="`post` them (the instance has class C then), `skip` when they are booked elsewhere, `dead_letter` "
        "when a person shall see each."
    )
    other_movements: Literal["skip", "dead_letter"] = Field(
        description="Chargebacks and reversals, for which Zoho Books has no document: `skip` when they are booked "
        "elsewhere, `dead_letter` when a person shall see each."
    )
    mapping_overlay: FilePath | None = Field(
        default=None, description="YAML file with more fields (see docs/adding-a-target.md)."
    )

    @model_validator(mode="after")
    def _agree(self) -> ZohoSettings:
        if self.apply_to_invoices and self.refunds == "post":
            raise ValueError(
                'apply_to_invoices and refunds = "post" exclude each other: what is applied is not refunded'
            )
        for part in _load_mapping(self.mapping_overlay).fields:
            match = _PLACE.match(part.to)
            if match is None or match[2] in _OWN:
                raise ValueError(f"mapping_overlay: {part.to} is not a member that a mapping may fill")
        return self

    def choose_base(self, head: HttpHead) -> str:
        """The data centre's API host, or the simulator."""
        return super().choose_base(head) if self.simulator_url else f"https://www.zohoapis.{self.data_center}"

    def choose_token_url(self, head: HttpHead) -> str:
        """The data centre's accounts host, or the simulator."""
        if self.simulator_url is not None:
            return super().choose_token_url(head)
        return f"https://accounts.zoho.{self.data_center}{_TOKEN_PATH}"


def classify(settings: ZohoSettings) -> TargetClass:
    """B for payments alone; C as soon as refunds are posted, which have no unique field."""
    return TargetClass.C if settings.refunds == "post" else TargetClass.B


def routes(event: MoneyEvent, settings: ZohoSettings) -> bool:
    """Captures of its facilities; refunds and the other movements as the settings say."""
    if event.facility not in settings.facilities:
        return False
    if event.kind == Kind.REFUND:
        return settings.refunds != "skip"
    return event.kind == Kind.CAPTURE or (event.kind in _OTHERS and settings.other_movements == "dead_letter")


def freeze(event: MoneyEvent, context: PostingContext, settings: ZohoSettings) -> Request:
    """The payment or refund. Keys are functions of the event and the organisation, not of the instance's name.

    Our reference is ``ROOT-EVENT``: refunds find their payment by its first half.
    """
    is_refund = event.kind == Kind.REFUND
    if event.kind != Kind.CAPTURE and not (is_refund and settings.refunds == "post"):
        raise Failure(FailureKind.UNMAPPED, "KIND_WITHOUT_DOCUMENT", "kind")
    money = event.money
    if money.minor <= 0:
        raise Failure(FailureKind.INVALID, "AMOUNT_NOT_POSITIVE", "money.minor")
    if money.currency != settings.currency:
        raise Failure(FailureKind.UNMAPPED, "CURRENCY_FOREIGN", "money.currency")
    seed = f"zoho|{settings.organization}"
    key = derive(f"key|{seed}|{event.kind}|{event.event_id}", 40)
    root = derive(f"root|{seed}|{event.source}|{event.account}|{event.root}", _ROOT_LENGTH)
    reference = f"{root}-{derive(f'reference|{seed}|{event.kind}|{event.event_id}', 12)}"
    day = datetime.fromtimestamp(event.occurred_at / 1000, UTC).astimezone(ZoneInfo(context.facility.time_zone))
    view = build_view(
        event,
        posting={
            "customer": settings.facility_customers.get(event.facility, settings.customer),
            "date": day.strftime("%Y-%m-%d"),
            "mode": settings.payment_mode,
        },
    )
    mapped = _load_mapping(settings.mapping_overlay).apply(view)
    document = _pick_members(mapped, "refund" if is_refund else "payment")
    # Exact: a Decimal is written with its own digits, no float is made of it.
    amount = Decimal(money.major())
    document |= {"amount": amount, "reference_number": reference}
    path = f"{settings.choose_base(_HTTP)}{_PAYMENTS}"
    organization = f"organization_id={settings.organization}"
    if is_refund:
        document["from_account_id"] = settings.account
        url = f"{path}/{root}-/refunds?{organization}"
        return Request(_encoder.encode(document), key, reference, "POST", url, _WRITE)
    document |= {
        "account_id": settings.account,
        "invoices": _list_invoices(event, amount) if settings.apply_to_invoices else [],
        "custom_fields": [{"label": settings.unique_label, "value": key}],
    }
    upsert = (
        ("x-unique-identifier-key", settings.unique_field),
        ("x-unique-identifier-value", key),
        ("x-upsert", "true"),
    )
    return Request(_encoder.encode(document), key, reference, "PUT", f"{path}?{organization}", (*_WRITE, *upsert))


def examine(response: HttpResponse, request: Request, _settings: ZohoSettings) -> Verdict | None:
    """Done only with code 0 and the id of a posting with our reference."""
    if not speaks_of_record(response.status):
        return None
    body = msgspec.json.decode(response.body)
    good = response.status // 100 == 2
    error = _read_error(body, good=good)
    if error is not None or not good:
        return error
    if _is_refund(request):
        entries, name = body["payment_refunds"], "payment_refund_id"
        entries = entries if isinstance(entries, list) else [entries]
        entries = [entry for entry in entries if entry.get("reference_number") == request.reference]
    else:
        entries, name = [body["payment"]], "payment_id"
        if entries[0].get("reference_number", request.reference) != request.reference:
            return Verdict(FailureKind.AMBIGUOUS, "ANSWER_OF_ANOTHER")
    if len(entries) != 1 or not _ID.match(str(entries[0].get(name, ""))):
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_ID")
    return Verdict(None, f"HTTP_{response.status}", reference=str(entries[0][name]))


def ask_payment(request: Request, _settings: ZohoSettings) -> Request | None:
    """For a refund: which payment has our reference of the lineage's root."""
    return _search(request, "reference_number_startswith", _read_root(request)) if _is_refund(request) else None


def read_payment(
    response: HttpResponse, page: Request, request: Request, _settings: ZohoSettings
) -> str | Verdict | NextPage | None:
    """The address of that payment's refunds. A payment that is not there (yet) keeps the refund waiting."""
    if not speaks_of_record(response.status):
        return None
    body = msgspec.json.decode(response.body)
    good = response.status // 100 == 2
    error = _read_error(body, good=good)
    if error is not None or not good:
        return None if error is None else _make_harmless(error)
    found = _find_payment(body, page, request)
    if isinstance(found, NextPage):
        return found
    if found is None:
        return Verdict(FailureKind.UNAVAILABLE, "PAYMENT_NOT_FOUND")
    if isinstance(found, Unclear):
        # Which of the lineage's captures a refund belongs to, the event does not say.
        kind = FailureKind.REJECTED if found.code == _SEVERAL else FailureKind.UNAVAILABLE
        return Verdict(kind, found.code)
    return _name_refunds(request, found)


def ask_posting(request: Request, _first_write_at: int, _settings: ZohoSettings) -> Request:
    """The payment with our reference; for a refund, first the payment it belongs to."""
    if _is_refund(request):
        return _search(request, "reference_number_startswith", _read_root(request))
    return _search(request, "reference_number", request.reference)


def read_posting(
    response: HttpResponse, page: Request, request: Request, _settings: ZohoSettings
) -> Found | Absent | NextPage | Unclear | None:
    """A payment by its reference, or a refund in the whole list of its payment's refunds."""
    if response.status // 100 != 2:
        return None
    body = msgspec.json.decode(response.body)
    if _read_error(body, good=True) is not None:
        return Unclear("ANSWER_NOT_A_LIST")
    if _is_refund(page):
        return _find_refund(body, page, request)
    found = _find_payment(body, page, request)
    if isinstance(found, NextPage | Unclear):
        return found
    if not _is_refund(request):
        return Absent() if found is None else Found(found)
    if found is None:
        return Unclear("PAYMENT_NOT_FOUND")
    return NextPage(_make_question(request, f"{_name_refunds(request, found)}&page=1&per_page={_PAGE}"))


def _find_payment(body: Any, page: Request, request: Request) -> str | NextPage | Unclear | None:
    """The id of the one payment with our reference; None when there is none.

    The documented list shows no references, and a filter that was not understood would list another's payment: the one
    it lists is asked for itself.
    """
    whole = not _is_refund(request)
    wanted = request.reference if whole else _read_root(request)
    path = urlsplit(page.url).path
    if not path.endswith(_PAYMENTS):
        payment = body["payment"]
        if str(payment["payment_id"]) != path.rpartition("/")[2]:
            return Unclear("ANSWER_OF_ANOTHER")
        return str(payment["payment_id"]) if _names(payment["reference_number"], wanted, whole) else Unclear(_INEXACT)
    found = _list_payments(body, wanted, whole=whole)
    if isinstance(found, Unclear):
        return found
    if len(found) > 1:
        return Unclear(_SEVERAL)
    if not found:
        return None
    parts = urlsplit(request.url)
    return NextPage(_make_question(request, f"{parts.scheme}://{parts.netloc}{_PAYMENTS}/{found[0]}?{parts.query}"))


def _name_refunds(request: Request, payment: str) -> str:
    return request.url.replace(f"/{_read_root(request)}/", f"/{payment}/", 1)


def _names(reference: object, wanted: str, whole: bool) -> bool:  # noqa: FBT001
    return isinstance(reference, str) and (reference == wanted if whole else reference.startswith(wanted))


def _find_refund(body: Any, page: Request, request: Request) -> Found | Absent | NextPage | Unclear:
    entries = body["payment_refunds"]
    ours = [entry for entry in entries if entry["reference_number"] == request.reference]
    if len(ours) > 1:
        return Unclear("SEVERAL_REFUNDS")
    if ours:
        return Found(str(ours[0]["payment_refund_id"]))
    if not _has_more(body, entries):
        return Absent()
    head, _, number = page.url.rpartition("&page=")
    return NextPage(_make_question(request, f"{head}&page={int(number.partition('&')[0]) + 1}&per_page={_PAGE}"))


def _list_payments(body: Any, wanted: str, *, whole: bool) -> list[str] | Unclear:
    """Ids of the payments listed; Unclear when the search was not the one asked for, or is not all of it."""
    entries = body["customer_payments"]
    for entry in entries:
        # A filter that was not understood lists everything.
        if not _names(entry.get("reference_number", wanted), wanted, whole):
            return Unclear(_INEXACT)
    if _has_more(body, entries):
        return Unclear("LIST_CUT")
    found = [str(entry["payment_id"]) for entry in entries]
    return found if all(map(_ID.match, found)) else Unclear("ANSWER_WITHOUT_ID")


def _has_more(body: Any, entries: list[Any]) -> bool:
    more = body.get("page_context", {}).get("has_more_page")
    return more if isinstance(more, bool) else len(entries) >= _PAGE


def _search(request: Request, name: str, value: str) -> Request:
    parts = urlsplit(request.url)
    base = f"{parts.scheme}://{parts.netloc}{_PAYMENTS}"
    query = urlencode({name: value, "page": 1, "per_page": _PAGE}, quote_via=quote)
    return _make_question(request, f"{base}?{parts.query}&{query}")


def _make_question(request: Request, url: str) -> Request:
    return Request(b"", request.control_id, request.reference, "GET", url, _READ)


def _is_refund(request: Request) -> bool:
    return urlsplit(request.url).path.endswith("/refunds")


def _read_root(request: Request) -> str:
    return request.reference[: _ROOT_LENGTH + 1]


def _read_error(body: Any, *, good: bool) -> Verdict | None:
    code = body.get("code")
    if isinstance(code, bool) or not isinstance(code, int):
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_CODE") if good else None
    if not code and good:
        return None
    # An error at 200 that we do not know says nothing about the posting.
    kind = _CODES.get(code, FailureKind.AMBIGUOUS if good else FailureKind.REJECTED)
    return Verdict(kind, f"ZOHO_{abs(code)}")


def _make_harmless(error: Verdict) -> Verdict:
    """A question changed nothing, whatever became of it."""
    return Verdict(FailureKind.UNAVAILABLE, error.code) if error.kind is FailureKind.AMBIGUOUS else error


def _list_invoices(event: MoneyEvent, amount: Decimal) -> list[dict[str, Any]]:
    if event.invoice is None:
        return []
    if not _ID.match(event.invoice):
        raise Failure(FailureKind.UNMAPPED, "INVOICE_NOT_AN_ID", "invoice")
    return [{"invoice_id": event.invoice, "amount_applied": amount}]


def _pick_members(mapped: dict[str, Any], wanted: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in mapped.items():
        document, _, member = name.partition(".")
        if document != wanted:
            continue
        if not isinstance(value, str):
            raise Failure(FailureKind.UNMAPPED, "FIELD_NOT_TEXT", name)
        found[member] = value
    return found


@lru_cache(maxsize=64)
def _load_mapping(overlay: Path | None) -> FieldMapping:
    return FieldMapping.load(_MAPPING, overlay, accepts_phi=TARGET.accepts_phi)


def use_token(settings: ZohoSettings, token_url: str) -> TokenRecipe:
    """Zoho's renewal: the app's secret in the form; too many renewals are refused at HTTP 200."""
    return make_recipe(
        token_url,
        grant_type="refresh_token",
        client_id=settings.client_id,
        client_secret=settings.client_secret,
        secret_in_body=True,
        errors={"Access Denied": FailureKind.RATE_LIMITED},
    )


_TOKEN_PATH: Final = "/oauth/v2/token"  # noqa: S105 - an address
_HTTP = HttpHead(
    sandbox="https://www.zohoapis.com",
    production="https://www.zohoapis.com",
    credential=use_token,
    token_url=f"https://accounts.zoho.com{_TOKEN_PATH}",
    regions=tuple(
        f"https://{host}.{domain}"
        for host in ("www.zohoapis", "accounts.zoho")
        for domain in ("eu", "in", "com.au", "sa")
    ),
    scheme="Zoho-oauthtoken",
    rates=(Rate(100, 60.0, burst=10),),
    examine=examine,
    completion=Completion(ask=ask_payment, read=read_payment),
    look_up=LookUp(ask=ask_posting, read=read_posting, visible_after=5.0),
)

TARGET = Target(
    name="zoho_books",
    display_name="Zoho Books (customer payments and their refunds)",
    status="sandbox",
    documentation="https://www.zoho.com/books/api/v3/customer-payments/",
    transport="http",
    settings=ZohoSettings,
    classify=classify,
    routes=routes,
    freeze=freeze,
    http=_HTTP,
    accepts_phi=False,
    capabilities={
        "capture": "Customer payment, by upsert on a unique custom field",
        "capture on an invoice": "Applied to the invoice whose Zoho id the event carries, by setting",
        "refund": "Refund of that payment from the same account, by setting",
        "duplicate control": "Upsert headers with one key per event; refunds are looked up by our reference",
        "data centres": "com, eu, in, com.au, sa",
    },
)
"""Head of this connector."""

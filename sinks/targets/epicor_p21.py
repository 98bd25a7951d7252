"""Epicor Prophet 21: a capture becomes a cash receipt, a refund a credit memo, over the tenant's own middleware.

There is no public reference of the vendor. Facts read 2026 in the community's documents, verified by their authors on
tenants of 25.2 and 26.1: ``POST /api/security/token/v2`` with JSON; ``POST {ui server}/api/v2/transaction`` with
``Name``, ``UseCodeValues``, ``Transactions`` of ``DataElements`` whose ``Edits`` are names and text values; HTTP 200
also on failure, told by ``Summary.Failed``; read-only OData tables under ``/odataservice/odata/table/``; no idempotency
key.

Quirks:

* The names of the services for cash receipts and credit memos, and of their fields, are not documented: each tenant
  reads its own (``GET /api/v2/services`` and ``/api/v2/definition/NAME``) and writes them into the settings. The order
  of the fields there is the order in which they are entered: each fires the screen's logic.
* Class C: our reference is entered in a field of the document, and after an unknown outcome the tenant's table is
  asked for it. ``IgnoreDisabled`` is never sent: with it a transaction may succeed and write nothing.
* A failed transaction is a refusal, except where the message tells of a broken session (``Unexpected response
  window``, ``Object reference not set``): that says nothing about the document.
* Some middleware answers XML whatever is asked. Such an answer is not read: its outcome is looked up.
* A declined payment moves no money: it is posted only where the settings name a screen for it.
* Statuses become Prophet 21's words by the mapping's table: approved is ``Paid``, declined ``Payment Failed``.
"""

from __future__ import annotations

import json
import re
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from urllib.parse import quote, urlencode, urlsplit
from zoneinfo import ZoneInfo

import msgspec
from pydantic import Field, FilePath, SecretStr, field_validator, model_validator

from schemas.events import Kind, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.mapping import FieldMapping, build_view
from schemas.tenancy import Name, Strict
from sinks.contract import (
    Absent,
    Found,
    HttpHead,
    HttpRequest,
    HttpResponse,
    LookUp,
    PostingContext,
    Rate,
    Request,
    Target,
    TargetClass,
    TokenRecipe,
    Unclear,
    Verdict,
    pick_record,
    read_grant,
)
from sinks.references import derive
from sinks.transport import HttpSettings

if TYPE_CHECKING:
    from collections.abc import Iterator

_MAPPING = Path(__file__).parent.parent / "mappings" / "epicor_p21.yaml"
_WORD = r"^[A-Za-z][A-Za-z0-9_.]{0,99}$"
_OWN: Final = frozenset({"amount", "reference"})
"""Fields that the connector fills: the amount and what tells postings apart."""
_OTHERS: Final = frozenset({Kind.REFUND_REVERSAL, Kind.CHARGEBACK, Kind.CHARGEBACK_REVERSAL})
_DECLINED: Final = frozenset({"declined", "failed"})
_OURS: Final = "1"
"""Number of our transaction in the answer: a request holds one."""
_SESSION: Final = ("Unexpected response window", "Object reference not set")
_DATES: Final = {"iso": "%Y-%m-%d", "us": "%m/%d/%Y"}
_TOKEN_PATH: Final = "/api/security/token/v2"  # noqa: S105 - an address


class Screen(Strict):
    """One document of the tenant: where it is entered, and where it is found again."""

    service: str = Field(pattern=_WORD, description="Name of the service, as `GET /api/v2/services` lists it.")
    element: str = Field(pattern=_WORD, description="Name of the data element, as its definition has it.")
    fields: dict[str, str] = Field(
        description="Our names to the definition's, in the order of entry: `amount`, `reference`, `company`, "
        "`customer`, `date`, `status`, `gl_account`, `name`, `description`, and what an overlay adds. What is not "
        "named here is not sent."
    )
    number_field: str = Field(pattern=_WORD, description="Field of the answer that holds the document's number.")
    table: str = Field(pattern=_WORD, description="OData table of these documents.")
    reference_column: str = Field(pattern=_WORD, description="Its column with our reference.")
    number_column: str = Field(pattern=_WORD, description="Its column with the document's number.")

    @field_validator("fields")
    @classmethod
    def _name_reference(cls, given: dict[str, str]) -> dict[str, str]:
        if "reference" not in given:
            raise ValueError("fields must name `reference`: without it a document cannot be found again")
        for name in given.values():
            if not re.match(_WORD, name):
                raise ValueError("a field is named in letters, digits, dots and underscores")
        if len(set(given.values())) != len(given):
            raise ValueError("a field is named twice")
        return given


class AccountRule(Strict):
    """Which general-ledger account an event goes to. The rule with the most conditions holds."""

    kind: Literal["capture", "refund"] | None = Field(default=None, description="Transaction type; default: any.")
    category: str | None = Field(default=None, description="Service category; default: any.")
    account: str = Field(min_length=1, description="The account.")


class EpicorSettings(HttpSettings):
    """One company of a Prophet 21 tenant."""

    host: str = Field(
        pattern=r"^[a-z0-9]([a-z0-9-]*[a-z0-9])?(\.[a-z0-9]([a-z0-9-]*[a-z0-9])?)+$",
        description="Host of the tenant's middleware.",
    )
    ui_path: str = Field(
        default="/uiserver0",
        pattern=r"^/[A-Za-z0-9_/-]*[A-Za-z0-9_-]$",
        description="Path of its UI server, as `GET /api/ui/router/v1/?urlType=external` tells.",
    )
    user: str | None = Field(
        default=None, description="User of the middleware; without one, `secret` is a consumer key."
    )
    secret: SecretStr = Field(description="The user's password, or the consumer key.")
    company: str = Field(min_length=1, max_length=20, description="Company id.")
    customer: str = Field(min_length=1, max_length=40, description="Customer id that amounts are booked to.")
    facility_customers: dict[Name, str] = Field(
        default_factory=dict, description="Customer ids by facility, where they differ."
    )
    currency: str = Field(pattern=r"^[A-Z]{3}$", description="The company's currency, ISO 4217.")
    date_form: Literal["iso", "us"] = Field(description="How the tenant reads dates: 2026-03-01 or 03/01/2026.")
    receipt: Screen = Field(description="The cash receipt, for captures.")
    refunds: Literal["post", "skip", "dead_letter"] = Field(
        description="`post` them as credit memos, `skip` when they are booked elsewhere, `dead_letter` when a person "
        "shall see each."
    )
    credit: Screen | None = Field(default=None, description='The credit memo, with `refunds = "post"`.')
    declined: Screen | None = Field(
        default=None, description="Where declined payments are noted; without it they are not posted."
    )
    other_movements: Literal["skip", "dead_letter"] = Field(
        description="Chargebacks and reversals: `skip` when they are booked elsewhere, `dead_letter` when a person "
        "shall see each."
    )
    gl_accounts: tuple[AccountRule, ...] = Field(
        default=(), description="General-ledger accounts by transaction type and service category."
    )
    category_attribute: str = Field(
        default="service_category", min_length=1, description="Attribute of the event with the service category."
    )
    name_attributes: tuple[str, ...] = Field(
        default=(), description="Attributes of the event that make the payer's name, joined into its one field."
    )
    mapping_overlay: FilePath | None = Field(
        default=None, description="YAML file with more fields (see docs/adding-a-target.md)."
    )

    @model_validator(mode="after")
    def _agree(self) -> EpicorSettings:
        if (self.refunds == "post") != (self.credit is not None):
            raise ValueError('credit goes with refunds = "post"')
        known = {part.to for part in _load_mapping(self.mapping_overlay).fields}
        if known & _OWN:
            raise ValueError(
                f"mapping_overlay: {', '.join(sorted(known & _OWN))} is not a field that a mapping may fill"
            )
        for name in ("receipt", "credit", "declined"):
            screen: Screen | None = getattr(self, name)
            if screen is None:
                continue
            if name != "declined" and "amount" not in screen.fields:
                raise ValueError(f"{name}.fields must name `amount`")
            if strange := set(screen.fields) - known - _OWN:
                raise ValueError(f"{name}.fields: nothing fills {', '.join(sorted(strange))}")
        places: dict[tuple[str, str], tuple[str, ...]] = {}
        for screen in filter(None, (self.receipt, self.credit, self.declined)):
            place = (screen.table, screen.reference_column, screen.number_column, screen.number_field)
            # A document is looked up by the service and element it was entered in.
            if places.setdefault((screen.service, screen.element), place) != place:
                raise ValueError(
                    f"{screen.service} {screen.element}: one place of entry has one table, with its columns and number"
                )
        conditions = [(rule.kind, rule.category) for rule in self.gl_accounts]
        if len(set(conditions)) != len(conditions):
            raise ValueError("gl_accounts: two rules have the same conditions")
        return self

    def choose_base(self, head: HttpHead) -> str:
        """The tenant's middleware, or the simulator."""
        return super().choose_base(head) if self.simulator_url else f"https://{self.host}"

    def choose_token_url(self, head: HttpHead) -> str:
        """The token endpoint of the same middleware."""
        return f"{self.choose_base(head)}{_TOKEN_PATH}"


def classify(_settings: EpicorSettings) -> TargetClass:
    """C: documents are looked up by our reference."""
    return TargetClass.C


def routes(event: MoneyEvent, settings: EpicorSettings) -> bool:
    """Captures of its facilities; declined ones, refunds and other movements as the settings say."""
    if event.facility not in settings.facilities:
        return False
    if event.kind == Kind.CAPTURE:
        return not _is_declined(event) or settings.declined is not None
    if event.kind == Kind.REFUND:
        return settings.refunds != "skip"
    return event.kind in _OTHERS and settings.other_movements == "dead_letter"


def freeze(event: MoneyEvent, context: PostingContext, settings: EpicorSettings) -> Request:
    """The document. Key and reference are functions of the event and the company, not of the instance's name."""
    screen = _choose_screen(event, settings)
    money = event.money
    if money.minor <= 0:
        raise Failure(FailureKind.INVALID, "AMOUNT_NOT_POSITIVE", "money.minor")
    if money.currency != settings.currency:
        raise Failure(FailureKind.UNMAPPED, "CURRENCY_FOREIGN", "money.currency")
    seed = f"p21|{settings.host}|{settings.company}|{event.kind}|{event.event_id}"
    reference = derive(f"reference|{seed}", 16)
    day = datetime.fromtimestamp(event.occurred_at / 1000, UTC).astimezone(ZoneInfo(context.facility.time_zone))
    names = [event.attributes[name] for name in settings.name_attributes if event.attributes.get(name)]
    view = build_view(
        event,
        posting={
            "company": settings.company,
            "customer": settings.facility_customers.get(event.facility, settings.customer),
            "date": day.strftime(_DATES[settings.date_form]),
            "gl_account": _choose_account(event, settings),
            "name": " ".join(names) or None,
        },
    )
    values = _load_mapping(settings.mapping_overlay).apply(view)
    values |= {"amount": money.major(), "reference": reference}
    edits = []
    for ours, theirs in screen.fields.items():
        value = values.get(ours)
        if value is None or value == "":
            raise Failure(FailureKind.UNMAPPED, "FIELD_MISSING", ours)
        if not isinstance(value, str):
            raise Failure(FailureKind.UNMAPPED, "FIELD_NOT_TEXT", ours)
        edits.append({"Name": theirs, "Value": value})
    rows = [{"Edits": edits, "RelativeDateEdits": []}]
    element = {"Name": screen.element, "Type": "Form", "Keys": [], "Rows": rows}
    document = {
        "Name": screen.service,
        "UseCodeValues": False,
        "Transactions": [{"Status": "New", "DataElements": [element]}],
    }
    return Request(
        msgspec.json.encode(document),
        derive(f"key|{seed}", 40),
        reference,
        "POST",
        f"{settings.choose_base(_HTTP)}{settings.ui_path}/api/v2/transaction",
        (("accept", "application/json"), ("content-type", "application/json")),
    )


def examine(response: HttpResponse, request: Request, settings: EpicorSettings) -> Verdict | None:
    """Done only when one transaction succeeded, none failed, and the document has a number."""
    if response.status // 100 != 2:
        return None
    body = msgspec.json.decode(response.body)
    return pick_record(_OURS, _read_transactions(body, _find_screen(request, settings), f"HTTP_{response.status}"))


def _read_transactions(body: Any, screen: Screen, code: str) -> Iterator[tuple[str, Verdict]]:
    """What the answer says of each transaction, by its number. We send one, so the summary speaks of it too."""
    counts = tuple(_read_count(body["Summary"][name]) for name in ("Succeeded", "Failed", "Other"))
    # A transaction that failed has no result.
    transactions = [] if body["Results"] is None else body["Results"]["Transactions"]
    if counts not in ((1, 0, 0), (0, 1, 0)) or len(transactions) > 1:
        yield _OURS, Verdict(FailureKind.AMBIGUOUS, "P21_SUMMARY")
        return
    not_passed = Verdict(FailureKind.AMBIGUOUS, "P21_NOT_PASSED")
    if counts == (0, 1, 0):
        messages = " ".join(body["Messages"])
        not_passed = Verdict(FailureKind.REJECTED, "P21_FAILED")
        if any(sign in messages for sign in _SESSION):
            not_passed = Verdict(FailureKind.AMBIGUOUS, "P21_SESSION")
        yield _OURS, not_passed
    for number, transaction in enumerate(transactions, 1):
        passed = transaction["Status"] == "Passed"
        yield str(number), _read_document_number(transaction, screen, code) if passed else not_passed


def _read_document_number(transaction: Any, screen: Screen, code: str) -> Verdict:
    edits = [edit for part in transaction["DataElements"] for row in part["Rows"] for edit in row["Edits"]]
    numbers = {str(edit["Value"]) for edit in edits if edit["Name"] == screen.number_field and edit["Value"]}
    if len(numbers) != 1:
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_ID")
    return Verdict(None, code, reference=numbers.pop())


def ask_document(request: Request, _first_write_at: int, settings: EpicorSettings) -> Request:
    """The rows of the document's table with our reference."""
    screen = _find_screen(request, settings)
    parts = urlsplit(request.url)
    columns = ",".join(dict.fromkeys((screen.number_column, screen.reference_column)))
    query = urlencode(
        {"$select": columns, "$filter": f"{screen.reference_column} eq '{request.reference}'", "$top": "3"},
        quote_via=quote,
        safe="$",
    )
    return Request(
        b"",
        request.control_id,
        request.reference,
        "GET",
        f"{parts.scheme}://{parts.netloc}/odataservice/odata/table/{screen.table}?{query}",
        (("accept", "application/json"),),
    )


def read_document(
    response: HttpResponse, _page: Request, request: Request, settings: EpicorSettings
) -> Found | Absent | Unclear | None:
    """One row is our document, none is none."""
    if response.status // 100 != 2:
        return None
    rows = msgspec.json.decode(response.body)["value"]
    screen = _find_screen(request, settings)
    if not isinstance(rows, list) or any(row[screen.reference_column] != request.reference for row in rows):
        return Unclear("SEARCH_INEXACT")
    # A receipt that pays several invoices may have a row for each.
    numbers = {str(row[screen.number_column]) for row in rows}
    if len(numbers) > 1:
        return Unclear("SEVERAL_DOCUMENTS")
    return Found(numbers.pop()) if numbers else Absent()


def _choose_screen(event: MoneyEvent, settings: EpicorSettings) -> Screen:
    screen = None
    if event.kind == Kind.CAPTURE:
        screen = settings.declined if _is_declined(event) else settings.receipt
    elif event.kind == Kind.REFUND:
        screen = settings.credit
    if screen is None:
        raise Failure(FailureKind.UNMAPPED, "KIND_WITHOUT_DOCUMENT", "kind")
    return screen


def _find_screen(request: Request, settings: EpicorSettings) -> Screen:
    """The screen of a frozen request. Raises ``LookupError`` when the settings do not have it any more."""
    document = msgspec.json.decode(request.body)
    wanted = (document["Name"], document["Transactions"][0]["DataElements"][0]["Name"])
    for screen in (settings.receipt, settings.credit, settings.declined):
        if screen is not None and (screen.service, screen.element) == wanted:
            return screen
    raise LookupError


def _is_declined(event: MoneyEvent) -> bool:
    return event.status.lower() in _DECLINED


def _choose_account(event: MoneyEvent, settings: EpicorSettings) -> str | None:
    category = event.attributes.get(settings.category_attribute)
    fitting = [
        rule
        for rule in settings.gl_accounts
        if rule.kind in (None, event.kind) and (rule.category is None or rule.category == category)
    ]
    # A rule for the category beats one for the kind: two rules never have the same weight here.
    best = max(fitting, key=lambda rule: (rule.category is not None, rule.kind is not None), default=None)
    return None if best is None else best.account


def _read_count(given: Any) -> int:
    if isinstance(given, bool) or not isinstance(given, int):
        raise TypeError
    return given


@lru_cache(maxsize=64)
def _load_mapping(overlay: Path | None) -> FieldMapping:
    return FieldMapping.load(_MAPPING, overlay, accepts_phi=TARGET.accepts_phi)


def use_token(settings: EpicorSettings, token_url: str) -> TokenRecipe:
    """The middleware's own form: JSON in, ``AccessToken`` out; a new log-in instead of a renewal."""

    def request(_refresh: SecretStr | None) -> HttpRequest:
        secret = settings.secret.get_secret_value()
        if settings.user is None:
            given = {"ClientSecret": secret, "GrantType": "client_credentials"}
        else:
            given = {"username": settings.user, "password": secret}
        headers = {"accept": "application/json", "content-type": "application/json"}
        return HttpRequest("POST", token_url, headers, json.dumps(given).encode())

    def read(response: HttpResponse) -> Any:
        return read_grant(response, default_life=86_400.0, names=("AccessToken", "ExpiresInSeconds", "RefreshToken"))

    return TokenRecipe(request=request, read=read, refreshes=False)


_HTTP = HttpHead(
    sandbox="",
    production="",
    credential=use_token,
    # No limit is published; a UI session is a screen, and few of them serve everybody.
    rates=(Rate(5, 1.0, burst=2),),
    examine=examine,
    look_up=LookUp(ask=ask_document, read=read_document, visible_after=5.0),
)

TARGET = Target(
    name="epicor_p21",
    display_name="Epicor Prophet 21 (cash receipt, credit memo)",
    status="sandbox",
    documentation="https://github.com/mrwuss/p21-api-documentation",
    transport="http",
    settings=EpicorSettings,
    classify=classify,
    routes=routes,
    freeze=freeze,
    http=_HTTP,
    accepts_phi=False,
    capabilities={
        "capture": "Cash receipt, by the service that the tenant names",
        "refund": "Credit memo, by setting",
        "status": "Approved becomes Paid, declined Payment Failed, by the mapping's table",
        "declined": "Noted on a screen of its own, by setting; never a receipt",
        "general ledger": "Account by transaction type and service category",
        "name": "The payer's name in one field, from attributes",
        "duplicate control": "Look-up by our reference in the tenant's table",
    },
)
"""Head of this connector."""

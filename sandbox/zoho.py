"""A simulated Zoho Books organisation: token endpoint, customer payments by upsert, their refunds, lists.

It behaves as Zoho's OpenAPI documents say (read 2026), and where they are silent, in the hardest way: the unique value
is the one in the body's custom field (the header alone stores nothing, so that a payment without it is doubled), a
refund is posted as often as it is sent, and lists are cut into pages.
"""

from __future__ import annotations

import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from sandbox.http_receiver import Handler, Receiver, Reply

if TYPE_CHECKING:
    from aiohttp import web


@dataclass(frozen=True, slots=True)
class Refund:
    """A refund of a payment; ``amount`` in major units."""

    id: str
    amount: Decimal
    description: str
    reference: str


@dataclass(frozen=True, slots=True)
class Payment:
    """A customer payment; ``amount`` in major units."""

    id: str
    amount: Decimal
    description: str
    customer: str
    reference: str
    unique: str
    refunds: list[Refund] = field(default_factory=list)


class Organization(Receiver):
    """The simulator: one organisation with one unique custom field on its payments."""

    token_path = "/oauth/v2/token"  # noqa: S105 - an address

    def __init__(
        self, organization: str, *, client_id: str, client_secret: str, refresh_token: str, unique_label: str
    ) -> None:
        super().__init__()
        self.organization = organization
        self.payments: dict[str, Payment] = {}
        """By id. ``counts`` has ``updates``: upserts that met an existing payment."""
        self.page_length = 200
        self.most_tokens = 10
        self._expected = {"client_id": client_id, "client_secret": client_secret, "refresh_token": refresh_token}
        self._label = unique_label
        self._numbers = itertools.count(903_000_000_079_001)

    def list_writes(self) -> Iterable[tuple[str, str, Handler]]:
        """Upsert of payments and posting of refunds."""
        return (
            ("PUT", "/books/v3/customerpayments", self._upsert),
            ("POST", "/books/v3/customerpayments/{payment}/refunds", self._refund),
        )

    def list_reads(self) -> Iterable[tuple[str, str, Handler]]:
        """Payments, one of them, and its refunds."""
        return (
            ("GET", "/books/v3/customerpayments", self._list_payments),
            ("GET", "/books/v3/customerpayments/{payment}", self._show_one),
            ("GET", "/books/v3/customerpayments/{payment}/refunds", self._list_refunds),
        )

    def authorise(self, request: web.Request) -> Reply | None:
        """Zoho's own scheme, and the organisation that every call names."""
        given = request.headers.get("authorization", "")
        if not self.access_token or given != f"Zoho-oauthtoken {self.access_token}":
            return Reply(401, {"code": 57, "message": "You are not authorized to perform this operation"})
        if request.query.get("organization_id") != self.organization:
            return Reply(400, {"code": 6041, "message": "This user is not associated with the organization"})
        return None

    def fail_at_200(self) -> Reply:
        """A code that is not 0, with status 200."""
        return Reply(200, {"code": 1002, "message": "It cannot be recorded"})

    def serve_token(self, _request: web.Request, body: bytes) -> Reply:
        """A token for the refresh token, which stays; ``most_tokens`` of them, then none."""
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        if form.get("grant_type") != "refresh_token" or any(form.get(n) != v for n, v in self._expected.items()):
            return Reply(200, {"error": "invalid_code"})
        if self.counts["renewals"] >= self.most_tokens:
            return Reply(200, {"error": "Access Denied"})
        return Reply(200, {"access_token": self.issue_token(), "expires_in": 3600, "token_type": "Bearer"})

    def _upsert(self, request: web.Request, body: bytes) -> Reply:
        key = request.headers.get("x-unique-identifier-key", "")
        value = request.headers.get("x-unique-identifier-value", "")
        if not key.startswith("cf_") or not value:
            return Reply(400, {"code": 2, "message": "Invalid value passed for unique field"})
        try:
            given = json.loads(body, parse_float=Decimal, parse_int=Decimal)
            labels = {entry["label"]: entry["value"] for entry in given["custom_fields"]}
            payment = Payment(
                "",
                _read_amount(given["amount"]),
                given.get("description", ""),
                given["customer_id"],
                given["reference_number"],
                labels.get(self._label, ""),
            )
            _ = given["payment_mode"], given["invoices"], given["date"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return Reply(400, {"code": 2, "message": "Invalid value passed"})
        for known in self.payments.values():
            if known.unique == value:
                self.counts["updates"] += 1
                self.payments[known.id] = replace(payment, id=known.id, refunds=known.refunds)
                return _show_payment(self.payments[known.id], "The payment details have been updated.", 200)
        if request.headers.get("x-upsert") != "true":
            return Reply(404, {"code": 1012, "message": "Payment does not exist"})
        payment = replace(payment, id=str(next(self._numbers)))
        self.payments[payment.id] = payment
        return _show_payment(payment, "The payment from the customer has been recorded", 201)

    def _refund(self, request: web.Request, body: bytes) -> Reply:
        payment = self.payments.get(request.match_info["payment"])
        if payment is None:
            return Reply(404, {"code": 1012, "message": "Payment does not exist"})
        try:
            given = json.loads(body, parse_float=Decimal, parse_int=Decimal)
            _ = given["date"], given["from_account_id"]
            refund = Refund(
                str(next(self._numbers)),
                _read_amount(given["amount"]),
                given.get("description", ""),
                given.get("reference_number", ""),
            )
        except (ValueError, KeyError, TypeError):
            return Reply(400, {"code": 2, "message": "Invalid value passed"})
        if sum(known.amount for known in payment.refunds) + refund.amount > payment.amount:
            return Reply(400, {"code": 12007, "message": "The amount entered is more than the excess amount"})
        payment.refunds.append(refund)
        answer = {"code": 0, "message": "The refund information has been saved.", "payment_refunds": [_show(refund)]}
        return Reply(200, answer)

    def _list_payments(self, request: web.Request, _body: bytes) -> Reply:
        found = list(self.payments.values())
        if exact := request.query.get("reference_number"):
            found = [payment for payment in found if payment.reference == exact]
        if start := request.query.get("reference_number_startswith"):
            found = [payment for payment in found if payment.reference.startswith(start)]
        rows = [{"payment_id": payment.id, "amount": payment.amount, "payment_mode": "creditcard"} for payment in found]
        return self._show_page("customer_payments", rows, request)

    def _show_one(self, request: web.Request, _body: bytes) -> Reply:
        payment = self.payments.get(request.match_info["payment"])
        if payment is None:
            return Reply(404, {"code": 1012, "message": "Payment does not exist"})
        return _show_payment(payment, "success", 200)

    def _list_refunds(self, request: web.Request, _body: bytes) -> Reply:
        payment = self.payments.get(request.match_info["payment"])
        if payment is None:
            return Reply(404, {"code": 1012, "message": "Payment does not exist"})
        return self._show_page("payment_refunds", [_show(refund) for refund in payment.refunds], request)

    def _show_page(self, name: str, rows: list[dict[str, Any]], request: web.Request) -> Reply:
        page = int(request.query.get("page", "1"))
        length = min(int(request.query.get("per_page", "200")), self.page_length)
        shown, more = rows[(page - 1) * length : page * length], len(rows) > page * length
        context = {"page": page, "per_page": length, "has_more_page": more}
        return Reply(200, {"code": 0, "message": "success", name: shown, "page_context": context})


def _read_amount(given: object) -> Decimal:
    if not isinstance(given, Decimal) or given <= 0:
        raise ValueError
    return given


def _show(refund: Refund) -> dict[str, Any]:
    return {"payment_refund_id": refund.id, "amount": refund.amount, "reference_number": refund.reference}


def _show_payment(payment: Payment, message: str, status: int) -> Reply:
    shown = {"payment_id": payment.id, "amount": payment.amount, "reference_number": payment.reference}
    return Reply(status, {"code": 0, "message": message, "payment": shown})

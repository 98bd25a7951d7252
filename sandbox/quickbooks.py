"""A simulated QuickBooks Online company: token endpoint, Payment and RefundReceipt.

It behaves as Intuit's documents say (read 2026): a request with a ``requestid`` that was answered with a document gets
the stored answer again and posts nothing; errors are a ``Fault`` object; access tokens are asked with Basic
authorisation and a refresh token, and the refresh token is replaced at each answer (here the old one dies at once, the
hardest case). Without ``requestid`` every request posts.
"""

from __future__ import annotations

import base64
import itertools
import json
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qs

from sandbox.http_receiver import Handler, Receiver, Reply

if TYPE_CHECKING:
    from aiohttp import web


@dataclass(frozen=True, slots=True)
class Posting:
    """One document of the company's books. ``amount`` in major units."""

    id: str
    entity: str
    amount: Decimal
    note: str
    customer: str
    number: str
    """PaymentRefNum or DocNumber."""
    request_id: str


class Company(Receiver):
    """The simulator: one company (realm)."""

    token_path = "/oauth2/v1/tokens/bearer"  # noqa: S105 - an address

    def __init__(self, realm: str, *, client_id: str, client_secret: str, refresh_token: str) -> None:
        super().__init__()
        self.realm = realm
        self.postings: list[Posting] = []
        """``counts`` has ``refused_renewals`` and ``replays``: requests that got a stored answer."""
        self._basic = "Basic " + base64.b64encode(f"{client_id}:{client_secret}".encode()).decode()
        self._refresh_token = refresh_token
        self._answers: dict[str, Reply] = {}
        self._numbers = itertools.count(101)

    def list_writes(self) -> Iterable[tuple[str, str, Handler]]:
        """Creation of documents."""
        return (("POST", "/v3/company/{realm}/{entity}", self._create),)

    def list_reads(self) -> Iterable[tuple[str, str, Handler]]:
        """Nothing is asked."""
        return ()

    def authorise(self, request: web.Request) -> Reply | None:
        """A bearer token, and the company that the app is connected to."""
        if not self.access_token or request.headers.get("authorization") != f"Bearer {self.access_token}":
            return _fail(401, "3200", "AuthenticationFailed", "AUTHENTICATION")
        if request.match_info["realm"] != self.realm:
            return _fail(403, "3100", "ApplicationAuthorizationFailed", "AuthorizationFault")
        return None

    def fail_at_200(self) -> Reply:
        """A Fault with status 200."""
        return _fail(200, "6000", "A business validation error has occurred", "ValidationFault")

    def throttle(self) -> Any:
        """A Fault."""
        return _build_fault("003001", "ThrottleExceeded", "SERVICE")

    def serve_token(self, request: web.Request, body: bytes) -> Reply:
        """A token for the refresh token, which is replaced."""
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        if request.headers.get("authorization") != self._basic:
            return Reply(401, {"error": "invalid_client"})
        known = form.get("grant_type") == "refresh_token" and form.get("refresh_token") == self._refresh_token
        if not known or not self._refresh_token:
            self.counts["refused_renewals"] += 1
            return Reply(400, {"error": "invalid_grant"})
        access_token = self.issue_token()
        self._refresh_token = f"refresh-{self.counts['renewals']}"
        return Reply(
            200,
            {
                "access_token": access_token,
                "expires_in": 3600,
                "refresh_token": self._refresh_token,
                "x_refresh_token_expires_in": 8_640_000,
                "token_type": "bearer",
            },
        )

    def revoke(self) -> None:
        """The connection is taken away: neither token is accepted any more."""
        self.access_token = self._refresh_token = ""

    def connect(self, refresh_token: str) -> None:
        """A person connects the company (again): this refresh token is good from now on."""
        self._refresh_token = refresh_token

    def _create(self, request: web.Request, body: bytes) -> Reply:
        request_id = request.query.get("requestid", "")
        if request_id in self._answers:
            self.counts["replays"] += 1
            return self._answers[request_id]
        try:
            posting = self._post(request.match_info["entity"], request_id, body)
        except _Refused as refusal:
            return _fail(400, refusal.code, "Required parameter is missing", "ValidationFault")
        reply = Reply(200, _show(posting))
        if request_id:
            self._answers[request_id] = reply
        return reply

    def _post(self, entity: str, request_id: str, body: bytes) -> Posting:
        try:
            given: dict[str, Any] = json.loads(body, parse_float=Decimal, parse_int=Decimal)
            customer = given["CustomerRef"]["value"]
            if entity == "payment":
                amount, number = given["TotalAmt"], given.get("PaymentRefNum", "")
            elif entity == "refundreceipt":
                (line,) = given["Line"]
                amount, number = line["Amount"], given.get("DocNumber", "")
                _ = line["SalesItemLineDetail"]["ItemRef"]["value"], given["DepositToAccountRef"]["value"]
            else:
                raise _Refused("500")
        except (ValueError, KeyError, TypeError):
            raise _Refused("2020") from None
        if not isinstance(amount, Decimal) or amount <= 0 or len(number) > _LONGEST_NUMBER:
            raise _Refused("6000")
        posting = Posting(
            str(next(self._numbers)), entity, amount, given.get("PrivateNote", ""), customer, number, request_id
        )
        self.postings.append(posting)
        return posting


class _Refused(Exception):
    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


_LONGEST_NUMBER = 21
_NAMES = {"payment": "Payment", "refundreceipt": "RefundReceipt"}
_TIME = "2026-03-01T09:00:00.000-08:00"


def _fail(status: int, code: str, message: str, kind: str) -> Reply:
    return Reply(status, _build_fault(code, message, kind))


def _build_fault(code: str, message: str, kind: str) -> dict[str, Any]:
    errors = [{"Message": message, "Detail": message, "code": code, "element": ""}]
    return {"Fault": {"Error": errors, "type": kind}, "time": _TIME}


def _show(posting: Posting) -> dict[str, Any]:
    member = {"Id": posting.id, "SyncToken": "0", "TotalAmt": posting.amount, "PrivateNote": posting.note}
    return {_NAMES[posting.entity]: member, "time": _TIME}

"""A simulated QuickBooks Online company: token endpoint, Payment, RefundReceipt, and failures on request.

It behaves as Intuit's documents say (read 2026): a request with a ``requestid`` that was answered with a document gets
the stored answer again and posts nothing; errors are a ``Fault`` object; access tokens are asked with Basic
authorisation and a refresh token, and the refresh token is replaced at each answer (here the old one dies at once, the
hardest case). Without ``requestid`` every request posts.

Postings are in memory and end with the object.
"""

from __future__ import annotations

import asyncio
import base64
import itertools
import json
from collections import Counter
from dataclasses import dataclass
from decimal import Decimal
from enum import StrEnum
from typing import Any

from aiohttp import web


class Trouble(StrEnum):
    """How the next posting fails."""

    HANG_AFTER_POSTING = "hang_after_posting"
    """Posts, and does not answer."""
    THROTTLE = "throttle"
    """429 with Retry-After, nothing posted."""
    FAULT_AT_200 = "fault_at_200"
    """A Fault in an answer with status 200, nothing posted."""
    UNAVAILABLE = "unavailable"
    """503, nothing posted."""


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


@dataclass(frozen=True, slots=True)
class Seen:
    """One request as it arrived at the company, in order; ``at`` in the event loop's seconds."""

    at: float
    status: int
    request_id: str
    body: bytes
    authorisation: str


class Company:
    """The simulator: one company (realm) on a loopback port, known as ``url`` after ``start``."""

    def __init__(self, realm: str, *, client_id: str, client_secret: str, refresh_token: str) -> None:
        self.realm = realm
        self.postings: list[Posting] = []
        self.seen: list[Seen] = []
        self.counts: Counter[str] = Counter()
        """``renewals``, ``refused_renewals``, ``replays``."""
        self.url = ""
        self._basic = "Basic " + base64.b64encode(f"{client_id}:{client_secret}".encode()).decode()
        self._refresh_token = refresh_token
        self._access_token = ""
        self._answers: dict[str, bytes] = {}
        self._troubles: list[Trouble] = []
        self._retry_after = "1"
        self._numbers = itertools.count(101)
        self._waiting = asyncio.Event()
        self._runner: web.AppRunner | None = None

    async def start(self) -> None:
        """Listen on a free port."""
        app = web.Application()
        app.router.add_post("/oauth2/v1/tokens/bearer", self._serve_token)
        app.router.add_post("/v3/company/{realm}/{entity}", self._serve_posting)
        self._runner = web.AppRunner(app, shutdown_timeout=0.1)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.url = f"http://127.0.0.1:{self._runner.addresses[0][1]}"

    async def stop(self) -> None:
        """Close the port and every connection."""
        self._waiting.set()
        if self._runner is not None:
            await self._runner.cleanup()

    def trouble(self, kind: Trouble, times: int = 1, *, retry_after: str = "1") -> None:
        """The next postings fail so; ``retry_after`` is the header of THROTTLE."""
        self._troubles += [kind] * times
        self._retry_after = retry_after

    def expire_token(self) -> None:
        """The access token in force is refused from now on."""
        self._access_token = ""

    def revoke(self) -> None:
        """The connection is taken away: neither token is accepted any more."""
        self._access_token = self._refresh_token = ""

    def connect(self, refresh_token: str) -> None:
        """A person connects the company (again): this refresh token is good from now on."""
        self._refresh_token = refresh_token

    async def _serve_token(self, request: web.Request) -> web.Response:
        form = await request.post()
        if request.headers.get("authorization") != self._basic:
            return web.json_response({"error": "invalid_client"}, status=401)
        known = form.get("grant_type") == "refresh_token" and form.get("refresh_token") == self._refresh_token
        if not known or not self._refresh_token:
            self.counts["refused_renewals"] += 1
            return web.json_response({"error": "invalid_grant"}, status=400)
        self.counts["renewals"] += 1
        self._access_token = f"access-{self.counts['renewals']}"
        self._refresh_token = f"refresh-{self.counts['renewals']}"
        return web.json_response(
            {
                "access_token": self._access_token,
                "expires_in": 3600,
                "refresh_token": self._refresh_token,
                "x_refresh_token_expires_in": 8_640_000,
                "token_type": "bearer",
            }
        )

    async def _serve_posting(self, request: web.Request) -> web.StreamResponse:
        body = await request.read()
        request_id = request.query.get("requestid", "")
        status, answer, headers = self._handle(request, request_id, body)
        self.seen.append(
            Seen(
                asyncio.get_running_loop().time(),
                status,
                request_id,
                body,
                request.headers.get("authorization", ""),
            )
        )
        if status == _NO_ANSWER:
            await self._waiting.wait()
        return web.Response(status=status or 500, body=answer, content_type="application/json", headers=headers)

    def _handle(self, request: web.Request, request_id: str, body: bytes) -> tuple[int, bytes, dict[str, str]]:
        given = request.headers.get("authorization", "")
        if not self._access_token or given != f"Bearer {self._access_token}":
            return 401, _build_fault("3200", "AuthenticationFailed", "AUTHENTICATION"), {}
        if request.match_info["realm"] != self.realm:
            return 403, _build_fault("3100", "ApplicationAuthorizationFailed", "AuthorizationFault"), {}
        trouble = self._troubles.pop(0) if self._troubles else None
        if trouble is Trouble.THROTTLE:
            fault = _build_fault("003001", "ThrottleExceeded", "SERVICE")
            return 429, fault, {"Retry-After": self._retry_after}
        if trouble is Trouble.UNAVAILABLE:
            return 503, b"upstream is away", {}
        if trouble is Trouble.FAULT_AT_200:
            return 200, _build_fault("6000", "A business validation error has occurred", "ValidationFault"), {}
        if request_id and request_id in self._answers:
            self.counts["replays"] += 1
            answer = self._answers[request_id]
        else:
            try:
                posting = self._post(request.match_info["entity"], request_id, body)
            except _Refused as refusal:
                return 400, _build_fault(refusal.code, "Required parameter is missing", "ValidationFault"), {}
            answer = _build_document(posting)
            if request_id:
                self._answers[request_id] = answer
        return _NO_ANSWER if trouble is Trouble.HANG_AFTER_POSTING else 200, answer, {}

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


_NO_ANSWER = 0
_LONGEST_NUMBER = 21
_NAMES = {"payment": "Payment", "refundreceipt": "RefundReceipt"}


def _build_fault(code: str, message: str, kind: str) -> bytes:
    errors = [{"Message": message, "Detail": message, "code": code, "element": ""}]
    return json.dumps({"Fault": {"Error": errors, "type": kind}, "time": "2026-03-01T09:00:00.000-08:00"}).encode()


def _build_document(posting: Posting) -> bytes:
    member = {"Id": posting.id, "SyncToken": "0", "TotalAmt": float(posting.amount), "PrivateNote": posting.note}
    return json.dumps({_NAMES[posting.entity]: member, "time": "2026-03-01T09:00:00.000-08:00"}).encode()

"""A simulated athenahealth practice: token endpoint and payments recorded on charts.

It behaves as athenahealth's pages say (read 2026): nothing recognises a repetition, so a payment is recorded as often
as it is sent; a refusal is ``success`` false at status 200; there is no list of payments.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING
from urllib.parse import parse_qs

from sandbox.http_receiver import Handler, Receiver, Reply

if TYPE_CHECKING:
    from aiohttp import web


@dataclass(frozen=True, slots=True)
class Payment:
    """One payment on a chart; ``amount`` in major units."""

    id: str
    patient: str
    department: str
    method: str
    amount: Decimal
    appointment: str
    """Of a copay; empty for an unapplied payment."""


class Practice(Receiver):
    """The simulator: one practice and its patients."""

    token_path = "/oauth2/v1/token"  # noqa: S105 - an address

    def __init__(self, practice: str, patients: Iterable[str], *, client_id: str, client_secret: str) -> None:
        super().__init__()
        self.payments: list[Payment] = []
        self._practice = practice
        self._patients = frozenset(patients)
        self._basic = "Basic " + base64.b64encode(f"{client_id}:{client_secret}".encode()).decode()

    def list_writes(self) -> Iterable[tuple[str, str, Handler]]:
        """Recording of payments."""
        return (("POST", f"/v1/{self._practice}/patients/{{patient}}/recordpayment", self._record),)

    def list_reads(self) -> Iterable[tuple[str, str, Handler]]:
        """Nothing can be asked."""
        return ()

    def authorise(self, request: web.Request) -> Reply | None:
        """A bearer token."""
        if self.access_token and request.headers.get("authorization") == f"Bearer {self.access_token}":
            return None
        return Reply(401, {"error": "Unauthorized"})

    def fail_at_200(self) -> Reply:
        """A refusal."""
        return _refuse("The payment could not be recorded.")

    def serve_token(self, request: web.Request, body: bytes) -> Reply:
        """Client credentials by HTTP Basic."""
        if request.headers.get("authorization") != self._basic:
            return Reply(401, {"error": "invalid_client"})
        if parse_qs(body.decode()).get("grant_type") != ["client_credentials"]:
            return Reply(400, {"error": "unsupported_grant_type"})
        return Reply(200, {"access_token": self.issue_token(), "token_type": "Bearer", "expires_in": 3600})

    def _record(self, request: web.Request, body: bytes) -> Reply:
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        patient = request.match_info["patient"]
        if patient not in self._patients:
            return Reply(404, {"error": "The patient does not exist."})
        lacking = [name for name in ("departmentid", "paymentmethod") if name not in form]
        if lacking:
            return Reply(400, {"error": "Additional fields are required.", "missingfields": lacking})
        copay = form.get("copayamount")
        try:
            amount = Decimal(copay or form.get("otheramount", ""))
        except InvalidOperation:
            return _refuse("An amount is required.")
        if amount <= 0 or (copay and not form.get("appointmentid")):
            return _refuse("The amount cannot be recorded so.")
        payment = Payment(
            str(5001 + len(self.payments)),
            patient,
            form["departmentid"],
            form["paymentmethod"],
            amount,
            form.get("appointmentid", ""),
        )
        self.payments.append(payment)
        return Reply(200, {"success": True, "epaymentid": payment.id})


def _refuse(text: str) -> Reply:
    return Reply(200, {"success": False, "errortext": text})

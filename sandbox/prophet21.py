"""A simulated Prophet 21 middleware: token, transaction API and OData tables of one tenant.

It behaves as the community's documents say (read 2026): status 200 also on failure, told by ``Summary.Failed``; every
value is text; a document is posted as often as it is sent; tables are filtered by ``COLUMN eq 'VALUE'``. The tenant's
names of services, fields and tables are given by whoever sets it up.
"""

from __future__ import annotations

import itertools
import json
import re
from collections.abc import Iterable
from dataclasses import dataclass
from decimal import Decimal, InvalidOperation
from typing import TYPE_CHECKING

from sandbox.http_receiver import Handler, Receiver, Reply

if TYPE_CHECKING:
    from collections.abc import Mapping

    from aiohttp import web


@dataclass(frozen=True, slots=True)
class Service:
    """One service of the tenant: what a document of it needs, and the table it is found in."""

    required: tuple[str, ...]
    amount_field: str
    number_field: str
    table: str


@dataclass(frozen=True, slots=True)
class Document:
    """One document of the tenant's books."""

    number: str
    service: str
    values: Mapping[str, str]


class Tenant(Receiver):
    """The simulator: one tenant."""

    token_path = "/api/security/token/v2"  # noqa: S105 - an address

    def __init__(self, services: Mapping[str, Service], *, user: str, password: str) -> None:
        super().__init__()
        self.documents: list[Document] = []
        self._services = services
        self._expected = {"username": user, "password": password}
        self._numbers = itertools.count(88_001)

    def list_writes(self) -> Iterable[tuple[str, str, Handler]]:
        """The transaction API."""
        return (("POST", "/uiserver0/api/v2/transaction", self._post),)

    def list_reads(self) -> Iterable[tuple[str, str, Handler]]:
        """OData tables."""
        return (("GET", "/odataservice/odata/table/{table}", self._read),)

    def authorise(self, request: web.Request) -> Reply | None:
        """A bearer token."""
        if self.access_token and request.headers.get("authorization") == f"Bearer {self.access_token}":
            return None
        return Reply(401, {"error": "invalid_grant"})

    def fail_at_200(self) -> Reply:
        """A failed transaction."""
        return _fail("Customer ID is required")

    def serve_token(self, _request: web.Request, body: bytes) -> Reply:
        """A token for user and password, by JSON."""
        if json.loads(body) != self._expected:
            return Reply(401, {"ErrorMessage": "Invalid username or password"})
        token = {"AccessToken": self.issue_token(), "RefreshToken": "unused", "ExpiresInSeconds": 86400}
        return Reply(200, token | {"TokenType": "Bearer"})

    def _post(self, _request: web.Request, body: bytes) -> Reply:
        given = json.loads(body)
        service = self._services.get(given["Name"])
        if service is None:
            return _fail(f"Service {given['Name']} is not available")
        if [transaction["Status"] for transaction in given["Transactions"]] != ["New"]:
            return Reply(500, {"ErrorMessage": "Object reference not set to an instance of an object"})
        (element,) = given["Transactions"][0]["DataElements"]
        (row,) = element["Rows"]
        values = {edit["Name"]: edit["Value"] for edit in row["Edits"]}
        lacking = [name for name in service.required if not values.get(name)]
        try:
            good = (
                all(isinstance(value, str) for value in values.values()) and Decimal(values[service.amount_field]) > 0
            )
        except (InvalidOperation, KeyError):
            good = False
        if lacking or not good:
            return _fail(f"{lacking or service.amount_field} is required")
        document = Document(str(next(self._numbers)), given["Name"], values)
        self.documents.append(document)
        edits = [*row["Edits"], {"Name": service.number_field, "Value": document.number}]
        shown = {"Status": "Passed", "DataElements": [{"Name": element["Name"], "Rows": [{"Edits": edits}]}]}
        return Reply(
            200,
            {
                "Messages": ["Transaction 1:: "],
                "Results": {"Name": given["Name"], "Transactions": [shown]},
                "Summary": {"Succeeded": 1, "Failed": 0, "Other": 0},
            },
        )

    def _read(self, request: web.Request, _body: bytes) -> Reply:
        names = [name for name, service in self._services.items() if service.table == request.match_info["table"]]
        match = re.fullmatch(r"(\w+) eq '(\w*)'", request.query.get("$filter", ""))
        if not names:
            return Reply(404, {"error": {"code": "404", "message": "Unknown table"}})
        if match is None:
            return Reply(400, {"error": {"code": "400", "message": "Invalid filter expression"}})
        rows = [
            {**document.values, self._services[document.service].number_field: document.number}
            for document in self.documents
            if document.service in names and document.values.get(match[1]) == match[2]
        ]
        columns = request.query["$select"].split(",")
        shown = [{column: row[column] for column in columns} for row in rows]
        return Reply(200, {"value": shown[: int(request.query.get("$top", "100"))]})


def _fail(message: str) -> Reply:
    summary = {"Succeeded": 0, "Failed": 1, "Other": 0}
    return Reply(200, {"Messages": [f"Transaction 1:: {message}"], "Results": None, "Summary": summary})

"""A simulated Twilio account: messages are sent and listed.

It behaves as Twilio's documents say (read 2026): no message is recognised as a repetition, the list is filtered by
``To`` and ``From`` and cut into pages, a number that opted out is refused with code 21610. Nothing leaves the machine.
"""

from __future__ import annotations

import base64
from collections.abc import Iterable
from dataclasses import dataclass
from typing import TYPE_CHECKING
from urllib.parse import parse_qs, urlencode

from sandbox.http_receiver import Handler, Receiver, Reply

if TYPE_CHECKING:
    from aiohttp import web


@dataclass(frozen=True, slots=True)
class Message:
    """One message that went out."""

    sid: str
    to: str
    sender: str
    body: str


class Account(Receiver):
    """The simulator: one account."""

    def __init__(self, account_sid: str, *, user: str, password: str) -> None:
        super().__init__()
        self.account_sid = account_sid
        self.messages: list[Message] = []
        self.opted_out: set[str] = set()
        self.page_length = 50
        self._basic = "Basic " + base64.b64encode(f"{user}:{password}".encode()).decode()

    def list_writes(self) -> Iterable[tuple[str, str, Handler]]:
        """Sending."""
        return (("POST", f"/2010-04-01/Accounts/{self.account_sid}/Messages.json", self._send),)

    def list_reads(self) -> Iterable[tuple[str, str, Handler]]:
        """The list."""
        return (("GET", f"/2010-04-01/Accounts/{self.account_sid}/Messages.json", self._list),)

    def authorise(self, request: web.Request) -> Reply | None:
        """HTTP Basic."""
        if request.headers.get("authorization") == self._basic:
            return None
        return Reply(401, {"code": 20003, "message": "Authenticate", "status": 401})

    def fail_at_200(self) -> Reply:
        """An error as Twilio writes it, with a status it does not use for one."""
        return Reply(200, {"code": 20500, "message": "Internal error", "status": 500})

    def _send(self, _request: web.Request, body: bytes) -> Reply:
        form = {name: values[0] for name, values in parse_qs(body.decode()).items()}
        sender = form.get("From", form.get("MessagingServiceSid", ""))
        if not form.get("To", "").startswith("+") or not sender or not form.get("Body"):
            return Reply(400, {"code": 21211, "message": "Invalid 'To' Phone Number", "status": 400})
        if form["To"] in self.opted_out:
            return Reply(400, {"code": 21610, "message": "Attempt to send to unsubscribed recipient", "status": 400})
        message = Message(f"SM{len(self.messages) + 1:032x}", form["To"], sender, form["Body"])
        self.messages.append(message)
        return Reply(201, _show(message))

    def _list(self, request: web.Request, _body: bytes) -> Reply:
        found = [message for message in reversed(self.messages) if message.to == request.query.get("To", message.to)]
        found = [message for message in found if message.sender == request.query.get("From", message.sender)]
        page, length = int(request.query.get("Page", "0")), self.page_length
        following = None
        if len(found) > (page + 1) * length:
            query = urlencode({**request.query, "Page": page + 1, "PageToken": f"PA{page + 1}"})
            following = f"{request.path}?{query}"
        rows = [_show(message) for message in found[page * length : (page + 1) * length]]
        return Reply(200, {"messages": rows, "next_page_uri": following, "page": page, "page_size": length})


def _show(message: Message) -> dict[str, object]:
    return {
        "sid": message.sid,
        "to": message.to,
        "from": message.sender,
        "body": message.body,
        "status": "queued",
        "direction": "outbound-api",
        "date_sent": None,
    }

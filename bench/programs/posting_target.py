"""The target of the posting bench: a small HTTP server with an answer time and planned failures.

One argument, JSON: ``port``, ``delay`` (seconds until an answer), ``late`` (seconds until a late one). A posting whose
first request is planned to fail is answered 503 and not applied, or applied and answered late; every further request is
answered well. A repeated key is no second posting. ``GET /counts`` and ``GET /times`` tell what arrived.
"""

from __future__ import annotations

import asyncio
import gc
import json
import sys
import time
from dataclasses import dataclass, field
from typing import Any

import httptools
import msgspec
import uvloop

from bench.posting_plan import Plan, choose_plan


@dataclass
class Books:
    """What arrived. ``early``: refunds before their capture; ``wrong_bytes``: a key with another body."""

    requests: int = 0
    applied: int = 0
    replays: int = 0
    wrong_bytes: int = 0
    early: int = 0
    refused: int = 0
    late: int = 0
    bodies: dict[str, int] = field(default_factory=dict)
    times: dict[str, float] = field(default_factory=dict)
    captures: set[str] = field(default_factory=set)

    def take(self, key: str, body: bytes) -> Plan:
        """A request came; how it is answered."""
        self.requests += 1
        known = self.bodies.get(key)
        plan = choose_plan(key) if known is None else Plan.WELL
        if known is None:
            self.bodies[key] = hash(body)
        elif known != hash(body):
            self.wrong_bytes += 1
        if plan is Plan.REFUSED:
            self.refused += 1
            return plan
        self.late += plan is Plan.LATE
        if key in self.times:
            self.replays += 1
            return plan
        document = msgspec.json.decode(body)
        if document["kind"] == "capture":
            self.captures.add(document["object"])
        elif document["root"] not in self.captures:
            self.early += 1
        self.applied += 1
        self.times[key] = time.monotonic()
        return plan

    def count(self) -> dict[str, int]:
        """The numbers."""
        names = ("requests", "applied", "replays", "wrong_bytes", "early", "refused", "late")
        return {name: getattr(self, name) for name in names}


class Connection(asyncio.Protocol):
    """One connection; a request at a time."""

    def __init__(self, books: Books, delay: float, late: float) -> None:
        self._books, self._delay, self._late = books, delay, late
        self._parser = httptools.HttpRequestParser(self)
        self._url = self._key = b""
        self._body: list[bytes] = []

    def connection_made(self, transport: Any) -> None:
        """Somebody called."""
        self._transport = transport

    def data_received(self, data: bytes) -> None:
        """Bytes."""
        self._parser.feed_data(data)

    def on_message_begin(self) -> None:
        """A request begins."""
        self._url = self._key = b""
        self._body = []

    def on_url(self, url: bytes) -> None:
        """Its path."""
        self._url += url

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header."""
        if name.lower() == b"idempotency-key":
            self._key = value

    def on_body(self, piece: bytes) -> None:
        """A piece of its body."""
        self._body.append(piece)

    def on_message_complete(self) -> None:
        """It is whole."""
        books = self._books
        if self._url == b"/counts":
            self._answer(b"200 OK", json.dumps(books.count()).encode())
            return
        if self._url == b"/times":
            self._answer(b"200 OK", json.dumps(books.times).encode())
            return
        key = self._key.decode()
        plan = books.take(key, b"".join(self._body))
        status, body = b"201 Created", b'{"id":"doc-%s","status":"posted"}' % self._key
        if plan is Plan.REFUSED:
            status, body = b"503 Service Unavailable", b'{"error":"busy"}'
        asyncio.get_running_loop().call_later(
            self._late if plan is Plan.LATE else self._delay, self._answer, status, body
        )

    def _answer(self, status: bytes, body: bytes) -> None:
        if not self._transport.is_closing():
            self._transport.write(
                b"HTTP/1.1 %s\r\ncontent-type: application/json\r\ncontent-length: %d\r\n\r\n%s"
                % (status, len(body), body)
            )


async def serve(port: int, delay: float, late: float) -> None:
    """Serve until killed."""
    books = Books()
    loop = asyncio.get_running_loop()
    await loop.create_server(lambda: Connection(books, delay, late), "127.0.0.1", port, backlog=1024)
    print("ready", flush=True)
    await asyncio.Event().wait()


if __name__ == "__main__":
    gc.disable()
    given = json.loads(sys.argv[1])
    uvloop.run(serve(given["port"], given["delay"], given["late"]))

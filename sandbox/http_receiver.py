"""What the simulated HTTP targets share: a loopback port, a token, failures on request, a list of what arrived.

Postings are in memory and end with the object. A receiver knows nothing of our connectors: it is written from the
vendor's documents alone.
"""

from __future__ import annotations

import asyncio
import json
from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum
from typing import Any
from urllib.parse import parse_qsl, urlsplit

from aiohttp import web


class Trouble(StrEnum):
    """How the next write fails."""

    HANG_AFTER_POSTING = "hang_after_posting"
    """Posts, and does not answer."""
    HANG_BEFORE_POSTING = "hang_before_posting"
    """Posts nothing, and does not answer."""
    THROTTLE = "throttle"
    """429 with Retry-After, nothing posted."""
    ERROR_AT_200 = "error_at_200"
    """An error in an answer with status 200, nothing posted."""
    UNAVAILABLE = "unavailable"
    """503, nothing posted."""


@dataclass(frozen=True, slots=True)
class Reply:
    """What is answered: bytes, or a value written as JSON."""

    status: int
    body: Any = b""
    headers: Mapping[str, str] = field(default_factory=dict)

    def encode(self) -> bytes:
        """The body's bytes."""
        return self.body if isinstance(self.body, bytes) else json.dumps(self.body, default=float).encode()


@dataclass(frozen=True, slots=True)
class Seen:
    """One write as it arrived, in order; ``at`` in the event loop's seconds, ``status`` 0 when it was not answered."""

    at: float
    status: int
    method: str
    path: str
    headers: Mapping[str, str]
    body: bytes

    @property
    def query(self) -> dict[str, str]:
        """The parameters in the path."""
        return dict(parse_qsl(urlsplit(self.path).query))


Handler = Callable[[web.Request, bytes], Reply]


class Receiver(ABC):
    """A simulated target on a loopback port, known as ``url`` after ``start``."""

    def __init__(self) -> None:
        self.seen: list[Seen] = []
        """Writes, refused ones too."""
        self.counts: Counter[str] = Counter()
        """``questions`` (reads), ``renewals`` (tokens given), and what a receiver counts beside them."""
        self.url = ""
        self.open_writes = 0
        """Writes that have arrived and are not answered; those that will never be are not counted."""
        self.pace: Callable[[], tuple[float, float]] = lambda: (0.0, 0.0)
        """Drawn for each write: seconds before it is posted, and from there to the answer."""
        self.access_token = ""
        self._troubles: list[Trouble] = []
        self._retry_after = "1"
        self._waiting = asyncio.Event()
        self._runner: web.AppRunner | None = None

    @abstractmethod
    def list_writes(self) -> Iterable[tuple[str, str, Handler]]:
        """Method, path and handler of every call that posts."""

    @abstractmethod
    def list_reads(self) -> Iterable[tuple[str, str, Handler]]:
        """Method, path and handler of every call that only reads."""

    @abstractmethod
    def authorise(self, request: web.Request) -> Reply | None:
        """The refusal of a call that is not authorised."""

    @abstractmethod
    def fail_at_200(self) -> Reply:
        """An error as the vendor writes it with status 200."""

    def throttle(self) -> Any:
        """Body of a 429, as the vendor writes it."""
        return {"message": "slow down"}

    def serve_token(self, _request: web.Request, _body: bytes) -> Reply:
        """The token endpoint, where there is one."""
        return Reply(404)

    token_path = ""
    """Path of the token endpoint; empty when there is none."""

    async def start(self) -> None:
        """Listen on a free port."""
        app = web.Application()
        for method, path, handler in self.list_writes():
            app.router.add_route(method, path, self._guard_write(handler))
        for method, path, handler in self.list_reads():
            app.router.add_route(method, path, self._guard_read(handler))
        if self.token_path:
            app.router.add_post(self.token_path, self._guard_token)
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
        """The next writes fail so; ``retry_after`` is the header of THROTTLE."""
        self._troubles += [kind] * times
        self._retry_after = retry_after

    def expire_token(self) -> None:
        """The access token in force is refused from now on."""
        self.access_token = ""

    def issue_token(self) -> str:
        """A new access token, which replaces the one in force."""
        self.counts["renewals"] += 1
        self.access_token = f"access-{self.counts['renewals']}"
        return self.access_token

    def _guard_write(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def serve(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            before, after = self.pace()
            self.open_writes += 1
            try:
                await asyncio.sleep(before)
                reply = self.authorise(request) or self._handle(request, body, handler)
                await asyncio.sleep(after)
            finally:
                self.open_writes -= 1
            status = 0 if reply is None else reply.status
            now = asyncio.get_running_loop().time()
            self.seen.append(Seen(now, status, request.method, request.path_qs, dict(request.headers), body))
            if reply is None:
                await self._waiting.wait()
                return web.Response(status=500)
            return _answer(reply)

        return serve

    def _guard_read(self, handler: Handler) -> Callable[[web.Request], Awaitable[web.StreamResponse]]:
        async def serve(request: web.Request) -> web.StreamResponse:
            body = await request.read()
            self.counts["questions"] += 1
            return _answer(self.authorise(request) or handler(request, body))

        return serve

    async def _guard_token(self, request: web.Request) -> web.StreamResponse:
        return _answer(self.serve_token(request, await request.read()))

    def _handle(self, request: web.Request, body: bytes, handler: Handler) -> Reply | None:
        trouble = self._troubles.pop(0) if self._troubles else None
        if trouble is Trouble.THROTTLE:
            return Reply(429, self.throttle(), {"Retry-After": self._retry_after})
        if trouble is Trouble.UNAVAILABLE:
            return Reply(503, b"upstream is away")
        if trouble is Trouble.ERROR_AT_200:
            return self.fail_at_200()
        if trouble is Trouble.HANG_BEFORE_POSTING:
            return None
        reply = handler(request, body)
        return None if trouble is Trouble.HANG_AFTER_POSTING else reply


def _answer(reply: Reply) -> web.Response:
    return web.Response(
        status=reply.status, body=reply.encode(), content_type="application/json", headers=dict(reply.headers)
    )

"""HTTP calls: one small client over httpx with the aiohttp transport, and what a failed call means.

The question that decides everything after a failure is whether the request may have left. The client does not guess it
from the kind of exception (the transport reports a connection cut *after* the write as a connect timeout): it notes the
moment just before the first byte of a request is written. A failure before that moment is UNAVAILABLE, one after it is
AMBIGUOUS.
"""

from __future__ import annotations

import asyncio
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import aiohttp
import httpx
from httpx_aiohttp import AiohttpTransport

from schemas.failure import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from types import SimpleNamespace, TracebackType


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request; its repr shows neither headers nor body, which may hold secrets or PHI."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict, repr=False)
    body: bytes = field(default=b"", repr=False)


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """One answer, read to its end. Header names are lower case, repeated headers are joined with a comma."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class HttpFailure(Failure):
    """No complete answer: UNAVAILABLE when nothing left, AMBIGUOUS when the request may have been applied.

    INVALID (URL_INVALID) is the third kind: the URL itself cannot be called. ``code`` says what was seen
    (CONNECT_FAILED, TLS_FAILED, CONNECT_TIMEOUT, NO_ANSWER, ANSWER_CUT).
    """


class _Flight:
    """Whether the request of the running call may have been written."""

    __slots__ = ("written",)

    def __init__(self) -> None:
        self.written = False


_flight: ContextVar[_Flight] = ContextVar("http_flight")


async def _note_written(_session: aiohttp.ClientSession, _context: SimpleNamespace, _params: object) -> None:
    # Runs just before the head of a request goes to the socket; the flight travels in the caller's context.
    _flight.get().written = True


class HttpClient:
    """A pool of connections; an async context manager.

    TLS is verified against the bundle of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` when set, else certifi's. Redirects are
    not followed and cookies are not kept: an answer is a fact about the request that was sent. A request goes out once;
    the one exception is aiohttp's own repeat of GET, HEAD, OPTIONS, PUT and DELETE on a kept connection that turns out
    to be closed.

    ``keepalive_seconds`` is below the 5 s after which common servers close an idle connection, so that a write
    seldom meets a closing one.
    """

    def __init__(
        self, *, max_connections: int = 64, connect_timeout: float = 10.0, keepalive_seconds: float = 4.0
    ) -> None:
        self._max_connections = max_connections
        self._connect_timeout = connect_timeout
        self._keepalive_seconds = keepalive_seconds
        self._transport: AiohttpTransport | None = None

    async def __aenter__(self) -> Self:
        context = httpx.create_ssl_context()
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_note_written)
        # The connector keeps every idle connection: its keep-alive limit equals its connection limit.
        session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._max_connections, keepalive_timeout=self._keepalive_seconds, ssl=context
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )
        self._transport = AiohttpTransport(verify=context, client=session)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._transport is not None:
            await self._transport.aclose()
            self._transport = None

    async def send(self, request: HttpRequest, *, deadline: float) -> HttpResponse:
        """Send once and return the whole answer, whatever its status.

        ``deadline`` in seconds covers everything: waiting for a connection, connecting, writing, reading to the end.
        Raises ``HttpFailure``; ``RuntimeError`` outside the context manager.
        """
        if self._transport is None:
            raise RuntimeError("HttpClient is an async context manager: use `async with`")
        flight = _Flight()
        token = _flight.set(flight)
        try:
            async with asyncio.timeout(deadline):
                return await self._exchange(self._transport, request, deadline)
        except (httpx.InvalidURL, httpx.UnsupportedProtocol) as error:
            raise HttpFailure(FailureKind.INVALID, "URL_INVALID", "url") from error
        except (TimeoutError, httpx.HTTPError, aiohttp.ClientError, OSError) as error:
            raise _classify(error, written=flight.written) from error
        finally:
            _flight.reset(token)

    async def _exchange(self, transport: AiohttpTransport, request: HttpRequest, deadline: float) -> HttpResponse:
        outgoing = httpx.Request(
            request.method,
            request.url,
            headers=dict(request.headers),
            content=request.body,
            extensions={
                "timeout": {"connect": min(self._connect_timeout, deadline), "read": deadline, "pool": deadline}
            },
        )
        response = await transport.handle_async_request(outgoing)
        try:
            body = await response.aread()
        finally:
            await response.aclose()
        return HttpResponse(response.status_code, dict(response.headers), body)


def _classify(error: Exception, *, written: bool) -> HttpFailure:
    timeout = isinstance(error, (TimeoutError, httpx.TimeoutException)) and not isinstance(
        error.__cause__, aiohttp.ServerDisconnectedError
    )
    if written:
        return HttpFailure(FailureKind.AMBIGUOUS, "NO_ANSWER" if timeout else "ANSWER_CUT")
    if isinstance(error.__cause__, aiohttp.ClientSSLError):
        return HttpFailure(FailureKind.UNAVAILABLE, "TLS_FAILED")
    if isinstance(error.__cause__, aiohttp.ClientConnectorError) or not timeout:
        return HttpFailure(FailureKind.UNAVAILABLE, "CONNECT_FAILED")
    return HttpFailure(FailureKind.UNAVAILABLE, "CONNECT_TIMEOUT")

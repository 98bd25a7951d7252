"""HTTP calls: one small client over httpx with the aiohttp transport, and what a failed call means.

The question that decides everything after a failure is whether the request may have left. The client does not guess it
from the kind of exception (the transport reports a connection cut *after* the write as a connect timeout): it notes the
moment just before the first byte of a request is written. A failure before that moment is UNAVAILABLE, one after it is
AMBIGUOUS.

Nothing here logs, and no failure is chained to the library's exception: those quote URLs and answers, which hold
secrets (a webhook's URL) and PHI (a search for a patient).
"""

from __future__ import annotations

import asyncio
import re
import socket
import ssl
import urllib.request
from collections.abc import AsyncIterable, Callable, Iterable
from contextvars import ContextVar
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Self

import aiohttp
import httpx
from aiohttp.abc import AbstractResolver, ResolveResult
from httpx_aiohttp import AiohttpTransport

from clients.hosts import HostPolicy, find_origin
from schemas.failure import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path
    from types import SimpleNamespace, TracebackType


@dataclass(frozen=True, slots=True)
class HttpRequest:
    """One request; its repr shows no path, query, headers or body: each may hold secrets or PHI."""

    method: str
    url: str
    headers: Mapping[str, str] = field(default_factory=dict)
    body: bytes = b""

    def __repr__(self) -> str:
        return f"HttpRequest({self.method!r}, {find_origin(self.url)!r}, {len(self.body)} bytes)"


@dataclass(frozen=True, slots=True)
class HttpResponse:
    """One answer, read to its end. Header names are lower case, repeated headers are joined with a comma."""

    status: int
    headers: Mapping[str, str] = field(repr=False)
    body: bytes = field(repr=False)


class HttpFailure(Failure):
    """No complete answer: UNAVAILABLE when nothing left, AMBIGUOUS when the request may have been applied.

    INVALID (URL_INVALID, REQUEST_INVALID) is the third kind: the request itself cannot be sent. ``code`` says what was
    seen (CONNECT_FAILED, TLS_FAILED, CONNECT_TIMEOUT, PROXY_FAILED, CLIENT_CLOSED, NO_ANSWER, ANSWER_CUT,
    ANSWER_TOO_LONG, ANSWER_UNREADABLE), ``cause`` names the library's exceptions.
    """

    def __init__(self, kind: FailureKind, code: str, field: str = "", *, cause: str = "") -> None:
        super().__init__(kind, code, field)
        self.cause = cause


@dataclass(frozen=True, slots=True, kw_only=True)
class Proxies:
    """Proxies by the scheme of the URL called; empty means none. Hidden in reprs: a proxy's URL may hold a password."""

    http: str = field(default="", repr=False)
    https: str = field(default="", repr=False)
    bypass: str = ""
    """Hosts called directly, as in NO_PROXY, separated by commas: names with all below them, ``*`` for all."""

    @classmethod
    def read_environment(cls) -> Proxies:
        """HTTP_PROXY, HTTPS_PROXY, ALL_PROXY and NO_PROXY, in upper or lower case."""
        found = urllib.request.getproxies_environment()
        fallback = found.get("all", "")
        return cls(http=found.get("http", fallback), https=found.get("https", fallback), bypass=found.get("no", ""))

    def choose(self, url: httpx.URL) -> str:
        """The proxy for this URL; empty when it is called directly."""
        host = url.host.lower()
        for entry in filter(None, (part.strip().lower() for part in self.bypass.split(","))):
            name = entry.removeprefix("*").removeprefix(".")
            if not name or name in {host, f"{host}:{url.port}"} or host.endswith(f".{name}"):
                return ""
        return self.https if url.scheme == "https" else self.http


def build_tls(
    authorities: Path | None = None, certificate: Path | None = None, key: Path | None = None
) -> ssl.SSLContext:
    """A context that verifies servers, with our own certificate for mutual TLS when given. All files are PEM.

    ``authorities`` replaces the default bundle: who names a hospital's own authority trusts that one alone. Raises
    ``OSError`` (``ssl.SSLError`` is one) for files that cannot be used.
    """
    context = httpx.create_ssl_context() if authorities is None else ssl.create_default_context(cafile=str(authorities))
    if certificate is not None:
        context.load_cert_chain(certificate, key)
    return context


class _Repeated(Exception):
    """The library was about to send a request that changes something a second time."""


class _TooLong(Exception):
    """The answer is longer than we take."""


class _PackedTwice(Exception):
    """The answer is packed more than once: a few bytes of it could unpack to more than there is memory."""


_TOKEN = re.compile(r"[!#$%&'*+.^_`|~0-9A-Za-z-]+")
_CONTROL = re.compile(r"[\x00-\x08\x0a-\x1f\x7f]")
_REPEATABLE = frozenset({"GET", "HEAD", "OPTIONS"})


class _Flight:
    """What is known of the running call: whether it may have been written, and what was raised just before."""

    __slots__ = ("_before_write", "_fresh", "_heads", "_repeatable", "stopped", "written")

    def __init__(self, method: str, before_write: Callable[[], None] | None) -> None:
        self._before_write = before_write
        self._repeatable = method.upper() in _REPEATABLE
        self._heads = 0
        self._fresh = False
        self.written = False
        self.stopped: Exception | None = None

    def note_head(self) -> None:
        """The head is ready; without a body it goes to the socket next."""
        self._heads += 1
        if self._heads > 1 and not self._repeatable:
            raise _Repeated
        self._check()
        self.written = self._fresh = True

    def note_body(self) -> None:
        """The head waited for this first piece of the body, one turn of the event loop; now both go to the socket."""
        if self._fresh:
            self._check()
        self._fresh = False

    def _check(self) -> None:
        if self._before_write is None:
            return
        try:
            self._before_write()
        except Exception as error:
            self.stopped = error
            raise


_flight: ContextVar[_Flight] = ContextVar("http_flight")


async def _note_head(_session: aiohttp.ClientSession, _context: SimpleNamespace, _params: object) -> None:
    # Runs just before the head of a request goes to the socket; the flight travels in the caller's context.
    _flight.get().note_head()


async def _note_body(_session: aiohttp.ClientSession, _context: SimpleNamespace, _params: object) -> None:
    _flight.get().note_body()


class _JudgedResolver(AbstractResolver):
    """Looks names up, and hands on only addresses that the policy allows: the connection goes to one of those.

    ``unjudged`` are the proxies' hosts: the operator's own choice.
    """

    def __init__(self, policy: HostPolicy, unjudged: Iterable[str]) -> None:
        self._policy = policy
        self._unjudged = frozenset(unjudged)
        self._resolver = aiohttp.ThreadedResolver()

    async def resolve(
        self, host: str, port: int = 0, family: socket.AddressFamily = socket.AF_UNSPEC
    ) -> list[ResolveResult]:
        found = await self._resolver.resolve(host, port, family)
        for address in found if host not in self._unjudged else ():
            # One refused address refuses the name: a name of both kinds is a trick or a mistake.
            self._policy.check_address(host, address["host"])
        return found

    async def close(self) -> None:
        await self._resolver.close()


class HttpClient:
    """A pool of connections, one per target instance; an async context manager.

    TLS is verified by ``tls``; without it against the bundle of ``SSL_CERT_FILE`` or ``SSL_CERT_DIR`` when set, else
    certifi's. Redirects are not followed and cookies are not kept: an answer is a fact about the request that was sent.
    A request goes out once; the one exception is aiohttp's own repeat of GET, HEAD and OPTIONS on a kept connection
    that turns out to be closed.

    ``policy`` says where calls may go; without one, anywhere (our own services). ``proxies`` are used when given: the
    environment alone sets none. What goes through a proxy is looked up there: the policy then judges its URL only.
    No netrc file is read.

    ``longest_answer`` bounds a body in bytes, unpacked. ``keepalive_seconds`` is below the 5 s after which common
    servers close an idle connection, so that a write seldom meets a closing one.
    """

    def __init__(
        self,
        *,
        max_connections: int = 64,
        connect_timeout: float = 10.0,
        keepalive_seconds: float = 4.0,
        tls: ssl.SSLContext | None = None,
        policy: HostPolicy | None = None,
        proxies: Proxies | None = None,
        longest_answer: int = 16_777_216,
    ) -> None:
        self._max_connections = max_connections
        self._connect_timeout = connect_timeout
        self._keepalive_seconds = keepalive_seconds
        self._tls = tls
        self._policy = policy
        self._proxies = proxies or Proxies()
        self._longest_answer = longest_answer
        self._session: aiohttp.ClientSession | None = None
        self._transports: dict[str, AiohttpTransport] = {}

    async def __aenter__(self) -> Self:
        context = self._tls or build_tls()
        trace = aiohttp.TraceConfig()
        trace.on_request_headers_sent.append(_note_head)
        trace.on_request_chunk_sent.append(_note_body)
        proxies = {proxy: httpx.Proxy(proxy) for proxy in (self._proxies.http, self._proxies.https) if proxy}
        resolver = None
        if self._policy is not None:
            resolver = _JudgedResolver(self._policy, (proxy.url.host for proxy in proxies.values()))
        # The connector keeps every idle connection: its keep-alive limit equals its connection limit.
        self._session = aiohttp.ClientSession(
            connector=aiohttp.TCPConnector(
                limit=self._max_connections,
                keepalive_timeout=self._keepalive_seconds,
                ssl=context,
                resolver=resolver,
            ),
            cookie_jar=aiohttp.DummyCookieJar(),
            trace_configs=[trace],
        )
        self._transports = {
            proxy: AiohttpTransport(verify=context, client=self._session, proxy=proxies.get(proxy))
            for proxy in {"", *proxies}
        }
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._session is not None:
            await self._session.close()
            self._session = None

    async def send(
        self, request: HttpRequest, *, deadline: float, before_write: Callable[[], None] | None = None
    ) -> HttpResponse:
        """Send once and return the whole answer, whatever its status.

        ``deadline`` in seconds covers everything: waiting for a connection, connecting, writing, reading to the end.
        ``before_write`` runs with nothing between it and the first write to the socket, and may run a second time
        right after; what it raises ends the call, comes out unchanged, and means that nothing left.

        Raises ``HttpFailure``; ``HostRefused`` when the policy refuses the URL or the address; ``RuntimeError`` outside
        the context manager.
        """
        if self._session is None:
            raise RuntimeError("HttpClient is an async context manager: use `async with`")
        _check_request(request)
        flight = _Flight(request.method, before_write)
        token = _flight.set(flight)
        try:
            async with asyncio.timeout(deadline):
                return await self._exchange(request, deadline)
        except Exception as error:
            if flight.stopped is not None:
                raise flight.stopped from None
            if isinstance(error, Failure):
                raise
            if not flight.written and (self._session is None or self._session.closed):
                raise HttpFailure(FailureKind.UNAVAILABLE, "CLIENT_CLOSED") from None
            raise _explain(error, written=flight.written) from None
        finally:
            _flight.reset(token)

    async def _exchange(self, request: HttpRequest, deadline: float) -> HttpResponse:
        outgoing = httpx.Request(
            request.method,
            _parse_url(request.url),
            headers=request.headers,
            content=request.body,
            # All other waits end with the deadline of the whole call.
            extensions={"timeout": {"connect": min(self._connect_timeout, deadline)}},
        )
        if self._policy is not None:
            self._policy.check_url(str(outgoing.url))
        response = await self._transports[self._proxies.choose(outgoing.url)].handle_async_request(outgoing)
        # Only what is packed needs httpx's decoders.
        packing = response.headers.get("content-encoding", "")
        pieces = response.aiter_bytes() if packing else response.stream
        assert isinstance(pieces, AsyncIterable)
        body = bytearray()
        try:
            if "," in packing:
                raise _PackedTwice
            async for piece in pieces:
                body += piece
                if len(body) > self._longest_answer:
                    raise _TooLong
        finally:
            await response.aclose()
        return HttpResponse(response.status_code, dict(response.headers.items()), bytes(body))


@lru_cache(maxsize=256)
def _parse_url(url: str) -> httpx.URL:
    return httpx.URL(url)


def _check_request(request: HttpRequest) -> None:
    # The library finds these too, but only after the moment that counts as written.
    names = [request.method, *request.headers]
    if not all(map(_TOKEN.fullmatch, names)) or any(map(_CONTROL.search, request.headers.values())):
        raise HttpFailure(FailureKind.INVALID, "REQUEST_INVALID")


def _explain(error: Exception, *, written: bool) -> Failure:
    seen = error.__cause__ or error
    cause = type(error).__name__ if seen is error else f"{type(error).__name__}/{type(seen).__name__}"
    if written:
        return HttpFailure(FailureKind.AMBIGUOUS, _name_loss(error), cause=cause)
    if isinstance(error, (httpx.InvalidURL, httpx.UnsupportedProtocol)):
        return HttpFailure(FailureKind.INVALID, "URL_INVALID", "url", cause=cause)
    if isinstance(error, (TypeError, ValueError)):
        # It can never be sent.
        return HttpFailure(FailureKind.INVALID, "REQUEST_INVALID", cause=cause)
    if not isinstance(error, (TimeoutError, httpx.HTTPError, aiohttp.ClientError, OSError)):
        return HttpFailure(FailureKind.INTERNAL, "EXCEPTION", cause=cause)
    return HttpFailure(FailureKind.UNAVAILABLE, _name_obstacle(error, seen), cause=cause)


def _name_loss(error: Exception) -> str:
    if isinstance(error, _TooLong):
        return "ANSWER_TOO_LONG"
    if _is_timeout(error):
        return "NO_ANSWER"
    if isinstance(error, (_Repeated, httpx.HTTPError, aiohttp.ClientError, OSError)):
        return "ANSWER_CUT"
    return "ANSWER_UNREADABLE"


def _name_obstacle(error: Exception, seen: BaseException) -> str:
    if isinstance(seen, aiohttp.ClientSSLError):
        return "TLS_FAILED"
    if isinstance(seen, (aiohttp.ClientProxyConnectionError, aiohttp.ClientHttpProxyError)):
        return "PROXY_FAILED"
    if isinstance(seen, aiohttp.ClientConnectorError) or not _is_timeout(error):
        return "CONNECT_FAILED"
    return "CONNECT_TIMEOUT"


def _is_timeout(error: Exception) -> bool:
    return isinstance(error, (TimeoutError, httpx.TimeoutException)) and not isinstance(
        error.__cause__, aiohttp.ServerDisconnectedError
    )

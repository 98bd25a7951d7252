"""The webhook receiver: ``POST /webhooks/<source>/<account>``, verified, redacted, durably written, then answered.

A 2xx means that Kafka has acknowledged every event of the delivery on all in-sync replicas. Everything else makes the
sender try again, except what can never become right (bad signature, too large). Bodies and headers are never logged.
"""

from __future__ import annotations

import asyncio
import contextlib
import inspect
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Iterator, Mapping, MutableMapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, final

import uvicorn

from schemas.failure import ConfigurationError, Failure, TemporaryError
from sources.contract import Gateway, RawEvent, Verdict
from telemetry.log import get_log
from telemetry.metrics import Metric

if TYPE_CHECKING:
    from schemas.tenancy import Account
    from sources.intake import Intake

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]

ACCEPTED = Metric.RAW_ACCEPTED.value.name
REFUSED = Metric.REFUSED.value.name
UNKNOWN_SOURCE = "unknown"
"""Source label of a request to an address that no account has; the address itself is the sender's text."""

_log = get_log("receiver")


class Reason(StrEnum):
    """Why a request is refused before or after its signature is checked (refusals of a signature have their own)."""

    UNKNOWN_ACCOUNT = "unknown_account"
    WRONG_METHOD = "wrong_method"
    ENCODED = "content_encoding"
    OVERLOADED = "overloaded"
    TOO_LARGE = "too_large"
    TOO_SLOW = "too_slow"
    CUT_OFF = "cut_off"
    """The sender went away before the body was complete."""
    NOT_WRITTEN = "not_written"
    """Kafka did not acknowledge in time."""
    INTERNAL = "internal"


class Answer(NamedTuple):
    """An HTTP answer. ``headers`` are extra ones."""

    status: int
    body: bytes
    content_type: str = "application/json"
    headers: tuple[tuple[bytes, bytes], ...] = ()


Page = Callable[[], Answer | Awaitable[Answer]]
"""A page of the process, such as its health: asked at every ``GET``."""


class ReceiverAddressTaken(TemporaryError):
    """The receiver cannot listen."""

    code = "RS260"
    meaning = "The address of the webhook receiver cannot be bound."
    default_remedy = "Stop what listens there, or choose another port (0 takes a free one)."


class ReceiverTlsBroken(ConfigurationError):
    """The receiver's certificate or key cannot be used."""

    code = "RS162"
    meaning = "The receiver's TLS certificate or key cannot be read, or they do not belong together."
    default_remedy = "Name a PEM certificate chain and its unencrypted private key, readable by this user."


class AccountWithoutGateway(ConfigurationError):
    """An account names a source that no gateway connector provides."""

    code = "RS163"
    meaning = "An account names a payment gateway for which there is no connector."
    default_remedy = "Correct the account's `source`."


@dataclass(frozen=True, slots=True)
class Tls:
    """Files in PEM: the certificate chain and its private key."""

    certificate: Path
    key: Path


@dataclass(frozen=True, slots=True)
class _Endpoint:
    gateway: Gateway
    account: str
    facility: str
    tolerance: float
    secrets: tuple[bytes, ...] = field(repr=False)


class _Refused(Exception):
    """An answer on its way out."""

    def __init__(self, status: int, reason: str, *headers: tuple[bytes, bytes]) -> None:
        super().__init__(reason)
        self.answer = Answer(status, b'{"refused":"%b"}' % reason.encode(), headers=headers)
        self.reason = reason


def build_app(
    *,
    gateways: Mapping[str, Gateway],
    accounts: Sequence[Account],
    intake: Intake,
    count: Callable[..., None],
    pages: Mapping[str, Page] | None = None,
    clock: Callable[[], float] = time.time,
    max_in_flight: int = 512,
    body_seconds: float = 10.0,
) -> Receiver:
    """The ASGI application that receives for these accounts.

    ``count`` is told ``raw_accepted_total`` (source, facility) per event and ``refused_total`` (source, reason) per
    request. ``pages`` maps paths such as ``/health/live`` to what they answer. Beyond ``max_in_flight`` requests the
    answer is 503; a body that takes longer than ``body_seconds`` gives 408. Raises ``AccountWithoutGateway``.
    """
    endpoints: dict[str, _Endpoint] = {}
    for account in accounts:
        gateway = gateways.get(account.source)
        if gateway is None:
            raise AccountWithoutGateway(
                f"there is no gateway {account.source!r}; known are {', '.join(sorted(gateways))}.",
                place=f"account {account.name}",
            )
        endpoints[f"/webhooks/{account.source}/{account.name}"] = _Endpoint(
            gateway=gateway,
            account=account.name,
            facility=account.facility,
            tolerance=account.tolerance_seconds,
            secrets=tuple(secret.get_secret_value().encode() for secret in account.secrets),
        )
    return Receiver(
        endpoints=endpoints,
        intake=intake,
        count=count,
        pages=pages or {},
        clock=clock,
        max_in_flight=max_in_flight,
        body_seconds=body_seconds,
    )


@final
class Receiver:
    """The ASGI application; ``build_app`` makes it."""

    def __init__(
        self,
        *,
        endpoints: Mapping[str, _Endpoint],
        intake: Intake,
        count: Callable[..., None],
        pages: Mapping[str, Page],
        clock: Callable[[], float],
        max_in_flight: int,
        body_seconds: float,
    ) -> None:
        self._endpoints = endpoints
        self._intake = intake
        self._count = count
        self._pages = pages
        self._clock = clock
        self._max_in_flight = max_in_flight
        self._body_seconds = body_seconds
        self._in_flight = 0

    @property
    def in_flight(self) -> int:
        """Deliveries being received or written now."""
        return self._in_flight

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Serve one connection scope."""
        if scope["type"] == "http":
            await self._serve(scope, receive, send)
        elif scope["type"] == "lifespan":
            await _live(receive, send)
        else:
            await send({"type": "websocket.close", "code": 1003})  # RFC 6455: cannot accept this kind of data

    async def _serve(self, scope: Scope, receive: Receive, send: Send) -> None:
        page = self._pages.get(scope["path"])
        if page is not None:
            answer = await _ask_page(page, scope["method"])
        else:
            endpoint = self._endpoints.get(scope["path"])
            source = endpoint.gateway.name if endpoint else UNKNOWN_SOURCE
            try:
                number = await self._take(endpoint, scope, receive)
            except _Refused as refused:
                self._count(REFUSED, source=source, reason=refused.reason)
                answer = refused.answer
            except Exception as error:  # noqa: BLE001 - a bug must not print the request; the sender tries again
                _log.error("delivery_failed", source=source, error=type(error).__name__)
                self._count(REFUSED, source=source, reason=Reason.INTERNAL)
                answer = Answer(500, b'{"refused":"internal"}')
            else:
                answer = Answer(200, b'{"accepted":%d}' % number)
        await _send(send, answer)

    async def _take(self, endpoint: _Endpoint | None, scope: Scope, receive: Receive) -> int:
        """Receive one delivery; returns the number of its events, all acknowledged, or raises ``_Refused``."""
        if endpoint is None:
            raise _Refused(404, Reason.UNKNOWN_ACCOUNT, _CLOSE)
        if scope["method"] != "POST":
            raise _Refused(405, Reason.WRONG_METHOD, (b"allow", b"POST"), _CLOSE)
        headers = _read_headers(scope["headers"])
        # Signatures are over the bytes sent; no gateway compresses, and unpacking would be a way to exhaust memory.
        if headers.get("content-encoding", "identity").strip().lower() not in ("identity", ""):
            raise _Refused(415, Reason.ENCODED, _CLOSE)
        if self._in_flight >= self._max_in_flight:
            raise _Refused(503, Reason.OVERLOADED, (b"retry-after", b"1"), _CLOSE)
        self._in_flight += 1
        try:
            body = await self._read_body(endpoint.gateway.max_body_bytes, headers, receive)
            return await self._write(endpoint, headers, body)
        finally:
            self._in_flight -= 1

    async def _read_body(self, limit: int, headers: Mapping[str, str], receive: Receive) -> bytes:
        length = headers.get("content-length", "")
        if length.isascii() and length.isdigit() and int(length[:20]) > limit:
            raise _Refused(413, Reason.TOO_LARGE, _CLOSE)
        chunks: list[bytes] = []
        size = 0
        try:
            async with asyncio.timeout(self._body_seconds):
                while True:
                    message = await receive()
                    if message["type"] == "http.disconnect":
                        raise _Refused(400, Reason.CUT_OFF, _CLOSE)
                    chunk = message.get("body", b"")
                    size += len(chunk)
                    if size > limit:
                        raise _Refused(413, Reason.TOO_LARGE, _CLOSE)
                    chunks.append(chunk)
                    if not message.get("more_body", False):
                        return chunks[0] if len(chunks) == 1 else b"".join(chunks)
        except TimeoutError:
            raise _Refused(408, Reason.TOO_SLOW, _CLOSE) from None

    async def _write(self, endpoint: _Endpoint, headers: Mapping[str, str], body: bytes) -> int:
        gateway = endpoint.gateway
        verdict = gateway.verify(
            body, headers, secrets=endpoint.secrets, now=self._clock(), tolerance=endpoint.tolerance
        )
        if verdict.refusal is not None:
            raise _Refused(401, verdict.refusal)
        events = _split(endpoint, body)
        try:
            await self._intake.publish(
                source=gateway.name,
                account=endpoint.account,
                facility=endpoint.facility,
                content_type=headers.get("content-type", ""),
                verdict=_describe(verdict),
                events=events,
                sensitive_members=gateway.sensitive_members,
            )
        except TemporaryError as error:
            _log.warning("delivery_not_written", source=gateway.name, code=error.code)
            raise _Refused(503, Reason.NOT_WRITTEN, (b"retry-after", b"5")) from None
        for _ in events:
            self._count(ACCEPTED, source=gateway.name, facility=endpoint.facility)
        return len(events)


_CLOSE = (b"connection", b"close")
"""The body was not read to its end; the connection cannot be used for another request."""


def _split(endpoint: _Endpoint, body: bytes) -> list[RawEvent]:
    """Events of a verified body, keys under the account.

    What cannot be split is one event without a key: a stream dead-letters it with its reason, and the sender need not
    try again.
    """
    try:
        events = endpoint.gateway.split(body)
    except Failure as failure:
        _log.warning("delivery_unparsed", source=endpoint.gateway.name, code=failure.code)
    except Exception as error:  # noqa: BLE001 - a connector's bug: keep the bytes, they are the sender's true word
        _log.error("connector_failed", source=endpoint.gateway.name, error=type(error).__name__)
    else:
        return [
            RawEvent(
                key=f"{endpoint.account}/{event.key}",
                body=event.body,
                delivery_id=event.delivery_id,
                event_type=event.event_type,
                occurred_at=event.occurred_at,
            )
            for event in events
        ]
    return [RawEvent(key="", body=body, delivery_id="", event_type="", occurred_at=None)]


def _describe(verdict: Verdict) -> str:
    signed_at = "" if verdict.signed_at is None else f";signed_at={verdict.signed_at}"
    return f"{verdict.scheme};key={verdict.key_id}{signed_at}"


def _read_headers(pairs: Sequence[tuple[bytes, bytes]]) -> dict[str, str]:
    """Headers by lower-case name; repeated ones joined by a comma (RFC 9110, section 5.2)."""
    headers: dict[str, str] = {}
    for raw_name, raw_value in pairs:
        name, value = raw_name.decode("latin-1").lower(), raw_value.decode("latin-1")
        headers[name] = f"{headers[name]},{value}" if name in headers else value
    return headers


async def _ask_page(page: Page, method: str) -> Answer:
    if method not in ("GET", "HEAD"):
        return Answer(405, b"{}", headers=((b"allow", b"GET, HEAD"), _CLOSE))
    try:
        answer = page()
        return await answer if inspect.isawaitable(answer) else answer
    except Exception as error:  # noqa: BLE001 - a broken page means not healthy, and must stay able to say so
        _log.error("page_failed", error=type(error).__name__)
        return Answer(503, b"{}")


async def _send(send: Send, answer: Answer) -> None:
    headers = [
        (b"content-type", answer.content_type.encode()),
        (b"content-length", b"%d" % len(answer.body)),
        *answer.headers,
    ]
    await send({"type": "http.response.start", "status": answer.status, "headers": headers})
    await send({"type": "http.response.body", "body": answer.body})


async def _live(receive: Receive, send: Send) -> None:
    while True:
        message = await receive()
        await send({"type": f"{message['type']}.complete"})
        if message["type"] == "lifespan.shutdown":
            return


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, on_started: Callable[[], None]) -> None:
        super().__init__(config)
        self._on_started = on_started

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Listen, then say so."""
        await super().startup(sockets=sockets)
        self._on_started()

    @contextlib.contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Leave signals to the process: it must still flush its producer after the last answer."""
        yield


async def serve(
    app: Receiver,
    host: str,
    port: int,
    *,
    stop: asyncio.Event,
    on_ready: Callable[[int], None] = lambda _: None,
    tls: Tls | None = None,
    grace_seconds: float = 10.0,
) -> None:
    """Serve until ``stop`` is set, then take no new request, finish those under way (``grace_seconds``), and return.

    ``port`` 0 takes a free one; ``on_ready`` is told the port in use once requests are served. Signals are left to the
    caller. Run it on a uvloop loop for speed. Raises ``ReceiverAddressTaken`` and ``ReceiverTlsBroken``.
    """
    config = uvicorn.Config(
        app,
        http="httptools",
        ws="none",
        lifespan="off",
        access_log=False,
        log_config=None,
        server_header=False,
        date_header=False,
        proxy_headers=False,
        timeout_keep_alive=75,
        timeout_graceful_shutdown=max(1, round(grace_seconds)),
        ssl_certfile=tls.certificate if tls else None,
        ssl_keyfile=tls.key if tls else None,
    )
    try:
        config.load()
    except (OSError, ssl.SSLError) as error:
        raise ReceiverTlsBroken(f"{type(error).__name__}.", place=str(tls.certificate) if tls else "receiver") from None
    with _bind(host, port) as listener:
        bound_port = listener.getsockname()[1]
        server = _Server(config, lambda: on_ready(bound_port))
        serving = asyncio.create_task(server.serve(sockets=[listener]))
        stopping = asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({serving, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            server.should_exit = True
            await serving


def _bind(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(
            host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE
        )[0]
        listener = socket.socket(family, kind, protocol)
        try:
            listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
            listener.bind(address)
        except OSError:
            listener.close()
            raise
    except OSError as error:
        raise ReceiverAddressTaken(
            f"cannot listen ({type(error).__name__}, errno {error.errno}).", place=f"{host}:{port}"
        ) from None
    listener.setblocking(False)  # noqa: FBT003 - the socket module has it so
    return listener

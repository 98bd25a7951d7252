"""Health endpoints of a process: ``/live``, ``/ready``, ``/metrics`` over a small HTTP/1.1 server on asyncio.

A framework is not worth a dependency here: three fixed answers, no bodies read, connections closed after each answer.
"""

from __future__ import annotations

import asyncio
import contextlib
from http import HTTPStatus
from typing import TYPE_CHECKING, Self

import orjson

from schemas.failure import TemporaryError
from telemetry.log import get_log
from telemetry.masking import mask_members
from telemetry.metrics import CONTENT_TYPE, METRICS, Metric, Metrics

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping

_REQUEST_SECONDS = 5.0
_MAX_REQUEST = 8192
_MAX_CONNECTIONS = 64
_JSON = "application/json"


class HealthPortTaken(TemporaryError):
    """The health endpoints cannot listen."""

    code = "RS250"
    meaning = "The address of the health endpoints cannot be bound."
    default_remedy = "Stop what listens there, or choose another port (0 takes a free one)."


class HealthServer:
    """Serves the health endpoints of one process.

    ``ready`` says whether the process can do its work now, and why not: short reasons by part, never payload. ``live``
    says whether it should be restarted; by default it answers yes as long as the event loop turns.
    """

    def __init__(
        self,
        host: str,
        port: int,
        ready: Callable[[], tuple[bool, Mapping[str, str]]],
        *,
        live: Callable[[], bool] = lambda: True,
        metrics: Metrics = METRICS,
    ) -> None:
        self._host = host
        self._port = port
        self._ready = ready
        self._live = live
        self._metrics = metrics
        self._server: asyncio.Server | None = None
        self._open = 0

    @property
    def port(self) -> int:
        """The port in use; differs from the one asked for when that was 0."""
        return self._port

    async def start(self) -> None:
        """Begin to answer. Raises ``HealthPortTaken``."""
        try:
            self._server = await asyncio.start_server(self._serve, self._host, self._port, limit=_MAX_REQUEST)
        except OSError as error:
            raise HealthPortTaken(
                f"cannot listen ({type(error).__name__}, errno {error.errno}).", place=f"{self._host}:{self._port}"
            ) from None
        self._port = self._server.sockets[0].getsockname()[1]

    async def stop(self) -> None:
        """Stop listening. Answers under way are finished by their own deadline."""
        if self._server is not None:
            self._server.close()
            await self._server.wait_closed()
            self._server = None

    async def __aenter__(self) -> Self:
        await self.start()
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.stop()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._open += 1
        try:
            async with asyncio.timeout(_REQUEST_SECONDS):
                if self._open > _MAX_CONNECTIONS:
                    return
                status, content_type, body, head_only = await self._answer(reader)
                writer.write(_format(status, content_type, body, head_only=head_only))
                await writer.drain()
        except (OSError, TimeoutError, asyncio.IncompleteReadError):
            return  # the caller went away or was too slow; it will ask again
        finally:
            self._open -= 1
            writer.close()
            with contextlib.suppress(OSError):
                await writer.wait_closed()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[HTTPStatus, str, bytes, bool]:
        try:
            head = await reader.readuntil(b"\r\n\r\n")
        except asyncio.LimitOverrunError:
            return HTTPStatus.REQUEST_HEADER_FIELDS_TOO_LARGE, _JSON, b"{}", False
        parts = head.split(b"\r\n", 1)[0].split(b" ")
        if len(parts) != 3 or not parts[2].startswith(b"HTTP/1."):  # method, target, version
            return HTTPStatus.BAD_REQUEST, _JSON, b"{}", False
        method, target = parts[0], parts[1].split(b"?", 1)[0]
        if method not in {b"GET", b"HEAD"}:
            return HTTPStatus.METHOD_NOT_ALLOWED, _JSON, b"{}", False
        return *self._find_page(target), method == b"HEAD"

    def _find_page(self, target: bytes) -> tuple[HTTPStatus, str, bytes]:
        match target:
            case b"/live":
                live = self._live()
                return _choose_status(good=live), _JSON, orjson.dumps({"live": live})
            case b"/ready":
                ready, reasons = self._ask_ready()
                page = {"ready": ready, "reasons": mask_members(reasons)}
                return _choose_status(good=ready), _JSON, orjson.dumps(page)
            case b"/metrics":
                self._metrics.set(Metric.UP, float(self._ask_ready()[0]))
                return HTTPStatus.OK, CONTENT_TYPE, self._metrics.render()
        return HTTPStatus.NOT_FOUND, _JSON, b"{}"

    def _ask_ready(self) -> tuple[bool, Mapping[str, str]]:
        try:
            return self._ready()
        except Exception as error:  # noqa: BLE001 - a broken check means not ready; the endpoint stays up to say so
            get_log("health").error("ready_check_failed", exc_info=error)
            return False, {"check": type(error).__name__}


def _choose_status(*, good: bool) -> HTTPStatus:
    return HTTPStatus.OK if good else HTTPStatus.SERVICE_UNAVAILABLE


def _format(status: HTTPStatus, content_type: str, body: bytes, *, head_only: bool) -> bytes:
    head = (
        f"HTTP/1.1 {status.value} {status.phrase}\r\n"
        f"Content-Type: {content_type}\r\nContent-Length: {len(body)}\r\n"
        "Cache-Control: no-store\r\nConnection: close\r\n\r\n"
    ).encode()
    return head if head_only else head + body

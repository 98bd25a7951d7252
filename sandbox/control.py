"""A tiny HTTP server for the sandbox's control port: JSON in, JSON out, one request per connection."""

from __future__ import annotations

import asyncio
import json
from typing import TYPE_CHECKING, Any
from urllib.parse import parse_qsl, urlsplit

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Mapping

    Route = Callable[[dict[str, str], dict[str, Any]], Awaitable[Any]]

_LARGEST_BODY = 65536
_REASONS = {200: "OK", 400: "Bad Request", 404: "Not Found"}


class ControlServer:
    """Serves routes: (method, path) -> coroutine of (query, body) returning what becomes the JSON answer.

    ``ValueError``, ``TypeError`` and ``KeyError`` of a route become 400 with the error's text; an unknown path is 404.
    """

    def __init__(self, routes: Mapping[tuple[str, str], Route]) -> None:
        self._routes = routes
        self._server: asyncio.Server | None = None
        self._connections: set[asyncio.Task[None]] = set()

    @property
    def port(self) -> int:
        """The port it listens on."""
        if self._server is None:
            raise RuntimeError("the control server is not started")
        return int(self._server.sockets[0].getsockname()[1])

    async def start(self, host: str, port: int) -> None:
        """Listen; port 0 takes a free one."""

        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._serve(reader, writer))
            self._connections.add(task)
            task.add_done_callback(self._connections.discard)

        self._server = await asyncio.start_server(accept, host, port)

    async def stop(self) -> None:
        """Close the port and every connection."""
        if self._server is not None:
            self._server.close()
            self._server = None
        connections = list(self._connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            status, answer = await self._answer(reader)
            body = json.dumps(answer, ensure_ascii=False).encode()
            head = (
                f"HTTP/1.1 {status} {_REASONS[status]}\r\nContent-Type: application/json\r\n"
                f"Content-Length: {len(body)}\r\nConnection: close\r\n\r\n"
            )
            writer.write(head.encode() + body)
            await writer.drain()
        except (ConnectionError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass
        finally:
            writer.close()

    async def _answer(self, reader: asyncio.StreamReader) -> tuple[int, Any]:
        head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1")
        request_line, *header_lines = head.split("\r\n")
        try:
            method, target, _version = request_line.split(" ")
            headers = {name.lower(): value.strip() for name, _, value in (line.partition(":") for line in header_lines)}
            length = int(headers.get("content-length", "0"))
            if length > _LARGEST_BODY:
                raise ValueError("body too large")  # noqa: TRY301 - one place turns wrong requests into 400
            body = json.loads(await reader.readexactly(length)) if length else {}
            address = urlsplit(target)
            route = self._routes.get((method, address.path))
            if route is None:
                return 404, {"error": f"no {method} {address.path}"}
            return 200, await route(dict(parse_qsl(address.query)), body)
        except (ValueError, TypeError, KeyError) as error:
            return 400, {"error": f"{type(error).__name__}: {error}"}

"""MLLP: HL7 v2 messages over TCP, one answer per message.

The answer comes back framed alike on the same connection. Nothing in the frame ties it to its message: that is MSA-2
alone. A late answer taken for the next message's loses money silently, so each connection has one message in flight,
and a connection that showed anything unexpected is never used again.
"""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING, Self, cast

from schemas.failure import Failure, FailureKind
from schemas.formats import hl7
from schemas.formats.mllp import END, START

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import TracebackType

_LIMIT = 1_048_576
"""Longest answer taken, in bytes."""


class MllpFailure(Failure):
    """No answer that belongs to the message: UNAVAILABLE when nothing was written, AMBIGUOUS when it may have landed.

    INVALID (FRAME_BYTES) is the third kind: the message holds a byte that ends a frame. ``code`` says what was seen:
    CONNECT_FAILED, CONNECT_TIMEOUT, TLS_FAILED, and after the write NO_ANSWER, ANSWER_CUT, ANSWER_UNREADABLE,
    ANSWER_MISMATCHED, ANSWER_TOO_LONG.
    """


class MllpClient:
    """A pool of connections to one MLLP receiver; an async context manager. Use from one event loop.

    ``connections`` messages are in flight at most, one per connection; further calls wait their turn in order. An idle
    connection on which anything arrives, or which its peer closes, is dropped before it can carry a message. ``tls``
    is the context to verify the receiver with; None means plain TCP.
    """

    def __init__(
        self,
        host: str,
        port: int,
        *,
        connections: int = 1,
        tls: ssl.SSLContext | None = None,
        connect_timeout: float = 10.0,
    ) -> None:
        self._host = host
        self._port = port
        self._tls = tls
        self._connect_timeout = connect_timeout
        self._turns = asyncio.Semaphore(connections)
        self._idle: list[_Connection] = []
        self._closed = False

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()

    async def close(self) -> None:
        """Close the idle connections; one in use closes when its call ends."""
        self._closed = True
        while self._idle:
            self._idle.pop().close()
        await asyncio.sleep(0)  # lets the transports say goodbye

    async def send(
        self,
        message: bytes,
        control_id: str,
        *,
        deadline: float,
        before_write: Callable[[], None] | None = None,
    ) -> bytes:
        """Write the message once and return the answer whose MSA-2 is ``control_id``, unframed.

        ``deadline`` in seconds covers everything: waiting for a connection, connecting, writing and the answer.
        ``before_write`` is called with nothing between it and the socket write; when it raises, nothing was written and
        its exception goes to the caller. Raises ``MllpFailure``. A call that is cancelled after the write closes its
        connection; the message may have landed.
        """
        if START in message or END[:1] in message:
            raise MllpFailure(FailureKind.INVALID, "FRAME_BYTES", "message")
        connection: _Connection | None = None
        turn = False
        try:
            async with asyncio.timeout(deadline):
                await self._turns.acquire()
                turn = True
                connection = await self._take()
                if before_write is not None:
                    before_write()
                connection.write(START + message + END)
                frame = await connection.read_frame()
                _check(frame, control_id)
        except TimeoutError as error:
            if connection is not None and connection.written:
                raise MllpFailure(FailureKind.AMBIGUOUS, "NO_ANSWER") from error
            raise MllpFailure(FailureKind.UNAVAILABLE, "CONNECT_TIMEOUT") from error
        else:
            connection.finish()
            return frame
        finally:
            if connection is not None:
                self._give_back(connection)
            if turn:
                self._turns.release()

    async def _take(self) -> _Connection:
        """An idle connection that is still good, or a new one."""
        if self._idle:
            # Two rounds of the loop: it sees what the sockets hold (a close, a late answer), then acts on it.
            await asyncio.sleep(0)
            await asyncio.sleep(0)
        while self._idle:
            connection = self._idle.pop()
            if connection.usable:
                return connection
            connection.close()
        try:
            async with asyncio.timeout(self._connect_timeout):
                _, opened = await asyncio.get_running_loop().create_connection(
                    _Connection, self._host, self._port, ssl=self._tls
                )
        except ssl.SSLError as error:
            raise MllpFailure(FailureKind.UNAVAILABLE, "TLS_FAILED") from error
        except TimeoutError:
            raise
        except OSError as error:  # refused, reset, no route, unknown name
            raise MllpFailure(FailureKind.UNAVAILABLE, "CONNECT_FAILED") from error
        return opened

    def _give_back(self, connection: _Connection) -> None:
        if connection.usable and not self._closed:
            self._idle.append(connection)
        else:
            connection.close()


class _Connection(asyncio.Protocol):
    """One connection. ``usable`` only while nothing is in flight and nothing unexpected was seen."""

    def __init__(self) -> None:
        self._transport: asyncio.WriteTransport | None = None
        self._received = bytearray()
        self._waiter: asyncio.Future[None] | None = None
        self._open = False
        self.written = False
        """Whether a message was written and its answer has not come."""

    @property
    def usable(self) -> bool:
        transport = self._transport
        return (
            self._open
            and transport is not None
            and not transport.is_closing()
            and not self.written
            and not self._received
        )

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        self._transport = cast("asyncio.WriteTransport", transport)  # uvloop's transports do not inherit from it
        self._open = True

    def data_received(self, data: bytes) -> None:
        self._received += data
        self._wake()
        if not self.written or len(self._received) > _LIMIT:
            self.close()

    def eof_received(self) -> bool:
        self._open = False
        self._wake()
        return False

    def connection_lost(self, exc: Exception | None) -> None:  # noqa: ARG002 - asyncio names it
        self._open = False
        self._wake()

    def write(self, frame: bytes) -> None:
        assert self._transport is not None
        self.written = True
        self._transport.write(frame)

    async def read_frame(self) -> bytes:
        """The next frame's content. Raises ``MllpFailure`` AMBIGUOUS."""
        while True:
            end = self._received.find(END)
            if end >= 0:
                break
            if len(self._received) > _LIMIT:
                raise MllpFailure(FailureKind.AMBIGUOUS, "ANSWER_TOO_LONG")
            if not self._open:
                raise MllpFailure(FailureKind.AMBIGUOUS, "ANSWER_CUT")
            self._waiter = asyncio.get_running_loop().create_future()
            await self._waiter
        frame = bytes(self._received[:end])
        # What follows the frame stays: it makes the connection unusable for the next message.
        del self._received[: end + len(END)]
        if not frame.startswith(START):
            raise MllpFailure(FailureKind.AMBIGUOUS, "ANSWER_UNREADABLE")
        return frame[len(START) :]

    def finish(self) -> None:
        """The answer came and was the right one."""
        self.written = False

    def close(self) -> None:
        self._open = False
        if self._transport is not None:
            # Not a graceful close: unwritten bytes of a call that has given up must not leave later.
            self._transport.abort()

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def _check(frame: bytes, control_id: str) -> None:
    try:
        answer = hl7.read_ack(frame)
    except Failure as error:
        raise MllpFailure(FailureKind.AMBIGUOUS, "ANSWER_UNREADABLE", error.field) from error
    if answer.control_id != control_id:
        raise MllpFailure(FailureKind.AMBIGUOUS, "ANSWER_MISMATCHED", "MSA-2")

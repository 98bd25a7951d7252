"""The MLLP listener: takes HL7 v2 messages from known senders, publishes them raw, and only then answers.

One message after the other per connection, answers in the order of the messages. An acknowledgement means that Kafka
has the bytes; when Kafka does not take them there is no answer and the connection closes, so that the sender keeps the
message and tries again. The answer's code is a function of the message alone: a repeat gets the same one, also after a
restart.
"""

from __future__ import annotations

import asyncio
import hashlib
import re
import socket
import time
from collections import OrderedDict
from dataclasses import dataclass
from datetime import UTC, tzinfo
from typing import TYPE_CHECKING, Protocol
from zoneinfo import ZoneInfo

from schemas.failure import Failure, TemporaryError
from schemas.formats import hl7
from schemas.formats.mllp import END, START, Deframer, Frame
from sources.contract import RawEvent
from telemetry.log import get_log

if TYPE_CHECKING:
    import ssl
    from collections.abc import Callable, Sequence

    from schemas.tenancy import Feed, Tenancy
    from telemetry.metrics import Count

SOURCE = "hl7"

_READ = 65_536
_CLOSING_SECONDS = 5.0
_MESSAGE_TYPE = re.compile(r"[A-Z0-9]{3}(\^[A-Z0-9]{1,4})?\Z")
_HEADER_WITHIN = re.compile(rb"[\r\n](?:MSH|FHS|BHS)[^A-Za-z0-9\s]")
_CONDITIONS = frozenset({"AL", "NE", "ER", "SU"})

_LOG = get_log("listener")


class ListenerUnavailable(TemporaryError):
    """The listener cannot take its address."""

    code = "RS230"
    meaning = "The MLLP listener could not open its port."
    default_remedy = "Stop the program that has the port, or choose another host and port for the listener."


class Publisher(Protocol):
    """What the listener needs of ``sources.intake.Intake``."""

    async def publish(
        self,
        *,
        source: str,
        account: str,
        facility: str,
        content_type: str,
        verdict: str,
        events: Sequence[RawEvent],
    ) -> None:
        """Return when the events are durable; raise ``TemporaryError`` when they are not."""


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a message is not taken: a metric label and what the answer says."""

    reason: str
    fault: hl7.Fault


_UNKNOWN_SENDER = Refusal("unknown_sender", hl7.Fault("204", "Unknown sender", ("MSH", "1", "3")))
_TYPE_MISSING = Refusal("message_type_missing", hl7.Fault("101", "Required field missing", ("MSH", "1", "9")))
_TYPE_INVALID = Refusal("message_type_invalid", hl7.Fault("200", "Unsupported message type", ("MSH", "1", "9")))
_CONTROL_ID_MISSING = Refusal("control_id_missing", hl7.Fault("101", "Required field missing", ("MSH", "1", "10")))
_BATCH = Refusal("batch", hl7.Fault("200", "Batches are not supported"))
_SEVERAL = Refusal("several_messages", hl7.Fault("100", "One message per frame"))
_TOO_LONG = Refusal("too_long", hl7.Fault("207", "Message too long"))


def list_answers(header: hl7.Header, *, accepted: bool) -> tuple[str, ...]:
    """Codes of the answers a message gets, by MSH-15 and MSH-16 (table 0155).

    Both blank is the original mode: AA or AR. Otherwise the enhanced mode: CA or CR when MSH-15 asks, then AA when
    MSH-16 asks; a message that was not accepted gets AR only when no CR tells its sender so. A value outside the table
    counts as AL: an answer too many is seen, a missing one stops the feed.
    """
    accept, application = (
        value if value in _CONDITIONS or not value else "AL"
        for value in (header.accept_condition.strip().upper(), header.application_condition.strip().upper())
    )
    if not accept and not application:
        return ("AA",) if accepted else ("AR",)
    asked = {"AL", "SU"} if accepted else {"AL", "ER"}
    codes = ("CA" if accepted else "CR",) if accept in asked else ()
    if application in asked and (accepted or not codes):
        return (*codes, "AA" if accepted else "AR")
    return codes


@dataclass(slots=True, eq=False)
class _Connection:
    writer: asyncio.StreamWriter
    peer: str
    is_busy: bool = False


class Listener:
    """MLLP server for the feeds of a tenancy.

    ``port`` 0 takes a free one. ``max_message_bytes`` is the longest message taken (a longer one is answered with a
    rejection), ``idle_seconds`` how long a connection may say nothing, ``max_connections`` how many there may be at
    once, ``kept_answers`` how many answers are remembered byte for byte. ``count`` takes metric names of
    ``telemetry.metrics``; ``clock`` gives seconds since the epoch.
    """

    def __init__(
        self,
        tenancy: Tenancy,
        intake: Publisher,
        *,
        count: Count,
        host: str = "127.0.0.1",
        port: int = 2575,
        tls: ssl.SSLContext | None = None,
        max_message_bytes: int = 1_048_576,
        idle_seconds: float = 3600.0,
        max_connections: int = 256,
        kept_answers: int = 10_000,
        clock: Callable[[], float] = time.time,
    ) -> None:
        self._intake = intake
        self._count = count
        self._host = host
        self._port = port
        self._tls = tls
        self._max_message_bytes = max_message_bytes
        self._idle_seconds = idle_seconds
        self._max_connections = max_connections
        self._kept_answers = kept_answers
        self._clock = clock
        self._feeds = {(feed.sending_application, feed.sending_facility): feed for feed in tenancy.feeds}
        self._zones = {
            feed.name: ZoneInfo(tenancy.get_facility(feed.facility).time_zone) for feed in self._feeds.values()
        }
        self._answers: OrderedDict[tuple[str, bytes], bytes] = OrderedDict()
        self._connections: dict[asyncio.Task[None], _Connection] = {}
        self._server: asyncio.Server | None = None
        self._stopping = False

    @property
    def port(self) -> int:
        """The port it listens on; the configured one before the start."""
        if self._server is not None and self._server.sockets:
            return int(self._server.sockets[0].getsockname()[1])
        return self._port

    @property
    def connections(self) -> int:
        """Connections open now."""
        return len(self._connections)

    async def start(self) -> None:
        """Begin to listen. Raises ``ListenerUnavailable``."""
        self._stopping = False
        try:
            self._server = await asyncio.start_server(
                self._accept,
                self._host,
                self._port,
                ssl=self._tls,
                ssl_shutdown_timeout=_CLOSING_SECONDS if self._tls else None,
                limit=_READ,
            )
        except OSError as error:
            place = f"{self._host}:{self._port}"
            raise ListenerUnavailable("The address cannot be opened.", place=place) from error
        _LOG.info("listening", host=self._host, port=self.port, tls=self._tls is not None)

    async def stop(self, *, grace_seconds: float = 10.0) -> None:
        """Stop listening; a message in hand is published and answered first, within ``grace_seconds``."""
        self._stopping = True
        if self._server is not None:
            self._server.close()
        for connection in self._connections.values():
            if not connection.is_busy:
                connection.writer.close()
        if tasks := list(self._connections):
            _, late = await asyncio.wait(tasks, timeout=grace_seconds)
            for task in late:
                task.cancel()
            await asyncio.gather(*late, return_exceptions=True)
        if self._server is not None:
            await self._server.wait_closed()
            self._server = None

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if self._stopping or len(self._connections) >= self._max_connections:
            self._count("refused_total", source=SOURCE, reason="too_many_connections")
            _LOG.warning("connection_refused", reason="too_many_connections")
            writer.close()
            return
        address = writer.get_extra_info("peername")
        connection = _Connection(writer, str(address[0]) if isinstance(address, tuple) else "unknown")
        self._connections[task] = connection
        raw_socket = writer.get_extra_info("socket")
        if raw_socket is not None:
            # Interfaces are silent for hours; without probes a peer that vanished would hold its place.
            raw_socket.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        try:
            await self._serve(reader, connection)
            writer.close()
            async with asyncio.timeout(_CLOSING_SECONDS):
                await writer.wait_closed()
        except (TimeoutError, OSError):
            pass  # the peer is silent or gone: it holds no answer it was not given
        except asyncio.CancelledError:
            if not self._stopping:
                raise
        finally:
            writer.transport.abort()
            del self._connections[task]

    async def _serve(self, reader: asyncio.StreamReader, connection: _Connection) -> None:
        deframer = Deframer(self._max_message_bytes)
        while not self._stopping:
            async with asyncio.timeout(self._idle_seconds):
                data = await reader.read(_READ)
            if not data:
                if deframer.pending:
                    self._count("mllp_framing_errors_total", reason="cut")
                return
            garbage = deframer.garbage
            connection.is_busy = True
            try:
                for frame in deframer.feed(data):
                    if not await self._take(frame, connection) or self._stopping:
                        return
            finally:
                connection.is_busy = False
                for _ in range(deframer.garbage - garbage):
                    self._count("mllp_framing_errors_total", reason="garbage")
            if deframer.dropped > 8 * self._max_message_bytes:
                self._count("mllp_framing_errors_total", reason="endless")
                _LOG.warning("connection_closed", reason="endless_message")
                return

    async def _take(self, frame: Frame, connection: _Connection) -> bool:
        """Publish and answer one message; False when the connection must close."""
        try:
            header = hl7.read_header(frame.content)
        except Failure as failure:
            # Nothing in it says whom to answer, or which message.
            self._count("refused_total", source=SOURCE, reason="header_unreadable")
            _LOG.warning("message_refused", reason="header_unreadable", code=failure.code)
            return False
        if header.message_code == "ACK":
            # Answering an answer would never end.
            self._count("refused_total", source=SOURCE, reason="unsolicited_ack")
            return True
        feed = self._find_feed(header)
        refusal = self._judge(header, frame, feed)
        if refusal is None:
            assert feed is not None
            if not await self._publish(header, frame.content, feed, connection.peer):
                return False
        else:
            self._count("refused_total", source=SOURCE, reason=refusal.reason)
            _LOG.warning("message_refused", reason=refusal.reason, feed=feed.name if feed else "unknown")
        answer = self._answer(header, frame.content, feed, refusal)
        if answer:
            connection.writer.write(answer)
            async with asyncio.timeout(self._idle_seconds):
                await connection.writer.drain()
        return True

    def _find_feed(self, header: hl7.Header) -> Feed | None:
        """The sender by MSH-3 and MSH-4: the whole fields as sent, or their first components."""
        whole = self._feeds.get((header.segment.raw(3), header.segment.raw(4)))
        return whole or self._feeds.get((header.sending_application, header.sending_facility))

    def _judge(self, header: hl7.Header, frame: Frame, feed: Feed | None) -> Refusal | None:
        if header.segment.name != "MSH":
            return _BATCH
        if feed is None:
            return _UNKNOWN_SENDER
        if not header.message_code:
            return _TYPE_MISSING
        if not _MESSAGE_TYPE.match(_name_type(header)):
            return _TYPE_INVALID
        if not header.control_id.strip():
            return _CONTROL_ID_MISSING
        if not frame.is_whole:
            return _TOO_LONG
        if _HEADER_WITHIN.search(frame.content, frame.content.find(b"MSH")):
            return _SEVERAL
        return None

    async def _publish(self, header: hl7.Header, content: bytes, feed: Feed, peer: str) -> bool:
        try:
            occurred_at = hl7.read_timestamp(header.time, self._zones[feed.name], "MSH-7") / 1000
        except Failure:
            occurred_at = None
        event = RawEvent(
            key=feed.name,
            body=content,
            delivery_id=header.control_id,
            event_type=_name_type(header),
            occurred_at=occurred_at,
        )
        try:
            await self._intake.publish(
                source=SOURCE,
                account=feed.name,
                facility=feed.facility,
                content_type=hl7.CONTENT_TYPE,
                verdict=f"{'mllp' if self._tls is None else 'mllps'};peer={peer}",
                events=[event],
            )
        except TemporaryError as error:
            self._count("refused_total", source=SOURCE, reason="not_durable")
            _LOG.warning("message_not_taken", feed=feed.name, code=error.code)
            return False
        except Exception as error:  # noqa: BLE001 - whatever it is, the message is not durable: no answer
            self._count("refused_total", source=SOURCE, reason="internal")
            _LOG.error("message_not_taken", feed=feed.name, exception=type(error).__name__)
            return False
        self._count("raw_accepted_total", source=SOURCE, facility=feed.facility)
        return True

    def _answer(self, header: hl7.Header, content: bytes, feed: Feed | None, refusal: Refusal | None) -> bytes:
        """The framed answers to a message; empty when none is asked for."""
        name = feed.name if feed else "unknown"
        codes = list_answers(header, accepted=refusal is None)
        self._count("mllp_messages_total", feed=name, answer=" ".join(codes) or "none")
        digest = hashlib.sha256(content).digest()
        kept = self._answers.get((name, digest))
        if kept is not None:
            self._count("mllp_repeats_total", feed=name)
            self._answers.move_to_end((name, digest))
            return kept
        zone: tzinfo = self._zones[name] if feed else UTC
        moment = hl7.write_timestamp(int(self._clock() * 1000), zone)
        answer = b"".join(
            START
            + hl7.build_ack(
                header,
                code,
                control_id=code + digest.hex()[:18],  # 20 characters: the length of MSH-10 up to 2.6
                time=moment,
                fault=refusal.fault if refusal else None,
            )
            + END
            for code in codes
        )
        if feed and refusal is None:
            self._answers[name, digest] = answer
            while len(self._answers) > self._kept_answers:
                self._answers.popitem(last=False)
        return answer


def _name_type(header: hl7.Header) -> str:
    return f"{header.message_code}^{header.trigger}" if header.trigger else header.message_code

"""A billing system that takes patient payments over MLLP, keeps its own ledger, and fails on request.

It behaves as an Epic-like receiver of DFT^P03 and DFT^P11 does: one listener per facility interface, an
acknowledgement with MSA-1 (AA posted, AE error in the message, AR refused) and the sender's MSH-10 in MSA-2, an ERR
segment that names the field. The HL7 facts: DFT^P03 = MSH EVN PID [PV1] {FT1}; FT1-6 type from table 0017, FT1-7 the
receiver's own payment code, FT1-11 amount as ``12.50&USD`` (hl7.eu, segment FT1 and message DFT_P03).

An instance with ``duplicate_control="msh10"`` answers a repeated MSH-10 of the same sender with the same bytes and
posts nothing; only messages that were posted are remembered, so a refused one may be sent again once its cause is gone.
With ``"none"`` every message posts: whoever resends doubles, as at a site without duplicate control.

Failures are told by Python (``set_mode``) or by the control port (loopback HTTP):

* ``GET /health``, ``GET /ledger?instance=NAME&after=ID``
* ``POST /mode`` with ``{"instance": NAME or null, "kind": KIND}`` and the members of ``Mode``: ``count``, ``every``,
  ``object_id``, ``seconds``
* ``POST /reset`` with ``{"instance": NAME or null, "ledger": true or false}``
"""

from __future__ import annotations

import asyncio
import contextlib
import itertools
from dataclasses import asdict, dataclass
from datetime import UTC, datetime
from enum import Enum, StrEnum
from typing import TYPE_CHECKING, Any

from sandbox.control import ControlServer
from sandbox.hl7_text import Hl7Text, split_message
from sandbox.ledger import Ledger, hash_message
from sandbox.mllp import LARGEST_FRAME, read_frame, wrap_frame
from sandbox.transactions import REJECT_MARKER, Instance, Refusal, build_acknowledgement, read_postings

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path


class ModeKind(StrEnum):
    """How an instance fails."""

    REJECT = "reject"
    """AR, nothing posted."""
    BUSY = "busy"
    """AE with condition 206 (record locked), nothing posted: the same message may succeed later."""
    SLOW = "slow"
    """Waits ``seconds``, then posts and answers."""
    HANG_AFTER_POSTING = "hang_after_posting"
    """Posts and never answers on that connection."""
    GARBAGE_ACK = "garbage_ack"
    """Posts and answers bytes that are no HL7."""
    WRONG_MSA2 = "wrong_msa2"
    """Posts and answers with another message's control id."""
    CLOSE_BEFORE_POSTING = "close_before_posting"
    CLOSE_AFTER_POSTING = "close_after_posting"
    REFUSE_CONNECTIONS = "refuse_connections"
    """The port is closed until ``seconds`` have passed (0: until reset); neither ``count`` nor ``every`` applies."""


@dataclass(frozen=True, slots=True)
class Mode:
    """A failure: applied to every ``every``-th matching message, ``count`` times (None: until reset).

    ``object_id`` limits it to messages whose FT1-8 is that text.
    """

    kind: ModeKind
    count: int | None = None
    every: int = 1
    object_id: str | None = None
    seconds: float = 0.0

    def __post_init__(self) -> None:
        if self.every < 1 or (self.count is not None and self.count < 1) or self.seconds < 0:
            raise ValueError("a mode needs every >= 1, count >= 1 or none, seconds >= 0")
        if self.kind is ModeKind.REFUSE_CONNECTIONS and (self.count or self.every > 1 or self.object_id):
            raise ValueError("refuse_connections takes seconds only: a closed port sees no messages to count")


class _RunningMode:
    """A mode with what is left of it."""

    def __init__(self, mode: Mode) -> None:
        self.mode = mode
        self.left = mode.count
        self._seen = 0

    def take(self, object_ids: Sequence[str]) -> bool:
        if self.left == 0 or (self.mode.object_id is not None and self.mode.object_id not in object_ids):
            return False
        self._seen += 1
        if self._seen % self.mode.every:
            return False
        if self.left is not None:
            self.left -= 1
        return True


_REFUSING = {
    ModeKind.REJECT: Refusal("R", "207", "Refused by the interface"),
    ModeKind.BUSY: Refusal("E", "206", "Application record locked"),
}


class _Silence(Enum):
    """No answer: keep the connection open, or close it."""

    HANG = "hang"
    CLOSE = "close"


class _Interface:
    """A running instance: its listener, connections, modes and counts."""

    def __init__(self, instance: Instance) -> None:
        self.instance = instance
        self.port = instance.port
        self.server: asyncio.Server | None = None
        self.connections: set[asyncio.Task[None]] = set()
        self.modes: list[_RunningMode] = []
        self.reopening: asyncio.Task[None] | None = None
        self.open_calls = 0
        self.counts = {"messages": 0, "posted": 0, "duplicates": 0, "conflicts": 0, "refused": 0}

    def take_mode(self, object_ids: Sequence[str]) -> Mode | None:
        return next((running.mode for running in self.modes if running.take(object_ids)), None)


class BillingSystem:
    """The simulator: several instances over one ledger file, and the control port.

    After ``start`` the real ports are in ``ports`` and ``control_port``. A ledger file is opened by one system at a
    time; a second start on the same file goes on where the first ended.
    """

    def __init__(
        self,
        path: Path,
        instances: Sequence[Instance],
        control_port: int | None = 0,
        *,
        host: str = "127.0.0.1",
        reject_marker: str = REJECT_MARKER,
    ) -> None:
        names = [instance.name for instance in instances]
        if len(set(names)) != len(names) or not names:
            raise ValueError("a billing system needs instances with different names")
        self._path = path
        self._interfaces = {instance.name: _Interface(instance) for instance in instances}
        self._wanted_control_port = control_port
        self._host = host
        self._reject_marker = reject_marker
        self._book: Ledger | None = None
        self._control: ControlServer | None = None
        self._numbers = itertools.count(1)

    @property
    def ports(self) -> dict[str, int]:
        """Instance name -> port."""
        return {name: interface.port for name, interface in self._interfaces.items()}

    @property
    def control_port(self) -> int | None:
        """Port of the control API, None when it was not asked for."""
        return self._control.port if self._control else None

    async def start(self) -> None:
        """Open the ledger and every port. A port in use raises ``OSError`` and leaves nothing running."""
        self._book = Ledger(self._path)
        try:
            for interface in self._interfaces.values():
                await self._listen(interface)
            if self._wanted_control_port is not None:
                control = ControlServer(
                    {
                        ("GET", "/health"): self._serve_health,
                        ("GET", "/ledger"): self._serve_ledger,
                        ("POST", "/mode"): self._serve_mode,
                        ("POST", "/reset"): self._serve_reset,
                    }
                )
                await control.start(self._host, self._wanted_control_port)
                self._control = control
        except BaseException:
            await self.stop()
            raise

    async def stop(self) -> None:
        """Close every port and connection, then the ledger. What was acknowledged is on disk."""
        if self._control is not None:
            await self._control.stop()
            self._control = None
        for interface in self._interfaces.values():
            if interface.reopening is not None:
                interface.reopening.cancel()
                interface.reopening = None
            await self._close_port(interface)
        if self._book is not None:
            self._book.close()
            self._book = None

    def read_ledger(self, *, instance: str | None = None, after: int = 0) -> list[dict[str, Any]]:
        """Postings in order: the fields of ``Posting`` and ``id``; only those with an id above ``after``."""
        return self._ledger.read(instance=instance, after=after)

    def read_health(self) -> dict[str, Any]:
        """Per instance: port, postings in the ledger, counts since the start, modes with what is left of them."""
        return {
            "status": "ok",
            "instances": {
                name: {
                    "port": interface.port,
                    "listening": interface.server is not None,
                    "duplicate_control": interface.instance.duplicate_control,
                    "postings": self._ledger.count(name),
                    **interface.counts,
                    "modes": [asdict(running.mode) | {"left": running.left} for running in interface.modes],
                }
                for name, interface in self._interfaces.items()
            },
        }

    def count_open(self, instance: str) -> int:
        """Messages that have arrived and whose answer is not written; those never answered are not counted."""
        return self._interfaces[instance].open_calls

    async def set_mode(self, mode: Mode, *, instance: str | None = None) -> None:
        """Add a failure to one instance, or to all. ``KeyError`` for an unknown instance."""
        for interface in self._select(instance):
            interface.modes.append(_RunningMode(mode))
            if mode.kind is ModeKind.REFUSE_CONNECTIONS:
                await self._close_port(interface)
                if mode.seconds:
                    interface.reopening = asyncio.create_task(self._reopen_after(interface, mode.seconds))

    async def reset(self, *, instance: str | None = None, ledger: bool = False) -> None:
        """End every failure of one instance, or of all; with ``ledger`` forget their postings and answers too."""
        for interface in self._select(instance):
            interface.modes.clear()
            if interface.reopening is not None:
                interface.reopening.cancel()
                interface.reopening = None
            if interface.server is None:
                await self._listen(interface)
        if ledger:
            self._ledger.clear(instance)

    @property
    def _ledger(self) -> Ledger:
        if self._book is None:
            raise RuntimeError("the billing system is not started")
        return self._book

    def _select(self, instance: str | None) -> list[_Interface]:
        return list(self._interfaces.values()) if instance is None else [self._interfaces[instance]]

    async def _listen(self, interface: _Interface) -> None:
        def accept(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
            task = asyncio.get_running_loop().create_task(self._serve_connection(interface, reader, writer))
            interface.connections.add(task)
            task.add_done_callback(interface.connections.discard)

        interface.server = await asyncio.start_server(accept, self._host, interface.port, limit=LARGEST_FRAME)
        interface.port = interface.server.sockets[0].getsockname()[1]

    async def _close_port(self, interface: _Interface) -> None:
        if interface.server is not None:
            interface.server.close()
            interface.server = None
        connections = list(interface.connections)
        for connection in connections:
            connection.cancel()
        await asyncio.gather(*connections, return_exceptions=True)

    async def _reopen_after(self, interface: _Interface, seconds: float) -> None:
        await asyncio.sleep(seconds)
        interface.modes = [
            running for running in interface.modes if running.mode.kind is not ModeKind.REFUSE_CONNECTIONS
        ]
        interface.reopening = None
        await self._listen(interface)

    async def _serve_connection(
        self, interface: _Interface, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        try:
            while (raw := await read_frame(reader)) is not None:
                interface.open_calls += 1
                try:
                    reaction = await self._handle(interface, raw)
                finally:
                    interface.open_calls -= 1
                if reaction is _Silence.HANG:
                    await _drain_until_closed(reader)
                    break
                if reaction is _Silence.CLOSE:
                    break
                if reaction:
                    writer.write(wrap_frame(reaction))
                    await writer.drain()
        except ConnectionError:
            pass
        finally:
            writer.close()

    async def _handle(self, interface: _Interface, raw: bytes) -> bytes | _Silence:
        """Read, fail as told, post, and return the answer (empty: the sender wants none)."""
        interface.counts["messages"] += 1
        message = split_message(raw)
        object_ids = [message.read(fields, 8) for fields in message.find_all("FT1")] if message else []
        mode = interface.take_mode(object_ids)
        kind = mode.kind if mode else None
        if kind is ModeKind.CLOSE_BEFORE_POSTING:
            return _Silence.CLOSE
        if kind in _REFUSING:
            return self._refuse(interface, message, _REFUSING[kind])
        if mode is not None and kind is ModeKind.SLOW:
            await asyncio.sleep(mode.seconds)
        answer = self._decide(interface, message, raw)
        return answer if kind is None else self._spoil(kind, message, answer)

    def _spoil(self, kind: ModeKind, message: Hl7Text | None, answer: bytes) -> bytes | _Silence:
        """What a failing instance does instead of sending the answer to a message it has dealt with."""
        if kind is ModeKind.HANG_AFTER_POSTING:
            return _Silence.HANG
        if kind is ModeKind.CLOSE_AFTER_POSTING:
            return _Silence.CLOSE
        if kind is ModeKind.GARBAGE_ACK:
            return b"\x00 502 Bad Gateway \xff"
        if kind is ModeKind.WRONG_MSA2:
            return self._acknowledge(message, None, echo=f"NOT{next(self._numbers)}")
        return answer

    def _decide(self, interface: _Interface, message: Hl7Text | None, raw: bytes) -> bytes:
        """Post the message, or refuse it, or repeat the answer it had; there is no await between look-up and commit."""
        if message is None:
            return self._refuse(interface, None, Refusal("R", "100", "Not an HL7 v2 message"))
        instance = interface.instance
        head = message.find("MSH")
        sender = f"{message.read(head, 3)}|{message.read(head, 4)}"
        control_id = message.read(head, 10)
        digest = hash_message(raw)
        dedupes = instance.duplicate_control == "msh10"
        if dedupes and (earlier := self._ledger.find_answer(instance.name, sender, control_id)):
            answer, earlier_digest = earlier
            interface.counts["duplicates"] += 1
            interface.counts["conflicts"] += earlier_digest != digest
            return answer
        postings = read_postings(instance, message, digest=digest, reject_marker=self._reject_marker)
        if isinstance(postings, Refusal):
            return self._refuse(interface, message, postings)
        answer = self._acknowledge(message, None)
        self._ledger.post(postings, sender=sender, answer=answer if dedupes else None)
        interface.counts["posted"] += len(postings)
        return answer

    def _refuse(self, interface: _Interface, message: Hl7Text | None, refusal: Refusal) -> bytes:
        interface.counts["refused"] += 1
        return self._acknowledge(message, refusal)

    def _acknowledge(self, message: Hl7Text | None, refusal: Refusal | None, *, echo: str | None = None) -> bytes:
        now = datetime.now(UTC)
        control_id = f"B{now:%y%m%d%H%M%S}{next(self._numbers):07d}"
        return build_acknowledgement(message, refusal, control_id=control_id, now=now, echo=echo)

    async def _serve_health(self, _query: dict[str, str], _body: dict[str, Any]) -> Any:
        return self.read_health()

    async def _serve_ledger(self, query: dict[str, str], _body: dict[str, Any]) -> Any:
        return self.read_ledger(instance=query.get("instance"), after=int(query.get("after", "0")))

    async def _serve_mode(self, _query: dict[str, str], body: dict[str, Any]) -> Any:
        options = dict(body)
        instance = options.pop("instance", None)
        await self.set_mode(Mode(**(options | {"kind": ModeKind(options["kind"])})), instance=instance)
        return {"status": "ok"}

    async def _serve_reset(self, _query: dict[str, str], body: dict[str, Any]) -> Any:
        await self.reset(instance=body.get("instance"), ledger=body.get("ledger") is True)
        return {"status": "ok"}


async def _drain_until_closed(reader: asyncio.StreamReader) -> None:
    with contextlib.suppress(ConnectionError):
        while await reader.read(65536):
            pass

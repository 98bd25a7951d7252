"""Sends traffic as its senders would: a gateway that signs and retries, an interface engine that keeps order.

Webhooks of a phase go out together, at most ``concurrency`` at a time, a repetition after its first; ADT messages of a
feed go one after the other on one MLLP connection. What is not accepted is sent again with the same bytes (webhooks
with a fresh signature) until it is, for at most ``patience`` seconds.
"""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import time
from collections import Counter
from dataclasses import dataclass
from typing import TYPE_CHECKING

from clients.http import HttpClient, HttpFailure, HttpRequest
from sandbox.expected import write_expected
from sandbox.hl7_text import pick, split_message
from sandbox.mllp import LARGEST_FRAME, read_frame, wrap_frame
from sandbox.plan import Channel, FacilityPlan, Fate, Item, Phase, Traffic, TrafficPlan
from sandbox.scenario import build

if TYPE_CHECKING:
    from collections.abc import Awaitable, Callable, Iterator, Sequence
    from pathlib import Path

__all__ = ["FacilityPlan", "Fate", "Item", "Phase", "Progress", "Summary", "Traffic", "TrafficPlan", "build", "drive"]

_ANSWER_DEADLINE = 10.0
_FIRST_PAUSE = 0.05
_LONGEST_PAUSE = 1.0


@dataclass(frozen=True, slots=True)
class Progress:
    """How far the driver is. ``sent`` counts accepted items of all phases."""

    phase: str
    sent: int
    total: int
    retries: int


@dataclass(frozen=True, slots=True)
class Summary:
    """What was sent and how it was answered.

    ``answers`` counts by HTTP status, MSA-1, or what was seen instead (``CONNECT_FAILED``, ``NO_ANSWER``, ...).
    ``resent`` is how many of the ``retries`` followed an attempt that may have been stored: the most raw records there
    can be beyond the plan. ``given_up`` names items nobody accepted, by event id or MSH-10.
    """

    webhooks: int
    admissions: int
    retries: int
    resent: int
    answers: dict[str, int]
    given_up: tuple[str, ...]
    seconds: float


def sign(body: bytes, secret: str, now: int) -> str:
    """``Stripe-Signature`` of a body: HMAC-SHA256 over ``<now>.<body>``, keyed by the secret's whole text."""
    signature = hmac.new(secret.encode(), f"{now}.".encode() + body, hashlib.sha256).hexdigest()
    return f"t={now},v1={signature}"


async def drive(
    traffic: TrafficPlan | Traffic,
    settled: Callable[[], Awaitable[None]],
    progress: Callable[[Progress], None] | None = None,
    *,
    expected_path: Path | None = None,
    concurrency: int = 32,
    patience: float = 120.0,
    clock: Callable[[], float] = time.time,
) -> Summary:
    """Send everything, phase by phase, and return what happened.

    ``settled`` is awaited between phases (not after the last): it must return only when every accepted record has been
    worked on and every posting it leads to has been made, except what waits for a later phase
    (``Expected.waiting_after``); the expected MRNs depend on it. ``expected_path`` is written before the first send.
    ``clock`` gives the seconds since the epoch for signatures.
    """
    made = build(traffic) if isinstance(traffic, TrafficPlan) else traffic
    if expected_path is not None:
        write_expected(expected_path, made.expected)
    async with HttpClient(max_connections=concurrency) as client:
        driver = _Driver(made, client, progress, concurrency=concurrency, patience=patience, clock=clock)
        return await driver.run(settled)


class _Driver:
    def __init__(
        self,
        traffic: Traffic,
        client: HttpClient,
        progress: Callable[[Progress], None] | None,
        *,
        concurrency: int,
        patience: float,
        clock: Callable[[], float],
    ) -> None:
        self._traffic = traffic
        self._client = client
        self._progress = progress
        self._concurrency = concurrency
        self._patience = patience
        self._clock = clock
        self._facilities = {facility.id: facility for facility in traffic.plan.facilities}
        self._total = sum(len(phase.items) for phase in traffic.phases)
        awaited = {item.after for phase in traffic.phases for item in phase.items if item.after is not None}
        self._accepted = {number: asyncio.Event() for number in awaited}
        self._answers: Counter[str] = Counter()
        self._sent: Counter[Channel] = Counter()
        self._retries = 0
        self._resent = 0
        self._given_up: list[str] = []
        self._phase = ""

    async def run(self, settled: Callable[[], Awaitable[None]]) -> Summary:
        loop = asyncio.get_running_loop()
        begin = loop.time()
        feeds = {facility.id: _Feed(self._traffic.plan) for facility in self._traffic.plan.facilities}
        try:
            for number, phase in enumerate(self._traffic.phases):
                if number:
                    await settled()
                self._phase = phase.name
                await self._send_phase(phase, feeds)
                self._report()
        finally:
            for feed in feeds.values():
                feed.close()
        return Summary(
            webhooks=self._sent[Channel.WEBHOOK],
            admissions=self._sent[Channel.ADMISSION],
            retries=self._retries,
            resent=self._resent,
            answers=dict(sorted(self._answers.items())),
            given_up=tuple(self._given_up),
            seconds=loop.time() - begin,
        )

    async def _send_phase(self, phase: Phase, feeds: dict[str, _Feed]) -> None:
        webhooks = iter([item for item in phase.items if item.channel is Channel.WEBHOOK])
        async with asyncio.TaskGroup() as group:
            for _ in range(self._concurrency):
                group.create_task(self._send_webhooks(webhooks))
            for facility, feed in feeds.items():
                messages = [
                    item for item in phase.items if item.channel is Channel.ADMISSION and item.facility == facility
                ]
                group.create_task(self._send_admissions(feed, messages))

    async def _send_webhooks(self, items: Iterator[Item]) -> None:
        # All senders share the iterator: what an item waits for was taken from it earlier, so nobody waits for ever.
        for item in items:
            if item.after is not None:
                await self._accepted[item.after].wait()
            await self._send_until_accepted(item, self._try_webhook)
            if item.number in self._accepted:
                self._accepted[item.number].set()

    async def _send_admissions(self, feed: _Feed, items: Sequence[Item]) -> None:
        for item in items:
            await self._send_until_accepted(item, feed.send)

    async def _send_until_accepted(self, item: Item, attempt: Callable[[Item], Awaitable[_Reply]]) -> None:
        loop = asyncio.get_running_loop()
        give_up = loop.time() + self._patience
        pause = _FIRST_PAUSE
        while True:
            reply = await attempt(item)
            self._answers[reply.text] += 1
            if reply.accepted:
                self._sent[item.channel] += 1
                if self._sent.total() % 50 == 0:
                    self._report()
                return
            if reply.final or loop.time() + pause > give_up:
                self._given_up.append(item.identity)
                return
            self._retries += 1
            self._resent += reply.perhaps_stored
            await asyncio.sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)

    async def _try_webhook(self, item: Item) -> _Reply:
        facility = self._facilities[item.facility]
        request = HttpRequest(
            "POST",
            self._traffic.plan.webhook_url.replace("{account}", facility.account),
            {
                "Content-Type": "application/json; charset=utf-8",
                "User-Agent": "Stripe/1.0 (+https://stripe.com/docs/webhooks)",
                "Stripe-Signature": sign(item.body, facility.webhook_secret, int(self._clock())),
            },
            item.body,
        )
        try:
            response = await self._client.send(request, deadline=_ANSWER_DEADLINE)
        except HttpFailure as failure:
            return _Reply(failure.code, perhaps_stored=failure.kind == "AMBIGUOUS")
        status = response.status
        # A gateway repeats whatever is no 2xx for days; here a refusal that no repetition changes ends at once.
        final = 400 <= status < 500 and status not in (408, 425, 429)
        return _Reply(str(status), accepted=200 <= status < 300, final=final, perhaps_stored=status >= 500)

    def _report(self) -> None:
        if self._progress is not None:
            self._progress(Progress(self._phase, self._sent.total(), self._total, self._retries))


@dataclass(frozen=True, slots=True)
class _Reply:
    """Answer to one attempt. ``final``: sending again is of no use."""

    text: str
    accepted: bool = False
    final: bool = False
    perhaps_stored: bool = False


class _Feed:
    """One feed's MLLP connection: opened when needed, closed after anything but a right acknowledgement."""

    def __init__(self, plan: TrafficPlan) -> None:
        self._host, self._port = plan.mllp_host, plan.mllp_port
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    def close(self) -> None:
        if self._streams is not None:
            self._streams[1].close()
            self._streams = None

    async def send(self, item: Item) -> _Reply:
        written = False
        try:
            async with asyncio.timeout(_ANSWER_DEADLINE):
                reader, writer = self._streams or await asyncio.open_connection(
                    self._host, self._port, limit=LARGEST_FRAME
                )
                self._streams = reader, writer
                written = True
                writer.write(wrap_frame(item.body))
                await writer.drain()
                answer = await read_frame(reader)
        except TimeoutError:
            self.close()
            return _Reply("NO_ANSWER" if written else "CONNECT_TIMEOUT", perhaps_stored=written)
        except OSError:
            self.close()
            return _Reply("ANSWER_CUT" if written else "CONNECT_FAILED", perhaps_stored=written)
        if answer is None:
            self.close()
            return _Reply("ANSWER_CUT", perhaps_stored=True)
        message = split_message(answer)
        verdict = message.find("MSA") if message else None
        if pick(verdict, 2) != item.identity:
            self.close()
            return _Reply("ACK_WRONG", perhaps_stored=True)
        code = pick(verdict, 1)
        return _Reply(code, accepted=code in ("AA", "CA"), final=code in ("AE", "AR", "CE", "CR"), perhaps_stored=True)

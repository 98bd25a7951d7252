"""Calls of one target instance, from durable to answered: how many at once, and the last look before the write.

Just before a request is written, a call looks once more: the partition is still ours, the group's coordinator heard
from us within half the session timeout, the key's window is open. If not, the call is withdrawn.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections import deque
from dataclasses import dataclass
from typing import TYPE_CHECKING

from schemas.failure import Failure, FailureKind
from sinks.attempts import WITHDRAWN, Failed
from sinks.contract import Answer, Finding
from sinks.stalls import Stalls
from sinks.transport import Finder
from telemetry.metrics import Metric

if TYPE_CHECKING:
    from collections.abc import Callable

    from sinks.attempts import Attempt
    from sinks.contract import Target, TargetSettings
    from sinks.gate import Gate, Leave
    from sinks.policy import Moment
    from sinks.shards import Shard
    from sinks.transport import Transport
    from telemetry.metrics import Metrics


class Withdrawn(Exception):
    """A call was given up just before its write. ``code`` says why."""

    def __init__(self, code: str) -> None:
        super().__init__(code)
        self.code = code


@dataclass(frozen=True, slots=True)
class Call:
    """One step of one event: a posting, or a look-up when ``attempt.asks``."""

    shard: Shard
    attempt: Attempt


@dataclass(slots=True)
class Watch:
    """When a call last left us, and how late our event loop had been by then."""

    left_at: float
    stalls: float


Result = Answer | Finding | Failed


class Calls:
    """Calls that are durable: in line, on the wire, answered. Use from one event loop.

    ``is_lease_fresh`` says whether the group's coordinator heard from us lately; ``now`` gives the moment.
    """

    def __init__(
        self,
        transport: Transport,
        target: Target,
        settings: TargetSettings,
        gate: Gate,
        *,
        now: Callable[[], Moment],
        is_lease_fresh: Callable[[], bool],
        metrics: Metrics,
    ) -> None:
        self._transport = transport
        self._finder = transport if isinstance(transport, Finder) else None
        self._target = target
        self._settings = settings
        self._gate = gate
        self._now = now
        self._is_lease_fresh = is_lease_fresh
        self._metrics = metrics
        self._line: deque[Call] = deque()
        self._running: dict[asyncio.Task[None], Call] = {}
        self._stalls = Stalls(lambda: self._running)
        self._results: list[tuple[Call, Result]] = []
        self._draining = False
        self._broken: BaseException | None = None

    @property
    def under_way(self) -> int:
        """Calls in line or on the wire."""
        return len(self._line) + len(self._running)

    @property
    def on_wire(self) -> int:
        """Calls that have begun."""
        return len(self._running)

    @property
    def has_results(self) -> bool:
        """Whether answers wait to be taken."""
        return bool(self._results)

    def line_up(self, calls: list[Call]) -> None:
        """Their entries are durable: they begin as soon as there is room."""
        self._line.extend(call for call in calls if call.shard.owned)
        self.pump()

    def drop_lost(self) -> None:
        """Forget what stands in line for partitions that were taken away."""
        if any(not call.shard.owned for call in self._line):
            self._line = deque(call for call in self._line if call.shard.owned)

    def withdraw_line(self, code: str) -> None:
        """What has not begun is given up, and is no attempt."""
        while self._line:
            self._results.append((self._line.popleft(), Failed(WITHDRAWN, code)))

    def take_results(self) -> list[tuple[Call, Result]]:
        """What calls came to since the last time. Raises what broke a call for which we know no result."""
        if self._broken is not None:
            # Its event would wait for ever: the process ends, and the next one takes it up as unknown.
            raise self._broken
        results, self._results = self._results, []
        return results

    def pump(self) -> None:
        """Begin calls while the gate and the connections have room."""
        if not self._line or len(self._running) >= self._transport.connections:
            return
        now = self._now().steady
        while self._line and len(self._running) < self._transport.connections:
            leave = self._gate.enter(now)
            if leave is None:
                return
            call = self._line.popleft()
            self._stalls.watch()
            task = asyncio.create_task(self._make(call, leave, now))
            self._running[task] = call
            task.add_done_callback(self._end)

    def drain(self) -> None:
        """Nothing begins any more; what is not yet written is withdrawn."""
        self._draining = True
        self.withdraw_line("STOPPING")

    async def finish_leaving(self, seconds: float) -> None:
        """Of partitions that are leaving: withdraw what is not written, wait so long for the answers of the rest."""
        for call in [call for call in self._line if call.shard.is_leaving]:
            self._line.remove(call)
            self._results.append((call, Failed(WITHDRAWN, "REVOKED")))
        written = [task for task, call in self._running.items() if call.shard.is_leaving and call.attempt.written]
        if written:
            await asyncio.wait(written, timeout=seconds)
        # One that still waits for its connection passes no look before a write any more.
        for call in self._running.values():
            if call.shard.is_leaving and not call.attempt.written:
                self._results.append((call, Failed(WITHDRAWN, "REVOKED")))

    async def close(self) -> None:
        """Give up what is on the wire, close the connections."""
        for task in list(self._running):
            task.cancel()
        await asyncio.gather(*self._running, return_exceptions=True)
        with contextlib.suppress(Exception):
            await self._transport.close()

    def _end(self, task: asyncio.Task[None]) -> None:
        self._running.pop(task, None)
        if task.cancelled():
            return
        self._broken = self._broken or task.exception()
        if self._broken is None:
            self.pump()

    async def _make(self, call: Call, leave: Leave, entered: float) -> None:
        began = self._now().steady
        watch = Watch(began, self._stalls.measure())
        result = await (self._look_up(call, watch) if call.attempt.asks else self._post(call, watch))
        now = self._now().steady
        unread = self._stalls.measure() - watch.stalls
        self._gate.leave(leave, now, result, before=watch.left_at - entered, unread=unread)
        self._metrics.observe(Metric.ATTEMPT_SECONDS, now - began, target=self._settings.name)
        self._results.append((call, result))

    async def _post(self, call: Call, watch: Watch) -> Answer | Failed:
        attempt = call.attempt
        assert attempt.request is not None
        try:
            answer = await self._transport.send(attempt.request, lambda: self._check_write(call, watch))
        except Exception as error:  # noqa: BLE001 - whatever it was, after the write the request may have left
            kind = FailureKind.INTERNAL if attempt.written else FailureKind.UNAVAILABLE
            return _explain(error, kind)
        return answer if isinstance(answer, Answer) else self._judge(answer, call)

    async def _look_up(self, call: Call, watch: Watch) -> Finding | Answer | Failed:
        attempt = call.attempt
        assert attempt.request is not None
        assert self._finder is not None, "only a target with a look-up is asked"
        try:
            return await self._finder.find(
                attempt.request, attempt.first_write_at, lambda: self._check_ask(call, watch)
            )
        except Exception as error:  # noqa: BLE001 - a question that was not asked decides nothing
            return _explain(error, FailureKind.UNAVAILABLE)

    def _judge(self, answer: bytes, call: Call) -> Answer:
        assert call.attempt.request is not None
        try:
            assert self._target.verdict is not None, "only a transport that judges by itself does without"
            return self._target.verdict(answer, call.attempt.request, self._settings)
        except Exception as error:  # noqa: BLE001 - an answer nobody can read says nothing about the posting
            return Answer(FailureKind.AMBIGUOUS, type(error).__name__)

    def _check_write(self, call: Call, watch: Watch) -> None:
        self._check_lease(call)
        now = self._now()
        if not call.shard.ledger.may_write(call.attempt, now):
            raise Withdrawn("WINDOW")
        watch.left_at, watch.stalls = now.steady, self._stalls.measure()

    def _check_ask(self, call: Call, watch: Watch) -> None:
        self._check_lease(call)
        now = self._now()
        if not call.shard.ledger.may_ask(call.attempt, now):
            raise Withdrawn("WRITE_OPEN")
        watch.left_at, watch.stalls = now.steady, self._stalls.measure()

    def _check_lease(self, call: Call) -> None:
        if not call.shard.owned or call.shard.is_leaving:
            raise Withdrawn("REVOKED")
        if self._draining:
            raise Withdrawn("STOPPING")
        if not self._is_lease_fresh():
            raise Withdrawn("LEASE_OLD")


def _explain(error: Exception, other: FailureKind) -> Failed:
    if isinstance(error, Withdrawn):
        return Failed(WITHDRAWN, error.code)
    if isinstance(error, Failure):
        return Failed(error.kind, error.code, getattr(error, "retry_after", 0.0))
    return Failed(other, type(error).__name__)

"""What every role shares: log, signals, health endpoints, and how an error becomes an exit code."""

from __future__ import annotations

import asyncio
import contextlib
import gc
import signal
from typing import TYPE_CHECKING, Self, TypeVar

import uvloop

from schemas.failure import ExitCode, OperatorError, TemporaryError
from telemetry import log
from telemetry.health import HealthServer
from topics import catalog
from topics.reading import TopicReader

if TYPE_CHECKING:
    from collections.abc import AsyncIterator, Awaitable, Callable, Mapping

    from runtime.settings import Settings

T = TypeVar("T")

_COLLECT_AFTER = 200_000
"""Objects made and not freed after which the youngest are searched for cycles: more than a batch keeps alive.

Python's own figure is 700."""


def run(
    role: str, settings: Settings, main: Callable[[asyncio.Event], Awaitable[None]], *, masking: bool = True
) -> int:
    """Run a role until SIGTERM or SIGINT; return its exit code.

    An ``OperatorError`` is logged whole, any other exception by type and place.
    """
    log.configure(settings.log.level, settings.log.format, masking=masking)
    logger = log.get_log(role)

    _calm_collector()

    async def supervise() -> None:
        stop = asyncio.Event()
        loop = asyncio.get_running_loop()
        for number in (signal.SIGTERM, signal.SIGINT):
            loop.add_signal_handler(number, stop.set)
        logger.info("starting")
        await main(stop)

    try:
        uvloop.run(supervise())
    except OperatorError as error:
        logger.error(  # noqa: TRY400 - its text is made for people, a trace is not
            "stopped_by_error", code=error.code, place=error.place, detail=error.detail, remedy=error.remedy
        )
        return int(error.exit_code)
    logger.info("stopped")
    return int(ExitCode.OK)


@contextlib.asynccontextmanager
async def serve_health(
    settings: Settings, port: int, ready: Callable[[], tuple[bool, Mapping[str, str]]]
) -> AsyncIterator[HealthServer]:
    """Health and metrics endpoints for as long as the role runs."""
    async with HealthServer(settings.health.host, port, ready) as server:
        yield server


class Readiness:
    """What `/ready` says of a role: what its start waits for, then whatever ``follow`` was given to ask."""

    def __init__(self) -> None:
        self._reasons = {"start": "starting"}
        self._ask: Callable[[], tuple[bool, Mapping[str, str]]] | None = None

    def wait_for(self, error: TemporaryError) -> None:
        """The start is held up by this."""
        self._reasons = {"start": f"{error.code} at {error.place}"}

    def follow(self, ask: Callable[[], tuple[bool, Mapping[str, str]]]) -> None:
        """The start is done; from now on this answers."""
        self._ask = ask

    def __call__(self) -> tuple[bool, Mapping[str, str]]:
        """Ready or not, and why not."""
        return (False, self._reasons) if self._ask is None else self._ask()


async def persist(work: Callable[[], Awaitable[T]], stop: asyncio.Event, readiness: Readiness) -> T | None:
    """Do something at the start of a role, waiting out whatever is temporary; None when told to stop meanwhile."""
    wait = 0.5
    while not stop.is_set():
        try:
            return await work()
        except TemporaryError as error:
            readiness.wait_for(error)
            log.get_log("start").warning("waiting", code=error.code, place=error.place, detail=error.detail)
        with contextlib.suppress(TimeoutError):
            await asyncio.wait_for(stop.wait(), wait)
        wait = min(wait * 2, 5.0)
    return None


class Probe:
    """Asks every few seconds, in a thread, whether something answers; readiness reads the last answer."""

    def __init__(self, ask: Callable[[], bool], *, seconds: float = 2.0) -> None:
        self._ask = ask
        self._seconds = seconds
        self._good = False
        self._task: asyncio.Task[None] | None = None

    def ready(self, name: str) -> Callable[[], tuple[bool, Mapping[str, str]]]:
        """A readiness function that names what does not answer."""
        return lambda: (self._good, {} if self._good else {name: "does not answer"})

    async def __aenter__(self) -> Self:
        self._good = await asyncio.to_thread(self._ask)
        self._task = asyncio.create_task(self._watch())
        return self

    async def __aexit__(self, *_: object) -> None:
        if self._task is not None:
            self._task.cancel()

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(self._seconds)
            self._good = await asyncio.to_thread(self._ask)


def read_patients_end(settings: Settings) -> tuple[dict[int, int], str]:
    """End offsets of `patients` and its topic id: what the projection must have reached before identities count."""
    reader = TopicReader(settings.kafka, catalog.PATIENTS)
    try:
        return reader.end_offsets("read_committed"), reader.topic_id()
    finally:
        reader.close()


def _calm_collector() -> None:
    """Let the garbage collector look less often.

    A batch holds some hundred thousand objects that reference counting frees anyway; at Python's own thresholds the
    search for cycles among them costs as much as the work itself (docs/decisions/0007).
    """
    gc.collect()
    gc.freeze()
    gc.set_threshold(_COLLECT_AFTER, 20, 20)

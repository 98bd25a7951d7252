"""Several stream workers of one host under one parent: ``remitstream worker --processes N``.

Each is a ``remitstream worker --slot K`` with its own transactional id, group member, state folder and health port.
"""

from __future__ import annotations

import asyncio
import sys
from typing import TYPE_CHECKING

from runtime.processes import ProcessManager, ProcessSpec, ProcessStatus
from runtime.roles import process
from telemetry.log import get_log

if TYPE_CHECKING:
    from runtime.settings import Settings

STOP_TIMEOUT = 25.0
"""Seconds a worker has to finish its batch and leave the group: less than the 30 s the parent should be given."""


def run(settings: Settings, processes: int) -> int:
    """Run ``processes`` workers until SIGTERM or SIGINT; restart each that ends. Returns the exit code.

    It gives up, with exit code 78, only when a worker refuses its configuration: the others are stopped then.
    """

    async def main(stop: asyncio.Event) -> None:
        manager = ProcessManager(list_specs(settings, processes), None, on_change=_tell)
        await manager.start(wait=False)
        over, stopping = asyncio.create_task(manager.wait()), asyncio.create_task(stop.wait())
        try:
            await asyncio.wait({over, stopping}, return_when=asyncio.FIRST_COMPLETED)
        finally:
            stopping.cancel()
            await manager.stop_together()
        await over

    return process.run("workers", settings, main)


def list_specs(settings: Settings, processes: int) -> list[ProcessSpec]:
    """Workers in slots 0 to ``processes`` - 1."""
    health, arguments = settings.health, settings.list_arguments()

    def build(slot: int) -> ProcessSpec:
        # With port 0 each takes a free one that it alone knows.
        return ProcessSpec(
            name=f"worker-{slot}",
            argv=[sys.executable, "-m", "runtime.cli", "worker", "--slot", str(slot), *arguments],
            ready=f"http://{health.host}:{health.worker + slot}/ready" if health.worker else None,
            stop_timeout=STOP_TIMEOUT,
            endless=True,
        )

    return [build(slot) for slot in range(processes)]


def _tell(status: ProcessStatus) -> None:
    log = get_log("workers")
    if status.state == "ready":
        log.info("worker_ready", worker=status.name, pid=status.pid)
    elif status.state == "restarting":
        tell = log.error if status.flapping else log.warning
        tell("worker_ended", worker=status.name, exit_code=status.exit_code, restarts=status.restarts)

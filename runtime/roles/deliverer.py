"""The deliverer: canonical events to target instances, one runner each, side by side in one process."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from identity.projection import Identities
from runtime.roles import process
from schemas.keys import HmacKey
from sinks import catalog
from sinks.runner import Runner
from topics.registry import Registry

if TYPE_CHECKING:
    from runtime.settings import Settings


def run(settings: Settings, targets: tuple[str, ...]) -> int:
    """Deliver to these instances until told to stop. A fatal error of one ends the process, which is restarted."""

    async def main(stop: asyncio.Event) -> None:
        readiness = process.Readiness()
        async with process.serve_health(settings, settings.health.deliverer, readiness):
            await work(stop, readiness)

    async def work(stop: asyncio.Event, readiness: process.Readiness) -> None:
        key = HmacKey(settings.secrets.hmac_key.get_secret_value().encode())
        registry = Registry(settings.registry)
        async with Identities(settings.redis, key) as identities:
            ends = await process.persist(
                lambda: asyncio.to_thread(process.read_patients_end, settings), stop, readiness
            )
            if ends is None:
                return
            identities.require(*ends)
            runners = [
                Runner(
                    settings.kafka,
                    catalog.load(target.connector, settings.connectors.targets),
                    target,
                    settings.tenancy,
                    registry=registry,
                    identities=identities,
                    instance=settings.instance,
                    vault_key=settings.secrets.vault_key,
                )
                for target in settings.targets
                if target.name in targets
            ]
            readiness.follow(lambda: _ask_all(runners))
            await _run_all(runners, stop)

    return process.run("deliverer", settings, main)


async def _run_all(runners: list[Runner], stop: asyncio.Event) -> None:
    running = [asyncio.create_task(runner.run(), name=runner.name) for runner in runners]
    stopping = asyncio.create_task(stop.wait())
    await asyncio.wait([*running, stopping], return_when=asyncio.FIRST_COMPLETED)
    stopping.cancel()
    for runner in runners:
        runner.stop()
    await asyncio.wait(running)
    for task in running:
        task.result()


def _ask_all(runners: list[Runner]) -> tuple[bool, dict[str, str]]:
    reasons: dict[str, str] = {}
    for runner in runners:
        ready, why = runner.ready()
        if not ready:
            reasons |= {f"{runner.name} {name}": reason for name, reason in why.items()}
    return not reasons, reasons

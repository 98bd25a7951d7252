"""The sandbox: simulated billing systems on the host and port of each target of the configuration."""

from __future__ import annotations

from typing import TYPE_CHECKING

from runtime.roles import process
from runtime.stages import list_billing_targets
from sandbox.billing import BillingSystem
from sandbox.transactions import Instance
from schemas.failure import TemporaryError
from telemetry.log import get_log

if TYPE_CHECKING:
    import asyncio

    from runtime.settings import Settings


class SandboxPortTaken(TemporaryError):
    """A billing system, or their control API, cannot listen."""

    code = "RS270"
    meaning = "The address of a simulated billing system or of their control API cannot be bound."
    default_remedy = "Stop what listens there, or choose another port for `sandbox.control_port` or the target."


def run(settings: Settings) -> int:
    """Run the billing systems; their ledger is kept beside the embedded stack's data."""

    async def main(stop: asyncio.Event) -> None:
        folder = settings.stack.home.parent / "sandbox"
        folder.mkdir(parents=True, exist_ok=True)
        system = BillingSystem(
            folder / "ledger.sqlite",
            [
                Instance(name=target.name, port=target.port, duplicate_control=target.duplicate_control)
                for target in list_billing_targets(settings)
            ],
            settings.sandbox.control_port,
        )
        try:
            await system.start()
        except OSError as error:
            raise SandboxPortTaken(
                f"{error.strerror}.", place="`sandbox.control_port`, or `port` of a target"
            ) from None
        get_log("sandbox").info("listening", control_port=system.control_port, **system.ports)
        await stop.wait()
        await system.stop()

    return process.run("sandbox", settings, main)

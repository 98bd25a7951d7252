"""The webhook receiver: gateways' deliveries to `raw.<source>`."""

from __future__ import annotations

import asyncio
from dataclasses import replace
from typing import TYPE_CHECKING

from runtime.roles import process
from schemas.keys import HmacKey
from sources import catalog
from sources.intake import Intake
from sources.receiver import Tls, build_app, serve
from telemetry.log import get_log
from telemetry.metrics import METRICS
from topics.publisher import Publisher

if TYPE_CHECKING:
    from runtime.settings import Settings


def run(settings: Settings, *, redact: bool = True) -> int:
    """Run the receiver. ``redact`` False exists for tests alone."""

    async def main(stop: asyncio.Event) -> None:
        publisher = Publisher(settings.kafka, f"remitstream.receiver.{settings.instance}")
        connected = process.Probe(publisher.is_connected)
        intake = Intake(
            publisher,
            HmacKey(settings.secrets.hmac_key.get_secret_value().encode()),
            redact=redact,
            count=METRICS.count,
        )
        limit = settings.receiver.max_body_bytes
        gateways = {
            name: replace(gateway, max_body_bytes=min(gateway.max_body_bytes, limit))
            for name, gateway in catalog.discover(settings.connectors.gateways).items()
        }
        app = build_app(gateways=gateways, accounts=settings.accounts, intake=intake, count=METRICS.count)
        tls = settings.receiver.tls
        async with connected, process.serve_health(settings, settings.health.receiver, connected.ready("kafka")):
            await serve(
                app,
                settings.receiver.host,
                settings.receiver.port,
                stop=stop,
                on_ready=lambda port: get_log("receiver").info("listening", port=port),
                tls=Tls(tls.certificate, tls.key) if tls else None,
            )
        await asyncio.to_thread(publisher.close)

    return process.run("receiver", settings, main)

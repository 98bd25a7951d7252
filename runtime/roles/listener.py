"""The MLLP listener: HL7 v2 messages of the feeds to `raw.hl7`."""

from __future__ import annotations

import asyncio
import ssl
from typing import TYPE_CHECKING

from runtime.roles import process
from schemas.failure import ConfigurationError
from schemas.keys import HmacKey
from sources.intake import Intake
from sources.listener import Listener
from telemetry.metrics import METRICS
from topics.publisher import Publisher

if TYPE_CHECKING:
    from runtime.sections import TlsSettings
    from runtime.settings import Settings


class ListenerTlsBroken(ConfigurationError):
    """The listener's certificate cannot be used."""

    code = "RS151"
    meaning = "The listener's certificate, key or client authorities cannot be loaded."
    default_remedy = "Correct the files named in `listener.tls`."


def run(settings: Settings, *, redact: bool = True) -> int:
    """Run the listener. ``redact`` False exists for tests alone."""

    async def main(stop: asyncio.Event) -> None:
        publisher = Publisher(settings.kafka, f"remitstream.listener.{settings.instance}")
        connected = process.Probe(publisher.is_connected)
        intake = Intake(
            publisher,
            HmacKey(settings.secrets.hmac_key.get_secret_value().encode()),
            redact=redact,
            count=METRICS.count,
        )
        listener = Listener(
            settings.tenancy,
            intake,
            count=METRICS.count,
            host=settings.listener.host,
            port=settings.listener.port,
            tls=_build_tls(settings.listener.tls),
        )
        async with connected, process.serve_health(settings, settings.health.listener, connected.ready("kafka")):
            await listener.start()
            await stop.wait()
            await listener.stop()
        await asyncio.to_thread(publisher.close)

    return process.run("listener", settings, main)


def _build_tls(settings: TlsSettings | None) -> ssl.SSLContext | None:
    if settings is None:
        return None
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    try:
        context.load_cert_chain(settings.certificate, settings.key)
        if settings.client_ca is not None:
            context.load_verify_locations(settings.client_ca)
            context.verify_mode = ssl.CERT_REQUIRED
    except (OSError, ssl.SSLError) as error:
        raise ListenerTlsBroken(f"{type(error).__name__}.", place="listener.tls") from None
    return context

"""The projector: `patients` into Redis."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from identity.projection import ProjectionWriter
from identity.projector import Projector
from runtime.roles import process
from schemas.events import PatientRecord
from schemas.keys import HmacKey
from schemas.wire import Decoder
from topics import catalog
from topics.reading import TopicReader
from topics.registry import Registry

if TYPE_CHECKING:
    from runtime.settings import Settings


def run(settings: Settings) -> int:
    """Run the projector."""

    async def main(stop: asyncio.Event) -> None:
        readiness = process.Readiness()
        async with process.serve_health(settings, settings.health.projector, readiness):
            await work(stop, readiness)

    async def work(stop: asyncio.Event, readiness: process.Readiness) -> None:
        key = HmacKey(settings.secrets.hmac_key.get_secret_value().encode())
        registry = Registry(settings.registry)
        reader = TopicReader(settings.kafka, catalog.PATIENTS)
        topic_id = await process.persist(lambda: asyncio.to_thread(reader.topic_id), stop, readiness)
        if topic_id is None:
            return
        decoder = Decoder("patient_record", PatientRecord, registry.find_schema)
        projector = Projector(reader, ProjectionWriter(settings.redis, key, topic_id), decoder.decode, key)
        readiness.follow(projector.ready)
        running = asyncio.create_task(projector.run())
        stopping = asyncio.create_task(stop.wait())
        await asyncio.wait({running, stopping}, return_when=asyncio.FIRST_COMPLETED)
        projector.stop()
        stopping.cancel()
        await running

    return process.run("projector", settings, main)

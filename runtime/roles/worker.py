"""The stream worker: raw topics to canonical ones."""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

import faust

from identity.projection import Identities
from runtime.connectors import Gateways
from runtime.roles import process
from schemas.events import WaitingEntry
from schemas.keys import HmacKey
from schemas.wire import Decoder, Encoder
from streams.admission_decider import AdmissionDecider
from streams.app import Worker
from streams.decide import MoneyDecider
from streams.decision import Codecs
from streams.feeder import Feeder
from streams.normalise import Normaliser
from streams.slot import hold, name_folder
from topics import catalog
from topics.registry import Registry, find_ids

if TYPE_CHECKING:
    from runtime.settings import Settings
    from streams.decision import Decider


class _FaustWorker(faust.Worker):
    """Faust's worker inside our process: our log and our signal handling."""

    def install_signal_handlers(self) -> None:
        """Ours are installed already."""


def run(settings: Settings, *, slot: int = 0) -> int:
    """Run one worker process; ``slot`` is its number on this host."""

    async def main(stop: asyncio.Event) -> None:
        readiness = process.Readiness()
        # 0 asks for a free port; a given one is that of slot 0.
        port = settings.health.worker and settings.health.worker + slot
        folder = name_folder(settings.worker.state, settings.instance, slot)
        async with process.serve_health(settings, port, readiness), hold(folder):
            await work(stop, readiness)

    async def work(stop: asyncio.Event, readiness: process.Readiness) -> None:
        key = HmacKey(settings.secrets.hmac_key.get_secret_value().encode())
        registry = Registry(settings.registry)
        # A start without the right schemas is refused; a registry that is down is waited for.
        ids = await process.persist(lambda: asyncio.to_thread(find_ids, registry, settings.topics), stop, readiness)
        if ids is None:
            return
        async with Identities(settings.redis, key) as identities:
            ends = await process.persist(
                lambda: asyncio.to_thread(process.read_patients_end, settings), stop, readiness
            )
            if ends is None:
                return
            identities.require(*ends)
            deciders = build_deciders(settings, key, registry, ids, identities)
            feeder = Feeder(
                settings.kafka,
                deciders,
                instance=settings.instance,
                slot=slot,
                state_folder=settings.worker.state,
                batch_size=settings.worker.batch_records,
                waiting_limit=settings.worker.waiting_limit,
                partitions=settings.worker.partitions,
                group_protocol=settings.worker.group_protocol,
            )
            worker = Worker(feeder)
            readiness.follow(worker.feeder.is_ready)
            await _serve(worker, stop)
        failure = worker.explain()
        if failure is not None:
            raise failure

    return process.run("worker", settings, main)


def build_deciders(
    settings: Settings, key: HmacKey, registry: Registry, ids: dict[str, int], identities: Identities
) -> dict[str, Decider]:
    """One decider per source in use."""

    def encode(topic: str, schema: str) -> Encoder:
        return Encoder(schema, ids[f"{topic}-value"])

    gateways = Gateways(settings.connectors.gateways)
    deciders: dict[str, Decider] = {}
    for source in settings.sources:
        codecs = Codecs(
            money={topic: encode(topic, "money_event") for topic in catalog.CANONICAL_MONEY},
            patient=encode(catalog.PATIENTS, "patient_record"),
            disposition=encode(catalog.DISPOSITIONS, "disposition"),
            review=encode(catalog.REVIEWS, "review"),
            waiting=None if source == catalog.HL7 else encode(catalog.name_waiting(source), "waiting_entry"),
            waiting_reader=Decoder("waiting_entry", WaitingEntry, registry.find_schema),
        )
        if source == catalog.HL7:
            deciders[source] = AdmissionDecider(settings.tenancy, hmac_key=key, codecs=codecs)
        else:
            deciders[source] = MoneyDecider(
                Normaliser.load(source, settings.tenancy, gateways.find_mappings(source)),
                identities=identities,
                hmac_key=key,
                codecs=codecs,
                parent_wait_seconds=settings.worker.parent_wait_hours * 3600.0,
            )
    return deciders


async def _serve(worker: Worker, stop: asyncio.Event) -> None:
    faust_worker = _FaustWorker(
        worker.app, loglevel="WARNING", override_logging=False, redirect_stdouts=False, daemon=False, quiet=True
    )
    faust_worker.spinner = None  # it writes terminal codes into the log
    await faust_worker.start()
    waits = {asyncio.create_task(stop.wait()), asyncio.create_task(worker.app.wait_until_stopped())}
    await asyncio.wait(waits, return_when=asyncio.FIRST_COMPLETED)
    for wait in waits:
        wait.cancel()
    await faust_worker.stop()
    await worker.feeder.close()

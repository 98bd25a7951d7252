"""The Faust app: one agent per raw topic, each reading top-down what happens to a batch."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

import faust

from schemas.failure import OperatorError, TemporaryError
from streams.transport import Transport, Unchanged, WorkerStuck

if TYPE_CHECKING:
    from collections.abc import AsyncIterable

    from streams.batch import Batch
    from streams.feeder import Feeder

CODEC = "remitstream-batch"


class Worker:
    """A stream worker: Faust app, agents and feeder. ``failure`` says why it stopped, when it was not told to."""

    def __init__(self, feeder: Feeder) -> None:
        self.feeder = feeder
        self.failure: BaseException | None = None
        faust.serializers.codecs.register(CODEC, Unchanged())
        self.app = faust.App(
            "remitstream",
            broker="kafka://feeder",
            store="memory://",
            value_serializer="raw",
            # Faust's web server would serve table data and assignments without a password; ours tells health only.
            web_enabled=False,
            web_router_enabled=False,
            web_tables_enabled=False,
            topic_disable_leader=True,
            topic_allow_declare=False,
            reply_create_topic=False,
            table_standby_replicas=0,
            stream_buffer_maxsize=len(feeder.deciders) + 1,
            stream_wait_empty=False,
            agent_supervisor="mode.CrashingSupervisor",
            datadir="/nonexistent",
        )
        self.app.transport = Transport(self.app, feeder)
        for raw in feeder.deciders:
            self._add_agent(raw)

    def _add_agent(self, raw: str) -> None:
        decider = self.feeder.deciders[raw]
        # With acknowledgements Faust would note every batch for a commit of its own, which never comes: a leak.
        topic = self.app.topic(raw, value_serializer=CODEC, key_serializer=CODEC, value_type=None, acks=False)

        async def normalise(batches: AsyncIterable[Batch]) -> None:
            async for batch in batches:
                try:
                    try:
                        await batch.commit(
                            batch.verdict or await decider.decide(batch.rooms, batch.records, batch.refused)
                        )
                    except TemporaryError as error:
                        await batch.hold(error)
                except Exception as error:  # noqa: BLE001 - Faust would acknowledge the batch and go on
                    await self._crash(error)

        self.app.agent(topic, name=f"normalise.{decider.source}")(normalise)

    async def _crash(self, error: BaseException) -> None:
        """Stop the process with offsets untouched. An error that is none of ours may be a record's fault."""
        self.failure = error
        if not isinstance(error, OperatorError):
            self.feeder.suspects.blame()
        await self.app.crash(error)

    def explain(self) -> OperatorError | None:
        """Why the worker stopped, as an error a person reads; None after an orderly stop."""
        failure: Any = self.failure or self.feeder.group.failure or self.app.crash_reason
        if failure is None or isinstance(failure, OperatorError):
            return failure
        return WorkerStuck(f"{type(failure).__name__} was raised.", place="worker")

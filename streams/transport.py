"""Faust on confluent-kafka: agents get micro-batches, and every batch is one Kafka transaction.

``Transport`` makes Faust's conductor take batches from a ``Feeder`` (``streams.feeder``). Faust is told of one virtual
partition per raw topic that it always owns: assignment, seeking and commits are the feeder's alone, so no rebalance
ever passes through Faust, whose own handling drops and strands events. One batch is under way at a time; librdkafka
fetches the next ones meanwhile.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

import faust
import yarl
from faust.transport.consumer import Consumer
from faust.transport.drivers import aiokafka
from faust.transport.producer import Producer
from faust.types import TP, ConsumerMessage

from schemas.failure import FatalError

if TYPE_CHECKING:
    from streams.batch import Batch
    from streams.feeder import Feeder


class BatchConsumer(Consumer):
    """Faust's view of the feeder: one virtual partition per raw topic, always assigned, never committed by Faust."""

    feeder: Feeder

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self.feeder = self.transport.feeder
        self._virtual: set[TP] = set()
        self._sequence = 0
        self._under_way: Batch | None = None

    async def subscribe(self, topics: Any) -> None:
        """Join the group; Faust may fetch at once, the feeder gives nothing before partitions are loaded."""
        self._virtual = {TP(topic, 0) for topic in topics}
        await self.feeder.start()
        self.add_future(self._announce())

    async def _announce(self) -> None:
        self.app.on_rebalance_start()
        await self.on_partitions_assigned(self._virtual, self.app.consumer_generation_id)

    async def _getmany(self, active_partitions: Any, timeout: float) -> dict[TP, list[Batch]]:  # noqa: ASYNC109, ARG002
        if self._under_way is not None:
            await self._under_way.ended.wait()
        self._under_way = await self.feeder.next_batch()
        return {} if self._under_way is None else {TP(self._under_way.topic, 0): [self._under_way]}

    def _to_message(self, tp: TP, batch: Batch) -> ConsumerMessage:
        self._sequence += 1
        return ConsumerMessage(
            tp.topic,
            0,
            self._sequence,
            time.time(),
            0,
            [],
            None,
            batch,
            None,
            0,
            0,
            tp,
            # Without the current generation the stream skips the message silently.
            generation_id=self.app.consumer_generation_id,
        )

    def assignment(self) -> set[TP]:
        """The virtual partitions."""
        return self._virtual

    async def on_stop(self) -> None:
        """Leave the group."""
        await self.feeder.close()

    # Offsets are committed inside the batch's transaction; Faust's own bookkeeping has nothing to do.

    async def commit(self, *_args: Any, **_kwargs: Any) -> bool:
        """Nothing."""
        return False

    async def _commit(self, _offsets: Any) -> bool:
        return True

    async def perform_seek(self) -> None:
        """Nothing."""

    async def seek_to_committed(self) -> dict[TP, int]:
        """Nothing."""
        return {}

    async def _seek(self, partition: TP, offset: int) -> None: ...

    async def seek_wait(self, partitions: Any) -> None:
        """Nothing."""

    async def position(self, _tp: TP) -> int | None:
        """Unknown to Faust."""
        return None

    def highwater(self, _tp: TP) -> int:
        """Unknown to Faust; lag is measured outside the worker."""
        return 0

    async def earliest_offsets(self, *_partitions: TP) -> dict[TP, int]:
        """Unknown to Faust."""
        return {}

    async def highwaters(self, *_partitions: TP) -> dict[TP, int]:
        """Unknown to Faust."""
        return {}

    async def create_topic(self, *_args: Any, **_kwargs: Any) -> None:
        """Nothing: topics come from the catalog."""

    def topic_partitions(self, _topic: str) -> int | None:
        """Unknown to Faust."""
        return None

    def key_partition(self, _topic: str, _key: bytes | None, partition: int | None = None) -> int | None:
        """Faust sends nothing."""
        return partition

    def _new_topicpartition(self, topic: str, partition: int) -> TP:
        return TP(topic, partition)

    def verify_event_path(self, now: float, tp: TP) -> None:
        """Nothing: the feeder reports pauses and the health endpoint tells."""

    def close(self) -> None:
        """Nothing beyond ``on_stop``."""


class SilentProducer(Producer):
    """Faust's producer, never started and never used: outputs go out in the batch's transaction only."""

    async def on_start(self) -> None:
        """Nothing: no connection is made."""

    async def on_stop(self) -> None:
        """Nothing."""

    async def flush(self) -> None:
        """Nothing is buffered."""

    def supports_headers(self) -> bool:
        """Nothing is sent."""
        return True


class Transport(aiokafka.Transport):
    """Faust's transport with our consumer and no producer."""

    Consumer = BatchConsumer
    Producer = SilentProducer

    def __init__(self, app: Any, feeder: Feeder) -> None:
        super().__init__([yarl.URL("kafka://feeder")], app)
        self.feeder = feeder


class Unchanged(faust.Codec):
    """Hands a batch through: decoding belongs to the decider, so that one bad record is one dead letter."""

    def loads(self, value: Any) -> Any:
        """The batch itself."""
        return value

    def dumps(self, value: Any) -> Any:
        """The batch itself."""
        return value


class WorkerStuck(FatalError):
    """Faust stopped working for a reason of its own."""

    code = "RS305"
    meaning = "The stream worker's event loop or agent ended without an order to stop."
    default_remedy = "Nothing by hand: the process manager restarts the worker; report it if it repeats."

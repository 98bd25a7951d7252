"""The micro-batch an agent works on, and how it is committed.

async for batch in batches:
decision = await decide(batch)
await batch.commit(decision)
"""

from __future__ import annotations

import asyncio
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from streams.decision import Decision
from topics.group import StaleAssignment
from topics.headers import RawRecord
from topics.transaction import RecordRefused, TransactionAborted

if TYPE_CHECKING:
    from collections.abc import Mapping

    from schemas.failure import TemporaryError
    from streams.decision import Room
    from streams.feeder import Feeder


@dataclass(slots=True)
class Batch:
    """Records of one raw topic, of one assignment, in offset order per partition.

    ``rooms`` holds the local state of every partition this worker owns of the topic, with or without records: a batch
    without records is an opportunity to release what waits. Exactly one of ``commit`` and ``hold`` ends a batch.
    """

    topic: str
    number: int
    records: list[RawRecord]
    rooms: dict[int, Room]
    positions: dict[int, int]
    """Next offset per partition of ``rooms`` once this batch is done."""
    refused: frozenset[str]
    """Hops whose outputs the broker did not take at the last attempt."""
    feeder: Feeder
    verdict: Decision | None = None
    """Set when the only record is not to be decided: it ended earlier processes."""
    begun: float = field(default_factory=time.perf_counter)
    ended: asyncio.Event = field(default_factory=asyncio.Event)

    async def commit(self, decision: Decision) -> bool:
        """Write outputs, dead letters, state changes, frontiers and offsets in one transaction, then apply the changes.

        False when it was rolled back: the partitions are back at their frontier and the batch comes again, by this
        worker or another. Raises ``FatalError`` when this process must not go on.
        """
        self.feeder.suspects.put_down()
        outputs, changelogs = decision.list_outputs(), decision.list_changelogs()
        done = False
        try:
            if outputs or changelogs or self.records:
                await self.feeder.group.commit(
                    self.number, outputs, self._list_positions(), changelogs=changelogs, committed=decision.apply
                )
        except StaleAssignment:
            self.feeder.roll_back("rebalance")
        except TransactionAborted:
            self.feeder.roll_back("aborted")
            await self.feeder.back_off()
        except RecordRefused as refusal:
            self.feeder.roll_back("record_refused")
            self.feeder.refuse(self, refusal.cause)
        else:
            self.feeder.succeed(self, decision)
            # Faust keeps the batch until the next one; its records need not stay that long.
            self.records = []
            done = True
        # Not after any other error: the worker ends, and no later batch may be handed out.
        self.ended.set()
        return done

    async def hold(self, error: TemporaryError) -> None:
        """Give the batch back because something it needs is down; the worker pauses, keeps polling, and tries again."""
        await self.feeder.hold(error)
        self.ended.set()

    def _list_positions(self) -> Mapping[tuple[str, int], int]:
        return {(self.topic, partition): offset for partition, offset in self.positions.items()}

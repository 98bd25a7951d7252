"""The shipped worker with a decider that only maps: what identity and dedupe cost is the difference to the full path.

Same process, settings, Faust app, transport, transactions, normaliser, Avro writer, headers and metrics. Left out, per
event: the keyed hash of the patient's identifier and its look-up in Redis, the digest of the facts, the read and write
of seen keys, the lineage entry, and the two changelog records of those. Per batch: the look into the waiting room.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from runtime.roles import worker
from runtime.settings import read_settings
from streams.decide import MoneyDecider
from streams.decision import Decision, Writer, guard
from streams.normalise import Normalised

if TYPE_CHECKING:
    from collections.abc import Sequence

    from streams.decision import Room
    from topics.headers import RawRecord


class MappingDecider(MoneyDecider):
    """Publishes every record as it is mapped; a record that is no payment stops the bench."""

    async def decide(
        self,
        rooms: dict[int, Room],  # noqa: ARG002 - its state is never looked at
        records: Sequence[RawRecord],
        refused: frozenset[str] = frozenset(),  # noqa: ARG002 - nothing of the input is refused
    ) -> Decision:
        """Map every record of a batch."""
        writer = Writer(self._codecs, self._printer, self.source, self._clock.now_ms())
        for record in records:
            mapped = guard(self._normaliser.normalise, record)
            if not isinstance(mapped, Normalised):
                raise TypeError("a record of the bench's input was not mapped")
            writer.publish(record, mapped)
        return writer.finish()


def build_deciders(*arguments: Any) -> Any:
    """The shipped deciders, the gateway's replaced."""
    deciders = shipped(*arguments)
    deciders["stripe"].__class__ = MappingDecider
    return deciders


if __name__ == "__main__":
    shipped = worker.build_deciders
    worker.build_deciders = build_deciders
    _, config, *rest = sys.argv[1:]
    overrides = [(key, text) for key, _, text in (pair.partition("=") for pair in rest[1::2])]
    sys.exit(worker.run(read_settings(Path(config), overrides)))

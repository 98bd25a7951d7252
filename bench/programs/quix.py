"""quixstreams as shipped (at least once): one topic to another through its own data frame."""

from __future__ import annotations

import json
import sys
from typing import Any

from canonical import Mapper
from quixstreams import Application, message_context

arguments = json.loads(sys.argv[1])
mapper = Mapper(arguments)
app = Application(
    broker_address=arguments["bootstrap"],
    consumer_group=arguments["group"],
    auto_offset_reset="earliest",
    auto_create_topics=False,
    use_changelog_topics=False,
    state_dir=arguments["scratch"],
    producer_extra_config={"compression.type": "lz4", "acks": "all"},
    loglevel="WARNING",
)
raw = app.topic(arguments["raw"], value_deserializer="bytes", key_deserializer="bytes")
canonical = app.topic(arguments["output"], value_serializer="bytes", key_serializer="bytes")


def normalise(value: bytes, _key: Any, _timestamp: int, headers: Any) -> tuple[bytes, bytes, Any]:
    """Key, value and headers of the canonical event."""
    context = message_context()
    return mapper.map(value, headers, context.partition, context.offset)


frame = app.dataframe(raw)
frame = frame.apply(normalise, metadata=True)
frame = frame.set_headers(lambda mapped, _key, _timestamp, _headers: mapped[2])
frame = frame.apply(lambda mapped: mapped[1])
frame = frame.to_topic(canonical)

if __name__ == "__main__":
    app.run()

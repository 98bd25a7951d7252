"""quixstreams as its documentation shows it: its JSON deserializer, dicts in the data frame, its Avro serializer."""

from __future__ import annotations

import json
import sys
from typing import Any

from canonical import Mapper
from quixstreams import Application, message_context
from quixstreams.models.serializers.avro import AvroSerializer

arguments = json.loads(sys.argv[1])
mapper = Mapper(arguments)


class FramedAvroSerializer(AvroSerializer):
    """Its Avro serializer, with the frame of a registry in front; asking a registry would only cost more."""

    def __call__(self, value: Any, ctx: Any) -> bytes:
        """Frame and body."""
        return mapper.frame + super().__call__(value, ctx)


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
raw = app.topic(arguments["raw"], value_deserializer="json", key_deserializer="str")
canonical = app.topic(arguments["output"], value_serializer=FramedAvroSerializer(mapper.schema), key_serializer="str")


def normalise(value: dict[str, Any], _key: Any, _timestamp: int, headers: Any) -> dict[str, Any]:
    """The canonical event, and in a field that Avro does not know its headers."""
    context = message_context()
    event, event["headers"] = mapper.build(value, headers, context.partition, context.offset)
    return event


frame = app.dataframe(raw)
frame = frame.apply(normalise, metadata=True)
frame = frame.set_headers(lambda event, _key, _timestamp, _headers: event["headers"])
frame = frame.to_topic(canonical, key=lambda event: event["root"])

if __name__ == "__main__":
    app.run()

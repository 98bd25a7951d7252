"""Faust as shipped: one agent, one event at a time, its own driver and producer, at least once.

With ``tuned`` its producer waits for larger batches; Faust itself waits for none.
"""

from __future__ import annotations

import json
import sys
from typing import Any

import faust
from canonical import Mapper

arguments = json.loads(sys.argv.pop())
mapper = Mapper(arguments)
tuning = {"producer_linger": 0.02, "producer_max_batch_size": 1_048_576} if arguments["tuned"] else {}
app = faust.App(
    arguments["group"],
    broker=f"kafka://{arguments['bootstrap']}",
    store="memory://",
    value_serializer="raw",
    key_serializer="raw",
    producer_compression_type="lz4",
    producer_acks=-1,
    consumer_auto_offset_reset="earliest",
    topic_disable_leader=True,
    topic_allow_declare=False,
    web_enabled=False,
    datadir=arguments["scratch"],
    **tuning,
)
raw = app.topic(arguments["raw"], value_serializer="raw", key_serializer="raw", value_type=None)
canonical = app.topic(arguments["output"], value_serializer="raw", key_serializer="raw", value_type=None)


@app.agent(raw)
async def normalise(stream: Any) -> None:
    """Map and send every event."""
    async for event in stream.events():
        message = event.message
        key, value, headers = mapper.map(message.value, message.headers, message.partition, message.offset)
        await canonical.send(key=key, value=value, headers=headers)


if __name__ == "__main__":
    sys.argv = [sys.argv[0], "worker", "-l", "warn", "--without-web"]
    app.main()

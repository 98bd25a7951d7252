"""Frontiers: where each group really is, written in the same transaction as the outputs.

Key (group, topic id, partition), value the next offset. Reading starts here, not at the group's committed offset:
offsets reset by hand, expired after idle days or a renamed group would otherwise replay history.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient

from schemas.failure import FatalError
from topics import catalog
from topics.cluster import KafkaUnreachable, name_error
from topics.reading import Record, read_to_end
from topics.transaction import Output

if TYPE_CHECKING:
    from topics.cluster import KafkaSettings


class FrontierLost(FatalError):
    """Records below the frontier's log start are gone before they were processed."""

    code = "RS303"
    meaning = "The log starts above the frontier: records were deleted by retention before they were processed."
    default_remedy = (
        "Find out what was lost with `remitstream account`; then run `remitstream repair frontier` for this partition."
    )


def build_frontier(group: str, topic_id: str, partition: int, offset: int) -> Output:
    """The record that moves a frontier."""
    return Output(catalog.FRONTIERS, f"{group}|{topic_id}|{partition}".encode(), str(offset).encode(), partition=0)


def read_frontiers(kafka: KafkaSettings, group: str) -> dict[tuple[str, int], int]:
    """(topic id, partition) -> next offset of a group, read to the end the log has now."""
    found: dict[tuple[str, int], int] = {}
    for item in read_to_end(kafka, catalog.FRONTIERS):
        if not isinstance(item, Record) or item.key is None:
            continue
        name, topic_id, partition = item.key.decode().rsplit("|", 2)
        if name == group:
            if item.value is None:
                found.pop((topic_id, int(partition)), None)
            else:
                found[topic_id, int(partition)] = int(item.value)
    return found


def await_pending_offsets(
    kafka: KafkaSettings, group: str, topic: str, partition: int, *, patience: float = 30
) -> None:
    """Wait until no transaction still holds an undecided offset of this partition.

    A predecessor's transaction may be prepared while its markers travel; asking for stable offsets waits it out.
    """
    admin = AdminClient(kafka.build_client("remitstream-barrier"))
    wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(topic, partition)])
    until = time.monotonic() + patience
    while True:
        try:
            admin.list_consumer_group_offsets([wanted], require_stable=True, request_timeout=5)[group].result()
        except KafkaException as error:
            if time.monotonic() > until:
                raise KafkaUnreachable(f"offsets stay undecided ({name_error(error)}).", place=topic) from None
            time.sleep(0.1)
        else:
            return

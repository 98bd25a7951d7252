"""Frontiers: where each group really is, written in the same transaction as the outputs.

Key (group, topic id, partition), value the next offset. Reading starts here, not at the group's committed offset:
offsets reset by hand, expired after idle days or a renamed group would otherwise replay history.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from schemas.failure import ConfigurationError, FatalError
from topics import catalog
from topics.cluster import PRODUCER, KafkaUnreachable, name_error
from topics.reading import Record, TopicReader, read_to_end
from topics.transaction import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from topics.cluster import KafkaSettings


class FrontierLost(FatalError):
    """The frontier lies outside the log: records are gone before they were processed, or after."""

    code = "RS303"
    meaning = (
        "The frontier lies outside the log: records were deleted by retention before they were processed, or the log "
        "lost its end."
    )
    default_remedy = (
        "Find out what is gone (a gateway can send it again); stop the processes of the group, then run "
        "`remitstream topics move-frontier` for this partition."
    )


class FrontierMissing(FatalError):
    """The topic of frontiers no longer holds one that was written."""

    code = "RS399"
    meaning = (
        "The topic `frontiers` has lost what a group wrote there: from the log's begin, all would be processed again."
    )
    default_remedy = (
        "Run `remitstream topics check`: `frontiers` must be compacted, and nothing else may delete from it. Stop the "
        "processes of the group, then run `remitstream topics move-frontier` for this partition."
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
    kafka: KafkaSettings, group: str, partitions: Sequence[tuple[str, int]], *, patience: float = 30
) -> dict[tuple[str, int], tuple[int, str]]:
    """Wait until no transaction still holds an undecided offset of these partitions (topic, number).

    Returns the offsets that there are, each with the topic id under which it was committed; "" when another program set
    it. A predecessor's transaction may be prepared while its markers travel; asking for stable offsets waits it out.
    """
    admin = AdminClient(kafka.build_client("remitstream-barrier"))
    wanted = ConsumerGroupTopicPartitions(group, [TopicPartition(*partition) for partition in partitions])
    until = time.monotonic() + patience
    while True:
        try:
            found = admin.list_consumer_group_offsets([wanted], require_stable=True, request_timeout=5)[group].result()
            # An undecided offset is an error of its partition, not of the answer.
            place, undecided = next(
                ((item.topic, item.error.name()) for item in found.topic_partitions if item.error is not None), ("", "")
            )
        except KafkaException as error:
            place, undecided = group, name_error(error)
        if not undecided:
            known = [item for item in found.topic_partitions if item.offset >= 0]
            return {(item.topic, item.partition): (item.offset, item.metadata or "") for item in known}
        if time.monotonic() > until:
            raise KafkaUnreachable(f"offsets stay undecided ({undecided}).", place=place)
        time.sleep(0.05)


class GroupRunning(ConfigurationError):
    """A frontier is to be moved under a running process."""

    code = "RS112"
    meaning = "A frontier can only be moved while no process of its group runs."
    default_remedy = "Stop the group's processes (and wait for the session timeout), then run the same command again."


class OffsetOutside(ConfigurationError):
    """A frontier is to be moved out of the log."""

    code = "RS113"
    meaning = "The offset lies outside the partition's log."
    default_remedy = "Give an offset between the named ones."


def move_frontier(kafka: KafkaSettings, group: str, topic: str, partition: int, offset: int | None) -> tuple[int, int]:
    """Set a group's frontier by hand, after records were lost below it; None means the log's start.

    Returns the old frontier (-1 when there was none) and the new one. What lies between them is not processed by this
    group. Raises ``GroupRunning``, ``OffsetOutside`` or ``KafkaUnreachable``.
    """
    admin = AdminClient(kafka.build_client("remitstream-repair"))
    try:
        members = admin.describe_consumer_groups([group], request_timeout=10)[group].result().members
    except KafkaException as error:
        raise KafkaUnreachable(f"the group cannot be described ({name_error(error)}).", place=group) from None
    if members:
        raise GroupRunning(f"{len(members)} members.", place=group)
    reader = TopicReader(kafka, topic)
    try:
        reader.assign({}, [partition])
        begin, end = reader.start_offsets()[partition], reader.end_offsets()[partition]
        topic_id = reader.topic_id()
    finally:
        reader.close()
    chosen = begin if offset is None else offset
    if not begin <= chosen <= end:
        raise OffsetOutside(f"{chosen}; the log is from {begin} to {end}.", place=f"{topic}[{partition}]")
    old = read_frontiers(kafka, group).get((topic_id, partition), -1)
    record = build_frontier(group, topic_id, partition, chosen)
    errors: list[str] = []
    producer = Producer(kafka.build_client("remitstream-repair") | PRODUCER)
    producer.produce(
        record.topic,
        record.value,
        record.key,
        partition=0,
        on_delivery=lambda error, _: errors.append(error.name()) if error is not None else None,
    )
    if producer.flush(10) or errors:
        raise KafkaUnreachable(f"not written ({', '.join(errors) or 'no answer'}).", place=catalog.FRONTIERS)
    return old, chosen

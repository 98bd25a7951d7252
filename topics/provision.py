"""Creating topics from the catalog, and checking a cluster against it."""

from __future__ import annotations

from typing import TYPE_CHECKING

from confluent_kafka import KafkaError, KafkaException
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, NewTopic, ResourceType

from schemas.failure import FatalError, OperatorError
from topics.cluster import KafkaUnreachable, name_error

if TYPE_CHECKING:
    from collections.abc import Sequence

    from topics.catalog import Topic
    from topics.cluster import KafkaSettings

REPLICATION = 3
"""Outside the embedded mode; with ``min.insync.replicas`` 2 one broker may be lost without stopping or losing."""

RECORD_BYTES = 8_388_608
RAW_RECORD_BYTES = 6_291_456
"""More than the largest body taken in (4 MiB) with its headers; less than what `waiting.*` and `dlq` take."""


class PartitionsFrozen(FatalError):
    """The catalog wants another partition count than the topic has."""

    code = "RS310"
    meaning = "A topic's partition count differs; changing it would break order, dedupe and state."
    default_remedy = "Set `worker.partitions` back; growth is a new topic generation after a drain."


class ReplicasMissing(FatalError):
    """A topic has fewer replicas than the catalog's safety needs."""

    code = "RS312"
    meaning = "A topic has fewer than 3 replicas: with `min.insync.replicas` 2 the next lost broker would stop it."
    default_remedy = (
        "Give it 3 replicas with Kafka's `kafka-reassign-partitions`, then run the command again; nothing was changed."
    )


class TopicRefused(FatalError):
    """The cluster does not take a topic, or its settings, as the catalog wants them."""

    code = "RS313"
    meaning = "The cluster refuses to create or to configure a topic as the catalog wants it."
    default_remedy = "Check this user's rights on the cluster and its topic policy, then run the command again."


_TOO_FEW_BROKERS = (
    "Outside the embedded mode each topic has 3 replicas: run the command against a cluster of at least 3 brokers. "
    "A trial on one machine uses `stack.embedded = true`."
)


def build_configuration(topic: Topic, *, embedded: bool) -> dict[str, str]:
    """The topic's full configuration in this deployment."""
    safety = (
        {"min.insync.replicas": "1"}
        if embedded
        else {"min.insync.replicas": "2", "unclean.leader.election.enable": "false"}
    )
    size = RAW_RECORD_BYTES if topic.name.startswith("raw.") else RECORD_BYTES
    return topic.configuration | safety | {"max.message.bytes": str(size)}


def apply(kafka: KafkaSettings, topics: Sequence[Topic], *, partitions: int, embedded: bool) -> list[str]:
    """Create missing topics and set configurations; return what was changed.

    Raises ``PartitionsFrozen`` and ``ReplicasMissing`` before anything was changed; ``TopicRefused`` names the first
    topic that the cluster does not take.
    """
    admin = AdminClient(kafka.build_client("remitstream-provision"))
    existing = _list_existing(admin, kafka)
    missing: list[NewTopic] = []
    for topic in topics:
        wanted = topic.partitions or partitions
        if topic.name not in existing:
            missing.append(
                NewTopic(
                    topic.name,
                    num_partitions=wanted,
                    replication_factor=1 if embedded else REPLICATION,
                    config=build_configuration(topic, embedded=embedded),
                )
            )
        elif existing[topic.name][0] != wanted:
            raise PartitionsFrozen(f"it has {existing[topic.name][0]}, wanted {wanted}.", place=topic.name)
        elif not embedded and existing[topic.name][1] < REPLICATION:
            raise ReplicasMissing(f"it has {existing[topic.name][1]}, wanted {REPLICATION}.", place=topic.name)
    changes = _create(admin, missing) if missing else []
    kept = [topic for topic in topics if topic.name in existing]
    for topic, differing in _compare(admin, kafka, kept, embedded=embedded):
        entries = [
            ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET) for name, value in differing.items()
        ]
        resource = ConfigResource(ResourceType.TOPIC, topic.name, incremental_configs=entries)
        for future in admin.incremental_alter_configs([resource]).values():
            try:
                future.result()
            except KafkaException as error:
                raise _explain(error, "configured", topic.name) from None
        changes.append(f"configured {topic.name}: {', '.join(sorted(differing))}")
    return changes


def check(kafka: KafkaSettings, topics: Sequence[Topic], *, partitions: int, embedded: bool) -> list[str]:
    """What is wrong with the cluster's topics, one line each; empty when nothing is."""
    admin = AdminClient(kafka.build_client("remitstream-provision"))
    existing = _list_existing(admin, kafka)
    problems: list[str] = []
    for topic in topics:
        if topic.name not in existing:
            problems.append(f"{topic.name}: missing")
            continue
        count, replicas = existing[topic.name]
        wanted = topic.partitions or partitions
        if count != wanted:
            problems.append(f"{topic.name}: {count} partitions, wanted {wanted}")
        if not embedded and replicas < REPLICATION:
            problems.append(f"{topic.name}: replication {replicas}, wanted {REPLICATION}")
    kept = [topic for topic in topics if topic.name in existing]
    for topic, differing in _compare(admin, kafka, kept, embedded=embedded):
        problems.extend(f"{topic.name}: {name} is not {value}" for name, value in sorted(differing.items()))
    return problems


def _create(admin: AdminClient, missing: list[NewTopic]) -> list[str]:
    changes = []
    for name, future in admin.create_topics(missing, operation_timeout=20).items():
        try:
            future.result()
            changes.append(f"created {name}")
        except KafkaException as error:
            if error.args[0].code() != KafkaError.TOPIC_ALREADY_EXISTS:
                raise _explain(error, "created", name) from None
    return changes


def _explain(error: KafkaException, deed: str, topic: str) -> OperatorError:
    cause = error.args[0]
    if cause.retriable() or cause.code() in (KafkaError._TIMED_OUT, KafkaError._TRANSPORT):  # noqa: SLF001
        return KafkaUnreachable(f"not {deed} ({name_error(error)}).", place=topic)
    remedy = _TOO_FEW_BROKERS if cause.code() == KafkaError.INVALID_REPLICATION_FACTOR else ""
    return TopicRefused(f"not {deed} ({name_error(error)}).", place=topic, remedy=remedy)


def _list_existing(admin: AdminClient, kafka: KafkaSettings) -> dict[str, tuple[int, int]]:
    try:
        metadata = admin.list_topics(timeout=10)
    except KafkaException as error:
        raise KafkaUnreachable(f"topics cannot be listed ({name_error(error)}).", place=kafka.bootstrap) from None
    return {
        name: (len(topic.partitions), min((len(p.replicas) for p in topic.partitions.values()), default=0))
        for name, topic in metadata.topics.items()
    }


def _compare(
    admin: AdminClient, kafka: KafkaSettings, topics: Sequence[Topic], *, embedded: bool
) -> list[tuple[Topic, dict[str, str]]]:
    if not topics:
        return []
    resources = {topic.name: ConfigResource(ResourceType.TOPIC, topic.name) for topic in topics}
    try:
        futures = admin.describe_configs(list(resources.values()))
        found = {resource.name: future.result() for resource, future in futures.items()}
    except KafkaException as error:
        raise KafkaUnreachable(f"settings cannot be read ({name_error(error)}).", place=kafka.bootstrap) from None
    differences = []
    for topic in topics:
        differing = {
            name: value
            for name, value in build_configuration(topic, embedded=embedded).items()
            if not _equals(name, found[topic.name][name].value, value)
        }
        if differing:
            differences.append((topic, differing))
    return differences


def _equals(name: str, found: str | None, wanted: str) -> bool:
    if name == "cleanup.policy":
        return set((found or "").split(",")) == set(wanted.split(","))
    return found == wanted

"""What a group stands on: its topics, known by their ids, and the offset at which each of their partitions starts.

Blocking. Of a topic that was deleted, or deleted and made anew, a classic member is not told: its client goes on in the
new one from the offset of the old one. So the ids are compared at each assignment and now and then between.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.failure import ConfigurationError, FatalError
from topics import frontier
from topics.cluster import describe_topics
from topics.reading import TopicMissing, TopicReader

if TYPE_CHECKING:
    from collections.abc import Sequence

    from topics.cluster import KafkaSettings

Partition = tuple[str, int]
"""Topic name and partition number."""


class PositionBroken(FatalError):
    """A batch does not begin at the frontier."""

    code = "RS304"
    meaning = "Records came out of order with the frontier; going on could skip or repeat some."
    default_remedy = "Nothing by hand: the process manager restarts the process; report it if it repeats."


class PartitionsChanged(ConfigurationError):
    """A topic has another number of partitions than the settings say."""

    code = "RS134"
    meaning = "A topic's partition count is not `worker.partitions`: the same key would go to two partitions."
    default_remedy = (
        "Correct `worker.partitions` if it is the setting that is wrong. If partitions were added to a topic, its "
        "order and dedupe are broken: stop all writers and move to a new generation of topics."
    )


class TopicReplaced(FatalError):
    """A topic was deleted and made again under a running process."""

    code = "RS307"
    meaning = "A topic was deleted and made again while this process ran; its offsets mean other records now."
    default_remedy = (
        "The restarted process reads the new topic from its begin. What the old one held and was not processed is gone "
        "with it: a gateway can send it again."
    )


class Footing:
    """The topics of a group as they were when its member began. ``partitions`` is the count that each must have."""

    def __init__(self, kafka: KafkaSettings, group: str, topics: Sequence[str], partitions: int | None) -> None:
        self.topics = list(topics)
        self._kafka = kafka
        self._group = group
        self._partitions = partitions
        self._ids: dict[str, str] = {}

    def take(self) -> dict[str, str]:
        """From now on the topics must be the ones that are there now; return their ids by name.

        Raises ``TopicMissing``, ``PartitionsChanged`` or ``KafkaUnreachable``.
        """
        ids = self._describe()
        missing = sorted(set(self.topics) - set(ids))
        if missing:
            raise TopicMissing("the topics do not exist.", place=", ".join(missing))
        self._ids = ids
        return ids

    def check(self) -> None:
        """Look whether the topics are the same. Raises ``TopicReplaced`` and what ``take`` raises."""
        current = self._describe()
        for topic, topic_id in self._ids.items():
            if topic not in current:
                raise TopicMissing("the topic was deleted.", place=topic)
            if current[topic] != topic_id:
                raise TopicReplaced("its id is another one than at the start of this process.", place=topic)

    def find_starts(self, keys: Sequence[Partition]) -> dict[Partition, int]:
        """Frontier of each partition, after every predecessor's transaction on it is decided.

        Without one, the begin of the log. Raises ``FrontierLost`` when it lies outside the log, ``FrontierMissing``
        when there was one, and what ``check`` raises.
        """
        if not keys:
            return {}
        self.check()
        # In this order: an offset that is seen here has its frontier before the end of the log that is read next.
        committed = frontier.await_pending_offsets(self._kafka, self._group, keys)
        known = frontier.read_frontiers(self._kafka, self._group)
        starts: dict[Partition, int] = {}
        for topic in {topic for topic, _ in keys}:
            reader = TopicReader(self._kafka, topic)
            try:
                reader.assign({}, [partition for name, partition in keys if name == topic])
                begins, ends = reader.start_offsets(), reader.end_offsets()
            finally:
                reader.close()
            for partition, begin in begins.items():
                start = known.get((self._ids[topic], partition))
                if start is None:
                    self._check_new(topic, partition, begin, committed.get((topic, partition)))
                    start = begin
                if not begin <= start <= ends[partition]:
                    raise frontier.FrontierLost(
                        f"frontier {start}, log from {begin} to {ends[partition]}.", place=f"{topic}[{partition}]"
                    )
                starts[topic, partition] = start
        return starts

    def _check_new(self, topic: str, partition: int, begin: int, committed: tuple[int, str] | None) -> None:
        """An offset of ours, of this very topic, was committed together with a frontier."""
        if committed is None or committed[1] != self._ids[topic] or committed[0] <= begin:
            return
        raise frontier.FrontierMissing(
            f"the group has come to {committed[0]}.",
            place=f"{topic}[{partition}]",
            remedy=f"{frontier.FrontierMissing.default_remedy} With `--to {committed[0]}` it goes on where it was.",
        )

    def check_gap(self, topic: str, partition: int, start: int, offset: int) -> None:
        """Between a start and the first record may lie transaction markers and aborted records only.

        Raises ``PositionBroken`` when a record was skipped.
        """
        if offset == start:
            return
        reader = TopicReader(self._kafka, topic)
        try:
            reader.assign({partition: start}, [partition])
            while reader.positions()[partition] < offset:
                skipped = [record for record in reader.poll(1, 0.2) if record.offset < offset]
                if skipped:
                    raise PositionBroken(f"offset {skipped[0].offset} was skipped.", place=f"{topic}[{partition}]")
        finally:
            reader.close()

    def _describe(self) -> dict[str, str]:
        """Topic ids. Raises ``PartitionsChanged``: keys, order and local state hang on the count."""
        found = describe_topics(self._kafka, self.topics)
        for topic, (_, count) in found.items():
            if self._partitions is not None and count != self._partitions:
                raise PartitionsChanged(f"it has {count} partitions, not {self._partitions}.", place=topic)
        return {topic: topic_id for topic, (topic_id, _) in found.items()}

"""The conservation account: every raw record has one fate, every canonical event one outcome per target.

accepted = canonical + suppressed + ignored + patient_update + waiting + in_review + dead_lettered, and per target
canonical = posted + not_routed + rejected + dead_lettered + parked + unknown + waived. What a process has not reached
yet is ``pending``; ``lost`` is the difference, and must be 0. It reads the topics alone, nobody's counters.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from schemas.events import DeliveryOutcome, Disposition, Fate, Outcome, Review, WaitingEntry
from schemas.wire import Decoder
from topics import catalog, headers
from topics.frontier import read_frontiers
from topics.headers import find_header
from topics.reading import Record, TopicReader, keep_latest, read_to_end
from topics.registry import Registry

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from runtime.settings import Settings

FATES = tuple(fate.value for fate in Fate)
OUTCOMES = tuple(outcome.value for outcome in Outcome)
WORKER_GROUP = "remitstream.worker"
NORMALISE_STAGES = frozenset({"normalise", "release"})


def name_delivery_group(target: str) -> str:
    """Consumer group of a target instance."""
    return f"remitstream.deliver.{target}"


@dataclass(slots=True)
class Balance:
    """One equation: ``total`` against the parts."""

    total: int
    parts: dict[str, int]
    pending: int = 0
    doubled: int = 0
    """Facts with more than one fate or outcome record where there must be one."""
    lost: int = 0
    missing: list[str] = field(default_factory=list)
    """Up to 20 hops or event ids without a fate, for the search."""

    @property
    def balanced(self) -> bool:
        """Nothing lost, nothing twice, and the parts add up."""
        return not self.lost and not self.doubled and self.total == sum(self.parts.values()) + self.pending


@dataclass(slots=True)
class Account:
    """The whole account. ``reasons`` counts dispositions, reviews and dead letters by their codes."""

    raw: Balance
    targets: dict[str, Balance]
    reasons: dict[str, int]
    by_source: dict[str, dict[str, int]]

    @property
    def lost(self) -> int:
        """Raw records without a fate plus canonical events without an outcome at some target."""
        return self.raw.lost + sum(balance.lost for balance in self.targets.values())

    @property
    def pending(self) -> int:
        """What processes have not reached yet."""
        return self.raw.pending + sum(balance.pending for balance in self.targets.values())

    @property
    def balanced(self) -> bool:
        """All equations hold."""
        return self.raw.balanced and all(balance.balanced for balance in self.targets.values())

    def build_report(self) -> dict[str, Any]:
        """The account as data, with the names of the equations."""
        return {
            "accepted": self.raw.total,
            **self.raw.parts,
            "pending": self.raw.pending,
            "doubled": self.raw.doubled,
            "targets": {
                name: {
                    "canonical": balance.total,
                    **balance.parts,
                    "pending": balance.pending,
                    "doubled": balance.doubled,
                    "lost": balance.lost,
                }
                for name, balance in sorted(self.targets.items())
            },
            "lost": self.lost,
            "missing": [*self.raw.missing, *(item for b in self.targets.values() for item in b.missing)][:20],
            "balanced": self.balanced,
            "reasons": dict(sorted(self.reasons.items())),
            "by_source": self.by_source,
        }


class TopicScan:
    """Reads the topics of a deployment, committed records only."""

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._registry = Registry(settings.registry)

    def read(self, topic: str) -> Iterator[Record]:
        """All committed records of a topic."""
        for item in read_to_end(self._settings.kafka, topic):
            if isinstance(item, Record):
                yield item

    def find_id(self, topic: str) -> str:
        """The topic's id."""
        reader = TopicReader(self._settings.kafka, topic)
        try:
            return reader.topic_id()
        finally:
            reader.close()

    def build_decoder(self, schema: str, event_type: type[Any]) -> Decoder:
        """Decoder of an Avro topic."""
        return Decoder(schema, event_type, self._registry.find_schema)

    def read_frontiers(self, group: str) -> dict[tuple[str, int], int]:
        """Frontiers of a group."""
        return read_frontiers(self._settings.kafka, group)


def balance_books(settings: Settings, since_ms: int = 0) -> Account:
    """Read everything and balance. ``since_ms`` leaves out raw records written before it (epoch milliseconds).

    Raises ``TemporaryError`` when Kafka or the registry is not reachable. Memory grows with the number of raw records
    looked at, about 300 bytes each. It may run beside the flow: what is not decided yet counts as pending.
    """
    books = _Books(settings)
    books.read_raw(since_ms)
    before = list(books.read_open_fates())
    books.read_canonical()
    for hop, fate, reason in books.read_other_fates():
        books.note(hop, fate, reason)
    books.note_moved(before)
    raw, by_source = books.balance_raw()
    return Account(raw, books.balance_targets(), dict(books.reasons), by_source)


class _Books:
    """What was read so far.

    Frontiers are read before the facts: whatever lies below one must have its fact by the time the facts are read.
    """

    def __init__(self, settings: Settings) -> None:
        self._settings = settings
        self._scan = TopicScan(settings)
        self._fates: dict[str, list[str]] = {}
        self._sources: dict[str, str] = {}
        self._unread: set[str] = set()
        self._events: dict[str, tuple[str, int, int]] = {}
        self._doubled_events = 0
        self.reasons: Counter[str] = Counter()
        self._target_frontiers = {
            target.name: self._scan.read_frontiers(name_delivery_group(target.name)) for target in settings.targets
        }

    def read_raw(self, since_ms: int) -> None:
        """Every raw record, and whether a worker has passed it."""
        frontiers = self._scan.read_frontiers(WORKER_GROUP)
        for source in self._settings.sources:
            topic = catalog.name_raw(source)
            topic_id = self._scan.find_id(topic)
            for record in self._scan.read(topic):
                if record.timestamp < since_ms:
                    continue
                hop = f"{topic_id}:{record.partition}:{record.offset}"
                self._fates[hop] = []
                self._sources[hop] = source
                if record.offset >= frontiers.get((topic_id, record.partition), 0):
                    self._unread.add(hop)

    def read_canonical(self) -> None:
        """Every canonical event of a known raw record."""
        for topic in catalog.CANONICAL_MONEY:
            for record in self._scan.read(topic):
                hop = find_header(record.headers, headers.HOP) or ""
                if hop not in self._fates:
                    continue
                self._fates[hop].append(Fate.CANONICAL)
                event_id = find_header(record.headers, headers.EVENT_ID) or ""
                self._doubled_events += event_id in self._events
                self._events[event_id] = (topic, record.partition, record.offset)

    def note(self, hop: str, fate: str, reason: str) -> None:
        """A fate that is not a canonical event."""
        if hop in self._fates:
            self._fates[hop].append(fate)
            self.reasons[f"{fate}:{reason}"] += 1

    def note_moved(self, before: Iterable[tuple[str, str, str]]) -> None:
        """Give what was open when reading began, and was found nowhere, that fate: it ended while the books were read.

        Its end lies behind what was read of the topic that holds it. One that ended nowhere is a loss the next time.
        """
        for hop, fate, reason in before:
            if self._fates.get(hop) == []:
                self.note(hop, fate, reason)

    def read_other_fates(self) -> Iterator[tuple[str, str, str]]:
        """(hop, fate, reason) of everything that is not canonical; last what may still end in one of the others."""
        dispositions = self._scan.build_decoder("disposition", Disposition)
        for record in self._scan.read(catalog.DISPOSITIONS):
            disposition = dispositions.decode(record.value or b"")
            yield disposition.hop, disposition.fate, disposition.reason
        for record in self._scan.read(catalog.DLQ):
            if find_header(record.headers, headers.EDITED_FROM) is not None:
                continue  # a new version of a letter that is counted
            if find_header(record.headers, headers.DEAD_LETTER_STAGE) in NORMALISE_STAGES:
                hop = find_header(record.headers, headers.HOP) or ""
                yield hop, Fate.DEAD_LETTERED, find_header(record.headers, headers.DEAD_LETTER_CODE) or ""
        yield from self.read_open_fates()

    def read_open_fates(self) -> Iterator[tuple[str, str, str]]:
        """(hop, fate, reason) of what is in review or waits now; a record that waits may come into review."""
        reviews = self._scan.build_decoder("review", Review)
        for record in keep_latest(self._scan.read(catalog.REVIEWS)).values():
            review = reviews.decode(record.value or b"")
            yield review.hop, Fate.IN_REVIEW, review.reason
        entries = self._scan.build_decoder("waiting_entry", WaitingEntry)
        for source in self._settings.sources:
            held = keep_latest(self._scan.read(catalog.name_waiting(source))) if source != catalog.HL7 else {}
            for record in held.values():
                entry = entries.decode(record.value or b"")
                yield entry.hop, Fate.WAITING, entry.reason

    def balance_raw(self) -> tuple[Balance, dict[str, dict[str, int]]]:
        """The first equation, and its parts by source."""
        raw = Balance(len(self._fates), dict.fromkeys(FATES, 0), doubled=self._doubled_events)
        by_source: dict[str, Counter[str]] = {source: Counter() for source in self._settings.sources}
        for hop, found in self._fates.items():
            counts = by_source[self._sources[hop]]
            counts["accepted"] += 1
            if found:
                raw.parts[found[0]] += 1
                raw.doubled += len(found) - 1
                counts[found[0]] += 1
            elif hop in self._unread:
                raw.pending += 1
            else:
                raw.lost += 1
                raw.missing = [*raw.missing, hop][:20]
        return raw, {source: dict(counts) for source, counts in by_source.items()}

    def balance_targets(self) -> dict[str, Balance]:
        """The second equation, per target."""
        balances = {name: Balance(len(self._events), dict.fromkeys(OUTCOMES, 0)) for name in self._target_frontiers}
        outcomes = self._read_outcomes(balances)
        ids = {topic: self._scan.find_id(topic) for topic in catalog.CANONICAL_MONEY}
        for name, balance in balances.items():
            frontiers = self._target_frontiers[name]
            for event_id, (topic, partition, offset) in self._events.items():
                found = outcomes[name].get(event_id)
                if found is not None:
                    balance.parts[found] += 1
                elif offset >= frontiers.get((ids[topic], partition), 0):
                    balance.pending += 1
                else:
                    balance.lost += 1
                    balance.missing = [*balance.missing, f"{name}:{event_id}"][:20]
        return balances

    def _read_outcomes(self, balances: dict[str, Balance]) -> dict[str, dict[str, str]]:
        outcomes: dict[str, dict[str, str]] = {name: {} for name in balances}
        decoder = self._scan.build_decoder("delivery_outcome", DeliveryOutcome)
        for record in self._scan.read(catalog.DELIVERIES):
            outcome = decoder.decode(record.value or b"")
            known = outcomes.get(outcome.target)
            if known is None or outcome.event_id not in self._events:
                continue
            if known.get(outcome.event_id) == Outcome.POSTED == outcome.outcome:
                balances[outcome.target].doubled += 1
            # An event may be unknown or parked before it is posted: the last outcome is the one in force.
            known[outcome.event_id] = outcome.outcome
        return outcomes


def account(settings: Settings, since: dt.datetime | None) -> dict[str, Any]:
    """The account as data, for the command line; of the records received since a moment, or of all."""
    return balance_books(settings, round(since.timestamp() * 1000) if since is not None else 0).build_report()

"""What a batch leads to, and how its records are built: a decision is data until its transaction has committed."""

from __future__ import annotations

import time
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Protocol, TypeVar

from schemas.events import Disposition, Fate, MoneyEvent, Review
from schemas.failure import Failure, FailureKind, OperatorError
from streams.state import Draft, PartitionState
from streams.waiting import WaitingDraft, WaitingRoom
from topics import catalog, headers
from topics.dead_letter import build_dead_letter
from topics.headers import RawRecord, find_header
from topics.transaction import Changelog, Output

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Sequence

    from schemas.wire import Decoder, Encoder
    from streams.normalised import Normalised

T_Mapped = TypeVar("T_Mapped")


@dataclass(frozen=True, slots=True)
class Codecs:
    """Avro codecs of everything a worker writes."""

    money: dict[str, Encoder]
    patient: Encoder
    disposition: Encoder
    review: Encoder
    waiting: Encoder | None
    """None for a source without a waiting room."""
    waiting_reader: Decoder


@dataclass(slots=True)
class Decision:
    """What one batch leads to: records to write, and changes to apply once they are committed."""

    outputs: list[Output] = field(default_factory=list)
    dead_letters: list[Output] = field(default_factory=list)
    drafts: list[Draft] = field(default_factory=list)
    rooms: list[WaitingDraft] = field(default_factory=list)
    fates: Counter[tuple[Fate, str]] = field(default_factory=Counter)

    def list_outputs(self) -> list[Output]:
        """Everything of the transaction beside changelogs, frontiers and offsets."""
        return [*self.outputs, *self.dead_letters]

    def list_changelogs(self) -> list[Changelog]:
        """Changes of local state, as the transaction writes them."""
        return [changelog for draft in self.drafts for changelog in draft.list_changelogs()]

    def apply(self) -> None:
        """Take the decision over into stores and waiting rooms: after its transaction has committed, not before."""
        for draft in self.drafts:
            draft.apply()
        for room in self.rooms:
            room.apply()


@dataclass(slots=True)
class Room:
    """Local state of one partition: its store and the index of its waiting room."""

    state: PartitionState
    waiting: WaitingRoom = field(default_factory=WaitingRoom)


class Clock:
    """Time as decisions see it; a test passes its own."""

    def now_ms(self) -> int:
        """Milliseconds since the epoch."""
        return time.time_ns() // 1_000_000

    def monotonic(self) -> float:
        """Seconds, never going back."""
        return time.monotonic()


class Printer:
    """Builds canonical records. What is the same for all events of an account and kind is built once."""

    def __init__(self, codecs: Codecs) -> None:
        self._codecs = codecs
        self._same: dict[tuple[str, str, str], tuple[bytes, bytes, bytes, bytes]] = {}
        self._second = (-1, "", b"")

    def print(self, record: RawRecord, normalised: Normalised) -> Output:
        """The canonical record of an event. Raises when the event does not fit its schema."""
        event, topic = normalised.event, normalised.topic
        same = self._same.get((topic, event.account, event.kind))
        if same is None:
            same = self._same[topic, event.account, event.kind] = (
                f"/{event.tenant}/{event.source}/{event.account}".encode(),
                f"remitstream.{topic}.{event.kind}".encode(),
                event.facility.encode(),
                event.mapping_version.encode(),
            )
        source, event_type, facility, version = same
        event_id = event.event_id.encode()
        return Output(
            topic,
            event.root.encode(),
            self._codecs.money[topic].encode(event),
            [
                ("ce_specversion", b"1.0"),
                ("ce_id", event_id),
                ("ce_source", source),
                ("ce_type", event_type),
                ("ce_time", self._format_time(event.occurred_at)),
                (headers.EVENT_ID, event_id),
                (headers.HOP, record.hop.encode()),
                (headers.ORIGIN, event.origin.encode()),
                (headers.INGEST_TIME, b"%d" % event.received_at),
                (headers.FACILITY, facility),
                (headers.MAPPING_VERSION, version),
            ],
            -1,
            record.hop,
        )

    def _format_time(self, milliseconds: int) -> bytes:
        """RFC 3339."""
        second, rest = divmod(milliseconds, 1000)
        if second != self._second[0]:
            text = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(second))
            self._second = (second, text, f"{text}.000Z".encode())
        return f"{self._second[1]}.{rest:03d}Z".encode() if rest else self._second[2]


class Writer:
    """Builds the records of one batch."""

    def __init__(self, codecs: Codecs, printer: Printer, source: str, now_ms: int) -> None:
        self._codecs = codecs
        self._printer = printer
        self._source = source
        self._now_ms = now_ms
        self._published: list[str] = []
        self._decision = Decision()
        self._outputs = self._decision.outputs

    def finish(self) -> Decision:
        """All that was written."""
        for kind, count in Counter(self._published).items():
            self._decision.fates[Fate.CANONICAL, kind] = count
        return self._decision

    def publish(self, record: RawRecord, normalised: Normalised) -> None:
        """The canonical event."""
        self._outputs.append(self._printer.print(record, normalised))
        self._published.append(normalised.event.kind)

    def publish_patients(self, outputs: Iterable[Output]) -> None:
        """States of patient identifiers, as encoded."""
        self._outputs += outputs

    def wait(self, reason: str) -> None:
        """The record is on hold."""
        self._decision.fates[Fate.WAITING, reason] += 1

    def dispose(self, record: RawRecord, fate: Fate, reason: str, event_type: str, linked: str = "") -> None:
        """The record of a raw record that leads to nothing else."""
        disposition = Disposition(
            hop=record.hop,
            fate=fate.value,
            reason=reason,
            source=self._source,
            facility=find_header(record.headers, headers.FACILITY) or "",
            event_type=event_type,
            linked=linked,
            decided_at=self._now_ms,
        )
        self._outputs.append(
            Output(
                catalog.DISPOSITIONS,
                record.hop.encode(),
                self._codecs.disposition.encode(disposition),
                cause=record.hop,
            )
        )
        self._decision.fates[fate, reason] += 1

    def review(self, record: RawRecord, event: MoneyEvent, reason: str, discriminator: str = "") -> None:
        """A question for a person."""
        review = Review(
            event_id=event.event_id,
            reason=reason,
            hop=record.hop,
            source=self._source,
            facility=event.facility,
            transaction_key=event.transaction_key,
            root=event.root,
            event_type=event.kind,
            created_at=self._now_ms,
        )
        key = "|".join(part for part in (event.event_id, reason, discriminator) if part)
        self._outputs.append(
            Output(
                catalog.REVIEWS,
                key.encode(),
                self._codecs.review.encode(review),
                [(headers.HOP, record.hop.encode())],
                cause=record.hop,
            )
        )
        self._decision.fates[Fate.IN_REVIEW, reason] += 1

    def dead_letter(self, record: RawRecord, failure: Failure, stage: str) -> None:
        """The record itself, with the reason as codes."""
        self._decision.dead_letters.append(
            build_dead_letter(
                key=record.key,
                value=record.value,
                original=record.headers,
                failure=failure,
                stage=stage,
                hop=record.hop,
                origin=record.origin,
                now_ms=self._now_ms,
            )
        )
        self._decision.fates[Fate.DEAD_LETTERED, failure.code] += 1


class Decider(Protocol):
    """Decides batches of one source's raw topic."""

    source: str

    async def decide(
        self, rooms: dict[int, Room], records: Sequence[RawRecord], refused: frozenset[str] = frozenset()
    ) -> Decision:
        """What becomes of every record. Raises ``TemporaryError`` when something it needs is down: nothing changed."""
        ...

    def rebuild(self, room: Room) -> None:
        """Fill what memory holds of a partition from its store."""
        ...


def guard(function: Callable[..., T_Mapped], *arguments: object) -> T_Mapped | Failure:
    """Run a per-record function: whatever it raises is that record's dead letter, not a crash."""
    try:
        return function(*arguments)
    except Failure as failure:
        # Its traceback would keep the frames, and in them the whole batch, alive until the collector comes.
        failure.__context__ = failure.__cause__ = None
        return failure.with_traceback(None)
    except OperatorError:
        raise
    except Exception as error:  # noqa: BLE001 - the record is kept with the exception's type; the text may hold payload
        return as_failure(error)


def as_failure(error: Exception) -> Failure:
    """The failure itself; of any other exception its type only, since its text may hold payload."""
    return error if isinstance(error, Failure) else Failure(FailureKind.INTERNAL, type(error).__name__, "")

"""Dead letters as people see them: what each is, why it is here, and what became of it since.

A letter of a stream stage (``normalise``, ``release``) is a raw record; it is open until somebody redrives or waives
it. A letter of a target is only a report: what is open is the event in the target's ledger. Events that hold up their
entity without a letter (put off, or refused so long ago that the letter is gone) are listed beside them, named
``target/event id``.
"""

from __future__ import annotations

import datetime as dt
from collections import Counter
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from runtime.account import NORMALISE_STAGES
from runtime.desk import office
from runtime.desk.office import NothingFound, Office
from sinks.desk import TargetBook
from topics import catalog, headers
from topics.headers import find_header
from topics.reading import Record, read_to_end

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence

    from sinks.desk import Open
    from topics.audit import Act

OPEN = "open"
PROPOSED = "proposed"
"""Open, and an edit or waiver waits for a second person."""
DECIDED = "decided"
"""A decision is on its way to the deliverer."""
REDRIVEN = "redriven"
WAIVED = "waived"
EDITED = "edited"
SUPERSEDED = "superseded"
"""A later letter tells of the same event at the same target."""
DONE = "done"
UNDER_WAY = "under way"
UNKNOWN = "unknown"
PARKED = "parked"
"""Put off and tried again by itself; it may be waived."""
FINISHED = frozenset({REDRIVEN, WAIVED, EDITED, SUPERSEDED, DONE})
"""Nobody needs to look any more."""


@dataclass(slots=True)
class Letter:
    """One dead letter. ``id`` is its place in `dlq`: ``partition:offset``."""

    record: Record = field(repr=False)
    status: str = OPEN
    proposal: int = 0
    """Number of the act that waits for a second person."""
    name: str = ""
    """Set when there is no letter: ``target/event id``."""

    @property
    def id(self) -> str:
        """How commands name it."""
        return self.name or f"{self.record.partition}:{self.record.offset}"

    @property
    def stage(self) -> str:
        """``normalise``, ``release`` or the name of a target."""
        return self.read(headers.DEAD_LETTER_STAGE)

    @property
    def code(self) -> str:
        """Why it is here."""
        return self.read(headers.DEAD_LETTER_CODE)

    @property
    def event_id(self) -> str:
        """The canonical event, at a target's stage."""
        return self.read(headers.EVENT_ID) or self.read(headers.HOP)

    @property
    def is_raw(self) -> bool:
        """Whether it is a raw record, and not an event at a target."""
        return self.stage in NORMALISE_STAGES

    @property
    def time(self) -> int:
        """When it was dead-lettered: milliseconds since the epoch."""
        text = self.read(headers.DEAD_LETTER_TIME)
        return int(text) if text.isdigit() else self.record.timestamp

    def read(self, name: str) -> str:
        """Text of a header, empty when there is none."""
        return find_header(self.record.headers, name) or ""

    def describe(self) -> dict[str, Any]:
        """Codes and names; no payload, no key."""
        told = {
            "id": self.id,
            "status": f"{self.status} ({self.proposal})" if self.proposal and self.status == PROPOSED else self.status,
            "time": write_time(self.time),
            "stage": self.stage,
            "kind": self.read(headers.DEAD_LETTER_KIND),
            "code": self.code,
            "field": self.read(headers.DEAD_LETTER_FIELD),
            "facility": self.read(headers.FACILITY),
        }
        return told | ({"source": self.read(headers.SOURCE)} if self.is_raw else {"event_id": self.event_id})


@dataclass(frozen=True, slots=True, kw_only=True)
class Choice:
    """Which letters are meant; empty members mean all. Times in milliseconds."""

    ids: tuple[str, ...] = ()
    stage: str = ""
    code: str = ""
    facility: str = ""
    since: int = 0
    until: int = 0

    @property
    def is_empty(self) -> bool:
        """Whether nothing was chosen at all."""
        return self == Choice()

    def takes(self, letter: Letter) -> bool:
        """Whether a letter is meant."""
        return (
            (not self.ids or letter.id in self.ids)
            and self.stage in ("", letter.stage)
            and self.code in ("", letter.code)
            and self.facility in ("", letter.read(headers.FACILITY))
            and self.since <= letter.time
            and (not self.until or letter.time < self.until)
        )


class LetterBook:
    """Every dead letter still kept, with what became of it. Reads `dlq`, `audit` and the ledgers of the targets."""

    def __init__(self, office_: Office) -> None:
        self._office = office_
        self._targets = {target.name for target in office_.settings.targets}
        self._kafka = office_.settings.kafka
        self.books: dict[str, TargetBook] = {}
        # Letters before acts and ledgers: what is decided meanwhile is seen as decided.
        self.letters = [Letter(item) for item in read_to_end(self._kafka, catalog.DLQ) if isinstance(item, Record)]
        self.letters.sort(key=lambda letter: (letter.record.partition, letter.record.offset))
        self.versions = {letter.id: letter for letter in self.letters if letter.read(headers.EDITED_FROM)}
        self.letters = [letter for letter in self.letters if letter.id not in self.versions]
        told = {(letter.stage, letter.event_id) for letter in self.letters if not letter.is_raw}
        acts = office_.read_acts()
        self.last_act = acts[-1].number if acts else 0
        """Number of the last act that is in these states."""
        for target in sorted(self._targets):
            stopped = self.open_book(target).list_stopped()
            self.letters += [_stand_in(found) for found in stopped if (target, found.event_id) not in told]
        self._tell_states(acts)

    def choose(self, choice: Choice) -> list[Letter]:
        """The letters that are meant, in the order of the topic: that of the stage, per key."""
        found = [letter for letter in self.letters if choice.takes(letter)]
        missing = set(choice.ids) - {letter.id for letter in found}
        if missing:
            raise NothingFound("there is no such dead letter.", place=", ".join(sorted(missing)))
        return found

    def find_version(self, letter: Letter, proposal: int) -> Letter | None:
        """The edited version of a letter that a proposal is about."""
        return next(
            (
                version
                for version in self.versions.values()
                if version.read(headers.EDITED_FROM) == letter.id and version.read(office.PROPOSAL) == str(proposal)
            ),
            None,
        )

    def open_book(self, target: str) -> TargetBook:
        """The ledger of a target, read once."""
        if target not in self.books:
            self.books[target] = TargetBook(self._kafka, target)
        return self.books[target]

    def _tell_states(self, acts: Sequence[Act]) -> None:
        by_letter: dict[str, list[Act]] = {}
        released = {act.facts.get("proposal"): act for act in acts if act.act == office.APPROVE}
        for act in acts:
            for identifier in act.ids:
                by_letter.setdefault(identifier, []).append(act)
        latest = {(letter.stage, letter.event_id): letter.id for letter in self.letters if not letter.is_raw}
        # Offsets count per partition; an event keeps its key, and so its partition.
        for letter in self.letters:
            mine = by_letter.get(letter.id, [])
            waiting = [act for act in mine if act.act in office.PROPOSALS and str(act.number) not in released]
            if waiting:
                letter.status, letter.proposal = PROPOSED, waiting[-1].number
            if letter.is_raw:
                letter.status = _tell_raw_state(mine) or letter.status
            elif letter.stage in self._targets:
                is_latest = latest[letter.stage, letter.event_id] == letter.id
                letter.status = self._tell_target_state(letter, mine, is_latest=is_latest) or letter.status

    def _tell_target_state(self, letter: Letter, acts: Sequence[Act], *, is_latest: bool) -> str:
        found = self.open_book(letter.stage).find(letter.event_id)
        if found is None:
            return DONE
        if found.is_unknown:
            return UNKNOWN
        if not found.is_refused and not found.is_put_off:
            return UNDER_WAY
        if not is_latest:
            return SUPERSEDED
        decisions = [act for act in acts if act.act in (office.REDRIVE, office.APPROVE)]
        if decisions and found.entry.decision != name_decision(decisions[-1].number, letter.id):
            # Unless it is about an attempt that is over by now: that one is never taken.
            decided = self.open_book(letter.stage).list_decided(self._office.registry.find_schema)
            if letter.event_id in decided:
                return DECIDED
        # Open also after a decision that the deliverer refused; `show` tells its ruling.
        return PARKED if found.is_put_off else ""


def _stand_in(found: Open) -> Letter:
    """What a letter would say of an event that has none."""
    entry = found.entry
    reasons = (
        (headers.DEAD_LETTER_STAGE, found.target),
        (headers.DEAD_LETTER_KIND, entry.failure),
        (headers.DEAD_LETTER_CODE, entry.code),
        (headers.DEAD_LETTER_TIME, str(entry.since)),
    )
    kept = [*entry.headers, *((name, text.encode()) for name, text in reasons)]
    if find_header(kept, headers.EVENT_ID) is None:
        kept.append((headers.EVENT_ID, found.event_id.encode()))
    record = Record(entry.topic, found.partition, entry.offset, entry.key, entry.value, kept, entry.since)
    return Letter(record, name=f"{found.target}/{found.event_id}")


def name_decision(number: int, identifier: str) -> str:
    """Id of the decision that an act leads to."""
    return f"{number}/{identifier}"


def group(letters: Iterable[Letter]) -> list[dict[str, Any]]:
    """Counts by stage, code and field, the most frequent first."""
    counts = Counter((letter.stage, letter.code, letter.read(headers.DEAD_LETTER_FIELD)) for letter in letters)
    return [
        {"stage": stage, "code": code, "field": name, "letters": count}
        for (stage, code, name), count in sorted(counts.items(), key=lambda item: (-item[1], item[0]))
    ]


def write_time(milliseconds: int) -> str:
    """ISO 8601 in UTC, whole seconds."""
    return dt.datetime.fromtimestamp(milliseconds / 1000, dt.UTC).isoformat(timespec="seconds").replace("+00:00", "Z")


def _tell_raw_state(acts: Sequence[Act]) -> str:
    status = ""
    for act in acts:
        if act.act == office.REDRIVE:
            status = REDRIVEN
        elif act.act == office.APPROVE:
            status = EDITED if act.facts.get("of") == office.PROPOSE_EDIT else WAIVED
    return status

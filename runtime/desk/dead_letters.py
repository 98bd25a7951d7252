"""Acts on dead letters: show, redrive, edit, waive, approve.

A raw record is published again as a new hop with the origin of the first, and dedupe does the rest. An event at a
target is decided in its ledger: its deliverer releases what waits behind it, in order.
"""

from __future__ import annotations

import hashlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from runtime.desk import office
from runtime.desk.letters import (
    DECIDED,
    EDITED,
    OPEN,
    PARKED,
    PROPOSED,
    REDRIVEN,
    UNKNOWN,
    WAIVED,
    Choice,
    Letter,
    LetterBook,
    name_decision,
)
from runtime.desk.office import ActRefused, Office
from schemas.card_data import redact
from schemas.events import Action, MoneyEvent
from schemas.failure import Failure, FatalError
from schemas.formats import hl7
from schemas.money import read_minor
from schemas.wire import Decoder, Encoder
from sinks.desk import DecisionRefused, build_decision
from sources import catalog as gateways
from topics import catalog, headers
from topics.transaction import Output

if TYPE_CHECKING:
    from collections.abc import Callable, Sequence

    from schemas.money import Money
    from sinks.desk import Open
    from topics.audit import Act, Actor, AuditLog
    from topics.headers import Headers

TURNS_PER_SECOND = 4
"""A rate is kept in this many small transactions a second."""
_OPEN = frozenset({OPEN, PROPOSED})
_WAIVABLE = _OPEN | {PARKED}
_FIXED = (
    "event_id", "transaction_key", "tenant", "facility", "source", "account", "kind", "object_id", "root",
    "source_event_id", "origin",
)  # fmt: skip
"""What makes an event this event: an edit may not touch it."""


class EditRefused(FatalError):
    """An edited version cannot take the place of a dead letter."""

    code = "RS406"
    meaning = "The edited version does not fit the schema or the source, holds card data, or is another event."
    default_remedy = "Begin with what `remitstream dlq show ID --reveal` prints, and change as little as you can."


@dataclass(frozen=True, slots=True)
class Version:
    """What takes the place of a letter's record."""

    key: bytes
    value: bytes
    headers: Headers
    changed: tuple[str, ...]
    """Names of the fields that differ; one name, ``body``, where the source is not JSON."""


def redrive(
    office_: Office,
    choice: Choice,
    actor: Actor | None,
    *,
    per_second: int,
    again: bool = False,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Redrive what is open of a choice; without an actor only say what would happen.

    Letters keep their order per key. Named letters that cannot be redriven are an error; of a filter's letters they are
    counted and left. ``again`` takes raw letters that were redriven before, too.
    """
    if choice.is_empty:
        raise ActRefused("nothing was chosen.", place="dlq redrive", remedy="Name dead letters, or give a filter.")
    book = LetterBook(office_)
    wanted: list[Letter] = []
    left: dict[str, int] = {}
    for letter in book.choose(choice):
        taken = letter.status in _OPEN or (again and letter.is_raw and letter.status in (REDRIVEN, WAIVED, EDITED))
        if taken:
            wanted.append(letter)
        elif choice.ids:
            raise _refuse(letter)
        else:
            left[letter.status] = left.get(letter.status, 0) + 1
    events = [] if actor is not None else [_describe_redrive(book, letter) for letter in wanted]
    told: dict[str, Any] = {"letters": len(wanted), "left": left}
    if actor is None:
        return {"dry_run": True, **told, "would": events}
    size = max(1, per_second // TURNS_PER_SECOND)
    with office_.open_log(actor, seen=book.last_act) as log:
        for start in range(0, len(wanted), size):
            if start:
                sleep(size / per_second)
            turn = wanted[start : start + size]
            _redrive_turn(office_, book, log, turn)
    return {"dry_run": False, **told}


def _redrive_turn(office_: Office, book: LetterBook, log: AuditLog, letters: Sequence[Letter]) -> None:
    outputs = [
        _republish(letter)
        if letter.is_raw
        else _decide(office_, find_open(book, letter), Action.REDRIVE, name_decision(log.next_number, letter.id))
        for letter in letters
    ]
    stages = sorted({letter.stage for letter in letters})
    codes = sorted({letter.code for letter in letters})
    log.append(
        office.REDRIVE,
        [letter.id for letter in letters],
        {"stages": ",".join(stages), "codes": ",".join(codes)},
        outputs,
    )


def show(office_: Office, identifier: str, actor: Actor | None) -> dict[str, Any]:
    """One letter: codes, names of headers and fields. With an actor also its content, which is an audited act."""
    book = LetterBook(office_)
    (letter,) = book.choose(Choice(ids=(identifier,)))
    body = read_body(office_, letter)
    told = {
        **letter.describe(),
        "hop": letter.read(headers.HOP),
        "origin": letter.read(headers.ORIGIN),
        "headers": sorted({name for name, _ in letter.record.headers}),
        "bytes": len(letter.record.value or b""),
        "fields": _list_names(body),
    }
    if not letter.is_raw and letter.stage in {target.name for target in office_.settings.targets}:
        found = book.open_book(letter.stage).find(letter.event_id)
        if found is not None:
            told["at_target"] = {
                "state": found.entry.state,
                "attempts": found.entry.number,
                "behind": book.open_book(letter.stage).count_behind(found),
                "last_decision": found.entry.decision,
                "ruling": found.entry.ruling,
            }
    if actor is not None:
        with office_.open_log(actor) as log:
            log.append(office.REVEAL, [letter.id], {"stage": letter.stage, "code": letter.code})
        told["content"] = body if body is not None else (letter.record.value or b"").decode("utf-8", "replace")
    return told


def propose_edit(office_: Office, identifier: str, path: Path, actor: Actor) -> dict[str, Any]:
    """Keep an edited version beside the letter; it is used when a second person approves it."""
    letter = _find_open_letter(LetterBook(office_), identifier)
    version = build_version(office_, letter, path.read_bytes())
    with office_.open_log(actor) as log:
        number = log.next_number
        kept = [
            *version.headers,
            *[(name, text) for name, text in letter.record.headers if name in _REASONS],
            (headers.EDITED_FROM, letter.id.encode()),
            (office.PROPOSAL, str(number).encode()),
        ]
        facts = {
            "stage": letter.stage,
            "changed": ",".join(version.changed),
            "version": hashlib.sha256(version.value).hexdigest(),
        }
        output = Output(catalog.DLQ, version.key, version.value, kept, partition=letter.record.partition)
        log.append(office.PROPOSE_EDIT, [letter.id], facts, [output])
    return {"proposal": number, "letter": letter.id, "changed": list(version.changed), "needs": "a second person"}


def propose_waiver(office_: Office, identifiers: Sequence[str], actor: Actor) -> dict[str, Any]:
    """Ask that letters be waived; a second person approves."""
    book = LetterBook(office_)
    letters = [_find_open_letter(book, identifier, _WAIVABLE) for identifier in identifiers]
    facts = {"stages": ",".join(sorted({letter.stage for letter in letters}))}
    with office_.open_log(actor) as log:
        act = log.append(office.PROPOSE_WAIVER, [letter.id for letter in letters], facts)
    return {"proposal": act.number, "letters": [letter.id for letter in letters], "needs": "a second person"}


def approve(office_: Office, proposal: Act, actor: Actor) -> dict[str, Any]:
    """Do what was proposed about letters. The caller has checked that this is a second person."""
    book = LetterBook(office_)
    is_edit = proposal.act == office.PROPOSE_EDIT
    letters = [_find_open_letter(book, identifier, _OPEN if is_edit else _WAIVABLE) for identifier in proposal.ids]
    with office_.open_log(actor, seen=book.last_act) as log:
        outputs = []
        for letter in letters:
            decision_id = name_decision(log.next_number, letter.id)
            if is_edit:
                version = book.find_version(letter, proposal.number)
                digest = hashlib.sha256((version.record.value if version else None) or b"").hexdigest()
                if version is None or digest != proposal.facts.get("version"):
                    raise ActRefused("the edited version is not there any more.", place=letter.id)
                outputs.append(
                    _republish(version)
                    if letter.is_raw
                    else _decide(
                        office_, find_open(book, letter), Action.REDRIVE, decision_id, value=version.record.value
                    )
                )
            elif not letter.is_raw:
                outputs.append(_decide(office_, find_open(book, letter), Action.WAIVE, decision_id))
        facts = {"proposal": str(proposal.number), "of": proposal.act, "proposed_by": proposal.by}
        act = log.append(office.APPROVE, proposal.ids, facts, outputs)
    return {"act": act.number, "letters": list(proposal.ids), "done": proposal.act}


def find_open(book: LetterBook, letter: Letter) -> Open:
    """The event of a target's letter in its ledger."""
    found = book.open_book(letter.stage).find(letter.event_id)
    if found is None:
        raise ActRefused("the event is finished at this target.", place=f"{letter.stage} {letter.event_id}")
    return found


def read_body(office_: Office, letter: Letter) -> Any:
    """The content as JSON data; None when it is none (HL7, broken bytes)."""
    value = letter.record.value or b""
    try:
        if letter.is_raw:
            return msgspec.json.decode(value)
        decoder = Decoder("money_event", MoneyEvent, office_.registry.find_schema)
        return msgspec.to_builtins(decoder.decode(value))
    except (msgspec.MsgspecError, UnicodeDecodeError, Failure):
        return None


def build_version(office_: Office, letter: Letter, edited: bytes) -> Version:
    """Check an edited content and make it a record. Raises ``EditRefused``; its text holds names only."""
    if letter.is_raw:
        return _build_raw_version(office_, letter, edited)
    return _build_event_version(office_, letter, edited)


def _build_raw_version(office_: Office, letter: Letter, edited: bytes) -> Version:
    source, account = letter.read(headers.SOURCE), letter.read(headers.ACCOUNT)
    place = f"edit of {letter.id}"
    sensitive: frozenset[str] = frozenset()
    key = letter.record.key or b""
    is_hl7 = source == catalog.HL7
    try:
        if is_hl7:
            hl7.parse(edited)
        else:
            gateway = gateways.load(source, office_.settings.connectors.gateways)
            sensitive = gateway.sensitive_members
            events = gateway.split(edited)
            if len(events) != 1:
                raise EditRefused(f"it holds {len(events)} events, not one.", place=place)
            key = events[0].key.encode() if events[0].key else key
    except Failure as failure:
        raise EditRefused(f"it is no event of {source}: {failure}.", place=place) from None
    stored = redact(edited, json=not is_hl7, sensitive_members=sensitive)
    if stored.cards or stored.tracks or stored.security_codes:
        raise EditRefused("it holds card data.", place=place)
    digest = hashlib.sha256(stored.body).hexdigest()
    replaced = {
        headers.RECEIVED_HMAC: office_.key.hash_bytes(edited),
        headers.STORED_SHA256: digest,
        headers.VERDICT: "desk",
    }
    kept = [(name, text) for name, text in _strip(letter) if name not in replaced]
    new = [(name, text.encode()) for name, text in replaced.items()]
    before, after = read_body(office_, letter), _read_json(stored.body)
    del account
    return Version(key, stored.body, [*_begin_with_origin(letter), *new, *kept], _compare(before, after))


def _build_event_version(office_: Office, letter: Letter, edited: bytes) -> Version:
    place = f"edit of {letter.id}"
    before = read_body(office_, letter)
    after = _read_json(edited)
    if not isinstance(after, dict):
        raise EditRefused("it is no JSON object.", place=place)
    unknown = sorted(set(after) - {member.name for member in msgspec.structs.fields(MoneyEvent)})
    if unknown:
        raise EditRefused(f"{len(unknown)} of its fields are not in the schema.", place=place)
    try:
        event = msgspec.convert(after, MoneyEvent)
    except msgspec.ValidationError as error:
        # The library's text names the place and the types, after the last dash; it never quotes the value.
        raise EditRefused(
            f"it does not fit the schema ({str(error).rpartition('`$')[2].rstrip('`')}).", place=place
        ) from None
    if not isinstance(before, dict):
        raise EditRefused("the original cannot be read, so it is not known which event it is.", place=place)
    changed = _compare(before, msgspec.to_builtins(event))
    touched = [name for name in changed if name in _FIXED]
    if touched:
        raise EditRefused(f"it changes {', '.join(touched)}: that is another event.", place=place)
    stored = redact(edited, json=True)
    if stored.cards or stored.tracks or stored.security_codes:
        raise EditRefused("it holds card data.", place=place)
    if not _is_money(event.money):
        raise EditRefused(
            "its amount is none: whole minor units of a currency, with that currency's exponent.", place=place
        )
    # Canonical topics share one schema; the letter's headers do not name its topic.
    encoder = Encoder("money_event", office_.find_schema_id(catalog.PAYMENTS, "money_event"))
    try:
        value = encoder.encode(event)
    except (ValueError, TypeError, AttributeError):
        raise EditRefused("a value does not fit the schema.", place=place) from None
    return Version(letter.record.key or b"", value, _strip(letter), changed)


_REASONS = frozenset(
    {
        headers.DEAD_LETTER_STAGE,
        headers.DEAD_LETTER_KIND,
        headers.DEAD_LETTER_CODE,
        headers.DEAD_LETTER_FIELD,
        headers.DEAD_LETTER_TIME,
        headers.HOP,
    }
)
_OURS = _REASONS | {headers.ORIGIN, headers.EDITED_FROM, office.PROPOSAL}


def _republish(letter: Letter) -> Output:
    """The raw record again: same key and bytes, with the origin of the first."""
    source = letter.read(headers.SOURCE)
    if not source:
        raise ActRefused("it does not say which source it is of.", place=letter.id)
    return Output(
        catalog.name_raw(source),
        letter.record.key or b"",
        letter.record.value,
        [*_begin_with_origin(letter), *_strip(letter)],
    )


def _begin_with_origin(letter: Letter) -> Headers:
    # First, because a header about a review must stay the last one.
    return [(headers.ORIGIN, letter.read(headers.ORIGIN).encode())]


def _strip(letter: Letter) -> Headers:
    return [(name, text) for name, text in letter.record.headers if name not in _OURS]


def _decide(office_: Office, found: Open, action: Action, decision_id: str, *, value: bytes | None = None) -> Output:
    found.check(action)
    schema_id = office_.find_schema_id(catalog.name_decisions(found.target), "decision")
    return build_decision(found, action, decision_id, schema_id, value=value)


def _find_open_letter(book: LetterBook, identifier: str, allowed: frozenset[str] = _OPEN) -> Letter:
    (letter,) = book.choose(Choice(ids=(identifier,)))
    if letter.status not in allowed:
        raise _refuse(letter)
    return letter


def _refuse(letter: Letter) -> FatalError:
    if letter.status == UNKNOWN:
        return DecisionRefused(
            "its outcome at the target is unknown: it may be there.",
            place=f"{letter.stage} {letter.event_id}",
            remedy="Look it up at the target, then use `remitstream unknown decide`.",
        )
    if letter.status == DECIDED:
        return ActRefused("a decision about it is on its way to the deliverer.", place=letter.id)
    remedy = "To publish it once more all the same, add `--again`." if letter.is_raw else ""
    return ActRefused(f"it is {letter.status}.", place=letter.id, remedy=remedy)


def _describe_redrive(book: LetterBook, letter: Letter) -> dict[str, Any]:
    told: dict[str, Any] = {"id": letter.id, "stage": letter.stage, "code": letter.code}
    if letter.is_raw:
        return told | {"to": catalog.name_raw(letter.read(headers.SOURCE)), "origin": letter.read(headers.ORIGIN)}
    found = find_open(book, letter)
    behind = book.open_book(letter.stage).count_behind(found)
    return told | {"to": letter.stage, "event_id": letter.event_id, "then_behind_it": behind}


def _read_json(text: bytes) -> Any:
    try:
        return msgspec.json.decode(text)
    except msgspec.DecodeError:
        return None


def _is_money(money: Money) -> bool:
    """Whether an amount is one: typed by hand, 500 yen may have become 5.00."""
    try:
        return read_minor(money.minor, money.currency) == money
    except Failure:
        return False


def _compare(before: Any, after: Any) -> tuple[str, ...]:
    """Names of the fields of the first level that differ."""
    if not isinstance(before, dict) or not isinstance(after, dict):
        return () if before == after and before is not None else ("body",)
    return tuple(sorted(str(name) for name in before.keys() | after.keys() if before.get(name) != after.get(name)))


def _list_names(body: Any, prefix: str = "") -> list[str]:
    """Names of fields down to the third level; of a list, those of its members together."""
    if isinstance(body, list):
        return sorted({name for item in body for name in _list_names(item, f"{prefix}[]")})
    if not isinstance(body, dict) or prefix.count(".") > 2:
        return []
    names = []
    for name, value in body.items():
        path = f"{prefix}.{name}" if prefix else str(name)
        names += [path, *_list_names(value, path)]
    return sorted(set(names))

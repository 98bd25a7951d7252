"""The short way from a raw record to its canonical event, for the ordinary record.

The body is read by the compiled mapping (``schemas.mapping_compiler``); all that does not depend on the record was
worked out at load, per account and rule. ``Shortcut.take`` gives exactly what the long way in ``streams.normalise``
would give, or None: then the record is not ordinary, and the long way decides. A test compares both.
"""

from __future__ import annotations

from operator import itemgetter
from typing import TYPE_CHECKING, Any, Final

from schemas.events import ROOT_KINDS, MoneyEvent, Reference
from schemas.keys import build_event_id, build_transaction_key
from schemas.mapping_compiler import NotOrdinary, as_text, compile_mapping
from schemas.mapping_source import FACTS
from schemas.money import Money
from streams.normalised import GUARANTOR_TYPE, VISIT_TYPE, Ignored, Normalised
from topics import headers
from topics.catalog import PAYMENTS

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable

    from schemas.mapping import Skipped, SourceMapping
    from schemas.mapping_reading import Rule
    from streams.normalised import Participant
    from topics.headers import RawRecord

    Attach = Callable[[Any, dict[str, str]], dict[str, str] | None]

_LONGEST_TIME: Final = 18  # digits of milliseconds; a longer header is no time of ours


class _People:
    """Where an account's metadata names people, with the spellings of its facility's authorities."""

    __slots__ = ("authorities", "authority_key", "default", "guarantor_authority_key", "rule", "visit_authority_key")

    def __init__(self, participant: Participant) -> None:
        facility, self.rule = participant.facility, participant.account.patient
        self.default = facility.default_authority
        self.authorities: dict[str, str] = {}
        for authority in facility.authorities:  # the first one that has a spelling wins
            for spelling in (authority.name, *authority.aliases):
                self.authorities.setdefault(spelling, authority.name)
        key = self.authority_key = self.rule.authority_key
        # Visit and account numbers have an authority of their own: `visit_assigning_authority`.
        self.visit_authority_key = f"{self.rule.visit_key}_{key}" if key else None
        self.guarantor_authority_key = f"{self.rule.guarantor_key}_{key}" if key else None

    def find_authority(self, value: Any) -> str:
        """The authority that a member names, else the facility's. Raises ``NotOrdinary`` for an unknown one."""
        text = "" if value is None else _read_text(value)
        if not text:
            return self.default
        authority = self.authorities.get(text)
        if authority is None:
            raise NotOrdinary
        return authority


class _Plan:
    """What is known of an event of one account and rule before its record comes."""

    __slots__ = ("attach", "begin", "is_root", "key", "needs_patient", "topic")

    def __init__(self, rule: Rule, key: str, template: MoneyEvent, attach: Attach | None) -> None:
        self.topic = rule.topic
        self.is_root = rule.kind in ROOT_KINDS
        self.needs_patient = rule.topic == PAYMENTS
        self.key = key
        """Transaction key up to the object id."""
        # Twenty keywords cost a microsecond, a copy a tenth.
        self.begin: Callable[[], MoneyEvent] = template.__copy__  # type: ignore[attr-defined]
        """A new event that holds what is known."""
        self.attach = attach
        """Adds the facility's own attributes."""


class _Sender:
    """An account as the headers of its records name it."""

    __slots__ = ("account", "people", "plans", "root")

    def __init__(self, participant: Participant, plans: list[_Plan]) -> None:
        self.account = participant.account.name
        self.people = _People(participant)
        self.plans = plans
        """By the rule's place in the compiled mapping."""
        self.root = f"{self.account}/"


class Shortcut:
    """The compiled way of one source."""

    def __init__(self, mapping: SourceMapping, participants: Iterable[Participant], tenant: str, version: str) -> None:
        """Compile. Raises ``MappingNotCompiled`` with the reason."""
        self._source = mapping.source
        participants = list(participants)
        overlays = {(part.facility.id, True): part.attributes for part in participants}
        overlays |= {(part.facility.id, False): part.public for part in participants}
        program = compile_mapping(mapping, {key: attributes for key, attributes in overlays.items() if attributes})
        self._read = program.read
        places = [FACTS.index(name) for name in mapping.facts]
        self._pick: Callable[[tuple[str, ...]], tuple[str, ...]] | None = None
        if mapping.facts != FACTS:
            self._pick = itemgetter(*places)  # at least four of them, so always a tuple
        self._senders: dict[tuple[bytes | None, bytes | None, bytes | None], _Sender] = {}
        for participant in participants:
            plans = []
            for rule in program.rules:
                account, facility = participant.account.name, participant.facility.id
                template = _build_template(mapping.source, participant, rule, tenant, version)
                key = build_transaction_key(mapping.source, account, rule.kind, "")
                attach = program.overlays.get((facility, rule.topic == PAYMENTS), {}).get(rule.kind)
                plans.append(_Plan(rule, key, template, attach))
            named = (mapping.source.encode(), participant.account.name.encode(), participant.facility.id.encode())
            self._senders[named] = _Sender(participant, plans)

    def take(self, record: RawRecord) -> Normalised | Ignored | None:
        """The outcome of an ordinary record, else None."""
        named = dict(record.headers)  # the last of a name wins, as in `find_header`
        get = named.get
        sender = self._senders.get((get(headers.SOURCE), get(headers.ACCOUNT), get(headers.FACILITY)))
        if sender is None:
            return None
        found = self._read(record.value)
        if found.__class__ is not tuple:
            return None if found is None else self._ignore(found, sender.account)  # type: ignore[arg-type]
        (
            rule,
            event_type,
            source_event_id,
            status,
            money,
            object_id,
            root,
            occurred_at,
            token_reference,
            attributes,
            focus,
            metadata,
        ) = found
        plan = sender.plans[rule]
        received = get(headers.INGEST_TIME)
        if received is None or not received.isdigit() or len(received) > _LONGEST_TIME:
            return None
        if plan.attach is not None:
            attached = plan.attach(focus, attributes)
            if attached is None:
                return None
            attributes = attached
        event = plan.begin()
        event.transaction_key = key = plan.key + object_id
        event.event_id = build_event_id(key)
        event.status = status
        event.money = money
        event.occurred_at = occurred_at
        event.received_at = int(received)
        event.object_id = object_id
        event.root = root = sender.root + root
        event.source_event_id = source_event_id
        event.token_reference = token_reference
        event.attributes = attributes
        event.origin = record.origin if headers.ORIGIN in named else record.hop
        if metadata and plan.needs_patient:
            try:
                _name_people(event, metadata, sender.people)
            except NotOrdinary:
                return None
        facts: tuple[str, ...] = (event.kind, object_id, root, str(money.minor), money.currency, status)
        if self._pick is not None:
            facts = self._pick(facts)
        return Normalised(
            plan.topic, event, facts, plan.is_root, plan.needs_patient, event.patient is not None, event_type
        )

    def _ignore(self, found: Skipped, account: str) -> Ignored:
        linked = ""
        if found.object_id:
            linked = build_event_id(build_transaction_key(self._source, account, found.kind, found.object_id))
        return Ignored(found.reason.value, found.event_type, linked)


def _build_template(source: str, participant: Participant, rule: Rule, tenant: str, version: str) -> MoneyEvent:
    """An event of an account and rule; what its record says is still empty."""
    return MoneyEvent(
        event_id="",
        transaction_key="",
        tenant=tenant,
        facility=participant.facility.id,
        source=source,
        account=participant.account.name,
        kind=rule.kind.value,
        status="",
        money=Money(0, "", 0),
        occurred_at=0,
        received_at=0,
        object_id="",
        root="",
        source_event_id="",
        mapping_version=version,
        origin="",
    )


def _name_people(event: MoneyEvent, metadata: dict[Any, Any], people: _People) -> None:
    rule, get = people.rule, metadata.get  # a key that the rule leaves out is None, which no JSON object has
    value = get(rule.metadata_key)
    if value is not None and (text := _read_text(value)):
        key = people.authority_key
        authority = people.find_authority(metadata[key]) if key in metadata else people.default
        event.patient = Reference(authority, rule.id_type, text)
    value = get(rule.visit_key)
    if value is not None and (text := _read_text(value)):
        key = people.visit_authority_key
        authority = people.find_authority(metadata[key]) if key in metadata else people.default
        event.visit = Reference(authority, VISIT_TYPE, text)
    value = get(rule.guarantor_key)
    if value is not None and (text := _read_text(value)):
        key = people.guarantor_authority_key
        authority = people.find_authority(metadata[key]) if key in metadata else people.default
        event.guarantor_account = Reference(authority, GUARANTOR_TYPE, text)
    value = get(rule.invoice_key)
    if value is not None:
        event.invoice = _read_text(value) or None
    value = get(rule.claim_key)
    if value is not None:
        event.claim = _read_text(value) or None


def _read_text(value: Any) -> str:
    """Text without the white space around it."""
    text: str = value if value.__class__ is str else as_text(value)
    if "redacted]" in text:
        raise NotOrdinary
    return text.strip()

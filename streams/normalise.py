"""Raw gateway records to canonical money events, as ``streams/mappings/<source>.yaml`` declares.

The mapping says what a body means; this module adds who it is about: tenant, facility, account and patient. Pure: no
I/O after ``load``, no clock; the same record always gives the same event.

There are two ways to the same answer. Nearly every record takes the short one, which is compiled
(``streams.shortcut``). Whatever is not ordinary goes the long way, here; it alone decides failures.
"""

from __future__ import annotations

import hashlib
from importlib.resources import files
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final

from schemas.events import ROOT_KINDS, MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.keys import build_event_id, build_transaction_key
from schemas.mapping import Attribute, MappingError, Overlay, Problem, Reading, list_paths, load_overlay, load_source
from schemas.mapping_compiler import MappingNotCompiled
from schemas.mapping_reading import read_attributes, read_optional_text
from streams.normalised import GUARANTOR_TYPE, VISIT_TYPE, Ignored, Normalised, Participant
from streams.shortcut import Shortcut
from telemetry.log import get_log
from topics import headers
from topics.catalog import PAYMENTS

if TYPE_CHECKING:
    from collections.abc import Iterator

    from schemas.mapping import Skipped, SourceMapping
    from schemas.tenancy import Account, Facility, PatientRule, Tenancy
    from topics.headers import RawRecord

MAPPINGS: Final = Path(str(files("streams"))) / "mappings"
"""Folder of the shipped source mappings."""

__all__ = ["MAPPINGS", "Ignored", "Normalised", "Normaliser"]


class Normaliser:
    """Turns raw records of one source into canonical events. Build it with ``load``."""

    def __init__(
        self, mapping: SourceMapping, tenancy: Tenancy, participants: dict[str, Participant], version: str
    ) -> None:
        self.source = mapping.source
        self.version = version
        """Source, declared version and 12 hex digits over the mapping and all overlays: ``stripe/1/0a1b...``."""
        self._mapping = mapping
        self._tenant = tenancy.tenant
        self._participants = participants
        self.not_compiled = ""
        """Why every record goes the long way; empty for a mapping that could be compiled."""
        self.shortcut: Shortcut | None = None
        try:
            self.shortcut = Shortcut(mapping, participants.values(), tenancy.tenant, version)
        except MappingNotCompiled as reason:
            self.not_compiled = str(reason)
            get_log("normalise").warning("mapping_not_compiled", source=self.source, reason=self.not_compiled)

    @classmethod
    def load(
        cls, source: str, tenancy: Tenancy, folder: Path | None = None, *, allow_phi_attributes: bool = False
    ) -> Normaliser:
        """Read ``<folder>/<source>.yaml`` and the overlays of the facilities that have accounts there.

        Raises ``MappingError`` when a file is wrong, an overlay is of another facility, an attribute is marked ``phi``
        without ``allow_phi_attributes``, or one reads a patient's identifier without being marked.
        """
        path = (folder or MAPPINGS) / f"{source}.yaml"
        mapping = load_source(path)
        problems: list[Problem] = []
        if mapping.source != source:
            detail = f"The file is of source `{mapping.source}`."
            problems.append(Problem(str(path), 1, "source", detail, f"Name the file `{mapping.source}.yaml`."))
        accounts = [account for account in tenancy.accounts if account.source == source]
        overlays: dict[str, Overlay] = {}
        for facility_id in sorted({account.facility for account in accounts}):
            name = tenancy.get_facility(facility_id).mapping_overlay
            if name is None:
                continue
            try:
                overlays[facility_id] = _load_overlay(Path(name), facility_id)
            except MappingError as error:
                problems.extend(error.problems)
        shipped = [(str(path), part) for rules in mapping.rules.values() for rule in rules for part in rule.attributes]
        participants: dict[str, Participant] = {}
        for account in accounts:
            facility = tenancy.get_facility(account.facility)
            own = overlays[facility.id].attributes.get(source, ()) if facility.id in overlays else ()
            public = tuple(part for part in own if not part.phi)
            participants[account.name] = Participant(account, facility, own, public)
            placed = shipped + [(str(facility.mapping_overlay), part) for part in own]
            problems.extend(_find_phi(mapping, account, placed, allowed=allow_phi_attributes))
        if problems:
            raise MappingError(list(dict.fromkeys(problems)))
        digests = [mapping.digest, *(f"{name}={overlays[name].digest}" for name in sorted(overlays))]
        short = hashlib.sha256("\n".join(digests).encode()).hexdigest()[:12]
        return cls(mapping, tenancy, participants, f"{source}/{mapping.version}/{short}")

    @property
    def phi_attributes(self) -> frozenset[str]:
        """Names of attributes marked as PHI; give them to ``FieldMapping.load``."""
        shipped = (part for rules in self._mapping.rules.values() for rule in rules for part in rule.attributes)
        own = (part for participant in self._participants.values() for part in participant.attributes)
        return frozenset(part.name for parts in (shipped, own) for part in parts if part.phi)

    def normalise(self, record: RawRecord) -> Normalised | Ignored:
        """The canonical event of a raw record, or why it has none.

        Raises ``Failure`` for a dead letter: HEADER_MISSING, HEADER_INVALID, SOURCE_MISMATCH, ACCOUNT_UNKNOWN,
        FACILITY_MISMATCH, AUTHORITY_UNKNOWN, and all that ``SourceMapping.read`` raises.
        """
        found = None if self.shortcut is None else self.shortcut.take(record)
        return self.interpret(record) if found is None else found

    def interpret(self, record: RawRecord) -> Normalised | Ignored:
        """What ``normalise`` gives, always by the long way."""
        participant = self._find_participant(record)
        account = participant.account
        found = self._mapping.read(record.value)
        if not isinstance(found, Reading):
            return self._ignore(found, account)
        key = build_transaction_key(self.source, account.name, found.kind, found.object_id)
        event = MoneyEvent(
            event_id=build_event_id(key),
            transaction_key=key,
            tenant=self._tenant,
            facility=participant.facility.id,
            source=self.source,
            account=account.name,
            kind=found.kind.value,
            status=found.status,
            money=found.money,
            occurred_at=found.occurred_at,
            received_at=_read_ingest_time(record),
            object_id=found.object_id,
            root=f"{account.name}/{found.root}",
            source_event_id=found.source_event_id,
            token_reference=found.token_reference,
            attributes=found.attributes,
            mapping_version=self.version,
            origin=record.origin,
        )
        needs_patient = found.topic == PAYMENTS
        # A settlement is about no patient, and its topic holds no PHI whatever its metadata says.
        own = participant.attributes if needs_patient else participant.public
        if own:
            event.attributes = found.attributes | read_attributes(own, found.object, found.kind)
        if needs_patient:
            _name_people(event, found.metadata, account.patient, participant.facility)
        return Normalised(
            topic=found.topic,
            event=event,
            facts=self._list_facts(event),
            is_root=found.kind in ROOT_KINDS,
            needs_patient=needs_patient,
            patient_named=event.patient is not None,
            event_type=found.event_type,
        )

    def _find_participant(self, record: RawRecord) -> Participant:
        if record.read_header(headers.SOURCE) != self.source:
            raise Failure(FailureKind.INVALID, "SOURCE_MISMATCH", headers.SOURCE)
        participant = self._participants.get(record.read_header(headers.ACCOUNT))
        if participant is None:
            raise Failure(FailureKind.INVALID, "ACCOUNT_UNKNOWN", headers.ACCOUNT)
        if record.read_header(headers.FACILITY) != participant.facility.id:
            # The account moved to another facility after this was received: a person decides whose money it is.
            raise Failure(FailureKind.INVALID, "FACILITY_MISMATCH", headers.FACILITY)
        return participant

    def _ignore(self, found: Skipped, account: Account) -> Ignored:
        linked = ""
        if found.object_id:
            linked = build_event_id(build_transaction_key(self.source, account.name, found.kind, found.object_id))
        return Ignored(found.reason.value, found.event_type, linked)

    def _list_facts(self, event: MoneyEvent) -> tuple[str, ...]:
        values = {
            "kind": event.kind,
            "object_id": event.object_id,
            "root": event.root,
            "minor": str(event.money.minor),
            "currency": event.money.currency,
            "status": event.status,
        }
        return tuple(values[name] for name in self._mapping.facts)


def _read_ingest_time(record: RawRecord) -> int:
    text = record.read_header(headers.INGEST_TIME)
    if not (text.isascii() and text.isdigit()):
        raise Failure(FailureKind.INVALID, "HEADER_INVALID", headers.INGEST_TIME)
    return int(text)


def _name_people(event: MoneyEvent, metadata: dict[str, Any], rule: PatientRule, facility: Facility) -> None:
    value = _read_member(metadata, rule.metadata_key, "patient")
    if value is not None:
        event.patient = Reference(_find_authority(metadata, rule.authority_key, facility), rule.id_type, value)
    visit = _read_member(metadata, rule.visit_key, "visit")
    if visit is not None:
        event.visit = Reference(_find_own_authority(metadata, rule.visit_key, rule, facility), VISIT_TYPE, visit)
    guarantor = _read_member(metadata, rule.guarantor_key, "guarantor_account")
    if guarantor is not None:
        authority = _find_own_authority(metadata, rule.guarantor_key, rule, facility)
        event.guarantor_account = Reference(authority, GUARANTOR_TYPE, guarantor)
    event.invoice = _read_member(metadata, rule.invoice_key, "invoice")
    event.claim = _read_member(metadata, rule.claim_key, "claim")


def _find_own_authority(metadata: dict[str, Any], key: str | None, rule: PatientRule, facility: Facility) -> str:
    # Visit and account numbers have an authority of their own: `visit_assigning_authority`, else the facility's.
    return _find_authority(metadata, f"{key}_{rule.authority_key}" if rule.authority_key else None, facility)


def _find_authority(metadata: dict[str, Any], key: str | None, facility: Facility) -> str:
    authority = facility.find_authority(_read_member(metadata, key, "assigning_authority") or "")
    if authority is None:
        raise Failure(FailureKind.INVALID, "AUTHORITY_UNKNOWN", "assigning_authority")
    return authority


def _read_member(metadata: dict[str, Any], key: str | None, field: str) -> str | None:
    text = None if key is None else read_optional_text(metadata.get(key), field)
    return None if text is None else text.strip()


def _load_overlay(path: Path, facility_id: str) -> Overlay:
    overlay = load_overlay(path)
    if overlay.facility != facility_id:
        detail = f"The overlay is of facility `{overlay.facility}`, not `{facility_id}`."
        raise MappingError([Problem(str(path), 1, "facility", detail, "Correct `facility` or `mapping_overlay`.")])
    return overlay


def _find_phi(
    mapping: SourceMapping, account: Account, placed: list[tuple[str, Attribute]], *, allowed: bool
) -> Iterator[Problem]:
    """Problems of attributes that carry, or would silently carry, an identifier of a patient."""
    rule = account.patient
    base = None if mapping.metadata is None else mapping.metadata.path
    keys = (rule.metadata_key, rule.visit_key, rule.guarantor_key, rule.claim_key)
    identifying = [] if base is None else [(*base, key) for key in keys if key is not None]
    for file, part in placed:
        field = f"attributes.{part.name}"
        if part.phi and not allowed:
            remedy = "Remove the attribute, or allow PHI attributes for this deployment."
            yield Problem(file, 1, field, "The attribute is marked phi, which is not allowed here.", remedy)
        # A path reads an identifier when it ends at it, inside it, or at something that holds it.
        reads = any(
            path[: len(target)] == target or target[: len(path)] == path
            for path in list_paths(part.expression.parsed)
            for target in identifying
        )
        if reads and not part.phi:
            detail = f"It reads metadata that names the patient of account `{account.name}`."
            yield Problem(file, 1, field, detail, "Read another member, or mark it `sensitivity: phi`.")

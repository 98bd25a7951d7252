"""An HL7 v2 admission message becomes the full state of the patient identifiers it names.

Only identifiers leave this module: names, birth dates and addresses of a message are never read. An identifier counts
with its assigning authority; one whose authority the facility does not know is skipped, and a message that then names
no medical record number is refused rather than guessed at.

What the fields mean: HL7 2.5.1 chapter 3 (PID-3, PID-18, PV1-19, MRG-1 and event A40).
"""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, NoReturn
from zoneinfo import ZoneInfo

from schemas import card_data
from schemas.events import PatientRecord, Reference
from schemas.failure import Failure, FailureKind
from schemas.formats import hl7
from topics import headers

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from schemas.tenancy import Facility, Tenancy
    from topics.headers import RawRecord

MAPPING_VERSION = "hl7-admissions/1"
"""Version of the rules in this file; raised when the same bytes would give other records."""

EVENTS = frozenset({"A01", "A04", "A08", "A28", "A31", "A40"})
"""ADT trigger events that change what we know of identifiers; all others are ignored."""

MERGE = "A40"

NOT_OF_INTEREST = "EVENT_NOT_OF_INTEREST"

MEDICAL_RECORD = "MR"
ACCOUNT = "AN"
VISIT = "VN"

_NOT_OF_A_FACILITY = frozenset({"SS", "DL", "PPN", "TAX", "BC"})
"""Table 0203: social security, driver's licence, passport, tax and bank card numbers name a person beyond any facility;
no payment is matched by them and they are not kept."""

_REDACTIONS = tuple(text.decode() for text in (card_data.CARD_TEXT, card_data.TRACK_TEXT, card_data.SECURITY_CODE_TEXT))


@dataclass(frozen=True, slots=True)
class Admission:
    """What one message says of patient identifiers."""

    records: tuple[PatientRecord, ...]
    """In the order they must be written; a later one of the same identifier replaces the earlier."""
    control_id: str
    """MSH-10."""
    message_type: str
    """For example ``ADT^A01``."""
    facts: tuple[str, ...]
    """For the digest: message type, control id, sha256 of the stored bytes."""


@dataclass(frozen=True, slots=True)
class Ignored:
    """A message that says nothing about identifiers."""

    reason: str


@dataclass(frozen=True, slots=True)
class _Group:
    """One PID with the segments that belong to it."""

    pid: hl7.Segment
    merges: tuple[hl7.Segment, ...]
    visits: tuple[hl7.Segment, ...]


def read_admission(record: RawRecord, tenancy: Tenancy) -> Admission | Ignored:
    """Read one raw record of ``raw.hl7``.

    A40 gives the survivors as active and each identifier of MRG-1 as merged into the survivor of the same type and
    authority; every other event gives what PID-3, PID-18 and PV1-19 name as active, which also ends an earlier merge.

    Raises ``Failure`` INVALID for a message that cannot be read or leaves in doubt whom it means.
    """
    message = hl7.parse(record.value)
    header = message.header
    trigger = header.trigger or _read_trigger(message)
    if header.message_code != "ADT" or trigger not in EVENTS:
        return Ignored(NOT_OF_INTEREST)
    control_id = header.control_id
    if not control_id.strip():
        _refuse("CONTROL_ID_MISSING", "MSH-10")
    _check_unredacted(control_id, "MSH-10")
    reader = _Reader(record, tenancy, message, f"ADT^{trigger}", control_id)
    groups = list(_group(message))
    if not groups:
        _refuse("PATIENT_ID_MISSING", "PID-3")
    if trigger == MERGE:
        records = [patient for group in groups for patient in reader.read_merge(group)]
    elif len(groups) > 1:
        _refuse("SEGMENT_REPEATED", "PID")
    else:
        records = reader.read_patient(groups[0])
    digest = hashlib.sha256(record.value).hexdigest()
    return Admission(tuple(records), control_id, reader.message_type, (reader.message_type, control_id, digest))


class _Reader:
    """Reads the groups of one message."""

    def __init__(
        self, record: RawRecord, tenancy: Tenancy, message: hl7.Message, message_type: str, control_id: str
    ) -> None:
        self.message_type = message_type
        self._tenant = tenancy.tenant
        self._facility = _find_facility(record, tenancy)
        self._feed = record.read_header(headers.ACCOUNT)
        self._received_at = _read_ingest_time(record)
        self._occurred_at = _read_time(message, self._facility) or self._received_at
        self._control_id = control_id
        self._origin = record.origin

    def read_patient(self, group: _Group) -> list[PatientRecord]:
        """Everything the group names, as active."""
        named = self._read_field(group.pid, 3, "PID-3")
        mrns = [reference for reference in named if reference.id_type == MEDICAL_RECORD]
        if not mrns:
            _refuse("MRN_MISSING", "PID-3.5")
        # The position says what these two are, whatever type the sender wrote into CX.5.
        accounts = self._resolve(hl7.read_identifiers(group.pid, 18), "PID-18", ACCOUNT)
        visits = [
            reference
            for segment in group.visits
            for reference in self._resolve(hl7.read_identifiers(segment, 19), "PV1-19", VISIT)
        ]
        owner = self._find_owner(mrns)
        return [
            self._build(reference, mrn=reference if reference.id_type == MEDICAL_RECORD else owner)
            for reference in dict.fromkeys([*named, *accounts, *visits])
        ]

    def read_merge(self, group: _Group) -> list[PatientRecord]:
        """The survivor's identifiers as active, then each retired one as merged."""
        if not group.merges:
            _refuse("MERGE_SOURCE_MISSING", "MRG-1")
        records = self.read_patient(group)
        survivors = self._read_field(group.pid, 3, "PID-3")
        owner = self._find_owner([reference for reference in survivors if reference.id_type == MEDICAL_RECORD])
        for segment in group.merges:
            for retired in self._read_field(segment, 1, "MRG-1"):
                if retired in survivors:
                    _refuse("MERGE_INTO_ITSELF", "MRG-1")
                same = [
                    reference
                    for reference in survivors
                    if (reference.authority, reference.id_type) == (retired.authority, retired.id_type)
                ]
                if not same:
                    _refuse("MERGE_WITHOUT_SURVIVOR", "MRG-1")
                if len(same) > 1:
                    _refuse("MERGE_AMBIGUOUS", "PID-3")
                mrn = retired if retired.id_type == MEDICAL_RECORD else owner
                records.append(self._build(retired, mrn=mrn, merged_into=same[0]))
        return records

    def _read_field(self, segment: hl7.Segment, field: int, place: str) -> list[Reference]:
        """The distinct identifiers of PID-3 or MRG-1 with a known authority; at least one."""
        given = [
            identifier
            for identifier in hl7.read_identifiers(segment, field)
            if identifier.id_type.upper() not in _NOT_OF_A_FACILITY
        ]
        if not given:
            _refuse("PATIENT_ID_MISSING" if segment.name == "PID" else "MERGE_SOURCE_MISSING", place)
        if any(identifier.id_type.upper() == MEDICAL_RECORD for identifier in given):
            # Beside a stated record number, one without a type may be anything.
            given = [identifier for identifier in given if identifier.id_type]
        resolved = self._resolve(given, place)
        is_medical_record = any(reference.id_type == MEDICAL_RECORD for reference in resolved)
        if not resolved or (segment.name == "PID" and not is_medical_record and len(resolved) < len(given)):
            _refuse("AUTHORITY_UNKNOWN", f"{place}.4")
        return list(dict.fromkeys(resolved))

    def _resolve(self, given: Sequence[hl7.Identifier], place: str, id_type: str = "") -> list[Reference]:
        """References of those with a known authority. ``id_type`` overrides CX.5; no type at all means MR."""
        resolved = []
        for identifier in given:
            authority = find_authority(self._facility, identifier)
            if authority is not None:
                _check_unredacted(identifier.value, place)
                kind = id_type or identifier.id_type.upper() or MEDICAL_RECORD
                resolved.append(Reference(authority, kind, identifier.value))
        return resolved

    def _find_owner(self, mrns: list[Reference]) -> Reference | None:
        """The record number that accounts and visits of the message belong to; None when it names several."""
        if len(mrns) > 1:
            mrns = [mrn for mrn in mrns if mrn.authority == self._facility.default_authority]
        return mrns[0] if len(mrns) == 1 else None

    def _build(
        self, identifier: Reference, *, mrn: Reference | None, merged_into: Reference | None = None
    ) -> PatientRecord:
        return PatientRecord(
            tenant=self._tenant,
            facility=self._facility.id,
            identifier=identifier,
            status="active" if merged_into is None else "merged",
            mrn=mrn,
            merged_into=merged_into,
            feed=self._feed,
            source_event_id=self._control_id,
            message_type=self.message_type,
            occurred_at=self._occurred_at,
            received_at=self._received_at,
            mapping_version=MAPPING_VERSION,
            origin=self._origin,
        )


def find_authority(facility: Facility, identifier: hl7.Identifier) -> str | None:
    """Canonical name of the authority in CX.4, or None when the facility does not know it.

    Namespace, universal id, and the latter as a URN each count as a spelling. When two of them are known but mean
    different authorities the sender contradicts itself: None. CX.4 empty means the facility's default.
    """
    universal = identifier.universal_id
    spellings = [identifier.namespace, universal]
    if universal and identifier.universal_id_type.upper() in {"ISO", "UUID"}:
        scheme = "oid" if identifier.universal_id_type.upper() == "ISO" else "uuid"
        spellings.append(f"urn:{scheme}:{universal}")
    given = [spelling for spelling in spellings if spelling]
    if not given:
        return facility.default_authority
    known = {name for spelling in given if (name := facility.find_authority(spelling)) is not None}
    return known.pop() if len(known) == 1 else None


def _group(message: hl7.Message) -> Iterator[_Group]:
    """The PID groups of a message: A40 may repeat PID [PD1] MRG [PV1], other events have one."""
    pid: hl7.Segment | None = None
    merges: list[hl7.Segment] = []
    visits: list[hl7.Segment] = []
    for segment in message.segments:
        if segment.name == "PID":
            if pid is not None:
                yield _Group(pid, tuple(merges), tuple(visits))
            pid, merges, visits = segment, [], []
        elif segment.name == "MRG":
            if pid is None:
                _refuse("MERGE_WITHOUT_SURVIVOR", "MRG-1")
            merges.append(segment)
        elif segment.name == "PV1":
            visits.append(segment)
    if pid is not None:
        yield _Group(pid, tuple(merges), tuple(visits))


def _read_trigger(message: hl7.Message) -> str:
    """EVN-1, where versions before 2.3 and some senders name the event."""
    event = message.find_segment("EVN")
    return event.text(1) if event is not None else ""


def _read_time(message: hl7.Message, facility: Facility) -> int | None:
    """When it happened: the first readable of EVN-6 (occurred), EVN-2 (recorded), MSH-7 (sent)."""
    zone = ZoneInfo(facility.time_zone)
    event = message.find_segment("EVN")
    for text in (event.text(6) if event else "", event.text(2) if event else "", message.header.time):
        if text:
            try:
                return hl7.read_timestamp(text, zone, "EVN-2")
            except Failure:
                continue  # a wrong clock is no reason to lose an identifier
    return None


def _find_facility(record: RawRecord, tenancy: Tenancy) -> Facility:
    try:
        return tenancy.get_facility(record.read_header(headers.FACILITY))
    except KeyError:
        _refuse("FACILITY_UNKNOWN", headers.FACILITY)


def _read_ingest_time(record: RawRecord) -> int:
    try:
        return int(record.read_header(headers.INGEST_TIME))
    except ValueError:
        _refuse("HEADER_INVALID", headers.INGEST_TIME)


def _check_unredacted(text: str, place: str) -> None:
    """Two identifiers that looked like card numbers would be one after redaction."""
    if any(mark in text for mark in _REDACTIONS):
        _refuse("PAN_IN_REFERENCE", place)


def _refuse(code: str, field: str) -> NoReturn:
    raise Failure(FailureKind.INVALID, code, field)

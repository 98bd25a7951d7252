"""What becomes of each message of `raw.hl7`: states of patient identifiers, or nothing."""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.events import Fate, PatientRecord
from schemas.failure import Failure, FailureKind
from schemas.keys import HmacKey, build_event_id
from streams.admissions import Ignored, read_admission
from streams.decision import Clock, Codecs, Decision, Printer, Room, Writer, guard
from streams.state import Draft, SeenEntry
from topics import catalog, headers
from topics.headers import RawRecord, find_header
from topics.transaction import Output

if TYPE_CHECKING:
    from collections.abc import Sequence

    from schemas.tenancy import Tenancy


class AdmissionDecider:
    """Decides batches of `raw.hl7`: patient identifiers and merges, in the order each feed sent them."""

    source = catalog.HL7

    def __init__(self, tenancy: Tenancy, *, hmac_key: HmacKey, codecs: Codecs, clock: Clock | None = None) -> None:
        self._tenancy = tenancy
        self._hmac_key = hmac_key
        self._codecs = codecs
        self._printer = Printer(codecs)
        self._clock = clock or Clock()

    async def decide(
        self, rooms: dict[int, Room], records: Sequence[RawRecord], refused: frozenset[str] = frozenset()
    ) -> Decision:
        """Decide every message of a batch."""
        writer = Writer(self._codecs, self._printer, self.source, self._clock.now_ms())
        drafts = {partition: Draft(room.state) for partition, room in rooms.items()}
        for record in records:
            drafts[record.partition].cause = record.hop
            if record.hop in refused:
                writer.dead_letter(record, Failure(FailureKind.INVALID, "REFUSED_BY_BROKER", "record"), "normalise")
                continue
            failure = guard(self._decide_one, writer, drafts[record.partition], record)
            if failure is not None:
                writer.dead_letter(record, failure, "normalise")
        decision = writer.finish()
        decision.drafts = list(drafts.values())
        return decision

    def _decide_one(self, writer: Writer, draft: Draft, record: RawRecord) -> None:
        """Decide one message. Raises before anything was written."""
        read = read_admission(record, self._tenancy)
        if isinstance(read, Ignored):
            writer.dispose(record, Fate.IGNORED, read.reason, find_header(record.headers, "ce_type") or "")
            return
        digest = self._hmac_key.hash_facts(*read.facts)
        feed = find_header(record.headers, headers.ACCOUNT) or ""
        # Senders restart their control ids: the same id with other bytes is another message.
        key = f"{self.source}:{feed}:{read.control_id}:{digest.hex()}"
        seen = draft.read_seen(key)
        if seen:
            writer.dispose(record, Fate.SUPPRESSED, "DUPLICATE", read.message_type, seen[0].hop)
            return
        published = [self._publish(record, patient) for patient in read.records]
        draft.write_seen(key, [SeenEntry(digest, record.hop)])
        writer.publish_patients(published)
        writer.dispose(record, Fate.PATIENT_UPDATE, "ADMISSION", read.message_type, build_event_id(key))

    def rebuild(self, room: Room) -> None:
        """Nothing of an admission waits."""

    def _publish(self, record: RawRecord, patient: PatientRecord) -> Output:
        return Output(
            catalog.PATIENTS,
            self._hmac_key.hash_identifier(patient.identifier).encode(),
            self._codecs.patient.encode(patient),
            [(headers.HOP, record.hop.encode()), (headers.ORIGIN, record.origin.encode())],
            cause=record.hop,
        )

"""From a canonical record to a frozen request: decode, route, resolve the patient, build. No call is made here."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

from identity.resolution import Known
from schemas.events import Outcome
from schemas.failure import Failure, FailureKind
from sinks.attempts import Source
from sinks.contract import PostingContext
from topics.headers import EVENT_ID, find_header

if TYPE_CHECKING:
    from collections.abc import Sequence

    from identity.resolution import Resolution
    from schemas.events import MoneyEvent, Reference
    from schemas.tenancy import Tenancy
    from sinks.calls import Call
    from sinks.contract import Target, TargetSettings
    from sinks.policy import Moment, Policy
    from sinks.reports import Codecs
    from sinks.shards import Shard
    from topics.reading import Record

MRN_UNRESOLVED = "MRN_UNRESOLVED"
"""Parked: the patient is unknown or ambiguous just now; asked again later."""
PATIENT_MISSING = "PATIENT_MISSING"


class Patients(Protocol):
    """What is asked about patients: ``identity.projection.Identities``."""

    async def resolve(self, refs: Sequence[Reference]) -> list[Resolution]:
        """The patients now; raises ``TemporaryError`` when that cannot be decided."""


class Intake:
    """What one instance makes of canonical records. A connector's fault is the record's dead letter, not a crash."""

    def __init__(
        self,
        target: Target,
        settings: TargetSettings,
        tenancy: Tenancy,
        policy: Policy,
        *,
        codecs: Codecs,
        patients: Patients,
    ) -> None:
        self._target = target
        self._settings = settings
        self._tenancy = tenancy
        self._policy = policy
        self._codecs = codecs
        self._patients = patients

    def decode(self, value: bytes) -> tuple[MoneyEvent | None, Failure | None]:
        """The event, or why there is none. Raises ``TemporaryError`` when the registry is needed and down."""
        try:
            return self._codecs.decode(value), None
        except Failure as failure:
            return None, failure

    def route(self, event: MoneyEvent) -> tuple[bool, Failure | None]:
        """Whether the event is posted at this instance, or why that cannot be said."""
        try:
            return self._target.routes(event, self._settings), None
        except Failure as failure:
            return False, failure
        except Exception as error:  # noqa: BLE001 - a connector's fault is this record's dead letter, not a crash
            return False, Failure(FailureKind.INTERNAL, type(error).__name__)

    def admit(self, shard: Shard, record: Record, hop: str, moment: Moment) -> None:
        """Take a record into the ledger. Raises ``TemporaryError`` as ``decode`` does; nothing was taken then."""
        event, failure = self.decode(record.value or b"")
        event_id = event.event_id if event else find_header(record.headers, EVENT_ID)
        entity = (record.key or b"").decode("utf-8", "replace") or hop
        source = Source(record.key or b"", record.value or b"", record.headers)
        attempt = shard.ledger.admit(event_id or hop, record.offset, entity, source, event, moment)
        if attempt is None:
            return
        routed = False
        if event is not None:
            routed, failure = self.route(event)
            if not routed and failure is None:
                shard.ledger.skip(attempt)
                return
        if failure is not None:
            shard.ledger.reject(
                attempt, failure.kind, failure.code, moment, field=failure.field, outcome=Outcome.DEAD_LETTERED
            )
        shard.ledger.line_up(attempt, moment)

    async def freeze(self, fresh: Sequence[Call], moment: Moment) -> list[Call]:
        """Build the requests; those that came out are IN_FLIGHT. The others are dead letters or parked.

        Raises ``TemporaryError`` when the patients cannot be resolved just now; nothing has changed then.
        """
        references = [_choose_reference(call.attempt.event) for call in fresh]
        wanted = list({reference: None for reference in references if reference is not None})
        resolutions = await self._patients.resolve(wanted) if wanted else []
        found = dict(zip(wanted, resolutions, strict=True))
        calls = []
        for call, reference in zip(fresh, references, strict=True):
            if reference is None:
                _dead_letter(call, Failure(FailureKind.UNMAPPED, PATIENT_MISSING, "patient"), moment)
                continue
            resolution = found[reference]
            if not isinstance(resolution, Known):
                call.attempt.tries += 1
                pause = self._policy.choose_pause(call.attempt.tries)
                call.shard.ledger.park(call.attempt, None, MRN_UNRESOLVED, moment, pause=pause)
            elif self._build_request(call, resolution.mrn, moment):
                calls.append(call)
        return calls

    def _build_request(self, call: Call, mrn: Reference, moment: Moment) -> bool:
        event = call.attempt.event
        assert event is not None, "an event without one was dead-lettered when it was admitted"
        try:
            facility = self._tenancy.get_facility(event.facility)
            context = PostingContext(facility, mrn, moment.wall, call.attempt.round)
            request = self._target.freeze(event, context, self._settings)
        except Failure as failure:
            _dead_letter(call, failure, moment)
        except Exception as error:  # noqa: BLE001 - a connector's fault is this record's dead letter, not a crash
            _dead_letter(call, Failure(FailureKind.INTERNAL, type(error).__name__), moment)
        else:
            call.attempt.tries = 0
            call.shard.ledger.start(call.attempt, request, moment)
            return True
        return False


def _dead_letter(call: Call, failure: Failure, moment: Moment) -> None:
    call.shard.ledger.reject(
        call.attempt, failure.kind, failure.code, moment, field=failure.field, outcome=Outcome.DEAD_LETTERED
    )


def _choose_reference(event: MoneyEvent | None) -> Reference | None:
    """The patient as named: it resolves through visits and merges; the number found at publishing may be retired."""
    if event is None:
        return None
    return event.patient or event.mrn

"""Epic patient payments: one money fact becomes one HL7 v2 DFT message over MLLP.

Epic has no public write for money over FHIR; patient payments are posted by DFT^P03 (facts read 2026: hl7.eu
``msgDFT_P03``, ``segFT1``; HL7 table 0017 for FT1-6: PY payment, CO co-payment, AJ adjustment). What differs between
sites is a setting: the payment code, how refunds are taken, whether the receiver recognises a repeated MSH-10.

Quirks:

* FT1-2 is 12 characters long in the standard's table, gateway ids are 27 to 36: a short id is derived from the event
  id; the ledger and `deliveries` keep the map (``reference``). FT1-8 carries the gateway's own id.
* AA means accepted, not yet filed; AR and AE are final except for the error conditions named as transient.
* Without duplicate control at the receiver nothing may be resent (class D); with it, for as long as it remembers (A).
"""

from __future__ import annotations

import re
from datetime import UTC, datetime
from functools import lru_cache
from pathlib import Path
from typing import TYPE_CHECKING, Any, Final, Literal
from zoneinfo import ZoneInfo

import msgspec
from pydantic import Field, FilePath, model_validator

from schemas.events import Kind, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.formats import hl7
from schemas.mapping import FieldMapping, build_view
from schemas.tenancy import Name
from sinks.contract import Answer, PostingContext, Request, Target, TargetClass
from sinks.references import derive
from sinks.transport import MllpSettings

if TYPE_CHECKING:
    from schemas.money import Money

_MAPPING = Path(__file__).parent.parent / "mappings" / "epic_dft.yaml"
_PLACE = re.compile(r"(PID|PV1|FT1)-([1-9]\d?)(?:\.([1-9]\d?)(?:\.([1-9]\d?))?)?\Z")
_OWN: Final = frozenset({("PID", "1"), ("PV1", "1"), ("PV1", "2"), ("FT1", "1"), ("FT1", "2")})
_LONGEST: Final = {"FT1-8": 40}
"""Lengths of HL7 2.5.1 that receivers are known to cut at; a cut reference would be worse than none."""

_SIGNS: Final = {
    Kind.CAPTURE: 1,
    Kind.REFUND: -1,
    Kind.REFUND_REVERSAL: 1,
    Kind.CHARGEBACK: -1,
    Kind.CHARGEBACK_REVERSAL: 1,
}
"""Kinds that are posted, and whether they add to what the patient has paid."""


class EpicDftSettings(MllpSettings):
    """One interface that takes patient payments as DFT."""

    sending_application: str = Field(min_length=1, max_length=180, description="MSH-3.")
    sending_facility: str = Field(min_length=1, max_length=180, description="MSH-4.")
    receiving_application: str = Field(min_length=1, max_length=180, description="MSH-5.")
    receiving_facility: str = Field(min_length=1, max_length=180, description="MSH-6.")
    processing_id: Literal["P", "T", "D"] = Field(default="P", description="MSH-11: production, training, debugging.")
    hl7_version: Literal["2.3", "2.3.1", "2.4", "2.5", "2.5.1", "2.6"] = Field(default="2.5.1", description="MSH-12.")
    payment_code: str = Field(min_length=1, description="FT1-7: the receiver's own code for patient payments.")
    facility_payment_codes: dict[Name, str] = Field(
        default_factory=dict, description="FT1-7 by facility, where it differs."
    )
    copay_attribute: str | None = Field(
        default=None, description="Attribute of the event that tells a co-payment (FT1-6 `CO`)."
    )
    copay_values: tuple[str, ...] = Field(default=("copay",), description="Its values that do.")
    copay_invoice_prefix: str | None = Field(default=None, description="An invoice that begins so is a co-payment.")
    refund_as: Literal["negative", "adjustment", "p11"] = Field(
        description="How money that goes back is told: a negative payment, an adjustment (FT1-6 `AJ`) with a code of "
        "its own, or a negative payment in a DFT^P11."
    )
    adjustment_code: str | None = Field(default=None, description="FT1-7 of adjustments.")
    duplicate_control: Literal["msh10", "none"] = Field(
        description="Whether the receiver recognises a repeated MSH-10. Ask its interface team: with `msh10` a message "
        "whose outcome is unknown is sent again, with `none` a person decides."
    )
    duplicate_window_hours: float | None = Field(
        default=None, gt=0, description="How long it remembers an MSH-10; needed with `msh10`."
    )
    transient_conditions: tuple[str, ...] = Field(
        default=("206",), description="ERR conditions (table 0357) after which the same message may be sent again."
    )
    id_prefix: str = Field(default="", pattern=r"^[A-Z0-9]*$", description="FT1-2 begins so.")
    id_length: int = Field(default=12, ge=10, le=36, description="Length of FT1-2; 12 in the standard's table.")
    patient_class: str = Field(default="U", pattern=r"^[A-Z]$", description="PV1-2 when a visit is named (table 0004).")
    mapping_overlay: FilePath | None = Field(
        default=None, description="YAML file with more fields (see docs/adding-a-target.md)."
    )

    @model_validator(mode="after")
    def _agree(self) -> EpicDftSettings:
        if self.refund_as == "adjustment" and not self.adjustment_code:
            raise ValueError('refund_as = "adjustment" needs adjustment_code')
        if self.duplicate_control == "msh10" and self.duplicate_window_hours is None:
            raise ValueError(
                'duplicate_control = "msh10" needs duplicate_window_hours: without it nobody knows until when a resend '
                "is recognised"
            )
        if self.id_length - len(self.id_prefix) < 10:
            raise ValueError("id_length must leave 10 characters after id_prefix, or ids could repeat")
        # A broken mapping stops the start, not the first payment.
        for part in _load_mapping(self.mapping_overlay).fields:
            if not _is_free(part.to):
                raise ValueError(
                    f"mapping_overlay: {part.to} is not a place in PID, PV1 or FT1 that a mapping may fill"
                )
        return self


def classify(settings: EpicDftSettings) -> TargetClass:
    """A with duplicate control and a known window, else D: there is no look-up over this interface."""
    return TargetClass.D if window(settings) is None else TargetClass.A


def window(settings: EpicDftSettings) -> float | None:
    """How many seconds a resend is recognised; None when it never is."""
    if settings.duplicate_control == "none" or settings.duplicate_window_hours is None:
        return None
    return settings.duplicate_window_hours * 3600


def routes(event: MoneyEvent, settings: EpicDftSettings) -> bool:
    """Money that moved, of the facilities this interface serves. Payouts and dispute notices are not posted."""
    return event.facility in settings.facilities and event.kind in _SIGNS


def freeze(event: MoneyEvent, context: PostingContext, settings: EpicDftSettings) -> Request:
    """The message, whole. MSH-7 is ``frozen_at``; MSH-10 and FT1-2 are functions of the event and the instance.

    A redrive has an MSH-10 of its own and the same FT1-2.
    """
    if event.money.minor <= 0:
        # The kind says the direction: a negative refund would be told as a payment.
        raise Failure(FailureKind.INVALID, "AMOUNT_NOT_POSITIVE", "money.minor")
    control_id = derive(context.mark_key(f"msh10|{settings.name}|{event.event_id}"), 20)
    reference = settings.id_prefix + derive(
        f"ft1|{settings.name}|{event.event_id}", settings.id_length - len(settings.id_prefix)
    )
    zone = ZoneInfo(context.facility.time_zone)
    frozen_at = hl7.write_timestamp(context.frozen_at, zone)
    trigger = "P11" if _is_return(event) and settings.refund_as == "p11" else "P03"
    view = build_view(
        event,
        site={"id": context.facility.id, "time_zone": context.facility.time_zone},
        posting=_describe_posting(event, context, settings, zone),
    )
    view["mrn"] = msgspec.to_builtins(context.mrn)
    fields = _arrange(_load_mapping(settings.mapping_overlay).apply(view))
    fields["FT1"] |= {1: "1", 2: reference}
    # The structure of P11 carries P03's segments; MSH-9.3 came with 2.3.1.
    structure = () if settings.hl7_version == "2.3" else (f"DFT_{trigger}",)
    segments: list[tuple[str, dict[int, hl7.Content]]] = [
        (
            "MSH",
            {
                3: settings.sending_application,
                4: settings.sending_facility,
                5: settings.receiving_application,
                6: settings.receiving_facility,
                7: frozen_at,
                9: ("DFT", trigger, *structure),
                10: control_id,
                11: settings.processing_id,
                12: settings.hl7_version,
                18: "UNICODE UTF-8",
            },
        ),
        ("EVN", {1: trigger, 2: frozen_at}),
        ("PID", {1: "1"} | fields["PID"]),
    ]
    if fields["PV1"]:
        segments.append(("PV1", {1: "1", 2: settings.patient_class} | fields["PV1"]))
    segments.append(("FT1", fields["FT1"]))
    return Request(hl7.build_message(segments), control_id, reference)


def verdict(answer: bytes, _request: Request, settings: EpicDftSettings) -> Answer:
    """AA and CA: accepted. AE and CE: refused, or later when the condition is transient. AR and CR: refused.

    What cannot be read as an acknowledgement says nothing about the posting: AMBIGUOUS. (MSA-2 was matched to MSH-10
    before the answer came here.)
    """
    try:
        acknowledgement = hl7.read_ack(answer)
    except Failure as failure:
        return Answer(FailureKind.AMBIGUOUS, failure.code)
    letter = acknowledgement.code[1]
    code = f"MSA_{acknowledgement.code}"
    if letter == "A":
        return Answer(None, code)
    if acknowledgement.condition:
        code = f"{code}_{acknowledgement.condition}"
    if letter == "E" and acknowledgement.condition in settings.transient_conditions:
        return Answer(FailureKind.UNAVAILABLE, code)
    return Answer(FailureKind.REJECTED, code)


def _is_return(event: MoneyEvent) -> bool:
    return event.kind != Kind.CAPTURE


def _describe_posting(
    event: MoneyEvent, context: PostingContext, settings: EpicDftSettings, zone: ZoneInfo
) -> dict[str, Any]:
    amount: Money = event.money if _SIGNS[Kind(event.kind)] > 0 else event.money.negated()
    posting_type = "CO" if _is_copay(event, settings) else "PY"
    code = settings.facility_payment_codes.get(event.facility, settings.payment_code)
    if _is_return(event) and settings.refund_as == "adjustment":
        posting_type, code = "AJ", settings.adjustment_code or ""
    day = datetime.fromtimestamp(context.frozen_at / 1000, UTC).astimezone(zone)
    return {"type": posting_type, "code": code, "amount": msgspec.to_builtins(amount), "date": day.strftime("%Y%m%d")}


def _is_copay(event: MoneyEvent, settings: EpicDftSettings) -> bool:
    named = settings.copay_attribute is not None and (
        event.attributes.get(settings.copay_attribute) in settings.copay_values
    )
    prefix = settings.copay_invoice_prefix
    return named or bool(prefix and event.invoice and event.invoice.startswith(prefix))


def _arrange(mapped: dict[str, Any]) -> dict[str, dict[int, hl7.Content]]:
    """Mapped places as fields of segments: components and subcomponents in their order."""
    found: dict[str, dict[int, dict[int, dict[int, str]]]] = {"PID": {}, "PV1": {}, "FT1": {}}
    for name, value in mapped.items():
        match = _PLACE.match(name)
        assert match is not None, "places were checked with the settings"
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise Failure(FailureKind.UNMAPPED, "FIELD_NOT_TEXT", name)
        if len(str(value)) > _LONGEST.get(name, 1000):
            raise Failure(FailureKind.UNMAPPED, "FIELD_TOO_LONG", name)
        segment, field, component, subcomponent = match.groups()
        parts = found[segment].setdefault(int(field), {}).setdefault(int(component or 1), {})
        parts[int(subcomponent or 1)] = str(value)
    return {
        segment: {
            number: tuple(_fill(components.get(place, {}), "") for place in range(1, max(components) + 1))
            for number, components in fields.items()
        }
        for segment, fields in found.items()
    }


def _is_free(place: str) -> bool:
    """Whether a mapping may fill this place; the set ids, FT1-2 and the patient class are the connector's."""
    match = _PLACE.match(place)
    return match is not None and (match[1], match[2]) not in _OWN


def _fill(parts: dict[int, str], absent: str) -> tuple[str, ...]:
    return tuple(parts.get(number, absent) for number in range(1, max(parts, default=0) + 1))


@lru_cache(maxsize=64)
def _load_mapping(overlay: Path | None) -> FieldMapping:
    return FieldMapping.load(_MAPPING, overlay, accepts_phi=TARGET.accepts_phi)


TARGET = Target(
    name="epic_dft",
    display_name="Epic patient payments (HL7 v2 DFT)",
    status="sandbox",
    documentation="https://www.hl7.eu/refactored/msgDFT_P03.html",
    transport="mllp",
    settings=EpicDftSettings,
    classify=classify,
    window=window,
    routes=routes,
    freeze=freeze,
    verdict=verdict,
    capabilities={
        "capture": "payment (PY) or co-payment (CO)",
        "refund": "negative payment, adjustment or P11",
        "refund_reversal": "positive counterpart of the refund",
        "chargeback": "as a refund",
        "chargeback_reversal": "positive counterpart of the chargeback",
        "duplicate control": "same MSH-10 and bytes at every attempt",
    },
)
"""Head of this connector."""

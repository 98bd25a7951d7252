"""ADT messages as a hospital's admission system sends them, written as plain HL7 v2.5.1 text."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import UTC, datetime

from sandbox.hl7_text import escape_text

_STRUCTURES = {
    "A01": "ADT_A01",
    "A04": "ADT_A01",
    "A08": "ADT_A01",
    "A28": "ADT_A05",
    "A31": "ADT_A05",
    "A40": "ADT_A39",
}


@dataclass(frozen=True, slots=True, kw_only=True)
class Patient:
    """An invented patient of one facility."""

    facility: str
    mrn: str
    given: str
    family: str
    account_number: str


@dataclass(frozen=True, slots=True, kw_only=True)
class Envelope:
    """Who sends the message and when. ``authority`` is PID-3.4 as written: a name or ``&<OID>&ISO``."""

    application: str
    facility: str
    control_id: str
    time: int
    authority: str


def write_admission(
    envelope: Envelope, trigger: str, patient: Patient, *, with_id: bool = True, note: str | None = None
) -> bytes:
    """A01, A04, A08, A28 or A31 for a patient. ``with_id`` False leaves PID-3 empty; ``note`` becomes an NTE."""
    identifier = ""
    if with_id:
        identifier = f"{patient.mrn}^^^{envelope.authority}^MR~{patient.account_number}^^^{envelope.authority}^AN"
    lines = [
        *_write_head(envelope, trigger),
        f"PID|1||{identifier}||{_write_name(patient)}||19700704|U|||1 Sample Way^^Exampleville^IL^60000^US",
    ]
    if note is not None:
        lines.append(f"NTE|1|L|{escape_text(note)}")
    lines.append(f"PV1|1|O|CLINIC^^^{escape_text(envelope.facility)}")
    return _join(lines)


def write_merge(envelope: Envelope, survivor: Patient, retired_mrn: str) -> bytes:
    """A40: the MRN in MRG-1 is retired into the one of PID-3."""
    return _join(
        [
            *_write_head(envelope, "A40"),
            f"PID|1||{survivor.mrn}^^^{envelope.authority}^MR||{_write_name(survivor)}",
            f"MRG|{retired_mrn}^^^{envelope.authority}^MR||||||{_write_name(survivor)}",
        ]
    )


def _write_head(envelope: Envelope, trigger: str) -> list[str]:
    time = datetime.fromtimestamp(envelope.time, UTC).strftime("%Y%m%d%H%M%S+0000")
    sender = f"{escape_text(envelope.application)}|{escape_text(envelope.facility)}"
    kind = f"ADT^{trigger}^{_STRUCTURES[trigger]}"
    ending = "P|2.5.1||||||UNICODE UTF-8"  # MSH-15 and MSH-16 blank: original acknowledgement mode
    return [
        f"MSH|^~\\&|{sender}|REMITSTREAM|LAKESHORE|{time}||{kind}|{envelope.control_id}|{ending}",
        f"EVN|{trigger}|{time}",
    ]


def _write_name(patient: Patient) -> str:
    return f"{escape_text(patient.family)}^{escape_text(patient.given)}"


def _join(lines: list[str]) -> bytes:
    return "".join(line + "\r" for line in lines).encode()

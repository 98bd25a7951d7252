"""What the billing system accepts: a DFT message as postings, or the reason it is refused, and the acknowledgement."""

from __future__ import annotations

from dataclasses import dataclass, replace
from datetime import datetime
from typing import Literal

from sandbox.coins import parse_amount
from sandbox.hl7_text import Hl7Text, pick
from sandbox.ledger import Posting

REJECT_MARKER = "Reject"
"""A payment whose FT1-8 contains this text is always refused (AR)."""

TRANSACTION_TYPES = frozenset({"PY", "CO", "CD", "AJ", "CG"})
"""FT1-6: payment, co-payment, credit, adjustment, charge (table 0017)."""

_EVENTS = frozenset({"P03", "P11"})


@dataclass(frozen=True, slots=True)
class Instance:
    """One interface of the billing system: a facility's port.

    ``port`` 0 takes a free one. ``payment_codes`` are the FT1-7 codes it knows; none means any code that is not blank.
    ``longest_transaction_id`` limits FT1-2 (12 in the standard's table); 0 means no limit.
    """

    name: str
    port: int = 0
    duplicate_control: Literal["msh10", "none"] = "msh10"
    payment_codes: tuple[str, ...] = ()
    longest_transaction_id: int = 0


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a message is not posted: acknowledgement letter (E error, R reject), HL7 error code and place."""

    letter: Literal["E", "R"]
    code: str
    text: str
    place: str = ""


_NO_CONTROL_ID = Refusal("R", "101", "Control id missing", "MSH^1^10")


def read_postings(
    instance: Instance, message: Hl7Text, *, digest: str, reject_marker: str = REJECT_MARKER
) -> list[Posting] | Refusal:
    """Postings of a DFT message, one per FT1, or why the whole message is refused.

    ``digest`` is the message's hash, kept with each posting. Nothing is written here.
    """
    head = message.find("MSH")
    event = message.read(head, 9, 2)
    if message.read(head, 9) != "DFT" or event not in _EVENTS:
        return Refusal("R", "200", "Unsupported message type", "MSH^1^9")
    patient = _read_patient(message) if message.read(head, 10) else _NO_CONTROL_ID
    if isinstance(patient, Refusal):
        return patient
    transactions = message.find_all("FT1")
    if not transactions:
        return Refusal("E", "100", "FT1 missing", "FT1")
    postings = []
    for number, fields in enumerate(transactions, start=1):
        refusal = _check_fields(instance, message, fields, reject_marker)
        if refusal is not None:
            return replace(refusal, place=f"FT1^{number}^{refusal.place}")
        currency = message.read(fields, 11, 1, 2)
        minor = parse_amount(message.read(fields, 11), currency)
        if not minor:
            return Refusal("E", "102", "Amount or currency missing or wrong", f"FT1^{number}^11")
        postings.append(
            Posting(
                instance=instance.name,
                facility=message.read(head, 6) or instance.name,
                message_type=f"DFT^{event}",
                control_id=message.read(head, 10),
                transaction_id=message.read(fields, 2),
                transaction_time=message.read(fields, 4),
                type=message.read(fields, 6),
                code=message.read(fields, 7),
                description=message.read(fields, 8),
                minor=minor,
                currency=currency,
                mrn=patient[0],
                authority=patient[1],
                raw_sha256=digest,
            )
        )
    return postings


def _check_fields(instance: Instance, message: Hl7Text, fields: tuple[str, ...], reject_marker: str) -> Refusal | None:
    """Check one FT1 but its amount; the refusal's place is the field number."""
    longest = instance.longest_transaction_id
    time, code = message.read(fields, 4), message.read(fields, 7)
    checks = (
        (longest and len(message.read(fields, 2)) > longest, Refusal("E", "102", "Transaction id too long", "2")),
        (
            len(time) < 8 or not time[:8].isdigit(),
            Refusal("E", "102", "Transaction date missing or wrong", "4"),
        ),
        (
            message.read(fields, 6) not in TRANSACTION_TYPES,
            Refusal("E", "103", "Unknown transaction type", "6"),
        ),
        (
            not code or (instance.payment_codes and code not in instance.payment_codes),
            Refusal("E", "103", "Unknown payment code", "7"),
        ),
        (
            reject_marker and reject_marker in message.read(fields, 8),
            Refusal("R", "207", "Payment not accepted", "8"),
        ),
    )
    return next((refusal for wrong, refusal in checks if wrong), None)


def build_acknowledgement(
    message: Hl7Text | None, refusal: Refusal | None, *, control_id: str, now: datetime, echo: str | None = None
) -> bytes:
    """ACK for a message, or empty when its MSH-15 and MSH-16 ask for none. ``control_id`` is the ACK's own MSH-10.

    Both blank: original mode, AA, AE or AR. Otherwise the application level (A) when MSH-16 asks for it, else the
    accept level (C) when MSH-15 does; AL always, NE never, SU on success, ER on error. ``echo`` replaces MSA-2.
    """
    head = message.find("MSH") if message else None
    level = _choose_level(pick(head, 15), pick(head, 16), success=refusal is None)
    if not level:
        return b""
    event = message.read(head, 9, 2) if message else ""
    lines = [
        "|".join(
            (
                "MSH",
                "^~\\&",
                *(pick(head, field) for field in (5, 6, 3, 4)),
                now.strftime("%Y%m%d%H%M%S%z"),
                "",
                f"ACK^{event}" if event else "ACK",
                control_id,
                "P",
                pick(head, 12) or "2.5.1",
            )
        ),
        f"MSA|{level}{refusal.letter if refusal else 'A'}|{pick(head, 10) if echo is None else echo}",
    ]
    if refusal is not None:
        lines.append(f"ERR||{refusal.place}|{refusal.code}^{refusal.text}^HL70357|E")
    return "".join(line + "\r" for line in lines).encode()


def _read_patient(message: Hl7Text) -> tuple[str, str] | Refusal:
    """(MRN, authority) of PID-3: the repetition of type MR, else the first."""
    repetitions = pick(message.find("PID"), 3).split(message.repetition)
    chosen = next((part for part in repetitions if message.read_part(part, 5) == "MR"), repetitions[0])
    mrn = message.read_part(chosen, 1)
    authority = message.read_part(chosen, 4) or message.read_part(chosen, 4, 2)
    if not mrn:
        return Refusal("E", "101", "Patient id missing", "PID^1^3")
    if not authority:
        return Refusal("E", "101", "Assigning authority missing", "PID^1^3^1^4")
    return mrn, authority


def _choose_level(accept: str, application: str, *, success: bool) -> str:
    wanted = {"AL", "SU" if success else "ER"}
    if (not accept and not application) or application in wanted:
        return "A"
    return "C" if accept in wanted else ""

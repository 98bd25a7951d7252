"""What is sent for one run, and what must come of it: every fate there is, in one batch.

Of each run one patient stays unknown; the next run begins with this patient's arrival, so that its batch also releases
what waited.
"""

from __future__ import annotations

import json
from dataclasses import dataclass

KNOWN = "M-known"


@dataclass(frozen=True, slots=True)
class Planned:
    """One raw record, what must become of it, and (of a canonical one) what it must say."""

    key: str
    body: bytes
    fate: str
    fact: tuple[str, str, int, str] | None = None
    """Kind, object id, minor units, MRN."""


def name_patient(run):
    return f"M-{run}"


def _build(kind, name, amount, *, mrn=None, parent=None):
    item = {"id": name, "currency": "usd", "status": "succeeded", "metadata": {}}
    if amount is not None:
        item |= {"amount": amount, "amount_received": amount}
    if mrn:
        item["metadata"]["mrn"] = mrn
    if parent:
        item["payment_intent"] = parent
    return json.dumps({"id": "evt", "type": kind, "created": 1_767_225_600, "data": {"object": item}}).encode()


def plan(run):
    """The records of one run, in order; those of the unknown patient become canonical in the next."""
    known, poison, late = (f"pi_{run}_{name}" for name in ("known", "poison", "late"))
    patient = name_patient(run)
    capture = _build("payment_intent.succeeded", known, 1000, mrn=KNOWN)
    return [
        Planned(known, capture, "canonical", ("capture", known, 1000, KNOWN)),
        Planned(poison, _build("payment_intent.succeeded", poison, None, mrn=KNOWN), "dead_lettered"),
        Planned(known, capture, "suppressed"),
        Planned(
            known,
            _build("refund.created", f"re_{run}_known", 7, parent=known),
            "canonical",
            ("refund", f"re_{run}_known", 7, KNOWN),
        ),
        Planned(
            poison,
            _build("payment_intent.succeeded", poison, 55, mrn=KNOWN),
            "canonical",
            ("capture", poison, 55, KNOWN),
        ),
        Planned(
            late,
            _build("payment_intent.succeeded", late, 70, mrn=patient),
            "canonical",
            ("capture", late, 70, patient),
        ),
        Planned(
            late,
            _build("refund.created", f"re_{run}_late", 3, parent=late),
            "canonical",
            ("refund", f"re_{run}_late", 3, patient),
        ),
        Planned(known, _build("payment_intent.succeeded", known, 5, mrn=KNOWN), "in_review"),
        Planned(known, _build("charge.succeeded", f"ch_{run}", 5, parent=known), "ignored"),
        Planned(known, _build("payment_intent.succeeded", known, 5, mrn=KNOWN), "suppressed"),
    ]


LATE = 2
"""Records of a run that wait for its patient."""

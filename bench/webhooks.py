"""The input of every contender, and what must come out: seeded webhooks and the canonical events they mean.

``Traffic`` gives event number i as a raw record and, from the same drawn facts but by code of its own, the canonical
event. Nothing here uses the project's mapping, keys or codecs.
"""

from __future__ import annotations

import hashlib
import json
import random
import time
from array import array
from dataclasses import dataclass
from typing import Any, Final

from sandbox.stripe_objects import NEW_API, Payment, build_event, build_payment_intent

TENANT: Final = "lakeshore"
FACILITIES: Final = ("north", "harbor")
PATIENTS: Final = 50_000
BORN: Final = 1_760_000_000
"""Seconds since the epoch of the first event."""
CURRENCIES: Final = (("usd", 2),) * 8 + (("eur", 2), ("jpy", 0))
_PREFIX: Final = "pi_3Rb"
# Members nobody maps; without them a webhook has the size of the ones measured before (1.2 kB).
_DROPPED: Final = ("payment_method_options", "amount_details", "client_secret", "payment_method_configuration_details")

Headers = list[tuple[str, bytes]]


@dataclass(frozen=True, slots=True)
class Fact:
    """What was drawn for one event."""

    number: int
    patient: int
    minor: int
    currency: str
    exponent: int

    @property
    def facility(self) -> str:
        """Facility the patient belongs to."""
        return FACILITIES[self.patient % 2]

    @property
    def authority(self) -> str:
        """Assigning authority of that facility."""
        return self.facility.upper()

    @property
    def account(self) -> str:
        """The facility's gateway account."""
        return f"{self.facility}-card"

    @property
    def intent(self) -> str:
        """Id of the payment intent; it holds the event's number."""
        return f"{_PREFIX}{self.number:020d}"

    @property
    def root(self) -> str:
        """Kafka key of the raw record and of the canonical event."""
        return f"{self.account}/{self.intent}"

    @property
    def created(self) -> int:
        """Seconds since the epoch."""
        return BORN + self.number // 100


class Traffic:
    """``count`` events drawn from a seed; the first ones are the same whatever the count."""

    def __init__(self, count: int, seed: int = 1) -> None:
        self.count = count
        self._drawn = array("Q", random.Random(seed).randbytes(8 * count))  # noqa: S311 - replayable on purpose
        self._body = _build_template()

    def draw(self, number: int) -> Fact:
        """The facts of one event."""
        bits = self._drawn[number]
        currency, exponent = CURRENCIES[(bits >> 44) % len(CURRENCIES)]
        return Fact(number, bits % PATIENTS, 100 + (bits >> 20) % 500_000, currency, exponent)

    def write_body(self, fact: Fact) -> bytes:
        """The webhook's body."""
        return (
            self._body
            % {
                "number": f"{fact.number:020d}",
                "minor": fact.minor,
                "currency": fact.currency,
                "created": fact.created,
                "mrn": write_mrn(fact.patient),
                "visit": 70_000_000 + fact.number,
            }
        ).encode()

    def write_headers(self, fact: Fact, body: bytes, ingest_ms: int | None = None) -> Headers:
        """The headers a receiver writes beside it."""
        digest = hashlib.sha256(body).hexdigest().encode()
        event_id = f"evt_3Rb{fact.number:020d}".encode()
        return [
            ("ingest_time", str(ingest_ms if ingest_ms is not None else ingest_time(fact)).encode()),
            ("source", b"stripe"),
            ("account", fact.account.encode()),
            ("facility", fact.facility.encode()),
            ("content-type", b"application/json"),
            ("verdict", b"stripe-v1;key=0;signed_at=%d" % fact.created),
            ("received_hmac", digest),
            ("stored_sha256", digest),
            ("delivery_id", event_id),
            ("ce_specversion", b"1.0"),
            ("ce_id", event_id),
            ("ce_source", f"/stripe/{fact.account}".encode()),
            ("ce_type", b"payment_intent.succeeded"),
            ("ce_time", b"2025-10-09T08:53:20.000Z"),
        ]


def ingest_time(fact: Fact) -> int:
    """When the webhook arrived, by the input: milliseconds since the epoch."""
    return fact.created * 1000 + 250


def write_mrn(patient: int) -> str:
    """The medical record number of a patient, invented."""
    return f"1{patient:07d}"


def read_number(object_id: str) -> int:
    """The event's number, from the id of its payment intent. Raises ``ValueError`` for a foreign id."""
    if not object_id.startswith(_PREFIX):
        raise ValueError("not an id of ours")
    return int(object_id[len(_PREFIX) :])


def expect_event(fact: Fact, *, hop: str, mapping_version: str, enriched: bool) -> dict[str, Any]:
    """The canonical event, as an Avro reader without logical types gives it. ``enriched`` says with the MRN."""
    patient = {"authority": fact.authority, "id_type": "MR", "value": write_mrn(fact.patient)}
    key = f"stripe:{fact.account}:capture:{fact.intent}"
    return {
        "event_id": hashlib.sha256(key.encode()).hexdigest()[:32],
        "transaction_key": key,
        "tenant": TENANT,
        "facility": fact.facility,
        "source": "stripe",
        "account": fact.account,
        "kind": "capture",
        "status": "succeeded",
        "money": {"minor": fact.minor, "currency": fact.currency.upper(), "exponent": fact.exponent},
        "occurred_at": fact.created * 1000,
        "received_at": ingest_time(fact),
        "object_id": fact.intent,
        "root": fact.root,
        "source_event_id": f"evt_3Rb{fact.number:020d}",
        "patient": patient,
        "mrn": patient if enriched else None,
        "guarantor_account": {"authority": fact.authority, "id_type": "AN", "value": f"G{write_mrn(fact.patient)}"},
        "visit": {"authority": fact.authority, "id_type": "VN", "value": f"V{70_000_000 + fact.number}"},
        "claim": None,
        "invoice": f"INV-{fact.number:020d}",
        "token_reference": f"pm_3Rb{fact.number:020d}",
        "attributes": {"payment_method_type": "card"},
        "mapping_version": mapping_version,
        "origin": hop,
    }


def expect_headers(event: dict[str, Any]) -> Headers:
    """The headers of that canonical event."""
    seconds, rest = divmod(event["occurred_at"], 1000)
    stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"
    texts = [
        ("ce_specversion", "1.0"),
        ("ce_id", event["event_id"]),
        ("ce_source", f"/{TENANT}/stripe/{event['account']}"),
        ("ce_type", "remitstream.payments.capture"),
        ("ce_time", stamp),
        ("event_id", event["event_id"]),
        ("hop", event["origin"]),
        ("origin", event["origin"]),
        ("ingest_time", str(event["received_at"])),
        ("facility", event["facility"]),
        ("mapping_version", event["mapping_version"]),
    ]
    return [(name, text.encode()) for name, text in texts]


def _build_template() -> str:
    """A webhook with %-places. Amounts and times are unquoted numbers."""
    payment = Payment(
        intent_id="pi_3Rb@number@",
        charge_id="ch_3Rb@number@",
        amount=111_222_333,
        currency="@currency@",
        created=444_555_666,
        payer="Pat Sample",
        description=None,
        metadata={
            "mrn": "@mrn@",
            "visit": "V@visit@",
            "guarantor_account": "G@mrn@",
            "invoice": "INV-@number@",
        },
        postal_code="60601",
        last4="4242",
    )
    intent = build_payment_intent(payment, status="succeeded", api_version=NEW_API)
    for name in _DROPPED:
        del intent[name]
    event = build_event("evt_3Rb@number@", "payment_intent.succeeded", 444_555_666, intent, api_version=NEW_API)
    event["request"] = {"id": "req_3Rb", "idempotency_key": None}
    text = json.dumps(event, separators=(",", ":"), ensure_ascii=False)
    for name in ("number", "currency", "mrn", "visit"):
        text = text.replace(f"@{name}@", f"%({name})s")
    return text.replace("111222333", "%(minor)d").replace("444555666", "%(created)d")

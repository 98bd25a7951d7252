"""Payments: what is sent for one run, and what must come of it: every fate there is, in one batch.

Of each run one patient and one parent stay unknown. The next run begins with this patient's arrival, and its workers
see a time at which the parent has not come in time: its batch also releases what waited, to the topics and to a person.
"""

from __future__ import annotations

import json
import time
from dataclasses import dataclass

import redis
from confluent_kafka import Producer

KNOWN = "M-known"


@dataclass(frozen=True, slots=True)
class Planned:
    """One raw record, what must become of it, and (of a canonical one) what it must say."""

    key: str
    body: bytes
    fate: str
    fact: tuple[str, str, int, str] | None = None
    """Kind, object id, minor units, MRN."""
    states: tuple[tuple[str, str, str], ...] = ()
    """What a message makes of identifiers, in order: identifier, status, identifier it is merged into."""
    account: str = "north-card"
    facility: str = "north"
    waits: bool = False
    """Its fate comes in the next run only."""


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
    known, poison, late, orphan = (f"pi_{run}_{name}" for name in ("known", "poison", "late", "orphan"))
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
            waits=True,
        ),
        Planned(
            late,
            _build("refund.created", f"re_{run}_late", 3, parent=late),
            "canonical",
            ("refund", f"re_{run}_late", 3, patient),
            waits=True,
        ),
        Planned(orphan, _build("refund.created", f"re_{run}_orphan", 9, parent=orphan), "in_review", waits=True),
        Planned(known, _build("payment_intent.succeeded", known, 5, mrn=KNOWN), "in_review"),
        Planned(known, _build("charge.succeeded", f"ch_{run}", 5, parent=known), "ignored"),
        Planned(known, _build("payment_intent.succeeded", known, 5, mrn=KNOWN), "suppressed"),
    ]


class Payments:
    """The traffic of ``raw.stripe``."""

    source = "stripe"
    stores = ("seen", "waiting", "lineage")
    held = 3
    """Records of a run that wait for the next."""

    def __init__(self, deployment):
        self._deployment = deployment
        settings = deployment.settings
        self._producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "partitioner": "murmur2_random"})
        self._redis = redis.Redis.from_url(settings.redis.url)
        self._offsets = f"{settings.redis.key_prefix}:offsets"
        self._admitted = 0
        self.plan = plan
        deployment.start("project")
        self._admit(KNOWN)

    def prepare(self, run):
        """What comes before the records of a run."""
        if run > 1:
            self._admit(name_patient(run - 1))

    def close(self):
        self._redis.close()

    def _admit(self, mrn):
        """Make a patient known, and wait until the projection has it."""
        ((key, value),) = self._deployment.build_patients(mrn)
        self._producer.produce("patients", value, key, headers=[])
        assert self._producer.flush(30) == 0
        self._admitted += 1
        until = time.monotonic() + 60
        while (
            sum(int(value) for name, value in self._redis.hgetall(self._offsets).items() if name.isdigit())
            < self._admitted
        ):
            assert time.monotonic() < until, f"the projector is not there\n{self._deployment.read_logs()}"
            time.sleep(0.01)

"""The compiled way of every mapping gives what the interpreter gives, or leaves the record to it.

Parametrised by the mapping files found, like ``test_mappings``. The records are the fixtures, the examples of the file
and, for Stripe, the sandbox's objects; then thousands of them with something wrong. Seeded: a failure names its record.
"""

from __future__ import annotations

import copy
import json
import random
import re
from dataclasses import replace

import pytest
import yaml

from sandbox.stripe_objects import (
    NEW_API,
    OLD_API,
    Payment,
    build_charge,
    build_customer,
    build_dispute,
    build_event,
    build_payment_intent,
    build_payout,
    build_refund,
)
from schemas.failure import Failure
from schemas.mapping import Expression
from streams.normalise import Ignored
from streams.shortcut import Shortcut
from tests.conformance.gateway_files import MAPPING_FILES, find_fixtures
from tests.conformance.gateway_files import load_normaliser as load
from topics.headers import RawRecord

SOURCES = sorted(MAPPING_FILES)
MUTANTS = 8000

each = pytest.mark.parametrize("source", SOURCES)

ODD = [
    None, True, False, 0, 1, -1, -500, 10**15, 10**15 + 1, 2**64, -(2**63) - 1, 10**40, 12.5, 500.0, 1e300, "", " ",
    "\t\n", "x", "500", "12.50", "-1", "0", "\u00a0", "\u2003", "é", "😀", "[card redacted]", "[redacted]", "redacted]",
    "a [security code redacted] b", "[track redacted]", "usd", "Usd", "USD", "kwd", "xxx", "ﬀ", [], [None], [1, "a"],
    {}, {"id": "re_1"}, {"id": None}, {"id": 5}, {"id": {"id": "x"}}, {"type": "card"}, [{"type": "card"}], {"a": 1.5},
    "REGION", " NORTH ", "urn:oid:2.16.840.1.113883.3.7001", "ELSEWHERE", 1_767_225_600, 4_102_444_800, 10**12,
    "payment_intent.succeeded", "charge.succeeded", "payout.paid", "refund.updated", "canceled", "never.heard_of",
]  # fmt: skip


def list_bodies(source):
    """Bodies to start from, the members that mappings read in the first accounts included."""
    folder = find_fixtures(source) / "normalise"
    found = [path.read_bytes() for path in sorted(folder.glob("*.raw.json"))]
    declared = yaml.safe_load(MAPPING_FILES[source].read_text("utf-8"))
    found += [json.dumps(example["given"]).encode() for example in declared["examples"]]
    return found + (list_sandbox_bodies() if source == "stripe" else [])


def list_sandbox_bodies():
    payment = Payment(
        intent_id="pi_1", charge_id="ch_1", amount=1250, currency="usd", created=1_767_225_600, payer="Pat Sample",
        description=None, postal_code="60601", last4="4242",
        metadata={"mrn": "100042", "visit": "V1", "guarantor_account": "G1", "invoice": "I1", "claim": "C1",
                  "visit_assigning_authority": "REGION", "patient_account": "A1", "clinic": "LAKE",
                  "cost_centre": "0420"},
    )  # fmt: skip
    subjects = {
        "payment_intent.succeeded": build_payment_intent(payment, status="succeeded", api_version=NEW_API),
        "payment_intent.processing": build_payment_intent(payment, status="succeeded", api_version=OLD_API),
        "payment_intent.payment_failed": build_payment_intent(
            payment, status="requires_payment_method", api_version=NEW_API
        ),
        "charge.succeeded": build_charge(payment),
        "charge.captured": build_charge(payment) | {"payment_intent": None},
        "charge.refunded": build_charge(payment, refunded=500),
        "refund.created": build_refund(payment, "re_1", 500, 1_767_225_700),
        "refund.updated": build_refund(payment, "re_1", 500, 1_767_225_700) | {"status": "canceled"},
        "charge.dispute.created": build_dispute(payment, "du_1", 1_767_225_800, withdrawn=False),
        "charge.dispute.funds_withdrawn": build_dispute(payment, "du_1", 1_767_225_800, withdrawn=True),
        "payout.paid": build_payout("po_1", 9000, "usd", 1_767_225_900),
        "customer.created": build_customer("cus_1", "Pat Sample", 1_767_225_600),
        "something.else": {"id": "x"},
    }
    return [
        json.dumps(
            build_event("evt_1", event_type, 1_767_225_600, subject, api_version=NEW_API), ensure_ascii=False
        ).encode()
        for event_type, subject in subjects.items()
    ]


def build_record(source, account, body):
    """A record as the receiver writes it; ``account`` is one of the tenancy."""
    headers = [
        ("ingest_time", b"1767500000123"),
        ("source", source.encode()),
        ("account", account.name.encode()),
        ("facility", account.facility.encode()),
        ("content-type", b"application/json"),
        ("delivery_id", b"evt_1"),
    ]
    return RawRecord(hop="T1:3:42", partition=3, offset=42, key=b"k", value=body, headers=headers, timestamp=1)


def outcome(way, record):
    """What comes out, in full; attributes in their order, which reaches the bytes that are written."""
    try:
        found = way(record)
    except Failure as failure:
        return ("failure", failure.kind, failure.code, failure.field)
    if found is None or isinstance(found, Ignored):
        return found
    return found, list(found.event.attributes.items()), found.event.money.__class__


class Mutator:
    """Breaks records in the ways senders, edges and bad days do."""

    def __init__(self, source, seed):
        self.random = random.Random(seed)
        text = MAPPING_FILES[source].read_text("utf-8")
        self.names = set(re.findall(r"\w+", text)) | {"mrn", "visit", "guarantor_account", "invoice", "claim"}

    def mutate(self, record):
        """The record with one to three things changed."""
        record = copy.copy(record)
        record.headers = list(record.headers)
        for _ in range(self.random.choices((1, 2, 3), (5, 2, 1))[0]):
            self.random.choices((self._change_member, self._change_bytes, self._change_headers), (8, 2, 1))[0](record)
        return record

    def _change_member(self, record):
        try:
            body = json.loads(record.value)
        except (ValueError, RecursionError):
            return
        places = []

        def collect(node):
            for key in node if isinstance(node, dict) else range(len(node)):
                # What the mapping reads is broken far more often than what it skips.
                places.extend([(node, key)] * (20 if key in self.names else 1))
                if isinstance(node[key], (dict, list)):
                    collect(node[key])

        if isinstance(body, (dict, list)):
            collect(body)
        if not places:
            return
        node, key = self.random.choice(places)
        way = self.random.randrange(6)
        if way == 0:
            del node[key]
        elif way == 1:
            node[key] = {"id": node[key], "object": "expanded"}
        elif way == 2:
            other, elsewhere = self.random.choice(places)
            node[key] = copy.deepcopy(other[elsewhere])
        elif way == 3 and isinstance(node, dict):
            name = self.random.choice(sorted(self.names))
            node[name] = self.random.choice(ODD)
        else:
            node[key] = self.random.choice(ODD)
        record.value = json.dumps(
            body,
            ensure_ascii=self.random.random() < 0.5,
            indent=self.random.choice((None, None, 2)),
        ).encode("utf-8", "surrogatepass")

    def _change_bytes(self, record):
        body, pick = record.value, self.random
        at = pick.randrange(len(body) + 1)
        texts = [match.start() for match in re.finditer(rb'"[a-z]', body)]
        inside = pick.choice(texts) + 1 if texts else at
        way = pick.randrange(12)
        if way == 0:
            body = body[:at]
        elif way == 1:
            body = body[:at] + bytes([pick.randrange(256)]) + body[at + 1 :]
        elif way == 2:  # bytes that are no UTF-8, inside a text
            body = body[:inside] + pick.choice((b"\xff", b"\xc3", b"\xed\xa0\x80", b"\xc0\x80")) + body[inside:]
        elif way == 3:  # a letter written as an escape
            body = body[:inside] + b"\\u%04x" % body[inside] + body[inside + 1 :] if texts else body
        elif way == 4:  # escapes that are no text, and some that are
            escape = pick.choice((b"\\ud800", b"\\ud83d\\ude00", b"\\udc00x", b"\\u12g4", b"\\q", b"\\/", b"\\u0000"))
            body = body[:inside] + escape + body[inside:]
        elif way == 5:  # the same member twice
            members = re.findall(rb'("\w+"\s*:\s*(?:"[^"\\]*"|\d+|null|true|false|\{\}))\s*,', body)
            if members:
                member, other = pick.choice(members), pick.choice(members)
                name = member.split(b":")[0] + b":"
                body = body.replace(member, member + b"," + name + other.split(b":", 1)[1], 1)
        elif way == 6:  # longer than any integer that is read
            numbers = list(re.finditer(rb":\s*\d+", body))
            if numbers:
                number, size = pick.choice(numbers), pick.choice((4300, 4301, 5000, 9000))
                body = body[: number.start()] + b":" + b"7" * size + body[number.end() :]
        elif way == 7:
            body = re.sub(
                rb":\s*null", b":" + pick.choice((b"[" * 3000 + b"]" * 3000, b"01", b"1.", b"NaN")), body, count=1
            )
        elif way == 8:
            body = pick.choice(
                (b"", b"null", b"[]", b'"x"', b"5", b"{}", b"\xef\xbb\xbf" + body, body + b"x", b"[" + body + b"]")
            )
        elif way == 9:
            body = body.replace(b'"object"', b'"Object"', 1)
        elif way == 10:
            wanted = pick.choice((b'"id":" ', b'"id":"\\u0020', b'"id":"redacted\\u005d'))
            body = re.sub(rb'"id"\s*:\s*"', lambda _: wanted, body, count=pick.randint(1, 3))
        else:
            body = re.sub(
                rb":\s*(\d+)", lambda match: b":" + match[1] + pick.choice((b".0", b".50", b"e2", b"E+2", b"")), body
            )
        record.value = body

    def _change_headers(self, record):
        pick = self.random
        at = pick.randrange(len(record.headers))
        name, value = record.headers[at]
        way = pick.randrange(6)
        if way == 0:
            del record.headers[at]
        elif way == 1:
            record.headers.insert(pick.randrange(len(record.headers) + 1), (name, b"elsewhere"))
        elif way == 2:
            record.headers.append((name, value))
        elif way == 3:
            record.headers.append(("origin", pick.choice((b"", b"T0:0:7", b"\xff"))))
        elif way == 4:
            digits = pick.choice((b"", b"-5", b"12.5", "\u0661".encode(), b"0", b"9" * 30, b" 5", b"x", b"00012"))
            record.headers.append(("ingest_time", digits))
        else:
            record.headers[at] = (name, value + pick.choice((b" ", b"\xff", b"\0")))


def find_differences(normaliser, take, source, seed=1, mutants=MUTANTS):
    """Records where the short way answers otherwise than the long one, and how many it answered."""
    mutator = Mutator(source, seed)
    accounts = [participant.account for participant in normaliser._participants.values()]
    records = [build_record(source, account, body) for account in accounts for body in list_bodies(source)]
    records += [mutator.mutate(mutator.random.choice(records)) for _ in range(mutants)]
    differences, answered = [], 0
    for record in records:
        short = outcome(take, record)
        if short is None:
            continue
        answered += 1
        long = outcome(normaliser.interpret, record)
        if short != long:
            differences.append((record, short, long))
    return differences, answered, len(records)


@each
def test_compiled_mapping_answers_as_the_interpreter(source):
    normaliser = load(source)
    assert normaliser.not_compiled == ""
    differences, answered, total = find_differences(normaliser, normaliser.shortcut.take, source)
    assert differences[:1] == []
    assert answered > total * 0.4, "so few answers prove nothing"
    assert answered < total, "nothing was wrong with any record"


def swap(one, other):
    return lambda rule: replace(rule, **{one: getattr(rule, other), other: getattr(rule, one)})


def set_expression(**texts):
    return lambda rule: replace(rule, **{name: Expression(text) for name, text in texts.items()})


WRONG = {
    "two fields swapped": swap("status", "object_id"),
    "another amount": set_expression(amount="amount"),
    "a root that is no root": set_expression(root="id"),
    "another token": set_expression(token_reference="payment_method || id"),
    "a condition dropped": lambda rule: replace(rule, when=None),
    "a sign not looked at": lambda rule: replace(rule, may_be_negative=True),
    "an attribute lost": lambda rule: replace(rule, attributes=rule.attributes[1:]),
    "attributes in another order": lambda rule: replace(rule, attributes=rule.attributes[::-1]),
    "another topic": lambda rule: replace(rule, topic="settlements"),
    "another time": set_expression(occurred_at="epoch_ms(created)"),
}


@pytest.mark.parametrize("name", WRONG)
def test_code_of_a_mapping_that_is_a_little_different_is_found(name):
    normaliser = load("stripe")
    mapping = normaliser._mapping
    rules = {event_type: tuple(map(WRONG[name], declared)) for event_type, declared in mapping.rules.items()}
    wrong = Shortcut(
        replace(mapping, rules=rules), normaliser._participants.values(), normaliser._tenant, normaliser.version
    )
    differences, *_ = find_differences(normaliser, wrong.take, "stripe", mutants=300)
    assert differences

"""Intake: what is written to a raw topic, under which key and headers, and when it returns."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import json

import pytest

from schemas.failure import TemporaryError
from schemas.keys import HmacKey
from sources.contract import RawEvent
from sources.intake import Intake

SECRET = b"0123456789abcdef"
CARD = "4242424242424242"


class FakePublisher:
    def __init__(self, failing=()):
        self.records = []
        self.failing = set(failing)
        self.gate = None
        self.entered = asyncio.Queue()

    async def publish(self, topic, key, value, headers):
        number = len(self.records)
        self.records.append((topic, key, value, headers))
        self.entered.put_nowait(number)
        if number in self.failing:
            raise TemporaryError("not acknowledged.", place=topic)
        if self.gate is not None:
            await self.gate.wait()


@pytest.fixture
def counted():
    return []


@pytest.fixture
def publisher():
    return FakePublisher()


@pytest.fixture
def intake(publisher, counted):
    return build(publisher, counted)


def build(publisher, counted, **options):
    def count(name, **labels):
        counted.append((name, labels))

    return Intake(publisher, HmacKey(SECRET), clock=lambda: 1_767_322_245.678, count=count, **options)


def event(body, key="north/pi_1", delivery_id="evt_1", event_type="charge.succeeded", occurred_at=1_767_322_240.0):
    return RawEvent(key=key, body=body, delivery_id=delivery_id, event_type=event_type, occurred_at=occurred_at)


async def publish(intake, *events, content_type="application/json", members=frozenset()):
    await intake.publish(
        source="stripe",
        account="north",
        facility="clinic",
        content_type=content_type,
        verdict="stripe-v1;key=1;signed_at=1767322245",
        events=events,
        sensitive_members=members,
    )


def test_clean_event_keeps_its_bytes_and_says_where_it_is_from(intake, publisher, counted):
    body = b'{"id": "evt_1",\n "amount": 1.0}'
    asyncio.run(publish(intake, event(body)))
    ((topic, key, value, headers),) = publisher.records
    assert (topic, key, value) == ("raw.stripe", b"north/pi_1", body)
    assert headers == [
        ("ingest_time", b"1767322245678"),
        ("source", b"stripe"),
        ("account", b"north"),
        ("facility", b"clinic"),
        ("content-type", b"application/json"),
        ("verdict", b"stripe-v1;key=1;signed_at=1767322245"),
        ("received_hmac", hmac.new(SECRET, b"bytes\0" + body, "sha256").hexdigest().encode()),
        ("stored_sha256", hashlib.sha256(body).hexdigest().encode()),
        ("delivery_id", b"evt_1"),
        ("ce_specversion", b"1.0"),
        ("ce_id", b"evt_1"),
        ("ce_source", b"/stripe/north"),
        ("ce_type", b"charge.succeeded"),
        ("ce_time", b"2026-01-02T02:50:40.000Z"),
    ]
    assert counted == []


def test_redactions_are_stored_counted_and_hashed_after(intake, publisher, counted):
    body = json.dumps({"name": "Ann", "n": CARD, "m": CARD, "cvc": "123"}).encode()
    asyncio.run(publish(intake, event(body), members=frozenset({"name"})))
    _, _, value, pairs = publisher.records[0]
    headers = dict(pairs)
    assert json.loads(value) == {
        "name": "[redacted]",
        "n": "[card redacted]",
        "m": "[card redacted]",
        "cvc": "[security code redacted]",
    }
    assert headers["redacted"] == b"4"
    assert headers["stored_sha256"] == hashlib.sha256(value).hexdigest().encode()
    assert headers["received_hmac"] == hmac.new(SECRET, b"bytes\0" + body, "sha256").hexdigest().encode()
    # A plain hash of the received bytes would give the card number back by trial.
    assert hashlib.sha256(body).hexdigest() not in repr(publisher.records)
    assert counted == [
        ("redactions_total", {"source": "stripe", "kind": kind}) for kind in ("card", "security_code", "member")
    ]


def test_without_redaction_everything_stays(publisher, counted):
    body = json.dumps({"name": "Ann", "n": CARD}).encode()
    intake = build(publisher, counted, redact=False)
    asyncio.run(publish(intake, event(body, key=f"north/{CARD}"), members=frozenset({"name"})))
    _, key, value, headers = publisher.records[0]
    assert (key, value) == (f"north/{CARD}".encode(), body)
    assert "redacted" not in dict(headers)
    assert counted == []


def test_card_number_in_key_id_or_type_is_not_published(intake, publisher):
    asyncio.run(publish(intake, event(b"{}", key=f"north/{CARD}", delivery_id=CARD, event_type=f"x.{CARD}")))
    _, key, _, headers = publisher.records[0]
    assert key == b"north/[card redacted]"
    assert dict(headers)["ce_type"] == b"x.[card redacted]"
    assert CARD not in repr(publisher.records)


def test_unparsed_body_is_keyed_by_the_digest_of_what_is_stored(intake, publisher):
    body = f'{{"number": {CARD}, '.encode()
    asyncio.run(publish(intake, event(body, key="", delivery_id="", event_type="", occurred_at=None)))
    _, key, value, pairs = publisher.records[0]
    digest = hashlib.sha256(value).hexdigest()
    headers = dict(pairs)
    assert value == b'{"number": "[card redacted]", '
    assert key.decode() == f"north/{digest}"
    assert headers["delivery_id"].decode() == headers["ce_id"].decode() == digest
    assert headers["ce_type"] == b"unparsed"
    assert headers["ce_time"] == b"2026-01-02T02:50:45.678Z"


@pytest.mark.parametrize("absurd", [-1.0, 1e15, float("nan"), float("inf")])
def test_absurd_time_becomes_the_time_of_intake(intake, publisher, absurd):
    asyncio.run(publish(intake, event(b"{}", occurred_at=absurd)))
    assert dict(publisher.records[0][3])["ce_time"] == b"2026-01-02T02:50:45.678Z"


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        ("application/json; charset=utf-8", b'{"name":"Ann"}', b'{"name":"[redacted]"}'),
        ("", b' {"name":"Ann"}', b' {"name":"[redacted]"}'),
        ("text/plain", b'[{"name":"Ann"}]', b'[{"name":"[redacted]"}]'),
        ("x-application/hl7-v2+er7", b"NTE|1||4242424242424242", b"NTE|1||[card redacted]"),
        ("application/json", b"4242424242424242", b'"[card redacted]"'),
    ],
)
def test_json_is_known_by_content_type_or_first_byte(intake, publisher, content_type, body, expected):
    asyncio.run(publish(intake, event(body), content_type=content_type, members=frozenset({"name"})))
    assert publisher.records[0][2] == expected


def test_lone_surrogates_do_not_stop_a_delivery(intake, publisher):
    asyncio.run(publish(intake, event(b"{}", key="north/\ud800", delivery_id="e\ud800", event_type="t\ud800")))
    _, key, _, headers = publisher.records[0]
    assert (key, dict(headers)["ce_id"], dict(headers)["ce_type"]) == (b"north/?", b"e?", b"t?")


async def test_returns_only_when_every_event_is_acknowledged(intake, publisher):
    publisher.gate = asyncio.Event()
    bodies = [b'{"n":%d}' % number for number in range(3)]
    running = asyncio.create_task(publish(intake, *(event(body) for body in bodies)))
    for _ in bodies:
        await publisher.entered.get()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not running.done()
    publisher.gate.set()
    await running
    assert [record[2] for record in publisher.records] == bodies


@pytest.mark.parametrize("failing", [0, 1, 2])
async def test_one_missing_acknowledgement_fails_the_delivery_after_all_have_ended(counted, failing):
    publisher = FakePublisher(failing={failing})
    publisher.gate = asyncio.Event()
    events = [event(b"{}")] * 3
    running = asyncio.create_task(publish(build(publisher, counted), *events))
    for _ in range(3):
        await publisher.entered.get()
    for _ in range(10):
        await asyncio.sleep(0)
    assert not running.done()
    publisher.gate.set()
    (result,) = await asyncio.gather(running, return_exceptions=True)
    assert isinstance(result, TemporaryError)


async def test_single_event_not_acknowledged_fails(counted):
    publisher = FakePublisher(failing={0})
    with pytest.raises(TemporaryError):
        await publish(build(publisher, counted), event(b"{}"))


async def test_delivery_without_events_publishes_nothing(intake, publisher):
    await publish(intake)
    assert publisher.records == []

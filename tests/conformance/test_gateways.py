"""What every gateway connector must do: parametrised by the connectors and fixtures found, so a new one edits nothing.

Fixtures of a gateway lie in ``tests/fixtures/gateways/<name>/source/`` (for a folder of one's own see
``gateway_files``); docs/adding-a-gateway.md describes them.
"""

from __future__ import annotations

import hmac
import json
import logging
import os
import sys
from pathlib import Path

import msgspec
import pytest
from pydantic import SecretStr

from schemas.card_data import redact
from schemas.failure import Failure, FailureKind
from schemas.keys import HmacKey
from schemas.tenancy import Account
from sources.contract import Refusal
from sources.intake import Intake
from sources.receiver import build_app
from tests.conformance.gateway_files import GATEWAYS, find_fixtures, load_normaliser
from topics.headers import RawRecord

SHARED = Path(os.environ.get("REMITSTREAM_SHARED", Path(__file__).parents[3] / "shared"))
TOLERANCE = 300
WRONG_SECRET = b"not-the-secret-of-any-fixture"
VERIFICATION_REFUSALS = set(Refusal)


def read_json(name, file):
    path = find_fixtures(name) / "source" / file
    return json.loads(path.read_text("utf-8")) if path.exists() else None


def list_vectors(kind):
    for name in GATEWAYS:
        for vector in (read_json(name, "signature.json") or {}).get(kind, ()):
            yield pytest.param(name, vector, id=f"{name}-{vector['case']}")


def list_files(folder):
    for name in GATEWAYS:
        for path in sorted((find_fixtures(name) / "source" / folder).rglob("*")):
            if path.is_file():
                yield pytest.param(name, path, id=f"{name}-{path.parent.name}-{path.name}")


good = pytest.mark.parametrize(("name", "vector"), list(list_vectors("good")))
each = pytest.mark.parametrize("name", GATEWAYS)


def verify(name, vector, *, body=None, headers=None, secrets=None, now=None):
    """As the receiver calls it: header names in lower case."""
    return GATEWAYS[name].verify(
        vector["body"].encode() if body is None else body,
        {key.lower(): value for key, value in (vector["headers"] if headers is None else headers).items()},
        secrets=[vector["secret"].encode()] if secrets is None else secrets,
        now=vector["signed_at"] or 1_700_000_000 if now is None else now,
        tolerance=TOLERANCE,
    )


class RecordingPublisher:
    def __init__(self):
        self.records = []

    async def publish(self, topic, key, value, headers):
        self.records.append((topic, key, value, dict(headers)))


class Edge:
    """A receiver for one vector's account, and what came out of it."""

    def __init__(self, name, vector, *, redact=True):
        self.publisher = RecordingPublisher()
        self.counted = []
        now = vector["signed_at"] or 1_700_000_000

        def count(metric, **labels):
            self.counted.append((metric, labels))

        self.path = f"/webhooks/{name}/north"
        account = Account(name="north", source=name, facility="north", secrets=(SecretStr(vector["secret"]),))
        intake = Intake(self.publisher, HmacKey(b"k" * 32), clock=lambda: float(now), redact=redact, count=count)
        self.app = build_app(
            gateways=GATEWAYS, accounts=[account], intake=intake, count=count, clock=lambda: float(now)
        )

    async def post(self, headers, body):
        sent = []
        messages = [{"type": "http.request", "body": body, "more_body": False}]

        async def receive():
            return messages.pop(0)

        async def send(message):
            sent.append(message)

        pairs = [(key.encode(), value.encode("latin-1")) for key, value in headers]
        scope = {"type": "http", "method": "POST", "path": self.path, "headers": pairs}
        await self.app(scope, receive, send)
        return sent[0]["status"]


# Fixtures themselves


@each
def test_gateway_has_fixtures_of_every_kind(name):
    signature = read_json(name, "signature.json")
    assert signature is not None, f"write {find_fixtures(name) / 'source' / 'signature.json'}"
    assert signature["good"]
    assert signature["bad"]
    assert list((find_fixtures(name) / "source" / "roots").glob("*/*"))
    assert list((find_fixtures(name) / "source" / "refused").iterdir())
    if signature["key_roll"]:
        assert [vector for vector in signature["good"] if vector.get("key_roll")]
    if GATEWAYS[name].sensitive_members:
        assert read_json(name, "sensitive.json") is not None


# Signature


@good
def test_exact_vector_is_accepted(name, vector):
    verdict = verify(name, vector)
    assert verdict.refusal is None
    assert verdict.key_id == "1"
    assert verdict.scheme
    assert verdict.signed_at == vector["signed_at"]


@pytest.mark.parametrize(("name", "vector"), list(list_vectors("bad")))
def test_bad_vector_is_refused(name, vector):
    assert verify(name, vector).refusal in VERIFICATION_REFUSALS


@good
def test_one_changed_byte_is_refused(name, vector):
    body = vector["body"].encode()
    for position in {0, len(body) // 2, len(body) - 1}:
        changed = body[:position] + bytes([body[position] ^ 1]) + body[position + 1 :]
        assert verify(name, vector, body=changed).refusal is Refusal.SIGNATURE_WRONG


@good
def test_body_written_again_is_refused(name, vector):
    body = vector["body"].encode()
    parsed = json.loads(body)
    again = {
        json.dumps(parsed).encode(),
        json.dumps(parsed, separators=(",", ":")).encode(),
        json.dumps(parsed, indent=2, sort_keys=True, ensure_ascii=False).encode(),
    } - {body}
    assert again
    for rewritten in again:
        assert verify(name, vector, body=rewritten).refusal is Refusal.SIGNATURE_WRONG


@good
@pytest.mark.parametrize("end", [b"\n", b"\r\n", b" ", b"\0"])
def test_trailing_bytes_are_refused(name, vector, end):
    assert verify(name, vector, body=vector["body"].encode() + end).refusal is Refusal.SIGNATURE_WRONG


@good
def test_empty_body_is_refused(name, vector):
    assert verify(name, vector, body=b"").refusal is Refusal.SIGNATURE_WRONG


@good
def test_missing_header_is_refused(name, vector):
    header = read_json(name, "signature.json")["header"].lower()
    rest = {key: value for key, value in vector["headers"].items() if key.lower() != header}
    assert len(rest) == len(vector["headers"]) - 1
    assert verify(name, vector, headers=rest).refusal is Refusal.SIGNATURE_MISSING


@good
def test_wrong_secret_is_refused(name, vector):
    assert verify(name, vector, secrets=[WRONG_SECRET]).refusal is Refusal.SIGNATURE_WRONG
    assert verify(name, vector, secrets=[]).refusal is Refusal.SIGNATURE_WRONG


@good
def test_either_of_two_secrets_is_accepted_and_named(name, vector):
    secret = vector["secret"].encode()
    first = verify(name, vector, secrets=[secret, WRONG_SECRET])
    second = verify(name, vector, secrets=[WRONG_SECRET, secret])
    assert (first.refusal, first.key_id) == (None, "1")
    assert (second.refusal, second.key_id) == (None, "2")


@good
def test_time_beyond_the_bound_is_stale_in_both_directions(name, vector):
    signed_at = vector["signed_at"]
    if signed_at is None:
        # No time in this vendor's signature: then none may be claimed, and a delivery's age cannot matter.
        assert verify(name, vector, now=4_000_000_000).refusal is None
        return
    for distance in (TOLERANCE, -TOLERANCE):
        assert verify(name, vector, now=signed_at + distance).refusal is None
    for distance in (TOLERANCE + 1, -TOLERANCE - 1, 10**9, -(10**9)):
        assert verify(name, vector, now=signed_at + distance).refusal is Refusal.TIMESTAMP_STALE


@good
def test_stale_is_said_of_genuine_deliveries_only(name, vector):
    if vector["signed_at"] is not None:
        late = vector["signed_at"] + 10 * TOLERANCE
        assert verify(name, vector, now=late, secrets=[WRONG_SECRET]).refusal is Refusal.SIGNATURE_WRONG


@good
def test_signatures_are_compared_in_constant_time(name, vector, monkeypatch):
    if read_json(name, "signature.json")["algorithm"] != "hmac":
        pytest.skip("no shared secret to protect")
    compared = []
    genuine = hmac.compare_digest

    def compare_digest(a, b):
        compared.append((a, b))
        return genuine(a, b)

    monkeypatch.setattr(hmac, "compare_digest", compare_digest)
    module = sys.modules[GATEWAYS[name].verify.__module__]
    if hasattr(module, "compare_digest"):
        monkeypatch.setattr(module, "compare_digest", compare_digest)
    secret = vector["secret"].encode()
    # The matching secret first: the second must be tried all the same.
    assert verify(name, vector, secrets=[secret, WRONG_SECRET]).refusal is None
    both = len(compared)
    compared.clear()
    verify(name, vector, secrets=[secret])
    assert compared
    assert both == 2 * len(compared)


@good
async def test_header_name_may_have_any_case(name, vector):
    for change in (str.upper, str.lower, str.title):
        edge = Edge(name, vector)
        headers = [(change(key), value) for key, value in vector["headers"].items()]
        assert await edge.post(headers, vector["body"].encode()) == 200
        assert len(edge.publisher.records) >= 1


@good
async def test_repeated_header_is_refused(name, vector):
    header = read_json(name, "signature.json")["header"].lower()
    headers = [*vector["headers"].items()]
    headers += [(key, value) for key, value in headers if key.lower() == header]
    edge = Edge(name, vector)
    assert await edge.post(headers, vector["body"].encode()) == 401
    assert edge.publisher.records == []


@pytest.mark.parametrize(("name", "vector"), list(list_vectors("bad")))
async def test_refused_delivery_publishes_nothing(name, vector):
    edge = Edge(name, vector)
    headers = [(key, value.encode("utf-8").decode("latin-1")) for key, value in vector["headers"].items()]
    assert await edge.post(headers, vector["body"].encode()) == 401
    assert edge.publisher.records == []
    assert [metric for metric, _ in edge.counted] == ["refused_total"]


def list_shared_vectors():
    path = SHARED / "specs" / "webhook-signature-vectors.json"
    if not path.exists():
        return
    for number, vector in enumerate(json.loads(path.read_text("utf-8"))["vectors"]):
        if vector["vendor"] in GATEWAYS and "secret" in vector and "notification_url" not in vector:
            yield pytest.param(vector, path.parent, id=f"{vector['vendor']}-{number}")


@pytest.mark.parametrize(("vector", "folder"), list(list_shared_vectors()))
def test_vector_of_the_specifications_is_accepted(vector, folder):
    body = vector["body"].encode() if "body" in vector else (folder / vector["body_file"]).read_bytes().rstrip(b"\n")
    known = {
        "body": "",
        "headers": {vector["header"]: vector.get("header_value") or vector["signature"]},
        "secret": vector["secret"],
        "signed_at": vector.get("timestamp"),
    }
    assert verify(vector["vendor"], known, body=body).refusal is None
    assert verify(vector["vendor"], known, body=body + b"\n").refusal is Refusal.SIGNATURE_WRONG


# Split


@pytest.mark.parametrize(("name", "path"), list(list_files("roots")))
def test_every_form_of_a_root_has_its_key(name, path):
    body = path.read_bytes()
    events = GATEWAYS[name].split(body)
    assert events
    for event in events:
        assert event.key == path.parent.name
        assert event.body in body
        assert event.delivery_id
        assert event.event_type


@each
def test_some_root_has_several_forms(name):
    forms = [len(list(folder.iterdir())) for folder in (find_fixtures(name) / "source" / "roots").iterdir()]
    assert max(forms) > 1


@pytest.mark.parametrize(("name", "path"), list(list_files("refused")))
def test_what_cannot_be_split_is_invalid_with_its_code(name, path):
    with pytest.raises(Failure) as raised:
        GATEWAYS[name].split(path.read_bytes())
    assert raised.value.kind is FailureKind.INVALID
    assert raised.value.code == path.name.split(".")[0]


@pytest.mark.parametrize("body", [b"", b"\xff\xfe", b"null", b"0", b'"x"', b"[" * 100_000, b'{"data":' * 100_000])
@each
def test_hostile_bodies_are_invalid_not_an_error(name, body):
    with pytest.raises(Failure) as raised:
        GATEWAYS[name].split(body)
    assert raised.value.kind is FailureKind.INVALID


# Privacy


def find_members(value, names, path=()):
    """Pairs of (member name, string value), metadata objects left out."""
    if isinstance(value, list):
        for item in value:
            yield from find_members(item, names)
    if isinstance(value, dict):
        for key, item in value.items():
            if key == "metadata":
                continue
            if key in names and isinstance(item, str):
                yield key, item
            yield from find_members(item, names)


async def publish(name, body, *, redact=True):
    publisher = RecordingPublisher()
    intake = Intake(publisher, HmacKey(b"k" * 32), clock=lambda: 1.0, redact=redact, count=lambda *_, **__: None)
    gateway = GATEWAYS[name]
    await intake.publish(
        source=name,
        account="north",
        facility="north",
        content_type="application/json",
        verdict="test",
        events=gateway.split(body),
        sensitive_members=gateway.sensitive_members,
    )
    return publisher.records


def with_sensitive_members():
    return [name for name in GATEWAYS if GATEWAYS[name].sensitive_members]


@pytest.mark.parametrize("name", with_sensitive_members())
async def test_sensitive_members_are_emptied_and_the_rest_kept(name):
    fixture = read_json(name, "sensitive.json")
    names = GATEWAYS[name].sensitive_members
    before = dict(find_members(json.loads(fixture["body"]), names))
    assert set(before) == set(names), "the fixture proves every declared member"
    records = await publish(name, fixture["body"].encode())
    stored = b"".join(value for _, _, value, _ in records).decode()
    whole = repr(records)
    for _, _, value, _ in records:
        assert {text for _, text in find_members(json.loads(value), names)} <= {"[redacted]"}
    for text in fixture["gone"]:
        assert text in fixture["body"]
        assert text not in whole
    for text in fixture["kept"]:
        assert text in stored


@pytest.mark.parametrize("name", with_sensitive_members())
async def test_without_redaction_the_same_search_finds_everything(name):
    fixture = read_json(name, "sensitive.json")
    records = await publish(name, fixture["body"].encode(), redact=False)
    stored = b"".join(value for _, _, value, _ in records).decode()
    for text in fixture["gone"]:
        assert text in stored


@good
async def test_secrets_and_signatures_are_in_no_repr_record_or_log(name, vector, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    edge = Edge(name, vector)
    header = read_json(name, "signature.json")["header"]
    signature = vector["headers"][header]
    headers = [*vector["headers"].items()]
    assert await edge.post(headers, vector["body"].encode()) == 200
    assert await edge.post(headers, vector["body"].encode() + b" ") == 401
    shown = "\n".join((
        caplog.text,
        *capsys.readouterr(),
        repr(edge.app),
        repr(vars(edge.app)),
        repr(GATEWAYS[name]),
        repr(verify(name, vector)),
        repr(edge.publisher.records),
        repr(edge.counted),
    ))  # fmt: skip
    assert "north" in shown
    assert vector["secret"] not in shown
    assert signature not in shown


def is_object(body):
    try:
        return isinstance(json.loads(body), dict)
    except ValueError:
        return False


def list_normalise_cases():
    """Bodies in which members can be planted."""
    for name in with_sensitive_members():
        for path in sorted((find_fixtures(name) / "normalise").glob("*.raw.json")):
            if is_object(path.read_bytes()):
                yield pytest.param(name, path, id=f"{name}-{path.name}")


def read_outcome(name, value, headers):
    """What the streams make of a stored body, as plain data."""
    normaliser = load_normaliser(name, overlays=False)
    record = RawRecord(hop="T:0:0", partition=0, offset=0, key=b"k", value=value, headers=headers, timestamp=1)
    try:
        return msgspec.to_builtins(normaliser.normalise(record))
    except Failure as failure:
        return str(failure)


def plant_members(value, names):
    """The same document with every sensitive member, filled, in every object but metadata."""
    if isinstance(value, list):
        return [plant_members(item, names) for item in value]
    if isinstance(value, dict):
        planted = {key: item if key == "metadata" else plant_members(item, names) for key, item in value.items()}
        return planted | dict.fromkeys(names, "Planted")
    return value


@pytest.mark.parametrize(("name", "path"), list(list_normalise_cases()))
def test_what_the_edge_empties_is_read_by_no_mapping(name, path):
    body = path.read_bytes()
    expected = json.loads(path.with_name(path.name.replace(".raw.", ".expected.")).read_text("utf-8"))
    headers = [
        ("ingest_time", b"1767500000123"),
        ("source", name.encode()),
        ("account", expected["account"].encode()),
        ("facility", expected["facility"].encode()),
    ]
    names = GATEWAYS[name].sensitive_members
    planted = json.dumps(plant_members(json.loads(body), names)).encode()
    stored = redact(planted, json=True, sensitive_members=names)
    assert stored.members >= len(names)
    assert b"Planted" not in stored.body
    assert read_outcome(name, stored.body, headers) == read_outcome(name, body, headers)

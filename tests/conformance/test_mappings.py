"""What every mapping must do: parametrised by the mapping files and fixtures found, so a new gateway edits nothing.

Fixtures lie in ``tests/fixtures/gateways/<source>/normalise/``: ``tenancy.json``, and per case ``<case>.raw.json`` (the
body as stored) with ``<case>.expected.json`` (typed by hand). docs/mappings.md describes them. For a folder of one's
own see ``gateway_files``.
"""

from __future__ import annotations

import json

import msgspec
import pytest

from schemas.failure import Failure
from schemas.mapping import check_files, load_source
from schemas.money import EXPONENTS
from streams.normalise import Ignored
from tests.conformance.gateway_files import GATEWAYS, MAPPING_FILES, ROOT, find_fixtures
from tests.conformance.gateway_files import load_normaliser as load
from topics.headers import RawRecord

SOURCES = sorted(MAPPING_FILES)
FILES = sorted(
    [
        *MAPPING_FILES.values(),
        *(ROOT / "sinks" / "mappings").glob("*.yaml"),
        *(ROOT / "examples" / "overlays").glob("*.yaml"),
    ]
)
INGEST_TIME = 1_767_500_000_123

each = pytest.mark.parametrize("source", SOURCES)


def list_cases(source):
    return sorted(
        path.name.removesuffix(".raw.json") for path in (find_fixtures(source) / "normalise").glob("*.raw.json")
    )


def read_case(source, case):
    folder = find_fixtures(source) / "normalise"
    return (folder / f"{case}.raw.json").read_bytes(), json.loads((folder / f"{case}.expected.json").read_text("utf-8"))


FACTS = [(source, case) for source in SOURCES for case in list_cases(source) if "event" in read_case(source, case)[1]]


def build_record(source, body, expected, *, origin=None):
    headers = [
        ("ingest_time", str(INGEST_TIME).encode()),
        ("source", source.encode()),
        ("account", expected["account"].encode()),
        ("facility", expected["facility"].encode()),
    ]
    if origin:
        headers.append(("origin", origin.encode()))
    return RawRecord(hop="T1:3:42", partition=3, offset=42, key=b"k", value=body, headers=headers, timestamp=1)


def describe(normaliser, record):
    """The outcome in the form of an expected document."""
    try:
        found = normaliser.normalise(record)
    except Failure as failure:
        return {"failure": {"kind": failure.kind.value, "code": failure.code, "field": failure.field}}
    if isinstance(found, Ignored):
        return {"ignored": msgspec.to_builtins(found)}
    event = msgspec.to_builtins(found.event)
    assert event.pop("mapping_version") == normaliser.version
    return {
        "topic": found.topic,
        "is_root": found.is_root,
        "needs_patient": found.needs_patient,
        "patient_named": found.patient_named,
        "facts": list(found.facts),
        "event": event,
    }


cases = pytest.mark.parametrize(
    ("source", "case"), [(source, case) for source in SOURCES for case in list_cases(source)]
)


@pytest.mark.parametrize("path", FILES, ids=lambda path: f"{path.parent.name}/{path.name}")
def test_file_lints_clean_and_its_examples_hold(path):
    assert [str(problem) for problem in check_files([path])] == []


def test_mapping_folder_is_not_empty():
    assert "stripe" in SOURCES


@each
def test_source_mapping_has_its_connector(source):
    assert source in GATEWAYS


@cases
def test_raw_body_gives_the_expected_outcome(source, case):
    body, expected = read_case(source, case)
    wanted = {name: value for name, value in expected.items() if name not in {"account", "facility"}}
    assert describe(load(source), build_record(source, body, expected)) == wanted


@pytest.mark.parametrize(("source", "case"), FACTS)
def test_root_is_the_raw_key(source, case):
    """A child and its root meet in one raw partition only if mapping and connector name the same root."""
    body, expected = read_case(source, case)
    (raw,) = GATEWAYS[source].split(body)
    assert (
        describe(load(source), build_record(source, body, expected))["event"]["root"]
        == f"{expected['account']}/{raw.key}"
    )


@each
def test_every_declared_event_type_has_a_canonical_fixture(source):
    normaliser = load(source)
    found = [
        normaliser.normalise(build_record(source, *read_case(source, case))) for name, case in FACTS if name == source
    ]
    mapping = load_source(MAPPING_FILES[source])
    declared = {(event_type, rule.kind.value) for event_type, rules in mapping.rules.items() for rule in rules}
    assert declared == {(outcome.event_type, outcome.event.kind) for outcome in found}


@each
def test_every_way_out_has_a_fixture(source):
    found = [read_case(source, case)[1] for case in list_cases(source)]
    reasons = {expected["ignored"]["reason"] for expected in found if "ignored" in expected}
    assert reasons == {"EVIDENCE", "NOT_MONEY", "UNKNOWN_TYPE"}
    codes = {expected["failure"]["code"] for expected in found if "failure" in expected}
    assert codes >= {
        "BODY_INVALID",
        "AMOUNT_MISSING",
        "AMOUNT_INVALID",
        "UNKNOWN_CURRENCY",
        "FIELD_MISSING",
        "PAN_IN_REFERENCE",
        "ACCOUNT_UNKNOWN",
    }


@each
def test_currencies_with_no_two_and_three_decimals_have_fixtures(source):
    currencies = {read_case(*fact)[1]["event"]["money"]["currency"] for fact in FACTS if fact[0] == source}
    assert {EXPONENTS[currency] for currency in currencies} >= {0, 2, 3}


@cases
def test_same_record_gives_the_same_outcome_after_a_reload(source, case):
    body, expected = read_case(source, case)
    record = build_record(source, body, expected)
    assert describe(load(source), record) == describe(load(source), record)


@pytest.mark.parametrize(("source", "case"), FACTS)
def test_redriven_record_keeps_its_origin(source, case):
    body, expected = read_case(source, case)
    again = describe(load(source), build_record(source, body, expected, origin="T0:0:7"))
    assert again["event"] == expected["event"] | {"origin": "T0:0:7"}


@pytest.mark.parametrize(("source", "case"), FACTS)
def test_members_outside_the_mapping_and_spelling_change_nothing(source, case):
    """Deliveries of one event differ in counters, request ids and white space; the event must not."""
    body, expected = read_case(source, case)
    other = json.loads(body) | {"pending_webhooks": 7, "request": {"id": "req_9", "idempotency_key": "k"}}
    record = build_record(source, json.dumps(other, indent=1).encode(), expected)
    assert describe(load(source), record)["event"] == expected["event"]

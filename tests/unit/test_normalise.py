"""The normaliser: who an event is about, versions, overlays, what is refused at load."""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import Reference
from schemas.failure import Failure, FailureKind
from schemas.mapping import MappingError
from schemas.mapping_source import TOPICS
from schemas.tenancy import Tenancy
from streams.normalise import MAPPINGS, Ignored, Normaliser
from topics.catalog import CANONICAL_MONEY
from topics.headers import RawRecord

OVERLAYS = Path(__file__).parents[2] / "examples" / "overlays"


def build_tenancy(*, overlay=None, **patient):
    account = {"name": "main", "source": "stripe", "facility": "north", "secrets": ["x"], "patient": patient}
    facility = {
        "id": "north",
        "time_zone": "America/Chicago",
        "default_authority": "NORTH",
        "authorities": [{"name": "NORTH"}, {"name": "STATE", "aliases": ["1.2.3"]}],
        "mapping_overlay": None if overlay is None else str(overlay),
    }
    return Tenancy.model_validate({"tenant": "riverside", "facilities": [facility], "accounts": [account]})


def build_body(event_type="payment_intent.succeeded", **members):
    focus = {
        "id": "pi_1",
        "amount": 500,
        "amount_received": 500,
        "currency": "usd",
        "status": "succeeded",
        "metadata": {"mrn": "100042"},
    } | members
    return json.dumps({"id": "evt_1", "type": event_type, "created": 1_767_225_600, "data": {"object": focus}}).encode()


def build_record(body, **headers):
    named = {"ingest_time": "1767225601000", "source": "stripe", "account": "main", "facility": "north"} | headers
    return RawRecord(
        hop="t:0:1",
        partition=0,
        offset=1,
        key=b"main/pi_1",
        value=body,
        headers=[(name, text.encode()) for name, text in named.items() if text is not None],
        timestamp=0,
    )


def normalise(body, tenancy=None, **headers):
    return Normaliser.load("stripe", tenancy or build_tenancy()).normalise(build_record(body, **headers))


def fail(body, tenancy=None, **headers):
    with pytest.raises(Failure) as caught:
        normalise(body, tenancy, **headers)
    return caught.value.kind, caught.value.code, caught.value.field


@pytest.fixture
def overlay(tmp_path):
    def write(attributes, facility="north", source="stripe"):
        path = tmp_path / "overlay.yaml"
        lines = "\n".join(f"      {line}" for line in attributes.splitlines())
        path.write_text(
            f"facility: {facility}\nsources:\n  {source}:\n    attributes:\n{lines}\n"
            "    examples: [{name: nothing there, given: {object: {}}, then: {}}]\n",
            "utf-8",
        )
        return path

    return write


def test_event_id_is_the_hash_of_the_money_fact():
    event = normalise(build_body()).event
    assert event.transaction_key == "stripe:main:capture:pi_1"
    assert event.event_id == hashlib.sha256(b"stripe:main:capture:pi_1").hexdigest()[:32]
    assert (event.received_at, event.origin, event.tenant) == (1_767_225_601_000, "t:0:1", "riverside")


def test_sister_events_of_one_legacy_charge_name_the_same_fact():
    charge = {"id": "ch_1", "amount_captured": 500, "captured": True, "payment_intent": None}
    at_once, later = (normalise(build_body(name, **charge)) for name in ("charge.succeeded", "charge.captured"))
    assert at_once.event.event_id == later.event.event_id
    assert at_once.facts == later.facts


def test_events_of_one_dispute_are_different_facts():
    names = ("created", "funds_withdrawn", "funds_reinstated", "closed")
    found = [normalise(build_body(f"charge.dispute.{name}", id="du_1", payment_intent="pi_1")).event for name in names]
    assert len({event.event_id for event in found}) == len(names)
    assert {event.root for event in found} == {"main/pi_1"}


def test_facts_hold_no_person_and_no_delivery():
    found = normalise(build_body(metadata={"mrn": "100042", "visit": "V77", "claim": "C77"}))
    assert found.facts == ("capture", "pi_1", "main/pi_1", "500", "USD", "succeeded")


@pytest.mark.parametrize("named", ["STATE", "1.2.3"])
def test_named_authority_is_resolved_by_any_spelling(named):
    event = normalise(build_body(metadata={"mrn": "7", "assigning_authority": named, "visit": "V1"})).event
    assert event.patient == Reference("STATE", "MR", "7")
    assert event.visit == Reference("NORTH", "VN", "V1")  # a visit has an authority of its own


def test_each_reference_may_name_its_own_authority():
    metadata = {"visit": "V1", "visit_assigning_authority": "1.2.3", "guarantor_account": "G1"}
    found = normalise(build_body(metadata=metadata))
    assert found.event.visit == Reference("STATE", "VN", "V1")
    assert found.event.guarantor_account == Reference("NORTH", "AN", "G1")
    assert (found.event.patient, found.patient_named, found.needs_patient) == (None, False, True)


@pytest.mark.parametrize("key", ["assigning_authority", "visit_assigning_authority"])
def test_unknown_authority_is_a_dead_letter(key):
    body = build_body(metadata={"mrn": "7", "visit": "V1", key: "ELSEWHERE"})
    assert fail(body) == (FailureKind.INVALID, "AUTHORITY_UNKNOWN", "assigning_authority")


def test_patient_rule_of_the_account_says_where_to_look():
    tenancy = build_tenancy(
        metadata_key="acct", id_type="AN", authority_key=None, visit_key=None, guarantor_key=None, invoice_key="inv"
    )
    metadata = {"acct": " A1 ", "mrn": "7", "visit": "V", "assigning_authority": "ELSEWHERE", "inv": 12, "claim": ""}
    event = normalise(build_body(metadata=metadata), tenancy).event
    assert event.patient == Reference("NORTH", "AN", "A1")
    assert (event.visit, event.guarantor_account, event.invoice, event.claim) == (None, None, "12", None)


@pytest.mark.parametrize("metadata", [None, {}, [], "text", {"mrn": None}, {"mrn": "  "}])
def test_absent_patient_is_no_failure_here(metadata):
    assert not normalise(build_body(metadata=metadata)).patient_named


def test_settlement_never_names_a_person(overlay):
    found = normalise(build_body("payout.paid", id="po_1", metadata={"mrn": "7", "visit": "V1", "claim": "C"}))
    assert (found.topic, found.needs_patient, found.patient_named) == ("settlements", False, False)
    event = found.event
    assert (event.patient, event.visit, event.claim) == (None, None, None)


@pytest.mark.parametrize("value", [True, False, [], {"id": "pi_2"}])
def test_id_is_text_or_a_whole_number(value):
    kind, code, field = fail(build_body("payout.paid", id=value))
    assert (kind, field) == (FailureKind.INVALID, "object_id")
    assert code == "FIELD_INVALID"
    assert normalise(build_body("payout.paid", id=17)).event.object_id == "17"


@pytest.mark.parametrize(
    ("headers", "failure"),
    [
        ({"source": "square"}, (FailureKind.INVALID, "SOURCE_MISMATCH", "source")),
        ({"source": None}, (FailureKind.INVALID, "HEADER_MISSING", "source")),
        ({"account": "other"}, (FailureKind.INVALID, "ACCOUNT_UNKNOWN", "account")),
        ({"facility": "south"}, (FailureKind.INVALID, "FACILITY_MISMATCH", "facility")),
        ({"ingest_time": None}, (FailureKind.INVALID, "HEADER_MISSING", "ingest_time")),
        ({"ingest_time": "soon"}, (FailureKind.INVALID, "HEADER_INVALID", "ingest_time")),
        ({"ingest_time": "-5"}, (FailureKind.INVALID, "HEADER_INVALID", "ingest_time")),
    ],
)
def test_wrong_headers_are_dead_letters(headers, failure):
    assert fail(build_body(), **headers) == failure


@pytest.mark.parametrize(
    ("members", "field"),
    [
        ({"id": "[card redacted]"}, "object_id"),
        ({"payment_method": "x[card redacted]"}, "token_reference"),
        ({"status": "[track redacted]"}, "status"),
        ({"metadata": {"mrn": "[security code redacted]"}}, "patient"),
        ({"metadata": {"visit": "[card redacted]"}}, "visit"),
        ({"metadata": {"guarantor_account": "[card redacted]"}}, "guarantor_account"),
        ({"metadata": {"mrn": "1", "assigning_authority": "[card redacted]"}}, "assigning_authority"),
        ({"metadata": {"claim": "[card redacted]"}}, "claim"),
    ],
)
def test_card_text_in_a_needed_field_is_a_dead_letter(members, field):
    assert fail(build_body(**members)) == (FailureKind.INVALID, "PAN_IN_REFERENCE", field)


def test_card_text_in_an_optional_attribute_is_kept_as_redacted():
    event = normalise(build_body(statement_descriptor_suffix="NOTE [card redacted]")).event
    assert event.attributes == {"statement_descriptor_suffix": "NOTE [card redacted]"}


def test_member_emptied_at_the_edge_cannot_be_a_reference():
    assert fail(build_body(id="[redacted]")) == (FailureKind.INVALID, "FIELD_REDACTED", "object_id")


NORMALISER = Normaliser.load("stripe", build_tenancy())
json_values = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3)
        | st.dictionaries(st.sampled_from(["id", "type", "created", "data", "object"]), inner, max_size=4)
    ),
    max_leaves=15,
)


def outline(body):
    try:
        return NORMALISER.normalise(build_record(body))
    except Failure as failure:
        return failure


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=80) | json_values.map(lambda value: json.dumps(value).encode()))
def test_any_bytes_give_an_outcome_or_a_failure(body):
    outcome = outline(body)
    # No such body is a whole event.
    assert isinstance(outcome, Ignored) or outcome.kind in {FailureKind.INVALID, FailureKind.UNMAPPED}


@settings(max_examples=200, deadline=None)
@given(
    st.sampled_from(
        ["id", "amount_received", "currency", "status", "metadata", "payment_method", "payment_method_types"]
    ),
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5) | st.lists(st.integers(), max_size=2),
)
def test_no_value_of_a_member_breaks_the_code(member, value):
    outcome = outline(build_body(**{member: value}))
    if isinstance(outcome, Failure):
        assert outcome.kind in {FailureKind.INVALID, FailureKind.UNMAPPED}
    else:
        assert outcome.event.money.minor > 0
        assert all(isinstance(text, str) for text in outcome.event.attributes.values())


def test_version_names_source_version_and_content(tmp_path):
    plain = Normaliser.load("stripe", build_tenancy())
    assert plain.version.startswith("stripe/1/")
    assert len(plain.version.rpartition("/")[2]) == 12
    assert Normaliser.load("stripe", build_tenancy()).version == plain.version
    with_overlay = Normaliser.load("stripe", build_tenancy(overlay=OVERLAYS / "north.yaml"))
    assert with_overlay.version != plain.version
    text = (MAPPINGS / "stripe.yaml").read_text("utf-8")
    (tmp_path / "stripe.yaml").write_text(text + "# changed\n", "utf-8")
    assert Normaliser.load("stripe", build_tenancy(), tmp_path).version != plain.version


def test_overlay_adds_and_replaces_attributes_only(overlay):
    path = overlay("statement_descriptor_suffix: upper(metadata.desk)\nfloor: metadata.floor\nurgent: metadata.urgent")
    metadata = {"mrn": "1", "desk": "d4", "floor": 3, "urgent": False}
    plain = normalise(build_body(metadata=metadata, statement_descriptor_suffix="S")).event
    own = normalise(build_body(metadata=metadata, statement_descriptor_suffix="S"), build_tenancy(overlay=path)).event
    assert own.attributes == {"statement_descriptor_suffix": "D4", "floor": "3", "urgent": "false"}
    for name in plain.__struct_fields__:
        if name not in {"attributes", "mapping_version"}:
            assert getattr(own, name) == getattr(plain, name)


def test_required_attribute_and_wrong_type_are_dead_letters(overlay):
    needed = build_tenancy(overlay=overlay("desk: {expr: metadata.desk, required: true, kinds: [refund]}"))
    assert normalise(build_body(), needed).event.attributes == {}
    refund = build_body("refund.created", id="re_1", payment_intent="pi_1")
    assert fail(refund, needed) == (FailureKind.UNMAPPED, "FIELD_MISSING", "attributes.desk")
    typed = build_tenancy(overlay=overlay("desk: metadata.desk"))
    body = build_body(metadata={"desk": {"no": 4}})
    assert fail(body, typed) == (FailureKind.INVALID, "FIELD_INVALID", "attributes.desk")


def test_overlay_for_another_source_is_left_alone(overlay):
    tenancy = build_tenancy(overlay=overlay("desk: metadata.desk", source="acme"))
    assert normalise(build_body(metadata={"desk": "4"}), tenancy).event.attributes == {}


@pytest.mark.parametrize(
    "expression",
    [
        "metadata.mrn",
        "upper(metadata.mrn)",
        "metadata.visit || metadata.desk",
        "metadata",
        "(@ && desk) || metadata.desk",
        "metadata.claim",
        "metadata.*",
    ],
)
def test_attribute_must_not_smuggle_a_patient(overlay, expression):
    path = overlay(f'who: "{expression}"')
    with pytest.raises(MappingError, match="names the patient of account `main`"):
        Normaliser.load("stripe", build_tenancy(overlay=path))


def test_patient_rule_decides_which_member_is_protected(overlay):
    path = overlay("desk: metadata.mrn")
    tenancy = build_tenancy(overlay=path, metadata_key="acct")
    assert normalise(build_body(), tenancy).event.attributes == {"desk": "100042"}


def test_attribute_marked_phi_is_refused_unless_allowed(overlay):
    tenancy = build_tenancy(overlay=overlay("ward: {expr: metadata.mrn, sensitivity: phi}"))
    with pytest.raises(MappingError, match="marked phi"):
        Normaliser.load("stripe", tenancy)
    allowed = Normaliser.load("stripe", tenancy, allow_phi_attributes=True)
    assert allowed.phi_attributes == {"ward"}
    assert allowed.normalise(build_record(build_body())).event.attributes == {"ward": "100042"}


def test_phi_attribute_stays_out_of_settlements(overlay):
    tenancy = build_tenancy(overlay=overlay("ward: {expr: metadata.mrn, sensitivity: phi}"))
    normaliser = Normaliser.load("stripe", tenancy, allow_phi_attributes=True)
    found = normaliser.normalise(build_record(build_body("payout.paid", id="po_1")))
    assert found.event.attributes == {}


def test_overlay_of_another_facility_is_refused(overlay):
    with pytest.raises(MappingError, match="of facility `south`, not `north`"):
        Normaliser.load("stripe", build_tenancy(overlay=overlay("a: metadata.a", facility="south")))


def test_all_problems_of_all_files_come_at_once(overlay, tmp_path):
    path = overlay("who: metadata.mrn\nother: metadata.visit")
    with pytest.raises(MappingError) as caught:
        Normaliser.load("stripe", build_tenancy(overlay=path))
    assert [problem.field for problem in caught.value.problems] == ["attributes.who", "attributes.other"]
    with pytest.raises(MappingError, match="cannot be read"):
        Normaliser.load("stripe", build_tenancy(overlay=tmp_path / "absent.yaml"))


def test_mapping_of_another_source_is_refused(tmp_path):
    shutil.copy(MAPPINGS / "stripe.yaml", tmp_path / "square.yaml")
    with pytest.raises(MappingError, match="of source `stripe`"):
        Normaliser.load("square", build_tenancy(), tmp_path)
    with pytest.raises(MappingError, match="cannot be read"):
        Normaliser.load("absent", build_tenancy(), tmp_path)


def test_topics_of_mappings_are_the_money_topics():
    assert set(CANONICAL_MONEY) == TOPICS

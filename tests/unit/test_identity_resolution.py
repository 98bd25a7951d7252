"""From identifier to patient: chains, circles, contradictions, and the same text under two authorities."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from identity.resolution import MAX_STEPS, Ambiguous, Entry, Known, Unknown, Walk, build_entry
from schemas.events import PatientRecord, Reference
from schemas.keys import HmacKey

KEY = HmacKey(b"sixteen bytes or more")


def ref(value, authority="NORTH", id_type="MR"):
    return Reference(authority, id_type, value)


def record(identifier, *, status="active", mrn=None, merged_into=None):
    return PatientRecord(
        tenant="t", facility="north", identifier=identifier, status=status, mrn=mrn, merged_into=merged_into,
        feed="f", source_event_id="m1", message_type="ADT^A08", occurred_at=1, received_at=2,
        mapping_version="1", origin="x:0:0",
    )  # fmt: skip


def active(identifier):
    return record(identifier, mrn=identifier)


def merged(identifier, survivor):
    return record(identifier, status="merged", mrn=identifier, merged_into=survivor)


def resolve(records, reference):
    entries = {KEY.hash_identifier(r.identifier): build_entry(r, KEY, "e") for r in records}
    walk = Walk(KEY.hash_identifier(reference))
    while walk.result is None:
        walk.step(entries.get(walk.wanted))
    return walk.result


A, B, C = ref("A"), ref("B"), ref("C")
VISIT = ref("V1", id_type="VN")


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([active(A)], Known(A)),
        ([], Unknown(KEY.hash_identifier(A))),
        ([merged(A, B), active(B)], Known(B)),
        ([merged(A, B), merged(B, C), active(C)], Known(C)),
        ([merged(A, B)], Unknown(KEY.hash_identifier(B))),
        ([merged(A, B), merged(B, C)], Unknown(KEY.hash_identifier(C))),
        ([merged(A, A)], Ambiguous("MERGE_CYCLE")),
        ([merged(A, B), merged(B, A)], Ambiguous("MERGE_CYCLE")),
        ([merged(A, B), merged(B, C), merged(C, B)], Ambiguous("MERGE_CYCLE")),
        ([record(A, status="inactive", mrn=A)], Ambiguous("PATIENT_INACTIVE")),
        ([merged(A, B), record(B, status="inactive", mrn=B)], Ambiguous("PATIENT_INACTIVE")),
        ([record(A)], Ambiguous("MRN_AMBIGUOUS")),
        ([merged(A, B), record(B)], Ambiguous("MRN_AMBIGUOUS")),
        ([record(A, status="merged", mrn=A)], Ambiguous("RECORD_CONTRADICTORY")),
        ([record(A, mrn=A, merged_into=B), active(B)], Ambiguous("RECORD_CONTRADICTORY")),
        ([record(A, status="deceased?", mrn=A)], Ambiguous("RECORD_CONTRADICTORY")),
        ([merged(A, VISIT), record(VISIT, mrn=C), active(C)], Known(C)),
    ],
)
def test_resolution(records, expected):
    assert resolve(records, A) == expected


@pytest.mark.parametrize(
    ("records", "expected"),
    [
        ([active(A)], Known(A)),
        ([], Known(A)),  # an MRN without an entry was never merged
        ([merged(A, B), active(B)], Known(B)),
        ([merged(A, B)], Unknown(KEY.hash_identifier(B))),  # the retired number is never given out
        ([merged(A, VISIT)], Ambiguous("MERGE_CYCLE")),
        ([record(A)], Ambiguous("MRN_AMBIGUOUS")),
    ],
)
def test_a_visit_number_leads_to_the_patient_its_mrn_was_merged_into(records, expected):
    assert resolve([record(VISIT, mrn=A), *records], VISIT) == expected


def test_the_same_text_under_two_authorities_is_two_patients():
    north, south = ref("1001", "NORTH"), ref("1001", "SOUTH")
    assert resolve([active(north)], south) == Unknown(KEY.hash_identifier(south))
    records = [merged(north, ref("1002", "NORTH")), active(ref("1002", "NORTH")), active(south)]
    assert resolve(records, north) == Known(ref("1002", "NORTH"))
    assert resolve(records, south) == Known(south)


def test_the_type_of_an_identifier_counts():
    assert resolve([active(A)], ref("A", id_type="AN")) == Unknown(KEY.hash_identifier(ref("A", id_type="AN")))


@pytest.mark.parametrize(("steps", "deep"), [(MAX_STEPS, False), (MAX_STEPS + 1, True)])
def test_chains_are_followed_to_a_limit(steps, deep):
    chain = [ref(f"P{n}") for n in range(steps + 1)]
    records = [merged(a, b) for a, b in pairwise(chain)] + [active(chain[-1])]
    assert resolve(records, chain[0]) == (Ambiguous("MERGE_TOO_DEEP") if deep else Known(chain[-1]))


def test_an_unmerge_is_a_new_state():
    assert resolve([active(A), active(B)], A) == Known(A)


def test_no_entry_holds_its_own_identifier_in_clear_when_merged():
    entry = build_entry(record(ref("Secret-77"), status="merged", merged_into=ref("Other-88")), KEY, "e")
    assert entry == Entry("e", "merged", None, None, KEY.hash_identifier(ref("Other-88")))


NAMES = [f"N{n}" for n in range(6)]


@settings(max_examples=300, deadline=None)
@given(
    st.dictionaries(
        st.sampled_from(NAMES), st.tuples(st.sampled_from(["active", "merged", "none"]), st.sampled_from(NAMES))
    ),
    st.sampled_from(NAMES),
)
def test_any_graph_of_merges_ends_as_walking_it_by_hand_does(graph, start):
    records = [
        active(ref(name))
        if state == "active"
        else merged(ref(name), ref(other))
        if state == "merged"
        else record(ref(name))
        for name, (state, other) in graph.items()
    ]
    seen, name = [], start
    while name in graph and graph[name][0] == "merged" and name not in seen:
        seen.append(name)
        name = graph[name][1]
    if name in seen:
        expected = "cycle"
    elif name not in graph:
        expected = "unknown"
    else:
        expected = {"active": name, "none": "ambiguous"}[graph[name][0]]
    result = resolve(records, ref(start))
    found = {
        Known: lambda: result.mrn.value,
        Unknown: lambda: "unknown",
        Ambiguous: lambda: {"MERGE_CYCLE": "cycle", "MRN_AMBIGUOUS": "ambiguous"}[result.reason],
    }[type(result)]()
    assert found == expected

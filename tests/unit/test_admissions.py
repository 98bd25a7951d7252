"""HL7 admissions become patient identifiers: whom they name, what a merge does, what is refused."""

import hashlib
import os
from contextlib import suppress
from pathlib import Path

import msgspec
import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.events import Reference
from schemas.failure import Failure, FailureKind
from schemas.tenancy import Authority, Facility, Feed, Tenancy
from sources.ehr.hl7v2 import FEED
from streams.admissions import EVENTS, Admission, Ignored, read_admission
from topics.headers import RawRecord

FIXTURES = Path(__file__).parents[1] / "fixtures" / "hl7"
SAMPLES = Path(os.environ.get("REMITSTREAM_SHARED", "../shared")) / "samples" / "hl7v2"

TENANCY = Tenancy(
    tenant="acme",
    facilities=(
        Facility(
            id="north",
            time_zone="America/Chicago",
            default_authority="NORTH",
            authorities=(
                Authority(name="NORTH", aliases=("1.2.840.99.1", "urn:oid:1.2.840.99.7", "NGH")),
                Authority(name="EAST", aliases=("2.16.1", "BCBS")),
            ),
        ),
    ),
    feeds=(Feed(name="north-adt", facility="north", sending_application="ADT", sending_facility="NORTH GENERAL"),),
)

INGESTED = 1_740_900_000_123


def build_record(value: bytes, **changed: str) -> RawRecord:
    headers = {"account": "north-adt", "facility": "north", "ingest_time": str(INGESTED)} | changed
    return RawRecord(
        hop="T1:0:7",
        partition=0,
        offset=7,
        key=b"north-adt",
        value=value,
        headers=[(name, text.encode()) for name, text in headers.items() if text],
        timestamp=INGESTED,
    )


def build_message(event: str, *segments: str, control_id: str = "N1", evn: str = "EVN||20250301083000") -> bytes:
    head = rf"MSH|^~\&|ADT|NORTH GENERAL|R|H|20250301090000||ADT^{event}|{control_id}|P|2.5.1"
    return "\r".join([head, evn, *segments, ""]).encode()


def read(event: str, *segments: str, **changed) -> Admission:
    admission = read_admission(build_record(build_message(event, *segments, **changed)), TENANCY)
    assert isinstance(admission, Admission)
    return admission


def refusal(value: bytes, **headers: str) -> tuple[str, str]:
    with pytest.raises(Failure) as caught:
        read_admission(build_record(value, **headers), TENANCY)
    assert caught.value.kind is FailureKind.INVALID
    return caught.value.code, caught.value.field


def summarise(admission: Admission) -> list[tuple]:
    def short(reference: Reference | None):
        return reference and f"{reference.authority}:{reference.id_type}:{reference.value}"

    return [
        (short(record.identifier), record.status, short(record.mrn), short(record.merged_into))
        for record in admission.records
    ]


def test_a_registration_names_every_identifier_with_its_record_number():
    value = (FIXTURES / "a04_register.hl7").read_bytes()
    admission = read_admission(build_record(value), TENANCY)
    assert summarise(admission) == [
        ("NORTH:MR:000412", "active", "NORTH:MR:000412", None),
        ("NORTH:PI:88-17", "active", "NORTH:MR:000412", None),
        ("NORTH:AN:A-5501", "active", "NORTH:MR:000412", None),
        ("NORTH:VN:V-9001", "active", "NORTH:MR:000412", None),
    ]
    first = admission.records[0]
    assert (first.tenant, first.facility, first.feed) == ("acme", "north", "north-adt")
    assert (first.source_event_id, first.message_type, first.origin) == ("N00001", "ADT^A04", "T1:0:7")
    assert first.occurred_at == 1_740_839_340_000  # 2025-03-01 08:29 -0600
    assert first.received_at == INGESTED
    assert first.mapping_version
    assert (admission.control_id, admission.message_type) == ("N00001", "ADT^A04")
    assert admission.facts == ("ADT^A04", "N00001", hashlib.sha256(value).hexdigest())


def test_names_birth_dates_addresses_and_social_security_numbers_stay_behind():
    value = (FIXTURES / "a04_register.hl7").read_bytes()
    shown = repr(msgspec.to_builtins(read_admission(build_record(value), TENANCY).records)).upper()
    for text in ("PLOVER", "QUINCY", "19710203", "HERON", "BIRCHVALE", "60600", "078051120"):
        assert text in value.decode()
        assert text not in shown


def test_the_same_bytes_give_the_same_records_and_a_redrive_keeps_the_origin():
    value = (FIXTURES / "a40_merge.hl7").read_bytes()
    once, again = (read_admission(build_record(value), TENANCY) for _ in range(2))
    assert once == again
    moved = read_admission(build_record(value, origin="T0:3:99"), TENANCY)
    assert {record.origin for record in moved.records} == {"T0:3:99"}
    assert moved.facts == once.facts


@pytest.mark.parametrize("event", ["A01", "A04", "A08", "A28", "A31"])
def test_events_that_name_a_patient(event):
    admission = read(event, "PID|1||7^^^NORTH^MR")
    assert summarise(admission) == [("NORTH:MR:7", "active", "NORTH:MR:7", None)]
    assert admission.message_type == f"ADT^{event}"


def test_the_documented_messages_are_the_ones_that_are_read():
    assert {f"ADT^{event}" for event in EVENTS} == set(FEED.messages)
    assert FEED.topic == "raw.hl7"


@pytest.mark.parametrize("kind", ["ADT^A02", "ADT^A11", "ADT^A41", "DFT^P03", "SIU^S12", "ORU^R01", "ADT"])
def test_other_messages_are_ignored_even_when_they_lack_a_patient(kind):
    value = rf"MSH|^~\&|ADT|N|R|H|20250301||{kind}|N1|P|2.5.1".encode()
    assert read_admission(build_record(value), TENANCY) == Ignored("EVENT_NOT_OF_INTEREST")


def test_the_event_may_stand_in_evn_alone():
    value = b"MSH|^~\\&|ADT|N|R|H|2025||ADT|N1|P|2.2\rEVN|A08|20250301\rPID|1||7\r"
    assert read_admission(build_record(value), TENANCY).message_type == "ADT^A08"


class TestAuthorities:
    @pytest.mark.parametrize(
        ("assigned", "expected"),
        [
            ("NORTH", "NORTH"),
            ("NGH", "NORTH"),
            ("", "NORTH"),
            ("BCBS", "EAST"),
            ("&1.2.840.99.1&ISO", "NORTH"),
            ("&1.2.840.99.7&ISO", "NORTH"),
            ("Anything&2.16.1&HCD", "EAST"),
            ("EAST&9.9.9&ISO", "EAST"),
        ],
    )
    def test_every_spelling_means_its_authority(self, assigned, expected):
        assert summarise(read("A01", f"PID|1||007^^^{assigned}^MR"))[0][0] == f"{expected}:MR:007"

    @pytest.mark.parametrize("assigned", ["WEST", "north", "&9.9.9&ISO", "EAST&1.2.840.99.1&ISO", "&1.2.840.99.7&DNS"])
    def test_an_unknown_or_contradictory_one_is_refused(self, assigned):
        value = build_message("A01", f"PID|1||007^^^{assigned}^MR~5^^^NORTH^PI")
        assert refusal(value) == ("AUTHORITY_UNKNOWN", "PID-3.4")

    def test_an_unknown_one_beside_a_known_record_number_is_skipped(self):
        admission = read("A01", "PID|1||9^^^WEST^MR~7^^^NORTH^MR~8^^^WEST^PI|||||||||||||||55^^^WEST")
        assert summarise(admission) == [("NORTH:MR:7", "active", "NORTH:MR:7", None)]

    def test_the_same_number_of_two_authorities_is_two_identifiers(self):
        admission = read("A01", "PID|1||7^^^EAST^MR~7^^^NORTH^MR")
        assert [row[0] for row in summarise(admission)] == ["EAST:MR:7", "NORTH:MR:7"]


class TestRecordNumbers:
    def test_the_text_is_kept_as_it_is(self):
        assert read("A01", r"PID|1||000-0 1\T\2.50^^^NORTH^MR").records[0].identifier.value == "000-0 1&2.50"

    def test_without_a_type_pid_3_is_a_record_number(self):
        assert summarise(read("A01", "PID|1||7"))[0][0] == "NORTH:MR:7"

    def test_beside_a_stated_record_number_an_untyped_one_is_skipped(self):
        assert [row[0] for row in summarise(read("A01", "PID|1||5^^^NORTH~7^^^NORTH^MR"))] == ["NORTH:MR:7"]

    def test_several_give_the_account_to_the_one_of_the_default_authority(self):
        admission = read("A01", "PID|1||7^^^EAST^MR~8^^^NORTH^MR|||||||||||||||A1", "PV1|1|I" + "|" * 17 + "V1^^^EAST")
        assert summarise(admission)[2:] == [
            ("NORTH:AN:A1", "active", "NORTH:MR:8", None),
            ("EAST:VN:V1", "active", "NORTH:MR:8", None),
        ]

    @pytest.mark.parametrize("numbers", ["7^^^NORTH^MR~8^^^NORTH^MR", "7^^^NORTH^MR~8^^^NORTH^MR~9^^^EAST^MR"])
    def test_several_without_a_clear_one_leave_the_account_in_doubt(self, numbers):
        rows = summarise(read("A01", f"PID|1||{numbers}|||||||||||||||A1"))
        assert rows[-1] == ("NORTH:AN:A1", "active", None, None)
        assert all(row[0] == row[2] for row in rows[:-1])

    def test_one_number_twice_is_one(self):
        rows = summarise(read("A01", "PID|1||7^^^NORTH^MR~7^^^NGH^MR|||||||||||||||A1"))
        assert rows == [
            ("NORTH:MR:7", "active", "NORTH:MR:7", None),
            ("NORTH:AN:A1", "active", "NORTH:MR:7", None),
        ]

    def test_none_is_refused(self):
        assert refusal(build_message("A01", "PID|1||5^^^NORTH^PI")) == ("MRN_MISSING", "PID-3.5")

    @pytest.mark.parametrize("pid", ["PID|1", "PID|1||", 'PID|1||""', "PID|1||^^^NORTH^MR", "PID|1||   ", "ZZZ|1"])
    def test_no_identifier_is_refused(self, pid):
        assert refusal(build_message("A08", pid)) == ("PATIENT_ID_MISSING", "PID-3")

    def test_only_a_social_security_number_is_no_identifier(self):
        assert refusal(build_message("A08", "PID|1||078051120^^^NORTH^SS")) == ("PATIENT_ID_MISSING", "PID-3")

    def test_the_poison_fixture(self):
        assert refusal((FIXTURES / "a08_without_pid3.hl7").read_bytes()) == ("PATIENT_ID_MISSING", "PID-3")

    def test_two_patients_in_one_update_are_refused(self):
        assert refusal(build_message("A08", "PID|1||7", "PID|2||8")) == ("SEGMENT_REPEATED", "PID")

    @pytest.mark.parametrize("pid", ["PID|1||[card redacted]", "PID|1||7|||||||||||||||[card redacted]"])
    def test_a_redacted_identifier_is_refused(self, pid):
        code, field = refusal(build_message("A08", pid))
        assert code == "PAN_IN_REFERENCE"
        assert field in {"PID-3", "PID-18"}


class TestMerges:
    def test_each_pair_of_the_message(self):
        admission = read_admission(build_record((FIXTURES / "a40_merge.hl7").read_bytes()), TENANCY)
        assert summarise(admission) == [
            ("NORTH:MR:000412", "active", "NORTH:MR:000412", None),
            ("NORTH:MR:000977", "merged", "NORTH:MR:000977", "NORTH:MR:000412"),
            ("NORTH:MR:000500", "active", "NORTH:MR:000500", None),
            ("NORTH:MR:000501", "merged", "NORTH:MR:000501", "NORTH:MR:000500"),
            ("NORTH:MR:000502", "merged", "NORTH:MR:000502", "NORTH:MR:000500"),
        ]

    def test_type_and_authority_find_the_survivor(self):
        admission = read(
            "A40", "PID|1||7^^^NORTH^MR~70^^^EAST^MR~P1^^^NORTH^PI", "MRG|80^^^BCBS^MR~8^^^^MR~P2^^^NORTH^PI"
        )
        assert summarise(admission)[3:] == [
            ("EAST:MR:80", "merged", "EAST:MR:80", "EAST:MR:70"),
            ("NORTH:MR:8", "merged", "NORTH:MR:8", "NORTH:MR:7"),
            ("NORTH:PI:P2", "merged", "NORTH:MR:7", "NORTH:PI:P1"),
        ]

    def test_without_types_both_sides_are_record_numbers(self):
        assert summarise(read("A40", "PID|1||7", "MRG|8"))[-1] == ("NORTH:MR:8", "merged", "NORTH:MR:8", "NORTH:MR:7")

    def test_an_unknown_authority_beside_a_known_one_is_skipped(self):
        rows = summarise(read("A40", "PID|1||7^^^NORTH^MR", "MRG|8^^^NORTH^MR~9^^^WEST^MR"))
        assert [row[0] for row in rows] == ["NORTH:MR:7", "NORTH:MR:8"]

    def test_a_chain_in_one_message_keeps_its_order(self):
        rows = summarise(read("A40", "PID|1||2", "MRG|1", "PID|2||3", "MRG|2"))
        assert [(row[0], row[1]) for row in rows] == [
            ("NORTH:MR:2", "active"),
            ("NORTH:MR:1", "merged"),
            ("NORTH:MR:3", "active"),
            ("NORTH:MR:2", "merged"),
        ]

    def test_a_later_update_with_the_old_number_is_active_again(self):
        merged = read("A40", "PID|1||7", "MRG|8").records[-1]
        revived = read("A08", "PID|1||8").records[0]
        assert revived.identifier == merged.identifier
        assert (revived.status, revived.merged_into) == ("active", None)

    @pytest.mark.parametrize(
        ("segments", "expected"),
        [
            (["PID|1||7^^^NORTH^MR", "MRG|8^^^EAST^MR"], ("MERGE_WITHOUT_SURVIVOR", "MRG-1")),
            (["PID|1||7^^^NORTH^MR", "MRG|8^^^NORTH^PI"], ("MERGE_WITHOUT_SURVIVOR", "MRG-1")),
            (["MRG|8", "PID|1||7"], ("MERGE_WITHOUT_SURVIVOR", "MRG-1")),
            (["PID|1||7^^^NORTH^MR", "MRG|7^^^NGH^MR"], ("MERGE_INTO_ITSELF", "MRG-1")),
            (["PID|1||7~8", "MRG|8"], ("MERGE_INTO_ITSELF", "MRG-1")),
            (["PID|1||7~9", "MRG|8"], ("MERGE_AMBIGUOUS", "PID-3")),
            (["PID|1||7"], ("MERGE_SOURCE_MISSING", "MRG-1")),
            (["PID|1||7", "MRG|"], ("MERGE_SOURCE_MISSING", "MRG-1")),
            (["PID|1||7", "MRG|8", "PID|2||9"], ("MERGE_SOURCE_MISSING", "MRG-1")),
            (["PID|1||7", "MRG|8^^^WEST^MR"], ("AUTHORITY_UNKNOWN", "MRG-1.4")),
            (["PID|1", "MRG|8"], ("PATIENT_ID_MISSING", "PID-3")),
            (["PID|1||7", "MRG|[card redacted]"], ("PAN_IN_REFERENCE", "MRG-1")),
        ],
    )
    def test_a_merge_in_doubt_is_refused_whole(self, segments, expected):
        assert refusal(build_message("A40", *segments)) == expected


class TestTimes:
    @pytest.mark.parametrize(
        ("evn", "expected"),
        [
            ("EVN|A01|20250301120000|||| 20250228", 1_740_852_000_000),
            ("EVN|A01|20250301120000||||20250301110000", 1_740_848_400_000),
            ("EVN|A01|yesterday", 1_740_841_200_000),  # MSH-7, 09:00 in Chicago
            ("EVN|A01", 1_740_841_200_000),
        ],
    )
    def test_the_first_readable_of_evn_6_evn_2_and_msh_7(self, evn, expected):
        assert read("A01", "PID|1||7", evn=evn).records[0].occurred_at == expected

    def test_without_any_the_time_of_intake_counts(self):
        value = b"MSH|^~\\&|ADT|N|R|H|soon||ADT^A01|N1|P|2.5.1\rPID|1||7\r"
        assert read_admission(build_record(value), TENANCY).records[0].occurred_at == INGESTED


class TestHeaders:
    def test_a_record_that_no_listener_wrote(self):
        value = build_message("A01", "PID|1||7")
        assert refusal(value, account="") == ("HEADER_MISSING", "account")
        assert refusal(value, facility="") == ("HEADER_MISSING", "facility")
        assert refusal(value, facility="west") == ("FACILITY_UNKNOWN", "facility")
        assert refusal(value, ingest_time="noon") == ("HEADER_INVALID", "ingest_time")

    def test_a_message_without_a_control_id(self):
        assert refusal(build_message("A01", "PID|1||7", control_id="")) == ("CONTROL_ID_MISSING", "MSH-10")
        assert refusal(build_message("A01", "PID|1||7", control_id="[card redacted]")) == ("PAN_IN_REFERENCE", "MSH-10")

    def test_bytes_that_are_no_message(self):
        assert refusal(b"{}") == ("HEADER_MISSING", "MSH")


@given(
    st.sampled_from(sorted(EVENTS)),
    st.lists(
        st.builds(
            lambda name, parts: name + "".join(parts),
            st.sampled_from(["PID", "MRG", "PV1", "EVN", "PD1"]),
            st.lists(
                st.sampled_from(
                    ["|", "|", "|", "^", "~", "&", "NORTH", "EAST", "WEST", "MR", "PI", "7", "8", '""', "\\"]
                )
            ),
        ),
        max_size=6,
    ),
    st.binary(max_size=5),
)
def test_whatever_comes_gives_records_or_a_refusal(event, segments, noise):
    value = build_message(event, *segments) + noise
    with suppress(Failure):
        admission = read_admission(build_record(value), TENANCY)
        assert admission.records
        for record in admission.records:
            assert record.identifier.value.strip()
            assert record.identifier.authority in {"NORTH", "EAST"}
            assert (record.status == "merged") == (record.merged_into is not None)
            assert record.merged_into != record.identifier
            assert record.mrn is None or record.mrn.id_type == "MR"


@given(st.binary(max_size=400))
def test_random_bytes_raise_nothing_but_a_failure(value):
    with suppress(Failure):
        read_admission(build_record(value), TENANCY)


@pytest.mark.skipif(not SAMPLES.is_dir(), reason="no shared folder")
def test_public_samples():
    merged = read_admission(build_record((SAMPLES / "ADT-A40-01.hl7").read_bytes()), TENANCY)
    assert summarise(merged) == [
        ("EAST:MR:12345", "active", "EAST:MR:12345", None),
        ("NORTH:AN:5027440", "active", "EAST:MR:12345", None),
        ("EAST:MR:56789", "merged", "EAST:MR:56789", "EAST:MR:12345"),
    ]
    for event in ("A01", "A04", "A08", "A28", "A31"):
        admission = read_admission(build_record((SAMPLES / f"ADT-{event}-01.hl7").read_bytes()), TENANCY)
        assert summarise(admission)[0] == ("EAST:MR:PATID1234", "active", "EAST:MR:PATID1234", None)
    for name in ("ADT-A11-01", "ADT-A41-01", "ADT-A45-01", "ADT-A47-01", "BAR-P01-01", "DFT-P03-01", "SIU-S12-01"):
        assert isinstance(read_admission(build_record((SAMPLES / f"{name}.hl7").read_bytes()), TENANCY), Ignored)

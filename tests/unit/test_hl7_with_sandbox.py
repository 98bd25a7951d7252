"""Our HL7 code against the sandbox's, which shares no line with it: each reads what the other writes."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.mllp import MllpClient
from sandbox.adt import Envelope, Patient, write_admission, write_merge
from sandbox.billing import BillingSystem, Mode, ModeKind
from sandbox.transactions import Instance
from schemas.events import Reference
from schemas.failure import Failure, FailureKind
from schemas.formats import hl7
from schemas.tenancy import Authority, Facility, Tenancy
from streams.admissions import read_admission
from topics.headers import RawRecord

TENANCY = Tenancy(
    tenant="acme",
    facilities=(
        Facility(
            id="north",
            time_zone="America/Chicago",
            default_authority="NORTH",
            authorities=(Authority(name="NORTH", aliases=("1.2.840.99.1",)),),
        ),
    ),
)
TEXT = st.text(st.characters(min_codepoint=32, exclude_categories=["Cs", "Cc", "Zs"]), min_size=1, max_size=12)


def read(value: bytes):
    headers = [("account", b"north-adt"), ("facility", b"north"), ("ingest_time", b"1740900000000")]
    record = RawRecord(hop="T:0:1", partition=0, offset=1, key=b"k", value=value, headers=headers, timestamp=0)
    return read_admission(record, TENANCY)


def build_envelope(control_id: str, authority: str) -> Envelope:
    return Envelope(application="ADT", facility="N&G", control_id=control_id, time=1_740_839_340, authority=authority)


def build_patient(name: str, mrn: str = "0012") -> Patient:
    return Patient(facility="north", mrn=mrn, given=name, family=name, account_number="A-1")


@given(st.sampled_from(["A01", "A04", "A08", "A28", "A31"]), st.sampled_from(["NORTH", "&1.2.840.99.1&ISO"]), TEXT)
def test_admissions_of_the_sandbox(trigger, authority, name):
    admission = read(write_admission(build_envelope("C1", authority), trigger, build_patient(name), note=name))
    assert [(record.identifier, record.mrn, record.status) for record in admission.records] == [
        (Reference("NORTH", "MR", "0012"), Reference("NORTH", "MR", "0012"), "active"),
        (Reference("NORTH", "AN", "A-1"), Reference("NORTH", "MR", "0012"), "active"),
    ]
    assert {record.occurred_at for record in admission.records} == {1_740_839_340_000}


@given(TEXT)
def test_merges_of_the_sandbox(name):
    admission = read(write_merge(build_envelope("C2", "NORTH"), build_patient(name), "0099"))
    retired = admission.records[-1]
    assert (retired.identifier, retired.merged_into) == (
        Reference("NORTH", "MR", "0099"),
        Reference("NORTH", "MR", "0012"),
    )


def test_the_poison_of_the_sandbox():
    with pytest.raises(Failure, match="PATIENT_ID_MISSING"):
        read(write_admission(build_envelope("C3", "NORTH"), "A08", build_patient("Quincy"), with_id=False))


def build_payment(control_id: str, description: str) -> bytes:
    return hl7.build_message(
        [
            (
                "MSH",
                {3: "REMITSTREAM", 4: "HUB", 5: "BILLING", 6: "north", 7: "20250301083000-0600", 9: ("DFT", "P03"),
                 10: control_id, 11: "P", 12: "2.5.1", 18: "UNICODE UTF-8"},
            ),
            ("EVN", {1: "P03", 2: "20250301083000-0600"}),
            ("PID", {1: "1", 3: [("0012", "", "", "NORTH", "MR")]}),
            (
                "FT1",
                {1: "1", 2: "T1", 4: "20250301083000-0600", 6: "PY", 7: "CASH", 8: description,
                 10: "1", 11: (("12.50", "USD"),)},
            ),
        ]
    )  # fmt: skip


async def test_payments_to_the_sandbox(tmp_path):
    billing = BillingSystem(tmp_path / "ledger.sqlite", [Instance(name="north")], None)
    await billing.start()
    try:
        async with MllpClient("127.0.0.1", billing.ports["north"]) as client:
            answer = await client.send(build_payment("P1", r"a|b^c&d~e\f é"), "P1", deadline=5)
            assert hl7.read_ack(answer) == hl7.Acknowledgement("AA", "P1", "")
            (posting,) = billing.read_ledger()
            assert (posting["minor"], posting["currency"], posting["mrn"]) == (1250, "USD", "0012")
            assert (posting["control_id"], posting["description"]) == ("P1", r"a|b^c&d~e\f é")

            await billing.set_mode(Mode(ModeKind.REJECT, count=1))
            answer = await client.send(build_payment("P2", "x"), "P2", deadline=5)
            assert hl7.read_ack(answer).code == "AR"
    finally:
        await billing.stop()


@pytest.mark.parametrize(
    ("mode", "code"),
    [
        (ModeKind.HANG_AFTER_POSTING, "NO_ANSWER"),
        (ModeKind.GARBAGE_ACK, "ANSWER_UNREADABLE"),
        (ModeKind.WRONG_MSA2, "ANSWER_MISMATCHED"),
        (ModeKind.CLOSE_BEFORE_POSTING, "ANSWER_CUT"),
        (ModeKind.CLOSE_AFTER_POSTING, "ANSWER_CUT"),
    ],
)
async def test_a_failing_billing_system_leaves_it_open_and_the_same_message_settles_it(tmp_path, mode, code):
    billing = BillingSystem(tmp_path / "ledger.sqlite", [Instance(name="north")], None)
    await billing.start()
    try:
        await billing.set_mode(Mode(mode, count=1))
        async with MllpClient("127.0.0.1", billing.ports["north"]) as client:
            with pytest.raises(Failure) as caught:
                await client.send(build_payment("P1", "x"), "P1", deadline=0.5 if code == "NO_ANSWER" else 10)
            assert (caught.value.kind, caught.value.code) == (FailureKind.AMBIGUOUS, code)
            answer = await client.send(build_payment("P1", "x"), "P1", deadline=5)
            assert hl7.read_ack(answer).code == "AA"
        assert [posting["control_id"] for posting in billing.read_ledger()] == ["P1"]
    finally:
        await billing.stop()

"""Bytes of our Avro values, judged by fastavro and by bytes written down by hand."""

import io
import json

import fastavro
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import (
    Decision,
    DeliveryOutcome,
    Disposition,
    MoneyEvent,
    PatientRecord,
    Reference,
    Review,
    WaitingEntry,
)
from schemas.failure import Failure, TemporaryError
from schemas.money import Money
from schemas.wire import Decoder, Encoder, load_schema

TYPES = {
    "money_event": MoneyEvent,
    "patient_record": PatientRecord,
    "disposition": Disposition,
    "review": Review,
    "waiting_entry": WaitingEntry,
    "delivery_outcome": DeliveryOutcome,
    "decision": Decision,
}
TEXT = st.text(st.characters(codec="utf-8"), max_size=20)
LONG = st.integers(-(2**63), 2**63 - 1)
INT = st.integers(-(2**31), 2**31 - 1)
REFERENCE = st.builds(Reference, authority=TEXT, id_type=TEXT, value=TEXT)


def build_events(name):
    fields = {}
    for field in msgspec.structs.fields(TYPES[name]):
        kind = str(field.type)
        if field.name == "money":
            fields[field.name] = st.builds(Money, minor=LONG, currency=TEXT, exponent=INT)
        elif field.name == "attributes":
            fields[field.name] = st.dictionaries(TEXT, TEXT, max_size=4)
        elif field.name == "raw_headers":
            fields[field.name] = st.lists(st.tuples(TEXT, st.binary(max_size=20)), max_size=4)
        elif "Reference" in kind:
            fields[field.name] = REFERENCE if field.required else st.none() | REFERENCE
        elif "bytes" in kind:
            fields[field.name] = st.binary(max_size=40)
        elif "int" in kind and field.name != "attempt":
            fields[field.name] = LONG
        elif "int" in kind:
            fields[field.name] = INT
        else:
            fields[field.name] = TEXT if field.required else st.none() | TEXT
    return st.builds(TYPES[name], **fields)


each = pytest.mark.parametrize("name", sorted(TYPES))


@each
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_what_is_written_is_read_again(name, data):
    event = data.draw(build_events(name))
    value = Encoder(name, 7).encode(event)
    assert Decoder(name, TYPES[name], lambda _id: load_schema(name)).decode(value) == event


@each
@settings(max_examples=25, deadline=None)
@given(data=st.data())
def test_a_plain_avro_library_reads_it_with_the_registered_schema(name, data):
    event = data.draw(build_events(name))
    value = Encoder(name, 258).encode(event)
    assert value[:5] == b"\x00\x00\x00\x01\x02", "magic byte 0 and the schema id, big-endian"
    plain = json.loads(load_schema(name).replace('"logicalType":"timestamp-millis"', '"doc":""'))
    record = fastavro.schemaless_reader(io.BytesIO(value[5:]), fastavro.parse_schema(plain), None)
    expected = msgspec.to_builtins(event, builtin_types=(bytes,))
    if "raw_headers" in expected:
        expected["raw_headers"] = [{"name": key, "value": text} for key, text in expected["raw_headers"]]
    assert record == expected


def test_bytes_written_down_by_hand():
    disposition = Disposition(
        hop="T:0:1",
        fate="ignored",
        reason="",
        source="s",
        facility="",
        event_type="é",
        linked="",
        decided_at=-2,
    )
    strings = (b"\x0aT:0:1", b"\x0eignored", b"\x00", b"\x02s", b"\x00", b"\x04\xc3\xa9", b"\x00")
    expected = b"".join((b"\x00\x00\x00\x00\x01", *strings, b"\x03"))
    assert Encoder("disposition", 1).encode(disposition) == expected


def test_a_field_added_later_is_read_with_its_default_and_an_unknown_one_is_skipped():
    older = json.loads(load_schema("delivery_outcome"))
    older["fields"].append({"name": "from_the_future", "type": "string", "default": ""})
    event = DeliveryOutcome(
        event_id="e",
        target="t",
        outcome="posted",
        tenant="n",
        facility="f",
        root="r",
        kind="k",
        failure="",
        code="",
        attempt=1,
        control_id="",
        reference="",
        decided_at=5,
    )
    body = io.BytesIO()
    record = msgspec.to_builtins(event) | {"from_the_future": "x"}
    fastavro.schemaless_writer(body, fastavro.parse_schema(older), record)
    decoder = Decoder("delivery_outcome", DeliveryOutcome, lambda _id: json.dumps(older))
    assert decoder.decode(b"\x00\x00\x00\x00\x02" + body.getvalue()) == event

    money = json.loads(load_schema("money_event"))
    money["fields"] = [field for field in money["fields"] if field["name"] not in ("claim", "invoice", "attributes")]
    kept = {field["name"] for field in money["fields"]}
    fact = MoneyEvent(
        **{f.name: "x" for f in msgspec.structs.fields(MoneyEvent) if str(f.type) == "<class 'str'>"},
        money=Money(1, "USD", 2),
        occurred_at=1,
        received_at=2,
    )
    body = io.BytesIO()
    full = msgspec.to_builtins(fact)
    fastavro.schemaless_writer(body, fastavro.parse_schema(money), {name: full[name] for name in kept})
    decoder = Decoder("money_event", MoneyEvent, lambda _id: json.dumps(money))
    assert decoder.decode(b"\x00\x00\x00\x00\x03" + body.getvalue()) == fact


@pytest.mark.parametrize("milliseconds", [253_402_300_800_000, 2**62, -(2**62), -1])
def test_times_beyond_the_calendar_are_read(milliseconds):
    review = Review(
        event_id="e",
        reason="r",
        hop="h",
        source="s",
        facility="f",
        transaction_key="k",
        root="r",
        event_type="t",
        created_at=milliseconds,
    )
    value = Encoder("review", 1).encode(review)
    assert Decoder("review", Review, lambda _id: load_schema("review")).decode(value) == review


@settings(deadline=None)
@given(value=st.binary(max_size=200), name=st.sampled_from(sorted(TYPES)))
def test_foreign_bytes_are_a_failure_and_nothing_else(value, name):
    decoder = Decoder(name, TYPES[name], lambda _id: load_schema(name))
    for attempt in (value, b"\x00\x00\x00\x00\x01" + value):
        try:
            outcome = decoder.decode(attempt)
        except Failure as failure:
            outcome = failure.code
        # Some bytes happen to be a value of the schema.
        assert outcome == "NOT_AVRO" or isinstance(outcome, TYPES[name])


@pytest.mark.parametrize("value", [b"", b"\x00\x00\x00", b"{}", b"\x01\x00\x00\x00\x01"])
def test_a_value_without_our_frame_is_a_failure(value):
    asked = []
    decoder = Decoder("review", Review, asked.append)
    with pytest.raises(Failure) as failure:
        decoder.decode(value)
    assert (failure.value.code, asked) == ("NOT_AVRO", [])


def test_a_writer_schema_is_asked_for_once_and_a_registry_that_is_down_is_no_failure_of_the_record():
    asked = []
    value = Encoder("review", 9).encode(
        Review(
            event_id="",
            reason="",
            hop="",
            source="",
            facility="",
            transaction_key="",
            root="",
            event_type="",
            created_at=0,
        )
    )

    def find(number):
        asked.append(number)
        if len(asked) == 1:
            raise TemporaryError("down.", place="registry")
        return load_schema("review")

    decoder = Decoder("review", Review, find)
    with pytest.raises(TemporaryError):
        decoder.decode(value)
    decoder.decode(value)
    decoder.decode(value)
    assert asked == [9, 9]

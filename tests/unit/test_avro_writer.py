"""The compiled Avro writer gives fastavro's bytes, for every schema of ours and for schemas made up at random."""

import io
import json
from types import SimpleNamespace

import fastavro
import msgspec
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas import events, wire
from schemas.avro_writer import SchemaUnsupported, compile_writer, encode_long

TYPES = {
    "money_event": events.MoneyEvent,
    "patient_record": events.PatientRecord,
    "disposition": events.Disposition,
    "review": events.Review,
    "waiting_entry": events.WaitingEntry,
    "delivery_outcome": events.DeliveryOutcome,
    "decision": events.Decision,
}


def write_with_fastavro(schema, record):
    buffer = io.BytesIO()
    fastavro.schemaless_writer(buffer, fastavro.parse_schema(schema), record)
    return buffer.getvalue()


def to_record(event):
    record = msgspec.to_builtins(event, builtin_types=(bytes,))
    if "raw_headers" in record:
        record["raw_headers"] = [{"name": name, "value": value} for name, value in record["raw_headers"]]
    return record


def make_values(schema, named=None):
    """A strategy for values of a schema, as plain data."""
    named = {} if named is None else named
    if isinstance(schema, list):
        return st.one_of(*(make_values(branch, named) for branch in schema))
    kind = schema if isinstance(schema, str) else schema["type"]
    if isinstance(kind, (dict, list)):
        return make_values(kind, named)
    if kind in named:
        return make_values(named[kind], named)
    if kind == "record":
        named[schema["name"]] = schema
        return st.fixed_dictionaries({field["name"]: make_values(field["type"], named) for field in schema["fields"]})
    if kind == "map":
        return st.dictionaries(st.text(max_size=8), make_values(schema["values"], named), max_size=4)
    if kind == "array":
        return st.lists(make_values(schema["items"], named), max_size=4)
    return {
        "null": st.none(),
        "string": st.text(max_size=12) | st.sampled_from(["x" * 63, "x" * 64, "x" * 4095, "x" * 4096, "é" * 2100]),
        "bytes": st.binary(max_size=12),
        "int": st.integers(-(1 << 31), (1 << 31) - 1),
        # Times in milliseconds stay inside what a datetime can hold, since fastavro makes one of them when reading.
        "long": st.integers(-(1 << 45), 1 << 45),
    }[kind]


@pytest.mark.parametrize("name", wire.SCHEMA_NAMES)
def test_every_schema_of_ours_gives_the_bytes_of_fastavro(name):
    schema = json.loads(wire.load_schema(name))
    encoder = wire.Encoder(name, 7)

    @settings(max_examples=40, deadline=None)
    @given(make_values(schema))
    def compare(record):
        headers = record.get("raw_headers")
        plain = record if headers is None else record | {"raw_headers": [(h["name"], h["value"]) for h in headers]}
        event = msgspec.convert(plain, TYPES[name])
        assert encoder.encode(event) == b"\x00\x00\x00\x00\x07" + write_with_fastavro(schema, to_record(event))

    compare()


@given(st.integers(-(1 << 63), (1 << 63) - 1))
def test_every_integer_is_coded_as_fastavro_does(number):
    assert encode_long(number) == write_with_fastavro("long", number)


@pytest.mark.parametrize("number", [1 << 63, -(1 << 63) - 1])
def test_an_integer_beyond_64_bits_is_refused(number):
    with pytest.raises(ValueError, match="64-bit"):
        encode_long(number)


@pytest.mark.parametrize(
    "kind", ["double", "boolean", ["string", "null"], ["null", "string", "int"], {"type": "map", "values": "long"}]
)
def test_an_unsupported_type_is_refused_when_compiled(kind):
    with pytest.raises(SchemaUnsupported):
        compile_writer({"type": "record", "name": "R", "fields": [{"name": "x", "type": kind}]})


@pytest.mark.parametrize("value", [None, 5, b"bytes"])
def test_a_value_that_does_not_fit_is_refused(value):
    write = compile_writer({"type": "record", "name": "R", "fields": [{"name": "x", "type": "string"}]})
    with pytest.raises((TypeError, AttributeError)):
        write(SimpleNamespace(x=value))

"""Structs and committed schemas say the same, and what is committed as history stays what it was."""

import io
import json
import types
import typing
from itertools import combinations
from pathlib import Path

import fastavro
import msgspec
import pytest

from schemas import events, wire
from schemas.money import Money

ROOT = Path(wire.__file__).parent
STRUCTS = {
    "money_event": events.MoneyEvent,
    "patient_record": events.PatientRecord,
    "disposition": events.Disposition,
    "review": events.Review,
    "waiting_entry": events.WaitingEntry,
    "delivery_outcome": events.DeliveryOutcome,
    "decision": events.Decision,
}
NAMED = {"Money": Money, "Reference": events.Reference}

each = pytest.mark.parametrize("name", sorted(STRUCTS))


def read(path):
    return json.loads(path.read_text("utf-8"))


def describe(avro, named):
    """The Python type an Avro type stands for."""
    if isinstance(avro, list):
        assert avro[0] == "null", "a union is null and one type, null first, so that null is its default"
        (inner,) = avro[1:]
        return describe(inner, named) | None
    if isinstance(avro, str):
        simple = {"string": str, "long": int, "int": int, "bytes": bytes}
        return simple[avro] if avro in simple else named[avro]
    if avro["type"] == "map":
        return dict[str, describe(avro["values"], named)]
    if avro["type"] == "array":
        assert [(field["name"], field["type"]) for field in avro["items"]["fields"]] == [
            ("name", "string"),
            ("value", "bytes"),
        ]
        return list[tuple[str, bytes]]
    if avro["type"] == "record":
        struct = NAMED[avro["name"]]
        compare(avro, struct, named)
        named[avro["name"]] = struct
        return struct
    return describe(avro["type"], named)


def compare(schema, struct, named):
    hints = typing.get_type_hints(struct)
    fields = {field.name: field for field in msgspec.structs.fields(struct)}
    assert [field["name"] for field in schema["fields"]] == list(fields), "same fields in the same order"
    for field in schema["fields"]:
        mine = fields[field["name"]]
        assert describe(field["type"], named) == hints[mine.name], field["name"]
        assert ("default" in field) == (not mine.required), f"{mine.name}: a default on one side only"
        if "default" in field:
            value = mine.default if mine.default is not msgspec.NODEFAULT else mine.default_factory()
            assert field["default"] == value


@each
def test_the_schema_mirrors_the_struct(name):
    compare(read(ROOT / f"{name}.avsc"), STRUCTS[name], {})


def test_the_comparison_sees_a_difference():
    schema = read(ROOT / "disposition.avsc")
    schema["fields"][0]["type"] = "bytes"
    with pytest.raises(AssertionError):
        compare(schema, events.Disposition, {})
    assert isinstance(describe(["null", "string"], {}), types.UnionType)


def test_every_schema_has_a_struct_and_a_file():
    assert set(wire.SCHEMA_NAMES) == set(STRUCTS) == {path.stem for path in ROOT.glob("*.avsc")}
    assert {path.name for path in (ROOT / "history").iterdir()} == set(STRUCTS)


@each
def test_the_last_version_of_the_history_is_the_schema_in_force(name):
    versions = wire.load_history(name)
    assert versions[-1] == wire.load_schema(name)
    numbers = sorted(int(path.stem) for path in (ROOT / "history" / name).iterdir())
    assert numbers == list(range(1, len(versions) + 1)), "versions are numbered without a hole"


@each
def test_every_version_reads_every_other(name):
    versions = [fastavro.parse_schema(json.loads(text)) for text in wire.load_history(name)]
    for writer, reader in [*combinations(versions, 2), *combinations(versions[::-1], 2)]:
        example = fastavro.utils.generate_one(writer)
        assert can_read(writer, reader, example)


def can_read(writer, reader, example):
    body = io.BytesIO()
    fastavro.schemaless_writer(body, writer, example)
    fastavro.schemaless_reader(io.BytesIO(body.getvalue()), writer, reader)
    return True


@each
def test_times_are_marked_and_patients_are_marked(name):
    schema = read(ROOT / f"{name}.avsc")
    for field in schema["fields"]:
        if field["name"].endswith("_at") or field["name"] == "since":
            assert field["type"] == {"type": "long", "logicalType": "timestamp-millis"}, field["name"]
        if field["name"] in {"patient", "mrn", "guarantor_account", "visit", "claim", "identifier", "merged_into"} | {
            "raw_value"
        }:
            assert field["sensitivity"] == "phi", field["name"]


def test_names_of_the_conservation_equation():
    assert [fate.value for fate in events.Fate] == [
        "canonical",
        "suppressed",
        "ignored",
        "patient_update",
        "waiting",
        "in_review",
        "dead_lettered",
    ]
    assert [outcome.value for outcome in events.Outcome] == [
        "posted",
        "not_routed",
        "rejected",
        "dead_lettered",
        "parked",
        "unknown",
        "waived",
    ]

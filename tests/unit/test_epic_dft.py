"""Settings and mapping of the Epic target beyond what every target keeps (see tests/conformance)."""

import json
from pathlib import Path

import msgspec
import pytest
from pydantic import ValidationError

from schemas.events import MoneyEvent, Reference
from schemas.failure import Failure, OperatorError
from schemas.tenancy import Authority, Facility
from sinks.catalog import load
from sinks.contract import PostingContext, TargetClass

FIXTURES = Path(__file__).parents[1] / "fixtures" / "targets" / "epic_dft"
TARGET = load("epic_dft")


def build(**changes):
    given = json.loads((FIXTURES / "settings.json").read_text("utf-8")) | changes
    return TARGET.settings.model_validate({key: value for key, value in given.items() if value is not None})


def freeze(settings, **changes):
    event = msgspec.convert(
        json.loads((FIXTURES / "requests" / "capture.json").read_text())["event"] | changes, MoneyEvent
    )
    facility = Facility(
        id="north", time_zone="America/Chicago", default_authority="NORTH", authorities=(Authority(name="NORTH"),)
    )
    return TARGET.freeze(event, PostingContext(facility, Reference("NORTH", "MR", "N1"), 1_772_355_605_000), settings)


def read_field(body, segment, number):
    line = next(line for line in body.decode().split("\r") if line.startswith(f"{segment}|"))
    return line.split("|")[number]


@pytest.mark.parametrize(
    ("changes", "complaint"),
    [
        ({"duplicate_control": None}, "duplicate_control"),
        ({"duplicate_window_hours": None}, "needs duplicate_window_hours"),
        ({"refund_as": None}, "refund_as"),
        ({"refund_as": "adjustment"}, "adjustment_code"),
        ({"id_prefix": "REMIT"}, "10 characters"),
        ({"tls_ca": __file__}, "tls = true"),
        ({"tls": True, "tls_certificate": __file__}, "tls_key"),
        ({"hl7_version": "3.0"}, "hl7_version"),
        ({"connections": 0}, "connections"),
    ],
)
def test_settings_that_would_lose_or_double_are_refused(changes, complaint):
    with pytest.raises(ValidationError, match=complaint):
        build(**changes)


def test_the_class_follows_what_the_site_states():
    assert TARGET.classify(build()) is TargetClass.A
    assert TARGET.window(build()) == 72 * 3600
    without = build(duplicate_control="none")
    assert TARGET.classify(without) is TargetClass.D
    assert TARGET.window(without) is None


def test_ids_have_the_lengths_of_the_standard():
    request = freeze(build())
    assert len(request.control_id) == 20
    assert len(request.reference) == 12
    assert read_field(request.body, "FT1", 2) == request.reference
    prefixed = freeze(build(id_prefix="RS", id_length=16))
    assert prefixed.reference.startswith("RS")
    assert len(prefixed.reference) == 16


def test_short_ids_do_not_meet():
    settings = build()
    references = {freeze(settings, event_id=f"{n:032x}").reference for n in range(2000)}
    assert len(references) == 2000


def test_what_would_be_cut_by_the_receiver_is_refused():
    with pytest.raises(Failure) as caught:
        freeze(build(), object_id="x" * 41)
    assert (caught.value.code, caught.value.field) == ("FIELD_TOO_LONG", "FT1-8")


def test_delimiters_in_values_are_escaped():
    body = freeze(build(), object_id="a|b^c~d\\e&f\rg").body
    assert read_field(body, "FT1", 8) == "a\\F\\b\\S\\c\\R\\d\\E\\e\\T\\f\\X0D\\g"


def test_version_2_3_names_no_structure():
    assert read_field(freeze(build(hl7_version="2.3")).body, "MSH", 8) == "DFT^P03"


MAPPED = {
    "PID-3.1": "1", "PID-3.4": "N", "PID-3.5": "MR", "FT1-4": "20251231180000-0600", "FT1-5": "20251231", "FT1-6": "PY",
    "FT1-7": "P", "FT1-10": "1", "FT1-11.1.1": "0.01", "FT1-11.1.2": "USD", "FT1-12.1.1": "0.01", "FT1-12.1.2": "USD",
}  # fmt: skip


def write_overlay(folder, place):
    amount = {"minor": 1, "currency": "USD", "exponent": 2}
    given = {
        "mrn": {"authority": "N", "id_type": "MR", "value": "1"},
        "occurred_at": 1767225600000,
        "attributes": {"department": "CARD"},
        "site": {"id": "north", "time_zone": "America/Chicago"},
        "posting": {"type": "PY", "code": "P", "date": "20251231", "amount": amount},
    }
    overlay = {
        "target": "epic_dft",
        "overlay": True,
        "fields": [{"to": place, "expr": "attributes.department"}],
        "examples": [{"name": "a department", "given": given, "then": MAPPED | {place: "CARD"}}],
    }
    path = folder / "overlay.yaml"
    path.write_text(json.dumps(overlay))  # JSON is YAML
    return path


def test_an_overlay_adds_a_field(tmp_path):
    settings = build(mapping_overlay=str(write_overlay(tmp_path, "FT1-13")))
    assert read_field(freeze(settings, attributes={"department": "CARD"}).body, "FT1", 13) == "CARD"


@pytest.mark.parametrize("place", ["FT1-7", "PID-3.1", "FT1-11.1.1"])
def test_an_overlay_may_not_touch_what_is_required(tmp_path, place):
    with pytest.raises(OperatorError, match="required"):
        build(mapping_overlay=str(write_overlay(tmp_path, place)))


@pytest.mark.parametrize("place", ["FT1-2", "FT1-2.1", "PV1-2", "MSH-10", "ZPM-1", "FT1"])
def test_a_place_that_is_not_the_mappings_is_refused(tmp_path, place):
    with pytest.raises((OperatorError, ValidationError), match=place):
        build(mapping_overlay=str(write_overlay(tmp_path, place)))

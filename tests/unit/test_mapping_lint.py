"""The linter: each planted error is caught, each right expression passes."""

from __future__ import annotations

import json

import pytest

from schemas.mapping_expressions import Expression
from schemas.mapping_lint import Schema, lint, list_paths
from schemas.wire import load_schema

MONEY_EVENT = json.loads(load_schema("money_event"))
LINES = {
    "type": "record",
    "name": "Invoice",
    "fields": [
        {"name": "lines", "type": {"type": "array", "items": {"type": "record", "name": "Line", "fields": [
            {"name": "code", "type": "string"},
            {"name": "amount", "type": "long"},
            {"name": "patient", "type": ["null", "string"], "sensitivity": "phi"},
        ]}}},
        {"name": "first", "type": ["null", "Line"]},
    ],
}  # fmt: skip


def run(text, avro=MONEY_EVENT, **options):
    tables = options.pop("tables", ())
    return lint(Expression(text).parsed, tables=tables, schema=Schema(avro, **options))


@pytest.mark.parametrize(
    ("text", "detail", "remedy"),
    [
        ("payer.name", "`payer` is not a member", "Known here"),
        ("curency", "`curency` is not a member", "Known here"),
        ("money.minr", "`minr` is not a member", "Did you mean `minor`?"),
        ("join('-', [source, acount])", "`acount` is not a member", "Did you mean `account`?"),
        ("status.text", "`text` is not a member", "has no members"),
        ("patient.valu || 'none'", "`valu` is not a member", "Did you mean `value`?"),
        ("attributes.clinic.name", "`name` is not a member", "has no members"),
        ("money | {a: minr}", "`minr` is not a member", "Did you mean `minor`?"),
        ("nope(status)", "There is no function `nope()`", "Known here"),
        ("uper(status)", "There is no function `uper()`", "Did you mean `upper`?"),
        ("to_number(status)", "`to_number()` is refused", "minor units"),
        ("sum([money.minor])", "`sum()` is refused", "minor units"),
        ("avg([money.minor])", "`avg()` is refused", "minor units"),
        ("major(money, `2`)", "takes 1 argument(s), here are 2", "lists the functions"),
        ("concat()", "takes at least 1 argument(s), here are 0", "lists the functions"),
        ("upper(occurred_at)", "Argument 1 of `upper()` is number", "It takes null or string"),
        ("major(status)", "Argument 1 of `major()` is string", "It takes null or object"),
        ("upper(`5`)", "Argument 1 of `upper()` is number", "It takes null or string"),
        ("lookup(status, 'nowhere')", "There is no table `nowhere`", "Known here: none."),
        ("lookup(status, kind)", "takes the name of a table in quotes", "lookup(key, 'table')"),
        ("money[0]", "used on a value that is no list", "Name a member"),
        ("money[?minor]", "used on a value that is no list", "Name a member"),
    ],
)
def test_planted_error_is_caught(text, detail, remedy):
    issues = run(text).issues
    assert any(detail in found and remedy in advice for found, advice in issues), issues


@pytest.mark.parametrize(
    "text",
    [
        "status",
        "money.minor",
        "major(money)",
        "attributes.anything || 'unknown'",
        "upper(attributes.clinic)",
        "join('-', [source, account])",
        "iso_date(occurred_at)",
        "local_date(occurred_at, 'America/Chicago')",
        "patient.value && kind == 'capture'",
        "attributes.* | [0]",
        "not_null(claim, invoice, 'none')",
        "money.{a: minor, b: currency}",
        "lookup(status, 'states')",
    ],
)
def test_right_expression_passes(text):
    assert run(text, tables={"states"}).issues == []


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("lines[0].code", True),
        ("lines[*].amount", True),
        ("lines[?amount > `1`].code | [0]", True),
        ("map(&code, lines)", True),
        ("sort_by(lines, &amount)[0].code", True),
        ("first.code", True),
        ("lines[].code", True),
        ("lines[0].cod", False),
        ("lines[*].amunt", False),
        ("lines[?amunt > `1`].code", False),
        ("map(&cod, lines)", False),
        ("lines.code", False),
        ("first.cod", False),
    ],
)
def test_lists_and_named_types_are_followed(text, clean):
    assert (run(text, LINES).issues == []) is clean


@pytest.mark.parametrize(
    ("text", "phi"),
    [
        ("status", False),
        ("mrn.value", True),
        ("mrn", True),
        ("patient.authority", True),
        ("upper(visit.value)", True),
        ("mask(claim)", True),
        ("digest(claim)", True),
        ("to_string(@)", True),
        ("@", True),
        ("*", True),
        ("[status, guarantor_account.value]", True),
        ("{a: mrn}", True),
        ("status == claim", True),
        ("invoice", False),
        ("attributes.clinic", False),
        ("attributes.ward", True),
        ("attributes", True),
        ("attributes.*", True),
        ("money", False),
        ("money.*", False),
    ],
)
def test_protected_health_information_is_seen_wherever_it_is_read(text, phi):
    finding = run(text, phi_attributes={"ward"})
    assert finding.reads_phi is phi
    assert finding.issues == []


@pytest.mark.parametrize(
    ("text", "phi"),
    [
        ("lines[*].patient", True),
        ("lines[*].code", False),
        ("lines", True),
        ("first", True),
        ("lines[?patient].code", True),
    ],
)
def test_protected_health_information_inside_lists_is_seen(text, phi):
    assert run(text, LINES).reads_phi is phi


def test_members_beside_the_event_are_known_but_not_checked_inside():
    assert run("facility_settings.anything", members={"facility_settings"}).issues == []
    assert run("facility_settings.anything").issues != []


def test_without_a_schema_only_functions_are_checked():
    assert lint(Expression("anything.at.all[0]").parsed).issues == []
    assert lint(Expression("nope(anything)").parsed).issues != []


@pytest.mark.parametrize(
    ("text", "paths"),
    [
        ("a.b.c", [("a", "b", "c")]),
        ("a.b || upper(c)", [("a", "b"), ("c",)]),
        ("a[0].b", [("a",)]),
        ("a.*", [("a",)]),
        ("a | b", [("a",)]),
        ("a.b[?c].d", [("a", "b")]),
        ("@", [()]),
        ("lookup(a.b, 'x')", [("a", "b")]),
        ("'text'", []),
    ],
)
def test_paths_of_an_expression(text, paths):
    assert list_paths(Expression(text).parsed) == paths

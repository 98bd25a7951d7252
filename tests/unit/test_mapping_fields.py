"""Field mappings of targets: load, overlay, protected health information, apply, check."""

from __future__ import annotations

from dataclasses import replace

import pytest

from schemas.events import MoneyEvent, Reference
from schemas.failure import ConfigurationError, ExitCode, Failure, FailureKind
from schemas.mapping import FieldMapping, MappingError, build_view, check_files, preview_events
from schemas.money import Money

GOOD = """\
event: money_event
target: ledger
accepts_phi: true
members: [site]
tables:
  codes: {capture: PAY, refund: REF}
fields:
  - {to: amount, expr: major(money), required: true}
  - {to: code, expr: "lookup(kind, 'codes')", required: true}
  - {to: account, expr: mrn.value}
  - {to: clinic, expr: attributes.clinic || site.name}
  - {to: day, expr: "local_date(occurred_at, 'America/Chicago')"}
examples:
  - name: dinar keeps three decimals
    given: {kind: capture, money: {minor: 12345, currency: KWD, exponent: 3}, occurred_at: 0, site: {name: Lake}}
    then: {amount: "12.345", code: PAY, clinic: Lake, day: "1969-12-31"}
  - name: a kind without a code is refused
    given: {kind: payout, money: {minor: 1, currency: USD, exponent: 2}}
    then: {failure: FIELD_MISSING, field: code}
"""
OVERLAY = """\
target: ledger
overlay: true
fields:
  - {to: clinic, expr: upper(attributes.clinic)}
  - {to: note, expr: "concat(invoice, '/', attributes.desk)"}
examples:
  - name: own fields
    given:
      kind: refund
      money: {minor: 1, currency: JPY, exponent: 0}
      occurred_at: 86400000
      invoice: I1
      attributes: {clinic: lake, desk: "4"}
    then: {amount: "1", code: REF, clinic: LAKE, day: "1970-01-01", note: I1/4}
"""
EVENT = MoneyEvent(
    event_id="e", transaction_key="t", tenant="riverside", facility="north", source="stripe", account="north-cards",
    kind="capture", status="succeeded", money=Money(5, "KWD", 3), occurred_at=1_767_225_600_000, received_at=1,
    object_id="pi_1", root="north-cards/pi_1", source_event_id="evt_1", mrn=Reference("NORTH", "MR", "100042"),
    mapping_version="v", origin="o",
)  # fmt: skip


@pytest.fixture
def write(tmp_path):
    def write(text, name="ledger.yaml"):
        path = tmp_path / name
        path.write_text(text, "utf-8")
        return path

    return write


def edit(text, old, new):
    assert text.count(old) == 1, old
    return text.replace(old, new)


def test_event_becomes_the_fields_of_the_target(write):
    mapping = FieldMapping.load(write(GOOD))
    view = build_view(EVENT, site={"name": "Lake"})
    assert mapping.apply(view) == {
        "amount": "0.005",
        "code": "PAY",
        "account": "100042",
        "clinic": "Lake",
        "day": "2025-12-31",
    }


def test_overlay_adds_and_replaces(write):
    mapping = FieldMapping.load(write(GOOD), write(OVERLAY, "own.yaml"))
    view = build_view(EVENT, site={}) | {"attributes": {"clinic": "hill"}}
    assert mapping.apply(view) == {
        "amount": "0.005",
        "code": "PAY",
        "account": "100042",
        "clinic": "HILL",
        "day": "2025-12-31",
        "note": "/",
    }


@pytest.mark.parametrize("missing", [None, ""])
def test_required_field_without_value_is_a_failure_that_names_it(write, missing):
    mapping = FieldMapping.load(
        write(
            edit(GOOD, "expr: mrn.value", "expr: mrn.value, required: true")
            .replace("{kind: capture, money", "{mrn: {value: M}, kind: capture, money")
            .replace("{kind: payout, money", "{mrn: {value: M}, kind: payout, money")
            .replace('day: "1969-12-31"}', 'day: "1969-12-31", account: M}')
        )
    )
    view = build_view(EVENT, site={}) | {"mrn": {"value": missing}}
    with pytest.raises(Failure) as caught:
        mapping.apply(view)
    assert (caught.value.kind, caught.value.code, caught.value.field) == (
        FailureKind.UNMAPPED,
        "FIELD_MISSING",
        "account",
    )


def test_type_that_a_function_does_not_take_is_a_failure_without_the_value(write):
    mapping = FieldMapping.load(write(GOOD), write(OVERLAY, "own.yaml"))
    view = build_view(EVENT) | {"attributes": {"clinic": ["secret text"]}}
    with pytest.raises(Failure) as caught:
        mapping.apply(view)
    assert (caught.value.kind, caught.value.code, caught.value.field) == (
        FailureKind.INVALID,
        "FIELD_INVALID",
        "clinic",
    )
    assert "secret" not in str(caught.value)
    assert list(preview_events(mapping, [view])) == [{"failure": "FIELD_INVALID", "field": "clinic"}]


@pytest.mark.parametrize(
    ("old", "new", "line", "field", "detail"),
    [
        ("major(money), req", "major(mony), req", 8, "fields.0.expr", "`mony` is not a member"),
        ("expr: mrn.value", "expr: nope(mrn)", 10, "fields.2.expr", "no function `nope()`"),
        ("expr: mrn.value", "expr: 'mrn.['", 10, "fields.2.expr", "not a JMESPath expression"),
        ("lookup(kind, 'codes')", "lookup(kind, 'code')", 9, "fields.1.expr", "no table `code`"),
        ("to: day", "to: clinic", 12, "fields.4", "there twice"),
        ("event: money_event", "event: money", 1, "event", "no event schema"),
        ("accepts_phi: true", "accepts_phi: false", 10, "fields.2", "protected health information"),
        ("required: true}\n  - {to: code", "requird: true}\n  - {to: code", 8, "fields.0.requird", "not known here"),
        ("members: [site]", "members: [sites]", 11, "fields.3.expr", "`site` is not a member"),
        ('amount: "12.345"', 'amount: "12.35"', 16, "examples.0.then.amount", "gives '12.345', not '12.35'"),
        ("clinic: Lake, day", "clinc: Lake, day", 16, "examples.0.then.clinc", "does not have"),
        (", code: PAY, clinic", ", clinic", 16, "examples.0.then", "also gives `code`"),
        ("failure: FIELD_MISSING", "failure: FIELD_INVALID", 19, "examples.1.then.failure", "gives 'FIELD_MISSING'"),
        ("target: ledger\n", "", 1, "target", "required"),
    ],
)
def test_planted_error_is_named_with_file_line_and_field(write, old, new, line, field, detail):
    path = write(edit(GOOD, old, new))
    with pytest.raises(MappingError) as caught:
        FieldMapping.load(path)
    problems = [replace(problem, remedy="") for problem in caught.value.problems]
    assert any(
        (problem.file, problem.line, problem.field) == (str(path), line, field)
        and detail.lower() in problem.detail.lower()
        for problem in problems
    ), problems
    assert all(problem.remedy for problem in caught.value.problems)
    assert sorted(caught.value.problems, key=lambda problem: problem.line) == check_files([path])


def test_all_problems_come_at_once_as_one_operator_error(write):
    text = edit(edit(GOOD, "expr: mrn.value", "expr: mrn.valu"), "local_date(", "locl_date(")
    path = write(text)
    with pytest.raises(ConfigurationError) as caught:
        FieldMapping.load(path)
    assert caught.value.exit_code is ExitCode.CONFIGURATION
    assert caught.value.place == f"{path}:10"
    for part in ("2 problem(s)", f"{path}:10 fields.2.expr", f"{path}:12 fields.4.expr", "Did you mean `local_date`?"):
        assert part in str(caught.value)


@pytest.mark.parametrize(("says", "allows"), [(True, True), (True, None), (True, False), (False, True)])
def test_phi_goes_only_where_both_the_file_and_the_target_accept_it(write, says, allows):
    path = write(edit(GOOD, "accepts_phi: true", f"accepts_phi: {str(says).lower()}"))
    if says and allows is not False:
        assert FieldMapping.load(path, accepts_phi=allows).target == "ledger"
    else:
        with pytest.raises(MappingError, match="protected health information"):
            FieldMapping.load(path, accepts_phi=allows)


def test_attribute_declared_as_phi_counts_as_phi(write):
    text = edit(edit(GOOD, "accepts_phi: true", "accepts_phi: false"), "  - {to: account, expr: mrn.value}\n", "")
    path = write(text)
    assert FieldMapping.load(path).target == "ledger"
    with pytest.raises(MappingError, match="`clinic` reads protected"):
        FieldMapping.load(path, phi_attributes={"clinic"})


@pytest.mark.parametrize(
    ("old", "new", "detail"),
    [
        ("to: note", "to: amount", "required by the mapping"),
        ("target: ledger", "target: other", "The mapping is of `ledger`"),
        ("attributes.desk", "atributes.desk", "`atributes` is not a member"),
        ("note: I1/4", "note: I1/5", "gives 'I1/4', not 'I1/5'"),
        ("overlay: true", "overlay: true\ntables: 5", "dictionary"),
    ],
)
def test_planted_error_of_an_overlay_is_caught(write, old, new, detail):
    overlay = write(edit(OVERLAY, old, new), "own.yaml")
    with pytest.raises(MappingError) as caught:
        FieldMapping.load(write(GOOD), overlay)
    assert any(problem.file == str(overlay) and detail in problem.detail for problem in caught.value.problems)


def test_lone_overlay_is_checked_for_form_and_functions(write):
    assert check_files([write(OVERLAY)]) == []
    (problem,) = check_files([write(edit(OVERLAY, "upper(", "uper("))])
    assert (problem.line, problem.detail) == (4, "`clinic`: There is no function `uper()`.")


def test_own_schema_can_be_given(write):
    avro = {"type": "record", "name": "Own", "fields": [{"name": "a", "type": "string"}]}
    text = "event: own\ntarget: t\nfields: [{to: x, expr: a}]\nexamples: [{name: n, given: {a: v}, then: {x: v}}]\n"
    assert FieldMapping.load(write(text), schema=avro).apply({"a": "w"}) == {"x": "w"}
    with pytest.raises(MappingError, match="`b` is not a member"):
        FieldMapping.load(write(text.replace("expr: a", "expr: b")), schema=avro)

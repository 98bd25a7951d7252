"""Mapping files: plain YAML with lines, and source mappings with planted errors."""

from __future__ import annotations

import textwrap
from pathlib import Path

import pytest

from schemas.mapping import MappingError, check_files, load_overlay, load_source, preview_bodies
from schemas.mapping_files import read_mapping_file
from streams.normalise import MAPPINGS

STRIPE = (MAPPINGS / "stripe.yaml").read_text("utf-8")
NORTH = (Path(__file__).parents[2] / "examples" / "overlays" / "north.yaml").read_text("utf-8")

ACME = """\
source: acme
version: 3
envelope: {type: what, id: ref, occurred_at: iso_ms(at)}
defaults: {topic: payments, currency: upper(cur), status: state, object_id: ref, root: parent || ref}
events:
  payment:
    - {kind: capture, when: state == 'done', major: total}
    - {kind: refund, when: state == 'returned', major: total}
evidence:
  payment:
examples:
  - name: decimal text
    given: {what: payment, ref: 77, at: "2026-01-01T00:00:00.5+00:00", state: done, cur: bhd, total: "1.234"}
    then: {kind: capture, minor: 1234, exponent: 3, object_id: "77", root: "77", occurred_at: 1767225600500}
  - name: the second rule
    given: {what: payment, ref: 78, parent: 77, at: "2026-01-01T00:00:00Z", state: returned, cur: usd, total: 12}
    then: {kind: refund, minor: 1200, root: "77"}
  - name: neither rule
    given: {what: payment, state: waiting}
    then: {ignored: EVIDENCE}
"""
PHI_SETTLEMENTS = "topic: settlements, attributes: {ward: {expr: ward, sensitivity: phi}}, "


@pytest.fixture
def write(tmp_path):
    def write(text, name="file.yaml"):
        path = tmp_path / name
        path.write_bytes(text if isinstance(text, bytes) else text.encode())
        return path

    return write


def edit(text, old, new):
    assert text.count(old) == 1, (old, text.count(old))
    return text.replace(old, new)


def test_scalars_stay_what_people_wrote(write):
    text = textwrap.dedent("""\
        country: NO
        flag: true
        nothing: ~
        count: 12
        code: 0420
        ratio: 1.50
        time: 12:30
        day: 2026-01-01
        quoted: "7"
        words: {yes: on, null: no}
        """)
    document = read_mapping_file(write(text))
    assert document.problems == []
    assert document.data == {
        "country": "NO", "flag": True, "nothing": None, "count": 12, "code": "0420", "ratio": "1.50", "time": "12:30",
        "day": "2026-01-01", "quoted": "7", "words": {"yes": "on", "null": "no"},
    }  # fmt: skip


def test_lines_are_those_of_the_members(write):
    document = read_mapping_file(write("a:\n  b:\n    - x\n    - c: 1\n"))
    assert document.lines[("a",)] == 1
    assert document.lines[("a", "b")] == 2
    assert document.lines[("a", "b", 0)] == 3
    assert document.lines[("a", "b", 1, "c")] == 4


@pytest.mark.parametrize(
    ("text", "line", "detail"),
    [
        ("a: 1\nb: [1\n", 3, "Not YAML"),
        ("a: 1\n\tb: 2\n", 2, "Not YAML"),
        ("a: &x 1\nb: *x\n", 1, "anchors"),
        ("events: 1\nevents: 2\n", 2, "there twice"),
        ("a: !!python/object/apply:os.system [x]\n", 1, "Not a mapping file"),
        ("a: !own x\n", 1, "tags are not read"),
        ("", 1, "empty"),
        (b"a: \xff\n", 1, "Not a UTF-8"),
        ("a: \x00\n", 1, "Not a UTF-8"),
        ("? [1, 2]\n: 3\n", 1, "must be text"),
        ("just text\n", 1, "Not a mapping file"),
    ],
)
def test_bad_files_are_problems_never_exceptions(write, text, line, detail):
    problems = check_files([write(text)])
    assert any(problem.line == line and detail in problem.detail for problem in problems), problems


def test_missing_file_is_a_problem(tmp_path):
    (problem,) = check_files([tmp_path / "absent.yaml"])
    assert "cannot be read (FileNotFoundError)" in problem.detail


def test_another_gateway_needs_no_code(write):
    path = write(ACME)
    assert check_files([path]) == []
    mapping = load_source(path)
    body = (
        b'{"what":"payment","ref":9007199254740993,"at":"2026-01-01T00:00:00Z","state":"done","cur":"usd","total":10.1}'
    )
    found = mapping.read(body)
    assert (found.money.minor, found.object_id, found.root) == (1010, "9007199254740993", "9007199254740993")


def test_preview_shows_each_body_or_why_not(write):
    bodies = [
        b'{"what":"payment","ref":"a","at":"2026-01-01T00:00:00Z","state":"done","cur":"usd","total":"10.005"}',
        b'{"what":"other"}',
        b"nonsense",
    ]
    assert list(preview_bodies(write(ACME), bodies)) == [
        {"failure": "AMOUNT_INVALID", "field": "amount"},
        {"event_type": "other", "ignored": "UNKNOWN_TYPE", "evidence_of": None},
        {"failure": "BODY_INVALID", "field": ""},
    ]


@pytest.mark.parametrize(
    ("base", "old", "new", "field", "detail"),
    [
        (ACME, "source: acme", "source: Acme!", "source", "pattern"),
        (ACME, "version: 3", "version: 0", "version", "greater than or equal to 1"),
        (ACME, "what, id", "what, it", "envelope.id", "required"),
        (ACME, "upper(cur)", "uper(cur)", "defaults.currency", "no function `uper()`"),
        (ACME, "iso_ms(at)", "'iso_ms(at, at)'", "envelope.occurred_at", "takes 1 argument(s)"),
        (ACME, "state: done, cur: bhd", "state: done, cur: xqz", "examples.0.then", "failure UNKNOWN_CURRENCY"),
        (ACME, "parent || ref", "parent ||", "defaults.root", "not a JMESPath expression"),
        (ACME, "kind: capture, when", "kind: captured, when", "events.payment.0.kind", "Input should be"),
        (ACME, "'done', major: total", "'done', minor: total, major: total", "events.payment.0.minor", "one amount"),
        (ACME, "'returned', major: total", "'returned'", "events.payment.1.minor", "one amount"),
        (ACME, "topic: payments, ", "topic: charges, ", "events.payment.0.topic", "not a topic of money events"),
        (ACME, "topic: payments, ", "", "events.payment.1.topic", "has no `topic`"),
        (ACME, "status: state, ", "", "events.payment.0.status", "has no `status`"),
        (ACME, "evidence:\n  payment:\n", "", "events.payment", "when no `when` holds"),
        (ACME, "when: state == 'returned', ", "", "events.payment", "always is a money fact"),
        (ACME, "when: state == 'done', ", "", "events.payment", "hides the rules after it"),
        (ACME, "  payment:\nexamples", "  payment: {of: capture}\nexamples", "evidence.payment", "go together"),
        (ACME, "evidence:\n", "not_money: [payment]\nevidence:\n", "evidence.payment", "and in `not_money`"),
        (ACME, "version: 3", "version: 3\nfacts: [kind, object_id, currency]", "facts", "digest needs minor"),
        (ACME, "minor: 1234", "minor: 1235", "examples.0.then.minor", "gives 1234, not 1235"),
        (ACME, "{ignored: EVIDENCE}", "{ignored: NOT_MONEY}", "examples.2.then.ignored", "gives 'EVIDENCE'"),
        (ACME, "{ignored: EVIDENCE}", "{}", "examples.2.then", "it cannot fail"),
        (ACME, "version: 3", "version: 3\nversions: 3", "versions", "not known here"),
        (ACME, "topic: payments, ", PHI_SETTLEMENTS, "events.payment.0.attributes", "no protected health"),
        (STRIPE, "minor: amount_received", "minor: amount", "examples.0.then.minor", "gives 20000, not 12345"),
        (STRIPE, "id_of(payment_intent) || id_of(charge) ||", "payment_intent ||", "examples.1.then", "FIELD_INVALID"),
        (STRIPE, "exponent: 0", "exponent: false", "examples.3.then.exponent", "gives 0, not False"),
        (STRIPE, "captured && !payment_intent", "captured", "examples.2.then", "gives failure FIELD_MISSING"),
    ],
)  # fmt: skip
def test_planted_error_in_a_source_mapping_is_caught(write, base, old, new, field, detail):
    problems = check_files([write(edit(base, old, new))])
    assert any(problem.field == field and detail in problem.detail for problem in problems), problems
    assert all(problem.remedy and problem.line > 0 for problem in problems)


@pytest.mark.parametrize(
    ("old", "new", "field", "detail"),
    [
        ("facility: north", "facilty: north", "facilty", "not known here"),
        (
            "cost_centre:\n        expr",
            "cost_centre:\n        exp",
            "sources.stripe.attributes.cost_centre.expr",
            "required",
        ),
        (
            "lookup(metadata.clinic, 'clinics')",
            "lookup(metadata.clinic, 'clinic')",
            "sources.stripe.attributes.clinic",
            "no table",
        ),
        (
            "then: {clinic: Day Ward}",
            "then: {clinic: Ward}",
            "sources.stripe.examples.1.then.clinic",
            "gives 'Day Ward'",
        ),
        ("kinds: [capture]", "kinds: [captures]", "sources.stripe.attributes.cost_centre.kinds.0", "Input should be"),
        (
            "kinds: [capture]",
            "required: true",
            "sources.stripe.examples.2.then",
            "gives failure FIELD_MISSING (attributes.cost_centre)",
        ),
        (
            "sources:\n  stripe:\n",
            "sources:\n  stripe:\n    currency: x\n",
            "sources.stripe.currency",
            "not known here",
        ),
    ],
)
def test_planted_error_in_an_overlay_is_caught(write, old, new, field, detail):
    path = write(edit(NORTH, old, new))
    problems = check_files([path])
    assert any(problem.field == field and detail in problem.detail for problem in problems), problems
    with pytest.raises(MappingError):
        load_overlay(path)

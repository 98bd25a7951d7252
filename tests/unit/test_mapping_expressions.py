"""Expressions: our closures against JMESPath's own interpreter, the named functions, errors without payload."""

from __future__ import annotations

import json
import re
from pathlib import Path

import jmespath
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.mapping_expressions import Expression, ExpressionError, is_false
from schemas.mapping_functions import EXAMPLE_TABLES, FUNCTIONS, REFUSED, MappingFunctions

ROOT = Path(__file__).parents[2]

names = st.sampled_from(["a", "b", "c", '"odd name"'])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(10**15, 10**19),
    st.sampled_from(["", "0", "x", "id", "a"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3), st.dictionaries(st.sampled_from(["a", "b", "c", "odd name"]), inner, max_size=4)
    ),
    max_leaves=12,
)
literals = scalars.map(lambda value: f"`{json.dumps(value)}`")


def extend(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, names).map(lambda p: f"({p[0]}).{p[1]}"),
        two.map(lambda p: f"({p[0]}) || ({p[1]})"),
        two.map(lambda p: f"({p[0]}) && ({p[1]})"),
        two.map(lambda p: f"({p[0]}) | ({p[1]})"),
        st.tuples(inner, st.sampled_from(["==", "!=", "<", ">="]), inner).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
        inner.map(lambda p: f"!({p})"),
        st.tuples(inner, st.integers(-3, 3)).map(lambda p: f"({p[0]})[{p[1]}]"),
        inner.map(lambda p: f"({p})[*]"),
        inner.map(lambda p: f"({p})[]"),
        inner.map(lambda p: f"({p}).*"),
        two.map(lambda p: f"({p[0]})[?{p[1]}]"),
        two.map(lambda p: f"[{p[0]}, {p[1]}]"),
        two.map(lambda p: f"{{a: {p[0]}, b: {p[1]}}}"),
        inner.map(lambda p: f"type({p})"),
        two.map(lambda p: f"not_null({p[0]}, {p[1]})"),
        inner.map(lambda p: f"to_string({p})"),
        inner.map(lambda p: f"map(&a, to_array({p}))"),
    )


expressions = st.recursive(
    st.one_of(names, literals, st.just("@"), st.just("a.b"), st.just("a.b.c")), extend, max_leaves=6
)


def same(one, other):
    """Equal as JSON: true is not 1."""
    return json.dumps(one, sort_keys=True) == json.dumps(other, sort_keys=True)


@settings(max_examples=400, deadline=None)
@given(expressions, values)
def test_closures_agree_with_the_interpreter(text, value):
    oracle = jmespath.compile(text)
    try:
        wanted = oracle.search(value)
    except Exception:  # noqa: BLE001 - whatever the interpreter raises, ours must refuse too
        with pytest.raises(ExpressionError):
            Expression(text).evaluate(value)
        return
    assert same(Expression(text).evaluate(value), wanted), text


@settings(max_examples=300, deadline=None)
@given(st.lists(names, min_size=1, max_size=4), values)
def test_plain_paths_agree_with_the_interpreter(parts, value):
    text = ".".join(parts)
    expression = Expression(text)
    assert expression.path == tuple(part.strip('"') for part in parts)
    assert same(expression.evaluate(value), jmespath.search(text, value))


EDGES = [None, True, False, 0, 1, -1, "", "0", "a", [], [0], [False], {}, {"a": 1}, {"a": None}]


@pytest.mark.parametrize(
    "text", ["a == b", "a != b", "a || b", "a && b", "!a", "!(a && b)", "a.a || b.a", "a == `1`", "a == `true`"]
)
def test_operators_agree_with_the_interpreter_on_every_pair_of_edges(text):
    expression, oracle = Expression(text), jmespath.compile(text)
    for one in EDGES:
        for other in EDGES:
            value = {"a": one, "b": other}
            assert same(expression.evaluate(value), oracle.search(value)), value


@pytest.mark.parametrize("length", range(4))
def test_indexes_agree_with_the_interpreter_at_every_position(length):
    value = {"a": [{"b": position} for position in range(length)]}
    for position in range(-5, 6):
        for text in (f"a[{position}]", f"a[{position}].b", f"(a)[{position}] | b"):
            assert same(Expression(text).evaluate(value), jmespath.search(text, value)), text


@given(values)
def test_falseness_agrees_with_the_interpreter(value):
    assert is_false(value) is (jmespath.search("@ && `1` || `2`", value) == 2)


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_example_of_each_function_holds(function):
    expression = Expression(function.expression, MappingFunctions(EXAMPLE_TABLES))
    assert same(expression.evaluate(dict(function.given)), function.result)
    assert f"{function.name}(" in function.expression


def test_every_function_of_ours_is_described_and_refused_ones_are_gone():
    theirs = set(jmespath.functions.Functions.FUNCTION_TABLE)
    ours = set(MappingFunctions.FUNCTION_TABLE)
    assert ours - theirs == {function.name for function in FUNCTIONS}
    assert theirs - ours == set(REFUSED)


def test_documentation_lists_every_function_with_its_example():
    page = (ROOT / "docs" / "mappings.md").read_text("utf-8")
    rows = {match[1]: match[0] for match in re.finditer(r"^\| `([^`]+)` \|.*$", page, re.MULTILINE)}
    for function in FUNCTIONS:
        given_text = json.dumps(dict(function.given), ensure_ascii=False)
        result = json.dumps(function.result, ensure_ascii=False)
        assert rows[function.call] == (
            f"| `{function.call}` | {function.meaning} | `{function.expression}` | `{given_text}` | `{result}` |"
        )
    for name in REFUSED:
        assert f"`{name}`" in page


@pytest.mark.parametrize(
    ("text", "value", "wanted"),
    [
        ("major(m)", {"m": {"minor": -5, "currency": "KWD", "exponent": 3}}, "-0.005"),
        ("major(m)", {"m": {"minor": 1250, "currency": "JPY", "exponent": 0}}, "1250"),
        ("major(m)", {"m": None}, None),
        ("iso_date(t)", {"t": -1}, "1969-12-31"),
        ("hl7_time(t, 'Asia/Kuwait')", {"t": 0}, "19700101030000+0300"),
        ("epoch_ms(t)", {"t": "1.0019"}, 1001),
        ("epoch_ms(t)", {"t": None}, None),
        ("iso_ms(t)", {"t": "1970-01-01T00:00:00.999999Z"}, 999),
        ("lookup(t, 'sites')", {"t": "X"}, None),
        ("mask(t)", {"t": "1234"}, "****"),
        ("mask(t)", {"t": "12345"}, "*2345"),
        ("concat(a, b)", {}, None),
        ("default(a, `0`)", {"a": False}, False),
        ("id_of(a)", {"a": {"object": "payment_intent"}}, None),
        ("id_of(a) || id_of(b) || id", {"a": {}, "b": None, "id": "x"}, "x"),
    ],
)
def test_functions_at_their_edges(text, value, wanted):
    assert same(Expression(text, MappingFunctions(EXAMPLE_TABLES)).evaluate(value), wanted)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("upper(a)", {"a": 1}),
        ("major(a)", {"a": {"minor": 1.5, "currency": "USD", "exponent": 2}}),
        ("major(a)", {"a": {"minor": True, "currency": "USD", "exponent": 2}}),
        ("major(a)", {"a": {}}),
        ("iso_date(a)", {"a": 1.5}),
        ("iso_date(a)", {"a": 10**30}),
        ("local_date(a, 'Mars/Base')", {"a": 1}),
        ("epoch_ms(a)", {"a": 1.5}),
        ("epoch_ms(a)", {"a": "soon"}),
        ("epoch_ms(a)", {"a": "NaN"}),
        ("iso_ms(a)", {"a": "2026-01-01T00:00:00"}),
        ("concat(a, b)", {"a": "x", "b": 1.5}),
        ("concat(a, b)", {"a": "x", "b": True}),
        ("lookup(a, 'nowhere')", {"a": "x"}),
        ("nope(a)", {"a": 1}),
        ("to_number(a)", {"a": "10.50"}),
    ],
)
def test_wrong_types_are_refused_without_their_value(text, value):
    with pytest.raises(ExpressionError) as caught:
        Expression(text).evaluate(value)
    assert str(caught.value).isidentifier()  # the exception's type, nothing of the value
    assert caught.value.__cause__ is None
    assert caught.value.__suppress_context__


@pytest.mark.parametrize("text", ["", "a.[b", "a b", "a ||", "upper(", "a[?]", "(" * 5000])
def test_syntax_errors_are_refused(text):
    with pytest.raises(ExpressionError):
        Expression(text)


@pytest.mark.parametrize(
    ("text", "path"),
    [("a", ("a",)), ("a.b", ("a", "b")), ("@", ()), ("a || b", None), ("a[0]", None), ("upper(a)", None), ("*", None)],
)
def test_path_is_known_only_for_plain_paths(text, path):
    assert Expression(text).path == path


def test_large_integers_stay_exact():
    assert Expression("a || b").evaluate({"a": 9007199254740993}) == 9007199254740993

"""Compiled mappings against the interpreter, for the whole language: random expressions over random bodies."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from schemas.events import Kind
from schemas.failure import Failure
from schemas.mapping import Attribute, Expression, MappingFunctions, Reading, SourceMapping, describe_compilation
from schemas.mapping_compiler import FACT, MappingNotCompiled, compile_mapping, has_long_number
from schemas.mapping_functions import EXAMPLE_TABLES, FUNCTIONS
from schemas.mapping_reading import Rule, Sister, read_attributes
from schemas.tenancy import Tenancy
from streams.normalise import MAPPINGS, Ignored, Normaliser
from topics.headers import RawRecord

OVERLAY = Path(__file__).parents[2] / "examples" / "overlays" / "north.yaml"

FUNCTION_SET = MappingFunctions(EXAMPLE_TABLES)

names = st.sampled_from(["a", "b", "c", '"odd name"', "class"])
scalars = st.one_of(
    st.none(),
    st.booleans(),
    st.integers(-3, 3),
    st.integers(10**15, 10**19),
    st.floats(-1, 5, allow_nan=False),
    st.sampled_from(["", " ", "0", "x", "id", "a", "N", "12.50", "2026-01-01T00:00:00Z", "[card redacted]"]),
)
values = st.recursive(
    scalars,
    lambda inner: st.one_of(
        st.lists(inner, max_size=3),
        st.dictionaries(st.sampled_from(["a", "b", "c", "odd name", "class", "id"]), inner, max_size=4),
    ),
    max_leaves=10,
)
bodies = st.one_of(values, st.fixed_dictionaries({"a": values, "b": values}, optional={"c": values, "class": values}))
literals = scalars.map(lambda value: f"`{json.dumps(value)}`")
ONE = ["upper", "lower", "mask", "digest", "iso_ms", "epoch_ms", "iso_date", "id_of", "length", "keys", "values"]
ONE += ["type", "to_string", "to_array", "reverse", "sort", "max", "abs", "not_null", "concat", "major"]


def extend(inner):
    two = st.tuples(inner, inner)
    return st.one_of(
        st.tuples(inner, names).map(lambda p: f"({p[0]}).{p[1]}"),
        two.map(lambda p: f"({p[0]}) || ({p[1]})"),
        two.map(lambda p: f"({p[0]}) && ({p[1]})"),
        two.map(lambda p: f"({p[0]}) | ({p[1]})"),
        st.tuples(inner, st.sampled_from(["==", "!=", "<", ">="]), inner).map(lambda p: f"({p[0]}) {p[1]} ({p[2]})"),
        inner.map(lambda p: f"!({p})"),
        st.tuples(inner, st.integers(-2, 2)).map(lambda p: f"({p[0]})[{p[1]}]"),
        st.tuples(inner, st.sampled_from(["[*]", "[]", ".*", "[:1]"])).map(lambda p: f"({p[0]}){p[1]}"),
        two.map(lambda p: f"({p[0]})[?{p[1]}]"),
        two.map(lambda p: f"[{p[0]}, {p[1]}]"),
        two.map(lambda p: f"{{a: {p[0]}, b: {p[1]}}}"),
        st.tuples(st.sampled_from(ONE), inner).map(lambda p: f"{p[0]}({p[1]})"),
        st.tuples(st.sampled_from(["default", "concat", "not_null", "contains", "join", "starts_with"]), two).map(
            lambda p: f"{p[0]}({p[1][0]}, {p[1][1]})"
        ),
        inner.map(lambda p: f"lookup({p}, 'sites')"),
        inner.map(lambda p: f"map(&a, to_array({p}))"),
    )


def show(texts):
    """Attributes that have a text whatever the value, so that it is compared."""
    return [f"to_string({text})" for text in texts]


expressions = st.recursive(
    st.one_of(names, literals, st.just("@"), st.just("a.b"), st.just("a.b.c"), st.just("b.a.class")),
    extend,
    max_leaves=5,
)


def parse(text):
    return Expression(text, FUNCTION_SET)


def build_mapping(*, focus="o", when=None, attributes=(), **fields):
    texts = {"amount": "`5`", "currency": "'usd'", "status": "'s'", "object_id": "'i'", "root": "'r'"} | fields
    decimal = "major" in texts
    amount = texts.pop("major", None) or texts["amount"]
    compiled = {name: parse(text) for name, text in texts.items() if name not in {"amount", "occurred_at", "token"}}
    rule = Rule(
        kind=Kind.CAPTURE,
        topic="payments",
        when=None if when is None else parse(when),
        amount=parse(amount),
        decimal=decimal,
        may_be_negative=False,
        occurred_at=None,
        token_reference=parse(texts["token"]) if "token" in texts else None,
        attributes=tuple(attributes),
        **compiled,
    )
    return SourceMapping(
        source="acme",
        version=1,
        digest="",
        event_type=parse("t"),
        event_id=parse("'e'"),
        occurred_at=parse("`1767225600000`"),
        object=parse(focus),
        metadata=parse("a"),
        facts=("kind",),
        rules={"x": (rule,)},
        evidence={"x": Sister(kind="refund", object_id=parse("b"))} if when is not None else {},
        not_money=frozenset({"n"}),
    )


def build_attributes(texts, *, required=False):
    return tuple(Attribute(f"f{place}", parse(text), required, False, ()) for place, text in enumerate(texts))


def write_body(value, event_type="x"):
    return json.dumps({"t": event_type, "o": value}).encode()


def compare(mapping, body):
    """Whether the program answered; what it answered is what the interpreter answers."""
    program = compile_mapping(mapping)
    found = program.read(body)
    if found is None:
        return False
    wanted = mapping.read(body)
    if isinstance(wanted, Reading):
        members = dict(zip(FACT, found, strict=True))
        rule = program.rules[members.pop("rule")]
        assert (rule.kind, rule.topic) == (wanted.kind, wanted.topic)
        del members["focus"]
        mine = {name: getattr(wanted, name) for name in members}
        assert members == mine
        # True is not 1, and the order of attributes reaches the bytes that are written.
        assert json.dumps(members, default=repr) == json.dumps(mine, default=repr)
    else:
        assert found == wanted
    return True


answers = {"asked": 0, "answered": 0}


@settings(max_examples=250, deadline=None)
@given(
    texts=st.lists(expressions, min_size=1, max_size=3),
    focus=st.sampled_from(["o", "@", "o.a", "o || @", "[o][0]"]),
    token=expressions,
    value=bodies,
    required=st.booleans(),
    shown=st.booleans(),
)
def test_any_expression_reads_the_same(texts, focus, token, value, required, shown):
    mapping = (
        build_mapping(focus=focus, attributes=build_attributes(show(texts)))
        if shown
        else build_mapping(focus=focus, token=token, attributes=build_attributes(texts, required=required))
    )
    answers["asked"] += 1
    answers["answered"] += compare(mapping, write_body(value))


def test_many_of_them_were_answered():
    assert answers["answered"] > answers["asked"] * 0.05 > 0


@settings(max_examples=100, deadline=None)
@given(when=expressions, value=bodies)
def test_any_condition_holds_for_the_same_bodies(when, value):
    compare(build_mapping(when=when), write_body(value))


@settings(max_examples=80, deadline=None)
@given(amount=values, currency=st.sampled_from(["usd", "USD", "Usd", "kwd", "xxx", "", 5, None]), decimal=st.booleans())
def test_any_amount_is_the_same_money(amount, currency, decimal):
    unit = {"major": "a"} if decimal else {"amount": "a"}
    compare(build_mapping(currency="b", **unit), write_body({"a": amount, "b": currency}))


@settings(max_examples=80, deadline=None)
@given(texts=st.lists(expressions, min_size=1, max_size=2), value=bodies, focus=st.sampled_from(["o", "@", "[o][0]"]))
def test_overlays_add_the_same_attributes(texts, value, focus):
    mapping, own = build_mapping(focus=focus, attributes=build_attributes(["a", "b"])), build_attributes(texts)
    program = compile_mapping(mapping, {"north": own})
    found = program.read(write_body(value))
    if found is None:
        return
    members = dict(zip(FACT, found, strict=True))
    attached = program.overlays["north"][Kind.CAPTURE](members["focus"], members["attributes"])
    if attached is None:
        return
    reading = mapping.read(write_body(value))
    wanted = reading.attributes | read_attributes(own, reading.object, reading.kind)
    assert list(attached.items()) == list(wanted.items())


@pytest.mark.parametrize("function", FUNCTIONS, ids=lambda function: function.name)
def test_every_function_is_compiled(function):
    mapping = build_mapping(attributes=build_attributes([f"to_string({function.expression})"]))
    body = write_body(dict(function.given))
    assert compare(mapping, body)
    assert compile_mapping(mapping).read(body)[FACT.index("attributes")]


@pytest.mark.parametrize("event_type", ["x", "n", "never heard of", 5, 1.5])
def test_every_type_of_event_is_answered(event_type):
    assert compare(build_mapping(), write_body({}, event_type))


@pytest.mark.parametrize("event_type", [None, "", " ", "a [card redacted]", [], {}, True])
def test_no_type_of_event_is_left_to_the_interpreter(event_type):
    assert compile_mapping(build_mapping()).read(write_body({}, event_type)) is None


@pytest.mark.parametrize(
    "skipped", [b'"\xff"', b"7" * 4301, b"-" + b"7" * 5000, b'{"\xc3":1}', b"[" * 9999 + b"]" * 9999]
)
def test_what_the_decoder_skips_is_checked_too(skipped):
    mapping = build_mapping()
    with pytest.raises(Failure, match="BODY_INVALID"):
        mapping.read(b'{"t":"x","z":' + skipped + b',"o":{}}')
    assert compile_mapping(mapping).read(b'{"t":"x","z":' + skipped + b',"o":{}}') is None


@pytest.mark.parametrize("length", [4301, 4316, 6000, 20_000])
@pytest.mark.parametrize("before", [0, 1, 2149, 2150, 2151, 4299, 9000])
def test_a_long_number_is_found_wherever_it_begins(length, before):
    assert has_long_number(b"x" * before + b"7" * length + b"}")


def test_ordinary_digits_are_no_long_number():
    assert not has_long_number(b'{"amount":1234567890123,' * 500)


def test_a_mapping_that_cannot_become_code_says_why():
    deep = "a"
    for _ in range(120):
        deep = f"b || ({deep})"
    with pytest.raises(MappingNotCompiled, match="indentation"):
        compile_mapping(replace(build_mapping(), event_type=parse(deep)))


def test_mapping_check_tells_whether_a_mapping_is_compiled(tmp_path):
    shipped = MAPPINGS / "stripe.yaml"
    deep = tmp_path / "stripe.yaml"
    deep.write_text(
        shipped.read_text("utf-8").replace(
            "token_reference: id_of(payment_method)",
            f"token_reference: {'absent || (' * 120}id_of(payment_method){')' * 120}",
        ),
        "utf-8",
    )
    told = describe_compilation([shipped, deep, OVERLAY])
    assert told[str(shipped)] == "yes"
    assert told[str(deep)].startswith("no: IndentationError")
    assert str(OVERLAY) not in told
    # Its events are the same, by the long way.
    tenancy = Tenancy.model_validate(
        {
            "tenant": "riverside",
            "facilities": [
                {"id": "north", "time_zone": "UTC", "default_authority": "N", "authorities": [{"name": "N"}]},
            ],
            "accounts": [{"name": "main", "source": "stripe", "facility": "north", "secrets": ["x"]}],
        }
    )
    normaliser = Normaliser.load("stripe", tenancy, tmp_path)
    assert "IndentationError" in normaliser.not_compiled
    assert normaliser.shortcut is None
    body = {"id": "evt_1", "type": "customer.created", "created": 1, "data": {"object": {}}}
    record = RawRecord(
        hop="T:0:1", partition=0, offset=1, key=b"k", value=json.dumps(body).encode(), timestamp=0,
        headers=[("source", b"stripe"), ("account", b"main"), ("facility", b"north")],
    )  # fmt: skip
    assert normaliser.normalise(record) == Ignored("NOT_MONEY", "customer.created", "")

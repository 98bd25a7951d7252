"""Card data: what is replaced, what stays, and that every other byte is untouched.

The check digit and the number generator here are written for the test alone.
"""

from __future__ import annotations

import json
import string

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from schemas.card_data import CARD_TEXT, find_card_data, redact

settings.register_profile("steady", deadline=None)  # how long it takes is the machine's business
settings.load_profile("steady")

# (leading digits, length), chosen by hand from the networks' published ranges.
SHAPES = [
    ("4", 13), ("4", 16), ("4", 19), ("51", 16), ("55", 16), ("2221", 16), ("2720", 16), ("2500", 16), ("34", 15),
    ("37", 15), ("6011", 16), ("644", 16), ("649", 19), ("65", 16), ("3528", 16), ("3589", 19), ("300", 14),
    ("305", 16), ("3095", 14), ("36", 14), ("38", 14), ("39", 19), ("62", 16), ("62", 19), ("5018", 12), ("5020", 13),
    ("6304", 19), ("6759", 16), ("6761", 18), ("6763", 12),
]  # fmt: skip
FOREIGN = [
    ("1", 16), ("0", 16), ("7", 16), ("8", 16), ("9", 16), ("2220", 16), ("2721", 16), ("500", 16), ("56", 16),
    ("35", 15), ("4", 15), ("4", 14), ("34", 16), ("51", 15), ("6011", 15), ("643", 16), ("3527", 16), ("306", 14),
]  # fmt: skip


def check_digit(payload):
    """Luhn as the textbook has it: from the right, double every second digit, subtract nine above nine."""
    total = 0
    for place, character in enumerate(reversed(payload)):
        number = int(character)
        if place % 2 == 0:
            number *= 2
            if number > 9:
                number -= 9
        total += number
    return str((10 - total % 10) % 10)


@st.composite
def numbers(draw, shapes=SHAPES, *, valid=True):
    prefix, length = draw(st.sampled_from(shapes))
    free = length - len(prefix) - 1
    payload = prefix + draw(st.text(string.digits, min_size=free, max_size=free))
    digit = check_digit(payload)
    if not valid:
        digit = str((int(digit) + draw(st.integers(1, 9))) % 10)
    return payload + digit


@st.composite
def spellings(draw):
    """A card number, perhaps with single spaces or dashes between its digits."""
    number = draw(numbers())
    style = draw(st.sampled_from(["plain", "fours", "any"]))
    if style == "plain":
        return number
    if style == "fours":
        separator = draw(st.sampled_from([" ", "-"]))
        return separator.join(number[start : start + 4] for start in range(0, len(number), 4))
    cuts = draw(st.lists(st.sampled_from(["", "", " ", "-"]), min_size=len(number), max_size=len(number)))
    return "".join(digit + cut for digit, cut in zip(number, cuts, strict=True)).rstrip(" -")


# No digits, and no words that announce a security code.
fillers = st.text(string.ascii_letters.replace("p", "").replace("c", "").replace("P", "") + " .,:/\nöß", max_size=20)


@given(fillers, spellings(), fillers)
def test_number_in_text_is_replaced_and_the_rest_kept(before, number, after):
    found = redact((before + "<" + number + ">" + after).encode(), json=False)
    assert found.body == (before + "<").encode() + CARD_TEXT + (">" + after).encode()
    assert (found.cards, found.total) == (1, 1)
    assert find_card_data(before + "<" + number + ">" + after)


@given(numbers())
def test_number_written_as_json_number_becomes_a_json_string(number):
    body = b'{ "a": [1,' + number.encode() + b'] , "b" :' + number.encode() + b',"c":-' + number.encode() + b".50}"
    found = redact(body, json=True)
    assert json.loads(found.body) == {"a": [1, "[card redacted]"], "b": "[card redacted]", "c": "[card redacted]"}
    assert found.cards == 3
    assert found.body.startswith(b'{ "a": [1,"[card redacted]"] , "b" :"')


@given(spellings(), st.sampled_from(["caf\u00e9 ", "\u00a0", "2\u2013", 'say "', "back\\", "\\uABCD"]), st.booleans())
@example("4242424242424242", "\u00a0", True)
def test_number_in_a_json_string_is_replaced_also_after_escapes(number, before, ascii_only):
    body = json.dumps({"note": before + number, "next": 1}, ensure_ascii=ascii_only).encode()
    found = redact(body, json=True)
    assert json.loads(found.body) == {"note": before + "[card redacted]", "next": 1}


@given(numbers(valid=False) | numbers(FOREIGN))
def test_wrong_check_digit_issuer_or_length_stays(number):
    body = f'{{"id":"x{number}","n":{number}}}'.encode()
    assert redact(body, json=True).body == body
    assert not find_card_data(number)


@given(numbers(), st.sampled_from(string.digits), st.booleans())
def test_number_with_a_digit_beside_it_stays_unless_that_makes_another(number, digit, before):
    longer = digit + number if before else number + digit
    body = longer.encode()
    found = redact(body, json=False)
    is_card = check_digit(longer[:-1]) == longer[-1] and any(
        longer.startswith(prefix) and len(longer) == length for prefix, length in ALL_SHAPES
    )
    assert found.body == (CARD_TEXT if is_card else body)


# Prefixes of the networks with every length they issue, spelled out a second time for the oracle above.
ALL_SHAPES = [
    *[("4", length) for length in (13, 16, 19)],
    *[(str(prefix), 16) for prefix in [*range(51, 56), *range(2221, 2721)]],
    ("34", 15),
    ("37", 15),
    *[
        (str(prefix), length)
        for prefix in [6011, *range(644, 650), 65, *range(3528, 3590), 62]
        for length in range(16, 20)
    ],
    *[(str(prefix), length) for prefix in [*range(300, 306), 3095, 36, 38, 39] for length in range(14, 20)],
    *[
        (prefix, length)
        for prefix in ("5018", "5020", "5038", "5893", "6304", "6759", "6761", "6762", "6763")
        for length in range(12, 20)
    ],
]


@given(st.text(string.digits, min_size=12, max_size=19))
def test_any_run_of_digits_agrees_with_the_oracle(digits):
    is_card = check_digit(digits[:-1]) == digits[-1] and any(
        digits.startswith(prefix) and len(digits) == length for prefix, length in ALL_SHAPES
    )
    assert find_card_data(f"id {digits}.") is is_card


@pytest.mark.parametrize(
    "text",
    [
        "pi_3MtwBwLkdIwHu7ix28a3tqPa",
        "ch_3MtwBwLkdIwHu7ix2VqQ7yXk",
        "evt_1SkEinvented",
        "20260102030405.1234+0100",
        "2026-01-02T03:04:05.678901Z",
        "1767322245",
        "1767322245678",
        "1767322245678901",
        "+1 415 555 0100",
        "(415) 555-0100",
        "4155550100",
        "0049 30 1234567",
        "2026-01-02 14:30",
        "12550",
        "f47ac10b-58cc-4372-a567-0e02b2c3d479",
        "MSH|^~\\&|ADT|NORTH|RS|RS|20260102030405||ADT^A04^ADT_A01|MSG00001|P|2.5.1",
        "PID|1||1000231^^^NORTH^MR||DOE^ANN||19800101|F|||1 MAIN ST^^TOWN^TX^75001||4155550100",
        '"cvc_check": "pass"',
        "shipping to pin 4",
        "the CVV was not sent; see invoice 123",
        "spin: 1234",
        "security code ring: yes",
        "4242  4242 4242 4242",
        "4242 4242 - 4242 4242",
        "4242.4242.4242.4242",
    ],
)
def test_ids_times_and_telephone_numbers_stay(text):
    assert redact(text.encode(), json=False).body == text.encode()
    body = json.dumps({"value": text, "list": [text]}).encode()
    assert redact(body, json=True).body == body
    assert not find_card_data(text)


def test_fraction_of_a_json_number_stays_but_not_in_text():
    body = b'{"rate":0.4242424242424242}'
    assert redact(body, json=True).body == body
    assert redact(b'{"rate":"0.4242424242424242"}', json=True).cards == 1


def test_number_beside_a_date_and_two_numbers_in_one_run():
    found = redact(b"paid 2026-01-02 4242 4242 4242 4242 12/28 5555-5555-5555-4444 4111111111111111 x", json=False)
    assert found.body == b"paid 2026-01-02 [card redacted] 12/28 [card redacted] [card redacted] x"
    assert found.cards == 3


# Tracks


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a %B4242424242424242^DOE/ANN^28121011234500000?b", "a [track redacted]b"),
        ("a %B3714 496353 98431^DOE/ANN^28121011234500000? b", "a [track redacted] b"),
        ("a ;4242424242424242=28121011234512345678? b", "a [track redacted] b"),
        ("a 4242424242424242=28121011234512345678 b", "a [track redacted] b"),
        ("tag 57: 4242424242424242D28121011234512345678F", "tag 57: [track redacted]F"),
        ("NTE|1||%B4242424242424242\\S\\DOE/ANN\\S\\28121011234500000?|", "NTE|1||[track redacted]|"),
        (
            "%B5555555555554444^ROE/J^2812101000?;5555555555554444=2812101000000?",
            "[track redacted][track redacted]",
        ),
    ],
)
def test_tracks_are_replaced_whole(text, expected):
    found = redact(text.encode(), json=False)
    assert found.body.decode() == expected
    assert found.tracks == expected.count("[track")
    assert (found.cards, found.security_codes) == (0, 0)


def test_track_in_a_json_string_leaves_valid_json():
    body = json.dumps({"swipe": '%B4242424242424242^DOE/ANN "A"^28121011234500000?', "t": "x"}).encode()
    assert redact(body, json=True).total >= 1
    plain = json.dumps({"swipe": "%B4242424242424242^DOE/ANN^28121011234500000", "t": "x"}).encode()
    assert json.loads(redact(plain, json=True).body) == {"swipe": "[track redacted]", "t": "x"}


def test_account_number_between_carets_is_no_track():
    text = b"PID|1||B123456789012^^^NORTH^MR~B1234567890123^DOE^2812|"
    assert redact(text, json=False).body == text


# Security codes


@pytest.mark.parametrize(
    "name",
    [
        "my_cvv", "cardCvc",
        "cvc", "cvv", "cvv2", "CVV", "cvn", "cvc_code", "csc", "security_code", "securityCode", "cardSecurityCode",
        "card_cvc", "card_code", "card_verification_value", "verification_value", "pin", "PIN", "pin_block", "cav2",
    ],
)  # fmt: skip
@pytest.mark.parametrize("value", ["123", "1234", 123, "ab\\u0041", 'x"y'])
def test_security_code_members_are_emptied(name, value):
    body = json.dumps({"a": {name: value}, "b": [{"type": "x", name: value}], "c": 5}, indent=1).encode()
    found = redact(body, json=True)
    text = "[security code redacted]"
    assert json.loads(found.body) == {"a": {name: text}, "b": [{"type": "x", name: text}], "c": 5}
    assert found.security_codes == 2


def test_security_code_members_without_a_value_stay():
    body = b'{"cvc":null,"cvv":"","pin":true,"security_code":{"required":false},"cvc_check":"pass","shipping":{}}'
    assert redact(body, json=True).body == body


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("CVV: 123.", "CVV: [security code redacted]."),
        ("cvc=1234&x=1", "cvc=[security code redacted]&x=1"),
        ("the cvv2 is 123", "the cvv2 is [security code redacted]"),
        ("CVV 123", "CVV [security code redacted]"),
        ("CVC code: 123", "CVC code: [security code redacted]"),
        ("Security Code: 123", "Security Code: [security code redacted]"),
        ("card verification number 123", "card verification number [security code redacted]"),
        ("PIN: 1234", "PIN: [security code redacted]"),
        ("pin code = 123456", "pin code = [security code redacted]"),
        ("NTE|1||cvv:123|", "NTE|1||cvv:[security code redacted]|"),
        ('{\\"cvv\\":\\"123\\"}', '{\\"cvv\\":\\"[security code redacted]\\"}'),
    ],
)
def test_security_codes_in_text_are_replaced(text, expected):
    found = redact(text.encode(), json=False)
    assert found.body.decode() == expected
    assert found.security_codes == 1
    assert find_card_data(text)
    assert json.loads(redact(json.dumps({"n": text}).encode(), json=True).body) == {"n": expected}


def test_bare_number_after_an_unlisted_member_name_leaves_valid_json():
    found = redact(b'{"my_cvv":123,"the cvv":{"cvv value":123}}', json=True)
    assert b"123" not in found.body
    json.loads(found.body)


# Sensitive members

NAMES = frozenset({"name", "email", "description", "line1"})

words = st.text(max_size=12).filter(lambda text: not any(character.isdigit() for character in text))
keys = st.sampled_from([*sorted(NAMES), "names", "ema", "id", 'x"name', "na\\me", "ключ", ""])  # fmt: skip
documents = st.recursive(
    st.none() | st.booleans() | st.integers(0, 99_999) | words | st.sampled_from(["name", '"name":"x"', "a\\", "\\"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(keys, inner, max_size=5),
    max_leaves=20,
)


def empty_members(value):
    if isinstance(value, list):
        return [empty_members(item) for item in value]
    if isinstance(value, dict):
        return {
            key: "[redacted]" if key in NAMES and isinstance(item, str) and item else empty_members(item)
            for key, item in value.items()
        }
    return value


@given(documents, st.booleans(), st.sampled_from([None, 2]), st.sampled_from([(",", ":"), (", ", " : ")]))
def test_sensitive_members_are_emptied_at_any_depth(document, ascii_only, indent, separators):
    body = json.dumps(document, ensure_ascii=ascii_only, indent=indent, separators=separators)
    found = redact(body.encode("utf-8", "surrogatepass"), json=True, sensitive_members=NAMES)
    expected = json.dumps(empty_members(document), ensure_ascii=ascii_only, indent=indent, separators=separators)
    assert found.body == expected.encode("utf-8", "surrogatepass")
    again = redact(found.body, json=True, sensitive_members=NAMES)
    assert (again.body, again.total) == (found.body, 0)


@given(documents)
def test_without_sensitive_members_clean_bytes_are_the_same(document):
    body = json.dumps(document).encode()
    found = redact(body, json=True)
    assert found.body == body
    assert found.total == 0


def test_member_name_written_with_escapes_is_found():
    body = b'{"n\\u0061me":"Ann","name":"Ann","n\\u0061mes":"x","other":"\\u0061"}'
    found = redact(body, json=True, sensitive_members=NAMES)
    assert found.body == b'{"n\\u0061me":"[redacted]","name":"[redacted]","n\\u0061mes":"x","other":"\\u0061"}'
    assert found.members == 2


def test_metadata_is_the_users_own_but_card_data_goes():
    body = b'{"name":"Ann","metadata": {"name":"Room {4}","email":"\\"x\\"","c":"4242424242424242"},"email":"a@b"}'
    found = redact(body, json=True, sensitive_members=NAMES)
    assert found.body == (
        b'{"name":"[redacted]","metadata": {"name":"Room {4}","email":"\\"x\\"","c":"[card redacted]"},'
        b'"email":"[redacted]"}'
    )
    assert (found.members, found.cards) == (2, 1)


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b'{"name":"Ann Le', b'{"name":"[redacted]'),
        (b'{"name":"Ann" "card":4242424242424242', b'{"name":"[redacted]" "card":"[card redacted]"'),
        (b'{"name":"A","metadata":{"name":"B"', b'{"name":"[redacted]","metadata":{"name":"[redacted]"'),
        (b"name=Ann&card=4242424242424242&cvv=123", b'name=Ann&card="[card redacted]"&cvv="[security code redacted]"'),
        (b'\xff{"name":"\xfe\xff","n":"4242424242424242\xff"}', b'\xff{"name":"[redacted]","n":"[card redacted]\xff"}'),
    ],
)  # fmt: skip
def test_broken_json_is_redacted_too(body, expected):
    assert redact(body, json=True, sensitive_members=NAMES).body == expected


@given(st.binary(max_size=300) | st.text("4 -2\"{}:,\\cvpin=^%B;?'", max_size=200).map(str.encode), st.booleans())
def test_any_bytes_pass_and_a_second_time_changes_nothing(body, as_json):
    found = redact(body, json=as_json, sensitive_members=NAMES)
    again = redact(found.body, json=as_json, sensitive_members=NAMES)
    assert again.body == found.body
    assert (found.total == 0) == (found.body == body)


def test_whole_card_form_leaves_nothing():
    body = json.dumps({
        "card": {"number": 4242424242424242, "cvc": 123, "exp_month": 12, "last4": "4242"},
        "track2": ";4242424242424242=28121011234512345678?",
        "note": "PIN: 1234, 5555 5555 5555 4444",
        "name": "Ann",
    }).encode()  # fmt: skip
    found = redact(body, json=True, sensitive_members=NAMES)
    assert (found.cards, found.tracks, found.security_codes, found.members) == (2, 1, 2, 1)
    assert found.total == 6
    assert json.loads(found.body) == {
        "card": {
            "number": "[card redacted]",
            "cvc": "[security code redacted]",
            "exp_month": 12,
            "last4": "4242",
        },
        "track2": "[track redacted]",
        "note": "PIN: [security code redacted], [card redacted]",
        "name": "[redacted]",
    }

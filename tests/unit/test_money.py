"""Money is exact: judged by Python's own decimals and by amounts written down by hand."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.failure import Failure
from schemas.money import EXPONENTS, LARGEST_MINOR, Money, find_exponent, read_major, read_minor

CURRENCIES = st.sampled_from(sorted(EXPONENTS))
AMOUNTS = st.integers(-LARGEST_MINOR, LARGEST_MINOR)


@pytest.mark.parametrize(
    ("currency", "exponent"),
    [("USD", 2), ("EUR", 2), ("JPY", 0), ("KRW", 0), ("CLP", 0), ("KWD", 3), ("BHD", 3), ("TND", 3), ("CLF", 4)],
)
def test_exponents_of_iso_4217(currency, exponent):
    assert find_exponent(currency) == (currency, exponent)
    assert find_exponent(currency.lower()) == (currency, exponent)


@pytest.mark.parametrize("currency", ["", "XXX", "US", "USDT", "XAU", None, 840, "u\u017fd", " USD"])
def test_what_is_no_currency_with_a_minor_unit(currency):
    with pytest.raises(Failure) as failure:
        find_exponent(currency)
    assert failure.value.code == "UNKNOWN_CURRENCY"


@pytest.mark.parametrize(
    ("minor", "currency", "text"),
    [
        (1250, "usd", "12.50"),
        (1250, "JPY", "1250"),
        (1250, "kwd", "1.250"),
        (5, "USD", "0.05"),
        (-5, "USD", "-0.05"),
        (-5, "KWD", "-0.005"),
        (0, "USD", "0.00"),
        (0, "JPY", "0"),
        (12345, "CLF", "1.2345"),
    ],
)
def test_amounts_written_down_by_hand(minor, currency, text):
    money = read_minor(minor, currency)
    assert money.major() == text
    assert read_major(text, currency) == money


@given(minor=AMOUNTS, currency=CURRENCIES)
def test_major_units_are_what_decimals_say(minor, currency):
    money = read_minor(minor, currency)
    assert Decimal(money.major()) == Decimal(minor).scaleb(-EXPONENTS[currency])
    assert read_major(money.major(), currency) == money
    assert money.negated().minor == -minor
    assert money.negated().negated() == money


@given(minor=AMOUNTS, currency=CURRENCIES, zeros=st.integers(0, 2))
def test_trailing_zeros_change_nothing(minor, currency, zeros):
    money = read_minor(minor, currency)
    text = money.major() + ("" if money.exponent else ".0") + "0" * zeros
    assert read_major(text, currency) == money


@pytest.mark.parametrize("amount", [1.0, 12.5, True, False, "1250", [], {}, LARGEST_MINOR + 1, -LARGEST_MINOR - 1])
def test_minor_units_are_integers(amount):
    with pytest.raises(Failure) as failure:
        read_minor(amount, "USD")
    assert failure.value.code == "AMOUNT_INVALID"


@pytest.mark.parametrize(
    ("text", "currency"),
    [
        ("12.505", "USD"),
        ("1.5", "JPY"),
        ("0.0001", "KWD"),
        ("", "USD"),
        (".", "USD"),
        ("1.", "USD"),
        (".5", "USD"),
        ("1,000.00", "USD"),
        ("1e3", "USD"),
        ("+1", "USD"),
        ("--1", "USD"),
        ("NaN", "USD"),
        ("Infinity", "USD"),
        (" 1", "USD"),
        ("1\n", "USD"),
        ("\u0661\u0662", "USD"),
        ("1" * 17, "USD"),
        ("9999999999999999", "USD"),
        (12.5, "USD"),
        (12, "USD"),
        (b"12", "USD"),
    ],
)
def test_text_that_is_no_amount(text, currency):
    with pytest.raises(Failure) as failure:
        read_major(text, currency)
    assert failure.value.code == "AMOUNT_INVALID"


@pytest.mark.parametrize("read", [read_minor, read_major])
def test_a_missing_amount_is_told_apart(read):
    with pytest.raises(Failure) as failure:
        read(None, "USD")
    assert failure.value.code == "AMOUNT_MISSING"


def test_a_failure_names_no_payload():
    with pytest.raises(Failure) as failure:
        read_major("4242-4242", "USD")
    assert "4242" not in str(failure.value)


def test_money_is_a_value():
    assert Money(1, "USD", 2) == Money(1, "USD", 2) != Money(1, "EUR", 2)
    assert len({Money(1, "USD", 2), Money(1, "USD", 2)}) == 1
    with pytest.raises(AttributeError):
        Money(1, "USD", 2).minor = 2

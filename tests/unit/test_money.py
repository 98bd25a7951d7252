"""Money: exact minor units from text, judged by decimal arithmetic; whatever may have lost a cent is refused."""

from decimal import Decimal

import pytest
from hypothesis import given
from hypothesis import strategies as st

from schemas.failure import Failure
from schemas.money import EXPONENTS, LARGEST_MINOR, Money, read_major, read_minor

CURRENCIES = st.sampled_from(sorted(EXPONENTS))
MINORS = st.integers(-LARGEST_MINOR, LARGEST_MINOR)


def refuse(read, *arguments):
    with pytest.raises(Failure) as refused:
        read(*arguments)
    return refused.value.code


@pytest.mark.parametrize(
    ("currency", "exponent"),
    [("USD", 2), ("EUR", 2), ("JPY", 0), ("KRW", 0), ("CLP", 0), ("KWD", 3), ("BHD", 3), ("TND", 3), ("CLF", 4)],
)
def test_known_currencies_have_their_digits(currency, exponent):
    assert EXPONENTS[currency] == exponent


@given(MINORS, CURRENCIES)
def test_text_and_back_loses_nothing_and_agrees_with_decimal(minor, currency):
    money = read_minor(minor, currency)
    assert money == Money(minor, currency, EXPONENTS[currency])
    assert Decimal(money.major()) == Decimal(minor).scaleb(-EXPONENTS[currency])
    assert read_major(money.major(), currency.lower()) == money


@given(st.decimals(-(10**9), 10**9, places=4), CURRENCIES)
def test_decimal_text_is_read_to_the_last_digit_or_refused(amount, currency):
    minor = amount.scaleb(EXPONENTS[currency])
    if minor == minor.to_integral_value():
        assert read_major(f"{amount:f}", currency).minor == minor
    else:
        assert refuse(read_major, f"{amount:f}", currency) == "AMOUNT_INVALID"


@pytest.mark.parametrize("amount", [12.5, 1250.0, True, "1250", [1], LARGEST_MINOR + 1, -LARGEST_MINOR - 1])
def test_minor_units_are_integers_of_a_possible_size(amount):
    assert refuse(read_minor, amount, "USD") == "AMOUNT_INVALID"


@pytest.mark.parametrize(
    "text", [12.5, 12, True, "", "12,50", "1e3", " 12", "12\n", "+1", "12.", ".5", "12.505", "1_0", "NaN", "9" * 17]
)
def test_text_that_is_no_plain_amount_is_refused(text):
    assert refuse(read_major, text, "USD") == "AMOUNT_INVALID"


@pytest.mark.parametrize("read", [read_minor, read_major])
def test_a_missing_amount_and_an_unknown_currency_have_codes_of_their_own(read):
    amount = 1 if read is read_minor else "1"
    assert refuse(read, None, "USD") == "AMOUNT_MISSING"
    for currency in ("XXQ", "", None, 840, "US"):
        assert refuse(read, amount, currency) == "UNKNOWN_CURRENCY"


def test_the_other_sign_is_the_same_amount():
    assert Money(1250, "USD", 2).negated() == Money(-1250, "USD", 2)

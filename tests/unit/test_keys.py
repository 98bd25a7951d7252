"""Keys and digests: the same input gives the same key, another input another one, and none tells a secret."""

import hashlib
import hmac

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st

from schemas.events import Reference
from schemas.keys import HmacKey, build_event_id, build_transaction_key

SECRET = b"0123456789abcdef"
KEY = HmacKey(SECRET)
TEXT = st.text(max_size=12)
PARTS = st.lists(TEXT.filter(lambda text: text.isprintable()), max_size=4)


def test_values_that_must_never_change():
    """Every event ever published is named by these: a change would publish all of them again."""
    key = build_transaction_key("stripe", "north-card", "capture", "pi_1")
    assert key == "stripe:north-card:capture:pi_1"
    assert build_event_id(key) == hashlib.sha256(key.encode()).hexdigest()[:32] == "8f5051bc178baec1e48055c297eda4e0"


def test_an_identifier_hash_written_out_in_full():
    message = b""
    for part in (b"identifier", b"NORTH", b"MR", b"1"):
        message += len(part).to_bytes(4, "big") + part
    expected = hmac.new(SECRET, message, hashlib.sha256).hexdigest()[:32]
    assert KEY.hash_identifier(Reference("NORTH", "MR", "1")) == expected


LONG = st.one_of(
    st.text(max_size=12), st.sampled_from(["", "a" * 127, "a" * 128, "é" * 64, "é" * 200, "x" * 5000, "\0"])
)


@given(secret=st.binary(min_size=16, max_size=200), parts=st.lists(LONG, max_size=7), received=st.binary(max_size=200))
def test_every_hash_is_plain_hmac_sha256(secret, parts, received):
    """The oracle is the standard library's ``hmac``; all that was ever hashed must be found again."""

    def frame(*texts):
        return b"".join(len(text.encode()).to_bytes(4, "big") + text.encode() for text in texts)

    key = HmacKey(secret)
    for _ in range(2):  # the first hash must not leave anything behind for the second
        assert key.hash_facts(*parts) == hmac.digest(secret, frame("facts", *parts), "sha256")[:16]
        three = ["", *parts, "", "b", "c"][:3]
        wanted = hmac.digest(secret, frame("identifier", *three), "sha256").hex()[:32]
        assert key.hash_identifier(Reference(*three)) == wanted
        assert key.hash_bytes(received) == hmac.digest(secret, b"bytes\x00" + received, "sha256").hex()


def test_received_bytes_are_keyed():
    assert KEY.hash_bytes(b"body") == hmac.new(SECRET, b"bytes\x00body", hashlib.sha256).hexdigest()
    assert KEY.hash_bytes(b"body") != hashlib.sha256(b"body").hexdigest()


@given(first=PARTS, second=PARTS)
def test_facts_are_equal_only_when_all_parts_are(first, second):
    assert (KEY.hash_facts(*first) == KEY.hash_facts(*second)) == (first == second)


@given(parts=st.tuples(TEXT, TEXT, TEXT), others=st.tuples(TEXT, TEXT, TEXT))
def test_identifiers_are_equal_only_when_all_parts_are(parts, others):
    assume(all(not any("\ud800" <= c <= "\udfff" for c in text) for text in (*parts, *others)))
    same = KEY.hash_identifier(Reference(*parts)) == KEY.hash_identifier(Reference(*others))
    assert same == (parts == others)


def test_parts_are_not_just_joined():
    assert KEY.hash_facts("ab", "c") != KEY.hash_facts("a", "bc")
    assert KEY.hash_facts("a", "") != KEY.hash_facts("a")
    assert KEY.hash_identifier(Reference("A", "MR", "12")) != KEY.hash_identifier(Reference("A", "MR1", "2"))


def test_the_purposes_do_not_meet():
    assert bytes.fromhex(KEY.hash_identifier(Reference("a", "b", "c"))) != KEY.hash_facts("a", "b", "c")
    assert len(KEY.hash_facts()) == 16


def test_another_secret_gives_other_hashes():
    other = HmacKey(b"another secret..")
    reference = Reference("NORTH", "MR", "1")
    assert other.hash_identifier(reference) != KEY.hash_identifier(reference)
    assert other.hash_facts("a") != KEY.hash_facts("a")
    assert other.hash_bytes(b"a") != KEY.hash_bytes(b"a")


def test_the_secret_is_not_shown():
    assert SECRET.decode() not in repr(KEY)
    assert SECRET.decode() not in f"{KEY} {[KEY]}"
    assert not hasattr(KEY, "__dict__")


@pytest.mark.parametrize("secret", [b"", b"short", b"x" * 15])
def test_a_short_secret_is_refused(secret):
    with pytest.raises(ValueError, match="16 bytes"):
        HmacKey(secret)

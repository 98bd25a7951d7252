"""Kafka messages as records: what the client cannot give of a message must not stop the partition."""

from __future__ import annotations

import pytest

from schemas.failure import Failure
from topics.headers import SOURCE, RawRecord, read_headers
from topics.reading import build_record


class Message:
    """As confluent-kafka 2.16 behaves with a header name that is not UTF-8: an error once, then a list with a hole."""

    def __init__(self, headers):
        self.given = headers

    def headers(self):
        if isinstance(self.given, BaseException):
            raise self.given
        return self.given

    def key(self):
        return b"k"

    def value(self):
        return b"v"

    def timestamp(self):
        return (1, 1_772_355_605_000)


UNREADABLE = SystemError("returned a result with an exception set")


@pytest.mark.parametrize(
    ("given", "read"), [(UNREADABLE, []), (None, []), ([("source", b"stripe")], [("source", b"stripe")])]
)
def test_headers_that_cannot_be_read_are_none(given, read):
    record = build_record(Message(given), "raw.stripe", 0, 7)
    assert (record.headers, record.key, record.value) == (read, b"k", b"v")


def test_a_raw_record_without_readable_headers_is_a_dead_letter_not_a_crash():
    record = RawRecord("T:0:7", 0, 7, b"k", b"v", read_headers(Message(UNREADABLE)), 0)
    with pytest.raises(Failure) as caught:
        record.read_header(SOURCE)
    assert caught.value.code == "HEADER_MISSING"

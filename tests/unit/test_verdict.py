"""Verdicts: the table, overlays, bodies, batches, and the Retry-After forms."""

import email.utils
import ssl
import time
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.http import HttpFailure, HttpResponse
from clients.verdict import DEFAULT, Verdict, Verdicts, pick_record, read_http_date, read_retry_after
from schemas.failure import Failure, FailureKind

K = FailureKind
NOW = 1_780_000_000.0  # 2026-05-28


def answer(status, headers=None, body=b""):
    return HttpResponse(status, headers or {}, body)


# Written out by hand, one row per status that people ask about.
EXPECTED = {
    200: None, 201: None, 202: None, 204: None,
    300: K.AMBIGUOUS, 301: K.AMBIGUOUS, 302: K.AMBIGUOUS, 303: K.AMBIGUOUS, 304: K.AMBIGUOUS,
    307: K.UNAVAILABLE, 308: K.UNAVAILABLE,
    400: K.REJECTED, 401: K.AUTH, 402: K.REJECTED, 403: K.AUTH, 404: K.REJECTED, 405: K.REJECTED, 407: K.AUTH,
    408: K.AMBIGUOUS, 409: K.REJECTED, 410: K.REJECTED, 412: K.REJECTED, 413: K.REJECTED, 418: K.REJECTED,
    421: K.UNAVAILABLE, 422: K.REJECTED, 425: K.UNAVAILABLE, 429: K.RATE_LIMITED, 451: K.REJECTED, 499: K.REJECTED,
    500: K.AMBIGUOUS, 501: K.REJECTED, 502: K.AMBIGUOUS, 503: K.UNAVAILABLE, 504: K.AMBIGUOUS, 505: K.REJECTED,
    507: K.AMBIGUOUS, 511: K.UNAVAILABLE, 524: K.AMBIGUOUS, 599: K.AMBIGUOUS,
    0: K.AMBIGUOUS, 100: K.AMBIGUOUS, 600: K.AMBIGUOUS, 999: K.AMBIGUOUS,
}  # fmt: skip


@pytest.mark.parametrize("status", EXPECTED)
def test_the_default_table(status):
    verdict = DEFAULT.judge(answer(status), now=NOW)
    assert verdict.kind is EXPECTED[status]
    assert verdict.code == ("REDIRECTED" if 300 <= status < 400 else f"HTTP_{status}")
    assert verdict.retry_after is None


@given(st.integers(0, 1000))
def test_only_2xx_is_ever_done_and_every_status_has_a_verdict(status):
    verdict = DEFAULT.judge(answer(status), now=NOW)
    assert (verdict.kind is None) == (200 <= status <= 299)


def test_an_overlay_replaces_rows_and_leaves_the_others():
    verdicts = Verdicts(overlay={409: K.DUPLICATE, 403: K.REJECTED, 202: K.AMBIGUOUS, 502: K.UNAVAILABLE})
    seen = {status: verdicts.judge(answer(status), now=NOW).kind for status in (409, 403, 202, 502, 401, 200, 504)}
    assert seen == {
        409: K.DUPLICATE, 403: K.REJECTED, 202: K.AMBIGUOUS, 502: K.UNAVAILABLE, 401: K.AUTH, 200: None,
        504: K.AMBIGUOUS,
    }  # fmt: skip


@pytest.mark.parametrize("overlay", [{302: None}, {409: None}, {500: None}, {99: K.REJECTED}, {600: K.REJECTED}])
def test_an_overlay_cannot_call_a_redirect_or_failure_done(overlay):
    with pytest.raises(ValueError):
        Verdicts(overlay=overlay)


def test_a_call_that_changes_nothing_is_never_ambiguous():
    verdicts = Verdicts(reads=True)
    assert {verdicts.judge(answer(status), now=NOW).kind for status in (500, 502, 504, 408, 301)} == {K.UNAVAILABLE}
    assert verdicts.explain(HttpFailure(K.AMBIGUOUS, "NO_ANSWER")) == Verdict(K.UNAVAILABLE, "NO_ANSWER")
    assert verdicts.judge(answer(404), now=NOW).kind is K.REJECTED


def test_exceptions_have_kinds():
    rows = [
        (HttpFailure(K.AMBIGUOUS, "NO_ANSWER"), K.AMBIGUOUS, "NO_ANSWER"),
        (HttpFailure(K.UNAVAILABLE, "CONNECT_FAILED"), K.UNAVAILABLE, "CONNECT_FAILED"),
        (Failure(K.UNMAPPED, "AMOUNT_MISSING", "amount"), K.UNMAPPED, "AMOUNT_MISSING"),
        (ConnectionRefusedError(), K.UNAVAILABLE, "CONNECT_FAILED"),
        (ssl.SSLCertVerificationError(), K.UNAVAILABLE, "TLS_FAILED"),
        (TimeoutError(), K.AMBIGUOUS, "NO_ANSWER"),
        (ConnectionResetError(), K.AMBIGUOUS, "ANSWER_CUT"),
        (BrokenPipeError(), K.AMBIGUOUS, "ANSWER_CUT"),
        (KeyError("secret text"), K.INTERNAL, "EXCEPTION"),
    ]
    for error, kind, code in rows:
        verdict = DEFAULT.explain(error)
        assert (verdict.kind, verdict.code) == (kind, code)
        assert "secret" not in repr(verdict)
    assert DEFAULT.explain(KeyError()).field == "KeyError"


def read_body(response):
    if response.body == b"boom":
        raise KeyError("Summary")
    if response.body == b"unmapped":
        raise Failure(K.INVALID, "ANSWER_VERSION")
    return {
        b"failed": Verdict(K.REJECTED, "SUMMARY_FAILED"),
        b"limited": Verdict(K.RATE_LIMITED, "ZB_44", retry_after=17),
        b"fine": Verdict(None, "OK", reference="4711"),
    }.get(response.body)


def test_a_body_decides_above_the_status():
    verdicts = Verdicts(examine=read_body, overlay={500: K.UNAVAILABLE})
    assert verdicts.judge(answer(200, body=b"failed"), now=NOW).kind is K.REJECTED
    assert verdicts.judge(answer(500, body=b"failed"), now=NOW).kind is K.REJECTED
    assert verdicts.judge(answer(500), now=NOW).kind is K.UNAVAILABLE
    assert verdicts.judge(answer(200, body=b"fine"), now=NOW).reference == "4711"
    assert verdicts.judge(answer(200, body=b"limited"), now=NOW).retry_after == 17
    assert verdicts.judge(answer(200, body=b"unmapped"), now=NOW).code == "ANSWER_VERSION"
    assert verdicts.judge(answer(204), now=NOW).kind is None


def test_a_2xx_that_cannot_be_read_may_have_been_applied():
    verdicts = Verdicts(examine=read_body)
    assert verdicts.judge(answer(200, body=b"boom"), now=NOW) == Verdict(K.AMBIGUOUS, "ANSWER_UNREADABLE")
    assert verdicts.judge(answer(404, body=b"boom"), now=NOW) == Verdict(K.REJECTED, "HTTP_404")


@pytest.mark.parametrize("status", [302, 401, 404, 500, 503])
def test_a_body_cannot_call_a_failure_done(status):
    verdict = Verdicts(examine=read_body).judge(answer(status, body=b"fine"), now=NOW)
    assert verdict.kind is EXPECTED[status]


@pytest.mark.parametrize("code", ["", "not upper", "Patient_DOE", "A" * 65, "É"])
def test_a_code_cannot_carry_the_text_of_an_answer(code):
    with pytest.raises(ValueError) as caught:
        Verdict(K.REJECTED, code)
    assert not code or code not in str(caught.value)


class TestBatches:
    def test_each_record_has_its_own(self):
        done, bad = Verdict(None, "OK", reference="1"), Verdict(K.REJECTED, "FIELD_REQUIRED", "name")
        entries = [("b", bad), ("a", done), ("c", done)]
        assert [pick_record(key, entries) for key in "abc"] == [done, bad, done]

    def test_what_is_not_mentioned_is_not_done(self):
        entries = [("a", Verdict(None, "OK")), ("z", Verdict(None, "OK"))]
        assert pick_record("a", entries).kind is None
        assert pick_record("b", entries) == pick_record("a", []) == Verdict(K.AMBIGUOUS, "ANSWER_INCOMPLETE")

    def test_two_meanings_are_none(self):
        done = ("a", Verdict(None, "OK"))
        assert pick_record("a", [done, ("a", Verdict(K.REJECTED, "NO"))]) == Verdict(
            K.AMBIGUOUS, "ANSWER_CONTRADICTORY"
        )
        assert pick_record("a", [done, done]).kind is None

    def test_a_failed_answer_says_so_before_any_record_is_read(self):
        verdicts = Verdicts(examine=lambda _response: pick_record("a", [("a", Verdict(None, "OK"))]))
        seen = verdicts.judge(answer(429, {"Retry-After": "7"}), now=NOW)
        assert seen == Verdict(K.RATE_LIMITED, "HTTP_429", retry_after=7)

    @pytest.mark.parametrize(
        ("error", "kind", "code"),
        [(KeyError("x"), K.AMBIGUOUS, "ANSWER_UNREADABLE"), (Failure(K.AUTH, "SESSION"), K.AUTH, "SESSION")],
    )
    def test_an_unreadable_answer_leaves_it_open(self, error, kind, code):
        def read(_response):
            yield "a", Verdict(None, "OK")
            raise error

        seen = Verdicts(examine=lambda response: pick_record("a", read(response))).judge(answer(200), now=NOW)
        assert (seen.kind, seen.code) == (kind, code)


class TestRetryAfter:
    @pytest.mark.parametrize(
        ("text", "seconds"),
        [
            ("0", 0), ("120", 120), (" 5 ", 5), ("1.5", 1.5), ("30, 10", 30),
            ("", None), ("-5", None), ("soon", None), ("1e3", None), ("nan", None), ("inf", None), ("5s", None),
            ("٣", None), ("0x10", None), ("1,,2", None),
        ],
    )  # fmt: skip
    def test_numbers(self, text, seconds):
        assert read_retry_after(text, now=NOW) == seconds

    def test_a_very_long_number_is_a_very_long_wait(self):
        assert read_retry_after("9" * 5000, now=NOW) > 1e200

    # Examples of RFC 9110 section 5.6.7, all the same moment: 784111777.
    @pytest.mark.parametrize(
        "text",
        ["Sun, 06 Nov 1994 08:49:37 GMT", "Sunday, 06-Nov-94 08:49:37 GMT", "Sun Nov  6 08:49:37 1994"],
    )
    def test_the_three_forms_of_a_date(self, text):
        assert read_http_date(text, now=784111700.0) == 784111777.0
        assert read_retry_after(text, now=784111700.0) == 77.0
        assert read_retry_after(text, now=NOW) == 0.0

    @pytest.mark.parametrize(
        "text",
        [
            "Sun, 06 Nov 1994 08:49:37", "Sun, 06 Nov 1994 08:49:37 +0100", "Sun, 31 Feb 1994 08:49:37 GMT",
            "Sun, 06 Foo 1994 08:49:37 GMT", "Sun, 06 Nov 1994 25:49:37 GMT", "1994-11-06T08:49:37Z",
            "Sun, 06 Nov 0000 08:49:37 GMT",
        ],
    )  # fmt: skip
    def test_what_is_no_date(self, text):
        assert read_http_date(text, now=NOW) is None
        assert read_retry_after(text, now=NOW) is None

    @given(st.integers(0, 4_000_000_000))
    def test_any_moment_survives_the_usual_form(self, moment):
        # The standard library writes; ours reads.
        assert read_http_date(email.utils.formatdate(moment, usegmt=True), now=NOW) == moment

    @given(st.integers(0, 4_000_000_000))
    def test_any_moment_survives_the_oldest_form(self, moment):
        assert read_http_date(time.asctime(time.gmtime(moment)), now=NOW) == moment

    @given(st.integers(-49 * 365, 49 * 365))
    def test_a_two_digit_year_is_the_near_one(self, days):
        moment = datetime.fromtimestamp(NOW, UTC).replace(microsecond=0) + timedelta(days=days)
        text = moment.strftime("%A, %d-%b-%y %H:%M:%S GMT")
        assert read_http_date(text, now=NOW) == moment.timestamp()

    @given(st.text(max_size=60), st.text(max_size=60))
    def test_garbage_never_raises(self, text, date):
        seen = read_retry_after(text, now=NOW, date=date)
        assert seen is None or seen >= 0

    @given(st.floats(-1e6, 1e6), st.integers(0, 7200))
    def test_a_wrong_clock_does_not_matter_where_the_answer_is_dated(self, skew, wait):
        sent = 1_790_000_000
        headers = {
            "Date": email.utils.formatdate(sent, usegmt=True),
            "Retry-After": email.utils.formatdate(sent + wait, usegmt=True),
        }
        verdict = Verdicts(longest_wait=7200).judge(answer(503, headers), now=sent + skew)
        assert verdict.retry_after == wait

    def test_our_clock_counts_where_it_is_not(self):
        text = email.utils.formatdate(NOW + 90, usegmt=True)
        assert read_retry_after(text, now=NOW) == 90
        assert read_retry_after(text, now=NOW, date="rubbish") == 90

    def test_caps_and_kinds(self):
        verdicts = Verdicts(longest_wait=600)
        assert verdicts.judge(answer(429, {"retry-after": "86400"}), now=NOW).retry_after == 600
        assert verdicts.judge(answer(503, {"RETRY-AFTER": "5"}), now=NOW).retry_after == 5
        assert verdicts.judge(answer(200, {"retry-after": "5"}), now=NOW).retry_after is None
        assert verdicts.judge(answer(422, {"retry-after": "5"}), now=NOW).retry_after is None

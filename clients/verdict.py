"""What an HTTP answer, or the lack of one, means: one table for all targets, an overlay per target.

A verdict is data; nobody here waits, repeats or counts. The question behind every row is whether the request may have
been applied. A row says UNAVAILABLE only where the status itself says that it was not; every other 5xx, and 408, is
AMBIGUOUS: a gateway that gave up (502, 504) and a server that fell over after its commit (500) look alike from here. A
target whose vendor documents more says so in its overlay.

Redirects are never followed: after 301, 302 or 303 the request may have been worked on where it was sent, 307 and 308
say that it was not.
"""

from __future__ import annotations

import dataclasses
import re
import ssl
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from types import MappingProxyType

from clients.http import HttpResponse
from schemas.failure import Failure, FailureKind

_AMBIGUOUS, _AUTH, _UNAVAILABLE = FailureKind.AMBIGUOUS, FailureKind.AUTH, FailureKind.UNAVAILABLE

STATUSES: Mapping[int, FailureKind] = MappingProxyType(
    {
        307: _UNAVAILABLE,  # sent elsewhere with its method kept: not applied here
        308: _UNAVAILABLE,
        401: _AUTH,
        403: _AUTH,  # a target that answers 403 for one record overlays it with REJECTED
        407: _AUTH,  # our proxy's log-in
        408: _AMBIGUOUS,
        421: _UNAVAILABLE,  # this server is not the one for that host
        425: _UNAVAILABLE,  # unwilling to risk a replay: not applied
        429: FailureKind.RATE_LIMITED,
        501: FailureKind.REJECTED,  # will never work
        503: _UNAVAILABLE,
        505: FailureKind.REJECTED,
        511: _UNAVAILABLE,  # a network in between wants a log-in
    }
)
"""Statuses with a meaning of their own."""


def speaks_of_record(status: int) -> bool:
    """Whether the body of an answer with this status may tell what became of the record.

    True for 2xx, and for a 4xx without a meaning of its own. All others say more than their bodies: the error that a
    408, a redirect or a 5xx carries is no proof that nothing was applied.
    """
    return status // 100 in (2, 4) and status not in STATUSES


FAMILIES: Mapping[int, FailureKind | None] = MappingProxyType(
    {
        2: None,
        3: _AMBIGUOUS,
        4: FailureKind.REJECTED,
        5: _AMBIGUOUS,
    }
)
"""All others, by first digit; None means done. What is in no family is AMBIGUOUS."""

EXCEPTIONS: Sequence[tuple[type[BaseException], FailureKind, str]] = (
    (ConnectionRefusedError, _UNAVAILABLE, "CONNECT_FAILED"),
    (ssl.SSLCertVerificationError, _UNAVAILABLE, "TLS_FAILED"),
    (TimeoutError, _AMBIGUOUS, "NO_ANSWER"),
    (OSError, _AMBIGUOUS, "ANSWER_CUT"),
)
"""Exceptions that carry no kind of their own, first match. All others are INTERNAL."""

REDIRECTED = "REDIRECTED"
_CODE = re.compile(r"[A-Z0-9][A-Z0-9_]{0,63}")
_WAITS = frozenset({FailureKind.RATE_LIMITED, FailureKind.UNAVAILABLE})


@dataclass(frozen=True, slots=True)
class Verdict:
    """What one call came to. ``kind`` None means done.

    ``code`` is an upper-case word (HTTP_422, QBO_6140, REDIRECTED) and ``field`` a field's name: both end in dead
    letters, so neither may hold payload text. ``retry_after`` is in seconds from now, None when nothing was said.
    """

    kind: FailureKind | None
    code: str
    field: str = ""
    reference: str = dataclasses.field(default="", repr=False)
    """The target's own reference of the posting."""
    retry_after: float | None = None

    def __post_init__(self) -> None:
        if not _CODE.fullmatch(self.code):
            # The text itself may be an answer's text.
            raise ValueError("a verdict's code is an upper-case word of at most 64 characters")


Examine = Callable[[HttpResponse], Verdict | None]
"""A target's own reading of an answer; None leaves it to the table. Pure; may raise ``Failure``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Verdicts:
    """The table with a target's overlay.

    ``overlay`` replaces rows by status. ``examine`` reads bodies (HTTP 200 with an error, a code inside a 400) and
    stands above both. ``reads`` is for calls that change nothing: for them nothing is AMBIGUOUS, they are UNAVAILABLE.
    ``longest_wait`` bounds what a Retry-After may ask for, in seconds.

    Neither overlay nor ``examine`` can call a redirect or a failure done: an answer that is not 2xx is success only
    as DUPLICATE.
    """

    overlay: Mapping[int, FailureKind | None] = dataclasses.field(default_factory=dict)
    examine: Examine | None = None
    reads: bool = False
    longest_wait: float = 3600.0

    def __post_init__(self) -> None:
        for status, kind in self.overlay.items():
            if not 100 <= status <= 599:
                raise ValueError(f"{status} is not an HTTP status")
            if kind is None and status // 100 != 2:
                raise ValueError(f"{status} cannot mean done; DUPLICATE is the success outside 2xx")

    def judge(self, response: HttpResponse, *, now: float) -> Verdict:
        """The verdict on a whole answer. ``now`` is our clock in seconds since the epoch."""
        seen = self._examine(response)
        if seen is None:
            seen = self._look_up(response.status)
        return self._finish(seen, response, now)

    def explain(self, error: Exception) -> Verdict:
        """The verdict on a call without an answer. A ``Failure`` keeps its kind and code."""
        if isinstance(error, Failure):
            return self._settle(_as_verdict(error))
        for kind_of_error, kind, code in EXCEPTIONS:
            if isinstance(error, kind_of_error):
                return self._settle(Verdict(kind, code))
        return Verdict(FailureKind.INTERNAL, "EXCEPTION", type(error).__name__)

    def _examine(self, response: HttpResponse) -> Verdict | None:
        if self.examine is None:
            return None
        good = response.status // 100 == 2
        try:
            seen = self.examine(response)
        except Failure as failure:
            return _as_verdict(failure)
        except Exception:  # noqa: BLE001 - whatever a body does to its reader, a 2xx may have been applied
            return Verdict(_AMBIGUOUS, "ANSWER_UNREADABLE") if good else None
        return None if seen is not None and seen.kind is None and not good else seen

    def _look_up(self, status: int) -> Verdict:
        kind = FAMILIES.get(status // 100, _AMBIGUOUS)
        kind = self.overlay.get(status, STATUSES.get(status, kind))
        return Verdict(kind, REDIRECTED if status // 100 == 3 else f"HTTP_{status}")

    def _finish(self, verdict: Verdict, response: HttpResponse, now: float) -> Verdict:
        verdict = self._settle(verdict)
        wait = verdict.retry_after
        if wait is None and verdict.kind in _WAITS:
            headers = {name.lower(): value for name, value in response.headers.items()}
            wait = read_retry_after(headers.get("retry-after", ""), now=now, date=headers.get("date", ""))
        return verdict if wait is None else replace(verdict, retry_after=min(max(wait, 0.0), self.longest_wait))

    def _settle(self, verdict: Verdict) -> Verdict:
        if self.reads and verdict.kind is _AMBIGUOUS:
            return replace(verdict, kind=_UNAVAILABLE)
        return verdict


DEFAULT = Verdicts()
"""The table alone."""


def _as_verdict(failure: Failure) -> Verdict:
    return Verdict(failure.kind, failure.code, failure.field)


def pick_record(key: str, entries: Iterable[tuple[str, Verdict]]) -> Verdict:
    """The verdict on one record among those that a batch answer names, each by its key; for ``examine``.

    Done only when the answer names it so: a record that is not mentioned, or with two meanings, is AMBIGUOUS.
    """
    verdicts = {verdict for named, verdict in entries if named == key}
    if not verdicts:
        return Verdict(_AMBIGUOUS, "ANSWER_INCOMPLETE")
    return verdicts.pop() if len(verdicts) == 1 else Verdict(_AMBIGUOUS, "ANSWER_CONTRADICTORY")


_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_SECONDS = re.compile(r"\d+(\.\d+)?", re.ASCII)
_TIME = r"(?P<hour>\d\d):(?P<minute>\d\d):(?P<second>\d\d)"
_DATES = tuple(
    re.compile(form, re.ASCII | re.IGNORECASE)
    for form in (
        rf"[a-z]{{3}}, (?P<day>\d\d) (?P<month>[a-z]{{3}}) (?P<year>\d{{4}}) {_TIME} GMT",
        rf"[a-z]{{6,9}}, (?P<day>\d\d)-(?P<month>[a-z]{{3}})-(?P<year>\d\d) {_TIME} GMT",
        rf"[a-z]{{3}} (?P<month>[a-z]{{3}}) (?P<day>[ \d]\d) {_TIME} (?P<year>\d{{4}})",
    )
)
"""The three forms of RFC 9110 section 5.6.7; month names are English whatever the locale."""


def read_http_date(text: str, *, now: float) -> float | None:
    """Seconds since the epoch of an HTTP date; None when it is none.

    A two-digit year is the one less than 50 years ahead of ``now``.
    """
    found = next(filter(None, (form.fullmatch(text.strip()) for form in _DATES)), None)
    if found is None or found["month"].lower() not in _MONTHS:
        return None
    year = int(found["year"])
    if len(found["year"]) == 2:
        this_year = datetime.fromtimestamp(now, UTC).year
        year += this_year - this_year % 100
        year += 100 * (year <= this_year - 50) - 100 * (year > this_year + 50)
    try:
        # A leap second counts as the one before it: datetime has none.
        second = min(int(found["second"]), 59) if found["second"] == "60" else int(found["second"])
        moment = datetime(
            year,
            _MONTHS.index(found["month"].lower()) + 1,
            int(found["day"]),
            int(found["hour"]),
            int(found["minute"]),
            second,
            tzinfo=UTC,
        )
    except ValueError:
        return None
    return moment.timestamp()


def read_retry_after(text: str, *, now: float, date: str = "") -> float | None:
    """Seconds to wait from a Retry-After header; None when it says nothing readable. Never negative.

    A date is measured against the answer's own ``date`` header where there is one, so that a wrong clock on either
    side does not matter, else against ``now``. Of several numbers the largest counts.
    """
    parts = [part.strip() for part in text.split(",")]
    if all(_SECONDS.fullmatch(part) for part in parts):
        # A number too long for a float is a very long wait, not an error.
        return max(float(part[:300]) for part in parts)
    until = read_http_date(text, now=now)
    if until is None:
        return None
    sent = read_http_date(date, now=now)
    return max(0.0, until - (now if sent is None else sent))

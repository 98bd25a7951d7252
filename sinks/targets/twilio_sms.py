"""Twilio: a receipt by SMS for a capture, to payers who asked for one.

Facts read 2026 from Twilio's OpenAPI document (Messages) and documentation: ``POST
/2010-04-01/Accounts/{sid}/Messages.json``, form body, HTTP Basic with the account or an API key, 201 with ``sid``; no
idempotency key for messages; 429 with code 20429 was not processed; the list of messages is filtered by ``To`` and
``From`` and paged by ``next_page_uri``.

Quirks:

* Class C: our reference is the last word of the text, and after an unknown outcome the messages to that number are read
  for it. All of them: a message still in the queue has no date of sending, so a filter by date would hide it. A message
  whose text was redacted could be ours: then a person decides.
* A receipt goes out only when the event carries the payer's consent and number, in the attributes that the settings
  name (a facility's own overlay puts them there). No consent is ``not_routed``; consent without a good number is a dead
  letter.
* The text holds no patient: sender, amount, currency and our reference. The number is in the request, and so in the
  ledger, which is a PHI topic.
* A refusal (the number opted out, 21610; is no mobile, 21614) is final. The form of an error's body is not in the
  documents read: where it cannot be read the status decides.
* How soon the list shows a message is not documented; it is asked after ten seconds.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Final
from urllib.parse import parse_qs, quote, urlencode, urlsplit

import msgspec
from pydantic import Field, FilePath, model_validator

from schemas.events import Kind, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.mapping import FieldMapping, build_view
from sinks.contract import (
    Absent,
    Found,
    HttpHead,
    HttpResponse,
    LookUp,
    NextPage,
    PostingContext,
    Rate,
    Request,
    Target,
    TargetClass,
    Unclear,
    Verdict,
    speaks_of_record,
)
from sinks.references import derive
from sinks.transport import BasicSettings, use_user

_MAPPING = Path(__file__).parent.parent / "mappings" / "twilio_sms.yaml"
_NUMBER = re.compile(r"\+[1-9][0-9]{6,14}\Z")
_SID = re.compile(r"(SM|MM)[0-9a-fA-F]{32}\Z")
_LONGEST_TEXT: Final = 1600
_PAGE: Final = 200
_FAILED: Final = frozenset({"failed", "undelivered", "canceled"})
_CODES: Final = {20003: FailureKind.AUTH, 20429: FailureKind.RATE_LIMITED}


class TwilioSettings(BasicSettings):
    """One sender of one Twilio account. `user` is the account's SID with its token, or an API key with its secret."""

    account_sid: str = Field(pattern=r"^AC[0-9a-fA-F]{32}$", description="SID of the account.")
    from_number: str | None = Field(
        default=None, pattern=r"^\+[1-9][0-9]{6,14}$", description="Number that sends, in E.164 form."
    )
    messaging_service: str | None = Field(
        default=None, pattern=r"^MG[0-9a-fA-F]{32}$", description="Messaging service that sends, instead of a number."
    )
    sender_name: str = Field(
        min_length=1,
        max_length=60,
        description="Who speaks, at the start of the text. It must not tell why somebody was treated.",
    )
    consent_attribute: str = Field(
        min_length=1, description="Attribute of the event that holds the payer's consent to a receipt by SMS."
    )
    consent_value: str = Field(default="yes", min_length=1, description="Its value when consent was given.")
    phone_attribute: str = Field(min_length=1, description="Attribute of the event that holds the payer's number.")
    valid_seconds: int = Field(
        default=14_400, ge=60, le=36_000, description="Seconds after which a receipt is not delivered any more."
    )
    mapping_overlay: FilePath | None = Field(
        default=None, description="YAML file with another text (see docs/adding-a-target.md)."
    )

    @model_validator(mode="after")
    def _agree(self) -> TwilioSettings:
        if (self.from_number is None) == (self.messaging_service is None):
            raise ValueError("give one of from_number and messaging_service")
        for part in _load_mapping(self.mapping_overlay).fields:
            if part.to != "Body":
                raise ValueError(f"mapping_overlay: {part.to} is not a member that a mapping may fill")
        return self


def classify(_settings: TwilioSettings) -> TargetClass:
    """C: messages are looked up by the reference in their text."""
    return TargetClass.C


def routes(event: MoneyEvent, settings: TwilioSettings) -> bool:
    """Captures of its facilities whose payer consented."""
    return (
        event.facility in settings.facilities
        and event.kind == Kind.CAPTURE
        and event.attributes.get(settings.consent_attribute) == settings.consent_value
    )


def freeze(event: MoneyEvent, _context: PostingContext, settings: TwilioSettings) -> Request:
    """The message. Key and reference are functions of the event and the account."""
    if event.kind != Kind.CAPTURE:
        raise Failure(FailureKind.UNMAPPED, "KIND_WITHOUT_RECEIPT", "kind")
    if event.money.minor <= 0:
        raise Failure(FailureKind.INVALID, "AMOUNT_NOT_POSITIVE", "money.minor")
    number = event.attributes.get(settings.phone_attribute)
    if not number:
        raise Failure(FailureKind.UNMAPPED, "PHONE_MISSING", settings.phone_attribute)
    if not _NUMBER.match(number):
        raise Failure(FailureKind.INVALID, "PHONE_INVALID", settings.phone_attribute)
    seed = f"twilio|{settings.account_sid}|{event.event_id}"
    key, reference = derive(f"key|{seed}", 40), derive(f"reference|{seed}", 10)
    view = build_view(
        event,
        posting={
            "sender": settings.sender_name,
            "amount": event.money.major(),
            "currency": event.money.currency,
        },
    )
    text = _load_mapping(settings.mapping_overlay).apply(view)["Body"]
    if not isinstance(text, str):
        raise Failure(FailureKind.UNMAPPED, "FIELD_NOT_TEXT", "Body")
    text = f"{text} {_mark(reference)}"
    if len(text) > _LONGEST_TEXT:
        raise Failure(FailureKind.INVALID, "TEXT_TOO_LONG", "Body")
    sender = {"From": settings.from_number} if settings.from_number else {}
    service = {"MessagingServiceSid": settings.messaging_service} if settings.messaging_service else {}
    form = {"To": number, **sender, **service, "Body": text, "ValidityPeriod": str(settings.valid_seconds)}
    return Request(
        urlencode(form).encode(),
        key,
        reference,
        "POST",
        f"{settings.choose_base(_HTTP)}{_build_path(settings)}",
        (("accept", "application/json"), ("content-type", "application/x-www-form-urlencoded")),
    )


def examine(response: HttpResponse, _request: Request, _settings: TwilioSettings) -> Verdict | None:
    """Done only with a message's SID; errors by their code where it can be read."""
    if not speaks_of_record(response.status):
        return None
    body = msgspec.json.decode(response.body)
    if response.status // 100 == 2:
        if not _SID.match(str(body.get("sid"))):
            return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_ID")
        if body.get("status") in _FAILED:
            return Verdict(FailureKind.REJECTED, "MESSAGE_FAILED")
        return Verdict(None, f"HTTP_{response.status}", reference=body["sid"])
    code = body.get("code")
    if isinstance(code, bool) or not isinstance(code, int) or code <= 0:
        return None
    return Verdict(_CODES.get(code, FailureKind.REJECTED), f"TWILIO_{code}")


def ask_message(request: Request, _first_write_at: int, _settings: TwilioSettings) -> Request:
    """All messages to that number, from ours where one number sends."""
    form = parse_qs(request.body.decode())
    query = {name: form[name][0] for name in ("To", "From") if name in form}
    url = f"{request.url}?{urlencode(query | {'PageSize': str(_PAGE)}, quote_via=quote)}"
    return _make_question(request, url)


def read_message(
    response: HttpResponse, page: Request, request: Request, settings: TwilioSettings
) -> Found | Absent | NextPage | Unclear | None:
    """The message whose text ends with our reference, in the whole list."""
    if response.status // 100 != 2:
        return None
    body = msgspec.json.decode(response.body)
    number = parse_qs(request.body.decode())["To"][0]
    sent = [entry for entry in body["messages"] if entry["direction"].startswith("outbound")]
    if any(entry["to"] != number for entry in body["messages"]):
        return Unclear("SEARCH_INEXACT")
    ours = [entry for entry in sent if entry["body"] and entry["body"].endswith(_mark(request.reference))]
    if len(ours) > 1:
        return Unclear("SEVERAL_MESSAGES")
    if ours:
        return Found(ours[0]["sid"])
    if any(not entry["body"] for entry in sent):
        return Unclear("TEXT_REDACTED")
    following = body["next_page_uri"]
    if following is None:
        return Absent()
    if not following.startswith(f"{_build_path(settings)}?"):
        return Unclear("PAGE_ELSEWHERE")
    parts = urlsplit(page.url)
    return NextPage(_make_question(request, f"{parts.scheme}://{parts.netloc}{following}"))


def _make_question(request: Request, url: str) -> Request:
    return Request(b"", request.control_id, request.reference, "GET", url, (("accept", "application/json"),))


def _build_path(settings: TwilioSettings) -> str:
    return f"/2010-04-01/Accounts/{settings.account_sid}/Messages.json"


def _mark(reference: str) -> str:
    return f"Ref {reference}"


@lru_cache(maxsize=64)
def _load_mapping(overlay: Path | None) -> FieldMapping:
    return FieldMapping.load(_MAPPING, overlay, accepts_phi=TARGET.accepts_phi)


_HTTP = HttpHead(
    sandbox="https://api.twilio.com",
    production="https://api.twilio.com",
    credential=use_user,
    # Twilio's own limits move with the account and are told by 429; this keeps a burst of captures from meeting them.
    rates=(Rate(10, 1.0, burst=5),),
    examine=examine,
    look_up=LookUp(ask=ask_message, read=read_message, visible_after=10.0),
)

TARGET = Target(
    name="twilio_sms",
    display_name="Twilio (receipt by SMS)",
    status="sandbox",
    documentation="https://www.twilio.com/docs/messaging/api/message-resource",
    transport="http",
    settings=TwilioSettings,
    classify=classify,
    routes=routes,
    freeze=freeze,
    http=_HTTP,
    accepts_phi=False,
    capabilities={
        "receipt": "SMS on a capture, with the payer's consent and number from the event's attributes",
        "messaging service": "Sender by service instead of number",
        "opt-out": "A refused number is a dead letter, never tried again",
        "duplicate control": "Look-up by our reference in the text",
    },
)
"""Head of this connector."""

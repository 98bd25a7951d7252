"""athenahealth: a capture is recorded on the patient's chart with ``recordpayment``, in one practice.

Facts read 2026 from athenahealth's workflow and API pages: ``POST
/v1/{practiceid}/patients/{patientid}/recordpayment`` records money that was taken elsewhere, with ``departmentid``,
``paymentmethod``, ``cardnumberlast4`` for cards, and ``copayamount`` (tied to ``appointmentid``) or ``otheramount``
(unapplied); a payment that athenahealth collected itself must never be recorded, it would be counted twice; OAuth2 with
client credentials; no idempotency key.

Quirks:

* Class D: nothing of ours is kept with a payment, and no list of payments is documented that could be asked. After an
  unknown outcome a person decides.
* HTTP 200 can say ``success=false``. Done needs ``success`` true; without the word the outcome is unknown. The answer
  is documented for the sister call ``collectpayment``.
* Which payments athenahealth does not know already is the site's to say: only those of the named gateway accounts are
  recorded.
* Refunds are possible only over another interface; here they are left out or become dead letters.
* The patient's number is part of the path, by the vendor's design: it is in the ledger, and in no log of ours.
* The form of the body (form-encoded) and the scope of the token are not in the pages read; the scope is a setting.
"""

from __future__ import annotations

import re
from functools import lru_cache
from pathlib import Path
from typing import Final, Literal
from urllib.parse import urlencode

import msgspec
from pydantic import Field, FilePath, model_validator

from schemas.events import Kind, MoneyEvent
from schemas.failure import Failure, FailureKind
from schemas.mapping import FieldMapping, build_view
from schemas.tenancy import Name
from sinks.contract import (
    HttpHead,
    HttpResponse,
    PostingContext,
    Rate,
    Request,
    Target,
    TargetClass,
    TokenRecipe,
    Verdict,
    make_recipe,
)
from sinks.references import derive
from sinks.transport import ClientCredentialsSettings

_MAPPING = Path(__file__).parent.parent / "mappings" / "athenahealth.yaml"
_PLACE = re.compile(r"[a-z][a-z0-9]{1,40}\Z")
_OWN: Final = frozenset({"patientid", "practiceid", "otheramount", "copayamount"})
"""Members that the connector fills: the patient and the amount."""
_OTHERS: Final = frozenset({Kind.REFUND, Kind.REFUND_REVERSAL, Kind.CHARGEBACK, Kind.CHARGEBACK_REVERSAL})
_ID = re.compile(r"[0-9]{1,20}\Z")
_LAST4 = re.compile(r"[0-9]{4}\Z")
_CURRENCY: Final = "USD"
_TOKEN_PATH: Final = "/oauth2/v1/token"  # noqa: S105 - an address
_TRUTHS: Final = {True: True, False: False, "true": True, "false": False}


class AthenaSettings(ClientCredentialsSettings):
    """One practice."""

    scope: str = Field(default="", description="Scope of the token, where the app needs one.")
    practice: str = Field(pattern=r"^[0-9]{1,20}$", description="Id of the practice.")
    departments: dict[Name, str] = Field(description="Department ids by facility.")
    authority: str = Field(
        min_length=1, description="Assigning authority whose medical record numbers are the practice's patient ids."
    )
    accounts: tuple[Name, ...] = Field(
        min_length=1,
        description="Gateway accounts whose payments athenahealth does not know already. A payment that it collected "
        "itself would be counted twice.",
    )
    payment_method: str = Field(
        min_length=1, max_length=40, description="How the money moved, in the practice's words."
    )
    last4_attribute: str | None = Field(
        default=None,
        description="Attribute of the event with the card's last four digits, which a card payment needs.",
    )
    copay_attribute: str | None = Field(
        default=None, description="Attribute of the event that tells a copay of a visit from other payments."
    )
    copay_value: str = Field(default="copay", min_length=1, description="Its value for a copay.")
    other_movements: Literal["skip", "dead_letter"] = Field(
        description="Refunds, chargebacks and reversals, which cannot be recorded here: `skip` when they are booked "
        "elsewhere, `dead_letter` when a person shall see each."
    )
    mapping_overlay: FilePath | None = Field(
        default=None, description="YAML file with more fields (see docs/adding-a-target.md)."
    )

    @model_validator(mode="after")
    def _agree(self) -> AthenaSettings:
        if lacking := set(self.facilities) - set(self.departments):
            raise ValueError(f"departments: none for {', '.join(sorted(lacking))}")
        if not all(map(_ID.match, self.departments.values())):
            raise ValueError("departments: an id has digits alone")
        for part in _load_mapping(self.mapping_overlay).fields:
            if not _PLACE.match(part.to) or part.to in _OWN:
                raise ValueError(f"mapping_overlay: {part.to} is not a member that a mapping may fill")
        return self

    def choose_token_url(self, head: HttpHead) -> str:
        """The token endpoint of the same system."""
        return f"{self.choose_base(head)}{_TOKEN_PATH}"


def classify(_settings: AthenaSettings) -> TargetClass:
    """D: nothing tells afterwards whether a payment was recorded."""
    return TargetClass.D


def routes(event: MoneyEvent, settings: AthenaSettings) -> bool:
    """Captures of its facilities and accounts; other movements when each shall become a dead letter."""
    if event.facility not in settings.facilities or event.account not in settings.accounts:
        return False
    return event.kind == Kind.CAPTURE or (event.kind in _OTHERS and settings.other_movements == "dead_letter")


def freeze(event: MoneyEvent, context: PostingContext, settings: AthenaSettings) -> Request:
    """The payment, on the chart of the survivor of all merges."""
    if event.kind != Kind.CAPTURE:
        raise Failure(FailureKind.UNMAPPED, "KIND_WITHOUT_DOCUMENT", "kind")
    money = event.money
    if money.minor <= 0:
        raise Failure(FailureKind.INVALID, "AMOUNT_NOT_POSITIVE", "money.minor")
    if money.currency != _CURRENCY:
        raise Failure(FailureKind.UNMAPPED, "CURRENCY_FOREIGN", "money.currency")
    if context.mrn.authority != settings.authority:
        raise Failure(FailureKind.UNMAPPED, "PATIENT_OF_ANOTHER_AUTHORITY", "mrn.authority")
    if not _ID.match(context.mrn.value):
        raise Failure(FailureKind.INVALID, "PATIENT_ID_INVALID", "mrn.value")
    is_copay = settings.copay_attribute is not None and (
        event.attributes.get(settings.copay_attribute) == settings.copay_value
    )
    view = build_view(
        event,
        posting={
            "department": settings.departments[event.facility],
            "method": settings.payment_method,
            "last4": _read_last4(event, settings),
            "appointment": _read_appointment(event, settings) if is_copay else None,
        },
    )
    form = _load_mapping(settings.mapping_overlay).apply(view)
    for name, value in form.items():
        if not isinstance(value, str):
            raise Failure(FailureKind.UNMAPPED, "FIELD_NOT_TEXT", name)
    form["copayamount" if is_copay else "otheramount"] = money.major()
    seed = f"athena|{settings.practice}|{event.event_id}"
    return Request(
        urlencode(form).encode(),
        derive(f"key|{seed}", 40),
        derive(f"reference|{seed}", 16),
        "POST",
        f"{settings.choose_base(_HTTP)}/v1/{settings.practice}/patients/{context.mrn.value}/recordpayment",
        (("accept", "application/json"), ("content-type", "application/x-www-form-urlencoded")),
    )


def examine(response: HttpResponse, _request: Request, _settings: AthenaSettings) -> Verdict | None:
    """Done only with ``success`` true; false at status 200 is a refusal."""
    if response.status // 100 != 2:
        return None
    body = msgspec.json.decode(response.body)
    # Some answers are lists of one.
    (answer,) = body if isinstance(body, list) else [body]
    given = answer["success"]
    success = _TRUTHS.get(given) if isinstance(given, bool | str) else None
    if success is None:
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_SUCCESS")
    if not success:
        return Verdict(FailureKind.REJECTED, "ATHENA_REFUSED")
    if answer.get("errortext"):
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_CONTRADICTORY")
    return Verdict(None, f"HTTP_{response.status}", reference=str(answer.get("epaymentid") or ""))


def _read_last4(event: MoneyEvent, settings: AthenaSettings) -> str | None:
    if settings.last4_attribute is None:
        return None
    digits = event.attributes.get(settings.last4_attribute)
    if digits is None or not _LAST4.match(digits):
        raise Failure(FailureKind.UNMAPPED, "LAST4_MISSING", settings.last4_attribute)
    return digits


def _read_appointment(event: MoneyEvent, settings: AthenaSettings) -> str:
    visit = event.visit
    if visit is None or visit.authority != settings.authority or not _ID.match(visit.value):
        raise Failure(FailureKind.UNMAPPED, "APPOINTMENT_MISSING", "visit")
    return visit.value


@lru_cache(maxsize=64)
def _load_mapping(overlay: Path | None) -> FieldMapping:
    return FieldMapping.load(_MAPPING, overlay, accepts_phi=TARGET.accepts_phi)


def use_token(settings: AthenaSettings, token_url: str) -> TokenRecipe:
    """Client credentials by HTTP Basic, with the settings' scope."""
    return make_recipe(
        token_url,
        grant_type="client_credentials",
        client_id=settings.client_id,
        client_secret=settings.client_secret,
        scope=settings.scope,
    )


_HTTP = HttpHead(
    sandbox="https://api.preview.platform.athenahealth.com",
    production="https://api.platform.athenahealth.com",
    credential=use_token,
    # No limit is published in a form that could be taken over.
    rates=(Rate(5, 1.0, burst=5),),
    examine=examine,
)

TARGET = Target(
    name="athenahealth",
    display_name="athenahealth (recordpayment)",
    status="sandbox",
    documentation="https://docs.athenahealth.com/api/workflows/record-payment",
    transport="http",
    settings=AthenaSettings,
    classify=classify,
    routes=routes,
    freeze=freeze,
    http=_HTTP,
    capabilities={
        "capture": "Unapplied payment (otheramount) on the patient's chart",
        "copay": "copayamount on the visit's appointment, told by an attribute",
        "card": "Last four digits from an attribute",
        "duplicate control": "None: after an unknown outcome a person decides",
    },
)
"""Head of this connector."""

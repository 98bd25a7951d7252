"""The target the posting bench delivers to: class A, plain HTTP on this machine, no limit of its own.

A connector as any other, found through the setting ``connectors.targets``. It refuses nothing; what fails is the bench
server's plan (``bench.programs.posting_target``).
"""

from __future__ import annotations

from decimal import Decimal
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import msgspec

from schemas.failure import FailureKind
from schemas.mapping import FieldMapping, build_view
from sinks.contract import (
    HttpHead,
    HttpResponse,
    PostingContext,
    Rate,
    Request,
    Target,
    TargetClass,
    Verdict,
    use_nothing,
)
from sinks.references import derive
from sinks.transport import HttpSettings

if TYPE_CHECKING:
    from schemas.events import MoneyEvent

_encoder = msgspec.json.Encoder(decimal_format="number")
_WRITE = (("accept", "application/json"), ("content-type", "application/json"))


@cache
def _load_mapping() -> FieldMapping:
    return FieldMapping.load(Path(__file__).with_suffix(".yaml"))


def freeze(event: MoneyEvent, context: PostingContext, settings: HttpSettings) -> Request:
    """One document; its key is a function of event and instance."""
    key = derive(f"bench|{settings.name}|{event.event_id}", 32)
    document = _load_mapping().apply(build_view(event, posting={"patient": context.mrn.value}))
    document["amount"] = Decimal(event.money.major())
    return Request(
        _encoder.encode(document),
        key,
        key[:16],
        "POST",
        f"{settings.choose_base(_HTTP)}/postings",
        (*_WRITE, ("idempotency-key", key)),
    )


def examine(response: HttpResponse, _request: Request, _settings: Any) -> Verdict | None:
    """Done only with the document's id."""
    if response.status != 201:
        return None
    document_id = msgspec.json.decode(response.body)["id"]
    if not isinstance(document_id, str) or not document_id:
        return Verdict(FailureKind.AMBIGUOUS, "ANSWER_WITHOUT_ID")
    return Verdict(None, "HTTP_201", reference=document_id)


_HTTP = HttpHead(
    sandbox="https://books.invalid",
    production="https://books.invalid",
    credential=lambda _settings, _url: use_nothing(),
    rates=(Rate(1_000_000, 1.0, burst=1000),),
    examine=examine,
)

TARGET = Target(
    name="bench_books",
    display_name="Books of the bench",
    status="test",
    documentation="https://example.com",
    transport="http",
    settings=HttpSettings,
    classify=lambda _settings: TargetClass.A,
    window=lambda _settings: 86_400.0,
    routes=lambda _event, _settings: True,
    freeze=freeze,
    http=_HTTP,
    capabilities={},
)
"""Head of this connector."""

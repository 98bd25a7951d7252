"""The one way into a raw topic: redact, describe in headers, publish, return when Kafka has acknowledged."""

from __future__ import annotations

import asyncio
import hashlib
import time
from collections.abc import Callable, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Protocol

from schemas.card_data import Redaction, redact
from telemetry.metrics import Metric
from topics import headers
from topics.catalog import name_raw

if TYPE_CHECKING:
    from schemas.keys import HmacKey
    from sources.contract import RawEvent
    from topics.headers import Headers

UNPARSED_TYPE = "unparsed"
"""CloudEvents type of a record whose sender's event type could not be read."""

REDACTIONS = Metric.REDACTIONS.value.name

_LAST_SECOND = 253_402_300_799  # 9999-12-31T23:59:59Z, the last time RFC 3339 can write


class Publisher(Protocol):
    """Writes one record durably."""

    async def publish(self, topic: str, key: bytes, value: bytes, headers: Headers) -> None:
        """Return when all in-sync replicas have it; raise ``schemas.failure.TemporaryError`` when not in time."""


class Intake:
    """Publishes verified events to ``raw.<source>``.

    ``count`` is told ``redactions_total`` (labels source, kind) once for every event and kind of redaction; the kinds
    ``card``, ``track`` and ``security_code`` mean that a sender sends what it must not: alert on them.
    ``redact=False`` exists for tests alone: it shows that a search for planted card data can find it.
    """

    def __init__(
        self,
        publisher: Publisher,
        hmac_key: HmacKey,
        *,
        clock: Callable[[], float] = time.time,
        redact: bool = True,
        count: Callable[..., None],
    ) -> None:
        self._publisher = publisher
        self._hmac_key = hmac_key
        self._clock = clock
        self._redact = redact
        self._count = count

    async def publish(
        self,
        *,
        source: str,
        account: str,
        facility: str,
        content_type: str,
        verdict: str,
        events: Sequence[RawEvent],
        sensitive_members: frozenset[str] = frozenset(),
    ) -> None:
        """Redact and publish all events of one delivery, in order; return when every one is acknowledged.

        An event with an empty ``key`` (its body could not be parsed) is keyed ``<account>/<sha256 of the stored
        bytes>``: the digest of the received bytes would give a redacted card number back by trial. Raises
        ``schemas.failure.TemporaryError`` when one is not acknowledged; others of the delivery may then be written, and
        the sender's next attempt writes them again.
        """
        ingest_time = self._clock()
        common: Headers = [
            (headers.INGEST_TIME, str(int(ingest_time * 1000)).encode()),
            (headers.SOURCE, source.encode()),
            (headers.ACCOUNT, account.encode()),
            (headers.FACILITY, facility.encode()),
            (headers.CONTENT_TYPE, content_type.encode("utf-8", "replace")),
            (headers.VERDICT, verdict.encode("utf-8", "replace")),
        ]
        topic = name_raw(source)
        records = []
        for event in events:
            stored = self._store(event, source, content_type, sensitive_members)
            digest = hashlib.sha256(stored.body).hexdigest()
            delivery_id = self._scrub(event.delivery_id) or digest
            record_headers = [
                *common,
                (headers.RECEIVED_HMAC, self._hmac_key.hash_bytes(event.body).encode()),
                (headers.STORED_SHA256, digest.encode()),
                (headers.DELIVERY_ID, delivery_id.encode("utf-8", "replace")),
                *headers.build_cloudevent(
                    event_id=_clean(delivery_id),
                    source=f"/{source}/{account}",
                    event_type=_clean(self._scrub(event.event_type)) or UNPARSED_TYPE,
                    time=_write_time(event.occurred_at, ingest_time),
                ),
            ]
            if stored.total:
                record_headers.append((headers.REDACTED, str(stored.total).encode()))
            key = self._scrub(event.key) or f"{account}/{digest}"
            records.append((key.encode("utf-8", "replace"), stored.body, record_headers))
        if len(records) == 1:
            await self._publisher.publish(topic, *records[0])
            return
        results = await asyncio.gather(
            *(self._publisher.publish(topic, *record) for record in records), return_exceptions=True
        )
        for result in results:
            if isinstance(result, BaseException):
                raise result

    def _store(self, event: RawEvent, source: str, content_type: str, sensitive_members: frozenset[str]) -> Redaction:
        if not self._redact:
            return Redaction(event.body)
        is_json = "json" in content_type.lower() or event.body.lstrip()[:1] in (b"{", b"[")
        stored = redact(event.body, json=is_json, sensitive_members=sensitive_members)
        if stored.total:
            for kind, number in (
                ("card", stored.cards),
                ("track", stored.tracks),
                ("security_code", stored.security_codes),
                ("member", stored.members),
            ):
                if number:
                    self._count(REDACTIONS, source=source, kind=kind)
        return stored

    def _scrub(self, text: str) -> str:
        """The sender chooses ids and types, so keys and headers made of them are redacted like the body."""
        if not self._redact or len(text) < 3:  # a security code alone has three digits
            return text
        return redact(text.encode("utf-8", "replace"), json=False).body.decode("utf-8", "replace")


def _clean(text: str) -> str:
    # The CloudEvents helper encodes strictly; a lone surrogate from a JSON escape must not stop a delivery.
    return text.encode("utf-8", "replace").decode()


def _write_time(occurred_at: float | None, ingest_time: float) -> str:
    """RFC 3339; the time of intake when the sender's is missing or absurd (CloudEvents 1.0 allows that)."""
    seconds = occurred_at if occurred_at is not None and 0 <= occurred_at <= _LAST_SECOND else ingest_time
    return datetime.fromtimestamp(seconds, UTC).isoformat(timespec="milliseconds").replace("+00:00", "Z")

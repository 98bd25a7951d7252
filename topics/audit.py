"""The topic `audit`: what people did, each record with the hash of the one before.

An act and what it leads to (a decision, a raw record published again) are one transaction: neither stands without the
other. All writers share one transactional id, so that a later one fences an earlier one before it reads the end of the
chain: the chain cannot fork. Each record is sealed with the deployment's key; somebody who may write to the topic but
has no key cannot rewrite the chain unnoticed. Records never hold payload: ids, codes, names of fields, a reason.
"""

from __future__ import annotations

import datetime as dt
import hashlib
import hmac
import time
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Self

import msgspec

from schemas.card_data import find_card_data
from schemas.failure import FatalError, TemporaryError
from topics.catalog import AUDIT
from topics.cluster import KafkaUnreachable
from topics.headers import find_header
from topics.reading import Record, read_to_end
from topics.transaction import Output, ProcessFenced, RecordRefused, TransactionAborted, Transactor

if TYPE_CHECKING:
    from collections.abc import Iterator, Sequence

    from confluent_kafka import TopicPartition

    from schemas.keys import HmacKey
    from topics.cluster import KafkaSettings

SEAL = "seal"
"""Header: keyed HMAC of the record's value."""
LONGEST_REASON = 500


class AuditBroken(FatalError):
    """The chain of acts is not whole."""

    code = "RS400"
    meaning = "A record of the topic `audit` was changed, removed or added outside the desk."
    default_remedy = "Keep the topic as it is, find out who may write to it, and compare with your last known end."


class ReasonRefused(FatalError):
    """Who or why is missing, or holds what must not be kept for years."""

    code = "RS401"
    meaning = "An act at the desk lacks a name or a reason, or these are too long or hold a card number."
    default_remedy = "Give `--by` and `--why` in a few words: a ticket number, never names of patients or card data."


class DeskBusy(TemporaryError):
    """Somebody else acts at the same moment."""

    code = "RS280"
    meaning = (
        "Another command of the desk wrote to `audit` at the same moment, or since this one looked; this one changed "
        "nothing more."
    )
    default_remedy = "Look at `remitstream audit list`, then run the command again."


class Actor(msgspec.Struct, frozen=True, kw_only=True):
    """Who acts, and why. ``os_user`` and ``host`` are what the machine says, ``by`` what the person says."""

    os_user: str
    by: str
    why: str
    host: str = ""

    def check(self) -> None:
        """Raise ``ReasonRefused``."""
        for option, text in (("--by", self.by), ("--why", self.why)):
            if not text.strip() or len(text) > LONGEST_REASON:
                raise ReasonRefused(f"it has {len(text)} characters; 1 to {LONGEST_REASON} are taken.", place=option)
            if find_card_data(text):
                raise ReasonRefused("it holds a card number.", place=option)


class Act(msgspec.Struct, frozen=True, kw_only=True):
    """Value of `audit` as JSON. ``number`` counts from 1; ``previous`` is the sha256 of the value before, in hex."""

    number: int
    previous: str
    time: int
    os_user: str
    host: str = ""
    """Of the machine; empty in records of earlier versions."""
    by: str
    why: str
    act: str
    """Command that was given, such as ``dlq.redrive``."""
    ids: list[str]
    """What it was done to."""
    facts: dict[str, str]
    """Codes and names of fields."""


@dataclass(frozen=True, slots=True)
class Chain:
    """What ``verify`` found. ``head`` is the sha256 of the last value: kept elsewhere, it shows a cut end later."""

    acts: int
    first: int
    last: int
    head: str
    problems: list[str] = field(default_factory=list)


def hash_value(value: bytes) -> str:
    """The link of the chain."""
    return hashlib.sha256(value).hexdigest()


def read_acts(kafka: KafkaSettings) -> list[Act]:
    """Every act, oldest first. Raises ``AuditBroken`` when one cannot be read."""
    return [_decode(record) for record in _read(kafka)]


def verify(kafka: KafkaSettings, key: HmacKey, *, expected: tuple[int, str] | None = None) -> Chain:
    """Follow the chain from the oldest record still kept. ``expected``: number and hash of an act known from before."""
    problems: list[str] = []
    previous: tuple[int, str] | None = None
    first = count = 0
    met = expected is None
    for record in _read(kafka):
        place = f"{AUDIT}@{record.offset}"
        count += 1
        value = record.value or b""
        seal = find_header(record.headers, SEAL) or ""
        if not hmac.compare_digest(seal, key.hash_bytes(value)):
            problems.append(f"{place}: the seal does not fit the record")
        try:
            act = _decode(record)
        except AuditBroken:
            problems.append(f"{place}: it is no act")
            continue
        if previous is None:
            first = act.number
            if act.number == 1 and act.previous:
                problems.append(f"{place}: the first act names one before it")
        elif (act.number, act.previous) != (previous[0] + 1, previous[1]):
            problems.append(f"{place}: act {act.number} does not follow act {previous[0]}")
        if (record.key or b"").decode("utf-8", "replace") != act.by:
            problems.append(f"{place}: the key is not who acted")
        previous = act.number, hash_value(value)
        met = met or previous == expected
    if not met and expected is not None:
        problems.append(f"{AUDIT}: act {expected[0]} with the expected hash is not there")
    last, head = previous or (0, "")
    return Chain(count, first, last, head, problems)


class AuditLog:
    """Writes acts. Only one is open in a deployment: opening one ends the others' right to write.

    ``seen`` is the number of the last act known when the state was read that is acted on: whoever waives what somebody
    else redrives meanwhile must look again. Use as a context manager; entering raises ``DeskBusy`` when there are more
    acts by then. Blocking.
    """

    def __init__(self, kafka: KafkaSettings, key: HmacKey, actor: Actor, *, seen: int | None = None) -> None:
        actor.check()
        self._kafka = kafka
        self._key = key
        self._actor = actor
        self._seen = seen
        self._transactor = _DeskTransactor(kafka, "remitstream.desk")
        self._number = 0
        self._head = ""

    def __enter__(self) -> Self:
        # First fence, then read: nobody can write between the two.
        self._transactor.open()
        last: Act | None = None
        for record in _read(self._kafka):
            last = _decode(record)
            self._number, self._head = last.number, hash_value(record.value or b"")
        if self._seen not in (None, self._number):
            self._transactor.close()
            told = f"act {self._number} came after act {self._seen}"
            if last is not None:
                when = dt.datetime.fromtimestamp(last.time / 1000, dt.UTC).isoformat(timespec="seconds")
                told += f": {last.act} by {last.by} at {when}"
            raise DeskBusy(f"{told}.", place=AUDIT)
        return self

    def __exit__(self, *_: object) -> None:
        self._transactor.close()

    @property
    def next_number(self) -> int:
        """Number that the next act will have."""
        return self._number + 1

    def append(self, act: str, ids: Sequence[str], facts: dict[str, str], outputs: Sequence[Output] = ()) -> Act:
        """Write the act and what it leads to in one transaction. Raises ``DeskBusy`` or ``KafkaUnreachable``."""
        written = Act(
            number=self.next_number,
            previous=self._head,
            time=time.time_ns() // 1_000_000,
            os_user=self._actor.os_user,
            host=self._actor.host,
            by=self._actor.by,
            why=self._actor.why,
            act=act,
            ids=list(ids),
            facts=facts,
        )
        value = msgspec.json.encode(written)
        record = Output(AUDIT, written.by.encode(), value, [(SEAL, self._key.hash_bytes(value).encode())], partition=0)
        try:
            self._transactor.commit([*outputs, record], [], None)
        except ProcessFenced:
            raise DeskBusy("another command took over.", place=AUDIT) from None
        except TransactionAborted as error:
            raise KafkaUnreachable(f"the act was rolled back ({error}).", place=AUDIT) from None
        except RecordRefused as error:
            raise KafkaUnreachable(f"a record of the act was refused ({error.code}).", place=AUDIT) from None
        self._number, self._head = written.number, hash_value(value)
        return written


class _DeskTransactor(Transactor):
    """A transaction that consumes nothing: the one transactional id of all desks is the fence."""

    def _send_offsets(self, offsets: list[TopicPartition], group_metadata: object) -> None:
        assert not offsets, "the desk is no consumer"
        del group_metadata


def _read(kafka: KafkaSettings) -> Iterator[Record]:
    for item in read_to_end(kafka, AUDIT):
        if isinstance(item, Record):
            yield item


def _decode(record: Record) -> Act:
    try:
        return msgspec.json.decode(record.value or b"", type=Act)
    except msgspec.MsgspecError:
        raise AuditBroken("a record cannot be read.", place=f"{AUDIT}@{record.offset}") from None

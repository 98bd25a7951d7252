"""Bytes of our Avro values: the Confluent wire format (magic byte 0, 4-byte schema id, Avro body).

``load_schema`` gives a schema's JSON text as committed; ``Encoder`` and ``Decoder`` turn typed events into framed bytes
and back. Neither does I/O: schema ids and unknown writer schemas come from the registry client in ``topics``.
"""

from __future__ import annotations

import io
import json
import struct
from importlib.resources import files
from typing import TYPE_CHECKING, Any, TypeVar

import fastavro
import msgspec

from schemas.avro_writer import compile_writer
from schemas.failure import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Callable

T = TypeVar("T", bound=msgspec.Struct)

_FRAME = struct.Struct(">bI")
SCHEMA_NAMES = (
    "money_event",
    "patient_record",
    "disposition",
    "review",
    "waiting_entry",
    "delivery_outcome",
    "decision",
)
"""Every Avro schema of ours: ``schemas/<name>.avsc``."""


_REPEATED = frozenset(
    {"tenant", "facility", "source", "account", "kind", "status", "currency", "authority", "id_type", "mapping_version"}
    | {"fate", "reason", "event_type", "target", "outcome", "failure", "code"}
)
"""Text fields that hold the same few values over and over."""


def load_schema(name: str) -> str:
    """JSON text of a committed schema, without needless white space (the form that is registered)."""
    return json.dumps(json.loads(files("schemas").joinpath(f"{name}.avsc").read_text("utf-8")), separators=(",", ":"))


def load_history(name: str) -> list[str]:
    """Committed versions of a schema, oldest first; the last one equals the schema in force (a test compares)."""
    folder = files("schemas").joinpath("history").joinpath(name)
    versions = sorted(
        (entry for entry in folder.iterdir() if entry.name.endswith(".avsc")), key=lambda e: int(e.name[:-5])
    )
    return [json.dumps(json.loads(entry.read_text("utf-8")), separators=(",", ":")) for entry in versions]


class Encoder:
    """Encodes structs with one schema under one registry id, by a writer compiled from the schema."""

    __slots__ = ("encode",)

    def __init__(self, name: str, schema_id: int) -> None:
        self.encode = compile_writer(json.loads(load_schema(name)), _FRAME.pack(0, schema_id), repeated=_REPEATED)
        """Framed bytes of an event."""


class Decoder:
    """Decodes framed bytes written with any registered version of one schema.

    ``find_writer`` maps a schema id to its JSON text (the registry client caches it); it may raise ``TemporaryError``.
    """

    def __init__(self, name: str, event_type: type[T], find_writer: Callable[[int], str]) -> None:
        self._reader: Any = _parse(load_schema(name))
        self._type = event_type
        self._find_writer = find_writer
        self._writers: dict[int, Any] = {}

    def decode(self, value: bytes) -> Any:
        """The event. Raises ``Failure`` NOT_AVRO when the bytes are not a framed value of this schema."""
        if len(value) < _FRAME.size or value[0] != 0:
            raise Failure(FailureKind.INVALID, "NOT_AVRO", "value")
        schema_id = _FRAME.unpack_from(value)[1]
        writer = self._writers.get(schema_id)
        if writer is None:
            writer = _parse(self._find_writer(schema_id))
            self._writers[schema_id] = writer
        try:
            record = fastavro.schemaless_reader(io.BytesIO(value[_FRAME.size :]), writer, self._reader)
            return msgspec.convert(_from_record(record), self._type)
        except Exception as error:  # noqa: BLE001 - foreign bytes may make the library raise anything
            raise Failure(FailureKind.INVALID, "NOT_AVRO", type(error).__name__) from None


def _parse(schema: str) -> Any:
    # Without logical types: our events hold milliseconds, and a datetime ends in the year 9999.
    return fastavro.parse_schema(
        json.loads(schema, object_hook=lambda member: {k: v for k, v in member.items() if k != "logicalType"})
    )


def _from_record(record: Any) -> Any:
    headers = record.get("raw_headers")
    if headers is not None:
        record["raw_headers"] = [(header["name"], header["value"]) for header in headers]
    return record

"""The mapping as a Python user of a stream library would write it: orjson in, fastavro out.

Runs in the contenders' own environments, so it imports nothing of the project. It makes the same value, key and headers
as the stream worker does, the medical record number left out.
"""

from __future__ import annotations

import hashlib
import io
import json
import struct
import time
from pathlib import Path
from typing import Any

import fastavro
import orjson

TENANT = "lakeshore"
ACCOUNTS = {"north-card": ("north", "NORTH"), "harbor-card": ("harbor", "HARBOR")}
EXPONENTS = {"USD": 2, "EUR": 2, "JPY": 0}

Headers = list[tuple[str, bytes]]


class Mapper:
    """Maps one raw record at a time."""

    def __init__(self, arguments: dict[str, Any]) -> None:
        schema = json.loads(
            Path(arguments["schema"]).read_text("utf-8"),
            object_hook=lambda member: {k: v for k, v in member.items() if k != "logicalType"},
        )
        self.schema = schema
        self._schema = fastavro.parse_schema(schema)
        self.frame = struct.pack(">bI", 0, arguments["schema_id"])
        self._version = arguments["mapping_version"]
        self._topic_id = arguments["raw_id"]

    def map(self, value: bytes, raw_headers: Any, partition: int, offset: int) -> tuple[bytes, bytes, Headers]:
        """Key, value and headers of the canonical event. Raises for anything it does not know."""
        canonical, headers = self.build(orjson.loads(value), raw_headers, partition, offset)
        out = io.BytesIO()
        out.write(self.frame)
        fastavro.schemaless_writer(out, self._schema, canonical)
        return canonical["root"].encode(), out.getvalue(), headers

    def build(
        self, event: dict[str, Any], raw_headers: Any, partition: int, offset: int
    ) -> tuple[dict[str, Any], Headers]:
        """The canonical event, not encoded, and its headers."""
        if event["type"] != "payment_intent.succeeded":
            raise ValueError("not a payment")
        known = dict(raw_headers)
        account = known["account"].decode()
        facility, authority = ACCOUNTS[account]
        if known["facility"].decode() != facility or known["source"] != b"stripe":
            raise ValueError("not of this account")
        intent = event["data"]["object"]
        metadata = intent["metadata"]
        minor = intent["amount_received"]
        if type(minor) is not int or not 0 < minor <= 10**15:
            raise ValueError("not an amount")
        currency = intent["currency"].upper()
        types = intent["payment_method_types"]
        transaction_key = f"stripe:{account}:capture:{intent['id']}"
        event_id = hashlib.sha256(transaction_key.encode()).hexdigest()[:32]
        origin = f"{self._topic_id}:{partition}:{offset}"
        occurred_at = event["created"] * 1000
        received_at = int(known["ingest_time"])
        root = f"{account}/{intent['id']}"
        attributes = {"payment_method_type": types[0]} if len(types) == 1 else {}
        if intent["statement_descriptor_suffix"]:
            attributes["statement_descriptor_suffix"] = intent["statement_descriptor_suffix"]
        method = intent["payment_method"]
        canonical = {
            "event_id": event_id,
            "transaction_key": transaction_key,
            "tenant": TENANT,
            "facility": facility,
            "source": "stripe",
            "account": account,
            "kind": "capture",
            "status": intent["status"],
            "money": {"minor": minor, "currency": currency, "exponent": EXPONENTS[currency]},
            "occurred_at": occurred_at,
            "received_at": received_at,
            "object_id": intent["id"],
            "root": root,
            "source_event_id": event["id"],
            "patient": _refer(metadata, "mrn", authority, "MR"),
            "mrn": None,
            "guarantor_account": _refer(metadata, "guarantor_account", authority, "AN"),
            "visit": _refer(metadata, "visit", authority, "VN"),
            "claim": metadata.get("claim"),
            "invoice": metadata.get("invoice"),
            "token_reference": method if isinstance(method, str) else method["id"],
            "attributes": attributes,
            "mapping_version": self._version,
            "origin": origin,
        }
        seconds, rest = divmod(occurred_at, 1000)
        stamp = time.strftime("%Y-%m-%dT%H:%M:%S", time.gmtime(seconds)) + f".{rest:03d}Z"
        headers = [
            ("ce_specversion", b"1.0"),
            ("ce_id", event_id.encode()),
            ("ce_source", f"/{TENANT}/stripe/{account}".encode()),
            ("ce_type", b"remitstream.payments.capture"),
            ("ce_time", stamp.encode()),
            ("event_id", event_id.encode()),
            ("hop", origin.encode()),
            ("origin", origin.encode()),
            ("ingest_time", str(received_at).encode()),
            ("facility", facility.encode()),
            ("mapping_version", self._version.encode()),
        ]
        return canonical, headers


def _refer(metadata: dict[str, Any], name: str, authority: str, id_type: str) -> dict[str, str] | None:
    value = metadata.get(name)
    return None if value is None else {"authority": authority, "id_type": id_type, "value": value}

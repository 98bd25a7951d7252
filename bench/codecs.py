"""What decoding a webhook and writing a canonical event cost, library by library: ``python -m bench.codecs``.

CPU microseconds of this process for one value, the best of several rounds taken in turn, so that a busy machine harms
all alike. Every decoder must find the same facts, every writer write the same bytes, before a time counts.
"""

from __future__ import annotations

import argparse
import io
import json
import sys
import time
from typing import TYPE_CHECKING, Any

import fastavro
import msgspec
import orjson
import pydantic

from bench.outputs import parse_schema
from bench.webhooks import Traffic, expect_event
from schemas.avro_writer import compile_writer
from schemas.events import MoneyEvent
from schemas.mapping import load_source
from schemas.mapping_compiler import compile_mapping
from schemas.wire import Encoder, load_schema
from streams.normalise import MAPPINGS

if TYPE_CHECKING:
    from collections.abc import Callable

Row = tuple[str, "Callable[[], Any]"]


class Intent(msgspec.Struct):
    """What the mapping needs of a payment intent, typed."""

    id: str
    amount_received: int
    currency: str
    status: str
    payment_method: str | None = None
    payment_method_types: list[str] = []
    metadata: dict[str, str] = {}


class Data(msgspec.Struct):
    """Member ``data``."""

    object: Intent


class Webhook(msgspec.Struct):
    """A webhook, typed; other members are skipped."""

    id: str
    type: str
    created: int
    data: Data


class IntentModel(pydantic.BaseModel):
    """The same for pydantic."""

    id: str
    amount_received: int
    currency: str
    status: str
    payment_method: str | None = None
    payment_method_types: list[str] = []
    metadata: dict[str, str] = {}


class DataModel(pydantic.BaseModel):
    """Member ``data``."""

    object: IntentModel


class WebhookModel(pydantic.BaseModel):
    """A webhook, typed; other members are skipped."""

    id: str
    type: str
    created: int
    data: DataModel


def main() -> int:
    """Exit code 0; a codec that gives something else than the others is a traceback."""
    parser = argparse.ArgumentParser(prog="python -m bench.codecs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--values", type=int, default=2_000, help="values a round")
    options = parser.parse_args()
    traffic = Traffic(1)
    fact = traffic.draw(0)
    body = traffic.write_body(fact)
    expected = expect_event(fact, hop="topic:0:0", mapping_version="stripe/1/x", enriched=True)
    print_rows(f"decoding a webhook of {len(body)} bytes", list_decoders(body), options)
    event = msgspec.convert(expected, MoneyEvent)
    writers = list_writers(event, expected)
    print_rows(f"writing a money event of {len(writers[0][1]())} bytes", writers, options)
    return 0


def list_decoders(body: bytes) -> list[Row]:
    """Decoders of one body. Raises ``AssertionError`` when one of them finds other facts."""
    typed = msgspec.json.Decoder(Webhook)
    untyped = msgspec.json.Decoder()
    textual = msgspec.json.Decoder(float_hook=str)
    shipped: Callable[[bytes], Any] = compile_mapping(load_source(MAPPINGS / "stripe.yaml"), {}).read.__globals__[
        "decode"
    ]
    assert shipped(body) is not None
    want = json.loads(body)
    facts = (want["id"], want["data"]["object"]["amount_received"], want["data"]["object"]["metadata"])
    for plain in (orjson.loads, untyped.decode, textual.decode):
        assert plain(body) == want
    for loaded in (typed.decode(body), WebhookModel.model_validate_json(body)):
        assert (loaded.id, loaded.data.object.amount_received, loaded.data.object.metadata) == facts
    return [
        ("msgspec, the structs the worker compiles from the mapping", lambda: shipped(body)),
        ("msgspec, structs by hand", lambda: typed.decode(body)),
        ("msgspec, untyped", lambda: untyped.decode(body)),
        ("msgspec, untyped, numbers with a fraction as text", lambda: textual.decode(body)),
        ("orjson", lambda: orjson.loads(body)),
        ("json", lambda: json.loads(body)),
        ("pydantic, models by hand", lambda: WebhookModel.model_validate_json(body)),
    ]


def list_writers(event: MoneyEvent, plain: dict[str, Any]) -> list[Row]:
    """Writers of one event. Raises ``AssertionError`` when one of them writes other bytes."""
    frame = b"\x00\x00\x00\x00\x07"
    shipped = Encoder("money_event", 7).encode
    compiled = compile_writer(json.loads(load_schema("money_event")), frame)
    schema = parse_schema()

    def write(value: dict[str, Any]) -> bytes:
        out = io.BytesIO()
        out.write(frame)
        fastavro.schemaless_writer(out, schema, value)
        return out.getvalue()

    rows: list[Row] = [
        ("compiled, as the worker uses it", lambda: shipped(event)),
        ("compiled, texts not kept", lambda: compiled(event)),
        ("fastavro, from a dict", lambda: write(plain)),
        ("fastavro, from the event", lambda: write(msgspec.to_builtins(event))),
        ("not Avro: msgspec's JSON", lambda: msgspec.json.encode(event)),
    ]
    want = write(plain)
    for name, call in rows[:-1]:
        assert call() == want, name
    return rows


def print_rows(title: str, rows: list[Row], options: argparse.Namespace) -> None:
    """Measure in turn, print microseconds and the ratio to the first."""
    best = dict.fromkeys((name for name, _ in rows), float("inf"))
    for _ in range(options.rounds):
        for name, call in rows:
            began = time.process_time()
            for _ in range(options.values):
                call()
            best[name] = min(best[name], (time.process_time() - began) / options.values * 1e6)
    first = best[rows[0][0]]
    print(f"\n{title}: CPU us each")
    for name, cost in best.items():
        print(f"{cost:8.2f}  x{cost / first:5.2f}  {name}")


if __name__ == "__main__":
    sys.exit(main())

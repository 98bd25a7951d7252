"""What an edited version of an event at a target may be, before a second person sees it."""

import json
from pathlib import Path
from types import SimpleNamespace

import msgspec
import pytest

from runtime.desk.dead_letters import EditRefused, build_version
from runtime.desk.letters import Letter
from schemas.events import MoneyEvent
from schemas.wire import Decoder, Encoder, load_schema
from topics.reading import Record

CAPTURE = Path(__file__).parents[1] / "fixtures" / "targets" / "quickbooks_online" / "requests" / "capture.json"
EVENT = msgspec.convert(json.loads(CAPTURE.read_text("utf-8"))["event"], MoneyEvent)
OFFICE = SimpleNamespace(
    registry=SimpleNamespace(find_schema=lambda _: load_schema("money_event")), find_schema_id=lambda *_: 1
)


def edit(**changes):
    record = Record("dlq", 0, 7, b"k", Encoder("money_event", 1).encode(EVENT), [("dead_letter_stage", b"books")], 0)
    edited = msgspec.to_builtins(EVENT) | changes
    version = build_version(OFFICE, Letter(record), json.dumps(edited).encode())
    return Decoder("money_event", MoneyEvent, OFFICE.registry.find_schema).decode(version.value), version.changed


@pytest.mark.parametrize("money", [(501, "USD", 2), (501, "JPY", 0), (501, "KWD", 3)])
def test_an_amount_may_be_another(money):
    wanted = dict(zip(("minor", "currency", "exponent"), money, strict=True))
    event, changed = edit(money=wanted)
    assert (msgspec.to_builtins(event.money), changed) == (wanted, ("money",))


@pytest.mark.parametrize(
    "money", [(500, "JPY", 2), (500, "KWD", 2), (500, "usd", 2), (500, "XXQ", 2), (10**16, "USD", 2)]
)
def test_an_amount_that_would_be_posted_as_another_is_refused(money):
    with pytest.raises(EditRefused, match="amount"):
        edit(money=dict(zip(("minor", "currency", "exponent"), money, strict=True)))


@pytest.mark.parametrize("text", ["4111111111111111", "%B4111111111111111^DOE/J^2512101000000000000?", "cvv: 123"])
def test_card_data_of_any_kind_is_refused(text):
    with pytest.raises(EditRefused, match="card data"):
        edit(attributes={"note": text})

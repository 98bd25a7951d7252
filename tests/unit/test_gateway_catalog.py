"""Catalog of gateways: found by file, and never silently left out."""

from __future__ import annotations

import asyncio
import json
import sys

import pytest
from pydantic import SecretStr

from schemas.keys import HmacKey
from schemas.tenancy import Account
from sources.catalog import ConnectorBroken, ConnectorUnknown, discover, load
from sources.intake import Intake
from sources.receiver import build_app

CONNECTOR = '''
"""A gateway that signs nothing but knows a word."""
from __future__ import annotations

from dataclasses import dataclass

from sources.contract import Gateway, RawEvent, Refusal, Status, Verdict


@dataclass(frozen=True)
class Word:
    text: bytes


def verify(body, headers, *, secrets, now, tolerance):
    known = Word(headers.get("x-word", "").encode()) in [Word(secret) for secret in secrets]
    return Verdict(None if known else Refusal.SIGNATURE_WRONG, "word", "1")


def split(body):
    return [RawEvent(key="k", body=body, delivery_id="d", event_type="t", occurred_at=None)]


GATEWAY = Gateway(
    name="NAME", display_name="Acme", status=Status.SANDBOX, documentation="x", verify=verify, split=split
)
'''


def write(folder, name, text):
    path = folder / f"{name}.py"
    path.write_text(text, "utf-8")
    return path


def test_stripe_is_found_under_its_own_name():
    gateways = discover()
    assert gateways["stripe"].name == "stripe"
    assert gateways["stripe"].topic == "raw.stripe"
    assert load("stripe") is gateways["stripe"]


def test_user_connector_is_found_and_receives(tmp_path):
    write(tmp_path, "acme", CONNECTOR.replace("NAME", "acme"))
    gateways = discover(tmp_path)
    assert list(gateways) == sorted(gateways)
    assert {"acme", "stripe"} <= set(gateways)
    assert load("acme", tmp_path).name == "acme"
    assert "acme" not in discover()

    records, sent = [], []

    class Publisher:
        async def publish(self, topic, key, value, headers):
            records.append((topic, key, value))

    async def receive():
        return {"type": "http.request", "body": b"{}"}

    async def send(message):
        sent.append(message)

    intake = Intake(Publisher(), HmacKey(b"k" * 16), count=lambda *_, **__: None)
    account = Account(name="a", source="acme", facility="f", secrets=(SecretStr("open"),))
    app = build_app(gateways=gateways, accounts=[account], intake=intake, count=lambda *_, **__: None)
    scope = {"type": "http", "method": "POST", "path": "/webhooks/acme/a", "headers": [(b"X-Word", b"open")]}
    asyncio.run(app(scope, receive, send))
    assert (sent[0]["status"], json.loads(sent[1]["body"])) == (200, {"accepted": 1})
    assert records == [("raw.acme", b"a/k", b"{}")]


@pytest.mark.parametrize(
    ("text", "cause"),
    [
        ("import a_module_that_is_not_there", "ModuleNotFoundError"),
        ("def broken(:", "SyntaxError"),
        ("1 / 0", "ZeroDivisionError"),
        ("GATEWAY = 'acme'", "GATEWAY"),
        ("", "GATEWAY"),
        (CONNECTOR.replace("NAME", "other"), "'other'"),
        (CONNECTOR.replace("NAME", "Not a name"), "ValueError"),
    ],
)
def test_broken_connector_stops_with_its_file_and_cause(tmp_path, text, cause):
    path = write(tmp_path, "acme", text)
    for attempt in (lambda: discover(tmp_path), lambda: load("acme", tmp_path)):
        with pytest.raises(ConnectorBroken) as raised:
            attempt()
        assert raised.value.place == str(path)
        assert cause in raised.value.detail
        assert raised.value.remedy


def test_failed_import_leaves_no_module_behind(tmp_path):
    write(tmp_path, "half_done", "1 / 0")
    with pytest.raises(ConnectorBroken):
        discover(tmp_path)
    assert not [name for name in sys.modules if name.endswith("half_done")]


def test_user_connector_may_not_replace_one_of_ours(tmp_path):
    path = write(tmp_path, "stripe", CONNECTOR.replace("NAME", "stripe"))
    with pytest.raises(ConnectorBroken) as raised:
        discover(tmp_path)
    assert raised.value.place == str(path)


def test_missing_folder_is_named(tmp_path):
    with pytest.raises(ConnectorBroken) as raised:
        discover(tmp_path / "absent")
    assert raised.value.place.endswith("absent")


def test_unknown_name_lists_the_known_ones():
    with pytest.raises(ConnectorUnknown) as raised:
        load("nobody")
    assert "stripe" in raised.value.remedy

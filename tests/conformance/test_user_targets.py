"""A target in a folder of one's own, as docs/adding-a-target.md writes it: one file, one YAML and fixtures."""

import json
import re

import pytest
from typer.testing import CliRunner

from runtime import cli
from runtime.connectors import Targets, list_hosts
from runtime.settings import read_settings
from schemas.failure import OperatorError
from sinks.catalog import load
from tests.conformance.own_folder import ROOT, make_folder, make_mistakes, run_suite


def read_documented(kind, start):
    """The one block of the document that begins so."""
    text = (ROOT / "docs" / "adding-a-target.md").read_text("utf-8")
    (block,) = (found for found in re.findall(rf"```{kind}\n(.*?)```", text, re.DOTALL) if found.startswith(start))
    return block


CONNECTOR = read_documented("python", '"""Acme Ledger')
MAPPING = read_documented("yaml", "event:")
INSTANCE = read_documented("toml", "[[targets]]")

SETTINGS = {
    "name": "acme-north",
    "connector": "acme_ledger",
    "facilities": ["north"],
    "environment": "sandbox",
    "user": "remitstream",
    "password": "planted-password",
    "ledger": "l1",
}

ANSWERS = {
    "taken": (200, '{"entry": "e1"}', None, "HTTP_200", "e1"),
    "refused": (422, "", "REJECTED", "HTTP_422", ""),
    "password": (401, "", "AUTH", "HTTP_401", ""),
    "throttled": (429, "", "RATE_LIMITED", "HTTP_429", ""),
    "away": (503, "", "UNAVAILABLE", "HTTP_503", ""),
    "broken": (500, "", "AMBIGUOUS", "HTTP_500", ""),
}

CONFIGURATION = """
tenant = "northcare"
[connectors]
targets = "ours"
[[facilities]]
id = "north"
time_zone = "America/Chicago"
default_authority = "NORTH"
authorities = [{name = "NORTH"}]
INSTANCE
[secrets]
hmac_key = "env:ACME_HMAC"
[stack]
embedded = true
""".replace("INSTANCE", INSTANCE)


def write_json(path, data):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data), "utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder ``ours`` with the target, beside a configuration that names it."""
    monkeypatch.setenv("ACME_PASSWORD", "planted-password")
    monkeypatch.setenv("ACME_HMAC", "k" * 40)
    folder = make_folder(tmp_path, monkeypatch, CONFIGURATION)
    (folder / "acme_ledger.py").write_text(CONNECTOR, "utf-8")
    (folder / "acme_ledger.yaml").write_text(MAPPING, "utf-8")
    given = json.loads((ROOT / "tests/fixtures/targets/quickbooks_online/requests/capture.json").read_text("utf-8"))
    fixtures = folder / "fixtures" / "acme_ledger"
    write_json(fixtures / "settings.json", SETTINGS)
    write_json(fixtures / "another.json", {"name": "acme-south", "ledger": "l2"})
    write_json(
        fixtures / "requests" / "capture.json",
        {
            "capability": "capture",
            "settings": {},
            "event": given["event"],
            "context": given["context"],
            "method": "PUT",
            "url": "https://sandbox.ledger.example/ledgers/l1/entries/{control_id}",
            "headers": [["content-type", "application/json"]],
            "request": ['{"memo":"pi_3Nq8","amount":"12.50","key":"{control_id}"}'],
            "amount_at": '"amount":"([0-9.]+)"',
        },
    )
    for name, (status, answer, kind, code, reference) in ANSWERS.items():
        write_json(
            fixtures / "answers" / f"{name}.json",
            {"capability": "capture", "settings": {}, "status": status, "headers": {}, "answer": [answer],
             "kind": kind, "code": code, "reference": reference},
        )  # fmt: skip
    return folder


def test_the_configuration_takes_it_and_checks_its_own_settings(folder):
    settings = read_settings(folder.parent / "remitstream.toml")
    (target,) = settings.targets
    assert settings.connectors.targets == folder
    assert (type(target).__name__, target.ledger) == ("AcmeSettings", "l1")
    # The deliverer's own class, or it would not be a target of this connector.
    assert isinstance(target, load("acme_ledger", settings.connectors.targets).settings)
    assert "planted" not in repr(settings)
    text = CONFIGURATION.replace('ledger = "l1"', 'leger = "l1"')
    (folder.parent / "remitstream.toml").write_text(text, "utf-8")
    with pytest.raises(OperatorError, match="leger"):
        read_settings(folder.parent / "remitstream.toml")


def test_without_the_setting_it_is_unknown(folder):
    (folder.parent / "remitstream.toml").write_text(CONFIGURATION.replace('targets = "ours"', ""), "utf-8")
    with pytest.raises(OperatorError, match="acme_ledger"):
        read_settings(folder.parent / "remitstream.toml")


def test_a_broken_file_or_a_missing_folder_is_named(folder):
    (folder / "broken.py").write_text("TARGET = 1", "utf-8")
    with pytest.raises(OperatorError) as caught:
        read_settings(folder.parent / "remitstream.toml")
    assert caught.value.place == str(folder / "broken.py")
    (folder.parent / "remitstream.toml").write_text(CONFIGURATION.replace('"ours"', '"theirs"'), "utf-8")
    with pytest.raises(OperatorError) as caught:
        read_settings(folder.parent / "remitstream.toml")
    assert caught.value.place == str(folder.parent / "theirs")


def test_the_command_line_lists_it_with_its_hosts(folder):
    file = str(folder.parent / "remitstream.toml")
    told = CliRunner().invoke(cli.app, ["connectors", "--config", file, "--json"])
    assert told.exit_code == 0, told.output
    listed = json.loads(told.stdout)["targets"]
    assert listed["acme_ledger"] == {
        "target": "Acme Ledger",
        "status": "sandbox",
        "from": str(folder),
        "calls": ["https://ledger.example", "https://sandbox.ledger.example"],
    }
    assert listed["epic_dft"]["from"] == "remitstream"
    assert "acme_ledger" not in Targets().list_all()


def test_the_suite_takes_its_mapping_and_fixtures_from_there(folder):
    told = run_suite("targets", folder, "acme_ledger", "test_targets.py")
    assert told.code == 0, told.output[-3000:]
    assert told.passed > 50


def test_the_suite_finds_its_mistakes(folder):
    mistakes = (
        ("fixtures/acme_ledger/requests/capture.json", "12.50", "12.51", "test_the_request_is_the_one_written_by_hand"),
        ("acme_ledger.py", '["entry"]', '.get("entry", "")', "test_garbage_is_never_success_and_never_a_refusal"),
        ("acme_ledger.py", "TargetClass.B", "TargetClass.C", "test_class_c_comes_with_a_look_up"),
        ("acme_ledger.py", "from pathlib", "import random\nfrom pathlib", "test_the_file_is_pure_and_documented"),
    )
    make_mistakes(folder, mistakes)
    told = run_suite("targets", folder, "acme_ledger", "test_targets.py")
    assert told.code == 1
    assert told.failed == {test for *_, test in mistakes}


def test_every_host_a_target_chooses_is_on_the_list_of_hosts():
    from tests.conformance.test_targets import OVER_HTTP, TARGETS, build_settings  # noqa: PLC0415 - names of the suite

    for name in OVER_HTTP:
        head = TARGETS[name].http
        for environment in ("production", "sandbox"):
            (called,) = [one for one in list_hosts([TARGETS[name]]) if one.environment == environment]
            settings = build_settings(name, {"environment": environment})
            for url in (settings.choose_base(head), settings.choose_token_url(head)):
                origin = "/".join(url.split("/")[:3])
                if called.origins and url:
                    assert origin in called.origins
                else:
                    assert not url or origin == f"https://{settings.host}"

"""A gateway in a folder of one's own: one file, one YAML and fixtures, and nothing else is touched."""

import hashlib
import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from runtime import cli
from runtime.connectors import Gateways
from runtime.roles import worker
from runtime.settings import read_settings
from schemas.failure import OperatorError
from schemas.keys import HmacKey
from streams.normalise import MAPPINGS
from tests.conformance.own_folder import ROOT, make_folder, make_mistakes, run_suite

NAME = "lakepay"

CONFIGURATION = """
tenant = "northcare"
[connectors]
gateways = "ours"
[[facilities]]
id = "north"
time_zone = "America/Chicago"
default_authority = "NORTH"
authorities = [{name = "NORTH"}]
[[accounts]]
name = "north-cards"
source = "lakepay"
facility = "north"
secrets = ["env:LAKEPAY_SECRET"]
[secrets]
hmac_key = "env:LAKEPAY_HMAC"
[stack]
embedded = true
"""


def rename(text):
    return text.replace('"stripe"', f'"{NAME}"').replace("stripe:", f"{NAME}:").replace(": stripe\n", f": {NAME}\n")


def write_fixtures(folder):
    """Fixtures of a gateway that speaks as Stripe does, and has another name: so its facts have other event ids."""
    shutil.copytree(ROOT / "tests" / "fixtures" / "gateways" / "stripe", folder)
    paths = sorted(folder.glob("normalise/*.expected.json"))
    texts = {path: rename(path.read_text("utf-8")) for path in paths}
    new_ids = {}
    for event in (json.loads(text).get("event") for text in texts.values()):
        if event:
            new_ids[event["event_id"]] = hashlib.sha256(event["transaction_key"].encode()).hexdigest()[:32]
    for path, text in texts.items():
        path.write_text(re.sub(r"[0-9a-f]{32}", lambda found: new_ids.get(found[0], found[0]), text), "utf-8")
    overlay = folder / "north.yaml"
    overlay.write_text(rename((ROOT / "examples" / "overlays" / "north.yaml").read_text("utf-8")), "utf-8")
    tenancy = folder / "normalise" / "tenancy.json"
    text = rename(tenancy.read_text("utf-8")).replace("examples/overlays/north.yaml", str(overlay))
    tenancy.write_text(text, "utf-8")


@pytest.fixture
def folder(tmp_path, monkeypatch):
    """The folder ``ours`` with the gateway, beside a configuration that names it."""
    monkeypatch.setenv("LAKEPAY_SECRET", "whsec_planted")
    monkeypatch.setenv("LAKEPAY_HMAC", "k" * 40)
    folder = make_folder(tmp_path, monkeypatch, CONFIGURATION)
    for suffix, source in ((".py", ROOT / "sources" / "payments" / "stripe.py"), (".yaml", MAPPINGS / "stripe.yaml")):
        (folder / f"{NAME}{suffix}").write_text(rename(source.read_text("utf-8")), "utf-8")
    return folder


def test_the_configuration_takes_it_and_without_the_setting_it_is_unknown(folder):
    file = folder.parent / "remitstream.toml"
    settings = read_settings(file)
    assert settings.connectors.gateways == folder
    assert settings.sources == (NAME, "hl7")
    file.write_text(CONFIGURATION.replace('gateways = "ours"', ""), "utf-8")
    with pytest.raises(OperatorError, match=NAME):
        read_settings(file)
    file.write_text(CONFIGURATION.replace('"ours"', '"theirs"'), "utf-8")
    with pytest.raises(OperatorError) as caught:
        read_settings(file)
    assert caught.value.place == str(folder.parent / "theirs")


def test_the_command_line_lists_it(folder):
    told = CliRunner().invoke(cli.app, ["connectors", "--config", str(folder.parent / "remitstream.toml"), "--json"])
    assert told.exit_code == 0, told.output
    listed = json.loads(told.stdout)["gateways"]
    assert listed[NAME]["from"] == str(folder)
    assert listed["stripe"]["from"] == "remitstream"


def test_a_worker_takes_the_mapping_beside_it(folder):
    class AnySchema(dict):
        def __missing__(self, key):
            return 1

    class Registry:
        find_schema = None

    (folder / f"{NAME}.yaml").write_text(
        rename((MAPPINGS / "stripe.yaml").read_text("utf-8")).replace("version: 1", "version: 7")
    )
    settings = read_settings(folder.parent / "remitstream.toml")
    deciders = worker.build_deciders(settings, HmacKey(b"k" * 32), Registry(), AnySchema(), None)
    assert deciders[NAME]._normaliser.version.startswith(f"{NAME}/7/")
    assert Gateways(folder).find_mappings("stripe") is None


def test_the_suite_takes_its_parts_from_there_and_finds_its_mistakes(folder):
    write_fixtures(folder / "fixtures" / NAME)
    mistakes = (
        (f"{NAME}.py", "hmac.compare_digest", "(lambda a, b: a == b)", "test_signatures_are_compared_in_constant_time"),
        (
            f"fixtures/{NAME}/normalise/refund.expected.json",
            "2500,",
            "2501,",
            "test_raw_body_gives_the_expected_outcome",
        ),
    )
    make_mistakes(folder, mistakes)
    chosen = f"{NAME} and (constant_time or outcome)"
    told = run_suite("gateways", folder, chosen, "test_gateways.py", "test_mappings.py")
    assert told.code == 1
    assert told.failed == {test for *_, test in mistakes}
    assert told.passed > 20

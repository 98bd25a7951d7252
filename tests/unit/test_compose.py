"""docker-compose.yml: its settings are ours, its secrets and volumes exist, its health checks ask the right process.

No container engine is needed: what a service would be given is given to the code that reads it.
"""

import http.server
import json
import os
import re
import shutil
import subprocess
import sys
import threading
from pathlib import Path

import pytest
import yaml

from runtime.installation import PACKAGES
from runtime.settings import read_settings
from topics.provision import REPLICATION

ROOT = Path(__file__).parents[2]
COMPOSE = yaml.safe_load((ROOT / "docker-compose.yml").read_text("utf-8"))
SERVICES = COMPOSE["services"]
PROCESSES = {
    "receiver": ("receive", lambda settings: settings.health.receiver),
    "listener": ("listen", lambda settings: settings.health.listener),
    "projector": ("project", lambda settings: settings.health.projector),
    "worker": ("worker", lambda settings: settings.health.worker),
    "deliverer": ("deliver", lambda settings: settings.health.deliverer),
    "sandbox": ("sandbox", lambda settings: settings.sandbox.control_port),
}
ONCE = {"topics": ["topics", "apply"], "schemas": ["schemas", "register"]}
BROKERS = ("kafka-1", "kafka-2", "kafka-3")
OURS = (*PROCESSES, *ONCE)


def test_every_part_of_the_system_is_a_service_and_nothing_else_is():
    assert set(SERVICES) == {*BROKERS, "registry", "redis", *OURS}


@pytest.mark.parametrize("name", SERVICES)
def test_every_service_that_stays_up_has_a_health_check(name):
    check = SERVICES[name]["healthcheck"]
    if name in ONCE:
        assert check == {"disable": True}
        assert SERVICES[name]["restart"] == "no"
    else:
        assert check["test"][0] in {"CMD", "CMD-SHELL"}
        assert len(check["test"]) > 1
        assert {"interval", "timeout", "retries"} <= set(check)
        assert SERVICES[name]["restart"] == "unless-stopped"


@pytest.mark.parametrize("name", SERVICES)
def test_a_service_waits_for_others_by_a_condition_they_can_meet(name):
    waits = SERVICES[name].get("depends_on", {})
    for other, how in waits.items():
        expected = "service_completed_successfully" if other in ONCE else "service_healthy"
        assert how == {"condition": expected}, other
    if name in PROCESSES and name != "sandbox":
        assert set(ONCE) <= set(waits)


def test_waiting_for_each_other_has_no_circle():
    done: set[str] = set()
    while len(done) < len(SERVICES):
        ready = {name for name in SERVICES if set(SERVICES[name].get("depends_on", ())) <= done} - done
        assert ready, set(SERVICES) - done
        done |= ready


@pytest.mark.parametrize("name", SERVICES)
def test_named_secrets_and_volumes_are_declared(name):
    assert set(SERVICES[name].get("secrets", ())) <= set(COMPOSE["secrets"])
    for volume in SERVICES[name].get("volumes", ()):
        source = volume.split(":")[0]
        if source.startswith("."):
            assert (ROOT / source).exists(), source
        else:
            assert source in COMPOSE["volumes"]


def test_declared_secrets_and_volumes_are_used_and_the_head_says_how_to_make_them():
    used = {secret for service in SERVICES.values() for secret in service.get("secrets", ())}
    assert used == set(COMPOSE["secrets"])
    volumes = {volume.split(":")[0] for service in SERVICES.values() for volume in service.get("volumes", ())}
    assert set(COMPOSE["volumes"]) <= volumes
    text = (ROOT / "docker-compose.yml").read_text("utf-8")
    made = set(re.search(r"for name in (.*); do", text).group(1).split())
    assert made == set(COMPOSE["secrets"])
    assert {secret["file"] for secret in COMPOSE["secrets"].values()} == {f"./secrets/{name}" for name in made}
    assert "secrets/" in (ROOT / ".gitignore").read_text("utf-8").splitlines()


@pytest.mark.parametrize("name", SERVICES)
def test_no_secret_is_written_into_a_service(name):
    for variable, text in SERVICES[name].get("environment", {}).items():
        if re.search("SECRET|PASSWORD|KEY$", variable):
            assert text.startswith(("file:/run/secrets/", '["file:/run/secrets/')), variable


@pytest.fixture
def read(tmp_path, monkeypatch):
    """The settings a service of ours reads, with its mounts and secrets moved to a folder."""
    shutil.copy(ROOT / "examples" / "three-facilities.toml", tmp_path)
    shutil.copytree(ROOT / "examples" / "overlays", tmp_path / "overlays")
    for secret in COMPOSE["secrets"]:
        (tmp_path / secret).write_text(f"{secret} of thirty-two characters at least\n", "utf-8")

    def read_service(name):
        for variable in [variable for variable in os.environ if variable.startswith("REMITSTREAM_")]:
            monkeypatch.delenv(variable)
        for variable, text in SERVICES[name]["environment"].items():
            monkeypatch.setenv(variable, text.replace("/run/secrets", str(tmp_path)))
        mounted = dict(volume.removesuffix(":ro").split(":")[::-1] for volume in SERVICES[name]["volumes"])
        assert mounted[os.environ["REMITSTREAM_CONFIG"]] == "./examples/three-facilities.toml"
        monkeypatch.setenv("REMITSTREAM_CONFIG", str(tmp_path / "three-facilities.toml"))
        return read_settings()

    return read_service


@pytest.mark.parametrize("name", OURS)
def test_a_service_is_given_settings_that_are_valid_and_reach_the_other_services(name, read):
    settings = read(name)
    assert not settings.embedded
    assert [host.split(":")[0] for host in settings.kafka.bootstrap.split(",")] == list(BROKERS)
    assert settings.registry.url == "http://registry:8080/apis/ccompat/v7"
    assert settings.redis.url.startswith("redis://redis:")
    assert settings.redis.password.get_secret_value().startswith("redis_password")
    secrets = [secret.get_secret_value().split()[0] for account in settings.accounts for secret in account.secrets]
    assert secrets == ["stripe_north", "stripe_harbor", "stripe_valley", "stripe_valley_next"]
    assert settings.instance == "compose-1"


def test_the_ways_in_are_open_on_the_ports_they_listen_on(read):
    assert read("receiver").receiver.host == "0.0.0.0"
    assert SERVICES["receiver"]["ports"] == [f"{read('receiver').receiver.port}:{read('receiver').receiver.port}"]
    assert read("listener").listener.host == "0.0.0.0"
    assert SERVICES["listener"]["ports"] == [f"{read('listener').listener.port}:{read('listener').listener.port}"]
    assert not [name for name in SERVICES if name not in {"receiver", "listener"} and "ports" in SERVICES[name]]


def test_local_state_lies_on_a_volume(read):
    folder = read("worker").worker.state
    mounts = [volume.split(":") for volume in SERVICES["worker"]["volumes"]]
    assert [source for source, place, *_ in mounts if folder.is_relative_to(place)] == ["worker"]


def test_the_deliverer_reaches_the_simulated_billing_systems(read):
    assert SERVICES["deliverer"]["network_mode"] == "service:sandbox"
    assert {target.host for target in read("deliverer").targets} == {"127.0.0.1"}


@pytest.mark.parametrize("name", OURS)
def test_a_service_runs_a_command_that_exists(name):
    command = ONCE.get(name) or [PROCESSES[name][0]]
    assert SERVICES[name]["command"] == command
    asked = subprocess.run(
        [sys.executable, "-m", "runtime.cli", *command, "--help"], cwd=ROOT, capture_output=True, check=False
    )
    assert asked.returncode == 0


class Page(http.server.BaseHTTPRequestHandler):
    """Answers with the status its server was told, and remembers what was asked."""

    def do_GET(self):
        self.server.asked.append(self.path)
        self.send_response(self.server.status)
        self.end_headers()

    def log_message(self, *_):
        """Says nothing."""


@pytest.mark.parametrize("name", PROCESSES)
def test_a_health_check_asks_its_own_process_and_believes_it(name, read):
    command = SERVICES[name]["healthcheck"]["test"]
    port = PROCESSES[name][1](read(name))
    assert f":{port}/" in command[-1]
    path = "/health" if name == "sandbox" else "/ready"
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), Page) as server:
        server.asked = []
        threading.Thread(target=server.serve_forever, daemon=True).start()
        moved = [part.replace(f":{port}/", f":{server.server_port}/") for part in command[2:]]
        codes = {}
        for server.status in (200, 503):
            codes[server.status] = subprocess.run([sys.executable, *moved], capture_output=True, check=False).returncode
        server.shutdown()
    assert command[:2] == ["CMD", "python"]
    assert server.asked == [path, path]
    assert codes[200] == 0
    assert codes[503] != 0


def test_three_brokers_give_what_provisioning_demands():
    assert len(BROKERS) == REPLICATION
    voters = ",".join(f"{number}@{name}:9093" for number, name in enumerate(BROKERS, 1))
    for number, name in enumerate(BROKERS, 1):
        environment = SERVICES[name]["environment"]
        assert environment["KAFKA_NODE_ID"] == str(number)
        assert environment["KAFKA_ADVERTISED_LISTENERS"] == f"PLAINTEXT://{name}:9092"
        assert environment["KAFKA_CONTROLLER_QUORUM_VOTERS"] == voters
        assert environment["KAFKA_OFFSETS_TOPIC_REPLICATION_FACTOR"] == str(REPLICATION)
        assert environment["KAFKA_TRANSACTION_STATE_LOG_REPLICATION_FACTOR"] == str(REPLICATION)
        assert environment["KAFKA_UNCLEAN_LEADER_ELECTION_ENABLE"] == "false"
        assert environment["KAFKA_AUTO_CREATE_TOPICS_ENABLE"] == "false"
        assert environment["KAFKA_LOG_RETENTION_MS"] == "-1"


def test_the_images_are_of_the_versions_the_tests_run_against():
    lock = json.loads((ROOT / "runtime" / "stack" / "artifacts.lock").read_text("utf-8"))
    assert SERVICES["kafka-1"]["image"] == f"apache/kafka:{lock['parts']['kafka']['version']}"
    assert SERVICES["registry"]["image"].endswith(f":{lock['parts']['registry']['version']}")


def test_the_image_is_built_from_the_lock_and_holds_every_package():
    text = (ROOT / "Dockerfile").read_text("utf-8")
    assert "--require-hashes -r requirements.lock" in text
    allowed = {line[1:] for line in (ROOT / ".dockerignore").read_text("utf-8").splitlines() if line.startswith("!")}
    assert allowed == {*PACKAGES, "requirements.lock", "pyproject.toml", "README.md", "LICENSE"}

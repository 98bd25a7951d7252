"""A target of one's own on the real stack, written down as docs/adding-a-target.md says, and delivered to."""

from __future__ import annotations

import base64
import json
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import pytest
from confluent_kafka import Producer

from runtime.settings import read_settings
from schemas.events import DeliveryOutcome, MoneyEvent, Reference
from schemas.money import Money
from schemas.wire import Decoder, Encoder
from tests.conformance.test_user_targets import CONNECTOR, INSTANCE, MAPPING
from topics.registry import Registry, find_ids

pytestmark = pytest.mark.integration

PASSWORD = "planted-password"
CAPTURE, REFUND = "0" * 31 + "1", "0" * 31 + "2"


class Ledger(ThreadingHTTPServer):
    """Acme's ledger: entries under their keys. The first answer is lost: the connection ends after posting."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), LedgerHandler)
        self.url = f"http://127.0.0.1:{self.server_port}"
        self.entries = {}
        self.calls = []
        threading.Thread(target=self.serve_forever, daemon=True).start()

    def close(self):
        self.shutdown()
        self.server_close()


class LedgerHandler(BaseHTTPRequestHandler):
    def do_PUT(self):
        body = self.rfile.read(int(self.headers["Content-Length"]))
        scheme, _, word = self.headers["Authorization"].partition(" ")
        ledger = self.server
        assert (scheme, base64.b64decode(word).decode()) == ("Basic", f"remitstream:{PASSWORD}")
        ledger.calls.append((self.path, body))
        ledger.entries[self.path] = json.loads(body)
        if len(ledger.calls) == 1:
            self.close_connection = True
            return
        answer = b'{"entry": "E-1"}'
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_):
        """Nothing."""


@pytest.fixture
def ledger():
    ledger = Ledger()
    yield ledger
    ledger.close()


def write_target(deployment, ledger):
    """What the document tells to write, and nothing else; the simulator stands where the vendor's test system would."""
    folder = deployment.folder / "our-targets"
    folder.mkdir()
    (folder / "acme_ledger.py").write_text(CONNECTOR, "utf-8")
    (folder / "acme_ledger.yaml").write_text(MAPPING, "utf-8")
    (deployment.folder / "acme.password").write_text(PASSWORD, "utf-8")
    (deployment.folder / "acme.password").chmod(0o600)
    instance = INSTANCE.replace("env:ACME_PASSWORD", "file:acme.password").replace(
        '"sandbox"', f'"simulator"\nsimulator_url = "{ledger.url}"\ncall_deadline_seconds = 2'
    )
    with deployment.path.open("a", encoding="utf-8") as file:
        file.write(f'\n[connectors]\ntargets = "our-targets"\n\n{instance}')


def run_command(deployment, *words):
    told = subprocess.run(
        [sys.executable, "-m", "runtime.cli", *words, *deployment.settings.list_arguments()],
        cwd=deployment.folder, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert told.returncode == 0, told.stderr
    return told.stdout


def publish(deployment, number):
    """A capture of that patient and its refund, in the canonical topic; and who the patient is."""
    settings = deployment.settings
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "partitioner": "murmur2_random", "acks": "all"})
    encoder = Encoder("money_event", find_ids(Registry(settings.registry), settings.topics)["payments-value"])
    for key, value in deployment.build_patients(number):
        producer.produce("patients", value, key)
    for event_id, kind, object_id, minor in (
        (CAPTURE, "capture", "pi_1", 1250),
        (REFUND, "refund", "re_1", 250),
    ):
        event = MoneyEvent(
            event_id=event_id, transaction_key=f"stripe:north-card:{kind}:{object_id}", tenant="lakeshore",
            facility="north", source="stripe", account="north-card", kind=kind, status="succeeded",
            money=Money(minor, "USD", 2), occurred_at=1_767_225_600_000, received_at=1_767_225_600_000,
            object_id=object_id, root="north-card/pi_1", source_event_id=f"evt_{object_id}",
            patient=Reference("NORTH", "MR", number), mrn=Reference("NORTH", "MR", number), mapping_version="1",
            origin="t:0:0",
        )  # fmt: skip
        producer.produce(
            "payments", encoder.encode(event), b"north-card/pi_1", headers=[("event_id", event_id.encode())]
        )
    assert producer.flush(30) == 0


def read_outcomes(deployment, outside):
    """Event, outcome and reference of every delivery at the target."""
    decoder = Decoder("delivery_outcome", DeliveryOutcome, Registry(deployment.settings.registry).find_schema)
    found = [decoder.decode(record.value()) for record in outside(deployment).read_topic("deliveries")]
    return sorted((told.event_id, told.outcome, told.reference) for told in found if told.target == "acme-north")


def test_a_target_from_a_folder_is_delivered_to_once(deployment, ledger, outside):
    write_target(deployment, ledger)
    assert "acme-north" in run_command(deployment, "config", "check", "--json")
    run_command(deployment, "topics", "apply")
    run_command(deployment, "schemas", "register")
    deployment.settings = read_settings(deployment.path, deployment.overrides.items())
    publish(deployment, "N-77")
    deployment.start("project")
    deployment.start("deliver", "acme-north")

    deployment.wait_until(lambda: len(read_outcomes(deployment, outside)) >= 2, "no outcomes", 90)
    assert read_outcomes(deployment, outside) == [(CAPTURE, "posted", "E-1"), (REFUND, "not_routed", "")]
    (path,) = ledger.entries
    assert ledger.entries[path] == {"memo": "pi_1", "amount": "12.50", "key": path.rpartition("/")[2]}
    assert path.startswith("/ledgers/l1/entries/")
    # The lost answer was followed by the same bytes, and nothing else was ever sent.
    assert ledger.calls == [(path, ledger.calls[0][1])] * 2
    assert deployment.stop("deliver") == 0

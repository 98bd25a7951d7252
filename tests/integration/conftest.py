"""Deployments on the real stack (``embedded_stack`` in ``tests/conftest.py``): fresh topics for each."""

from __future__ import annotations

import contextlib
import hmac
import http.client
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from confluent_kafka import Consumer, KafkaError, TopicPartition
from confluent_kafka.admin import AdminClient, ConfigResource
from prometheus_client.parser import text_string_to_metric_families

from runtime.account import balance_books
from runtime.settings import ensure_secrets, read_settings
from schemas.events import PatientRecord, Reference
from schemas.failure import TemporaryError
from schemas.keys import HmacKey
from schemas.wire import Encoder
from tests.ports import find_ports
from topics import provision
from topics.registry import Registry, find_ids, register_schemas

ROOT = Path(__file__).parents[2]
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture
def stack(embedded_stack):
    """Addresses of the running stack: ``kafka_bootstrap``, ``registry_url``, ``redis_url``."""
    return embedded_stack.up()


class Deployment:
    """One deployment of examples/three-facilities.toml on the stack, with topics, ports and state of its own."""

    def __init__(self, folder: Path, stack, overrides: dict[str, str], targets: str | None = None):
        """``targets`` replaces the example's target instances, as TOML."""
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.path = folder / "three-facilities.toml"
        text = (ROOT / "examples" / "three-facilities.toml").read_text("utf-8")
        for port in (2661, 2662, 2663):
            text = text.replace(f"port = {port}", f"port = {find_ports()}")
        if targets is not None:
            text = text[: text.index("[[targets]]")] + targets + text[text.index("[secrets]") :]
        self.path.write_text(text, "utf-8")
        shutil.copytree(ROOT / "examples" / "overlays", folder / "overlays")
        self.ports = {role: find_ports() for role in ("receiver", "listener", "projector", "worker", "deliverer")}
        self.receiver_port, self.listener_port = find_ports(), find_ports()
        self.overrides = {
            "stack.embedded": "true",
            "kafka.bootstrap": stack.kafka_bootstrap,
            "registry.url": stack.registry_url,
            "redis.url": stack.redis_url,
            # A static member that comes back within its session gets the partitions it had, so those of a deployment
            # with another number of partitions must have another name.
            "worker.instance": f"p{overrides.get('worker.partitions', 'd')}",
            "kafka.session_timeout_seconds": "6",
            "redis.key_prefix": f"t{time.time_ns()}",
            "receiver.port": str(self.receiver_port),
            "listener.port": str(self.listener_port),
            "sandbox.control_port": "0",
            **{f"health.{role}": str(port) for role, port in self.ports.items()},
            **overrides,
        }
        ensure_secrets(self.path, self.overrides.items())
        self.settings = read_settings(self.path, self.overrides.items())

    def provision(self) -> None:
        """Delete every topic and make the catalog's anew: topic ids differ, so local state cannot be mistaken."""
        self.delete_topics()
        provision.apply(
            self.settings.kafka, self.settings.topics, partitions=self.settings.worker.partitions, embedded=True
        )
        register_schemas(Registry(self.settings.registry), self.settings.topics)

    def delete_topics(self) -> None:
        """Delete every topic and group of the broker."""
        admin = AdminClient({"bootstrap.servers": self.settings.kafka.bootstrap})
        names = [name for name in admin.list_topics(timeout=10).topics if not name.startswith("__")]
        for future in admin.delete_topics(names, operation_timeout=20).values() if names else ():
            future.result()
        until = time.monotonic() + 20
        while any(name in admin.list_topics(timeout=10).topics for name in names):
            assert time.monotonic() < until, "topics are not deleted"
            time.sleep(0.1)
        groups = [group.group_id for group in admin.list_consumer_groups().result().valid]
        for future in admin.delete_consumer_groups(groups).values() if groups else ():
            with contextlib.suppress(Exception):
                future.result()

    def build_patients(self, *numbers: str, authority: str = "NORTH") -> list[tuple[bytes, bytes]]:
        """Keys and values of the topic ``patients``: everybody's survivor is the number itself."""
        encoder = Encoder(
            "patient_record", find_ids(Registry(self.settings.registry), self.settings.topics)["patients-value"]
        )
        hmac_key = HmacKey(self.settings.secrets.hmac_key.get_secret_value().encode())
        patients = []
        for number in numbers:
            reference = Reference(authority, "MR", number)
            record = PatientRecord(
                tenant="lakeshore",
                facility=authority.lower(),
                identifier=reference,
                status="active",
                mrn=reference,
                feed="north-adt",
                source_event_id=number,
                message_type="ADT^A04",
                occurred_at=1,
                received_at=1,
                mapping_version="1",
                origin="here",
            )
            patients.append((hmac_key.hash_identifier(reference).encode(), encoder.encode(record)))
        return patients

    def start(self, command: str, *arguments: str, env: dict[str, str] | None = None) -> subprocess.Popen:
        """Start a role (``receive``, ``listen``, ``project``, ``worker``, ``deliver``, ``sandbox``) as a process."""
        with (self.folder / f"{command}.log").open("ab") as log:
            process = subprocess.Popen(
                [sys.executable, "-m", "runtime.cli", command, *arguments, *self.settings.list_arguments()],
                stderr=log,
                stdout=log,
                cwd=self.folder,
                env={**os.environ, **(env or {})},
            )
        self.processes[command] = process
        return process

    def await_ready(self, role: str, timeout: float = 60) -> None:
        """Wait until a role's health endpoint says that it can work."""
        self.wait_until(lambda: self.is_ready(role), f"{role} is not ready", timeout)

    def is_ready(self, role: str) -> bool:
        """What a role's health endpoint says now."""
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.ports[role]}/ready", timeout=2) as answer:
                return answer.status == 200
        except (OSError, urllib.error.URLError):
            return False

    def read_reasons(self, role: str) -> dict[str, str]:
        """Why a role says it is not ready."""
        try:
            DIRECT.open(f"http://127.0.0.1:{self.ports[role]}/ready", timeout=2)
        except urllib.error.HTTPError as error:
            return json.load(error)["reasons"]
        except OSError:
            return {}  # not there yet, or not any more
        return {}

    def wait_until(self, condition, complaint: str, timeout: float = 60) -> None:
        """Wait for a condition; fail with the complaint and the logs' ends."""
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                pytest.fail(f"{complaint}\n{self.read_logs()}")
            time.sleep(0.1)

    def read_logs(self) -> str:
        """The last lines of every role's log."""
        return "\n".join(
            f"== {log.name}\n" + "\n".join(log.read_text("utf-8", "replace").splitlines()[-15:])
            for log in sorted(self.folder.glob("*.log"))
        )

    def account(self):
        """The books, balanced from the topics."""
        return balance_books(self.settings)

    def await_account(self, condition, complaint: str = "the books do not settle", timeout: float = 60):
        """Wait until the account fulfils a condition; return it."""
        found = []

        def check():
            try:
                found[:] = [self.account()]
            except TemporaryError:
                return False  # a broker that has just come back
            return condition(found[0])

        try:
            self.wait_until(check, complaint, timeout)
        except pytest.fail.Exception:
            books = json.dumps(found[0].build_report(), indent=1) if found else "no books"
            pytest.fail(f"{complaint}\n{books}\n{self.read_logs()}")
        return found[0]

    def stop(self, command: str, *, kill: bool = False) -> int:
        """End a role; return its exit code."""
        process = self.processes.pop(command)
        process.send_signal(signal.SIGKILL if kill else signal.SIGTERM)
        return process.wait(30)

    def close(self) -> None:
        """End everything that was started."""
        for process in self.processes.values():
            process.send_signal(signal.SIGCONT)
            process.terminate()
        for process in self.processes.values():
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.processes.clear()


class Outside:
    """The world around a deployment: a gateway that signs, an HL7 sender, somebody who reads topics and metrics.

    Everything here is written from the vendors' rules and shares no code with the project.
    """

    def __init__(self, deployment: Deployment):
        self.deployment = deployment

    def find_secret(self, account: str = "north-card") -> bytes:
        """The first signing secret of an account."""
        for known in self.deployment.settings.accounts:
            if known.name == account:
                return known.secrets[0].get_secret_value().encode()
        raise KeyError(account)

    def sign(self, body: bytes, *, account: str = "north-card", age: int = 0, secret: bytes | None = None) -> str:
        """Stripe's signature header of a body, signed ``age`` seconds ago."""
        signed_at = int(time.time()) - age
        key = self.find_secret(account) if secret is None else secret
        digest = hmac.new(key, str(signed_at).encode() + b"." + body, "sha256").hexdigest()
        return f"t={signed_at},v1={digest}"

    def post(self, body, *, path="/webhooks/stripe/north-card", signature=None, tls=None, timeout=30):
        """Status, headers and body of the answer. A body that is an iterator is sent in chunks without a length."""
        if tls is None:
            connection = http.client.HTTPConnection("127.0.0.1", self.deployment.receiver_port, timeout=timeout)
        else:
            connection = http.client.HTTPSConnection(
                "127.0.0.1", self.deployment.receiver_port, timeout=timeout, context=tls
            )
        headers = {"Content-Type": "application/json"} | ({"Stripe-Signature": signature} if signature else {})
        with contextlib.closing(connection):
            connection.request("POST", path, body, headers, encode_chunked=not isinstance(body, bytes))
            answer = connection.getresponse()
            return answer.status, {name.lower(): value for name, value in answer.getheaders()}, answer.read()

    def deliver(self, body: bytes, *, account: str = "north-card") -> int:
        """Deliver an event rightly signed; return the status."""
        signature = self.sign(body, account=account)
        return self.post(body, path=f"/webhooks/stripe/{account}", signature=signature)[0]

    def send_hl7(self, *messages: bytes, framed: bool = True, tls=None, timeout: float = 30) -> bytes:
        """Send messages over one MLLP connection; return all answers, or what came until the listener closed."""
        answers = b""
        with socket.create_connection(("127.0.0.1", self.deployment.listener_port), timeout=timeout) as plain:
            line = plain if tls is None else tls.wrap_socket(plain, server_hostname="127.0.0.1")
            with line:
                for message in messages:
                    line.sendall(b"\x0b" + message + b"\x1c\r" if framed else message)
                if not framed:
                    line.shutdown(socket.SHUT_WR)
                while answers.count(b"\x1c\r") < len(messages):
                    got = line.recv(65536)
                    if not got:
                        break
                    answers += got
        return answers

    def read_metric(self, role: str, name: str, /, **labels: str) -> float:
        """Value of a metric at a role's endpoint; 0 when it is not there."""
        return self.list_metrics(role, name).get(frozenset(labels.items()), 0.0)

    def list_metrics(self, role: str, name: str) -> dict[frozenset[tuple[str, str]], float]:
        """Every value of a metric at a role's endpoint, by its labels."""
        with DIRECT.open(f"http://127.0.0.1:{self.deployment.ports[role]}/metrics", timeout=10) as answer:
            families = list(text_string_to_metric_families(answer.read().decode()))
        return {
            frozenset(sample.labels.items()): sample.value
            for family in families
            for sample in family.samples
            if sample.name == f"remitstream_{name}"
        }

    def read_ends(self, topic: str) -> dict[int, int]:
        """End of every partition: also what is not committed counts."""
        reader = self._open_reader()
        with contextlib.closing(reader):
            partitions = reader.list_topics(topic, timeout=20).topics[topic].partitions
            return {n: reader.get_watermark_offsets(TopicPartition(topic, n), timeout=20)[1] for n in partitions}

    def read_topic(self, topic: str, starts: dict[int, int] | None = None):
        """Every committed record of a topic, from its begin or from these offsets, as the client's messages."""
        starts = starts or {}
        ends = {n: end for n, end in self.read_ends(topic).items() if end > starts.get(n, 0)}
        reader = self._open_reader()
        messages = []
        with contextlib.closing(reader):
            reader.assign([TopicPartition(topic, n, starts.get(n, 0)) for n in ends])
            while ends:
                message = reader.poll(20)
                assert message is not None, f"{topic} ends before {ends}"
                if message.error() is None:
                    messages.append(message)
                    reached = message.offset() + 1
                else:
                    assert message.error().code() == KafkaError._PARTITION_EOF, message.error().name()
                    reached = message.offset()
                if reached >= ends.get(message.partition(), reached + 1):
                    del ends[message.partition()]
        return messages

    def list_topics(self) -> list[str]:
        """Every topic of the deployment."""
        return [topic.name for topic in self.deployment.settings.topics]

    def list_configurations(self) -> dict[str, tuple[int, dict[str, str]]]:
        """Partition count and settings of every topic on the broker."""
        admin = AdminClient({"bootstrap.servers": self.deployment.settings.kafka.bootstrap})
        topics = {name: t for name, t in admin.list_topics(timeout=20).topics.items() if not name.startswith("__")}
        resources = {name: ConfigResource(ConfigResource.Type.TOPIC, name) for name in topics}
        found = admin.describe_configs(list(resources.values())) if resources else {}
        return {
            resource.name: (
                len(topics[resource.name].partitions),
                {name: entry.value for name, entry in future.result().items()},
            )
            for resource, future in found.items()
        }

    def _open_reader(self):
        return Consumer(
            {
                "bootstrap.servers": self.deployment.settings.kafka.bootstrap,
                "group.id": "outside",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": "read_committed",
            }
        )


@pytest.fixture(scope="session")
def outside():
    """Make the world around a deployment."""
    return Outside


@contextlib.contextmanager
def _open_deployments(find_stack, folder):
    opened: list[Deployment] = []

    def make(**overrides: str) -> Deployment:
        own = folder / f"d{len(opened)}"
        own.mkdir()
        deployment = Deployment(own, find_stack(), {key.replace("__", "."): value for key, value in overrides.items()})
        opened.append(deployment)
        deployment.provision()
        return deployment

    try:
        yield make
    finally:
        for deployment in opened:
            deployment.close()


@pytest.fixture
def deploy(stack, tmp_path):
    """Make a deployment with fresh topics; keyword arguments are dotted settings (``.`` written as ``__``)."""
    with _open_deployments(lambda: stack, tmp_path) as make:
        yield make


@pytest.fixture(scope="module")
def deploy_for_module(embedded_stack, tmp_path_factory):
    """As ``deploy``, for deployments that the tests of one file share. A later one takes the topics of an earlier."""
    with _open_deployments(embedded_stack.up, tmp_path_factory.mktemp("deployments")) as make:
        yield make


@pytest.fixture
def deployment(deploy):
    """A deployment with fresh topics."""
    return deploy()

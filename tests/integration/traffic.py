"""Shared pieces of the end-to-end tests: the command line in a folder of its own, and what can be read afterwards.

Everything here looks from outside: processes by the operating system, records by a plain Kafka consumer, postings by
SQLite, expected results by the file that was written before the first byte was sent.
"""

from __future__ import annotations

import io
import json
import os
import shutil
import signal
import sqlite3
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path

import fastavro
import httpx
import msgspec
import psutil
from confluent_kafka import OFFSET_BEGINNING, Consumer, IsolationLevel, TopicPartition
from confluent_kafka.admin import AdminClient, OffsetSpec

from runtime.settings import read_settings
from sandbox.expected import read_expected
from tests.ports import find_ports

ROOT = Path(__file__).parents[2]
EQUATION = ("canonical", "suppressed", "ignored", "patient_update", "waiting", "in_review", "dead_lettered")
OUTCOMES = ("posted", "not_routed", "rejected", "dead_lettered", "parked", "unknown", "waived")


PORTS = (
    "receiver.port",
    "listener.port",
    "sandbox.control_port",
    *(f"health.{role}" for role in ("receiver", "listener", "projector", "worker", "deliverer")),
    *(f"targets.epic-{facility}.port" for facility in ("north", "harbor", "valley")),
)


def assign_ports():
    """A free port for everything that listens, outside the range of outgoing connections."""
    return {key: find_ports() for key in PORTS}


class Finished:
    """A run that has ended: exit code, all it printed, and its report (None when it wrote none)."""

    def __init__(self, code, output, report):
        self.code = code
        self.output = output
        self.report = report

    def __repr__(self):
        return f"exit code {self.code}\n{self.output}"


class Run:
    """``remitstream run --once`` as a process."""

    def __init__(self, process, output, report):
        self._process = process
        self._output = output
        self._report = report
        self.pid = process.pid

    @property
    def is_over(self):
        return self._process.poll() is not None

    def read_output(self):
        return self._output.read_text("utf-8", "replace")

    def signal(self, number):
        self._process.send_signal(number)

    def find_role(self, command):
        """The process of a role, once it runs its program; None while it does not."""
        try:
            children = psutil.Process(self.pid).children()
        except psutil.NoSuchProcess:
            return None
        for child in children:
            try:
                arguments = child.cmdline()
            except psutil.Error:
                continue
            if arguments[1:4] == ["-m", "runtime.cli", command]:
                return child
        return None

    def wait(self, timeout=240):
        try:
            code = self._process.wait(timeout)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
            raise AssertionError(f"the run did not end:\n{self.read_output()}") from None
        report = json.loads(self._report.read_text("utf-8")) if self._report.exists() else None
        return Finished(code, self.read_output(), report)


class Home:
    """A copy of the example in a folder of its own, used as a user would: by the command line only."""

    def __init__(self, folder):
        self.folder = folder
        folder.mkdir(parents=True, exist_ok=True)
        shutil.copytree(ROOT / "examples", folder / "examples")
        self.config = folder / "examples" / "three-facilities.toml"
        self.data = folder / ".remitstream"
        self.ports = assign_ports()
        self.expected_path = self.data / "expected.json"
        self._runs = 0

    @property
    def database(self):
        return self.data / "sandbox" / "ledger.sqlite"

    @property
    def settings(self):
        return read_settings(self.config, [("stack.embedded", "true")])

    def start(self, *options, events=300, seed=None):
        """Begin a run, on ports of its own: a process that is restarted must find its port again."""
        self._runs += 1
        output, report = (self.folder / f"run-{self._runs}.{end}" for end in ("txt", "json"))
        command = ["run", "--once", "--events", str(events), "--report", str(report)]
        for key, port in self.ports.items():
            command += ["--set", f"{key}={port}"]
        command += options
        if seed is not None:
            command += ["--seed", str(seed)]
        with output.open("wb") as sink:
            process = subprocess.Popen(self._build(command), stdout=sink, stderr=subprocess.STDOUT, cwd=self.folder)
        return Run(process, output, report)

    def call(self, *command):
        """Another command; its exit code and standard output."""
        done = subprocess.run(self._build(command), capture_output=True, text=True, check=False, cwd=self.folder)
        return done.returncode, done.stdout

    def _build(self, command):
        return [sys.executable, "-m", "runtime.cli", *command, "--config", str(self.config)]

    def find_processes(self):
        """Every process that names this folder in its command line, or works in it."""
        found = []
        for process in psutil.process_iter():
            try:
                places = [*process.cmdline(), process.cwd()]
                if process.status() != psutil.STATUS_ZOMBIE and any(str(self.folder) in place for place in places):
                    found.append(process)
            except psutil.Error:
                continue
        return found

    def describe_processes(self):
        return [" ".join(process.cmdline())[-300:] for process in self.find_processes()]

    def read_postings(self):
        """All rows of the billing systems' ledger."""
        if not self.database.exists():
            return []
        database = sqlite3.connect(f"file:{self.database}?mode=ro", uri=True)
        try:
            database.row_factory = sqlite3.Row
            return [dict(row) for row in database.execute("SELECT * FROM postings ORDER BY id")]
        except sqlite3.OperationalError:  # not made yet
            return []
        finally:
            database.close()

    def read_expected(self):
        return read_expected(self.expected_path)

    def count_deviations(self):
        """Postings of the last run that are missing, too many or other than expected: (missing, unexpected)."""
        expected = self.read_expected()
        members = ("mrn", "authority", "type", "minor", "currency")
        wanted = Counter(
            (row.target, row.object_id, *(getattr(row, name) for name in members)) for row in expected.rows
        )
        found = Counter(
            (row["instance"], row["description"], *(row[name] for name in members))
            for row in self.read_postings()
            if expected.run in row["description"]
        )
        assert wanted, "nothing was expected"
        return wanted - found, found - wanted

    def find_address(self):
        """Kafka's address, from the file where the stack keeps its ports."""
        return f"127.0.0.1:{json.loads((self.data / 'stack' / 'ports.json').read_text())['kafka']}"

    def close(self):
        """Kill what is left, remove the data; name what was left."""
        left = self.describe_processes()
        for process in self.find_processes():
            try:
                process.send_signal(signal.SIGKILL)
            except psutil.NoSuchProcess:
                continue
        shutil.rmtree(self.folder, ignore_errors=True)
        return left


def wait_for(condition, complaint, timeout=120, pause=0.02):
    """Wait until a condition holds; ``complaint`` may be a function."""
    until = time.monotonic() + timeout
    while not condition():
        assert time.monotonic() < until, complaint() if callable(complaint) else complaint
        time.sleep(pause)


def assert_green(home, finished):
    """The exit code, both sums and the ledger, each worked out here again from the report and the database."""
    assert finished.code == 0, finished
    report = finished.report
    assert report["accepted"] == sum(report[name] for name in EQUATION), report
    assert report["lost"] == report["pending"] == report["doubled"] == 0, report
    assert len(report["targets"]) == 3
    for target in report["targets"].values():
        assert target["canonical"] == report["canonical"] == sum(target[name] for name in OUTCOMES), target
        assert target["lost"] == target["doubled"] == target["pending"] == 0, target
    assert home.count_deviations() == (Counter(), Counter())
    assert report["ledger"] == {"expected": len(home.read_expected().rows), "differences": [], "equal": True}


class Offsets:
    """End offsets of topics, by a plain client."""

    def __init__(self, bootstrap):
        self._admin = AdminClient({"bootstrap.servers": bootstrap})
        self._topics = self._admin.list_topics(timeout=10).topics

    def count(self, *topics):
        """Sum of the high watermarks."""
        return sum(self._list(topics, IsolationLevel.READ_UNCOMMITTED).values())

    def has_open_transaction(self, *topics):
        """Whether some partition's last stable offset is below its high watermark."""
        stable = self._list(topics, IsolationLevel.READ_COMMITTED)
        return any(end > stable[key] for key, end in self._list(topics, IsolationLevel.READ_UNCOMMITTED).items())

    def _list(self, topics, level):
        asked = {TopicPartition(t, p): OffsetSpec.latest() for t in topics for p in self._topics[t].partitions}
        futures = self._admin.list_offsets(asked, isolation_level=level, request_timeout=10)
        return {(tp.topic, tp.partition): future.result().offset for tp, future in futures.items()}


def read_all(bootstrap, topic):
    """Every record of a topic, those of aborted transactions too, by a plain consumer."""
    consumer = Consumer(
        {
            "bootstrap.servers": bootstrap,
            "group.id": f"search-{os.getpid()}",
            "enable.auto.commit": False,
            "isolation.level": "read_uncommitted",
            "enable.partition.eof": True,
            "fetch.wait.max.ms": 20,
        }
    )
    try:
        partitions = consumer.list_topics(topic, timeout=10).topics[topic].partitions
        consumer.assign([TopicPartition(topic, partition, OFFSET_BEGINNING) for partition in partitions])
        open_partitions = set(partitions)
        until = time.monotonic() + 60
        while open_partitions:
            assert time.monotonic() < until, f"{topic} cannot be read to its end"
            for message in consumer.consume(1000, 0.2):
                if message.error() is not None:
                    open_partitions.discard(message.partition())
                else:
                    yield message
    finally:
        consumer.close()


class Texts:
    """All that a deployment holds, as (place, bytes) to be searched: topics raw and decoded, files, Redis."""

    def __init__(self, bootstrap, registry_url):
        self._bootstrap = bootstrap
        self._registry_url = registry_url
        self._schemas = {}
        self.decoded = Counter()
        """Values decoded, by topic: a search that decodes nothing would find nothing."""
        self.records = Counter()

    def read_topics(self, topics):
        for topic in topics:
            for message in read_all(self._bootstrap, topic):
                self.records[topic] += 1
                place = f"{topic}[{message.partition()}]@{message.offset()}"
                yield f"{place} key", message.key() or b""
                for name, value in message.headers() or []:
                    yield f"{place} header {name}", value or b""
                value = message.value() or b""
                source = dict(message.headers() or []).get("source")
                if topic == "raw.hl7" or (topic == "dlq" and source == b"hl7"):
                    # There a name stands where it belongs; it is searched everywhere else.
                    value = blank_names(value)
                yield f"{place} value", value
                decoded = self._decode(value)
                if decoded is not None:
                    self.decoded[topic] += 1
                    yield f"{place} decoded", decoded

    def _decode(self, value):
        """Text of an Avro value (Confluent wire format) or of MessagePack; None when it is neither."""
        if value[:1] == b"\0" and len(value) > 5:
            number = int.from_bytes(value[1:5], "big")
            return repr(fastavro.schemaless_reader(io.BytesIO(value[5:]), self._find_schema(number))).encode()
        try:
            content = msgspec.msgpack.decode(value)
        except (msgspec.DecodeError, UnicodeDecodeError):
            return None
        if not isinstance(content, dict | list):
            return None
        text = json.dumps(content, default=_show, ensure_ascii=False).encode()
        inner = [self._decode(part) for part in content if isinstance(part, bytes)] if isinstance(content, list) else []
        return b"\n".join([text, *(part for part in inner if part is not None)])

    def _find_schema(self, number):
        if number not in self._schemas:
            with httpx.Client(trust_env=False) as client:
                answer = client.get(f"{self._registry_url}/schemas/ids/{number}").raise_for_status()
            self._schemas[number] = fastavro.parse_schema(json.loads(answer.json()["schema"]))
        return self._schemas[number]


def _show(value):
    return value.decode("utf-8", "replace") if isinstance(value, bytes) else str(value)


def blank_names(message):
    """An HL7 message without the fields that are for the patient's name: PID-5, and MRG-7 of a merge."""
    segments = [segment.split(b"|") for segment in message.split(b"\r")]
    for fields in segments:
        place = {b"PID": 5, b"MRG": 7}.get(fields[0])
        if place is not None and len(fields) > place:
            fields[place] = b""
    return b"\r".join(b"|".join(fields) for fields in segments)


def read_files(*folders):
    """Every file under some folders."""
    for folder in folders:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                yield str(path), path.read_bytes()

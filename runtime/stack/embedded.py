"""``EmbeddedStack``: bring the three components up, down, or back to nothing.

Guarantees

* Data lives under ``home`` and survives ``down``, a crash of any component and a crash of the caller; ``reset`` alone
  removes it. (One broker without fsync: a power failure can lose the last seconds. Production has three brokers.)
* Everything listens on loopback only.
* ``up`` on a running stack changes nothing; what is dead or does not answer is repaired.
* Ports are kept from one start to the next. When a program took one meanwhile, ``up`` chooses and remembers another;
  ``start`` never does, because clients are running.
* Only processes this home started are ever signalled.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import shutil
import socket
import threading
import time
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Final

from runtime.stack.artifacts import PARTS, Cache, read_lock
from runtime.stack.components import (
    LOOPBACK,
    Component,
    Kafka,
    Redis,
    Registry,
    check_platform,
    read_java_version,
)
from runtime.stack.daemons import Daemon, read_resident_bytes
from runtime.stack.download import Cancelled, check_space, fetch_parts
from runtime.stack.errors import ComponentStartError, PortTakenError, StackBusyError
from runtime.stack.progress import Progress, SilentProgress

if TYPE_CHECKING:
    from collections.abc import Iterator, Mapping

_POLL: Final = 0.03
_PATIENCE_WITH_LIVE: Final = 10.0
"""Seconds a live process may stay silent before it counts as broken; a loaded machine is slow, not dead."""
_DATA_SPACE: Final = 256 << 20
_PORT_STEP: Final = 10
_PORT_TRIES: Final = 200
_KEPT_LOG: Final = 20


@dataclass(frozen=True, slots=True)
class StackAddresses:
    """Where clients connect. ``registry_url`` is the base of the Confluent API."""

    kafka_bootstrap: str
    registry_url: str
    redis_url: str


@dataclass(frozen=True, slots=True)
class ComponentStatus:
    """``state`` is ``running``, ``silent`` (alive, does not answer) or ``stopped``."""

    name: str
    state: str
    address: str
    pid: int | None
    resident_bytes: int | None
    log: str


class EmbeddedStack:
    """Kafka, registry and Redis on this machine.

    ``home`` holds data, logs and pid files, ``cache`` the verified downloads (shared between homes). ``mirror`` is the
    base address of a Maven repository to use instead of the public one. ``ports`` pins ports by role (``kafka``,
    ``controller``, ``registry``, ``redis``); a pinned port that is taken is an error. Times in seconds.

    All methods block; call them from a thread when an event loop runs. Errors are ``OperatorError``.
    """

    def __init__(
        self,
        home: Path,
        cache: Path,
        *,
        mirror: str | None = None,
        ports: Mapping[str, int] | None = None,
        start_timeout: float = 90.0,
        stop_timeout: float = 20.0,
        busy_timeout: float = 300.0,
    ) -> None:
        self._home = home.absolute()
        self._cache = Cache(cache.absolute())
        self._mirror = mirror
        self._pinned = dict(ports or {})
        self._start_timeout = start_timeout
        self._stop_timeout = stop_timeout
        self._busy_timeout = busy_timeout
        self._parts = read_lock()
        self._redis = Redis(self._home, self._cache, self._parts["redis"])
        components: tuple[Component, ...] = (
            Kafka(self._home, self._cache, self._parts["kafka"]),
            Registry(self._home, self._cache, self._parts["registry"]),
            self._redis,
        )
        self._components = {component.name: component for component in components}
        self._ports_guard = threading.Lock()

    def up(self, progress: Progress | None = None, cancel: threading.Event | None = None) -> StackAddresses:
        """Download what is missing, start what does not run, wait until all three answer.

        Either all run afterwards, or an error is raised and what this call started is stopped again. Setting
        ``cancel`` from another thread ends the call with ``Cancelled``.
        """
        check_platform()
        progress = progress or SilentProgress()
        with self._hold():
            todo = []
            for name in PARTS:
                if self._works(name):
                    progress.step(name, "running")
                else:
                    todo.append(name)
            if todo:
                self._repair(todo, progress, cancel or threading.Event())
        return self.read_addresses()

    def down(self) -> None:
        """Stop all three, cleanly if they let us. Nothing is left running; data stays."""
        if not self._home.exists():
            return
        with self._hold():
            self._stop_all(PARTS)

    def reset(self) -> None:
        """Stop all three and remove their data, logs and remembered ports. The download cache stays."""
        if not self._home.exists():
            return
        with self._hold():
            self._stop_all(PARTS)
            for name in (*PARTS, "logs"):
                shutil.rmtree(self._home / name, ignore_errors=True)
            self._ports_file.unlink(missing_ok=True)

    def status(self) -> dict[str, ComponentStatus]:
        """What each component does now, by name."""
        ports = self._read_ports()
        answer = {}
        for name, component in self._components.items():
            identity = self._daemon(name).find()
            port = ports.get(name)
            if identity is None:
                state = "stopped"
            else:
                state = "running" if port is not None and component.probe(port) else "silent"
            answer[name] = ComponentStatus(
                name=name,
                state=state,
                address=f"{LOOPBACK}:{port}" if port is not None else "",
                pid=identity.pid if identity else None,
                resident_bytes=read_resident_bytes(identity.pid) if identity else None,
                log=str(self._log(name)),
            )
        return answer

    def versions(self) -> dict[str, str]:
        """Version of each part, for reports. Redis is asked itself; before the first download it is its package's."""
        redis = self._redis
        known = redis.locate_program().exists()
        return {
            "kafka": self._parts["kafka"].version,
            "registry": self._parts["registry"].version,
            "redis": redis.read_version() if known else f"package {self._parts['redis'].version}",
            "java": read_java_version(),
        }

    def stop(self, component: str) -> None:
        """Stop one component cleanly."""
        with self._hold():
            self._daemon(component).stop(self._stop_timeout)

    def kill(self, component: str) -> None:
        """End one component with SIGKILL, as a crash would."""
        with self._hold():
            self._daemon(component).kill()

    def start(self, component: str) -> None:
        """Start one component on the port it had. Raises ``PortTakenError`` when that is taken."""
        with self._hold():
            if not self._works(component):
                self._daemon(component).stop(self._stop_timeout)
                fetch_parts(self._cache, [self._parts[component]], progress=SilentProgress(), mirror=self._mirror)
                self._start(component, (), keep_ports=True)

    def read_addresses(self) -> StackAddresses:
        """Addresses of the stack; ``KeyError`` before the first ``up``."""
        ports = self._read_ports()
        return StackAddresses(
            kafka_bootstrap=f"{LOOPBACK}:{ports['kafka']}",
            registry_url=f"http://{LOOPBACK}:{ports['registry']}/apis/ccompat/v7",
            redis_url=f"redis://{LOOPBACK}:{ports['redis']}/0",
        )

    # ---------------------------------------------------------------- start and stop

    def _works(self, name: str) -> bool:
        """Whether the component runs as it would be started now, and answers. A live one is given time."""
        identity = self._daemon(name).find()
        ports = self._read_ports()
        component = self._components[name]
        if identity is None or not component.ports.keys() <= ports.keys():
            return False
        if any(self._pinned.get(role, ports[role]) != ports[role] for role in component.ports):
            return False
        if component.describe_launch(ports).fingerprint() != identity.fingerprint:
            return False
        deadline = time.monotonic() + _PATIENCE_WITH_LIVE
        while not component.probe(ports[name]):
            if time.monotonic() > deadline or self._daemon(name).find() is None:
                return False
            time.sleep(_POLL)
        return True

    def _repair(self, names: list[str], progress: Progress, cancel: threading.Event) -> None:
        self._stop_all(names)
        fetch_parts(self._cache, [self._parts[n] for n in names], progress=progress, mirror=self._mirror, cancel=cancel)
        check_space(self._home, _DATA_SPACE)
        told = threading.Lock()
        failed = threading.Event()

        def start(name: str) -> None:
            with told:
                progress.step(name, "starting")
            self._start(name, (cancel, failed), keep_ports=False)
            with told:
                progress.step(name, "ready")

        with ThreadPoolExecutor(len(names), thread_name_prefix="stack") as pool:
            futures = [pool.submit(start, name) for name in names]
            try:
                done, _ = wait(futures, return_when=FIRST_EXCEPTION)
                for future in done:
                    future.result()
            except BaseException:
                failed.set()
                wait(futures)
                self._stop_all(names)
                raise

    def _start(self, name: str, signals: tuple[threading.Event, ...], *, keep_ports: bool) -> None:
        component = self._components[name]
        while True:
            ports = self._assign_ports(component, keep=keep_ports)
            component.prepare(ports)
            launch = component.describe_launch(ports)
            log = self._turn_log(name)
            self._daemon(name).spawn(
                launch.argv, cwd=launch.cwd, env=launch.env, log=log, fingerprint=launch.fingerprint()
            )
            try:
                self._await_ready(component, ports[name], log, signals)
            except ComponentStartError:
                if not all(_is_free(ports[role]) for role in component.ports) and not keep_ports:
                    continue  # somebody took the port between our look and the component's
                raise
            return

    def _await_ready(self, component: Component, port: int, log: Path, signals: tuple[threading.Event, ...]) -> None:
        daemon = self._daemon(component.name)
        deadline = time.monotonic() + self._start_timeout
        while True:
            if daemon.find() is None:
                raise ComponentStartError(f"It ended at once: {_read_end(log)}.", place=str(log))
            if component.ready_line in log.read_text(encoding="utf-8", errors="replace") and component.probe(port):
                return
            if any(signal.is_set() for signal in signals):
                raise Cancelled
            if time.monotonic() > deadline:
                daemon.stop(self._stop_timeout)
                raise ComponentStartError(
                    f"It was not ready after {self._start_timeout:.0f} s: {_read_end(log)}.", place=str(log)
                )
            time.sleep(_POLL)

    def _stop_all(self, names: tuple[str, ...] | list[str]) -> None:
        with ThreadPoolExecutor(len(names)) as pool:
            list(pool.map(lambda name: self._daemon(name).stop(self._stop_timeout), names))

    # ---------------------------------------------------------------- files and ports

    @contextlib.contextmanager
    def _hold(self) -> Iterator[None]:
        """One command at a time per home."""
        self._home.mkdir(parents=True, exist_ok=True, mode=0o700)
        for name in ("logs", "run"):
            (self._home / name).mkdir(exist_ok=True, mode=0o700)
        with (self._home / "lock").open("a") as handle:
            deadline = time.monotonic() + self._busy_timeout
            while True:
                try:
                    fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                except BlockingIOError:
                    if time.monotonic() > deadline:
                        raise StackBusyError("It did not end in time.", place=str(self._home)) from None
                    time.sleep(0.1)
            yield

    @property
    def _ports_file(self) -> Path:
        return self._home / "ports.json"

    def _daemon(self, name: str) -> Daemon:
        if name not in self._components:
            raise ValueError(f"no component {name!r}; there are {', '.join(PARTS)}")
        return Daemon(self._home / "run" / f"{name}.pid")

    def _log(self, name: str) -> Path:
        return self._home / "logs" / f"{name}.log"

    def _turn_log(self, name: str) -> Path:
        """A fresh log; the one of the start before is kept."""
        (self._home / "logs").mkdir(exist_ok=True, mode=0o700)
        log = self._log(name)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))
        log.touch(mode=0o600)
        return log

    def _read_ports(self) -> dict[str, int]:
        return _read_ports(self._home)

    def _assign_ports(self, component: Component, *, keep: bool) -> dict[str, int]:
        """Ports for one component: pinned, else remembered, else preferred, else the next free ones.

        A new one is never what another stack remembers, running or not: that stack's clients would come back to a
        broker that is not theirs, and be answered.
        """
        with self._ports_guard:
            known, others = self._read_ports(), self._list_ports_of_others()
            chosen: dict[str, int] = {}
            for role, preferred in component.ports.items():
                wanted = self._pinned.get(role, known.get(role, preferred))
                held = role in self._pinned or role in known
                if _is_free(wanted) and (held or wanted not in others):
                    chosen[role] = wanted
                elif role in self._pinned or keep:
                    raise PortTakenError(f"Port {wanted} is used by another program.", place=f"{role} port {wanted}")
                else:
                    avoided = {*known.values(), *chosen.values(), *others}
                    chosen[role] = _find_free(preferred, avoided)
            scratch = self._ports_file.with_suffix(".new")
            scratch.write_text(json.dumps(known | chosen), encoding="utf-8")
            scratch.replace(self._ports_file)
            return chosen

    def _list_ports_of_others(self) -> set[int]:
        """Ports in the memory of all stacks that share this cache, except ours. Makes ours known to them."""
        homes, ports = self._cache.folder / "homes", set[int]()
        own = homes / hashlib.sha256(str(self._home).encode()).hexdigest()[:16]
        with contextlib.suppress(OSError):  # a cache that is only read still serves
            homes.mkdir(parents=True, exist_ok=True)
            own.write_text(str(self._home), "utf-8")
            for place in homes.iterdir():
                if place != own:
                    ports.update(_read_ports(Path(place.read_text("utf-8"))).values())
        return ports


def _read_ports(home: Path) -> dict[str, int]:
    try:
        ports: dict[str, int] = json.loads((home / "ports.json").read_text(encoding="utf-8"))
    except (FileNotFoundError, NotADirectoryError, ValueError):
        return {}
    return ports


def _is_free(port: int) -> bool:
    with socket.socket() as probe:
        # as the servers do: a connection that is only fading out does not hold the port
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((LOOPBACK, port))
        except OSError:
            return False
        return True


def _find_free(preferred: int, avoided: set[int]) -> int:
    """Next free port above the preferred one; below the range the system gives to outgoing connections."""
    for port in range(preferred + _PORT_STEP, preferred + _PORT_STEP * _PORT_TRIES, _PORT_STEP):
        if port not in avoided and _is_free(port):
            return port
    raise PortTakenError(f"No free port was found above {preferred}.", place=f"ports from {preferred}")


def _read_end(log: Path) -> str:
    """Last line that says something, for the error; the rest is in the file."""
    lines = [line.strip() for line in log.read_text(encoding="utf-8", errors="replace").splitlines()[-_KEPT_LOG:]]
    telling = [line for line in lines if line and not line.startswith(("at ", "..."))]
    return telling[-1][:300].rstrip(".") if telling else "it wrote nothing"

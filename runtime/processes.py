"""The process manager: starts our own processes, restarts the ones that die, stops them all in reverse order.

It is: the parent of receivers, workers and sinks in ``remitstream run``, and of the workers of ``remitstream worker
--processes``. It is not: a supervisor of the embedded stack
(those are daemons that outlive a command), and it never reads what the processes work on.

What it guarantees

* A process that exits non-zero or is killed is started again, after 0.2 s, then twice as long each time up to 5 s (less
  a random part of up to a half, so that many do not start in step); after 30 s of life the wait begins anew. Three
  short lives in a row are reported as flapping, and it still goes on.
* Exit code 0 is the end of a job that is done; it is not restarted, unless the process is one that has no end.
* Exit code 78 (a setting is wrong) is not restarted: all stop, and ``wait`` raises with the process's own message.
* ``stop`` goes backwards: SIGTERM, and SIGKILL after the process's ``stop_timeout``. ``stop_together`` tells all at
  once.
* On Linux a child is killed by the kernel when its manager dies, even by ``kill -9``. macOS has no such call: there,
  children of a manager killed with ``kill -9`` stay and must be ended by hand.
"""

from __future__ import annotations

import asyncio
import contextlib
import http.client
import os
import random
import signal
import sys
import time
import urllib.error
import urllib.request
from collections import deque
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Final, Literal

from schemas.failure import ConfigurationError, ExitCode, TemporaryError

if TYPE_CHECKING:
    from collections.abc import Callable, Mapping, Sequence
    from pathlib import Path

State = Literal["waiting", "starting", "ready", "restarting", "finished", "stopped"]

_TAIL_BYTES: Final = 16384
_PROBE_TIMEOUT: Final = 2.0
_PR_SET_PDEATHSIG: Final = 1
"""prctl(2): the signal this process gets when its parent ends."""

# Run by the child before the real program. A wrapper and not preexec_fn, which may deadlock in a process with threads.
# The second look at the parent closes the gap in which it may have died before prctl took effect.
_DIE_WITH_PARENT: Final = f"""
import ctypes, os, signal, sys
ctypes.CDLL(None).prctl({_PR_SET_PDEATHSIG}, signal.SIGKILL, 0, 0, 0)
if os.getppid() != int(sys.argv[1]):
    sys.exit(1)
os.execvp(sys.argv[2], sys.argv[2:])
"""


class ProcessConfigurationError(ConfigurationError):
    """A process ended with exit code 78; restarting it would change nothing."""

    code = "RS130"
    meaning = "One of our processes refused its configuration; all were stopped."
    default_remedy = "Correct what the process says; its whole output is in the named log file."


class ProcessNotReadyError(TemporaryError):
    """A process runs but does not become ready."""

    code = "RS225"
    meaning = "One of our processes was not ready in time."
    default_remedy = "Read the named log file, then run the same command again."


@dataclass(frozen=True, slots=True)
class ProcessSpec:
    """One process.

    ``env`` is its whole environment (None: the manager's). ``ready`` is the address of its health check, answered with
    200 when it can work, or a function that tells the same (called in a thread), or None when being started is enough.
    Seconds: ``ready_timeout`` for the first start, three times that as long as it has not ended once (all start at the
    same time, perhaps on a busy machine); ``stop_timeout`` between SIGTERM and SIGKILL. ``endless``: it is
    started again after exit code 0 too, unless it was told to stop.
    """

    name: str
    argv: Sequence[str]
    env: Mapping[str, str] | None = None
    cwd: Path | None = None
    ready: str | Callable[[], bool] | None = None
    ready_timeout: float = 60.0
    stop_timeout: float = 15.0
    endless: bool = False


@dataclass(frozen=True, slots=True)
class Backoff:
    """Seconds between an exit and the next start: ``first``, doubled up to ``last``; a life of ``stable`` resets it."""

    first: float = 0.2
    last: float = 5.0
    stable: float = 30.0
    flapping_after: int = 3

    def choose_wait(self, short_lives: int) -> float:
        """Most seconds to wait after this many short lives in a row; 0 means the last life was long."""
        doublings = min(max(short_lives - 1, 0), 32)
        return min(self.first * float(1 << doublings), self.last)

    def draw_wait(self, short_lives: int) -> float:
        """Seconds to wait, somewhere between half the most and the most."""
        return self.choose_wait(short_lives) * random.uniform(0.5, 1)  # noqa: S311 - jitter


@dataclass(frozen=True, slots=True)
class ProcessStatus:
    """What one process does now. ``exit_code`` is that of the last exit, negative for a signal."""

    name: str
    state: State = "waiting"
    pid: int | None = None
    restarts: int = 0
    exit_code: int | None = None
    flapping: bool = False
    log: str = ""


class ProcessManager:
    """Runs the given processes, each with its own log file ``<name>.log`` in ``logs``.

    Without ``logs`` they write where the manager writes.
    Must be used from one event loop, on the thread that lives longest (on Linux the kernel ties the children to the
    thread that started them). ``on_change`` is called with every new status, in the event loop.
    """

    def __init__(
        self,
        specs: Sequence[ProcessSpec],
        logs: Path | None,
        *,
        backoff: Backoff | None = None,
        on_change: Callable[[ProcessStatus], None] | None = None,
    ) -> None:
        names = [spec.name for spec in specs]
        if len(set(names)) != len(names):
            raise ValueError(f"process names must differ: {', '.join(names)}")
        self._specs = {spec.name: spec for spec in specs}
        self._logs = logs
        self._backoff = backoff or Backoff()
        self._on_change = on_change
        self._status = {
            name: ProcessStatus(name, log="" if logs is None else str(logs / f"{name}.log")) for name in names
        }
        self._keepers: dict[str, asyncio.Task[None]] = {}
        self._ready = {name: asyncio.Event() for name in names}
        self._stopping = {name: asyncio.Event() for name in names}
        self._refused: ProcessConfigurationError | None = None
        self._over = asyncio.Event()

    async def start(self, *, wait: bool = True) -> None:
        """Start all and return when all are ready; at once without ``wait``.

        Raises ``ProcessConfigurationError`` or ``ProcessNotReadyError``, after everything was stopped again.
        """
        for name in self._specs:
            self._turn_log(name)
            self._keepers[name] = asyncio.create_task(self._keep(name), name=f"keep {name}")
            self._keepers[name].add_done_callback(self._note_end)
        if not wait:
            return
        try:
            await asyncio.gather(*(self._await_first_ready(spec) for spec in self._specs.values()))
        except BaseException:
            await self.stop()
            raise

    async def wait(self) -> None:
        """Return when every process has finished or ``stop`` was called.

        Raises ``ProcessConfigurationError`` when a process refused its configuration; all are stopped then.
        """
        await self._over.wait()
        for keeper in self._keepers.values():
            if keeper.done() and not keeper.cancelled():
                keeper.result()
        if self._refused is not None:
            await self.stop()
            raise self._refused

    async def stop(self) -> None:
        """Stop all, last started first, each with SIGTERM and then SIGKILL. Nothing is left running."""
        for name in reversed(self._specs):
            await self.stop_one(name)
        self._over.set()

    async def stop_together(self) -> None:
        """Stop all at once: for peers, of which none needs another to end in order."""
        await asyncio.gather(*(self.stop_one(name) for name in self._specs))
        self._over.set()

    async def stop_one(self, name: str) -> None:
        """Stop one process and do not restart it."""
        self._stopping[name].set()
        keeper = self._keepers.get(name)
        if keeper is not None:
            await asyncio.wait([keeper])

    def pid(self, name: str) -> int | None:
        """Process id, for faults; None while it does not run."""
        return self._status[name].pid

    def restarts(self, name: str) -> int:
        """How often it was started again."""
        return self._status[name].restarts

    def status(self) -> dict[str, ProcessStatus]:
        """All processes by name, in the order of their start."""
        return dict(self._status)

    # ---------------------------------------------------------------- one process

    async def _keep(self, name: str) -> None:
        """Run one process again and again until it is finished, refused or to be stopped."""
        stopping = self._stopping[name]
        short_lives = 0
        while not stopping.is_set():
            begun = time.monotonic()
            code = await self._live_once(name)
            if stopping.is_set():
                break
            if code == 0 and not self._specs[name].endless:
                self._change(name, state="finished", pid=None, exit_code=0)
                self._ready[name].set()
                return
            if code == ExitCode.CONFIGURATION:
                self._refuse(name)
                return
            short_lives = 0 if time.monotonic() - begun >= self._backoff.stable else short_lives + 1
            self._change(
                name,
                state="restarting",
                pid=None,
                exit_code=code,
                restarts=self._status[name].restarts + 1,
                flapping=short_lives >= self._backoff.flapping_after,
            )
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(stopping.wait(), self._backoff.draw_wait(short_lives))
        self._change(name, state="stopped", pid=None)

    async def _live_once(self, name: str) -> int:
        """Start the process, watch it become ready, and return its exit code. Ends it when it is to be stopped."""
        spec = self._specs[name]
        with contextlib.nullcontext() if self._logs is None else self._log(self._logs, name).open("ab") as log:
            child = await asyncio.create_subprocess_exec(
                *_tie_to_parent(spec.argv),
                stdin=asyncio.subprocess.DEVNULL,
                stdout=log,
                stderr=None if log is None else asyncio.subprocess.STDOUT,
                env=None if spec.env is None else dict(spec.env),
                cwd=spec.cwd,
                # a Ctrl-C in the terminal is for the manager, which then stops its children in order
                start_new_session=True,
            )
        self._change(name, state="starting", pid=child.pid)
        exited = asyncio.create_task(child.wait())
        told = asyncio.create_task(self._stopping[name].wait())
        watch = asyncio.create_task(self._watch_ready(spec))
        calm = asyncio.create_task(self._watch_calm(name))
        try:
            await asyncio.wait([exited, told], return_when=asyncio.FIRST_COMPLETED)
            if not exited.done():
                await _end(child, exited, spec.stop_timeout)
            return await exited
        finally:
            told.cancel()
            watch.cancel()
            calm.cancel()
            if child.returncode is None:
                with contextlib.suppress(ProcessLookupError):
                    child.kill()

    async def _watch_ready(self, spec: ProcessSpec) -> None:
        wait = 0.02
        while not await _is_ready(spec.ready):
            await asyncio.sleep(wait)
            wait = min(wait * 1.5, 0.5)
        self._change(spec.name, state="ready")
        self._ready[spec.name].set()

    async def _watch_calm(self, name: str) -> None:
        await asyncio.sleep(self._backoff.stable)
        self._change(name, flapping=False)

    def _note_end(self, ended: asyncio.Task[None]) -> None:
        """All are done, or one keeper broke (a program that does not exist): ``wait`` must hear of it."""
        broken = not ended.cancelled() and ended.exception() is not None
        if broken or all(keeper.done() for keeper in self._keepers.values()):
            self._over.set()

    async def _await_first_ready(self, spec: ProcessSpec) -> None:
        ready = asyncio.create_task(self._ready[spec.name].wait())
        over = asyncio.create_task(self._over.wait())
        keeper = self._keepers[spec.name]
        try:
            waiting, patience = [ready, over, keeper], spec.ready_timeout
            await asyncio.wait(waiting, timeout=patience, return_when=asyncio.FIRST_COMPLETED)
            if not self._status[spec.name].restarts:
                await asyncio.wait(waiting, timeout=2 * patience, return_when=asyncio.FIRST_COMPLETED)
                patience *= 3
            if keeper.done():
                keeper.result()
            if self._refused is not None:
                raise self._refused
            if not ready.done():
                said = self._read_end(spec.name)
                raise ProcessNotReadyError(
                    f"{spec.name} was not ready after {patience:.0f} s; it last wrote: {said}",
                    place=self._status[spec.name].log or spec.name,
                )
        finally:
            ready.cancel()
            over.cancel()

    def _refuse(self, name: str) -> None:
        self._change(name, state="stopped", pid=None, exit_code=int(ExitCode.CONFIGURATION))
        self._refused = ProcessConfigurationError(
            f"{name} refused its configuration: {self._read_end(name)}", place=self._status[name].log or name
        )
        self._over.set()

    def _change(self, name: str, **changes: object) -> None:
        status = replace(self._status[name], **changes)  # type: ignore[arg-type]
        if status != self._status[name]:
            self._status[name] = status
            if self._on_change is not None:
                self._on_change(status)

    @staticmethod
    def _log(logs: Path, name: str) -> Path:
        return logs / f"{name}.log"

    def _turn_log(self, name: str) -> None:
        """A fresh log per run; that of the run before is kept."""
        if self._logs is None:
            return
        self._logs.mkdir(parents=True, exist_ok=True, mode=0o700)
        log = self._log(self._logs, name)
        if log.exists():
            log.replace(log.with_suffix(".log.1"))

    def _read_end(self, name: str) -> str:
        """The last thing the process wrote, preferring one of our own errors, which begin with their code."""
        if self._logs is None:
            return "what it says stands above."
        try:
            with self._log(self._logs, name).open("rb") as log:
                log.seek(max(0, os.fstat(log.fileno()).st_size - _TAIL_BYTES))
                lines = deque(filter(None, (line.strip() for line in log.read().decode(errors="replace").split("\n"))))
        except FileNotFoundError:
            return "nothing"
        ours = [line for line in lines if line.startswith("RS")]
        return (ours or lines or deque(["nothing"]))[-1]


def _tie_to_parent(argv: Sequence[str]) -> list[str]:
    """The command, and on Linux before it the call that makes it die with us. The process id stays the same."""
    if sys.platform != "linux":
        return list(argv)
    return [sys.executable, "-I", "-S", "-c", _DIE_WITH_PARENT, str(os.getpid()), *argv]


async def _end(child: asyncio.subprocess.Process, exited: asyncio.Task[int], patience: float) -> None:
    with contextlib.suppress(ProcessLookupError):
        child.send_signal(signal.SIGTERM)
    await asyncio.wait([exited], timeout=patience)
    if not exited.done():
        with contextlib.suppress(ProcessLookupError):
            child.kill()


async def _is_ready(ready: str | Callable[[], bool] | None) -> bool:
    if ready is None:
        return True
    if isinstance(ready, str):
        return await asyncio.to_thread(_ask_health, ready)
    return await asyncio.to_thread(ready)


def _ask_health(url: str) -> bool:
    # without proxies: the processes are on this machine
    opener = urllib.request.build_opener(urllib.request.ProxyHandler({}))
    try:
        with opener.open(url, timeout=_PROBE_TIMEOUT) as answer:
            return bool(answer.status == http.client.OK)
    except (OSError, http.client.HTTPException, urllib.error.URLError):
        return False

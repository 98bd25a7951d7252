"""Background processes that outlive the command that started them, known by pid AND start time.

A pid alone may have been given to another program meanwhile; a process is only ever signalled while its start time is
the one written down. Nothing here depends on being the parent, so any later command can stop what an earlier one began.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

_ON_LINUX: bool = sys.platform == "linux"
_POLL = 0.02
_KILL_WAIT = 10.0

# The shell goes at once, so the process belongs to init and cannot become our zombie; its own session keeps a Ctrl-C in
# the terminal away from it; umask, because the data is PHI.
_LAUNCH = 'umask 077; log=$1; shift; "$@" </dev/null >>"$log" 2>&1 & echo $!'


@dataclass(frozen=True, slots=True)
class Identity:
    """A process for ever: ``pid``, ``started`` (opaque start time), and the ``fingerprint`` of what was started."""

    pid: int
    started: str
    fingerprint: str = ""


def read_start_time(pid: int) -> str | None:
    """Opaque start time of a live process; None when it is gone or only a zombie."""
    if _ON_LINUX:
        try:
            stat = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
            boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        except (FileNotFoundError, ProcessLookupError):
            return None
        fields = stat.rpartition(")")[2].split()
        # fields after the name: [0] state, [17] threads, [19] start time in ticks since boot (proc(5)). While a JVM
        # ends, its first thread may be a zombie already and others still hold the port.
        dead = fields[0] in {"Z", "X"} and int(fields[17]) <= 1
        return None if dead else f"{boot}:{fields[19]}"
    state, _, started = _ask_ps(pid, "stat", "lstart").partition(" ")
    return None if not state or state.startswith("Z") else " ".join(started.split())


def read_resident_bytes(pid: int) -> int | None:
    """Resident memory of a process; None when it is gone."""
    if _ON_LINUX:
        try:
            # second field of statm: resident pages (proc(5))
            return int(Path(f"/proc/{pid}/statm").read_text(encoding="ascii").split()[1]) * os.sysconf("SC_PAGE_SIZE")
        except (FileNotFoundError, ProcessLookupError):
            return None
    kibibytes = _ask_ps(pid, "rss")
    return int(kibibytes) * 1024 if kibibytes else None


def _ask_ps(pid: int, *columns: str) -> str:
    """One line of ps, in a fixed language and time zone, because it is compared with what an earlier command wrote."""
    wanted = [word for column in columns for word in ("-o", f"{column}=")]
    answer = subprocess.run(
        ["ps", *wanted, "-p", str(pid)],
        env={"PATH": "/usr/bin:/bin", "LC_ALL": "C", "TZ": "UTC"},
        capture_output=True,
        text=True,
        check=False,
    )
    return answer.stdout.strip()


class Daemon:
    """One background process, remembered in ``pid_file``."""

    def __init__(self, pid_file: Path) -> None:
        self._pid_file = pid_file

    def find(self) -> Identity | None:
        """The live process this file speaks of; None when there is none. A stale file is removed."""
        try:
            identity = Identity(**json.loads(self._pid_file.read_text(encoding="utf-8")))
        except FileNotFoundError:
            return None
        except (ValueError, TypeError):
            self._forget()
            return None
        if read_start_time(identity.pid) == identity.started:
            return identity
        self._forget()
        return None

    def spawn(self, argv: Sequence[str], *, cwd: Path, env: Mapping[str, str], log: Path, fingerprint: str) -> Identity:
        """Start ``argv`` in a session of its own, output appended to ``log``."""
        launched = subprocess.run(
            ["/bin/sh", "-c", _LAUNCH, "sh", str(log), *argv],
            cwd=cwd,
            env=dict(env),
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            start_new_session=True,
            check=True,
        )
        pid = int(launched.stdout)
        # a process that ended already has no start time; the empty one never matches
        identity = Identity(pid, read_start_time(pid) or "", fingerprint)
        scratch = self._pid_file.with_suffix(".new")
        scratch.write_text(json.dumps(asdict(identity)), encoding="utf-8")
        scratch.replace(self._pid_file)
        return identity

    def stop(self, patience: float) -> bool:
        """End the process: SIGTERM, and SIGKILL after ``patience`` seconds. True when it went by itself."""
        identity = self.find()
        if identity is None:
            return True
        clean = self._signal(identity, signal.SIGTERM, patience)
        if not clean:
            self._signal(identity, signal.SIGKILL, _KILL_WAIT)
        self._forget()
        return clean

    def kill(self) -> None:
        """SIGKILL, and wait until it is gone."""
        identity = self.find()
        if identity is not None:
            self._signal(identity, signal.SIGKILL, _KILL_WAIT)
        self._forget()

    def _signal(self, identity: Identity, number: signal.Signals, patience: float) -> bool:
        with contextlib.suppress(ProcessLookupError):
            os.kill(identity.pid, number)
        deadline = time.monotonic() + patience
        while read_start_time(identity.pid) == identity.started:
            if time.monotonic() > deadline:
                return False
            time.sleep(_POLL)
        return True

    def _forget(self) -> None:
        self._pid_file.unlink(missing_ok=True)

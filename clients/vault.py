"""Tokens that must outlive the process: one file per credential, replaced atomically, behind a lock.

Vendors that rotate refresh tokens accept each one once. Whoever loses the new one needs a person at a browser to
connect again; whoever uses it in two processes at once loses both. So: one file, one writer at a time over all
processes, and at every instant the file is the old token or the new one.

The file is readable by its owner only (mode 0600 in a folder of mode 0700) and not encrypted: protect the disk as you
protect the configuration's secrets.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import re
import stat
import time
from collections.abc import AsyncIterator, Awaitable, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from pydantic import SecretStr

from schemas.failure import ConfigurationError, Failure, FailureKind, FatalError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_VERSION = 1


class VaultExposed(ConfigurationError):
    """Others may read or replace the tokens."""

    code = "RS180"
    meaning = "A file or folder of stored tokens is open to other users, or is not ours."
    default_remedy = "Make it owned by the service's user, the folder mode 0700 and the file mode 0600."


class VaultDamaged(FatalError):
    """The stored token cannot be read."""

    code = "RS380"
    meaning = "A file of stored tokens is damaged, or of a newer version."
    default_remedy = "Restore the file, or move it away and connect the account again."


@dataclass(frozen=True, slots=True)
class StoredToken:
    """What is kept of one credential. ``expires_at`` and ``issued_at`` are seconds since the epoch."""

    access: SecretStr
    expires_at: float
    issued_at: float
    refresh: SecretStr | None = None
    seed: str = ""
    """Fingerprint of the refresh token in the settings that this one descends from."""


class Vault:
    """The store of one credential: ``<folder>/<name>.token``, with its lock beside it.

    ``read`` may be called at any time. ``write`` belongs inside ``lock``. A crash at any point leaves the old token or
    the new one; the lock of a process that died is free.
    """

    def __init__(self, folder: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError("a vault is named in lower-case letters, digits, dash and underscore")
        self.path = folder / f"{name}.token"
        self._new = folder / f"{name}.token.new"
        self._lock = folder / f"{name}.lock"

    @contextlib.asynccontextmanager
    async def lock(
        self,
        deadline: float,
        *,
        clock: Callable[[], float] = time.monotonic,
        sleep: Callable[[float], Awaitable[None]] = asyncio.sleep,
    ) -> AsyncIterator[None]:
        """Hold the credential alone, over all processes. Raises ``Failure`` UNAVAILABLE after ``deadline`` seconds.

        Raises ``VaultExposed`` when others could read the folder.
        """
        self._prepare_folder()
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            until = clock() + deadline
            while not _try_lock(descriptor):
                if clock() >= until:
                    raise Failure(FailureKind.UNAVAILABLE, "TOKEN_LOCKED")
                await sleep(0.05)
            yield
        finally:
            os.close(descriptor)  # the lock goes with it

    def read(self) -> StoredToken | None:
        """The stored token; None when there is none yet. Raises ``VaultExposed`` or ``VaultDamaged``."""
        try:
            descriptor = os.open(self.path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        except FileNotFoundError:
            return None
        except OSError as error:
            raise VaultExposed(f"it cannot be opened ({type(error).__name__}).", place=str(self.path)) from None
        with os.fdopen(descriptor, "rb") as file:
            self._check_owner(os.fstat(descriptor), self.path)
            text = file.read()
        try:
            return _decode(json.loads(text))
        except (ValueError, TypeError, KeyError):
            # Not chained: the decoder's error holds the text.
            raise VaultDamaged("it is not a token file of this version.", place=str(self.path)) from None

    def write(self, token: StoredToken) -> None:
        """Replace the stored token; on return it survives a crash of the machine. Raises ``OSError`` with no change."""
        self._prepare_folder()
        with contextlib.suppress(FileNotFoundError):
            self._new.unlink()  # left by a crash
        descriptor = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest = _encode(token)
            while rest:
                rest = rest[os.write(descriptor, rest) :]
            os.fsync(descriptor)
        finally:
            os.close(descriptor)
        os.replace(self._new, self.path)  # noqa: PTH105 - one call of the system, like its neighbours
        folder = os.open(self.path.parent, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def _prepare_folder(self) -> None:
        self.path.parent.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_owner(self.path.parent.stat(), self.path.parent)

    def _check_owner(self, seen: os.stat_result, path: Path) -> None:
        if seen.st_uid != os.geteuid():
            raise VaultExposed("it belongs to another user.", place=str(path))
        if stat.S_IMODE(seen.st_mode) & 0o077:
            raise VaultExposed(f"its mode is {stat.S_IMODE(seen.st_mode):04o}.", place=str(path))


def _try_lock(descriptor: int) -> bool:
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    return True


def _encode(token: StoredToken) -> bytes:
    return json.dumps(
        {
            "version": _VERSION,
            "access": token.access.get_secret_value(),
            "expires_at": token.expires_at,
            "issued_at": token.issued_at,
            "refresh": None if token.refresh is None else token.refresh.get_secret_value(),
            "seed": token.seed,
        }
    ).encode()


def _decode(kept: Any) -> StoredToken:
    if kept["version"] != _VERSION or not isinstance(kept["access"], str) or not isinstance(kept["seed"], str):
        raise ValueError
    refresh = kept["refresh"]
    if refresh is not None and not isinstance(refresh, str):
        raise ValueError
    return StoredToken(
        access=SecretStr(kept["access"]),
        expires_at=float(kept["expires_at"]),
        issued_at=float(kept["issued_at"]),
        refresh=None if refresh is None else SecretStr(refresh),
        seed=kept["seed"],
    )

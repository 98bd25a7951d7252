"""Tokens that must outlive the process: one file per credential, replaced atomically, behind a lock.

Vendors that rotate refresh tokens accept each one once. Whoever loses the new one needs a person at a browser to
connect again; whoever uses it in two processes at once loses both. So: one file, one writer at a time over all
processes, and at every instant the file is the old token or the new one.

The file is readable by its owner only (mode 0600 in a folder of mode 0700) and sealed with AES-256-GCM: a copy of the
disk without the key says nothing, and a file changed or moved to another credential is not taken. A file that an
earlier version wrote in plain text is read, and sealed when the lock is next taken.
"""

from __future__ import annotations

import asyncio
import base64
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

from cryptography.exceptions import InvalidTag
from cryptography.hazmat.primitives.ciphers.aead import AESGCM
from cryptography.hazmat.primitives.hashes import SHA256
from cryptography.hazmat.primitives.kdf.hkdf import HKDF
from pydantic import SecretStr

from schemas.failure import ConfigurationError, Failure, FailureKind, FatalError

_NAME = re.compile(r"[a-z0-9][a-z0-9_-]{0,62}")
_PLAIN, _SEALED = 1, 2
_MINIMUM_KEY = 32
_NONCE_BYTES = 12


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


class VaultKeyWrong(ConfigurationError):
    """The tokens were sealed with another key, or none is set."""

    code = "RS181"
    meaning = "Stored tokens cannot be opened with the key in `secrets.vault_key`, or none that can be used is set."
    default_remedy = (
        "Set `secrets.vault_key` to the key they were sealed with (a new one has at least 32 characters, for example "
        "of `openssl rand -hex 32`). If it is lost, move the token file away and connect the account again."
    )


class VaultKey:
    """The key that seals tokens, made of a secret of at least 32 characters. Its repr shows nothing of it.

    Raises ``VaultKeyWrong`` for a shorter one.
    """

    def __init__(self, secret: SecretStr) -> None:
        text = secret.get_secret_value().encode()
        if len(text) < _MINIMUM_KEY:
            raise VaultKeyWrong("it has less than 32 characters.", place="secrets.vault_key")
        self._cipher = AESGCM(_derive(text, b"remitstream vault cipher", 32))
        self.name = _derive(text, b"remitstream vault name", 8).hex()
        """Tells keys apart, and says nothing of them."""

    def seal(self, text: bytes, context: bytes) -> bytes:
        """Encrypt; it opens only with the same context."""
        nonce = os.urandom(_NONCE_BYTES)
        return nonce + self._cipher.encrypt(nonce, text, context)

    def open(self, sealed: bytes, context: bytes) -> bytes:
        """Decrypt. Raises ``ValueError`` when anything was changed."""
        try:
            return self._cipher.decrypt(sealed[:_NONCE_BYTES], sealed[_NONCE_BYTES:], context)
        except InvalidTag:
            raise ValueError("changed") from None


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

    def __init__(self, folder: Path, name: str, key: VaultKey) -> None:
        if not _NAME.fullmatch(name):
            raise ValueError("a vault is named in lower-case letters, digits, dash and underscore")
        self._key = key
        self._context = f"remitstream token {name}".encode()
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

        Raises ``VaultExposed`` when others could read the folder. A plain file of an earlier version is sealed.
        """
        self._prepare_folder()
        descriptor = os.open(self._lock, os.O_RDWR | os.O_CREAT | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            until = clock() + deadline
            while not _try_lock(descriptor):
                if clock() >= until:
                    raise Failure(FailureKind.UNAVAILABLE, "TOKEN_LOCKED")
                await sleep(0.05)
            await asyncio.to_thread(self._seal_plain)
            yield
        finally:
            os.close(descriptor)  # the lock goes with it

    def read(self) -> StoredToken | None:
        """The stored token; None without one. Raises ``VaultExposed``, ``VaultKeyWrong`` or ``VaultDamaged``."""
        kept = self._read_file()
        if kept is None:
            return None
        try:
            if kept["version"] == _SEALED:
                kept = self._open(kept)
            return _decode(kept)
        except (ValueError, TypeError, KeyError):
            # Not chained: the decoder's error holds the text.
            raise VaultDamaged("it is not a token file of this version.", place=str(self.path)) from None

    def _open(self, kept: Any) -> Any:
        if kept["key"] != self._key.name:
            raise VaultKeyWrong("it was sealed with another key than `secrets.vault_key`.", place=str(self.path))
        return json.loads(self._key.open(base64.b64decode(kept["sealed"], validate=True), self._context))

    def _seal_plain(self) -> None:
        kept = self._read_file()
        if isinstance(kept, dict) and kept.get("version") == _PLAIN:
            token = self.read()
            assert token is not None
            self.write(token)

    def _read_file(self) -> Any:
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
            kept = json.loads(text)
        except ValueError:
            # Not chained: the decoder's error holds the text.
            raise VaultDamaged("it is not a token file of this version.", place=str(self.path)) from None
        if not isinstance(kept, dict):
            raise VaultDamaged("it is not a token file of this version.", place=str(self.path))
        return kept

    def write(self, token: StoredToken) -> None:
        """Replace the stored token; on return it survives a crash of the machine. Raises ``OSError`` with no change."""
        self._prepare_folder()
        with contextlib.suppress(FileNotFoundError):
            self._new.unlink()  # left by a crash
        descriptor = os.open(self._new, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
        try:
            rest = self._seal(token)
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

    def _seal(self, token: StoredToken) -> bytes:
        sealed = base64.b64encode(self._key.seal(_encode(token), self._context)).decode()
        return json.dumps({"version": _SEALED, "key": self._key.name, "sealed": sealed}).encode()

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


def _derive(secret: bytes, purpose: bytes, length: int) -> bytes:
    return HKDF(algorithm=SHA256(), length=length, salt=None, info=purpose).derive(secret)


def _encode(token: StoredToken) -> bytes:
    return json.dumps(
        {
            "version": _PLAIN,
            "access": token.access.get_secret_value(),
            "expires_at": token.expires_at,
            "issued_at": token.issued_at,
            "refresh": None if token.refresh is None else token.refresh.get_secret_value(),
            "seed": token.seed,
        }
    ).encode()


def _decode(kept: Any) -> StoredToken:
    if kept["version"] != _PLAIN or not isinstance(kept["access"], str) or not isinstance(kept["seed"], str):
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

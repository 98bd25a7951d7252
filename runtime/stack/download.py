"""Fetching locked files: verified, resumable, four at a time, behind proxies and from mirrors.

``urllib`` honours HTTPS_PROXY, HTTP_PROXY and NO_PROXY; OpenSSL honours SSL_CERT_FILE and SSL_CERT_DIR;
REQUESTS_CA_BUNDLE is read here, because people behind a hospital's proxy have set it for pip already.
"""

from __future__ import annotations

import base64
import contextlib
import errno
import fcntl
import http.client
import os
import shutil
import ssl
import threading
import time
import urllib.error
import urllib.request
from concurrent.futures import FIRST_EXCEPTION, ThreadPoolExecutor, wait
from pathlib import Path
from typing import TYPE_CHECKING, Final
from urllib.parse import unquote, urlsplit, urlunsplit

from runtime.stack.artifacts import digest_file
from runtime.stack.errors import ChecksumError, DiskSpaceError, DownloadError

if TYPE_CHECKING:
    from collections.abc import Callable, Iterable, Iterator

    from runtime.stack.artifacts import Artifact, Cache, Part
    from runtime.stack.progress import Progress

PARALLEL: Final = 4
ATTEMPTS: Final = 5
WRONG_BYTES: Final = 2
RETRY_PAUSE = 0.5
"""Seconds before the second attempt; doubled each time up to 8."""
CHUNK: Final = 1 << 18
SOCKET_TIMEOUT: Final = 30.0
SPARE: Final = 64 << 20
"""Bytes that must stay free beside the files themselves."""

_PARTIAL: Final = 206
_RANGE_REFUSED: Final = 416
_TOO_MANY: Final = 429
_REQUEST_TIMEOUT: Final = 408
_SERVER_ERROR: Final = 500


class Cancelled(Exception):
    """The caller gave up, which is not an error; what was fetched stays for the next time."""


def find_maven_root() -> str:
    """Base address of the public Maven repository, as the Maven library knows it."""
    from jgo.constants import MAVEN_CENTRAL_URL  # noqa: PLC0415 - slow to import, needed only for a download

    return str(MAVEN_CENTRAL_URL)


def build_tls_context() -> ssl.SSLContext:
    """Certificates of the system, plus those of REQUESTS_CA_BUNDLE (a file or a folder)."""
    context = ssl.create_default_context()
    known = ssl.get_default_verify_paths()
    if not known.cafile and not known.capath:
        # Python builds without a system store (python.org on macOS) would trust nobody
        import certifi  # noqa: PLC0415 - only these builds need it

        context.load_verify_locations(cafile=certifi.where())
    bundle = os.environ.get("REQUESTS_CA_BUNDLE", "")
    if bundle:
        try:
            if Path(bundle).is_dir():
                context.load_verify_locations(capath=bundle)
            else:
                context.load_verify_locations(cafile=bundle)
        except (OSError, ssl.SSLError) as error:
            raise DownloadError(
                f"The certificate bundle cannot be read: {error}.",
                place="environment variable REQUESTS_CA_BUNDLE",
                remedy="Point REQUESTS_CA_BUNDLE to a readable PEM file or folder, or unset it.",
            ) from error
    return context


def check_mirror(root: str) -> None:
    """Raise ``DownloadError`` unless ``root`` is an address the download can read."""
    if urlsplit(root).scheme not in {"https", "http", "file"}:
        raise DownloadError(
            "The address of the Maven mirror has no usable scheme.",
            place="Maven mirror",
            remedy="Write it as https://host/path, http://host/path or file:///folder.",
        )


def count_required(cache: Cache, parts: Iterable[Part]) -> int:
    """Bytes the missing files and their unpacked content still need on the cache's disk."""
    required = 0
    for part in parts:
        for artifact in cache.list_missing(part):
            begun = _partial_path(cache, artifact)
            required += artifact.size - (begun.stat().st_size if begun.exists() else 0)
        if cache.needs_unpacking(part):
            required += part.unpacked_size
    return required


def check_space(folder: Path, required: int) -> None:
    """Raise ``DiskSpaceError`` unless ``folder``'s disk has ``required`` bytes and a little more."""
    free = shutil.disk_usage(folder).free
    if free < required + SPARE:
        raise DiskSpaceError(
            f"{_mebibytes(required + SPARE)} MiB are needed, {_mebibytes(free)} MiB are free.", place=str(folder)
        )


def fetch_parts(
    cache: Cache,
    parts: Iterable[Part],
    *,
    progress: Progress,
    mirror: str | None = None,
    cancel: threading.Event | None = None,
) -> None:
    """Bring every file of ``parts`` into the cache, verified, and unpack the archives.

    ``mirror`` is the base address of a Maven repository (``https://``, ``http://`` or ``file://``), by default the
    public one. One process at a time works on a cache, others wait. Raises ``DiskSpaceError`` before the first byte,
    ``DownloadError`` when the network fails after several attempts, ``ChecksumError`` when the bytes are not the locked
    ones. A second call resumes.
    """
    cancel = cancel or threading.Event()
    cache.folder.mkdir(parents=True, exist_ok=True)
    with _hold(cache, cancel):
        _fetch_parts(cache, list(parts), progress=progress, mirror=mirror, cancel=cancel)


def _fetch_parts(
    cache: Cache, parts: list[Part], *, progress: Progress, mirror: str | None, cancel: threading.Event
) -> None:
    missing = {part.name: cache.list_missing(part) for part in parts}
    required = count_required(cache, parts)
    if required:
        check_space(cache.folder, required)
    # biggest first, so that the big one does not run alone at the end
    queue = sorted((a for files in missing.values() for a in files), key=lambda artifact: -artifact.size)
    if queue:
        root = mirror or find_maven_root()
        check_mirror(root)
        _fetch_files(cache, queue, root=root, progress=progress, cancel=cancel)
    for part in parts:
        if cache.needs_unpacking(part):
            progress.step(part.name, "unpacking")
            try:
                cache.unpack(part)
            except OSError as error:
                raise DiskSpaceError(f"Unpacking failed: {error.strerror}.", place=str(cache.folder)) from error


def _fetch_files(
    cache: Cache, queue: list[Artifact], *, root: str, progress: Progress, cancel: threading.Event
) -> None:
    told = threading.Lock()

    def tell(artifact: Artifact, done: int) -> None:
        with told:
            progress.download(artifact.name, done, artifact.size)

    for artifact in queue:
        tell(artifact, 0)
    opener = build_opener()
    stop = threading.Event()
    with ThreadPoolExecutor(PARALLEL, thread_name_prefix="download") as pool:
        futures = [
            pool.submit(_Download(cache, artifact, root=root, opener=opener, tell=tell, signals=(cancel, stop)).run)
            for artifact in queue
        ]
        try:
            done, _ = wait(futures, return_when=FIRST_EXCEPTION)
            for future in done:
                future.result()
        except BaseException:
            stop.set()
            for future in futures:
                future.cancel()
            raise


def build_opener() -> urllib.request.OpenerDirector:
    """An HTTP client that knows proxies and certificates from the environment."""
    return urllib.request.build_opener(urllib.request.HTTPSHandler(context=build_tls_context()))


@contextlib.contextmanager
def _hold(cache: Cache, cancel: threading.Event) -> Iterator[None]:
    with (cache.folder / "lock").open("a") as handle:
        while True:
            try:
                fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError:
                if cancel.is_set():
                    raise Cancelled from None
                time.sleep(0.1)
        yield


def _partial_path(cache: Cache, artifact: Artifact) -> Path:
    target = cache.locate(artifact)
    return target.with_name(target.name + ".part")


def _mebibytes(count: int) -> int:
    return -(-count // (1 << 20))


class _WrongBytes(Exception):
    """All bytes came, and they are not the locked ones."""


class _Download:
    """One file. ``run`` returns when its verified bytes are in place."""

    def __init__(
        self,
        cache: Cache,
        artifact: Artifact,
        *,
        root: str,
        opener: urllib.request.OpenerDirector,
        tell: Callable[[Artifact, int], None],
        signals: tuple[threading.Event, ...],
    ) -> None:
        self._artifact = artifact
        self._target = cache.locate(artifact)
        self._partial = _partial_path(cache, artifact)
        address = urlsplit(f"{root.rstrip('/')}/{artifact.path}")
        # urllib does not know user and password inside an address, and no error may show them
        account, _, self._host = address.netloc.rpartition("@")
        self._url = urlunsplit(address._replace(netloc=self._host))
        self._headers = {}
        if account:
            self._headers["Authorization"] = "Basic " + base64.b64encode(unquote(account).encode()).decode()
        self._opener = opener
        self._tell = tell
        self._signals = signals

    def run(self) -> None:
        """Fetch until verified; give up after several attempts that brought nothing new."""
        self._target.parent.mkdir(parents=True, exist_ok=True)
        wrong = 0
        fruitless = 0
        while True:
            before = self._count_done()
            try:
                self._fetch_once()
                self._verify()
            except _WrongBytes as error:
                wrong += 1
                if wrong >= WRONG_BYTES:
                    raise ChecksumError(str(error), place=self._describe_place()) from error
            except (OSError, http.client.HTTPException) as error:
                if isinstance(error, OSError) and error.errno in (errno.ENOSPC, errno.EDQUOT):
                    raise DiskSpaceError("The disk is full.", place=str(self._partial.parent)) from error
                fruitless = 1 if self._count_done() > before else fruitless + 1
                if fruitless >= ATTEMPTS or not _is_worth_repeating(error):
                    raise DownloadError(f"{_describe_reason(error)}.", place=self._describe_place()) from error
                self._pause(min(RETRY_PAUSE * 2**fruitless, 8.0))
            else:
                self._tell(self._artifact, self._artifact.size)
                return

    def _fetch_once(self) -> None:
        done = self._count_done()
        if done > self._artifact.size:
            self._partial.unlink()
            done = 0
        if done == self._artifact.size:
            return
        request = urllib.request.Request(self._url, headers=self._headers)  # noqa: S310 - the scheme is checked by check_mirror
        if done:
            request.add_header("Range", f"bytes={done}-")
        try:
            answer = self._opener.open(request, timeout=SOCKET_TIMEOUT)
        except urllib.error.HTTPError as error:
            error.close()
            if error.code == _RANGE_REFUSED:
                self._partial.unlink(missing_ok=True)
            raise
        with answer, self._partial.open("ab") as sink:
            if done and answer.status != _PARTIAL:  # the server ignored the range and sends everything
                sink.truncate(0)
                done = 0
            while chunk := answer.read(CHUNK):
                self._check_signals()
                sink.write(chunk)
                done += len(chunk)
                self._tell(self._artifact, min(done, self._artifact.size))
                if done > self._artifact.size:
                    break
        if done < self._artifact.size:
            raise http.client.IncompleteRead(b"", self._artifact.size - done)

    def _verify(self) -> None:
        seen = digest_file(self._partial)
        if self._partial.stat().st_size != self._artifact.size or seen != self._artifact.sha256:
            self._partial.unlink()
            raise _WrongBytes(f"The sha256 is {seen[:16]}..., the lock says {self._artifact.sha256[:16]}....")
        self._partial.replace(self._target)

    def _count_done(self) -> int:
        try:
            return self._partial.stat().st_size
        except FileNotFoundError:
            return 0

    def _pause(self, seconds: float) -> None:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            self._check_signals()
            time.sleep(0.05)

    def _check_signals(self) -> None:
        if any(signal.is_set() for signal in self._signals):
            raise Cancelled

    def _describe_place(self) -> str:
        return f"download of {self._artifact.name} from {self._host or 'the local mirror'}"


def _is_worth_repeating(error: Exception) -> bool:
    if isinstance(error, urllib.error.HTTPError):
        return error.code >= _SERVER_ERROR or error.code in (_TOO_MANY, _REQUEST_TIMEOUT, _RANGE_REFUSED)
    reason = getattr(error, "reason", error)
    return not isinstance(reason, ssl.SSLCertVerificationError | FileNotFoundError)


def _describe_reason(error: Exception) -> str:
    if isinstance(error, urllib.error.HTTPError):
        return f"The server answered {error.code}"
    if isinstance(error, http.client.IncompleteRead):
        return "The connection ended before the whole file had come"
    reason = getattr(error, "reason", error)
    return f"No connection, or it broke: {reason}"

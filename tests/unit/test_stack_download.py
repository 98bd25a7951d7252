"""Downloads against a local server that is slow, cut, wrong, or knows no ranges."""

import hashlib
import http.server
import io
import os
import tarfile
import threading
import zipfile
from pathlib import Path

import pytest

from runtime.stack import SilentProgress
from runtime.stack import download as module
from runtime.stack.artifacts import PARTS, Artifact, Cache, Part, parse_lock, read_lock
from runtime.stack.download import Cancelled, fetch_parts
from runtime.stack.errors import ChecksumError, DiskSpaceError, DownloadError
from schemas.failure import ExitCode

BODY = bytes(range(256)) * 4096


class Repository(http.server.ThreadingHTTPServer):
    """Serves ``files``; ``faults`` are taken one per request."""

    daemon_threads = True

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.files = {}
        self.faults = []
        self.requests = []
        self.accounts = []
        self.ranges = True

    @property
    def root(self):
        return f"http://127.0.0.1:{self.server_port}/maven"


class Handler(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args):
        pass

    def do_GET(self):
        server = self.server
        wanted = self.headers.get("Range")
        server.requests.append((self.path, wanted))
        server.accounts.append(self.headers.get("Authorization"))
        fault = server.faults.pop(0) if server.faults else None
        body = server.files.get(self.path.partition("/maven/")[2])
        if isinstance(fault, int) or body is None:
            self.send_response(fault or 404)
            self.send_header("Content-Length", "0")
            self.end_headers()
            return
        if fault == "wrong":
            body = bytes(len(body))
        status = 200
        if wanted and server.ranges:
            body = body[int(wanted.removeprefix("bytes=").removesuffix("-")) :]
            status = 206
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if fault == "cut":
            self.wfile.write(body[: len(body) // 2])
            self.wfile.flush()
            self.close_connection = True
            self.connection.shutdown(2)
        else:
            self.wfile.write(body)


class Record(SilentProgress):
    def __init__(self):
        self.told = []

    def download(self, file, done, total):
        self.told.append((file, done, total))


@pytest.fixture
def repository():
    server = Repository()
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture(autouse=True)
def quick(monkeypatch):
    """No pauses between attempts, no proxy between us and the local server."""
    monkeypatch.setattr(module, "RETRY_PAUSE", 0.001)
    for name in ("HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)


def make_artifact(path="org/x/1/x-1.jar", body=BODY):
    return Artifact(f"org:x:jar:{path}", path, hashlib.sha256(body).hexdigest(), len(body))


def make_part(*artifacts, **more):
    return Part("kafka", "1", artifacts or (make_artifact(),), **more)


def fetch(tmp_path, part, repository, **more):
    cache = Cache(tmp_path / "cache")
    fetch_parts(cache, [part], progress=more.pop("progress", SilentProgress()), mirror=repository.root, **more)
    return cache


def test_a_file_arrives_verified_and_is_not_fetched_twice(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    record = Record()
    cache = fetch(tmp_path, part, repository, progress=record)
    assert cache.locate(part.files[0]).read_bytes() == BODY
    assert record.told[0] == ("x-1.jar", 0, len(BODY))
    assert record.told[-1] == ("x-1.jar", len(BODY), len(BODY))
    fetch(tmp_path, part, repository)
    assert len(repository.requests) == 1


def test_a_cut_download_goes_on_where_it_was(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    repository.faults = ["cut"]
    cache = fetch(tmp_path, part, repository)
    assert cache.locate(part.files[0]).read_bytes() == BODY
    first, second = (wanted for _, wanted in repository.requests)
    assert first is None
    assert 0 < int(second.removeprefix("bytes=").removesuffix("-")) < len(BODY)


def test_a_later_call_resumes_what_an_earlier_one_left(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    target = Cache(tmp_path / "cache").locate(part.files[0])
    target.parent.mkdir(parents=True)
    target.with_name("x-1.jar.part").write_bytes(BODY[:1000])
    fetch(tmp_path, part, repository)
    assert [wanted for _, wanted in repository.requests] == ["bytes=1000-"]
    assert target.read_bytes() == BODY


def test_a_server_without_ranges_starts_over(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    repository.ranges = False
    repository.faults = ["cut"]
    assert fetch(tmp_path, part, repository).locate(part.files[0]).read_bytes() == BODY


def test_wrong_bytes_are_deleted_and_fetched_again(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    repository.faults = ["wrong"]
    assert fetch(tmp_path, part, repository).locate(part.files[0]).read_bytes() == BODY
    assert [wanted for _, wanted in repository.requests] == [None, None]


def test_bytes_that_stay_wrong_are_refused_and_not_kept(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = bytes(len(BODY))
    with pytest.raises(ChecksumError, match="sha256") as caught:
        fetch(tmp_path, part, repository)
    assert "x-1.jar" in caught.value.place
    assert caught.value.exit_code == ExitCode.FAILED
    assert [p.name for p in (tmp_path / "cache").rglob("*") if p.is_file()] == ["lock"]


def test_a_longer_file_is_refused(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY + b"more"
    with pytest.raises(ChecksumError):
        fetch(tmp_path, part, repository)


def test_a_file_damaged_in_the_cache_is_fetched_again(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    cache = fetch(tmp_path, part, repository)
    cache.locate(part.files[0]).write_bytes(bytes(len(BODY)))
    fetch(tmp_path, part, repository)
    assert cache.locate(part.files[0]).read_bytes() == BODY
    assert len(repository.requests) == 2


def test_a_busy_server_is_asked_again_and_a_missing_file_is_not(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    repository.faults = [503, 429, 500]
    fetch(tmp_path, part, repository)
    assert len(repository.requests) == 4
    repository.requests.clear()
    with pytest.raises(DownloadError, match="404"):
        fetch(tmp_path, make_part(make_artifact("org/y/1/y-1.jar")), repository)
    assert len(repository.requests) == 1


def test_no_network_names_the_remedy_and_hides_a_password(tmp_path):
    root = "http://nurse:hunter2@127.0.0.1:9/maven"
    with pytest.raises(DownloadError) as caught:
        fetch_parts(Cache(tmp_path), [make_part()], progress=SilentProgress(), mirror=root)
    text = str(caught.value)
    assert caught.value.exit_code == ExitCode.RETRY
    assert "HTTPS_PROXY" in text
    assert "127.0.0.1:9" in text
    assert "hunter2" not in text


def test_a_mirror_may_ask_for_an_account(tmp_path, repository):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    root = repository.root.replace("http://", "http://nurse:p%40ss@")
    cache = Cache(tmp_path)
    fetch_parts(cache, [part], progress=SilentProgress(), mirror=root)
    assert cache.locate(part.files[0]).read_bytes() == BODY
    assert repository.accounts == ["Basic bnVyc2U6cEBzcw=="]


def test_the_proxy_of_the_environment_is_used_and_no_proxy_is_heeded(tmp_path, repository, monkeypatch):
    part = make_part()
    repository.files[part.files[0].path] = BODY
    monkeypatch.setenv("http_proxy", f"http://127.0.0.1:{repository.server_port}")
    fetch_parts(Cache(tmp_path / "a"), [part], progress=SilentProgress(), mirror="http://mirror.invalid/maven")
    assert repository.requests[0][0] == f"http://mirror.invalid/maven/{part.files[0].path}"
    monkeypatch.setenv("no_proxy", "mirror.invalid")
    with pytest.raises(DownloadError):
        fetch_parts(Cache(tmp_path / "b"), [part], progress=SilentProgress(), mirror="http://mirror.invalid/maven")


def test_a_certificate_bundle_that_cannot_be_read_is_named(tmp_path, repository, monkeypatch):
    monkeypatch.setenv("REQUESTS_CA_BUNDLE", str(tmp_path / "none.pem"))
    with pytest.raises(DownloadError, match="bundle") as caught:
        fetch(tmp_path, make_part(), repository)
    assert "REQUESTS_CA_BUNDLE" in caught.value.place


def test_a_folder_can_be_the_mirror(tmp_path):
    part = make_part()
    source = tmp_path / "mirror" / part.files[0].path
    source.parent.mkdir(parents=True)
    source.write_bytes(BODY)
    cache = Cache(tmp_path / "cache")
    fetch_parts(cache, [part], progress=SilentProgress(), mirror=(tmp_path / "mirror").as_uri())
    assert cache.locate(part.files[0]).read_bytes() == BODY
    with pytest.raises(DownloadError, match="No such file"):
        fetch_parts(
            cache, [make_part(make_artifact("a/b.jar"))], progress=SilentProgress(), mirror=(tmp_path / "m").as_uri()
        )


def test_a_mirror_with_another_scheme_is_refused(tmp_path):
    with pytest.raises(DownloadError, match="scheme"):
        fetch_parts(Cache(tmp_path), [make_part()], progress=SilentProgress(), mirror="ftp://mirror/maven")


def test_missing_space_is_told_before_the_first_byte(tmp_path, repository):
    huge = Artifact("org:x:jar:1", "org/x.jar", "0" * 64, 1 << 60)
    with pytest.raises(DiskSpaceError, match="MiB are needed") as caught:
        fetch(tmp_path, make_part(huge), repository)
    assert caught.value.exit_code == ExitCode.RETRY
    assert repository.requests == []


def test_a_cancelled_download_ends_and_keeps_what_it_has(tmp_path, repository):
    part = make_part(make_artifact(body=BODY * 20))
    repository.files[part.files[0].path] = BODY * 20
    cancel = threading.Event()

    class CancelEarly(SilentProgress):
        def download(self, file, done, total):
            if done:
                cancel.set()

    with pytest.raises(Cancelled):
        fetch(tmp_path, part, repository, progress=CancelEarly(), cancel=cancel)
    left = list((tmp_path / "cache").rglob("*.part"))
    assert [0 < path.stat().st_size < part.files[0].size for path in left] == [True]


def test_two_callers_share_one_download(tmp_path, repository):
    parts = make_part(*(make_artifact(f"org/x/{n}.jar") for n in range(6)))
    for artifact in parts.files:
        repository.files[artifact.path] = BODY
    threads = [threading.Thread(target=fetch, args=(tmp_path, parts, repository)) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(path for path, _ in repository.requests) == [f"/maven/org/x/{n}.jar" for n in range(6)]


def pack_tar(entries):
    stream = io.BytesIO()
    with tarfile.open(fileobj=stream, mode="w:gz") as tar:
        for name, kind in entries:
            member = tarfile.TarInfo(name)
            if kind == "link":
                member.type, member.linkname = tarfile.SYMTYPE, "/etc/passwd"
                tar.addfile(member)
            else:
                member.size = len(kind)
                tar.addfile(member, io.BytesIO(kind))
    return stream.getvalue()


def test_an_archive_is_unpacked_whole_and_nothing_leaves_the_folder(tmp_path, repository):
    body = pack_tar(
        [("./lib/a.jar", b"a"), ("app.jar", b"b"), ("../lib/evil", b"c"), ("lib/link", "link"), ("doc/readme", b"d")]
    )
    part = make_part(make_artifact("org/r/r.tar.gz", body), members=("lib/", "app", "../lib"), unpacked_size=2)
    repository.files["org/r/r.tar.gz"] = body
    cache = fetch(tmp_path, part, repository)
    folder = cache.locate_unpacked(part)
    assert {str(p.relative_to(folder)) for p in folder.rglob("*") if p.is_file()} == {"lib/a.jar", "app.jar"}
    assert not (folder.parent / "lib").exists()
    fetch(tmp_path, part, repository)
    assert len(repository.requests) == 1, "the unpacked folder stands for the archive"


def test_a_program_in_a_zip_can_be_executed(tmp_path, repository):
    stream = io.BytesIO()
    with zipfile.ZipFile(stream, "w") as zipped:
        zipped.writestr("server-linux", "#!/bin/sh\n")
        zipped.writestr("server-windows.exe", "")
    body = stream.getvalue()
    part = make_part(make_artifact("org/r/r.jar", body), members=("server-linux",), unpacked_size=10)
    repository.files["org/r/r.jar"] = body
    folder = fetch(tmp_path, part, repository).locate_unpacked(part)
    assert [path.name for path in folder.iterdir()] == ["server-linux"]
    assert os.access(folder / "server-linux", os.X_OK)


def test_the_committed_lock_is_whole_and_names_no_host():
    parts = read_lock()
    assert tuple(parts) == PARTS
    assert parts["kafka"].version.startswith("4.")
    paths = [artifact.path for part in parts.values() for artifact in part.files]
    assert len(set(paths)) == len(paths)
    for part in parts.values():
        for artifact in part.files:
            assert len(bytes.fromhex(artifact.sha256)) == 32
            assert artifact.size > 0
            group, name, *_, version = artifact.coordinate.split(":")
            assert artifact.path.startswith(f"{group.replace('.', '/')}/{name}/{version}/{name}-{version}")
    assert any(a.coordinate.startswith("org.slf4j:slf4j-simple:") for a in parts["kafka"].files)
    text = (Path(module.__file__).parent / "artifacts.lock").read_text()
    assert "://" not in text


def test_a_lock_without_a_part_is_refused():
    with pytest.raises(ValueError, match="kafka, registry, redis"):
        parse_lock('{"parts": {}}')

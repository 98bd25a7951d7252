"""The HTTP client: whole answers, and whether a failed request may have left."""

import asyncio
import gzip
import shutil
import ssl
import subprocess
import traceback
from contextlib import asynccontextmanager

import httpx
import pytest

from clients.hosts import HostPolicy, HostRefused
from clients.http import HttpClient, HttpFailure, HttpRequest, HttpResponse, Proxies, build_tls
from schemas.failure import Failure, FailureKind


class RawServer:
    """Answers each connection with a script over plain sockets; remembers the bytes it was sent."""

    def __init__(self, script):
        self.script = script
        self.received = b""
        self.connections = 0

    async def handle(self, reader, writer):
        self.connections += 1
        try:
            await self.script(self, reader, writer)
        finally:
            writer.close()

    async def read_request(self, reader):
        head = await reader.readuntil(b"\r\n\r\n")
        length = 0
        for line in head.lower().split(b"\r\n"):
            if line.startswith(b"content-length:"):
                length = int(line.split(b":")[1])
        body = await reader.readexactly(length)
        self.received += head + body
        return head, body


@asynccontextmanager
async def serving(script):
    fake = RawServer(script)
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0)
    async with server:
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield fake


async def answer_ok(fake, reader, writer):
    while True:
        try:
            await fake.read_request(reader)
        except asyncio.IncompleteReadError:
            return
        writer.write(b"HTTP/1.1 200 OK\r\nX-Thing: a\r\nX-Thing: b\r\nContent-Length: 5\r\n\r\nhello")
        await writer.drain()


async def test_a_request_and_its_answer_travel_whole():
    async with serving(answer_ok) as fake, HttpClient() as client:
        request = HttpRequest("POST", fake.url + "/a?b=c", {"X-Mine": "1"}, b'{"n":1}')
        response = await client.send(request, deadline=5)
    assert response.status == 200
    assert response.body == b"hello"
    assert response.headers["x-thing"] == "a, b"
    assert fake.received.startswith(b"POST /a?b=c HTTP/1.1\r\n")
    assert b"x-mine: 1" in fake.received.lower()
    assert fake.received.endswith(b'\r\n\r\n{"n":1}')


async def test_connections_are_kept_and_bounded():
    async with serving(answer_ok) as fake, HttpClient(max_connections=3) as client:
        await asyncio.gather(*(client.send(HttpRequest("POST", fake.url, body=b"x"), deadline=5) for _ in range(30)))
    assert fake.connections <= 3


async def test_redirects_are_not_followed_and_errors_are_answers():
    async def redirect(fake, reader, writer):
        await fake.read_request(reader)
        writer.write(b"HTTP/1.1 307 Go\r\nLocation: /elsewhere\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with serving(redirect) as fake, HttpClient() as client:
        response = await client.send(HttpRequest("GET", fake.url), deadline=5)
    assert response.status == 307
    assert fake.received.count(b"HTTP/1.1") == 1


async def test_cookies_are_not_kept():
    async def set_cookie(fake, reader, writer):
        for _ in range(2):
            await fake.read_request(reader)
            writer.write(b"HTTP/1.1 200 OK\r\nSet-Cookie: s=1; Path=/\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()

    async with serving(set_cookie) as fake, HttpClient(max_connections=1) as client:
        for _ in range(2):
            await client.send(HttpRequest("GET", fake.url), deadline=5)
    assert b"cookie:" not in fake.received.lower()


async def test_a_compressed_answer_is_unpacked():
    packed = gzip.compress(b"large " * 100)

    async def send_packed(fake, reader, writer):
        await fake.read_request(reader)
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip\r\nContent-Length: {len(packed)}\r\n\r\n"
        writer.write(head.encode() + packed)
        await writer.drain()

    async with serving(send_packed) as fake, HttpClient() as client:
        response = await client.send(HttpRequest("GET", fake.url), deadline=5)
    assert response.body == b"large " * 100


async def fail(url, *, deadline=5.0, method="POST", **options):
    async with HttpClient(**options) as client:
        with pytest.raises(HttpFailure) as caught:
            await client.send(HttpRequest(method, url, body=b"pay"), deadline=deadline)
    assert isinstance(caught.value, Failure)
    return caught.value.kind, caught.value.code


async def test_a_refused_connection_never_left():
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    assert await fail(f"http://127.0.0.1:{port}") == (FailureKind.UNAVAILABLE, "CONNECT_FAILED")


async def test_an_unknown_host_never_left():
    kind, code = await fail("http://nowhere.invalid/")
    assert (kind, code) == (FailureKind.UNAVAILABLE, "CONNECT_FAILED")


async def test_waiting_for_a_connection_of_the_pool_never_left():
    arrived, released = asyncio.Event(), asyncio.Event()

    async def hold(fake, reader, writer):
        await fake.read_request(reader)
        arrived.set()
        await released.wait()
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()

    async with serving(hold) as fake, HttpClient(max_connections=1) as client:
        first = asyncio.create_task(client.send(HttpRequest("POST", fake.url, body=b"first"), deadline=30))
        await arrived.wait()
        with pytest.raises(HttpFailure) as caught:
            await client.send(HttpRequest("POST", fake.url, body=b"second"), deadline=0.1)
        released.set()
        assert (await first).status == 200
    assert (caught.value.kind, caught.value.code) == (FailureKind.UNAVAILABLE, "CONNECT_TIMEOUT")
    assert b"second" not in fake.received


async def test_a_server_that_does_not_answer_is_ambiguous():
    async def hang(fake, reader, _writer):
        await fake.read_request(reader)
        await reader.read()

    async with serving(hang) as fake:
        assert await fail(fake.url, deadline=0.2) == (FailureKind.AMBIGUOUS, "NO_ANSWER")
    assert fake.received.endswith(b"pay")


async def test_a_connection_cut_after_the_write_is_ambiguous():
    async def cut(fake, reader, _writer):
        await fake.read_request(reader)

    async with serving(cut) as fake:
        assert await fail(fake.url) == (FailureKind.AMBIGUOUS, "ANSWER_CUT")
    assert fake.connections == 1


async def test_an_answer_cut_in_its_body_is_ambiguous():
    async def cut(fake, reader, writer):
        await fake.read_request(reader)
        writer.write(b"HTTP/1.1 201 Created\r\nContent-Length: 100\r\n\r\nhalf")
        await writer.drain()

    async with serving(cut) as fake:
        kind, _ = await fail(fake.url)
    assert kind is FailureKind.AMBIGUOUS


async def test_a_garbage_answer_is_ambiguous():
    async def garble(fake, reader, writer):
        await fake.read_request(reader)
        writer.write(b"\x00\x01 nonsense\r\n\r\n")
        await writer.drain()

    async with serving(garble) as fake:
        kind, _ = await fail(fake.url)
    assert kind is FailureKind.AMBIGUOUS


async def test_an_untrusted_server_never_gets_the_request():
    received = bytearray()

    async def listen(reader, writer):
        received.extend(await reader.read(2000))
        writer.write(b"this is no TLS server\r\n")
        writer.close()

    server = await asyncio.start_server(listen, "127.0.0.1", 0)
    async with server:
        port = server.sockets[0].getsockname()[1]
        kind, code = await fail(f"https://127.0.0.1:{port}/")
    assert (kind, code) == (FailureKind.UNAVAILABLE, "TLS_FAILED")
    assert b"pay" not in received


async def test_the_certificate_bundle_of_the_environment_is_used(tmp_path, monkeypatch):
    monkeypatch.setenv("SSL_CERT_FILE", str(tmp_path / "absent.pem"))
    with pytest.raises((OSError, ssl.SSLError)):
        async with HttpClient():
            pass


async def test_a_bad_url_is_invalid():
    for url in ("ftp://127.0.0.1/", "http://"):
        assert await fail(url) == (FailureKind.INVALID, "URL_INVALID")


async def test_send_outside_the_context_is_refused():
    with pytest.raises(RuntimeError):
        await HttpClient().send(HttpRequest("GET", "http://127.0.0.1"), deadline=1)


def test_reprs_hide_headers_and_bodies():
    request = HttpRequest("POST", "http://x/", {"Authorization": "s3cret"}, b"s3cret")
    assert "s3cret" not in repr(request)
    assert "s3cret" not in repr(HttpResponse(200, {"a": "s3cret"}, b"s3cret"))


async def test_the_last_check_runs_before_the_write_and_stops_it():
    class Withdrawn(Exception):
        pass

    async with serving(answer_ok) as fake, HttpClient(max_connections=1) as client:
        for method, body in (("POST", b"pay"), ("GET", b""), ("PUT", b"x" * 300_000)):
            # At the first asking, and at the second: with a body there is a turn of the event loop in between.
            for stop_at in (1, 2) if body else (1,):
                asked = 0

                def check(stop_at=stop_at):
                    nonlocal asked
                    asked += 1
                    if asked == stop_at:
                        raise Withdrawn

                before = fake.received
                with pytest.raises(Withdrawn):
                    await client.send(HttpRequest(method, fake.url, body=body), deadline=5, before_write=check)
                assert asked == stop_at
                assert fake.received == before
        # The client is whole afterwards, and the check that passes lets the request out once.
        asked = 0

        def pass_check():
            nonlocal asked
            asked += 1

        request = HttpRequest("POST", fake.url, body=b"pay")
        assert (await client.send(request, deadline=5, before_write=pass_check)).status == 200
    assert asked == 2
    assert fake.received.count(b"POST ") == 1


async def test_no_check_is_asked_while_a_connection_is_awaited():
    asked = []
    server = await asyncio.start_server(lambda _r, w: w.close(), "127.0.0.1", 0)
    port = server.sockets[0].getsockname()[1]
    server.close()
    await server.wait_closed()
    async with HttpClient() as client:
        request = HttpRequest("POST", f"http://127.0.0.1:{port}", body=b"x")
        with pytest.raises(HttpFailure):
            await client.send(request, deadline=5, before_write=lambda: asked.append(1))
    assert not asked


@pytest.mark.parametrize(
    ("method", "times", "outcome"), [("GET", 2, 200), ("PUT", 1, "ANSWER_CUT"), ("DELETE", 1, "ANSWER_CUT")]
)
async def test_only_reads_are_sent_again_on_a_connection_found_closed(method, times, outcome):
    # The kept connection takes the second request and closes without an answer: it may have been worked on.
    async def answer_first_only(fake, reader, writer):
        await fake.read_request(reader)
        writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
        await writer.drain()
        if fake.connections == 1:
            await fake.read_request(reader)

    async with serving(answer_first_only) as fake, HttpClient(max_connections=1) as client:
        await client.send(HttpRequest("POST", fake.url, body=b"first"), deadline=5)
        try:
            seen = (await client.send(HttpRequest(method, fake.url + "/again", body=b""), deadline=5)).status
        except HttpFailure as failure:
            seen = failure.code if failure.kind is FailureKind.AMBIGUOUS else failure.kind
    assert seen == outcome
    assert fake.received.count(b"/again") == times


@pytest.mark.parametrize("packed", [False, True])
async def test_an_endless_answer_is_cut_off(packed):
    body = gzip.compress(b"0" * 50_000_000) if packed else b"0" * 300_000

    async def flood(fake, reader, writer):
        await fake.read_request(reader)
        coding = "Content-Encoding: gzip\r\n" if packed else ""
        writer.write(f"HTTP/1.1 200 OK\r\n{coding}Content-Length: {len(body)}\r\n\r\n".encode() + body)
        await writer.drain()

    async with serving(flood) as fake:
        assert await fail(fake.url, longest_answer=200_000) == (FailureKind.AMBIGUOUS, "ANSWER_TOO_LONG")


async def test_an_answer_packed_twice_is_not_unpacked():
    body = gzip.compress(gzip.compress(b"0" * 100_000))

    async def send_packed(fake, reader, writer):
        await fake.read_request(reader)
        head = f"HTTP/1.1 200 OK\r\nContent-Encoding: gzip, gzip\r\nContent-Length: {len(body)}\r\n\r\n"
        writer.write(head.encode() + body)
        await writer.drain()

    async with serving(send_packed) as fake:
        assert await fail(fake.url) == (FailureKind.AMBIGUOUS, "ANSWER_UNREADABLE")


async def test_a_request_that_cannot_be_sent_is_invalid():
    async with serving(answer_ok) as fake, HttpClient() as client:
        for request in (
            HttpRequest("POST", fake.url, {"X-Name": "a\r\nX-Admin: 1"}),
            HttpRequest("PO ST", fake.url),
        ):
            with pytest.raises(HttpFailure) as caught:
                await client.send(request, deadline=5)
            assert (caught.value.kind, caught.value.code) == (FailureKind.INVALID, "REQUEST_INVALID")
    assert not fake.received


async def test_a_client_closed_meanwhile_is_no_fault_of_the_record():
    async with HttpClient() as client:
        await client._session.close()
        with pytest.raises(HttpFailure) as caught:
            await client.send(HttpRequest("POST", "http://127.0.0.1:1/"), deadline=5)
    assert (caught.value.kind, caught.value.code) == (FailureKind.UNAVAILABLE, "CLIENT_CLOSED")


SECRET = "s3cret-Doe-19700101"


async def test_nothing_of_a_request_or_answer_is_logged_or_in_failures(caplog):
    async def garble(fake, reader, writer):
        await fake.read_request(reader)
        writer.write(f"HTTP/1.1 2x0 {SECRET}\r\n{SECRET}\r\n\r\n{SECRET}".encode())
        await writer.drain()

    async def hang(fake, reader, _writer):
        await fake.read_request(reader)
        await reader.read()

    shown = []
    caplog.set_level("DEBUG")
    asyncio.get_running_loop().set_debug(True)
    for script in (answer_ok, garble, hang):
        async with serving(script) as fake, HttpClient() as client:
            request = HttpRequest(
                "POST", f"{fake.url}/{SECRET}?name={SECRET}", {"Authorization": SECRET}, SECRET.encode()
            )
            shown.append(repr(request))
            try:
                shown.append(repr(await client.send(request, deadline=0.3)))
            except HttpFailure as failure:
                shown += traceback.format_exception(failure)
                shown += [repr(failure), failure.cause]
    with pytest.raises(HttpFailure) as caught:
        async with HttpClient() as client:
            await client.send(HttpRequest("POST", f"http://{SECRET}:99999/"), deadline=1)
    shown += traceback.format_exception(caught.value)
    assert len(shown) > 8
    # Lines of this file's source in tracebacks hold the name, never the value.
    assert not [line for line in shown if SECRET in line]
    assert SECRET not in caplog.text
    assert caplog.records


class Tunnel:
    """A proxy: forwards plain requests, tunnels CONNECT; remembers the request lines and headers it was sent."""

    def __init__(self, refuse=False):
        self.refuse = refuse
        self.heads = []

    async def handle(self, reader, writer):
        head = await reader.readuntil(b"\r\n\r\n")
        self.heads.append(head)
        method, target, _ = head.split(b"\r\n")[0].split(b" ")
        if self.refuse:
            writer.write(b"HTTP/1.1 407 Log in\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()
            return
        if method == b"CONNECT":
            host, port = target.decode().split(":")
            onward_reader, onward = await asyncio.open_connection(host, int(port))
            writer.write(b"HTTP/1.1 200 OK\r\n\r\n")

            async def pump(source, sink):
                while data := await source.read(65536):
                    sink.write(data)
                sink.close()

            await asyncio.gather(pump(reader, onward), pump(onward_reader, writer), return_exceptions=True)
        else:
            writer.write(b"HTTP/1.1 203 Proxied\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()


@asynccontextmanager
async def proxying(**options):
    tunnel = Tunnel(**options)
    server = await asyncio.start_server(tunnel.handle, "127.0.0.1", 0)
    async with server:
        tunnel.port = server.sockets[0].getsockname()[1]
        tunnel.url = f"http://127.0.0.1:{tunnel.port}"
        yield tunnel


async def test_the_environment_alone_sets_no_proxy(monkeypatch):
    async with serving(answer_ok) as fake, proxying() as proxy:
        monkeypatch.setenv("http_proxy", proxy.url)
        async with HttpClient() as client:
            assert (await client.send(HttpRequest("GET", fake.url), deadline=5)).status == 200
        assert not proxy.heads
        # The control: asked for, the same variable does.
        async with HttpClient(proxies=Proxies.read_environment()) as client:
            assert (await client.send(HttpRequest("GET", fake.url), deadline=5)).status == 203
        assert proxy.heads


async def test_a_netrc_file_is_not_read(tmp_path, monkeypatch):
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login a password b\n")
    netrc.chmod(0o600)
    monkeypatch.setenv("NETRC", str(netrc))
    async with serving(answer_ok) as fake, HttpClient() as client:
        await client.send(HttpRequest("GET", fake.url), deadline=5)
    assert b"authorization" not in fake.received.lower()


def test_proxies_by_scheme_and_exceptions():
    proxies = Proxies(
        http="http://p:1", https="http://p:2", bypass="direct.example, .inner.example,*.star.example,h:81"
    )
    chosen = {
        url: proxies.choose(httpx.URL(url))
        for url in (
            "http://a.example/", "https://a.example/", "https://direct.example/", "https://sub.direct.example/",
            "https://x.inner.example/", "https://notdirect.example/", "https://y.star.example/", "http://h:81/", "http://h/",
        )
    }  # fmt: skip
    assert list(chosen.values()) == ["http://p:1", "http://p:2", "", "", "", "http://p:2", "", "", "http://p:1"]
    assert Proxies(https="http://p:2", bypass="*").choose(httpx.URL("https://a.example")) == ""
    assert "p:2" not in repr(proxies)


def test_proxies_of_the_environment(monkeypatch):
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    assert Proxies.read_environment() == Proxies()
    monkeypatch.setenv("HTTPS_PROXY", "http://p:2")
    monkeypatch.setenv("ALL_PROXY", "http://p:3")
    monkeypatch.setenv("NO_PROXY", "x.example")
    assert Proxies.read_environment() == Proxies(http="http://p:3", https="http://p:2", bypass="x.example")


@pytest.fixture(scope="module")
def certificates(tmp_path_factory):
    """A server's own certificate for 127.0.0.1, which nobody else trusts."""
    if shutil.which("openssl") is None:
        pytest.skip("needs the openssl command")
    folder = tmp_path_factory.mktemp("tls")
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=receiver", "-addext", "subjectAltName=IP:127.0.0.1"]
    command += ["-keyout", str(folder / "key.pem"), "-out", str(folder / "certificate.pem")]
    subprocess.run(command, check=True, capture_output=True)
    return folder


@asynccontextmanager
async def serving_tls(script, certificates, *, mutual=False):
    fake = RawServer(script)
    context = ssl.create_default_context(ssl.Purpose.CLIENT_AUTH)
    context.load_cert_chain(certificates / "certificate.pem", certificates / "key.pem")
    if mutual:
        context.verify_mode = ssl.CERT_REQUIRED
        context.load_verify_locations(certificates / "certificate.pem")
    server = await asyncio.start_server(fake.handle, "127.0.0.1", 0, ssl=context)
    async with server:
        fake.url = f"https://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        yield fake


async def test_a_hospital_s_own_authority_is_trusted_when_named(certificates):
    async with serving_tls(answer_ok, certificates) as fake:
        assert await fail(fake.url) == (FailureKind.UNAVAILABLE, "TLS_FAILED")
        async with HttpClient(tls=build_tls(certificates / "certificate.pem")) as client:
            assert (await client.send(HttpRequest("POST", fake.url, body=b"pay"), deadline=5)).status == 200
    assert fake.received.count(b"pay") == 1


async def test_mutual_tls(certificates):
    own = certificates / "certificate.pem"
    tls = build_tls(own, own, certificates / "key.pem")
    async with serving_tls(answer_ok, certificates, mutual=True) as fake, HttpClient(tls=tls) as client:
        assert (await client.send(HttpRequest("POST", fake.url, body=b"pay"), deadline=5)).status == 200
    assert fake.received.count(b"pay") == 1


def test_tls_files_that_cannot_be_used(tmp_path, certificates):
    with pytest.raises(OSError):
        build_tls(tmp_path / "absent.pem")
    with pytest.raises(ssl.SSLError):
        build_tls(certificates / "key.pem")


async def test_a_tunnel_keeps_the_knowledge_of_what_left(certificates):
    async def hang(fake, reader, _writer):
        await fake.read_request(reader)
        await reader.read()

    tls, asked = build_tls(certificates / "certificate.pem"), []
    async with serving_tls(hang, certificates) as fake, proxying() as proxy, proxying(refuse=True) as refusing:
        for port, expected in (
            (proxy.port, (FailureKind.AMBIGUOUS, "NO_ANSWER")),
            (refusing.port, (FailureKind.UNAVAILABLE, "PROXY_FAILED")),
            (1, (FailureKind.UNAVAILABLE, "PROXY_FAILED")),
        ):
            proxies = Proxies(https=f"http://user:pass@127.0.0.1:{port}")
            async with HttpClient(tls=tls, proxies=proxies) as client:
                request = HttpRequest("POST", fake.url + "/x", {"Authorization": "s3cret"}, b"pay")
                with pytest.raises(HttpFailure) as caught:
                    await client.send(request, deadline=1, before_write=lambda port=port: asked.append(port))
            assert (caught.value.kind, caught.value.code) == expected
    # The proxy's own CONNECT is not the request's write.
    assert set(asked) == {proxy.port}
    assert proxy.heads[0].startswith(b"CONNECT 127.0.0.1:")
    assert b"s3cret" not in proxy.heads[0]
    assert b"Proxy-Authorization: Basic" in proxy.heads[0]


async def test_the_policy_holds_behind_a_proxy_and_spares_the_proxy_itself():
    async with serving(answer_ok) as fake, proxying() as proxy:
        name = f"http://localhost:{proxy.port}"
        policy = HostPolicy(["http://api.example.com", fake.url])
        async with HttpClient(policy=policy, proxies=Proxies(http=name)) as client:
            assert (await client.send(HttpRequest("GET", "http://api.example.com/"), deadline=5)).status == 203
            for url in ("http://evil.example/", fake.url):
                with pytest.raises(HostRefused):
                    await client.send(HttpRequest("GET", url), deadline=5)
        assert len(proxy.heads) == 1
        # What bypasses the proxy is looked up here, and judged.
        policy = HostPolicy([name])
        async with HttpClient(policy=policy, proxies=Proxies(http="http://127.0.0.1:1", bypass="localhost")) as client:
            with pytest.raises(HostRefused) as caught:
                await client.send(HttpRequest("GET", name), deadline=5)
    assert caught.value.code == "ADDRESS_REFUSED"

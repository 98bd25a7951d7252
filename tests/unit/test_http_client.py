"""The HTTP client: whole answers, and whether a failed request may have left."""

import asyncio
import gzip
import ssl
from contextlib import asynccontextmanager

import pytest

from clients.http import HttpClient, HttpFailure, HttpRequest, HttpResponse
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

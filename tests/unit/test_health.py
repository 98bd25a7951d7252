"""Health endpoints: what an orchestrator and Prometheus get, also when the process or the caller misbehaves."""

import asyncio
import contextlib
import json

import pytest

from telemetry.health import HealthPortTaken, HealthServer
from telemetry.metrics import Metrics


async def ask(server, request):
    reader, writer = await asyncio.open_connection("127.0.0.1", server.port)
    writer.write(request)
    with contextlib.suppress(ConnectionError):
        answer = await asyncio.wait_for(reader.read(), 10)
    writer.close()
    head, _, body = answer.partition(b"\r\n\r\n")
    status = int(head.split(b" ", 2)[1]) if head else 0
    return status, head.decode(), body


async def get(server, path, method="GET"):
    return await ask(server, f"{method} {path} HTTP/1.1\r\nHost: x\r\n\r\n".encode())


async def test_ready_follows_the_process():
    state = (False, {"projection": "12 records behind"})
    async with HealthServer("127.0.0.1", 0, lambda: state) as server:
        status, _, body = await get(server, "/ready")
        assert (status, json.loads(body)) == (503, {"ready": False, "reasons": {"projection": "12 records behind"}})
        state = (True, {})
        status, _, body = await get(server, "/ready?x=1")
        assert (status, json.loads(body)) == (200, {"ready": True, "reasons": {}})


async def test_live_follows_its_own_check():
    alive = True
    async with HealthServer("127.0.0.1", 0, lambda: (False, {}), live=lambda: alive) as server:
        assert (await get(server, "/live"))[0] == 200
        alive = False
        assert (await get(server, "/live"))[0] == 503


async def test_metrics_are_this_process_s():
    metrics = Metrics(strict=True)
    metrics.count("refused_total", source="stripe", reason="stale")
    async with HealthServer("127.0.0.1", 0, lambda: (True, {}), metrics=metrics) as server:
        status, head, body = await get(server, "/metrics")
    assert status == 200
    assert "text/plain" in head
    assert b'remitstream_refused_total{reason="stale",source="stripe"} 1.0' in body
    assert f"Content-Length: {len(body)}" in head


async def test_a_broken_check_means_not_ready_and_shows_no_text():
    def check():
        raise RuntimeError("Quillfeather")

    async with HealthServer("127.0.0.1", 0, check) as server:
        status, _, body = await get(server, "/ready")
    assert (status, json.loads(body)["reasons"]) == (503, {"check": "RuntimeError"})


async def test_reasons_are_masked():
    async with HealthServer("127.0.0.1", 0, lambda: (False, {"last": "PID|1||Quillfeather"})) as server:
        assert b"Quillfeather" not in (await get(server, "/ready"))[2]


@pytest.mark.parametrize(
    ("request_bytes", "status"),
    [
        (b"GET /elsewhere HTTP/1.1\r\n\r\n", 404),
        (b"POST /ready HTTP/1.1\r\n\r\n", 405),
        (b"nonsense\r\n\r\n", 400),
        (b"\x00\xff\r\n\r\n", 400),
        (b"GET /live SPDY/3\r\n\r\n", 400),
        (b"GET /live HTTP/1.1\r\nX: " + b"y" * 20_000 + b"\r\n\r\n", 431),
    ],
)
async def test_bad_requests_are_answered_and_the_next_one_works(request_bytes, status):
    async with HealthServer("127.0.0.1", 0, lambda: (True, {})) as server:
        assert (await ask(server, request_bytes))[0] == status
        assert (await get(server, "/live"))[0] == 200


async def test_head_has_no_body():
    async with HealthServer("127.0.0.1", 0, lambda: (True, {})) as server:
        status, head, body = await get(server, "/ready", "HEAD")
    assert (status, body) == (200, b"")
    assert "Content-Length: 0" not in head


async def test_a_caller_that_goes_away_harms_no_one():
    async with HealthServer("127.0.0.1", 0, lambda: (True, {})) as server:
        _, writer = await asyncio.open_connection("127.0.0.1", server.port)
        writer.write(b"GET /re")
        writer.close()
        assert (await get(server, "/ready"))[0] == 200


async def test_a_taken_port_is_an_error_with_code_and_place():
    async with HealthServer("127.0.0.1", 0, lambda: (True, {})) as server:
        with pytest.raises(HealthPortTaken) as caught:
            await HealthServer("127.0.0.1", server.port, lambda: (True, {})).start()
    assert caught.value.place == f"127.0.0.1:{server.port}"


async def test_after_stop_nobody_listens():
    server = HealthServer("127.0.0.1", 0, lambda: (True, {}))
    await server.start()
    await server.stop()
    with pytest.raises(OSError):
        await asyncio.open_connection("127.0.0.1", server.port)

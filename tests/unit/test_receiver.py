"""Receiver: every answer it gives, that 2xx means written, and that it stops and limits as promised."""

from __future__ import annotations

import asyncio
import hashlib
import json
import logging
import socket
import subprocess

import pytest
from pydantic import SecretStr

from schemas.failure import ConfigurationError, Failure, FailureKind, TemporaryError
from schemas.keys import HmacKey
from schemas.tenancy import Account
from sources.contract import Gateway, RawEvent, Refusal, Status, Verdict
from sources.intake import Intake
from sources.payments.stripe import GATEWAY as STRIPE
from sources.receiver import (
    AccountWithoutGateway,
    Answer,
    ReceiverAddressTaken,
    ReceiverTlsBroken,
    Tls,
    build_app,
    serve,
)

NOW = 1_767_322_245
PATH = "/webhooks/stripe/north"
LIMIT = 2000
SECRET = "whsec_north"


def sign(body, secret=SECRET, signed_at=NOW):
    """With openssl, which shares no code with the receiver."""
    command = ["openssl", "dgst", "-sha256", "-hmac", secret, "-r"]
    digest = subprocess.run(command, input=b"%d." % signed_at + body, capture_output=True, check=True).stdout
    return f"t={signed_at},v1={digest.split()[0].decode()}"


def build_body(number=1, **members):
    resource = {"id": f"ch_{number}", "payment_intent": f"pi_{number}", "amount": 1250, **members}
    return json.dumps(
        {"id": f"evt_{number}", "type": "charge.succeeded", "created": NOW, "data": {"object": resource}}
    ).encode()


class FakePublisher:
    def __init__(self):
        self.records = []
        self.error = None
        self.gate = None
        self.entered = asyncio.Queue()

    async def publish(self, topic, key, value, headers):
        self.entered.put_nowait(key)
        if self.gate is not None:
            await self.gate.wait()
        if self.error is not None:
            raise self.error
        self.records.append((topic, key, value, dict(headers)))


class Edge:
    def __init__(self, **options):
        self.publisher = FakePublisher()
        self.counted = []
        self.received = 0
        accounts = [
            Account(name="north", source="stripe", facility="north_clinic", secrets=(SecretStr("whsec_north"),)),
            Account(
                name="south",
                source="stripe",
                facility="south_clinic",
                secrets=(SecretStr("whsec_old"), SecretStr("whsec_new")),
                tolerance_seconds=60,
            ),
        ]
        gateway = Gateway(
            name="stripe",
            display_name="Stripe",
            status=Status.SANDBOX,
            documentation="x",
            verify=STRIPE.verify,
            split=STRIPE.split,
            sensitive_members=frozenset({"name"}),
            max_body_bytes=LIMIT,
        )
        options.setdefault("gateways", {"stripe": gateway})
        options.setdefault("accounts", accounts)
        intake = Intake(self.publisher, HmacKey(b"k" * 32), clock=lambda: float(NOW), count=self.count)
        self.app = build_app(intake=intake, count=self.count, clock=lambda: float(NOW), **options)

    def count(self, name, **labels):
        self.counted.append((name, labels))

    @property
    def refused(self):
        return [labels for name, labels in self.counted if name == "refused_total"]

    async def send(self, *chunks, path=PATH, method="POST", headers=None, hang=False):
        """Returns (status, headers, parsed body). ``hang``: the last chunk is followed by nothing."""
        answers = []
        pending = list(chunks) or [b""]

        async def receive():
            if not pending:
                if hang:
                    await asyncio.Event().wait()
                return {"type": "http.disconnect"}
            self.received += 1
            chunk = pending.pop(0)
            return {"type": "http.request", "body": chunk, "more_body": bool(pending) or hang}

        async def send(message):
            answers.append(message)

        pairs = [(key.encode(), value.encode("latin-1")) for key, value in (headers or {}).items()]
        await self.app({"type": "http", "method": method, "path": path, "headers": pairs}, receive, send)
        assert [message["type"] for message in answers] == ["http.response.start", "http.response.body"]
        answer_headers = dict(answers[0]["headers"])
        assert int(answer_headers[b"content-length"]) == len(answers[1]["body"])
        return answers[0]["status"], answer_headers, json.loads(answers[1]["body"])

    async def deliver(self, body, *, path=PATH, signature=None, **headers):
        headers = {"stripe-signature": signature or sign(body), "content-type": "application/json"} | headers
        return await self.send(body, path=path, headers=headers)


@pytest.fixture
def edge():
    return Edge()


# Accepted


async def test_signed_delivery_is_written_then_answered(edge):
    body = build_body()
    status, _, answer = await edge.deliver(body)
    assert (status, answer) == (200, {"accepted": 1})
    ((topic, key, value, headers),) = edge.publisher.records
    assert (topic, key, value) == ("raw.stripe", b"north/pi_1", body)
    assert headers["account"] == b"north"
    assert headers["facility"] == b"north_clinic"
    assert headers["verdict"] == f"stripe-v1;key=1;signed_at={NOW}".encode()
    assert headers["content-type"] == b"application/json"
    assert edge.counted == [("raw_accepted_total", {"source": "stripe", "facility": "north_clinic"})]
    assert edge.app.in_flight == 0


async def test_answer_waits_for_the_acknowledgement(edge):
    edge.publisher.gate = asyncio.Event()
    running = asyncio.create_task(edge.deliver(build_body()))
    await edge.publisher.entered.get()
    for _ in range(20):
        await asyncio.sleep(0)
    assert not running.done()
    edge.publisher.gate.set()
    assert (await running)[0] == 200


async def test_each_account_has_its_own_secrets_facility_and_tolerance(edge):
    body = build_body()
    south = "/webhooks/stripe/south"
    assert (await edge.deliver(body, path=south, signature=sign(body, "whsec_new")))[0] == 200
    assert (await edge.deliver(body, path=south, signature=sign(body, "whsec_old")))[0] == 200
    assert (await edge.deliver(body, path=south, signature=sign(body, "whsec_north")))[0] == 401
    assert (await edge.deliver(body, path=south, signature=sign(body, "whsec_new", NOW - 61)))[0] == 401
    assert (await edge.deliver(body, signature=sign(body, signed_at=NOW - 61)))[0] == 200
    keys = [record[1] for record in edge.publisher.records]
    assert keys == [b"south/pi_1", b"south/pi_1", b"north/pi_1"]
    assert [record[3]["verdict"][:15] for record in edge.publisher.records[:2]] == [
        b"stripe-v1;key=2",
        b"stripe-v1;key=1",
    ]


async def test_body_in_pieces_is_joined(edge):
    body = build_body()
    headers = {"stripe-signature": sign(body)}
    assert (await edge.send(body[:10], b"", body[10:], headers=headers))[0] == 200
    assert edge.publisher.records[0][2] == body


async def test_personal_members_and_cards_are_redacted_before_publishing(edge):
    body = build_body(name="Ann Lee", note="card 4242 4242 4242 4242")
    assert (await edge.deliver(body))[0] == 200
    resource = json.loads(edge.publisher.records[0][2])["data"]["object"]
    assert (resource["name"], resource["note"]) == ("[redacted]", "card [card redacted]")
    assert {labels["kind"] for name, labels in edge.counted if name == "redactions_total"} == {"card", "member"}


async def test_broken_json_well_signed_is_published_whole_by_digest(edge):
    body = build_body()[:-5]
    status, _, answer = await edge.deliver(body)
    assert (status, answer) == (200, {"accepted": 1})
    _, key, value, headers = edge.publisher.records[0]
    assert value == body
    assert key.decode() == f"north/{hashlib.sha256(body).hexdigest()}"
    assert headers["ce_type"] == b"unparsed"


async def test_empty_body_well_signed_is_published(edge):
    assert (await edge.deliver(b"", signature=sign(b"")))[0] == 200
    assert edge.publisher.records[0][2] == b""


# Refused


async def assert_refused(edge, result, status, reason, source="stripe"):
    assert (result[0], result[2]) == (status, {"refused": reason})
    assert edge.publisher.records == []
    assert edge.counted == [("refused_total", {"source": source, "reason": reason})]
    assert edge.app.in_flight == 0


@pytest.mark.parametrize(
    "path",
    ["/webhooks/stripe/west", "/webhooks/square/north", "/webhooks/stripe/north/", "/webhooks/stripe", "/", "/x/4111"],
)
async def test_unknown_source_or_account_is_404(edge, path):
    body = build_body()
    result = await edge.deliver(body, path=path)
    await assert_refused(edge, result, 404, "unknown_account", source="unknown")
    assert edge.received == 0


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "HEAD", "OPTIONS"])
async def test_wrong_method_is_405(edge, method):
    result = await edge.send(method=method)
    assert result[1][b"allow"] == b"POST"
    await assert_refused(edge, result, 405, "wrong_method")


async def test_bad_signature_is_401(edge):
    body = build_body()
    await assert_refused(edge, await edge.deliver(body, signature=sign(body, "whsec_x")), 401, "signature_wrong")


async def test_missing_signature_is_401(edge):
    await assert_refused(edge, await edge.send(build_body()), 401, "signature_missing")


async def test_malformed_signature_is_401(edge):
    await assert_refused(edge, await edge.deliver(build_body(), signature="v1=x"), 401, "signature_malformed")


@pytest.mark.parametrize("distance", [-301, 301])
async def test_stale_timestamp_is_401(edge, distance):
    body = build_body()
    result = await edge.deliver(body, signature=sign(body, signed_at=NOW + distance))
    await assert_refused(edge, result, 401, "timestamp_stale")


async def test_declared_length_over_the_limit_is_413_and_nothing_is_read(edge):
    body = b"x" * (LIMIT + 1)
    result = await edge.deliver(body, signature="t=1,v1=x", **{"content-length": str(len(body))})
    assert result[1][b"connection"] == b"close"
    assert edge.received == 0
    await assert_refused(edge, result, 413, "too_large")


async def test_undeclared_length_over_the_limit_is_413_at_the_first_byte_too_many(edge):
    result = await edge.send(b"x" * LIMIT, b"x", *[b"x" * 1000] * 50)
    assert edge.received == 2
    await assert_refused(edge, result, 413, "too_large")


async def test_body_of_exactly_the_limit_is_read(edge):
    body = build_body(note="")
    body = build_body(note="x" * (LIMIT - len(body)))
    assert len(body) == LIMIT
    assert (await edge.deliver(body, **{"content-length": str(LIMIT)}))[0] == 200


@pytest.mark.parametrize("encoding", ["gzip", "deflate", "br", "identity, gzip"])
async def test_encoded_body_is_415(edge, encoding):
    result = await edge.deliver(build_body(), **{"content-encoding": encoding})
    assert edge.received == 0
    await assert_refused(edge, result, 415, "content_encoding")


async def test_identity_encoding_is_fine(edge):
    assert (await edge.deliver(build_body(), **{"content-encoding": "Identity"}))[0] == 200


async def test_kafka_down_is_503_with_retry_after(edge):
    edge.publisher.error = TemporaryError("not acknowledged.", place="raw.stripe")
    result = await edge.deliver(build_body())
    assert int(result[1][b"retry-after"]) > 0
    await assert_refused(edge, result, 503, "not_written")


async def test_unexpected_error_is_500_without_its_text(edge, caplog, capsys):
    edge.publisher.error = RuntimeError("4242424242424242 of Ann")
    result = await edge.deliver(build_body())
    assert "Ann" not in caplog.text + "".join(capsys.readouterr())
    await assert_refused(edge, result, 500, "internal")


async def test_over_the_limit_of_requests_is_503(caplog):
    edge = Edge(max_in_flight=2)
    edge.publisher.gate = asyncio.Event()
    running = [asyncio.create_task(edge.deliver(build_body(number))) for number in (1, 2)]
    await edge.publisher.entered.get()
    await edge.publisher.entered.get()
    assert edge.app.in_flight == 2
    status, headers, answer = await edge.deliver(build_body(3))
    assert (status, answer, headers[b"retry-after"]) == (503, {"refused": "overloaded"}, b"1")
    edge.publisher.gate.set()
    assert [(await task)[0] for task in running] == [200, 200]
    assert (await edge.deliver(build_body(3)))[0] == 200
    assert len(edge.publisher.records) == 3


async def test_slow_body_is_408_and_frees_its_place():
    edge = Edge(body_seconds=0.02)
    result = await edge.send(b"{", hang=True)
    await assert_refused(edge, result, 408, "too_slow")


async def test_sender_gone_before_the_end_publishes_nothing(edge):
    answers = []
    messages = [{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        answers.append(message)

    await edge.app({"type": "http", "method": "POST", "path": PATH, "headers": []}, receive, send)
    assert edge.publisher.records == []
    assert edge.refused == [{"source": "stripe", "reason": "cut_off"}]
    assert edge.app.in_flight == 0


async def test_account_of_an_unknown_gateway_is_refused_at_start():
    with pytest.raises(AccountWithoutGateway) as raised:
        Edge(gateways={})
    assert "north" in str(raised.value)


# Connectors that split, and connectors that fail


def build_gateway(split, *, refusal=None):
    def verify(body, headers, *, secrets, now, tolerance):
        return Verdict(refusal, "test", "1")

    return Gateway(
        name="batch", display_name="Batch", status=Status.SANDBOX, documentation="x", verify=verify, split=split
    )


def build_batch_edge(split, **options):
    account = Account(name="north", source="batch", facility="clinic", secrets=(SecretStr("s"),))
    return Edge(gateways={"batch": build_gateway(split, **options)}, accounts=[account])


def split_lines(body):
    return [
        RawEvent(key=line.decode(), body=line, delivery_id=f"d{number}", event_type="t", occurred_at=None)
        for number, line in enumerate(body.split())
    ]


async def test_batch_becomes_one_record_per_event_with_its_exact_slice():
    edge = build_batch_edge(split_lines)
    assert (await edge.send(b"a b a", path="/webhooks/batch/north"))[2] == {"accepted": 3}
    assert [(record[1], record[2]) for record in edge.publisher.records] == [
        (b"north/a", b"a"), (b"north/b", b"b"), (b"north/a", b"a")
    ]  # fmt: skip
    assert len(edge.counted) == 3


async def test_empty_batch_is_accepted():
    edge = build_batch_edge(split_lines)
    assert (await edge.send(b"", path="/webhooks/batch/north"))[::2] == (200, {"accepted": 0})


async def test_batch_with_one_event_not_acknowledged_is_503():
    edge = build_batch_edge(split_lines)
    edge.publisher.error = TemporaryError("x.", place="raw.batch")
    assert (await edge.send(b"a b", path="/webhooks/batch/north"))[0] == 503


@pytest.mark.parametrize("error", [Failure(FailureKind.INVALID, "X"), RuntimeError("bug"), RecursionError()])
async def test_body_is_kept_whole_when_a_connector_cannot_split_it(error):
    def split(body):
        raise error

    edge = build_batch_edge(split)
    assert (await edge.send(b"a b", path="/webhooks/batch/north"))[0] == 200
    assert [record[2] for record in edge.publisher.records] == [b"a b"]


async def test_every_refusal_of_a_signature_is_401_with_its_reason():
    for refusal in Refusal:
        edge = build_batch_edge(split_lines, refusal=refusal)
        status, _, answer = await edge.send(b"a", path="/webhooks/batch/north")
        assert (status, answer) == (401, {"refused": refusal.value})
        assert edge.publisher.records == []


# Pages


async def test_pages_answer_get_and_head_only():
    async def ready():
        return Answer(503, b'{"ready":false}')

    def broken():
        raise RuntimeError("text of the error")

    live = Answer(200, b'{"live":true}')
    edge = Edge(pages={"/health/live": lambda: live, "/health/ready": ready, "/metrics": broken})
    assert (await edge.send(path="/health/live", method="GET"))[::2] == (200, {"live": True})
    assert (await edge.send(path="/health/ready", method="HEAD"))[0] == 503
    assert (await edge.send(path="/health/ready", method="POST"))[0] == 405
    assert (await edge.send(path="/metrics", method="GET"))[::2] == (503, {})
    assert edge.counted == []


async def test_lifespan_is_answered_and_websockets_are_closed(edge):
    sent = []
    messages = [{"type": "lifespan.startup"}, {"type": "lifespan.shutdown"}]

    async def receive():
        return messages.pop(0)

    async def send(message):
        sent.append(message["type"])

    await edge.app({"type": "lifespan"}, receive, send)
    await edge.app({"type": "websocket", "path": PATH}, receive, send)
    assert sent == ["lifespan.startup.complete", "lifespan.shutdown.complete", "websocket.close"]


# On a socket


class Listening:
    """The receiver on a free port, for the time of a with block."""

    def __init__(self, edge, **options):
        self.edge = edge
        self.options = options
        self.stop = asyncio.Event()

    async def __aenter__(self):
        port = asyncio.get_running_loop().create_future()
        self.task = asyncio.create_task(
            serve(self.edge.app, "127.0.0.1", 0, stop=self.stop, on_ready=port.set_result, **self.options)
        )
        self.port = await asyncio.wait_for(port, 10)
        return self

    async def __aexit__(self, *_):
        self.stop.set()
        await asyncio.wait_for(self.task, 20)

    async def open(self):
        return await asyncio.open_connection("127.0.0.1", self.port)


def build_request(body, *lines, path=PATH):
    head = [f"POST {path} HTTP/1.1", "Host: x", "Content-Type: application/json", *lines]
    return "\r\n".join([*head, "", ""]).encode() + body


async def read_answer(reader):
    head = await asyncio.wait_for(reader.readuntil(b"\r\n\r\n"), 10)
    length = next(
        int(line.split(b":")[1]) for line in head.lower().split(b"\r\n") if line.startswith(b"content-length")
    )
    return int(head.split()[1]), head.lower(), await reader.readexactly(length)


async def test_real_requests_keep_the_connection_and_any_header_case(edge):
    async with Listening(edge) as listening:
        assert listening.port > 0
        reader, writer = await listening.open()
        for number, header in enumerate(("Stripe-Signature", "STRIPE-SIGNATURE", "stripe-signature")):
            body = build_body(number)
            writer.write(build_request(body, f"{header}: {sign(body)}", f"Content-Length: {len(body)}"))
            status, head, answer = await read_answer(reader)
            assert (status, json.loads(answer)) == (200, {"accepted": 1})
            assert b"server:" not in head
        body = build_body(9)
        half = len(body) // 2
        chunks = b"%x\r\n%b\r\n%x\r\n%b\r\n0\r\n\r\n" % (half, body[:half], len(body) - half, body[half:])
        writer.write(build_request(chunks, f"Stripe-Signature: {sign(body)}", "Transfer-Encoding: chunked"))
        assert (await read_answer(reader))[0] == 200
        writer.close()
    assert [record[1] for record in edge.publisher.records] == [
        b"north/pi_0",
        b"north/pi_1",
        b"north/pi_2",
        b"north/pi_9",
    ]


async def test_duplicated_header_on_the_wire_is_401(edge):
    async with Listening(edge) as listening:
        reader, writer = await listening.open()
        body = build_body()
        line = f"Stripe-Signature: {sign(body)}"
        writer.write(build_request(body, line, line, f"Content-Length: {len(body)}"))
        assert (await read_answer(reader))[0] == 401
        writer.close()
    assert edge.publisher.records == []


async def test_too_large_on_the_wire_is_answered_early_and_closed(edge):
    async with Listening(edge) as listening:
        reader, writer = await listening.open()
        # The body is announced and never sent: an answer proves that nobody waits for it.
        writer.write(build_request(b"", "Stripe-Signature: x", "Content-Length: 999999999"))
        status, head, _ = await read_answer(reader)
        assert status == 413
        assert b"connection: close" in head
        assert await asyncio.wait_for(reader.read(), 10) == b""
        writer.close()


async def test_stop_finishes_what_is_under_way_and_takes_nothing_new(edge):
    edge.publisher.gate = asyncio.Event()
    async with Listening(edge) as listening:
        reader, writer = await listening.open()
        body = build_body()
        writer.write(build_request(body, f"Stripe-Signature: {sign(body)}", f"Content-Length: {len(body)}"))
        await edge.publisher.entered.get()
        listening.stop.set()
        refused = False
        for _ in range(200):
            try:
                _, other = await listening.open()
            except ConnectionRefusedError:
                refused = True
                break
            other.close()
            await asyncio.sleep(0.02)
        assert refused
        assert not listening.task.done()
        edge.publisher.gate.set()
        assert (await read_answer(reader))[0] == 200
        writer.close()
        await asyncio.wait_for(listening.task, 20)
    assert len(edge.publisher.records) == 1


async def test_stop_after_the_grace_time_gives_no_2xx(edge):
    edge.publisher.gate = asyncio.Event()
    async with Listening(edge, grace_seconds=1) as listening:
        reader, writer = await listening.open()
        body = build_body()
        writer.write(build_request(body, f"Stripe-Signature: {sign(body)}", f"Content-Length: {len(body)}"))
        await edge.publisher.entered.get()
        listening.stop.set()
        answer = await asyncio.wait_for(reader.read(), 20)
        assert not answer.startswith(b"HTTP/1.1 2")
        writer.close()
    assert edge.publisher.records == []
    assert edge.app.in_flight == 0


async def test_nothing_of_a_request_is_logged(edge, caplog, capsys):
    caplog.set_level(logging.DEBUG)
    cut = b'{"Zebediah'
    async with Listening(edge) as listening:
        for body, line in (
            (build_body(note="Zebediah"), "Stripe-Signature: t=1,v1=deadbeefsig"),
            (cut, f"Stripe-Signature: {sign(cut)}"),
            (b"", "Zebediah"),
        ):
            reader, writer = await listening.open()
            writer.write(build_request(body, line, f"Content-Length: {len(body)}", path=f"{PATH}?q=Zebediah"))
            await read_answer(reader)
            writer.close()
        edge.publisher.error = RuntimeError("Zebediah")
        body = build_body()
        reader, writer = await listening.open()
        writer.write(build_request(body, f"Stripe-Signature: {sign(body)}", f"Content-Length: {len(body)}"))
        assert (await read_answer(reader))[0] == 500
        writer.close()
    shown = caplog.text + "".join(capsys.readouterr())
    assert "delivery_failed" in shown
    assert "Zebediah" not in shown
    assert "deadbeefsig" not in shown


async def test_taken_address_and_broken_tls_are_operator_errors(edge, tmp_path):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        with pytest.raises(ReceiverAddressTaken) as raised:
            await serve(edge.app, "127.0.0.1", port, stop=asyncio.Event())
        assert raised.value.place == f"127.0.0.1:{port}"
    broken = tmp_path / "broken.pem"
    broken.write_text("no certificate")
    for path in (broken, tmp_path / "absent.pem"):
        with pytest.raises(ReceiverTlsBroken) as wrong:
            await serve(edge.app, "127.0.0.1", 0, stop=asyncio.Event(), tls=Tls(path, path))
        assert isinstance(wrong.value, ConfigurationError)
        assert wrong.value.place == str(path)


async def test_tls_is_served(edge, tmp_path):
    key, certificate = tmp_path / "key.pem", tmp_path / "certificate.pem"
    command = ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes"]
    command += ["-days", "2", "-subj", "/CN=localhost", "-keyout", str(key), "-out", str(certificate)]
    await asyncio.to_thread(subprocess.run, command, check=True, capture_output=True)
    async with Listening(edge, tls=Tls(certificate, key)) as listening:
        command = ["openssl", "s_client", "-connect", f"127.0.0.1:{listening.port}", "-quiet", "-verify_quiet"]
        body = build_body()
        request = build_request(
            body, f"Stripe-Signature: {sign(body)}", f"Content-Length: {len(body)}", "Connection: close"
        )
        process = await asyncio.create_subprocess_exec(
            *command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL
        )
        process.stdin.write(request)
        await process.stdin.drain()
        answer = await asyncio.wait_for(process.stdout.readuntil(b"}"), 20)
        process.stdin.close()
        await process.wait()
    assert answer.startswith(b"HTTP/1.1 200")
    assert len(edge.publisher.records) == 1

"""The MLLP client against a scripted receiver: whose answer it takes, and what it says about the write."""

import asyncio
import shutil
import socket
import ssl
import subprocess
from contextlib import asynccontextmanager

import pytest
import uvloop

from clients.mllp import MllpClient, MllpFailure
from schemas.failure import FailureKind

MESSAGE = b"MSH|^~\\&|R|H|B|H|20250301||DFT^P03|%s|P|2.5.1\rFT1|1\r"


def build_ack(control_id: bytes, code: bytes = b"AA") -> bytes:
    return b"\x0bMSH|^~\\&|B|H|R|H|20250301||ACK|9|P|2.5.1\rMSA|%s|%s\r\x1c\r" % (code, control_id)


pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture:DeprecationWarning")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request):
    """Both event loops: their transports differ in what they see and when."""
    return request.param()


class Receiver:
    """Answers each message as its script says; a step takes the control id and the stream writer."""

    def __init__(self, *script) -> None:
        self.script = list(script)
        self.messages: list[bytes] = []
        self.connections = 0
        self.closed = asyncio.Queue()

    async def serve(self, reader, writer) -> None:
        self.connections += 1
        try:
            while True:
                frame = await reader.readuntil(b"\x1c\r")
                assert frame.startswith(b"\x0b")
                self.messages.append(frame[1:-2])
                step = self.script.pop(0) if self.script else answer
                await step(frame.split(b"|")[9], writer)
        except (asyncio.IncompleteReadError, ConnectionError):
            pass
        finally:
            writer.close()
            self.closed.put_nowait(None)

    def list_control_ids(self) -> list[bytes]:
        return [message.split(b"|")[9] for message in self.messages]


async def answer(control_id, writer) -> None:
    writer.write(build_ack(control_id))


async def stay_silent(control_id, writer) -> None:
    pass


async def hang_up(control_id, writer) -> None:
    writer.close()


def say(*parts: bytes):
    async def step(control_id, writer):
        for part in parts:
            writer.write(part.replace(b"<id>", control_id))
            await writer.drain()
            await asyncio.sleep(0.01)

    return step


@asynccontextmanager
async def connect(receiver, *, server_tls=None, **settings):
    server = await asyncio.start_server(receiver.serve, "127.0.0.1", 0, ssl=server_tls)
    port = server.sockets[0].getsockname()[1]
    try:
        async with MllpClient("127.0.0.1", port, **settings) as client:
            yield client
    finally:
        server.close()
        await server.wait_closed()


async def fail(client, control_id=b"1", **options) -> MllpFailure:
    with pytest.raises(MllpFailure) as caught:
        await client.send(MESSAGE % control_id, control_id.decode(), **({"deadline": 5} | options))
    return caught.value


def describe(failure: MllpFailure) -> tuple[str, str]:
    return failure.kind, failure.code


async def test_the_answer_comes_back_unframed_and_the_connection_is_kept():
    receiver = Receiver()
    async with connect(receiver) as client:
        for number in (b"1", b"2", b"3"):
            got = await client.send(MESSAGE % number, number.decode(), deadline=5)
            assert got == build_ack(number)[1:-2]
    assert receiver.messages == [MESSAGE % number for number in (b"1", b"2", b"3")]
    assert receiver.connections == 1


@pytest.mark.parametrize("code", [b"AE", b"AR", b"CA", b"CE", b"CR"])
async def test_every_code_is_an_answer(code):
    receiver = Receiver(say(build_ack(b"<id>", code)))
    async with connect(receiver) as client:
        assert b"MSA|" + code in await client.send(MESSAGE % b"1", "1", deadline=5)


async def test_an_answer_in_many_pieces():
    whole = build_ack(b"1")
    receiver = Receiver(say(*(whole[i : i + 20] for i in range(0, len(whole), 20))))
    async with connect(receiver) as client:
        assert await client.send(MESSAGE % b"1", "1", deadline=5) == whole[1:-2]


async def test_a_control_id_with_an_escape_is_compared_by_its_text():
    receiver = Receiver(say(build_ack(b"A\\F\\1")))
    async with connect(receiver) as client:
        assert await client.send(MESSAGE % b"A", "A|1", deadline=5)


class TestNeverSent:
    async def test_nobody_listens(self):
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            calls = []
            async with MllpClient("127.0.0.1", unused.getsockname()[1]) as client:
                failure = await fail(client, before_write=lambda: calls.append(1))
        assert describe(failure) == (FailureKind.UNAVAILABLE, "CONNECT_FAILED")
        assert calls == []

    async def test_unknown_name(self):
        async with MllpClient("no-such-host.invalid", 2575) as client:
            assert describe(await fail(client)) == (FailureKind.UNAVAILABLE, "CONNECT_FAILED")

    async def test_the_deadline_passes_while_waiting_for_a_connection(self):
        receiver = Receiver(stay_silent)
        async with connect(receiver) as client:
            first = asyncio.create_task(fail(client, b"1", deadline=0.5))
            await asyncio.sleep(0.05)
            second = await fail(client, b"2", deadline=0.05)
            assert describe(second) == (FailureKind.UNAVAILABLE, "CONNECT_TIMEOUT")
            assert describe(await first) == (FailureKind.AMBIGUOUS, "NO_ANSWER")
        assert receiver.list_control_ids() == [b"1"]

    async def test_a_call_withdrawn_before_the_write(self):
        class LeaseLost(Exception):
            pass

        def withdraw():
            raise LeaseLost

        receiver = Receiver()
        async with connect(receiver) as client:
            with pytest.raises(LeaseLost):
                await client.send(MESSAGE % b"1", "1", deadline=5, before_write=withdraw)
            await client.send(MESSAGE % b"2", "2", deadline=5)
        assert receiver.list_control_ids() == [b"2"]
        assert receiver.connections == 1

    async def test_a_message_that_would_end_its_own_frame(self):
        receiver = Receiver()
        async with connect(receiver) as client:
            for byte in (b"\x0b", b"\x1c"):
                failure = await fail(client, b"1" + byte)
                assert describe(failure) == (FailureKind.INVALID, "FRAME_BYTES")
        assert receiver.connections == 0


class TestMayHaveLanded:
    @pytest.mark.parametrize(
        ("step", "code"),
        [
            (stay_silent, "NO_ANSWER"),
            (hang_up, "ANSWER_CUT"),
            (say(b"\x0bMSH|^~\\&|B"), "NO_ANSWER"),
            (say(build_ack(b"0")), "ANSWER_MISMATCHED"),
            (say(build_ack(b"")), "ANSWER_MISMATCHED"),
            (say(build_ack(b"<id>", b"OK")), "ANSWER_UNREADABLE"),
            (say(b"\x0bHTTP/1.1 400\x1c\r"), "ANSWER_UNREADABLE"),
            (say(b"noise\x1c\r"), "ANSWER_UNREADABLE"),
            (say(b"noise" + build_ack(b"<id>")), "ANSWER_UNREADABLE"),
            (say(b"\x0b" + b"x" * 1_100_000), "ANSWER_TOO_LONG"),
        ],
    )
    async def test_whatever_is_not_the_answer_closes_the_connection(self, step, code):
        receiver = Receiver(step)
        async with connect(receiver) as client:
            deadline = 0.2 if code == "NO_ANSWER" else 10
            assert describe(await fail(client, deadline=deadline)) == (FailureKind.AMBIGUOUS, code)
            await asyncio.wait_for(receiver.closed.get(), 5)
            assert await client.send(MESSAGE % b"2", "2", deadline=5) == build_ack(b"2")[1:-2]
        assert receiver.connections == 2

    async def test_a_late_answer_is_never_taken_for_the_next_message(self):
        async def answer_late(control_id, writer):
            await asyncio.sleep(0.2)
            writer.write(build_ack(control_id))

        receiver = Receiver(answer_late, stay_silent)
        async with connect(receiver) as client:
            assert describe(await fail(client, b"1", deadline=0.1)) == (FailureKind.AMBIGUOUS, "NO_ANSWER")
            assert describe(await fail(client, b"2", deadline=0.4)) == (FailureKind.AMBIGUOUS, "NO_ANSWER")
        assert receiver.list_control_ids() == [b"1", b"2"]

    async def test_a_cancelled_call_closes_its_connection(self):
        arrived = asyncio.Event()

        async def note(control_id, writer):
            arrived.set()

        receiver = Receiver(note)
        async with connect(receiver) as client:
            call = asyncio.create_task(client.send(MESSAGE % b"1", "1", deadline=30))
            await arrived.wait()
            call.cancel()
            with pytest.raises(asyncio.CancelledError):
                await call
            await asyncio.wait_for(receiver.closed.get(), 5)
            await client.send(MESSAGE % b"2", "2", deadline=5)
        assert receiver.connections == 2


class TestKeptConnections:
    @pytest.mark.parametrize("extra", [build_ack(b"<id>"), b"\r\n", build_ack(b"1", b"CA")])
    async def test_more_than_the_answer_spoils_the_connection_not_the_answer(self, extra):
        receiver = Receiver(say(build_ack(b"<id>") + extra))
        async with connect(receiver) as client:
            assert await client.send(MESSAGE % b"1", "1", deadline=5) == build_ack(b"1")[1:-2]
            assert await client.send(MESSAGE % b"2", "2", deadline=5) == build_ack(b"2")[1:-2]
        assert receiver.connections == 2

    async def test_an_answer_that_comes_while_idle_spoils_the_connection(self):
        receiver = Receiver(say(build_ack(b"<id>"), build_ack(b"2")))
        async with connect(receiver) as client:
            await client.send(MESSAGE % b"1", "1", deadline=5)
            await asyncio.wait_for(receiver.closed.get(), 5)
            await client.send(MESSAGE % b"2", "2", deadline=5)
        assert receiver.list_control_ids() == [b"1", b"2"]
        assert receiver.connections == 2

    async def test_a_connection_closed_while_idle_is_replaced_before_the_write(self):
        async def answer_and_leave(control_id, writer):
            await answer(control_id, writer)
            writer.close()

        receiver = Receiver(*[answer_and_leave] * 5)
        async with connect(receiver) as client:
            for number in (b"1", b"2", b"3", b"4", b"5"):
                await client.send(MESSAGE % number, number.decode(), deadline=5)
                await asyncio.wait_for(receiver.closed.get(), 5)
        assert receiver.list_control_ids() == [b"1", b"2", b"3", b"4", b"5"]

    @pytest.mark.parametrize("last_words", [b"", build_ack(b"2")])
    async def test_what_the_event_loop_has_not_seen_yet_counts_too(self, last_words):
        loop = asyncio.get_running_loop()
        with socket.create_server(("127.0.0.1", 0)) as server:
            server.setblocking(False)
            async with MllpClient("127.0.0.1", server.getsockname()[1]) as client:
                received = []
                for number in (b"1", b"2"):
                    call = asyncio.create_task(client.send(MESSAGE % number, number.decode(), deadline=5))
                    connection, _ = await asyncio.wait_for(loop.sock_accept(server), 5)
                    with connection:
                        received.append(await loop.sock_recv(connection, 4096))
                        await loop.sock_sendall(connection, build_ack(number))
                        assert await call == build_ack(number)[1:-2]
                        # These bytes and the end are in the kernel when the next call starts.
                        connection.setblocking(True)
                        connection.sendall(last_words)
        assert received == [b"\x0b" + MESSAGE % number + b"\x1c\r" for number in (b"1", b"2")]

    @pytest.mark.parametrize("connections", [1, 3])
    async def test_one_message_in_flight_per_connection(self, connections):
        running = highest = 0

        async def answer_slowly(control_id, writer):
            nonlocal running, highest
            running += 1
            highest = max(highest, running)
            await asyncio.sleep(0.02)
            running -= 1
            writer.write(build_ack(control_id))

        receiver = Receiver(*[answer_slowly] * 9)
        async with connect(receiver, connections=connections) as client:
            await asyncio.gather(
                *(client.send(MESSAGE % number, number.decode(), deadline=5) for number in map(b"%d".__mod__, range(9)))
            )
        assert highest == connections
        assert receiver.connections == connections
        assert sorted(receiver.list_control_ids()) == [b"%d" % number for number in range(9)]

    async def test_closing_lets_go_of_idle_connections(self):
        receiver = Receiver()
        async with connect(receiver) as client:
            await client.send(MESSAGE % b"1", "1", deadline=5)
            await client.close()
            await asyncio.wait_for(receiver.closed.get(), 5)


@pytest.fixture(scope="module")
def certificate(tmp_path_factory):
    if shutil.which("openssl") is None:
        pytest.skip("no openssl")
    folder = tmp_path_factory.mktemp("tls")
    key, cert = folder / "key.pem", folder / "cert.pem"
    subprocess.run(
        ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days", "2",
         "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
        check=True, capture_output=True,
    )  # fmt: skip
    server = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server.load_cert_chain(cert, key)
    return server, cert


class TestTls:
    async def test_a_trusted_receiver(self, certificate):
        server_tls, cert = certificate
        receiver = Receiver()
        async with connect(receiver, server_tls=server_tls, tls=ssl.create_default_context(cafile=cert)) as client:
            for number in (b"1", b"2"):
                assert await client.send(MESSAGE % number, number.decode(), deadline=5) == build_ack(number)[1:-2]
        assert receiver.connections == 1

    async def test_an_untrusted_receiver_gets_nothing(self, certificate):
        receiver = Receiver()
        async with connect(receiver, server_tls=certificate[0], tls=ssl.create_default_context()) as client:
            assert describe(await fail(client)) == (FailureKind.UNAVAILABLE, "TLS_FAILED")
        assert receiver.messages == []

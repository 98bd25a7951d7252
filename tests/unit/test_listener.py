"""The MLLP listener: what it publishes, when it answers, and what it survives."""

import asyncio
import random
import shutil
import socket
import ssl
import subprocess
from collections import Counter
from contextlib import asynccontextmanager
from itertools import pairwise

import pytest
import uvloop
from hypothesis import example, given
from hypothesis import strategies as st

from schemas.failure import TemporaryError
from schemas.formats.mllp import Deframer
from schemas.tenancy import Authority, Facility, Feed, Tenancy
from sources.listener import Listener, ListenerUnavailable
from telemetry.metrics import Metrics

TENANCY = Tenancy(
    tenant="acme",
    facilities=(
        Facility(
            id="north",
            time_zone="America/Chicago",
            default_authority="NORTH",
            authorities=(Authority(name="NORTH"),),
        ),
    ),
    feeds=(
        Feed(name="north-adt", facility="north", sending_application="ADT", sending_facility="NORTH GENERAL"),
        Feed(name="lab", facility="north", sending_application="LAB^1.2.3^ISO", sending_facility="NORTH GENERAL"),
    ),
)

NOW = 1_740_900_000.5


pytestmark = pytest.mark.filterwarnings("ignore:Overriding the .event_loop_policy. fixture:DeprecationWarning")


@pytest.fixture(params=[asyncio.DefaultEventLoopPolicy, uvloop.EventLoopPolicy], ids=["asyncio", "uvloop"])
def event_loop_policy(request):
    """Both event loops: their transports differ in what they see and when."""
    return request.param()


def build_message(
    control_id="M1", *, kind="ADT^A01^ADT_A01", sender="ADT|NORTH GENERAL", asks="|", version="2.5.1", body="PID|1||7"
) -> bytes:
    head = rf"MSH|^~\&|{sender}|R|HUB|20250301083000||{kind}|{control_id}|P|{version}|||{asks}"
    return f"{head}\r{body}\r".encode()


def frame(message: bytes) -> bytes:
    return b"\x0b" + message + b"\x1c\r"


class FakeIntake:
    """Keeps what is published; ``obstacle`` is awaited before and may raise."""

    def __init__(self) -> None:
        self.published = []
        self.obstacle = None

    async def publish(self, **record):
        if self.obstacle is not None:
            await self.obstacle()
        self.published.append(record)

    def list_control_ids(self):
        return [event.delivery_id for record in self.published for event in record["events"]]


class Peer:
    """A sender: writes bytes, reads frames."""

    def __init__(self, reader, writer) -> None:
        self.reader, self.writer = reader, writer

    def send(self, data: bytes) -> None:
        self.writer.write(data)

    async def read(self) -> dict[str, list[str]]:
        """Segments of the next answer by name, split at field separators."""
        data = await asyncio.wait_for(self.reader.readuntil(b"\x1c\r"), 5)
        assert data.startswith(b"\x0b")
        assert data.count(b"\x0b") == 1
        return {line[:3]: line.split("|") for line in data[1:-2].decode().split("\r") if line}

    async def read_codes(self, number: int) -> list[tuple[str, str]]:
        return [tuple((await self.read())["MSA"][1:3]) for _ in range(number)]

    async def is_closed(self) -> bool:
        """Whether the listener ended the connection without another byte."""
        try:
            return await asyncio.wait_for(self.reader.read(), 5) == b""
        except ConnectionError:
            return True


class Desk:
    """A running listener with its fake intake and the counts it reported."""

    def __init__(self, **settings) -> None:
        self.intake = FakeIntake()
        self.counts = Counter()
        self.settings = settings
        self.peers = []
        self.metrics = Metrics(strict=True)
        self.listener = self.build()

    def build(self) -> Listener:
        return Listener(
            TENANCY,
            self.intake,
            count=self.count,
            **({"host": "127.0.0.1", "port": 0, "clock": lambda: NOW} | self.settings),
        )

    def count(self, name, /, **labels):
        self.metrics.count(name, **labels)  # raises for a metric or label that does not exist
        self.counts[name, *sorted(labels.items())] += 1

    def counted(self, name, **labels) -> int:
        return self.counts[name, *sorted(labels.items())]

    async def stop(self) -> None:
        await self.listener.stop()
        for peer in self.peers:
            peer.writer.close()
        await asyncio.sleep(0)

    async def call(self, **options) -> Peer:
        peer = Peer(*await asyncio.open_connection("127.0.0.1", self.listener.port, **options))
        self.peers.append(peer)
        return peer


@asynccontextmanager
async def run(**settings):
    desk = Desk(**settings)
    await desk.listener.start()
    try:
        yield desk
    finally:
        await desk.stop()


class TestPublishing:
    async def test_what_is_published_before_the_answer(self):
        async with run() as desk:
            peer = await desk.call()
            message = build_message("00017", body="PID|1||7\rZZZ|\xe9")
            peer.send(frame(message))
            answer = await peer.read()
        assert answer["MSA"] == ["MSA", "AA", "00017"]
        assert answer["MSH"][2:6] == ["R", "HUB", "ADT", "NORTH GENERAL"]
        (record,) = desk.intake.published
        (event,) = record.pop("events")
        assert record == {
            "source": "hl7",
            "account": "north-adt",
            "facility": "north",
            "content_type": "x-application/hl7-v2+er7",
            "verdict": "mllp;peer=127.0.0.1",
        }
        assert (event.key, event.body, event.delivery_id, event.event_type) == (
            "north-adt",
            message,
            "00017",
            "ADT^A01",
        )
        assert event.occurred_at == 1_740_839_400.0  # 08:30 in Chicago
        assert desk.counted("mllp_messages_total", feed="north-adt", answer="AA") == 1

    async def test_no_answer_before_the_write_is_durable(self):
        async with run() as desk:
            durable = asyncio.Event()
            desk.intake.obstacle = durable.wait
            peer = await desk.call()
            peer.send(frame(build_message()))
            with pytest.raises(TimeoutError):
                await asyncio.wait_for(peer.reader.read(1), 0.1)
            durable.set()
            assert await peer.read_codes(1) == [("AA", "M1")]

    @pytest.mark.parametrize(
        ("error", "reason"),
        [
            (TemporaryError("Kafka does not answer.", place="kafka"), "not_durable"),
            (RuntimeError("anything else"), "internal"),
        ],
    )
    async def test_without_a_durable_write_there_is_no_answer_and_the_connection_closes(self, error, reason):
        async def refuse():
            raise error

        async with run() as desk:
            desk.intake.obstacle = refuse
            peer = await desk.call()
            peer.send(frame(build_message("M1")) + frame(build_message("M2")))
            assert await peer.is_closed()
            assert desk.counted("refused_total", source="hl7", reason=reason) == 1
            desk.intake.obstacle = None
            again = await desk.call()
            again.send(frame(build_message("M1")))
            assert await again.read_codes(1) == [("AA", "M1")]
        assert desk.intake.list_control_ids() == ["M1"]

    @pytest.mark.parametrize("kind", ["ADT^A03", "ADT^A28", "ORU^R01^ORU_R01", "DFT^P03", "ADT"])
    async def test_every_message_of_a_known_sender_is_kept(self, kind):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message(kind=kind)))
            assert await peer.read_codes(1) == [("AA", "M1")]
        assert desk.intake.published[0]["events"][0].event_type == "^".join(kind.split("^")[:2])

    async def test_a_body_nobody_can_read_is_kept_all_the_same(self):
        async with run() as desk:
            peer = await desk.call()
            message = build_message(body="PID|1||\x81\x8d").replace(b"\xc2", b"") + b"broken line\r\xff\x0b\x1c"
            peer.send(frame(message))
            assert await peer.read_codes(1) == [("AA", "M1")]
        assert desk.intake.published[0]["events"][0].body == message

    @pytest.mark.parametrize("mark", [b"\r\n", b"\xef\xbb\xbf", b"\n\xef\xbb\xbf"])
    async def test_what_stands_before_the_header_is_kept_and_does_no_harm(self, mark):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(mark + build_message()))
            assert await peer.read_codes(1) == [("AA", "M1")]
        assert desk.intake.published[0]["events"][0].body == mark + build_message()

    async def test_a_sender_known_by_its_whole_field(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message(sender="LAB^1.2.3^ISO|NORTH GENERAL")))
            peer.send(frame(build_message(sender="ADT^9.9^ISO|NORTH GENERAL^1.1^ISO")))
            assert await peer.read_codes(2) == [("AA", "M1")] * 2
        assert [record["account"] for record in desk.intake.published] == ["lab", "north-adt"]

    async def test_a_wrong_clock_of_the_sender_is_no_fault(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message().replace(b"20250301083000", b"noon")))
            assert await peer.read_codes(1) == [("AA", "M1")]
        assert desk.intake.published[0]["events"][0].occurred_at is None


class TestAnswers:
    """Table 0155: AL always, NE never, ER on error or rejection, SU on success; both blank is the original mode."""

    @pytest.mark.parametrize(
        ("asks", "good", "bad"),
        [
            ("|", ["AA"], ["AR"]),
            ('""|""', ["AA"], ["AR"]),
            ("AL|NE", ["CA"], ["CR"]),
            ("al|ne", ["CA"], ["CR"]),
            ("AL|", ["CA"], ["CR"]),
            ("AL|AL", ["CA", "AA"], ["CR"]),
            ("AL|SU", ["CA", "AA"], ["CR"]),
            ("AL|ER", ["CA"], ["CR"]),
            ("NE|AL", ["AA"], ["AR"]),
            ("|AL", ["AA"], ["AR"]),
            ("NE|SU", ["AA"], []),
            ("NE|ER", [], ["AR"]),
            ("ER|NE", [], ["CR"]),
            ("ER|AL", ["AA"], ["CR"]),
            ("SU|NE", ["CA"], []),
            ("SU|ER", ["CA"], ["AR"]),
            ("NE|NE", [], []),
            ("XX|NE", ["CA"], ["CR"]),
        ],
    )
    async def test_conditions(self, asks, good, bad):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message("G", asks=asks)))
            peer.send(frame(build_message("B", asks=asks, sender="WHO|KNOWS")))
            peer.send(frame(build_message("END")))
            expected = [(code, "G") for code in good] + [(code, "B") for code in bad] + [("AA", "END")]
            assert await peer.read_codes(len(expected)) == expected
        assert desk.intake.list_control_ids() == ["G", "END"]

    @pytest.mark.parametrize(
        ("message", "reason", "condition"),
        [
            (build_message("1", sender="WHO|NORTH GENERAL"), "unknown_sender", "204"),
            (build_message("1", sender="ADT|SOUTH"), "unknown_sender", "204"),
            (build_message("1", sender="|"), "unknown_sender", "204"),
            (build_message("1", kind=""), "message_type_missing", "101"),
            (build_message("1", kind="Quincy Plover^A01"), "message_type_invalid", "200"),
            (build_message("1") + build_message("2"), "several_messages", "100"),
            (build_message("1") + b"FHS|^~\\&|ADT", "several_messages", "100"),
            (build_message("1", body="PID|1||" + "7" * 3000), "too_long", "207"),
        ],
    )
    async def test_rejections_name_the_condition_and_are_not_published(self, message, reason, condition):
        async with run(max_message_bytes=2000) as desk:
            peer = await desk.call()
            peer.send(frame(message) + frame(build_message("2")))
            answer = await peer.read()
            assert answer["MSA"][1:3] == ["AR", "1"]
            assert answer["ERR"][3].split("^")[0] == condition
            assert "Quincy" not in str(answer)
            assert await peer.read_codes(1) == [("AA", "2")]
        assert desk.counted("refused_total", source="hl7", reason=reason) == 1
        assert desk.intake.list_control_ids() == ["2"]

    async def test_without_a_control_id_the_answer_names_none(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message("")) + frame(build_message("", asks="AL|NE")))
            assert await peer.read_codes(2) == [("AR", ""), ("CR", "")]
        assert desk.intake.published == []

    @pytest.mark.parametrize("wrapper", ["FHS", "BHS"])
    async def test_a_batch_is_rejected_by_its_own_id(self, wrapper):
        async with run() as desk:
            peer = await desk.call()
            head = rf"{wrapper}|^~\&|ADT|NORTH GENERAL|R|HUB|20250301||||B12".encode()
            peer.send(frame(head + b"\r" + build_message() + b"BTS|1\r"))
            assert await peer.read_codes(1) == [("AR", "B12")]
        assert desk.intake.published == []
        assert desk.counted("refused_total", source="hl7", reason="batch") == 1

    async def test_an_answer_is_not_answered(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message("1", kind="ACK^A01", body="MSA|AA|9")) + frame(build_message("2")))
            assert await peer.read_codes(1) == [("AA", "2")]
        assert desk.intake.list_control_ids() == ["2"]

    async def test_a_frame_without_a_header_closes_the_connection(self):
        async with run() as desk:
            for content in (b"", b"GET / HTTP/1.1", b"PID|1||7", b"MSH||ADT"):
                peer = await desk.call()
                peer.send(frame(content))
                assert await peer.is_closed()
        assert desk.counted("refused_total", source="hl7", reason="header_unreadable") == 4
        assert desk.intake.published == []


class TestRepeats:
    async def test_equal_bytes_get_the_same_answer_and_are_published_again(self):
        ticks = iter(range(1_740_900_000, 1_740_999_999))
        async with run(clock=lambda: next(ticks)) as desk:
            answers = []
            for _ in range(2):
                peer = await desk.call()
                peer.send(frame(build_message(asks="AL|AL")))
                answers.append([await peer.reader.readuntil(b"\x1c\r") for _ in range(2)])
            assert answers[0] == answers[1]
            assert desk.counted("mllp_repeats_total", feed="north-adt") == 1
            other = await desk.call()
            other.send(frame(build_message(asks="AL|AL", body="PID|1||8")))
            assert await other.reader.readuntil(b"\x1c\r") != answers[0][0]
        assert desk.intake.list_control_ids() == ["M1"] * 3

    async def test_after_a_restart_the_code_is_the_same(self):
        good, bad = build_message("1", asks="AL|NE"), build_message("2", kind="")
        seen = []
        for _ in range(2):
            async with run() as desk:
                peer = await desk.call()
                peer.send(frame(good) + frame(bad))
                seen.append(await peer.read_codes(2))
        assert seen == [[("CA", "1"), ("AR", "2")]] * 2

    async def test_a_repeat_that_is_not_durable_is_not_answered_from_memory(self):
        async def refuse():
            raise TemporaryError("down", place="kafka")

        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message()))
            assert await peer.read_codes(1) == [("AA", "M1")]
            desk.intake.obstacle = refuse
            peer.send(frame(build_message()))
            assert await peer.is_closed()

    async def test_the_memory_of_answers_is_bounded(self):
        async with run(kept_answers=2) as desk:
            peer = await desk.call()
            for control_id in ("1", "2", "3", "1", "3"):
                peer.send(frame(build_message(control_id)))
                assert await peer.read_codes(1) == [("AA", control_id)]
        assert desk.counted("mllp_repeats_total", feed="north-adt") == 1


class TestBytesOnTheWire:
    async def test_several_messages_in_one_write_are_answered_in_order(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(b"".join(frame(build_message(f"M{number}")) for number in range(20)))
            assert await peer.read_codes(20) == [("AA", f"M{number}") for number in range(20)]
        assert desk.intake.list_control_ids() == [f"M{number}" for number in range(20)]

    async def test_one_message_over_many_writes(self):
        async with run() as desk:
            peer = await desk.call()
            data = frame(build_message())
            for position in range(len(data)):
                peer.send(data[position : position + 1])
                await peer.writer.drain()
                await asyncio.sleep(0)
            assert await peer.read_codes(1) == [("AA", "M1")]

    async def test_garbage_between_frames_is_skipped_and_counted(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(b"hello\r" + frame(build_message("1")) + b"\r\n" + frame(build_message("2")) + b"\x1c\r\x00")
            peer.send(frame(build_message("3")))
            assert await peer.read_codes(3) == [("AA", "1"), ("AA", "2"), ("AA", "3")]
        assert desk.counted("mllp_framing_errors_total", reason="garbage") == 2

    async def test_a_message_its_sender_began_again(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(b"\x0b" + build_message("1")[:40] + frame(build_message("2")))
            assert await peer.read_codes(1) == [("AA", "2")]
        assert desk.intake.published[0]["events"][0].body == build_message("2")
        assert desk.counted("mllp_framing_errors_total", reason="garbage") == 1

    async def test_a_message_cut_by_its_sender_is_not_published(self):
        async with run() as desk:
            peer = await desk.call()
            peer.send(frame(build_message("1"))[:-1])
            peer.writer.write_eof()
            assert await peer.is_closed()
        assert desk.intake.published == []
        assert desk.counted("mllp_framing_errors_total", reason="cut") == 1

    async def test_a_message_without_end_closes_the_connection(self):
        async with run(max_message_bytes=1000) as desk:
            peer = await desk.call()
            peer.send(b"\x0bMSH|" + b"x" * 200_000)
            assert await peer.is_closed()
        assert desk.counted("mllp_framing_errors_total", reason="endless") == 1

    async def test_whatever_arrives_the_listener_goes_on(self):
        choice = random.Random(20250301)
        pieces = [
            b"\x0b",
            b"\x1c\r",
            b"\x1c",
            b"\r",
            b"MSH|^~\\&|",
            b"ADT|NORTH GENERAL|",
            b"||ADT^A01|1|",
            b"\xff\x00",
            b"FHS",
        ]
        async with run(max_message_bytes=500) as desk:
            for _ in range(60):
                peer = await desk.call()
                peer.send(b"".join(choice.choice([*pieces, choice.randbytes(5)]) for _ in range(60)))
                peer.writer.close()
            peer = await desk.call()
            peer.send(frame(build_message("LAST")))
            assert await peer.read_codes(1) == [("AA", "LAST")]
        assert sum(desk.counts.values()) > 30
        assert not any(key[0] == "refused_total" and ("reason", "internal") in key for key in desk.counts)


class TestConnections:
    async def test_a_silent_connection_is_closed(self):
        async with run(idle_seconds=0.05) as desk:
            peer = await desk.call()
            assert await peer.is_closed()

    async def test_more_connections_than_allowed(self):
        async with run(max_connections=2) as desk:
            first, second = await desk.call(), await desk.call()
            for peer in (first, second):
                peer.send(frame(build_message()))
                await peer.read()
            third = await desk.call()
            assert await third.is_closed()
            assert desk.listener.connections == 2
            assert desk.counted("refused_total", source="hl7", reason="too_many_connections") == 1
            first.writer.close()
            async with asyncio.timeout(5):
                while desk.listener.connections == 2:  # noqa: ASYNC110 - the listener has no event for it
                    await asyncio.sleep(0.01)
            fourth = await desk.call()
            fourth.send(frame(build_message()))
            assert await fourth.read_codes(1) == [("AA", "M1")]

    async def test_stopping_answers_the_message_in_hand_and_no_other(self):
        desk = Desk()
        await desk.listener.start()
        begun, durable = asyncio.Event(), asyncio.Event()

        async def wait():
            begun.set()
            await durable.wait()

        desk.intake.obstacle = wait
        busy, idle = await desk.call(), await desk.call()
        idle.send(b"\x0bMSH|")
        busy.send(frame(build_message("1")) + frame(build_message("2")))
        await begun.wait()
        port = desk.listener.port
        stopping = asyncio.create_task(desk.listener.stop())
        assert await idle.is_closed()
        with pytest.raises(OSError):
            await asyncio.open_connection("127.0.0.1", port)
        durable.set()
        assert await busy.read_codes(1) == [("AA", "1")]
        assert await busy.is_closed()
        await stopping
        assert desk.intake.list_control_ids() == ["1"]
        assert desk.listener.connections == 0
        await desk.stop()

    async def test_stopping_does_not_wait_for_ever(self):
        desk = Desk()
        await desk.listener.start()
        begun = asyncio.Event()

        async def hang():
            begun.set()
            await asyncio.Event().wait()

        desk.intake.obstacle = hang
        peer = await desk.call()
        peer.send(frame(build_message()))
        await begun.wait()
        await asyncio.wait_for(desk.listener.stop(grace_seconds=0.05), 5)
        assert await peer.is_closed()
        assert desk.intake.published == []
        await desk.stop()

    async def test_a_port_that_is_taken(self):
        with socket.socket() as taken:
            taken.bind(("127.0.0.1", 0))
            taken.listen()
            port = taken.getsockname()[1]
            with pytest.raises(ListenerUnavailable) as caught:
                await Desk(port=port).listener.start()
        assert caught.value.place == f"127.0.0.1:{port}"
        assert caught.value.remedy

    async def test_tls(self, tmp_path):
        if shutil.which("openssl") is None:
            pytest.skip("no openssl")
        key, cert = tmp_path / "key.pem", tmp_path / "cert.pem"
        await asyncio.to_thread(
            subprocess.run,
            ["openssl", "req", "-x509", "-newkey", "ec", "-pkeyopt", "ec_paramgen_curve:prime256v1", "-nodes", "-days",
             "2", "-subj", "/CN=localhost", "-addext", "subjectAltName=IP:127.0.0.1", "-keyout", key, "-out", cert],
            check=True, capture_output=True,
        )  # fmt: skip
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(cert, key)
        async with run(tls=context) as desk:
            peer = await desk.call(ssl=ssl.create_default_context(cafile=cert))
            peer.send(frame(build_message()))
            assert await peer.read_codes(1) == [("AA", "M1")]
            plain = await desk.call()
            plain.send(frame(build_message("2")))
            assert await plain.is_closed()
        assert desk.intake.list_control_ids() == ["M1"]
        assert desk.intake.published[0]["verdict"] == "mllps;peer=127.0.0.1"


def cut(data: bytes, places: list[int]) -> list[bytes]:
    ends = sorted({place % (len(data) + 1) for place in places} | {0, len(data)})
    return [data[start:end] for start, end in pairwise(ends)]


class TestDeframer:
    @given(
        st.lists(
            st.sampled_from([b"\x0b", b"\x1c\r", b"\x1c", b"\r", b"\n", b"MSH", b"abc", b"0123456789"]), max_size=30
        ),
        st.lists(st.integers(min_value=0, max_value=400), max_size=30),
    )
    @example([b"\x0b", b"0123456789", b"0123456789", b"\x1c\r"], [14])
    @example([b"\x0b", b"0123456789abc", b"\x1c\r"], [15, 16])
    def test_frames_do_not_depend_on_how_the_bytes_arrive(self, parts, places):
        data = b"".join(parts)

        def read(chunks):
            deframer = Deframer(12)
            found = [found for chunk in chunks for found in deframer.feed(chunk)]
            return found, deframer.garbage, deframer.pending

        assert read(cut(data, places)) == read([data])

    @given(
        st.lists(
            st.binary(max_size=20).filter(lambda text: b"\x1c\r" not in text + b"\x1c\r"[:1] and b"\x0bMSH" not in text)
        )
    )
    def test_every_frame_comes_out(self, contents):
        deframer = Deframer(100)
        found = [found for content in contents for found in deframer.feed(frame(content))]
        assert [(one.content, one.is_whole) for one in found] == [(content, True) for content in contents]
        assert deframer.garbage == 0

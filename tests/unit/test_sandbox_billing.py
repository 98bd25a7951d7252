"""The billing system: posts what is right, refuses what is wrong, remembers across restarts, fails as told."""

import asyncio
import json

import pytest

from sandbox.billing import BillingSystem, Instance, Mode, ModeKind
from sandbox.coins import parse_amount
from sandbox.hl7_text import escape_text, split_message


def dft(
    control_id="C1",
    *,
    amount="12.50&USD",
    object_id="pi_1",
    mrn="700^^^NORTH^MR",
    code="WEBPAY",
    kind="PY",
    event="P03",
    msh15="",
    msh16="",
    time="20260102030405+0000",
    transaction_id="T1",
    extra="",
):
    return (
        f"MSH|^~\\&|REMIT|NORTHGW|EPIC|NORTH|20260102030405||DFT^{event}^DFT_P03|{control_id}|P|2.5.1|||{msh15}|{msh16}\r"
        f"EVN|{event}|20260102030405\rPID|1||{mrn}||Nobody^Here\r"
        f"FT1|1|{transaction_id}||{time}||{kind}|{code}|{object_id}||1|{amount}\r{extra}"
    ).encode()


class Caller:
    """An MLLP caller written with plain sockets, sharing no code with the sandbox."""

    def __init__(self, port):
        self.port = port

    async def __aenter__(self):
        self.reader, self.writer = await asyncio.open_connection("127.0.0.1", self.port)
        return self

    async def __aexit__(self, *_error):
        self.writer.close()

    async def call(self, message, *, within=5.0):
        self.writer.write(b"\x0b" + message + b"\x1c\r")
        return await self.receive(within=within)

    async def receive(self, *, within=5.0):
        data = await asyncio.wait_for(self.reader.readuntil(b"\x1c\r"), within)
        assert data[:1] == b"\x0b"
        return data[1:-2]


def read_msa(answer):
    fields = next(line for line in answer.decode().split("\r") if line.startswith("MSA|")).split("|")
    return fields[1], fields[2]


@pytest.fixture
async def system(tmp_path):
    billing = BillingSystem(
        tmp_path / "ledger.db",
        [
            Instance("epic-north"),
            Instance("epic-south", duplicate_control="none"),
            Instance("epic-strict", payment_codes=("WEBPAY",), longest_transaction_id=12),
        ],
    )
    await billing.start()
    yield billing
    await billing.stop()


async def test_a_payment_is_posted_with_everything_the_ledger_keeps(system):
    async with Caller(system.ports["epic-north"]) as caller:
        answer = await caller.call(dft())
    assert read_msa(answer) == ("AA", "C1")
    assert answer.startswith(b"MSH|^~\\&|EPIC|NORTH|REMIT|NORTHGW|")
    (row,) = system.read_ledger()
    digest = row.pop("raw_sha256")
    assert len(digest) == 64
    assert row == {
        "id": 1,
        "instance": "epic-north",
        "facility": "NORTH",
        "message_type": "DFT^P03",
        "control_id": "C1",
        "transaction_id": "T1",
        "transaction_time": "20260102030405+0000",
        "type": "PY",
        "code": "WEBPAY",
        "description": "pi_1",
        "minor": 1250,
        "currency": "USD",
        "mrn": "700",
        "authority": "NORTH",
    }


@pytest.mark.parametrize(
    ("amount", "minor"),
    [("-0.05&USD", -5), ("1500&JPY", 1500), ("12.345&KWD", 12345), ("12.3&USD", 1230), ("-7&KWD", -7000)],
)
async def test_amounts_of_every_exponent(system, amount, minor):
    async with Caller(system.ports["epic-north"]) as caller:
        assert read_msa(await caller.call(dft(amount=amount)))[0] == "AA"
    assert system.read_ledger()[0]["minor"] == minor


@pytest.mark.parametrize(
    ("changes", "code", "place"),
    [
        ({"mrn": ""}, "AE", "PID^1^3"),
        ({"mrn": "700"}, "AE", "PID^1^3^1^4"),
        ({"code": ""}, "AE", "FT1^1^7"),
        ({"code": "CASH"}, "AE", "FT1^1^7"),
        ({"kind": "XX"}, "AE", "FT1^1^6"),
        ({"amount": "12.50"}, "AE", "FT1^1^11"),
        ({"amount": "12.505&USD"}, "AE", "FT1^1^11"),
        ({"amount": "1.5&JPY"}, "AE", "FT1^1^11"),
        ({"amount": "twelve&USD"}, "AE", "FT1^1^11"),
        ({"amount": "1e3&USD"}, "AE", "FT1^1^11"),
        ({"amount": "5&ZZZ"}, "AE", "FT1^1^11"),
        ({"amount": "0.00&USD"}, "AE", "FT1^1^11"),
        ({"amount": ""}, "AE", "FT1^1^11"),
        ({"time": ""}, "AE", "FT1^1^4"),
        ({"transaction_id": "1234567890123"}, "AE", "FT1^1^2"),
        ({"object_id": "pi_77Reject"}, "AR", "FT1^1^8"),
        ({"event": "P05"}, "AR", "MSH^1^9"),
        ({"control_id": ""}, "AR", "MSH^1^10"),
    ],
)
async def test_a_wrong_message_is_refused_and_named(system, changes, code, place):
    async with Caller(system.ports["epic-strict"]) as caller:
        answer = await caller.call(dft(**changes))
    assert read_msa(answer) == (code, changes.get("control_id", "C1"))
    error = next(line for line in answer.decode().split("\r") if line.startswith("ERR|"))
    assert error.split("|")[2] == place
    assert system.read_ledger() == []


async def test_a_message_without_ft1_and_bytes_that_are_no_message(system):
    async with Caller(system.ports["epic-north"]) as caller:
        assert read_msa(await caller.call(dft().split(b"FT1|")[0]))[0] == "AE"
        assert read_msa(await caller.call(b"hello"))[0] == "AR"
        assert read_msa(await caller.call(b"MSH|^~\\&|\xff"))[0] == "AR"
        assert read_msa(await caller.call(dft("C9")))[0] == "AA"
    assert len(system.read_ledger()) == 1


async def test_several_transactions_of_a_message_post_together_or_not_at_all(system):
    second = "FT1|2|T2||20260102||PY|WEBPAY|pi_2||1|{}\r"
    async with Caller(system.ports["epic-north"]) as caller:
        assert read_msa(await caller.call(dft("C1", extra=second.format("x&USD")))) == ("AE", "C1")
        assert system.read_ledger() == []
        assert read_msa(await caller.call(dft("C2", extra=second.format("1&USD")))) == ("AA", "C2")
    assert [(row["description"], row["minor"]) for row in system.read_ledger()] == [("pi_1", 1250), ("pi_2", 100)]


async def test_the_patient_is_the_repetition_of_type_mr(system):
    async with Caller(system.ports["epic-north"]) as caller:
        await caller.call(dft(mrn="A9^^^NORTH^AN~700^^^&1.2.3&ISO^MR"))
    row = system.read_ledger()[0]
    assert (row["mrn"], row["authority"]) == ("700", "1.2.3")


async def test_a_repeated_control_id_gets_the_same_bytes_and_posts_once(system):
    async with Caller(system.ports["epic-north"]) as caller:
        first = await caller.call(dft())
        assert await caller.call(dft()) == first
        assert await caller.call(dft(amount="99&USD")) == first
    assert [row["minor"] for row in system.read_ledger()] == [1250]
    health = system.read_health()["instances"]["epic-north"]
    assert (health["posted"], health["duplicates"], health["conflicts"]) == (1, 2, 1)


async def test_the_same_control_id_of_another_sender_is_another_message(system):
    async with Caller(system.ports["epic-north"]) as caller:
        await caller.call(dft())
        await caller.call(dft().replace(b"NORTHGW", b"OTHERGW"))
    assert len(system.read_ledger()) == 2


async def test_without_duplicate_control_a_resend_doubles(system):
    async with Caller(system.ports["epic-south"]) as caller:
        await caller.call(dft())
        await caller.call(dft())
    assert len(system.read_ledger(instance="epic-south")) == 2


async def test_a_refused_message_may_come_again_under_its_control_id(system):
    await system.set_mode(Mode(ModeKind.REJECT, count=1), instance="epic-north")
    async with Caller(system.ports["epic-north"]) as caller:
        assert read_msa(await caller.call(dft()))[0] == "AR"
        assert read_msa(await caller.call(dft()))[0] == "AA"
    assert len(system.read_ledger()) == 1


async def test_the_ledger_and_its_answers_survive_a_restart(tmp_path):
    async def run(after):
        system = BillingSystem(tmp_path / "ledger.db", [Instance("epic-north")], control_port=None)
        await system.start()
        async with Caller(system.ports["epic-north"]) as caller:
            answers = [await caller.call(dft()), await caller.call(dft(after, object_id=after))]
        rows = system.read_ledger()
        await system.stop()
        return answers, rows

    (first, _), _ = await run("C2")
    (again, _), rows = await run("C3")
    assert again == first
    assert [row["description"] for row in rows] == ["pi_1", "C2", "C3"]
    assert [row["id"] for row in rows] == [1, 2, 3]


async def test_the_commit_is_made_before_the_answer(system, tmp_path):
    import sqlite3  # noqa: PLC0415 - a second reader of the file, only here

    async with Caller(system.ports["epic-north"]) as caller:
        await caller.call(dft())
        other = sqlite3.connect(tmp_path / "ledger.db")
        assert other.execute("SELECT description, minor FROM postings").fetchall() == [("pi_1", 1250)]
        other.close()


@pytest.mark.parametrize(
    ("msh15", "msh16", "good", "bad"),
    [
        ("", "", "AA", "AE"),
        ("AL", "NE", "CA", "CE"),
        ("NE", "AL", "AA", "AE"),
        ("AL", "AL", "AA", "AE"),
        ("ER", "NE", None, "CE"),
        ("SU", "NE", "CA", None),
        ("NE", "NE", None, None),
    ],
)
async def test_acknowledgement_conditions(system, msh15, msh16, good, bad):
    async with Caller(system.ports["epic-north"]) as caller:
        for control_id, changes, expected in (("G", {}, good), ("B", {"amount": "x"}, bad)):
            message = dft(control_id, msh15=msh15, msh16=msh16, **changes)
            # A second, plain message shows that silence was meant: its answer is the next one.
            caller.writer.write(b"\x0b" + message + b"\x1c\r")
            answer = await caller.call(dft("next" + control_id))
            if expected is not None:
                assert read_msa(answer) == (expected, control_id)
                answer = await caller.receive()
            assert read_msa(answer) == ("AA", "next" + control_id)


async def test_messages_in_one_write_and_in_pieces(system):
    async with Caller(system.ports["epic-north"]) as caller:
        caller.writer.write(b"noise\x0b" + dft("A") + b"\x1c\r\x0b" + dft("B") + b"\x1c\r\x0b" + dft("C")[:40])
        assert read_msa(await caller.receive())[1] == "A"
        assert read_msa(await caller.receive())[1] == "B"
        caller.writer.write(dft("C")[40:] + b"\x1c\r")
        assert read_msa(await caller.receive())[1] == "C"


async def expect_close(caller):
    assert await asyncio.wait_for(caller.reader.read(), 5) == b""


@pytest.mark.parametrize(("kind", "posted"), [(ModeKind.CLOSE_BEFORE_POSTING, 0), (ModeKind.CLOSE_AFTER_POSTING, 1)])
async def test_closing_before_and_after_posting(system, kind, posted):
    await system.set_mode(Mode(kind, count=1))
    async with Caller(system.ports["epic-north"]) as caller:
        caller.writer.write(b"\x0b" + dft() + b"\x1c\r")
        await expect_close(caller)
    assert len(system.read_ledger()) == posted
    async with Caller(system.ports["epic-north"]) as caller:
        assert read_msa(await caller.call(dft()))[0] == "AA"
    assert len(system.read_ledger()) == 1


async def test_hanging_after_posting_never_answers_on_that_connection(system):
    await system.set_mode(Mode(ModeKind.HANG_AFTER_POSTING, count=1), instance="epic-north")
    async with Caller(system.ports["epic-north"]) as caller:
        with pytest.raises(TimeoutError):
            await caller.call(dft(), within=0.2)
        with pytest.raises(TimeoutError):
            await caller.call(dft("C2"), within=0.1)
    assert [row["control_id"] for row in system.read_ledger()] == ["C1"]


async def test_garbage_and_wrong_acknowledgements_are_posted(system):
    await system.set_mode(Mode(ModeKind.GARBAGE_ACK, count=1))
    await system.set_mode(Mode(ModeKind.WRONG_MSA2, count=1))
    async with Caller(system.ports["epic-north"]) as caller:
        assert b"MSA" not in await caller.call(dft("C1"))
        code, echo = read_msa(await caller.call(dft("C2")))
        assert code == "AA"
        assert echo != "C2"
        assert read_msa(await caller.call(dft("C3"))) == ("AA", "C3")
    assert len(system.read_ledger()) == 3


async def test_slow_waits_and_then_posts(system):
    await system.set_mode(Mode(ModeKind.SLOW, seconds=0.3, count=1))
    async with Caller(system.ports["epic-north"]) as caller:
        with pytest.raises(TimeoutError):
            await caller.call(dft(), within=0.05)
        assert read_msa(await caller.receive()) == ("AA", "C1")


async def test_rejecting_every_third_and_one_object(system):
    await system.set_mode(Mode(ModeKind.REJECT, every=3), instance="epic-north")
    await system.set_mode(Mode(ModeKind.REJECT, object_id="pi_7"), instance="epic-south")
    async with Caller(system.ports["epic-north"]) as caller:
        codes = [read_msa(await caller.call(dft(f"C{n}")))[0] for n in range(7)]
    assert codes == ["AA", "AA", "AR", "AA", "AA", "AR", "AA"]
    async with Caller(system.ports["epic-south"]) as caller:
        codes = [read_msa(await caller.call(dft(f"C{n}", object_id=f"pi_{n}")))[0] for n in range(6, 9)]
        assert codes == ["AA", "AR", "AA"]
        await system.reset()
        assert read_msa(await caller.call(dft("C7", object_id="pi_7")))[0] == "AA"


async def test_a_busy_system_names_the_transient_condition_and_posts_later(system):
    await system.set_mode(Mode(ModeKind.BUSY, count=1))
    async with Caller(system.ports["epic-north"]) as caller:
        answer = await caller.call(dft())
        assert read_msa(answer) == ("AE", "C1")
        assert b"|206^" in answer
        assert read_msa(await caller.call(dft())) == ("AA", "C1")
    assert len(system.read_ledger()) == 1


async def test_a_closed_port_refuses_until_reset(system):
    port = system.ports["epic-north"]
    async with Caller(port) as caller:
        await system.set_mode(Mode(ModeKind.REFUSE_CONNECTIONS), instance="epic-north")
        await expect_close(caller)
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", port)
    async with Caller(system.ports["epic-south"]) as caller:
        assert read_msa(await caller.call(dft()))[0] == "AA"
    await system.reset(instance="epic-north")
    async with Caller(port) as caller:
        assert read_msa(await caller.call(dft()))[0] == "AA"


async def test_a_closed_port_opens_again_by_itself(system):
    await system.set_mode(Mode(ModeKind.REFUSE_CONNECTIONS, seconds=0.05), instance="epic-north")
    port = system.ports["epic-north"]
    for _ in range(200):
        try:
            _, writer = await asyncio.open_connection("127.0.0.1", port)
        except ConnectionRefusedError:
            await asyncio.sleep(0.01)
        else:
            writer.close()
            break
    assert system.read_health()["instances"]["epic-north"]["listening"]


def test_a_mode_that_cannot_be_meant_is_refused():
    for options in ({"every": 0}, {"count": 0}, {"seconds": -1}):
        with pytest.raises(ValueError):
            Mode(ModeKind.REJECT, **options)
    with pytest.raises(ValueError):
        Mode(ModeKind.REFUSE_CONNECTIONS, count=2)


async def ask(system, method, path, body=None):
    payload = b"" if body is None else json.dumps(body).encode()
    reader, writer = await asyncio.open_connection("127.0.0.1", system.control_port)
    writer.write(f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(payload)}\r\n\r\n".encode() + payload)
    head, _, answer = (await asyncio.wait_for(reader.read(), 5)).partition(b"\r\n\r\n")
    writer.close()
    return int(head.split()[1]), json.loads(answer)


async def test_the_control_port(system):
    status, _ = await ask(system, "POST", "/mode", {"instance": "epic-north", "kind": "reject", "count": 1})
    assert status == 200
    async with Caller(system.ports["epic-north"]) as caller:
        assert read_msa(await caller.call(dft()))[0] == "AR"
        assert read_msa(await caller.call(dft()))[0] == "AA"
        assert read_msa(await caller.call(dft("C2", object_id="pi_2")))[0] == "AA"
    status, rows = await ask(system, "GET", "/ledger?instance=epic-north&after=1")
    assert (status, [row["description"] for row in rows]) == (200, ["pi_2"])
    status, health = await ask(system, "GET", "/health")
    assert health["instances"]["epic-north"]["postings"] == 2
    assert health["instances"]["epic-north"]["refused"] == 1
    assert health["instances"]["epic-north"]["modes"][0]["left"] == 0
    assert (await ask(system, "POST", "/reset", {"ledger": True}))[0] == 200
    assert (await ask(system, "GET", "/ledger")) == (200, [])
    assert (await ask(system, "GET", "/health"))[1]["instances"]["epic-north"]["modes"] == []


@pytest.mark.parametrize(
    ("method", "path", "body", "status"),
    [
        ("POST", "/mode", {"kind": "explode"}, 400),
        ("POST", "/mode", {}, 400),
        ("POST", "/mode", {"kind": "reject", "instance": "nowhere"}, 400),
        ("POST", "/mode", {"kind": "reject", "colour": "red"}, 400),
        ("GET", "/ledger?after=x", None, 400),
        ("GET", "/nothing", None, 404),
    ],
)
async def test_the_control_port_says_what_is_wrong(system, method, path, body, status):
    answered, answer = await ask(system, method, path, body)
    assert answered == status
    assert answer["error"]


async def test_a_port_in_use_leaves_nothing_running(system, tmp_path):
    other = BillingSystem(tmp_path / "other.db", [Instance("a"), Instance("b", port=system.ports["epic-north"])])
    with pytest.raises(OSError):
        await other.start()
    with pytest.raises(ConnectionRefusedError):
        await asyncio.open_connection("127.0.0.1", other.ports["a"])


def test_names_of_instances_must_differ(tmp_path):
    with pytest.raises(ValueError):
        BillingSystem(tmp_path / "x.db", [Instance("a"), Instance("a")])


@pytest.mark.parametrize("text", ["plain", "a|b^c&d~e\\f", "\\", "\\S\\", "||", "x\\"])
def test_escapes_are_undone(text):
    message = split_message(f"MSH|^~\\&|{escape_text(text)}|".encode())
    assert message is not None
    assert message.read(message.find("MSH"), 3) == text


@pytest.mark.parametrize("text", ["", "1.", ".5", "1,000", "1e3", "--1", " 1", "1.001", "NaN", "\u0661"])
def test_text_that_is_no_amount(text):
    assert parse_amount(text, "USD") is None

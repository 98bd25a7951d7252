"""The look-up over HTTP, against a server written here: pages, answers that decide nothing, and its last look."""

import asyncio
import contextlib
import json

import pytest
from pydantic import SecretStr

from schemas.failure import Failure, FailureKind
from sinks.catalog import load
from sinks.contract import (
    Absent,
    Answer,
    Completion,
    Found,
    HttpHead,
    LookUp,
    NextPage,
    Rate,
    Request,
    Target,
    Unclear,
    Verdict,
    use_api_key,
    use_nothing,
)
from sinks.transport import (
    BasicSettings,
    ClientCredentialsSettings,
    HttpSettings,
    open_transport,
    use_client_credentials,
    use_user,
)

POSTING = Request(b"{}", "C-1", "R-1", "POST", "http://unused.example/post")


class Server:
    """Answers in turn with what it was given: (status, body) or None for silence."""

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []
        self.writers = []

    async def __aenter__(self):
        self.server = await asyncio.start_server(self.serve, "127.0.0.1", 0)
        self.url = f"http://127.0.0.1:{self.server.sockets[0].getsockname()[1]}"
        return self

    async def __aexit__(self, *_):
        self.server.close()
        for writer in self.writers:
            writer.close()
            with contextlib.suppress(ConnectionError):
                await writer.wait_closed()

    async def serve(self, reader, writer):
        self.writers.append(writer)
        with contextlib.suppress(asyncio.IncompleteReadError, ConnectionError):
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                self.seen.append(head)
                length = next((line for line in head.split("\r\n") if line.lower().startswith("content-length")), ":0")
                await reader.readexactly(int(length.split(":")[1]))
                answer = self.answers.pop(0)
                if answer is None:
                    await asyncio.sleep(30)
                status, body, *headers = answer
                raw = json.dumps(body).encode()
                lines = [f"HTTP/1.1 {status} X", f"content-length: {len(raw)}", *headers, "", ""]
                writer.write("\r\n".join(lines).encode() + raw)
        writer.close()


def build_look_up(server):
    def ask(request, first_write_at, _settings):
        return Request(b"", "", "", "GET", f"{server.url}/list?ref={request.reference}&after={first_write_at}&page=1")

    def read(response, _page, request, _settings):
        if response.status == 404:
            return Absent()
        if response.status != 200:
            return None
        body = json.loads(response.body)
        for row in body["rows"]:
            if row["ref"] == request.reference:
                return Found(row["id"])
        return NextPage(Request(b"", "", "", "GET", server.url + body["next"])) if body.get("next") else Absent()

    return LookUp(ask=ask, read=read)


def build_target(server, credential=lambda _settings, _url: use_nothing(), settings=HttpSettings, **head):
    given = {"look_up": build_look_up(server), "rates": (Rate(100, 1.0, burst=50),)} | head
    model = load("quickbooks_online")
    members = {name: getattr(model, name) for name in model.__dataclass_fields__}
    http = HttpHead(
        sandbox="", production="", credential=credential, examine=lambda *_: Verdict(None, "OK"), **given
    )  # fmt: skip
    return Target(**members | {"settings": settings, "http": http})


def build_settings(server, model=HttpSettings, **more):
    return model(
        name="t", connector="quickbooks_online", facilities=("north",), environment="simulator",
        simulator_url=server.url, call_deadline_seconds=0.3, **more,
    )  # fmt: skip


@contextlib.asynccontextmanager
async def opened(*answers, **target):
    async with Server(*answers) as server:
        transport = open_transport(build_target(server, **target), build_settings(server))
        try:
            yield server, transport
        finally:
            await transport.close()


def allow():
    """Nothing is against it."""


async def find(transport, look=allow):
    return await transport.find(POSTING, 1_700_000_000_000, look)


async def test_it_asks_page_after_page_until_it_is_found():
    looks = []
    pages = (200, {"rows": [{"ref": "R-0", "id": "7"}], "next": "/list?page=2"}), (200, {"rows": [{"ref": "R-1", "id": "8"}]})  # noqa: E501 # fmt: skip
    async with opened(*pages) as (server, transport):
        assert await find(transport, lambda: looks.append(1)) == Found("8")
    assert [head.split(" ")[1] for head in server.seen] == [
        "/list?ref=R-1&after=1700000000000&page=1",
        "/list?page=2",
    ]
    # Each page is a call like any other.
    assert len(looks) >= 2


@pytest.mark.parametrize(
    ("answer", "finding"),
    [
        ((200, {"rows": []}), Absent()),
        ((404, {}), Absent()),
        ((200, {"unknown": 1}), Unclear("KeyError")),
        ((200, []), Unclear("TypeError")),
        ((400, {}), Unclear("HTTP_400")),
        ((302, {}), Unclear("REDIRECTED")),
        ((500, {}), Answer(FailureKind.UNAVAILABLE, "HTTP_500", is_outage=True)),
        ((503, {}, "retry-after: 7"), Answer(FailureKind.UNAVAILABLE, "HTTP_503", retry_after=7, is_outage=True)),
        ((429, {}, "retry-after: 7"), Answer(FailureKind.RATE_LIMITED, "HTTP_429", retry_after=7, is_outage=True)),
        ((401, {}), Answer(FailureKind.AUTH, "HTTP_401", is_outage=True)),
    ],
)
async def test_only_what_the_connector_reads_says_that_it_is_not_there(answer, finding):
    async with opened(answer) as (_, transport):
        found = await find(transport)
    if isinstance(finding, Unclear) and finding.code == "REDIRECTED":
        # A redirect may hide anything; for a read it is an outage, never an answer.
        assert found == finding or found.kind is FailureKind.UNAVAILABLE
    else:
        assert found == finding


async def test_silence_is_unavailable_for_a_look_up_changes_nothing():
    async with opened(None) as (_, transport):
        with pytest.raises(Failure) as caught:
            await find(transport)
    assert (caught.value.kind, caught.value.code) == (FailureKind.UNAVAILABLE, "NO_ANSWER")


async def test_silence_to_the_question_before_a_write_is_unavailable_for_nothing_was_written():
    async with Server(None) as server:
        question = Request(b"", "", "", "GET", f"{server.url}/parent")
        completion = Completion(ask=lambda *_: question, read=lambda *_: f"{server.url}/post")
        transport = open_transport(build_target(server, completion=completion), build_settings(server))
        with pytest.raises(Failure) as caught:
            await transport.send(POSTING, allow)
        await transport.close()
    assert (caught.value.kind, caught.value.code) == (FailureKind.UNAVAILABLE, "NO_ANSWER")
    assert [head.split()[:2] for head in server.seen] == [["GET", "/parent"]]


async def test_a_list_without_an_end_is_given_up():
    page = (200, {"rows": [], "next": "/list"})
    async with opened(*[page] * 200, rates=()) as (server, transport):
        assert await find(transport) == Unclear("TOO_MANY_PAGES")
    assert len(server.seen) == 50


async def test_a_next_page_elsewhere_is_not_followed():
    def read(_response, _page, _request, _settings):
        return NextPage(Request(b"", "", "", "GET", "https://elsewhere.example/list"))

    async with Server((200, {})) as server:
        look_up = LookUp(ask=build_look_up(server).ask, read=read)
        transport = open_transport(build_target(server, look_up=look_up), build_settings(server))
        assert await find(transport) == Unclear("HOST_UNDECLARED")
        await transport.close()


async def test_a_request_frozen_for_another_host_is_a_question_for_a_person_not_asked_for_ever():
    def ask(*_):
        return Request(b"", "", "", "GET", "https://of-the-old-settings.example/list")

    async with opened(look_up=LookUp(ask=ask, read=lambda *_: Absent())) as (server, transport):
        assert await find(transport) == Unclear("HOST_UNDECLARED")
    assert server.seen == []


async def test_a_connector_that_raises_while_asking_decides_nothing():
    def ask(*_):
        raise ZeroDivisionError

    async with opened(look_up=LookUp(ask=ask, read=lambda *_: Absent())) as (server, transport):
        assert await find(transport) == Unclear("ZeroDivisionError")
    assert server.seen == []


async def test_what_the_last_look_raises_withdraws_it():
    class Stop(Exception):
        pass

    def stop():
        raise Stop

    async with opened() as (server, transport):
        with pytest.raises(Stop):
            await find(transport, stop)
    assert server.seen == []


async def test_throttling_of_a_look_up_holds_the_next_call_too():
    async with opened((429, {}, "retry-after: 60")) as (server, transport):
        await find(transport)
        with pytest.raises(Failure) as caught:
            await transport.send(Request(b"{}", "C", "R", "POST", server.url + "/post"), allow)
    assert caught.value.code == "RATE_WAIT"


@pytest.mark.parametrize(
    ("model", "more", "credential", "header"),
    [
        (BasicSettings, {"user": "u", "password": SecretStr("p")}, use_user, "authorization: Basic dTpw"),
        (HttpSettings, {}, lambda _settings, _url: use_api_key("X-Key", SecretStr("k")), "x-key: k"),
    ],
)
async def test_fixed_credentials_go_with_every_call(model, more, credential, header):
    async with Server((200, {"rows": []})) as server:
        transport = open_transport(build_target(server, credential, model), build_settings(server, model, **more))
        await find(transport)
        await transport.close()
    assert header.lower() in server.seen[0].lower()


async def test_client_credentials_fetch_a_token_of_the_vendors_scheme():
    async with Server((200, {"access_token": "t-1", "expires_in": 60}), (200, {"rows": []})) as server:
        target = build_target(
            server, use_client_credentials, ClientCredentialsSettings,
            token_url="https://vendor.example/token", scheme="Vendor-token",
        )  # fmt: skip
        more = {"client_id": "c", "client_secret": SecretStr("s")}
        transport = open_transport(target, build_settings(server, ClientCredentialsSettings, **more))
        assert await find(transport) == Absent()
        await transport.close()
    token, look_up = server.seen
    assert token.startswith("POST /token")
    assert "authorization: vendor-token t-1" in look_up.lower()


def test_private_addresses_are_read_at_the_start():
    given = {"name": "t", "connector": "c", "facilities": ("north",), "environment": "production"}
    assert HttpSettings(**given, private_addresses=("10.0.0.0/8", "erp.local")).private_addresses
    with pytest.raises(ValueError, match="not an address"):
        HttpSettings(**given, private_addresses=("10.0.0.0/99",))

"""Where calls may go: declared hosts, public addresses, and the list for the firewall."""

import asyncio
import ipaddress
import socket
from dataclasses import dataclass

import pytest
import yarl
from hypothesis import given
from hypothesis import strategies as st

from clients.hosts import HostPolicy, HostRefused, Origin, find_origin, list_egress, parse_origin
from clients.http import HttpClient, HttpRequest
from schemas.failure import FailureKind


def judge(policy, url):
    try:
        policy.check_url(url)
    except HostRefused as refused:
        return refused.code if refused.kind is FailureKind.INVALID else f"{refused.kind} {refused.code}"
    return "OK"


POLICY = HostPolicy(["api.example.com", "*.books.example.com", "http://erp.example.com:8080", "auth.example.com:8443"])


@pytest.mark.parametrize(
    ("url", "code"),
    [
        ("https://api.example.com/v3/payment?page=2", "OK"),
        ("https://API.Example.COM./next", "OK"),
        ("https://api.example.com:443/", "OK"),
        ("https://eu.books.example.com/", "OK"),
        ("https://a.b.books.example.com/", "OK"),
        ("http://erp.example.com:8080/odata", "OK"),
        ("https://auth.example.com:8443/token", "OK"),
        ("https://books.example.com/", "HOST_UNDECLARED"),
        ("https://evilbooks.example.com/", "HOST_UNDECLARED"),
        ("https://api.example.com.evil.example/", "HOST_UNDECLARED"),
        ("https://evil.example/api.example.com", "HOST_UNDECLARED"),
        ("https://evil.example/?u=https://api.example.com", "HOST_UNDECLARED"),
        ("https://evil.example#api.example.com", "HOST_UNDECLARED"),
        ("http://api.example.com/", "HOST_UNDECLARED"),
        ("https://api.example.com:8443/", "HOST_UNDECLARED"),
        ("https://auth.example.com/", "HOST_UNDECLARED"),
        ("http://erp.example.com/", "HOST_UNDECLARED"),
        ("https://api.example.com@evil.example/", "URL_USERINFO"),
        ("https://user:pass@api.example.com/", "URL_USERINFO"),
        ("https://:pass@api.example.com/", "URL_USERINFO"),
        ("https://127.0.0.1/", "HOST_UNDECLARED"),
        ("https://169.254.169.254/latest/meta-data", "HOST_UNDECLARED"),
        ("https://[::1]/", "HOST_UNDECLARED"),
        ("https://2130706433/", "HOST_UNDECLARED"),
        ("file:///etc/passwd", "URL_INVALID"),
        ("ftp://api.example.com/", "URL_INVALID"),
        ("//api.example.com/next", "URL_INVALID"),
        ("/next?page=2", "URL_INVALID"),
        ("https:///x", "URL_INVALID"),
        ("", "URL_INVALID"),
        ("https://api.example.com:99999/", "URL_INVALID"),
        ("https://[::1/", "URL_INVALID"),
    ],
)
def test_urls(url, code):
    assert judge(POLICY, url) == code


@given(st.text(alphabet="htps:/@.\\#?%[]0127evilapxmco*- \t\n", max_size=60))
def test_no_trick_url_reaches_another_host(text):
    for url in (text, f"https://{text}", f"https://api.example.com{text}", f"https://evil.example{text}"):
        if judge(POLICY, url) == "OK":
            # What the library that dials would take for the host.
            assert yarl.URL(url).raw_host.removesuffix(".").lower().endswith(".example.com")


def test_refusals_show_no_url():
    with pytest.raises(HostRefused) as caught:
        POLICY.check_url("https://evil.example/?patient=Doe")
    assert "Doe" not in f"{caught.value!r}{caught.value}"
    assert "evil" not in f"{caught.value!r}{caught.value}"


# Address, and who may reach it: nobody, only by address, also by name, everyone.
ADDRESSES = [
    ("93.184.215.14", "public"), ("2606:2800:21f:cb07::8b2c", "public"), ("::ffff:93.184.215.14", "public"),
    ("64:ff9b::5db8:d70e", "public"),
    ("10.1.2.3", "private"), ("172.16.0.1", "private"), ("192.168.1.1", "private"), ("100.64.0.1", "private"),
    ("198.18.0.1", "private"), ("fd00::1", "private"), ("::ffff:10.1.2.3", "private"), ("2002:0a01:0203::1", "private"),
    ("64:ff9b::0a01:0203", "private"), ("fec0::1", "private"),
    ("127.0.0.1", "private"), ("127.8.8.8", "private"), ("::1", "private"), ("::ffff:127.0.0.1", "private"),
    ("169.254.169.254", "link-local"), ("fe80::1", "link-local"), ("fe80::1%eth0", "link-local"),
    ("::ffff:169.254.169.254", "link-local"),
    ("0.0.0.0", "never"), ("::", "never"), ("255.255.255.255", "never"), ("224.0.0.1", "never"), ("ff02::1", "never"),
    ("::ffff:0.0.0.0", "never"), ("", "never"), ("nonsense", "never"),
]  # fmt: skip


@pytest.mark.parametrize(("address", "reach"), ADDRESSES)
def test_addresses(address, reach):
    everything = HostPolicy(["h.example.com"], private=["0.0.0.0/0", "::/0"])
    by_name = HostPolicy(["h.example.com", "other.example.com"], private=["H.example.com"])
    nothing = HostPolicy(["h.example.com"])
    assert nothing.allows("h.example.com", address) == (reach == "public")
    assert by_name.allows("h.example.com", address) == (reach in {"public", "private"})
    assert by_name.allows("other.example.com", address) == (reach == "public")
    assert everything.allows("h.example.com", address) == (reach != "never")


INSIDE = (
    "10.0.0.0/8", "172.16.0.0/12", "192.168.0.0/16", "127.0.0.0/8", "169.254.0.0/16", "fc00::/7", "fe80::/10",
    "fec0::/10",
)  # fmt: skip


@given(st.one_of(st.ip_addresses(v=4), st.ip_addresses(v=6)))
def test_no_address_of_ours_is_public_in_any_wrapping(address):
    inside = [ipaddress.ip_network(net) for net in INSIDE]
    policy = HostPolicy(["h.example.com"])
    if any(address in net for net in inside):
        assert not policy.allows("h.example.com", str(address))
    if address.version == 4 and any(address in net for net in inside):
        assert not policy.allows("h.example.com", f"::ffff:{address}")


def test_an_allowed_network_is_that_network_only():
    policy = HostPolicy(["http://10.20.0.5:8080", "http://10.21.0.5:8080"], private=["10.20.0.0/16"])
    assert judge(policy, "http://10.20.0.5:8080/x") == "OK"
    assert judge(policy, "http://10.21.0.5:8080/x") == "ADDRESS_REFUSED"
    assert policy.allows("any.example.com", "10.20.255.1")
    assert not policy.allows("any.example.com", "127.0.0.1")


@pytest.mark.parametrize("entry", ["10.0.0.1/8", "10.0.0.0/40", "::1::", "host:80", "", "."])
def test_an_unreadable_allowance_is_refused(entry):
    with pytest.raises(ValueError):
        HostPolicy([], private=[entry])


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("api.example.com", "https://api.example.com"), ("API.example.com:443", "https://api.example.com"),
        ("https://api.example.com/v1/{realm}/x?y=z", "https://api.example.com"),
        ("http://127.0.0.1:8080/base", "http://127.0.0.1:8080"), ("https://[::1]:9/", "https://[::1]:9"),
        ("*.p21.example.com", "https://*.p21.example.com"), ("https://*.x.example.com:8443", "https://*.x.example.com:8443"),
    ],
)  # fmt: skip
def test_declared_hosts(text, shown):
    assert str(parse_origin(text)) == shown


@pytest.mark.parametrize(
    "text", ["", "*", "*.com", "*.127.0.0.1", "ftp://x.example.com", "https://", "a b", "x.example.com:0x"]
)
def test_what_declares_no_host(text):
    with pytest.raises(ValueError):
        parse_origin(text)


def test_the_origin_for_people_has_nothing_secret():
    assert find_origin("https://u:p@hooks.example.com/services/T0/B0/secret?x=y") == "https://hooks.example.com"
    assert find_origin("nonsense") == ""


@dataclass
class Head:
    name: str
    hosts: tuple[str, ...]


def test_the_list_for_the_firewall():
    heads = [
        Head("zoho_books", ("www.zohoapis.com", "accounts.zoho.com")),
        Head("quickbooks", ("quickbooks.api.intuit.com", "https://oauth.platform.intuit.com")),
        Head("zoho_crm", ("https://accounts.zoho.com",)),
        Head("epic_dft", ()),
    ]
    assert [(str(line.origin), line.connectors) for line in list_egress(heads)] == [
        ("https://accounts.zoho.com", ("zoho_books", "zoho_crm")),
        ("https://oauth.platform.intuit.com", ("quickbooks",)),
        ("https://quickbooks.api.intuit.com", ("quickbooks",)),
        ("https://www.zohoapis.com", ("zoho_books",)),
    ]
    assert list_egress(reversed(heads)) == list_egress(heads)
    with pytest.raises(ValueError):
        list_egress([Head("bad", ("not a host",))])


def test_origins_compare_by_all_three_parts():
    assert not Origin("https", "a.example", 443).covers(Origin("http", "a.example", 80))
    assert not Origin("https", "a.example", 443).covers(Origin("https", "a.example", 8443))


class TestConnections:
    """The policy holds where the connection is made, whatever a name resolves to at that moment."""

    @pytest.fixture
    async def server(self):
        self.received = 0

        async def answer(reader, writer):
            self.received += 1
            await reader.readuntil(b"\r\n\r\n")
            writer.write(b"HTTP/1.1 200 OK\r\nContent-Length: 0\r\n\r\n")
            await writer.drain()
            writer.close()

        server = await asyncio.start_server(answer, "127.0.0.1", 0)
        async with server:
            yield server.sockets[0].getsockname()[1]

    async def call(self, policy, url):
        async with HttpClient(policy=policy) as client:
            return await client.send(HttpRequest("GET", url), deadline=5)

    def resolve_to(self, monkeypatch, *addresses):
        asked = []

        async def resolve(_resolver, host, port=0, family=0):
            asked.append(host)
            return [
                {"hostname": host, "host": address, "port": port, "family": socket.AF_INET, "proto": 0, "flags": 0}
                for address in addresses
            ]

        monkeypatch.setattr("aiohttp.ThreadedResolver.resolve", resolve)
        return asked

    async def test_a_name_that_leads_inside_is_refused_before_connecting(self, server, monkeypatch):
        asked = self.resolve_to(monkeypatch, "127.0.0.1")
        url = f"http://api.example.com:{server}/"
        with pytest.raises(HostRefused) as caught:
            await self.call(HostPolicy([url]), url)
        assert (caught.value.kind, caught.value.code) == (FailureKind.UNAVAILABLE, "ADDRESS_REFUSED")
        assert (self.received, asked) == (0, ["api.example.com"])

    async def test_one_inside_address_among_others_refuses_the_name(self, server, monkeypatch):
        self.resolve_to(monkeypatch, "93.184.215.14", "127.0.0.1")
        url = f"http://api.example.com:{server}/"
        with pytest.raises(HostRefused):
            await self.call(HostPolicy([url]), url)
        assert self.received == 0

    async def test_the_settings_allow_it_by_name_or_network(self, server, monkeypatch):
        self.resolve_to(monkeypatch, "127.0.0.1")
        url = f"http://erp.example.com:{server}/"
        for private in (["erp.example.com"], ["127.0.0.0/8"]):
            assert (await self.call(HostPolicy([url], private=private), url)).status == 200
        assert self.received == 2

    async def test_literals_are_judged_too(self, server):
        url = f"http://127.0.0.1:{server}/"
        with pytest.raises(HostRefused):
            await self.call(HostPolicy([url]), url)
        assert self.received == 0
        assert (await self.call(HostPolicy([url], private=["127.0.0.1"]), url)).status == 200

    async def test_undeclared_hosts_are_not_even_looked_up(self, server, monkeypatch):
        asked = self.resolve_to(monkeypatch, "127.0.0.1")
        with pytest.raises(HostRefused) as caught:
            await self.call(HostPolicy(["api.example.com"], private=["127.0.0.1"]), f"http://evil.example:{server}/")
        assert (caught.value.kind, caught.value.code, asked) == (FailureKind.INVALID, "HOST_UNDECLARED", [])

    async def test_without_a_policy_anything_goes(self, server):
        # The negative control of the tests above: the same server does answer.
        assert (await self.call(None, f"http://127.0.0.1:{server}/")).status == 200
        assert self.received == 1

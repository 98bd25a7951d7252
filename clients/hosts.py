"""Where calls may go: hosts a connector declares, addresses that are not inside our own network.

A target's answer may hold URLs (the next page, a link). Followed blindly they carry our credentials wherever the answer
says, or reach what only we can reach: a metadata service, an admin port on loopback. So a URL must name a declared
host, and what the name resolves to is judged again, address by address, before a connection is made to exactly that
address (``clients.http``).

Whoever really has a target inside (a hospital's own ERP) names it in the settings.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import lru_cache
from ipaddress import IPv4Address, IPv6Address, IPv6Network, ip_address, ip_network
from typing import Protocol

from yarl import URL  # the parser of the library that dials: two parsers may disagree about the host

from schemas.failure import Failure, FailureKind

_PORTS = {"https": 443, "http": 80}
_NAT64 = IPv6Network("64:ff9b::/96")
_NAME = re.compile(r"(?=.{1,253}$)[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?(\.[a-z0-9_]([a-z0-9_-]{0,61}[a-z0-9_])?)*")


class HostRefused(Failure):
    """A call may not go there; nothing left.

    INVALID when the URL itself is refused (HOST_UNDECLARED, URL_INVALID, URL_USERINFO, ADDRESS_REFUSED). UNAVAILABLE
    when a declared name resolves to a refused address: that is the network's fault, not the record's.
    """


@dataclass(frozen=True, slots=True, order=True)
class Origin:
    """Scheme, host and port. ``*.`` before the host means any host below it, not the host itself."""

    scheme: str
    host: str
    port: int

    def __str__(self) -> str:
        host = f"[{self.host}]" if ":" in self.host else self.host
        port = "" if self.port == _PORTS[self.scheme] else f":{self.port}"
        return f"{self.scheme}://{host}{port}"

    def covers(self, other: Origin) -> bool:
        """Whether a URL of the other origin may be called where this one is declared."""
        return (self.scheme, self.port) == (other.scheme, other.port) and self.covers_name(other.host)

    def covers_name(self, host: str) -> bool:
        """Whether the host is this one, or below it when it begins with ``*.``."""
        if self.host.startswith("*."):
            return host.endswith(self.host[1:]) and len(host) > len(self.host) - 1
        return host == self.host


def parse_origin(declared: str) -> Origin:
    """Read ``api.example.com``, ``*.example.com``, ``host:8443`` or the origin of a URL; https unless it says http.

    Raises ``ValueError`` for anything else, and for a wildcard over a whole top-level domain.
    """
    text = declared if "://" in declared else f"https://{declared}"
    wildcard = "://*." in text
    try:
        origin = _find_origin(URL(text.replace("://*.", "://", 1)))
    except (HostRefused, ValueError, TypeError):
        raise ValueError(f"{declared!r} is not a host or the URL of one") from None
    if not wildcard:
        return origin
    if "." not in origin.host or _read_address(origin.host) is not None:
        raise ValueError(f"{declared!r} is too wide")
    return Origin(origin.scheme, f"*.{origin.host}", origin.port)


_MOST_ACCEPTED = 1000
"""Origins remembered as allowed: a wildcard covers any number."""


class HostPolicy:
    """Where one target instance may be called.

    ``declared``: the hosts of the connector's head and the instance's own base URL, as ``parse_origin`` reads them.
    ``private``: what of the inside the settings allow: addresses, networks (``10.20.0.0/16``) or host names. A name
    allows private and loopback addresses for itself; link-local ones (cloud metadata) must be named as addresses.
    Multicast, unspecified and reserved addresses are never allowed. Raises ``ValueError`` for an unreadable entry.
    """

    def __init__(self, declared: Iterable[str], *, private: Iterable[str] = ()) -> None:
        self._declared = tuple(parse_origin(text) for text in declared)
        self._accepted: set[Origin] = set()
        self._networks = []
        self._names = set()
        for entry in private:
            try:
                self._networks.append(ip_network(entry))
            except ValueError:
                if "/" in entry or not _NAME.fullmatch(_normalise(entry)):
                    raise ValueError(f"{entry!r} is not an address, a network or a host name") from None
                self._names.add(_normalise(entry))

    def check_url(self, url: str) -> None:
        """Raise ``HostRefused`` unless the URL names a declared origin and, as a literal, an allowed address."""
        try:
            parsed = URL(url)
            origin = _find_origin(parsed)
        except (ValueError, TypeError):
            raise HostRefused(FailureKind.INVALID, "URL_INVALID", "url") from None
        if parsed.raw_user is not None or parsed.raw_password is not None:
            # It would be sent as credentials.
            raise HostRefused(FailureKind.INVALID, "URL_USERINFO", "url")
        if origin in self._accepted:
            return
        if not any(declared.covers(origin) for declared in self._declared):
            raise HostRefused(FailureKind.INVALID, "HOST_UNDECLARED", "url")
        if _read_address(origin.host) is not None and not self.allows(origin.host, origin.host):
            raise HostRefused(FailureKind.INVALID, "ADDRESS_REFUSED", "url")
        if len(self._accepted) < _MOST_ACCEPTED:
            self._accepted.add(origin)

    def check_address(self, host: str, address: str) -> None:
        """Raise ``HostRefused`` unless a connection for this host may be made to this resolved address."""
        host = _normalise(host)
        if not any(declared.covers_name(host) for declared in self._declared):
            raise HostRefused(FailureKind.INVALID, "HOST_UNDECLARED", "url")
        if not self.allows(host, address):
            raise HostRefused(FailureKind.UNAVAILABLE, "ADDRESS_REFUSED")

    def allows(self, host: str, address: str) -> bool:
        """Whether the address is public, or private and allowed. An embedded IPv4 address must be allowed too."""
        read = _read_address(address)
        if read is None:
            return False
        embedded = _find_embedded(read)
        if embedded is not None:
            return self._allows_one(host, embedded)
        return self._allows_one(host, read)

    def _allows_one(self, host: str, address: IPv4Address | IPv6Address) -> bool:
        if address.is_multicast or address.is_unspecified or address == IPv4Address("255.255.255.255"):
            return False
        if any(address in network for network in self._networks):
            return True
        if address.is_link_local:
            return False
        if address.is_loopback:
            return _normalise(host) in self._names
        if address.is_reserved:
            return False
        # Site-local addresses were given up as a kind, and networks still have them.
        is_public = address.is_global and not (isinstance(address, IPv6Address) and address.is_site_local)
        return is_public or _normalise(host) in self._names


class DeclaresHosts(Protocol):
    """What a connector's head says about its hosts."""

    @property
    def name(self) -> str:
        """Name of the connector."""

    @property
    def hosts(self) -> Iterable[str]:
        """Hosts it calls, as ``parse_origin`` reads them; those of the settings' base URL not included."""


@dataclass(frozen=True, slots=True)
class Egress:
    """One line for a firewall: an origin, and the connectors that call it."""

    origin: Origin
    connectors: tuple[str, ...]


def list_egress(heads: Iterable[DeclaresHosts]) -> list[Egress]:
    """Every origin that these connectors call, sorted. Raises ``ValueError`` for a host that cannot be read."""
    found: dict[Origin, set[str]] = {}
    for head in heads:
        for host in head.hosts:
            found.setdefault(parse_origin(host), set()).add(head.name)
    return [Egress(origin, tuple(sorted(found[origin]))) for origin in sorted(found)]


def find_origin(url: str) -> str:
    """Scheme, host and port of a URL, for people: no path, no query, no credentials. Empty when there is none."""
    try:
        return str(_find_origin(URL(url)))
    except (HostRefused, ValueError, TypeError):
        return ""


def _find_origin(url: URL) -> Origin:
    host = _normalise(url.raw_host or "")
    readable = _NAME.fullmatch(host) or _read_address(host) is not None
    if url.scheme not in _PORTS or not readable or url.port is None:
        raise HostRefused(FailureKind.INVALID, "URL_INVALID", "url")
    return Origin(url.scheme, host, url.port)


def _normalise(host: str) -> str:
    return host.lower().removesuffix(".")


@lru_cache(maxsize=1024)
def _read_address(text: str) -> IPv4Address | IPv6Address | None:
    try:
        return ip_address(text.partition("%")[0])
    except ValueError:
        return None


def _find_embedded(address: IPv4Address | IPv6Address) -> IPv4Address | None:
    if isinstance(address, IPv4Address):
        return None
    if address in _NAT64:
        return IPv4Address(int(address) & 0xFFFFFFFF)
    teredo = address.teredo
    return address.ipv4_mapped or address.sixtofour or (teredo[1] if teredo else None)

"""The connectors of this installation, as the settings and the generated tables need them."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict

from clients.hosts import parse_origin
from sinks import catalog as target_catalog
from sinks.contract import Target, TargetSettings
from sinks.transport import RefreshTokenSettings
from sources import catalog as gateway_catalog
from sources.contract import Gateway


class UnknownTarget(TargetSettings):
    """A target whose connector does not exist: only what all targets share can be checked."""

    model_config = ConfigDict(extra="allow")


@dataclass(frozen=True, slots=True)
class Gateways:
    """Payment gateways: ours, and those of the user's folder when there is one."""

    folder: Path | None = None

    def list_all(self) -> dict[str, Gateway]:
        """All of them by name. Raises ``ConnectorBroken``."""
        return gateway_catalog.discover(self.folder)

    def list_own(self) -> frozenset[str]:
        """Names of those in the user's folder."""
        return frozenset(self.list_all()) - frozenset(gateway_catalog.discover())

    def find_mappings(self, name: str) -> Path | None:
        """Folder of the mapping of one of them: the user's for a gateway of theirs, None for one of ours."""
        return None if name in gateway_catalog.discover() else self.folder


@dataclass(frozen=True, slots=True)
class Targets:
    """Target connectors: ours, and those of the user's folder when there is one."""

    folder: Path | None = None

    def list_all(self) -> dict[str, Target]:
        """All of them by name. Raises ``TargetBroken``."""
        return target_catalog.discover(self.folder)

    def list_own(self) -> frozenset[str]:
        """Names of those in the user's folder."""
        return frozenset(self.list_all()) - frozenset(target_catalog.discover())

    def list_renewing(self) -> frozenset[str]:
        """Names of those whose instances keep a refresh token: `secrets.vault_key` seals it."""
        return frozenset(
            name for name, target in self.list_all().items() if issubclass(target.settings, RefreshTokenSettings)
        )

    def find_model(self, entry: Any) -> type[BaseModel]:
        """Settings model of the connector that one ``[[targets]]`` table names."""
        name = entry.get("connector") if isinstance(entry, dict) else None
        target = self.list_all().get(name) if isinstance(name, str) else None
        return target.settings if target is not None else UnknownTarget


def list_targets() -> dict[str, Target]:
    """Our own target connectors by name."""
    return Targets().list_all()


@dataclass(frozen=True, slots=True)
class CalledHosts:
    """What a connector calls in one of the vendor's environments.

    No ``origins`` means that the host is in the instance's settings.
    """

    connector: str
    environment: str
    origins: tuple[str, ...]


def list_hosts(targets: Iterable[Target]) -> list[CalledHosts]:
    """Every host that targets call, from their heads, by connector and environment: what a firewall must let out.

    ``ValueError`` when a head names something that is no host.
    """
    found = []
    for target in targets:
        head = target.http
        if head is None:
            found.append(CalledHosts(target.name, "every", ()))
            continue
        for environment, base in (("production", head.production), ("sandbox", head.sandbox)):
            called = (base, head.token_url, *head.regions) if base else ()
            origins = {str(parse_origin(_cut_path(url))) for url in called if url}
            found.append(CalledHosts(target.name, environment, tuple(sorted(origins))))
    return found


def _cut_path(url: str) -> str:
    parts = urlsplit(url)
    return f"{parts.scheme}://{parts.netloc}"

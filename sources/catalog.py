"""Which gateways there are: every Python file in ``sources/payments/``, and in the user's own folder when one is named.

Nothing is registered anywhere. A file that cannot be imported, or that declares no ``GATEWAY`` of its own name, stops
the start with its path and the cause; it is never skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.connector_files import ConnectorFiles, HeadWrong
from schemas.failure import ConfigurationError
from sources import payments
from sources.contract import Gateway

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


class ConnectorBroken(ConfigurationError):
    """A connector file cannot be used."""

    code = "RS165"
    meaning = "A connector file cannot be imported, or does not declare what its name promises."
    default_remedy = "Correct the named file, or remove it from the connector folder."


class ConnectorUnknown(ConfigurationError):
    """A gateway is named that no connector file provides."""

    code = "RS166"
    meaning = "The configuration names a gateway for which there is no connector file."
    default_remedy = "Use one of the named gateways, or add a connector file."


def discover(extra: Path | None = None) -> dict[str, Gateway]:
    """All gateways by name, sorted; ``extra`` is a folder with the user's own connector files.

    Raises ``ConnectorBroken`` for the first file that cannot be used, and for a name that exists twice.
    """
    return _FILES.discover(extra)


def load(name: str, extra: Path | None = None) -> Gateway:
    """One gateway; only its own file is imported. Raises ``ConnectorUnknown`` or ``ConnectorBroken``."""
    return _FILES.load(name, extra)


def _read_head(module: ModuleType, name: str) -> Gateway:
    gateway = getattr(module, "GATEWAY", None)
    if not isinstance(gateway, Gateway):
        raise HeadWrong("it declares no GATEWAY (an instance of sources.contract.Gateway).")
    if gateway.name != name:
        raise HeadWrong(f"its GATEWAY is named {gateway.name!r}, the file {name!r}.")
    return gateway


_FILES = ConnectorFiles(
    package=payments,
    user_package="remitstream_user_gateways",
    noun="gateway",
    read=_read_head,
    broken=ConnectorBroken,
    unknown=ConnectorUnknown,
)

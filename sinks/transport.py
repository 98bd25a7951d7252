"""How frozen requests travel: one transport per instance, over the clients.

A transport sends once and returns the answer's bytes, or raises ``Failure`` of kind UNAVAILABLE (nothing was written)
or AMBIGUOUS (it may have landed). ``before_write`` runs with nothing between it and the socket write; what it raises
withdraws the call.
"""

from __future__ import annotations

import ssl
from typing import TYPE_CHECKING, Protocol

from pydantic import Field, FilePath, model_validator

from clients.mllp import MllpClient
from schemas.failure import ConfigurationError
from sinks.contract import Request, Target, TargetSettings

if TYPE_CHECKING:
    from collections.abc import Callable


class Transport(Protocol):
    """What the runner needs of a connection to a target instance."""

    connections: int
    """Calls that may be under way at once."""
    call_deadline: float
    """Seconds after which a call is given up."""

    async def send(self, request: Request, before_write: Callable[[], None]) -> bytes:
        """Send once; the answer's bytes."""

    async def close(self) -> None:
        """Close the connections."""


class CallSettings(TargetSettings):
    """What every instance that is called over a network has."""

    call_deadline_seconds: float = Field(
        default=10.0, gt=0, le=300, description="A call without an answer by then has an unknown outcome."
    )
    connections: int = Field(default=4, ge=1, le=256, description="Calls under way at once.")


class MllpSettings(CallSettings):
    """An instance reached over MLLP."""

    host: str = Field(min_length=1, description="Host of the receiver.")
    port: int = Field(ge=1, le=65535, description="Port of the receiver.")
    tls: bool = Field(default=False, description="Speak TLS and verify the receiver's certificate.")
    tls_ca: FilePath | None = Field(default=None, description="PEM file of the authorities; default: the system's.")
    tls_certificate: FilePath | None = Field(default=None, description="PEM file of our certificate (mutual TLS).")
    tls_key: FilePath | None = Field(default=None, description="PEM file of our private key.")

    @model_validator(mode="after")
    def _complete_tls(self) -> MllpSettings:
        if not self.tls and (self.tls_ca or self.tls_certificate or self.tls_key):
            raise ValueError("tls_ca, tls_certificate and tls_key need tls = true")
        if bool(self.tls_certificate) != bool(self.tls_key):
            raise ValueError("mutual TLS needs both tls_certificate and tls_key")
        return self


class MllpTransport:
    """MLLP over a pool of connections, one message in flight on each."""

    def __init__(self, settings: MllpSettings) -> None:
        self.connections = settings.connections
        self.call_deadline = settings.call_deadline_seconds
        self._client = MllpClient(
            settings.host,
            settings.port,
            connections=settings.connections,
            tls=_build_tls(settings),
            connect_timeout=min(5.0, settings.call_deadline_seconds),
        )

    async def send(self, request: Request, before_write: Callable[[], None]) -> bytes:
        """Send once; the acknowledgement whose MSA-2 is the request's control id."""
        return await self._client.send(
            request.body, request.control_id, deadline=self.call_deadline, before_write=before_write
        )

    async def close(self) -> None:
        """Close the connections."""
        await self._client.close()


def open_transport(target: Target, settings: TargetSettings) -> Transport:
    """The transport of an instance. Raises ``ConfigurationError`` when its connector names one we do not have."""
    if target.transport == "mllp" and isinstance(settings, MllpSettings):
        return MllpTransport(settings)
    raise ConfigurationError(
        f"there is no transport {target.transport!r} for it.",
        place=f"targets.{settings.name}",
        remedy="A target with transport `mllp` has settings derived from sinks.transport.MllpSettings.",
    )


def _build_tls(settings: MllpSettings) -> ssl.SSLContext | None:
    if not settings.tls:
        return None
    try:
        context = ssl.create_default_context(cafile=str(settings.tls_ca) if settings.tls_ca else None)
        if settings.tls_certificate and settings.tls_key:
            context.load_cert_chain(settings.tls_certificate, settings.tls_key)
    except (ssl.SSLError, OSError) as error:
        raise ConfigurationError(
            f"the TLS files cannot be used ({type(error).__name__}).",
            place=f"targets.{settings.name}",
            remedy="Give readable PEM files that belong together.",
        ) from None
    return context

"""Sections of the configuration file that belong to no other package: where things listen, keep state and log."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import Field, SecretStr

from schemas.tenancy import Name, Strict


class SecretSettings(Strict):
    """Keys of our own."""

    hmac_key: SecretStr = Field(
        description="Key of the digests that stand for patient ids and bodies in keys and headers; at least 32 "
        "characters. It must never change: a new key makes every known event look new."
    )
    vault_key: SecretStr | None = Field(
        default=None,
        description="Key that seals the refresh tokens in `token_folder`; at least 32 characters. Needed by targets "
        "with a refresh token. With another key the accounts have to be connected again.",
    )


class ConnectorSettings(Strict):
    """Connectors of your own, beside those that come with remitstream."""

    targets: Path | None = Field(
        default=None,
        description="Folder with target connectors (see docs/adding-a-target.md). Its Python files run with the rights "
        "of the service: nobody else may write there.",
    )
    gateways: Path | None = Field(
        default=None,
        description="Folder with gateway connectors, their mappings beside them (see docs/adding-a-gateway.md). What "
        "holds for `targets` holds for it.",
    )


class CertificateSettings(Strict):
    """Certificate of a server of ours."""

    certificate: Path = Field(description="PEM file with the certificate chain.")
    key: Path = Field(description="PEM file with the private key.")


class TlsSettings(CertificateSettings):
    """Certificate of the listener, and whose clients may connect."""

    client_ca: Path | None = Field(
        default=None, description="PEM file of the authorities whose clients may connect; none means any client."
    )


class ReceiverSettings(Strict):
    """The webhook receiver."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=8480, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    max_body_bytes: int = Field(
        default=1_048_576,
        ge=1024,
        le=4_194_304,
        description="Larger deliveries are refused with 413; a gateway's own limit may be lower.",
    )
    tls: CertificateSettings | None = Field(
        default=None, description="Without it the receiver belongs behind a TLS proxy."
    )


class ListenerSettings(Strict):
    """The MLLP listener of the HL7 feeds."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    port: int = Field(default=2575, ge=0, le=65535, description="Port to listen on; 0 takes a free one.")
    tls: TlsSettings | None = Field(
        default=None, description="Without it the listener belongs inside a private network."
    )


class WorkerSettings(Strict):
    """The stream workers."""

    partitions: int = Field(
        default=4, ge=1, le=1024, description="Partitions of every topic of the flow; frozen once topics exist."
    )
    processes: int = Field(default=1, ge=1, le=64, description="Worker processes that `remitstream run` starts.")
    state: Path = Field(default=Path(".remitstream/state"), description="Folder of the local stores; may be lost.")
    instance: Name | None = Field(
        default=None,
        description="Stable name of this host in groups and transactions, unique among hosts; default: its host name.",
    )
    group_protocol: Literal["classic", "consumer"] = Field(
        default="classic",
        description="How workers share partitions. `classic`: static members, so that a restart within "
        "`kafka.session_timeout_seconds` moves nothing. `consumer` (KIP-848): the broker shares out and a change stops "
        "only what moves, but there are no static members and the broker sets the session: "
        "`group.consumer.session.timeout.ms` (45 s), or `consumer.session.timeout.ms` of the group; a killed worker's "
        "partitions wait that long. Stop all workers to change it.",
    )
    batch_records: int = Field(default=500, ge=1, le=20_000, description="Most records in one transaction.")
    parent_wait_hours: int = Field(
        default=72,
        ge=1,
        le=720,
        description="How long a refund or dispute waits for its unknown payment before review.",
    )
    waiting_limit: int = Field(
        default=100_000, ge=2, description="Records on hold in a partition at which it takes in no new ones."
    )


class HealthSettings(Strict):
    """Health and metrics endpoints, one per process; 0 takes a free port and prints it."""

    host: str = Field(default="127.0.0.1", description="Address to listen on.")
    receiver: int = Field(default=9471, ge=0, le=65535, description="Port of the receiver.")
    listener: int = Field(default=9472, ge=0, le=65535, description="Port of the listener.")
    projector: int = Field(default=9473, ge=0, le=65535, description="Port of the projector.")
    worker: int = Field(
        default=9480, ge=0, le=65535, description="Port of the first worker; the next take the next ones."
    )
    deliverer: int = Field(
        default=9500, ge=0, le=65535, description="Port of the first target's deliverer; the next take the next ones."
    )


class LogSettings(Strict):
    """The log on standard error."""

    level: Literal["debug", "info", "warning", "error"] = Field(
        default="info", description="WARNING means nothing was lost, ERROR that a person must act."
    )
    format: Literal["json", "console"] = Field(
        default="json", description="One JSON object a line, or text for people."
    )


class StackSettings(Strict):
    """The embedded Kafka, registry and Redis, for trying out and for tests; one broker, no replicas."""

    embedded: bool = Field(
        default=False,
        description="Use the embedded stack. An address given with higher precedence (a `kafka.bootstrap` in the "
        "environment over this setting in the file) wins: then all three services are your own.",
    )
    home: Path = Field(default=Path(".remitstream/stack"), description="Folder of its data, logs and addresses.")
    cache: Path = Field(
        default=Path("~/.cache/remitstream"), description="Folder of the downloads, shared by projects."
    )
    mirror: str | None = Field(
        default=None, description="Base URL of a Maven mirror, where the public one is out of reach."
    )


class SandboxSettings(Strict):
    """Sample traffic and simulated billing systems; they listen on the host and port of each target."""

    events: int = Field(default=2000, ge=200, le=10_000_000, description="Webhooks and HL7 messages to send, about.")
    seed: int = Field(default=1, ge=0, description="Same seed, same traffic.")
    control_port: int = Field(
        default=9490, ge=0, le=65535, description="Port of the billing systems' control API; 0 takes a free one."
    )

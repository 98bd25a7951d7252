"""Kafka as we talk to it: settings, client configuration, and the few facts asked of the cluster."""

from __future__ import annotations

import os
import socket
import ssl
import time
from typing import TYPE_CHECKING, Any, Literal

from confluent_kafka import KafkaError, KafkaException, TopicCollection
from confluent_kafka.admin import AdminClient
from pydantic import Field, SecretStr, model_validator

from schemas.failure import ConfigurationError, TemporaryError
from schemas.tenancy import Strict
from telemetry.log import get_log

if TYPE_CHECKING:
    from collections.abc import Iterable


class KafkaUnreachable(TemporaryError):
    """No broker answers."""

    code = "RS210"
    meaning = "No Kafka broker answers, or it answers too late."
    default_remedy = "Check `kafka.bootstrap`, the security settings and that the brokers are up; nothing was lost."


class KafkaSettings(Strict):
    """Connection to Kafka. Everything beside ``bootstrap`` has the default of an unsecured local broker."""

    bootstrap: str = Field(default="127.0.0.1:9092", description="Comma-separated host:port list.")
    security_protocol: Literal["PLAINTEXT", "SSL", "SASL_PLAINTEXT", "SASL_SSL"] = Field(
        default="PLAINTEXT", description="Encryption and log-in; SASL_SSL or SSL outside a trial."
    )
    sasl_mechanism: Literal["PLAIN", "SCRAM-SHA-256", "SCRAM-SHA-512"] | None = Field(
        default=None, description="Required with SASL."
    )
    sasl_username: str | None = Field(default=None, description="Required with SASL.")
    sasl_password: SecretStr | None = Field(default=None, description="Required with SASL.")
    ssl_ca_location: str | None = Field(default=None, description="PEM file of the certificate authorities.")
    ssl_certificate_location: str | None = Field(default=None, description="PEM file of our certificate (mutual TLS).")
    ssl_key_location: str | None = Field(default=None, description="PEM file of our private key (mutual TLS).")
    ssl_key_password: SecretStr | None = Field(default=None, description="Password of that private key.")
    session_timeout_seconds: int = Field(default=45, ge=6, le=300, description="Group session of workers, deliverers.")
    transaction_timeout_seconds: int = Field(
        default=10, ge=2, le=300, description="A frozen process holds back read_committed readers at most this long."
    )

    @model_validator(mode="after")
    def _complete(self) -> KafkaSettings:
        if self.security_protocol.startswith("SASL") and not (
            self.sasl_mechanism and self.sasl_username and self.sasl_password
        ):
            raise ValueError("SASL needs sasl_mechanism, sasl_username and sasl_password")
        # Ignored, they would leave a connection open that is thought to be protected.
        if "SASL" not in self.security_protocol and (self.sasl_mechanism or self.sasl_username or self.sasl_password):
            raise ValueError("sasl_* is given, but security_protocol is not SASL_SSL or SASL_PLAINTEXT")
        files = (self.ssl_ca_location, self.ssl_certificate_location, self.ssl_key_location)
        if "SSL" not in self.security_protocol and any(files):
            raise ValueError("ssl_* is given, but security_protocol is not SASL_SSL or SSL")
        if bool(self.ssl_certificate_location) != bool(self.ssl_key_location):
            raise ValueError("mutual TLS needs both ssl_certificate_location and ssl_key_location")
        return self

    def _check_files(self) -> None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
        try:
            if self.ssl_ca_location:
                context.load_verify_locations(self.ssl_ca_location)
            if self.ssl_certificate_location and self.ssl_key_location:
                password = self.ssl_key_password.get_secret_value() if self.ssl_key_password else ""
                # Without a password here the interpreter would ask for one on the terminal.
                context.load_cert_chain(self.ssl_certificate_location, self.ssl_key_location, password)
        except (OSError, ssl.SSLError) as error:
            raise KafkaFilesUnusable(f"{type(error).__name__}.", place="kafka.ssl_*") from None

    def build_client(self, client_id: str) -> dict[str, Any]:
        """Configuration every librdkafka client shares. Raises ``KafkaFilesUnusable``."""
        self._check_files()
        config: dict[str, Any] = {
            "bootstrap.servers": self.bootstrap,
            "client.id": client_id,
            "security.protocol": self.security_protocol,
            "socket.keepalive.enable": True,
            "reconnect.backoff.max.ms": 2000,
            # librdkafka would write a line per failed connection, twenty a second and client, past our log.
            "log_level": 2,
            "error_cb": _Complaints(client_id),
        }
        optional = {
            "sasl.mechanism": self.sasl_mechanism,
            "sasl.username": self.sasl_username,
            "sasl.password": self.sasl_password and self.sasl_password.get_secret_value(),
            "ssl.ca.location": self.ssl_ca_location,
            "ssl.certificate.location": self.ssl_certificate_location,
            "ssl.key.location": self.ssl_key_location,
            "ssl.key.password": self.ssl_key_password and self.ssl_key_password.get_secret_value(),
        }
        return config | {name: value for name, value in optional.items() if value is not None}


def reaches_broker(client: Any, topic: str | None = None, timeout: float = 2.0) -> bool:
    """Whether a broker answers this client (consumer or producer) now; it is asked about one topic, or all."""
    try:
        return bool(client.list_topics(topic, timeout=timeout).brokers)
    except KafkaException:
        return False


class KafkaFilesUnusable(ConfigurationError):
    """The TLS files of the connection to Kafka cannot be used."""

    code = "RS111"
    meaning = "A certificate or key file of the connection to Kafka cannot be read, or the two do not belong together."
    default_remedy = "Correct the files named in `kafka.ssl_*`: PEM, readable by this user."


COMPLAINT_SECONDS = 30.0
"""The same trouble of one client is told this often."""


class _Complaints:
    """Logs what librdkafka reports about its connections; an outage is one line now and then, not a flood.

    Its texts name hosts, ports and TLS or log-in errors, never records.
    """

    def __init__(self, client_id: str) -> None:
        self._client_id = client_id
        self._told: dict[int, float] = {}

    def __call__(self, error: KafkaError) -> None:
        now = time.monotonic()
        if now - self._told.get(error.code(), float("-inf")) >= COMPLAINT_SECONDS:
            self._told[error.code()] = now
            get_log("kafka").warning(
                "connection_trouble", client=self._client_id, error=error.name(), detail=error.str()
            )


PRODUCER = {
    "acks": "all",
    "enable.idempotence": True,
    # Java's partitioner; librdkafka's default differs and would break co-partitioning.
    "partitioner": "murmur2_random",
    "compression.type": "lz4",
    "message.max.bytes": 8_388_608,
}
"""Producer settings nobody may leave out."""


def build_instance_name() -> str:
    """A name for this host, stable over restarts, used where the configuration names none."""
    return socket.gethostname().split(".")[0] or f"host-{os.getuid()}"


def describe_topic_ids(kafka: KafkaSettings, names: Iterable[str], *, timeout: float = 10.0) -> dict[str, str]:
    """Topic name -> topic id, for those that exist. Raises ``KafkaUnreachable``."""
    return {name: topic_id for name, (topic_id, _) in describe_topics(kafka, names, timeout=timeout).items()}


def describe_topics(kafka: KafkaSettings, names: Iterable[str], *, timeout: float = 10.0) -> dict[str, tuple[str, int]]:
    """Topic name -> topic id and partition count, for those that exist. Raises ``KafkaUnreachable``."""
    wanted = list(names)
    if not wanted:
        return {}
    admin = AdminClient(kafka.build_client("remitstream-admin"))
    found: dict[str, tuple[str, int]] = {}
    try:
        futures = admin.describe_topics(TopicCollection(wanted), request_timeout=timeout)
        for name, future in futures.items():
            try:
                topic = future.result()
                found[name] = str(topic.topic_id), len(topic.partitions)
            except KafkaException as error:
                if error.args[0].code() != KafkaError.UNKNOWN_TOPIC_OR_PART:
                    raise
    except KafkaException as error:
        raise KafkaUnreachable(f"topics cannot be described ({name_error(error)}).", place=kafka.bootstrap) from None
    return found


def name_error(error: BaseException) -> str:
    """Name of a Kafka error without its text, which may hold record contents."""
    cause = error.args[0] if error.args else None
    return str(cause.name()) if isinstance(cause, KafkaError) else type(error).__name__

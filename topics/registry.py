"""The schema registry: the four calls we need of the Confluent API, over urllib.

Used at start-up and when a reader meets an unknown writer schema; never once per event.
"""

from __future__ import annotations

import base64
import http.client
import json
import ssl
import urllib.error
import urllib.request
from typing import TYPE_CHECKING, Any
from urllib.parse import urlsplit

from pydantic import Field, SecretStr, model_validator

from schemas import wire
from schemas.failure import ConfigurationError, FatalError, TemporaryError
from schemas.tenancy import Strict

if TYPE_CHECKING:
    from collections.abc import Iterable

    from topics.catalog import Topic

COMPATIBILITY = "FULL_TRANSITIVE"
_JSON = "application/vnd.schemaregistry.v1+json"


class RegistryUnreachable(TemporaryError):
    """The registry does not answer."""

    code = "RS212"
    meaning = "The schema registry does not answer."
    default_remedy = "Check `registry.url` and that the registry is up; processing pauses and goes on by itself."


class SchemaMissing(ConfigurationError):
    """A schema in force is not registered."""

    code = "RS110"
    meaning = "A schema this version writes is not registered under its subject."
    default_remedy = "Run `remitstream schemas register` before starting this version."


class SchemaBreak(FatalError):
    """A schema would break readers or writers of older versions."""

    code = "RS311"
    meaning = "A schema is not FULL_TRANSITIVE compatible with the registered versions."
    default_remedy = "Give new fields a default, remove none without one; deploy the schema only when the check passes."


class RegistryFilesUnusable(ConfigurationError):
    """The authorities of the registry's certificate cannot be used."""

    code = "RS115"
    meaning = "The file of the certificate authorities of the schema registry cannot be read."
    default_remedy = "Correct `registry.ca_location`: PEM, readable by this user."


def _build_context(authorities: str) -> ssl.SSLContext:
    try:
        return ssl.create_default_context(cafile=authorities)
    except (OSError, ssl.SSLError) as error:
        raise RegistryFilesUnusable(f"{type(error).__name__}.", place="registry.ca_location") from None


class RegistrySettings(Strict):
    """Connection to a registry with the Confluent API."""

    url: str = Field(default="http://127.0.0.1:8081", description="Base URL; Apicurio's is `.../apis/ccompat/v7`.")
    username: str | None = Field(default=None, description="User of HTTP basic log-in.")
    password: SecretStr | None = Field(default=None, description="Password of HTTP basic log-in.")
    ca_location: str | None = Field(default=None, description="PEM file of the certificate authorities.")

    @model_validator(mode="after")
    def _complete(self) -> RegistrySettings:
        parts = urlsplit(self.url)
        if parts.scheme not in {"http", "https"} or not parts.hostname:
            raise ValueError("url must be http://host:port/... or https://host:port/...")
        if bool(self.username) != bool(self.password):
            raise ValueError("a log-in needs both username and password")
        # Ignored, it would leave a connection open that is thought to be protected.
        if self.ca_location and parts.scheme != "https":
            raise ValueError("ca_location is given, but url is not https://")
        return self


class Registry:
    """A registry. Blocking; ids and schemas are cached for the life of the process."""

    def __init__(self, settings: RegistrySettings, *, timeout: float = 10.0) -> None:
        self._settings = settings
        self._timeout = timeout
        self._schemas: dict[int, str] = {}
        self._context = _build_context(settings.ca_location) if settings.ca_location else None

    def find_id(self, subject: str, schema: str) -> int | None:
        """Id of exactly this schema under the subject, or None."""
        status, body = self._call("POST", f"/subjects/{subject}", {"schema": schema})
        return int(self._get(body, "id")) if status == 200 else None

    def find_schema(self, schema_id: int) -> str:
        """Schema text of an id, cached."""
        text = self._schemas.get(schema_id)
        if text is None:
            status, body = self._call("GET", f"/schemas/ids/{schema_id}")
            if status == 404:
                raise SchemaMissing(f"no schema has id {schema_id}.", place=self._settings.url)
            text = self._schemas[schema_id] = str(self._get(body, "schema"))
        return text

    def check(self, subject: str, schema: str) -> bool:
        """Whether the schema is valid and compatible with every registered version of the subject."""
        status, body = self._call(
            "POST", f"/compatibility/subjects/{subject}/versions?verbose=false", {"schema": schema}
        )
        return status == 404 or (status == 200 and bool(self._get(body, "is_compatible")))

    def register(self, subject: str, schema: str) -> int:
        """Register under FULL_TRANSITIVE and return the id; the same schema gives the same id."""
        self._call("PUT", f"/config/{subject}", {"compatibility": COMPATIBILITY})
        status, body = self._call("POST", f"/subjects/{subject}/versions", {"schema": schema})
        if status in (409, 422):
            raise SchemaBreak("the registry refuses the schema.", place=subject)
        return int(self._get(body, "id"))

    def ping(self) -> None:
        """Raise ``RegistryUnreachable`` unless the registry answers."""
        self._call("GET", "/subjects")

    def _get(self, body: Any, name: str) -> Any:
        try:
            return body[name]
        except (KeyError, TypeError):
            # A proxy that answers in its place, or the API of something else.
            raise RegistryUnreachable(f"its answer has no `{name}`.", place=self._settings.url) from None

    def _call(self, method: str, path: str, body: object | None = None) -> tuple[int, Any]:
        headers = {"Accept": _JSON, "Content-Type": _JSON}
        if self._settings.username and self._settings.password:
            pair = f"{self._settings.username}:{self._settings.password.get_secret_value()}"
            headers["Authorization"] = "Basic " + base64.b64encode(pair.encode()).decode()
        url = self._settings.url.rstrip("/") + path
        if not url.startswith(("http://", "https://")):
            raise ConfigurationError("not an http or https URL.", place="registry.url")
        data = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(url, data=data, method=method, headers=headers)  # noqa: S310 - checked above
        try:
            with urllib.request.urlopen(request, timeout=self._timeout, context=self._context) as answer:  # noqa: S310
                return answer.status, json.loads(answer.read() or b"{}")
        except urllib.error.HTTPError as error:
            error.close()
            if error.code in (404, 409, 422):
                return error.code, {}
            if error.code in (401, 403):
                raise ConfigurationError("the registry refuses our credentials.", place="registry.username") from None
            raise RegistryUnreachable(f"it answers {error.code}.", place=self._settings.url) from None
        except (OSError, ValueError, http.client.HTTPException) as error:
            raise RegistryUnreachable(f"no answer ({type(error).__name__}).", place=self._settings.url) from None


def list_subjects(topics: Iterable[Topic]) -> dict[str, str]:
    """Subject -> schema name for every topic whose value is Avro."""
    return {topic.subject: topic.schema for topic in topics if topic.schema is not None}


def register_schemas(registry: Registry, topics: Iterable[Topic]) -> dict[str, int]:
    """Register every committed version of every subject, oldest first; return subject -> id of the one in force.

    Raises ``SchemaBreak`` naming the subject before anything of that subject is changed.
    """
    ids: dict[str, int] = {}
    for subject, name in list_subjects(topics).items():
        current = wire.load_schema(name)
        if registry.find_id(subject, current) is None and not registry.check(subject, current):
            raise SchemaBreak("the schema in force is not compatible with the registered versions.", place=subject)
        for version in wire.load_history(name):
            registry.register(subject, version)
        ids[subject] = registry.register(subject, current)
    return ids


def find_ids(registry: Registry, topics: Iterable[Topic]) -> dict[str, int]:
    """Subject -> id of the schema in force. Raises ``SchemaBreak`` or ``SchemaMissing``: a start must be refused."""
    ids: dict[str, int] = {}
    for subject, name in list_subjects(topics).items():
        current = wire.load_schema(name)
        schema_id = registry.find_id(subject, current)
        if schema_id is None:
            if not registry.check(subject, current):
                raise SchemaBreak("this version's schema is not compatible with the registered ones.", place=subject)
            raise SchemaMissing("this version's schema is not registered.", place=subject)
        ids[subject] = schema_id
    return ids

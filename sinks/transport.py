"""How frozen requests travel: one transport per instance, over the clients.

A transport sends once and returns the answer: its bytes, or what it means where the transport judges it. Or it raises
``Failure``: UNAVAILABLE, AUTH or RATE_LIMITED (nothing was applied), or AMBIGUOUS (it may have landed).
``before_write`` runs with nothing between it and the socket write; what it raises withdraws the call.
"""

from __future__ import annotations

import asyncio
import dataclasses
import ssl
import time
from pathlib import Path
from typing import TYPE_CHECKING, Literal, Protocol, runtime_checkable
from urllib.parse import urlsplit

from pydantic import Field, FilePath, SecretStr, field_validator, model_validator

from clients.auth import (
    Credential,
    FixedCredential,
    OAuthCredential,
    TokenRecipe,
    make_recipe,
    send_authorised,
    use_basic,
)
from clients.hosts import HostPolicy
from clients.http import HttpClient, HttpRequest, HttpResponse
from clients.limits import RateLimiter
from clients.mllp import MllpClient
from clients.vault import Vault, VaultKey, VaultKeyWrong
from clients.verdict import Verdict, Verdicts
from schemas.failure import ConfigurationError, Failure, FailureKind, OperatorError
from sinks.contract import Answer, Finding, HttpHead, NextPage, Request, Target, TargetSettings, Unclear

if TYPE_CHECKING:
    from collections.abc import Callable


class Transport(Protocol):
    """What the runner needs of a connection to a target instance."""

    connections: int
    """Calls that may be under way at once."""
    call_deadline: float
    """Seconds after which a call is given up."""

    async def send(self, request: Request, before_write: Callable[[], None]) -> bytes | Answer:
        """Send once; the answer's bytes, or its meaning."""

    async def close(self) -> None:
        """Close the connections."""


@runtime_checkable
class Finder(Protocol):
    """A transport that can ask whether a request is at the target."""

    async def find(self, request: Request, first_write_at: int, before_write: Callable[[], None]) -> Finding | Answer:
        """What the look-up came to, or an ``Answer`` about the target as a whole."""


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


class HttpSettings(CallSettings):
    """An instance reached over HTTP. Its hosts are the connector's; only a simulator can be named.

    Connectors add what their credential needs: ``RefreshTokenSettings``, ``ClientCredentialsSettings``,
    ``BasicSettings``, or members of their own.
    """

    environment: Literal["sandbox", "production", "simulator"] = Field(
        description="The vendor's production or test system, or a simulator on this machine."
    )
    simulator_url: str | None = Field(
        default=None,
        description='With `environment = "simulator"`: its base URL, a loopback address with a port.',
    )
    private_addresses: tuple[str, ...] = Field(
        default=(),
        description="Private addresses, networks (`10.20.0.0/16`) or host names that its host may resolve to: for a "
        "server inside the own network. Without them only public addresses are called.",
    )

    @model_validator(mode="after")
    def _agree_on_simulator(self) -> HttpSettings:
        if (self.environment == "simulator") != bool(self.simulator_url):
            raise ValueError('simulator_url goes with environment = "simulator"')
        if self.simulator_url is not None:
            parts = urlsplit(self.simulator_url)
            if (parts.scheme, parts.hostname, parts.path) != ("http", "127.0.0.1", "") or not parts.port or parts.query:
                raise ValueError("simulator_url is http://127.0.0.1:PORT")
        return self

    @field_validator("private_addresses")
    @classmethod
    def _read_private(cls, given: tuple[str, ...]) -> tuple[str, ...]:
        HostPolicy((), private=given)
        return given

    def choose_base(self, head: HttpHead) -> str:
        """Base URL of the system this instance posts to, without a slash at the end."""
        if self.simulator_url is not None:
            return self.simulator_url
        return head.production if self.environment == "production" else head.sandbox

    def choose_token_url(self, head: HttpHead) -> str:
        """URL of its token endpoint; empty when there is none."""
        if self.simulator_url is not None and head.token_url:
            return self.simulator_url + urlsplit(head.token_url).path
        return head.token_url


class RefreshTokenSettings(HttpSettings):
    """OAuth2 with a refresh token that a person got by connecting the account."""

    client_id: str = Field(min_length=1, description="Client id of the app at the vendor.")
    client_secret: SecretStr = Field(description="Client secret of the app.")
    refresh_token: SecretStr = Field(
        description="Refresh token of the connected account. The vendor replaces it: the newest is kept in "
        "`token_folder`. After connecting again, put the new one here."
    )
    token_folder: Path = Field(
        description="Folder for tokens in force, mode 0700, owned by the service's user. It must survive restarts: "
        "without it the account has to be connected again. The files are sealed with `secrets.vault_key`."
    )


class ClientCredentialsSettings(HttpSettings):
    """OAuth2 with client credentials: the app itself has the account's rights."""

    client_id: str = Field(min_length=1, description="Client id at the vendor.")
    client_secret: SecretStr = Field(description="Client secret.")


class BasicSettings(HttpSettings):
    """HTTP Basic: a user, or the id of an API key, with its secret."""

    user: str = Field(min_length=1, pattern=r"^[^:]+$", description="User, or id of the API key.")
    password: SecretStr = Field(description="Password, or secret of the API key.")


def use_refresh_token(settings: RefreshTokenSettings, token_url: str) -> TokenRecipe:
    """The usual OAuth2 renewal: form body, the app by HTTP Basic."""
    return make_recipe(
        token_url,
        grant_type="refresh_token",
        client_id=settings.client_id,
        client_secret=settings.client_secret,
    )


def use_client_credentials(settings: ClientCredentialsSettings, token_url: str) -> TokenRecipe:
    """The usual OAuth2 client credentials: form body, the app by HTTP Basic, no scope."""
    return make_recipe(
        token_url,
        grant_type="client_credentials",
        client_id=settings.client_id,
        client_secret=settings.client_secret,
    )


def use_user(settings: BasicSettings, _token_url: str) -> FixedCredential:
    """HTTP Basic."""
    return use_basic(settings.user, settings.password)


class HttpTransport:
    """HTTP with one credential: its rates, its token (renewed by one caller), answers judged by the target's table.

    A call waits for its turn under the rates before anything else; the wait is no part of the call deadline, and a turn
    that does not come within another deadline is RATE_LIMITED. After a 401 the same bytes go once more with a renewed
    token. Redirects are not followed. No call leaves for a host other than those of the head.
    """

    def __init__(self, head: HttpHead, settings: HttpSettings, vault_key: SecretStr | None = None) -> None:
        self.connections = settings.connections
        self.call_deadline = settings.call_deadline_seconds
        self._head = head
        self._settings = settings
        base, token_url = settings.choose_base(head), settings.choose_token_url(head)
        allowed = settings.private_addresses
        self._client = HttpClient(
            max_connections=settings.connections + bool(token_url),
            connect_timeout=min(5.0, settings.call_deadline_seconds),
            policy=HostPolicy(
                (base, token_url) if token_url else (base,),
                private=allowed if settings.simulator_url is None else (*allowed, "127.0.0.1"),
            ),
        )
        self._credential = _open_credential(head, settings, token_url, self._client, vault_key)
        self._limiter = RateLimiter(head.rates)
        self._is_open = False

    async def send(self, request: Request, before_write: Callable[[], None]) -> Answer:
        """Send once, or twice after a 401, and judge the last answer; first asks for what the request lacks."""
        url = await self._complete(request, before_write)
        if isinstance(url, Answer):
            self._heed(url)
            return url
        whole = request if url == request.url else dataclasses.replace(request, url=url)
        response = await self._exchange(whole, before_write)
        answer = judge_response(self._head, response, request, self._settings, now=time.time())
        self._heed(answer)
        return answer

    async def find(self, request: Request, first_write_at: int, before_write: Callable[[], None]) -> Finding | Answer:
        """Ask whether a frozen request is at the target, page by page. An ``Answer`` when the look-up itself failed.

        Raises ``Failure`` as ``send`` does, but nothing of it is AMBIGUOUS: a look-up changes nothing.
        """
        look_up = self._head.look_up
        assert look_up is not None, "only a target with a look-up is asked"
        try:
            page = look_up.ask(request, first_write_at, self._settings)
        except Exception as error:  # noqa: BLE001 - a connector's fault decides nothing about the posting
            return Unclear(type(error).__name__)
        for _ in range(_MOST_PAGES):
            try:
                response = await self._ask(page, before_write)
            except Failure as failure:
                if failure.kind not in _ABOUT_TARGET:
                    # Nobody can be asked so (the host is no longer that of the settings): in the end a person looks.
                    return Unclear(failure.code)
                raise
            read = read_finding(self._head, response, page, request, self._settings, now=time.time())
            if not isinstance(read, NextPage):
                if isinstance(read, Answer):
                    self._heed(read)
                return read
            page = read.request
        return Unclear("TOO_MANY_PAGES")

    async def close(self) -> None:
        """Let a token renewal end, then close the connections."""
        await self._credential.close()
        if self._is_open:
            await self._client.__aexit__(None, None, None)

    async def _complete(self, request: Request, before_write: Callable[[], None]) -> str | Answer:
        """The URL to write to, or why nothing was written."""
        completion = self._head.completion
        question = None if completion is None else completion.ask(request, self._settings)
        if question is None:
            return request.url
        for _ in range(_MOST_PAGES):
            response = await self._ask(question, before_write)
            read = read_completion(self._head, response, question, request, self._settings, now=time.time())
            if not isinstance(read, NextPage):
                return read
            question = read.request
        return Answer(FailureKind.UNAVAILABLE, "TOO_MANY_PAGES")

    async def _ask(self, question: Request, before_write: Callable[[], None]) -> HttpResponse:
        """Exchange a question, which changes nothing at the target: one without an answer left nothing there."""
        try:
            return await self._exchange(question, before_write)
        except Failure as failure:
            if failure.kind is FailureKind.AMBIGUOUS:
                raise Failure(FailureKind.UNAVAILABLE, failure.code) from None
            raise

    async def _exchange(self, request: Request, before_write: Callable[[], None]) -> HttpResponse:
        if not self._is_open:
            self._is_open = True
            await self._client.__aenter__()
        try:
            async with asyncio.timeout(self.call_deadline):
                await self._limiter.take()
        except TimeoutError:
            raise Failure(FailureKind.RATE_LIMITED, "RATE_WAIT") from None
        try:
            response, _ = await send_authorised(
                self._client,
                HttpRequest(request.method, request.url, dict(request.headers), request.body),
                self._credential,
                deadline=self.call_deadline,
                before_write=before_write,
                limiter=self._limiter,
            )
        except OperatorError as error:
            # Of the token's store: before the first write, or after a 401. Nothing was applied, a person must look.
            raise Failure(FailureKind.AUTH, error.code) from None
        return response

    def _heed(self, answer: Answer) -> None:
        if answer.kind is FailureKind.RATE_LIMITED:
            self._limiter.drain(answer.retry_after)


_MOST_PAGES = 50
"""Of one look-up or completion: a list that never ends must not hold a connection for ever."""


def _open_credential(
    head: HttpHead, settings: HttpSettings, token_url: str, client: HttpClient, vault_key: SecretStr | None
) -> Credential:
    way = head.credential(settings, token_url)
    if isinstance(way, FixedCredential):
        return way
    kept = settings if isinstance(settings, RefreshTokenSettings) else None
    vault = None
    if kept is not None:
        if vault_key is None:
            raise VaultKeyWrong(
                "it has a refresh token, and there is no key to seal it with.", place=f"targets.{settings.name}"
            )
        vault = Vault(kept.token_folder, settings.name, VaultKey(vault_key))
    return OAuthCredential(
        way,
        client,
        seed=None if kept is None else kept.refresh_token,
        vault=vault,
        scheme=head.scheme,
        deadline=settings.call_deadline_seconds,
    )


def judge_response(
    head: HttpHead, response: HttpResponse, request: Request, settings: TargetSettings, *, now: float
) -> Answer:
    """What an HTTP answer means at this target. ``now``: seconds since the epoch, for a Retry-After without a Date."""
    named: list[Verdict] = []

    def examine(seen: HttpResponse) -> Verdict | None:
        verdict = head.examine(seen, request, settings)
        if verdict is not None:
            named.append(verdict)
        return verdict

    verdict = Verdicts(overlay=head.overlay, examine=examine).judge(response, now=now)
    # What the connector read in the body is about this event, the status alone about the target.
    is_outage = verdict.kind is FailureKind.UNAVAILABLE and not named
    return Answer(verdict.kind, verdict.code, verdict.reference, verdict.retry_after or 0.0, is_outage)


def read_finding(
    head: HttpHead, response: HttpResponse, page: Request, request: Request, settings: TargetSettings, *, now: float
) -> Finding | NextPage | Answer:
    """What an answer to a look-up says. An ``Answer`` when it was no answer to the question but about the target."""
    assert head.look_up is not None, "only a target with a look-up is asked"
    try:
        read = head.look_up.read(response, page, request, settings)
    except Exception as error:  # noqa: BLE001 - an answer that cannot be read decides nothing
        return Unclear(type(error).__name__)
    if read is not None:
        return read
    verdict = Verdicts(overlay=head.overlay, reads=True).judge(response, now=now)
    if verdict.kind in _ABOUT_TARGET:
        return Answer(verdict.kind, verdict.code, "", verdict.retry_after or 0.0, is_outage=True)
    return Unclear(verdict.code)


def read_completion(
    head: HttpHead, response: HttpResponse, page: Request, request: Request, settings: TargetSettings, *, now: float
) -> str | NextPage | Answer:
    """The URL to write a request to, from the answer to a question; an ``Answer`` when nothing is written."""
    assert head.completion is not None, "only a target with a completion is asked"
    try:
        read = head.completion.read(response, page, request, settings)
    except Exception:  # noqa: BLE001 - an answer that cannot be read names no place to write to
        read = None
        if response.status // 100 == 2:
            read = Verdict(FailureKind.UNAVAILABLE, "ANSWER_UNREADABLE")
    if isinstance(read, str | NextPage):
        return read
    if read is not None:
        return Answer(read.kind or FailureKind.UNAVAILABLE, read.code, "", read.retry_after or 0.0)
    verdict = Verdicts(overlay=head.overlay, reads=True).judge(response, now=now)
    return Answer(
        verdict.kind or FailureKind.UNAVAILABLE,
        verdict.code,
        "",
        verdict.retry_after or 0.0,
        is_outage=verdict.kind is FailureKind.UNAVAILABLE,
    )


_ABOUT_TARGET = frozenset({FailureKind.AUTH, FailureKind.RATE_LIMITED, FailureKind.UNAVAILABLE})


def open_transport(target: Target, settings: TargetSettings, vault_key: SecretStr | None = None) -> Transport:
    """The transport of an instance. Raises ``ConfigurationError`` when its connector names one we do not have.

    ``vault_key`` seals refresh tokens; ``VaultKeyWrong`` is raised when the target has one and there is no key.
    """
    if target.transport == "mllp" and isinstance(settings, MllpSettings):
        return MllpTransport(settings)
    if target.transport == "http" and target.http is not None and isinstance(settings, HttpSettings):
        return HttpTransport(target.http, settings, vault_key)
    raise ConfigurationError(
        f"there is no transport {target.transport!r} for it.",
        place=f"targets.{settings.name}",
        remedy="A target with transport `mllp` has settings derived from sinks.transport.MllpSettings; "
        "one with `http` has a head `http` and settings derived from HttpSettings.",
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

"""How calls prove who we are: nothing, Basic, an API key header, a fixed Bearer token, OAuth2.

Secrets live in ``SecretStr`` and leave it only in the headers of a call; no repr, log or exception shows one. Keys go
into headers, never into URLs: those end in access logs.

OAuth2 tokens are fetched by one caller while the others wait, a little before they expire. Where the vendor rotates
refresh tokens, the new one is stored before anything is done with it, so that a crash at any point leaves a token that
works.
"""

from __future__ import annotations

import asyncio
import base64
import contextlib
import hashlib
import json
import math
import time
from collections.abc import Awaitable, Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar
from urllib.parse import quote, urlencode

from pydantic import SecretStr

from clients.http import HttpClient, HttpFailure, HttpRequest, HttpResponse
from clients.limits import RateLimiter
from clients.vault import StoredToken, Vault
from clients.verdict import DEFAULT
from schemas.failure import Failure, FailureKind


@dataclass(frozen=True, slots=True)
class Authorisation:
    """Headers that authorise one call. ``generation`` grows with each new token."""

    headers: Mapping[str, str] = field(repr=False)
    generation: int = 0


class AuthFailure(Failure):
    """No call can be authorised: AUTH when we are refused, UNAVAILABLE or RATE_LIMITED when the token endpoint is.

    Nothing left for the target. ``retry_after`` is in seconds, as the endpoint asked; 0 when it did not.
    """

    def __init__(self, kind: FailureKind, code: str, *, retry_after: float = 0.0) -> None:
        super().__init__(kind, code)
        self.retry_after = retry_after


_Found = TypeVar("_Found")


class Credential(Protocol):
    """What a caller needs of any way to authorise."""

    async def authorise(self) -> Authorisation:
        """Headers for a call that begins now. Raises ``AuthFailure``."""

    async def renew(self, refused: Authorisation) -> Authorisation | None:
        """A call with these headers was answered 401: newer ones to try once, or None. Raises ``AuthFailure``."""

    async def close(self) -> None:
        """End what is under way, losing no token."""


class FixedCredential:
    """The same headers at every call; when they are refused, nothing helps but a person."""

    def __init__(self, headers: Mapping[str, str]) -> None:
        for name, value in headers.items():
            if not name.isascii() or any(ord(letter) < 32 or ord(letter) == 127 for letter in value):
                # A line break would add headers of its own; the message must not show it.
                raise ValueError(f"the value of header {name!r} holds a control character")
        self._authorisation = Authorisation(dict(headers))

    async def authorise(self) -> Authorisation:
        """The headers."""
        return self._authorisation

    async def renew(self, refused: Authorisation) -> Authorisation | None:  # noqa: ARG002 - none is newer
        """There is nothing newer."""
        return None

    async def close(self) -> None:
        """Nothing is under way."""


def use_nothing() -> FixedCredential:
    """No authorisation: the network itself is trusted, or the URL is the secret."""
    return FixedCredential({})


def use_basic(user: str, password: SecretStr) -> FixedCredential:
    """HTTP Basic (RFC 7617) in UTF-8. Raises ``ValueError`` for a user with a colon: the receiver cuts there."""
    if ":" in user:
        raise ValueError("the user of HTTP Basic cannot hold a colon")
    return FixedCredential({"authorization": _encode_basic(user, password)})


def use_api_key(header: str, key: SecretStr) -> FixedCredential:
    """A key in a header of its own, such as ``X-Api-Key``."""
    return FixedCredential({header.lower(): key.get_secret_value()})


def use_bearer(token: SecretStr, *, scheme: str = "Bearer") -> FixedCredential:
    """A token that a person made and replaces."""
    return FixedCredential({"authorization": f"{scheme} {token.get_secret_value()}"})


@dataclass(frozen=True, slots=True)
class Grant:
    """What a token endpoint gave. ``life`` in seconds; ``refresh`` None when the old one stays in force."""

    access: SecretStr
    life: float
    refresh: SecretStr | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenRecipe:
    """How one vendor's token endpoint is asked and read. Both functions are pure.

    ``request`` gets the refresh token, None where the grant has none. ``read`` raises ``AuthFailure`` for a refusal.
    """

    request: Callable[[SecretStr | None], HttpRequest]
    read: Callable[[HttpResponse], Grant]
    refreshes: bool
    """Whether the grant needs a refresh token."""


_REFUSALS: Mapping[str, FailureKind] = {
    "temporarily_unavailable": FailureKind.UNAVAILABLE,
    "server_error": FailureKind.UNAVAILABLE,
    "slow_down": FailureKind.RATE_LIMITED,
}
"""Errors of RFC 6749 and its extensions that pass by themselves."""

_PERMANENT = frozenset(
    {
        "access_denied",
        "invalid_client",
        "invalid_grant",
        "invalid_request",
        "invalid_scope",
        "unauthorized_client",
        "unsupported_grant_type",
    }
)


def make_recipe(
    token_url: str,
    *,
    grant_type: str,
    client_id: str,
    client_secret: SecretStr,
    scope: str = "",
    secret_in_body: bool = False,
    default_life: float = 3600.0,
    errors: Mapping[str, FailureKind] | None = None,
) -> TokenRecipe:
    """OAuth2 as in RFC 6749: ``grant_type`` is ``client_credentials`` or ``refresh_token``.

    The client's secret goes by HTTP Basic, or into the body where a vendor wants it there. ``default_life`` counts when
    the answer names none. ``errors`` says what a vendor means by an ``error`` of its own, at any status: Zoho answers
    200 with ``Access Denied`` to too many requests for tokens.
    """
    if grant_type not in {"client_credentials", "refresh_token"}:
        raise ValueError("grant_type is client_credentials or refresh_token")
    meanings = {**_REFUSALS, **(errors or {})}

    def request(refresh: SecretStr | None) -> HttpRequest:
        form = {"grant_type": grant_type}
        if refresh is not None:
            form["refresh_token"] = refresh.get_secret_value()
        if scope:
            form["scope"] = scope
        headers = {"accept": "application/json", "content-type": "application/x-www-form-urlencoded"}
        if secret_in_body:
            form |= {"client_id": client_id, "client_secret": client_secret.get_secret_value()}
        else:
            # RFC 6749 section 2.3.1: form-encoded before Basic, unlike everywhere else.
            secret = SecretStr(quote(client_secret.get_secret_value(), safe=""))
            headers["authorization"] = _encode_basic(quote(client_id, safe=""), secret)
        return HttpRequest("POST", token_url, headers, urlencode(form).encode())

    def read(response: HttpResponse) -> Grant:
        return read_grant(response, meanings=meanings, default_life=default_life)

    return TokenRecipe(request=request, read=read, refreshes=grant_type == "refresh_token")


def read_grant(
    response: HttpResponse,
    *,
    meanings: Mapping[str, FailureKind] = _REFUSALS,
    default_life: float = 3600.0,
    names: tuple[str, str, str] = ("access_token", "expires_in", "refresh_token"),
) -> Grant:
    """Read a token answer; ``names`` are the fields of the access token, its life in seconds, the refresh token.

    Raises ``AuthFailure`` by the body's ``error`` where it is known, else by the status: 400 is a refusal here, and so
    is an unknown error at 200.
    """
    body = _read_object(response.body)
    error = body.get("error")
    if response.status // 100 != 2 or (isinstance(error, str) and error):
        raise _read_refusal(response, error if isinstance(error, str) else "", meanings)
    access, life, refresh = (body.get(name) for name in names)
    if not isinstance(access, str) or not access or any(ord(letter) <= 32 or ord(letter) > 126 for letter in access):
        raise AuthFailure(FailureKind.UNAVAILABLE, "TOKEN_UNREADABLE")
    return Grant(
        SecretStr(access),
        _read_life(life, default_life),
        SecretStr(refresh) if isinstance(refresh, str) and refresh else None,
    )


def _read_refusal(response: HttpResponse, error: str, meanings: Mapping[str, FailureKind]) -> AuthFailure:
    if error in meanings or error in _PERMANENT:
        # Only words of the standard and of the recipe are repeated: anything else is the answer's text.
        word = "".join(letter if letter.isalnum() else "_" for letter in error).upper()
        return AuthFailure(meanings.get(error, FailureKind.AUTH), f"TOKEN_{word}")
    kind = DEFAULT.judge(response, now=0.0).kind
    if kind in {None, FailureKind.REJECTED, FailureKind.AUTH}:
        return AuthFailure(FailureKind.AUTH, "TOKEN_REFUSED")
    code = f"TOKEN_HTTP_{response.status}"
    return AuthFailure(FailureKind.RATE_LIMITED if kind is FailureKind.RATE_LIMITED else FailureKind.UNAVAILABLE, code)


@dataclass(frozen=True, slots=True)
class _Token:
    access: SecretStr
    issued_at: float
    expires_at: float
    generation: int

    def is_due(self, now: float) -> bool:
        # A tenth of the life before its end, two minutes at most: some vendors refuse to renew a young token.
        return now >= self.expires_at - min(120.0, 0.1 * (self.expires_at - self.issued_at))


class OAuthCredential:
    """An OAuth2 access token, fetched when needed and renewed before it expires; use from one event loop.

    ``seed`` is the refresh token of the settings, ``vault`` keeps what follows from it. A new seed (the account was
    connected again) beats the vault. With a vault all processes of a credential share one access token: vendors limit
    how many may live. ``clock`` is in seconds since the epoch, because the vault outlives processes.

    A renewal runs to its end even when every caller is cancelled: half-way it may hold the only refresh token that
    works. After a refusal the endpoint is left alone for ``pause`` seconds, and callers get the same refusal.
    """

    def __init__(
        self,
        recipe: TokenRecipe,
        client: HttpClient,
        *,
        seed: SecretStr | None = None,
        vault: Vault | None = None,
        scheme: str = "Bearer",
        deadline: float = 30.0,
        pause: float = 60.0,
        clock: Callable[[], float] = time.time,
    ) -> None:
        if recipe.refreshes and (seed is None or vault is None):
            raise ValueError("a refresh token needs a seed and a vault: the vendor may replace it at any answer")
        self._recipe = recipe
        self._client = client
        self._seed = seed
        self._fingerprint = "" if seed is None else hashlib.sha256(seed.get_secret_value().encode()).hexdigest()
        self._vault = vault
        self._scheme = scheme
        self._deadline = deadline
        self._pause = pause
        self._clock = clock
        self._token: _Token | None = None
        self._generation = 0
        self._unstored: tuple[StoredToken, StoredToken | None] | None = None
        """A token that is not on disk yet, and what is there in its place."""
        self._running: asyncio.Task[_Token] | None = None
        self._refusal: AuthFailure | None = None
        self._refused_at = -math.inf
        self._refused_for = 0.0

    async def authorise(self) -> Authorisation:
        """The headers of the token in force; waits for a renewal that is due. Raises ``AuthFailure``.

        When a renewal fails that was only due early, the token still in force is used.
        """
        token = self._token
        if token is None or token.is_due(self._clock()):
            try:
                token = await self._renew(token)
            except AuthFailure:
                if token is None or self._clock() >= token.expires_at:
                    raise
        return self._show(token)

    async def renew(self, refused: Authorisation) -> Authorisation | None:
        """A newer token than the refused one. None when the refused one was fresh: another would not help."""
        token = self._token
        if token is not None and token.generation != refused.generation:
            return self._show(token)
        # A token refused within seconds of its issue is not stale; asking again at every call would flood the endpoint.
        # Before its issue is no such moment: the clock was set back, and how old the token is nobody knows.
        if token is not None and 0 <= self._clock() - token.issued_at < min(
            30.0, 0.1 * (token.expires_at - token.issued_at)
        ):
            return None
        return self._show(await self._renew(token))

    def forget_refusal(self) -> None:
        """A person says: ask the endpoint again now."""
        self._refused_at = -math.inf

    async def close(self) -> None:
        """Wait for a renewal under way: its refresh token must reach the vault."""
        if self._running is not None:
            with contextlib.suppress(Exception):
                await asyncio.shield(self._running)

    def _show(self, token: _Token) -> Authorisation:
        return Authorisation({"authorization": f"{self._scheme} {token.access.get_secret_value()}"}, token.generation)

    async def _renew(self, stale: _Token | None) -> _Token:
        if self._token is not stale and self._token is not None:
            return self._token
        if self._running is None or self._running.done():
            if self._refusal is not None and self._measure_pause() > 0:
                raise self._repeat(self._refusal)
            self._running = asyncio.create_task(self._fetch_once(stale))
            # A failure that nobody waits for any more is told to the next caller, not to the log.
            self._running.add_done_callback(lambda task: task.cancelled() or task.exception())
        return await asyncio.shield(self._running)

    async def _fetch_once(self, stale: _Token | None) -> _Token:
        try:
            fetched = await (self._fetch(None) if self._vault is None else self._fetch_shared(self._vault, stale))
        except OSError:
            # The vault's folder or lock: full, read-only, not mounted.
            self._refuse(AuthFailure(FailureKind.UNAVAILABLE, "TOKEN_STORE_FAILED"))
            raise AuthFailure(FailureKind.UNAVAILABLE, "TOKEN_STORE_FAILED") from None
        except Failure as failure:
            refusal = failure if isinstance(failure, AuthFailure) else AuthFailure(failure.kind, failure.code)
            self._refuse(refusal)
            raise self._repeat(refusal) from None
        self._refusal = None
        self._generation += 1
        self._token = _Token(fetched.access, fetched.issued_at, fetched.expires_at, self._generation)
        return self._token

    async def _fetch_shared(self, vault: Vault, stale: _Token | None) -> StoredToken:
        async with vault.lock(self._deadline):
            stored = await asyncio.to_thread(vault.read)
            if stored is not None and stored.seed != self._fingerprint:
                stored = None
            unstored, self._unstored = self._unstored, None
            # Not by their times: the clock may have been set back, and the newer refresh token alone works.
            if unstored is not None and unstored[1] == stored:
                return await self._store(vault, *unstored)
            if stored is not None and self._is_newer(stored, stale):
                return stored
            refresh = (stored.refresh if stored is not None else None) or self._seed
            fetched = await self._fetch(refresh if self._recipe.refreshes else None)
            return await self._store(vault, fetched, stored)

    def _is_newer(self, stored: StoredToken, stale: _Token | None) -> bool:
        if stale is not None and stored.access.get_secret_value() == stale.access.get_secret_value():
            return False
        return not _Token(stored.access, stored.issued_at, stored.expires_at, 0).is_due(self._clock())

    async def _store(self, vault: Vault, fetched: StoredToken, replaced: StoredToken | None) -> StoredToken:
        # Kept until it is on disk: with the old refresh token dead, this may be the only one that works.
        self._unstored = fetched, replaced
        try:
            await asyncio.to_thread(vault.write, fetched)
        except OSError:
            raise AuthFailure(FailureKind.UNAVAILABLE, "TOKEN_NOT_STORED") from None
        self._unstored = None
        return fetched

    async def _fetch(self, refresh: SecretStr | None) -> StoredToken:
        asked_at = self._clock()
        try:
            response = await self._client.send(self._recipe.request(refresh), deadline=self._deadline)
        except HttpFailure as failure:
            # Whatever became of the request, nothing was posted at the target.
            raise AuthFailure(FailureKind.UNAVAILABLE, f"TOKEN_{failure.code}") from None
        try:
            grant = self._recipe.read(response)
        except AuthFailure as refusal:
            wait = DEFAULT.judge(response, now=asked_at).retry_after
            raise AuthFailure(refusal.kind, refusal.code, retry_after=wait or refusal.retry_after) from None
        return StoredToken(
            access=grant.access,
            issued_at=asked_at,
            # Counted from before the request: the vendor's clock started somewhere after it.
            expires_at=asked_at + grant.life,
            refresh=grant.refresh or refresh,
            seed=self._fingerprint,
        )

    def _refuse(self, refusal: AuthFailure) -> None:
        self._refusal = refusal
        brief = 1.0 if refusal.kind is FailureKind.UNAVAILABLE else self._pause
        self._refused_at = self._clock()
        self._refused_for = max(brief, refusal.retry_after)

    def _measure_pause(self) -> float:
        """Seconds for which the endpoint is still left alone. A clock that was set back does not make it longer."""
        rest = self._refused_at + self._refused_for - self._clock()
        return rest if 0 < rest <= self._refused_for else 0.0

    def _repeat(self, refusal: AuthFailure) -> AuthFailure:
        # A fresh one for each caller: one exception raised in many tasks gathers their tracebacks.
        return AuthFailure(refusal.kind, refusal.code, retry_after=max(refusal.retry_after, self._measure_pause()))


async def send_authorised(
    client: HttpClient,
    request: HttpRequest,
    credential: Credential,
    *,
    deadline: float,
    before_write: Callable[[], None] | None = None,
    refused: Callable[[HttpResponse], bool] = lambda response: response.status == 401,
    limiter: RateLimiter | None = None,
    clock: Callable[[], float] = time.monotonic,
) -> tuple[HttpResponse, int]:
    """Send with the credential's headers; after a 401, once more with a renewed token if there is one.

    A 401 says that nothing was applied, so the same bytes may go again. Returns the last answer and the generation of
    the credential it was given to (for ``Breaker.fail``).

    ``deadline`` in seconds covers everything: waiting for a token, both calls and what lies between. ``limiter`` is
    asked before the repeat, which is a call like any other (before the first, the caller has asked). ``before_write``
    holds for each write. Raises ``AuthFailure`` (TOKEN_LATE when waiting used the deadline up), ``HttpFailure``,
    ``HostRefused``, and what ``before_write`` raises.
    """
    until = clock() + deadline
    authorisation = await _wait(credential.authorise(), until - clock())
    response = await client.send(
        _authorise(request, authorisation), deadline=_measure_rest(until, clock), before_write=before_write
    )
    if not refused(response):
        return response, authorisation.generation
    renewed = await _wait(credential.renew(authorisation), _measure_rest(until, clock))
    if renewed is None:
        return response, authorisation.generation
    if limiter is not None:
        await _wait(limiter.take(), _measure_rest(until, clock))
    response = await client.send(
        _authorise(request, renewed), deadline=_measure_rest(until, clock), before_write=before_write
    )
    return response, renewed.generation


async def _wait(waiting: Awaitable[_Found], rest: float) -> _Found:
    try:
        # Unlike wait_for it makes no task: most waits are over at once.
        async with asyncio.timeout(rest):
            return await waiting
    except TimeoutError:
        raise AuthFailure(FailureKind.UNAVAILABLE, "TOKEN_LATE") from None


def _measure_rest(until: float, clock: Callable[[], float]) -> float:
    rest = until - clock()
    if rest <= 0:
        raise AuthFailure(FailureKind.UNAVAILABLE, "TOKEN_LATE")
    return rest


def _authorise(request: HttpRequest, authorisation: Authorisation) -> HttpRequest:
    if not authorisation.headers:
        return request
    own = {name.lower() for name in authorisation.headers}
    kept = {name: value for name, value in request.headers.items() if name.lower() not in own}
    return HttpRequest(request.method, request.url, {**kept, **authorisation.headers}, request.body)


def _encode_basic(user: str, password: SecretStr) -> str:
    return "Basic " + base64.b64encode(f"{user}:{password.get_secret_value()}".encode()).decode()


def _read_object(body: bytes) -> Mapping[str, Any]:
    try:
        read = json.loads(body)
    except ValueError:
        return {}
    return read if isinstance(read, dict) else {}


def _read_life(given: Any, default: float) -> float:
    # Numbers arrive as text, too.
    try:
        life = float(given)
    except (TypeError, ValueError):
        return default
    return life if 0 < life < math.inf else default

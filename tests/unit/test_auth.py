"""Authorisation: fixed ways, OAuth2 fetched once for all, renewed early, stored before use; no secret shown."""

import asyncio
import base64
import json
import os
import traceback
from urllib.parse import parse_qs

import pytest
from pydantic import SecretStr

from clients.auth import (
    AuthFailure,
    OAuthCredential,
    TokenRecipe,
    make_recipe,
    read_grant,
    send_authorised,
    use_api_key,
    use_basic,
    use_bearer,
    use_nothing,
)
from clients.http import HttpFailure, HttpRequest, HttpResponse
from clients.vault import StoredToken, Vault, VaultKey
from schemas.failure import FailureKind

K = FailureKind
KEY = VaultKey(SecretStr("k" * 32))
URL = "https://auth.example.com/token"


class Clock:
    def __init__(self):
        self.now = 1_780_000_000.0

    def __call__(self):
        return self.now


class Issuer:
    """A token endpoint and an API behind one client. Refresh tokens work once, as FreshBooks' do."""

    def __init__(self, clock, *, life=3600, rotates=True, refresh="seed-refresh"):
        self.clock = clock
        self.life = life
        self.rotates = rotates
        self.refresh = refresh
        self.asked = []
        """Form of each request for a token."""
        self.valid = {}
        """Access token: until when."""
        self.answers = []
        """Answers or failures given first, instead of tokens."""
        self.posted = []
        """Headers of each call of the API."""
        self.on_ask = None
        self.on_post = None
        self.gate = None

    async def send(self, request, *, deadline, before_write=None):
        assert deadline > 0
        if before_write is not None:
            before_write()
        if request.url != URL:
            return await self.post(request)
        self.asked.append({name: values[0] for name, values in parse_qs(request.body.decode()).items()})
        if self.on_ask:
            self.on_ask()
        if self.gate is not None:
            await self.gate.wait()
        await asyncio.sleep(0)
        if self.answers:
            given = self.answers.pop(0)
            if isinstance(given, Exception):
                raise given
            return given
        return self.grant(self.asked[-1])

    def grant(self, form):
        number = len(self.asked)
        if "refresh_token" in form:
            if form["refresh_token"] != self.refresh:
                return HttpResponse(400, {}, b'{"error":"invalid_grant"}')
            if self.rotates:
                self.refresh = f"refresh-{number}"
        access = f"access-{number}"
        self.valid[access] = self.clock() + self.life
        body = {"access_token": access, "expires_in": self.life, "token_type": "bearer"}
        if "refresh_token" in form:
            body["refresh_token"] = self.refresh
        return HttpResponse(200, {}, json.dumps(body).encode())

    async def post(self, request):
        self.posted.append(dict(request.headers))
        if self.on_post:
            self.on_post(request)
        await asyncio.sleep(0)
        access = request.headers.get("authorization", "").removeprefix("Bearer ")
        good = self.valid.get(access, 0) > self.clock()
        return HttpResponse(201 if good else 401, {}, b"")


@pytest.fixture
def clock():
    return Clock()


@pytest.fixture
def vault(tmp_path):
    return Vault(tmp_path / "vault", "north", KEY)


def make_client_credentials(issuer, clock, **options):
    recipe = make_recipe(
        URL, grant_type="client_credentials", client_id="id", client_secret=SecretStr("client-secret"), scope="a b"
    )
    return OAuthCredential(recipe, issuer, clock=clock, **options)


def make_refreshing(issuer, clock, vault, *, seed="seed-refresh", **options):
    recipe = make_recipe(URL, grant_type="refresh_token", client_id="id", client_secret=SecretStr("client-secret"))
    return OAuthCredential(recipe, issuer, seed=SecretStr(seed), vault=vault, clock=clock, **options)


async def read_access(credential):
    return (await credential.authorise()).headers["authorization"].removeprefix("Bearer ")


class TestFixed:
    async def test_headers(self):
        async def show(credential):
            return dict((await credential.authorise()).headers)

        assert await show(use_nothing()) == {}
        assert await show(use_basic("Aladdin", SecretStr("open sesame"))) == {
            "authorization": "Basic QWxhZGRpbjpvcGVuIHNlc2FtZQ=="  # RFC 7617 section 2
        }
        assert await show(use_basic("test", SecretStr("123£"))) == {"authorization": "Basic dGVzdDoxMjPCow=="}
        assert await show(use_api_key("X-Api-Key", SecretStr("k"))) == {"x-api-key": "k"}
        assert await show(use_bearer(SecretStr("t"))) == {"authorization": "Bearer t"}
        assert await show(use_bearer(SecretStr("t"), scheme="Zoho-oauthtoken")) == {
            "authorization": "Zoho-oauthtoken t"
        }

    async def test_a_refusal_is_final(self):
        credential = use_bearer(SecretStr("t"))
        assert await credential.renew(await credential.authorise()) is None

    @pytest.mark.parametrize("secret", ["a\r\nX-Admin: 1", "a\nb", "a\x00"])
    def test_a_secret_cannot_add_headers(self, secret):
        with pytest.raises(ValueError) as caught:
            use_api_key("X-Api-Key", SecretStr(secret))
        assert "Admin" not in str(caught.value)

    def test_a_user_with_a_colon_is_refused(self):
        with pytest.raises(ValueError):
            use_basic("a:b", SecretStr("c"))


class TestRequests:
    def build(self, refresh=None, **options):
        values = {"grant_type": "client_credentials", "client_id": "i d:1", "client_secret": SecretStr("s/+&:ü")}
        return make_recipe(URL, **{**values, **options}).request(refresh)

    def test_the_secret_goes_by_basic_form_encoded(self):
        request = self.build(scope="x y")
        assert parse_qs(request.body.decode()) == {"grant_type": ["client_credentials"], "scope": ["x y"]}
        pair = base64.b64decode(request.headers["authorization"].removeprefix("Basic ")).decode()
        assert pair == "i%20d%3A1:s%2F%2B%26%3A%C3%BC"
        assert request.url == URL

    def test_or_into_the_body(self):
        request = self.build(SecretStr("r"), grant_type="refresh_token", secret_in_body=True)
        assert parse_qs(request.body.decode()) == {
            "grant_type": ["refresh_token"],
            "refresh_token": ["r"],
            "client_id": ["i d:1"],
            "client_secret": ["s/+&:ü"],
        }
        assert "authorization" not in request.headers

    def test_what_cannot_work_is_refused(self, clock):
        with pytest.raises(ValueError):
            self.build(grant_type="password")
        recipe = make_recipe(URL, grant_type="refresh_token", client_id="i", client_secret=SecretStr("s"))
        with pytest.raises(ValueError):
            OAuthCredential(recipe, Issuer(clock), seed=SecretStr("r"))


class TestAnswers:
    def read(self, status, body, **options):
        return read_grant(
            HttpResponse(status, {}, body if isinstance(body, bytes) else json.dumps(body).encode()), **options
        )

    @pytest.mark.parametrize(
        ("given", "life"),
        [
            (300, 300),
            ("300", 300),
            (None, 3600),
            (0, 3600),
            (-1, 3600),
            ("soon", 3600),
            (float("inf"), 3600),
            ([], 3600),
        ],
    )
    def test_lives(self, given, life):
        assert self.read(200, {"access_token": "a", "expires_in": given}).life == life

    def test_names_of_a_vendor(self):
        body = {"AccessToken": "a", "ExpiresInSeconds": 86400, "RefreshToken": "r"}
        grant = self.read(200, body, names=("AccessToken", "ExpiresInSeconds", "RefreshToken"))
        assert (grant.access.get_secret_value(), grant.life, grant.refresh.get_secret_value()) == ("a", 86400, "r")

    @pytest.mark.parametrize(
        ("status", "body", "kind", "code"),
        [
            (400, {"error": "invalid_grant"}, K.AUTH, "TOKEN_INVALID_GRANT"),
            (401, {"error": "invalid_client"}, K.AUTH, "TOKEN_INVALID_CLIENT"),
            (400, {"error": "temporarily_unavailable"}, K.UNAVAILABLE, "TOKEN_TEMPORARILY_UNAVAILABLE"),
            (400, {"error": "slow_down"}, K.RATE_LIMITED, "TOKEN_SLOW_DOWN"),
            (200, {"error": "Patient Doe"}, K.AUTH, "TOKEN_REFUSED"),
            (429, {"error": "Patient Doe"}, K.RATE_LIMITED, "TOKEN_HTTP_429"),
            (503, {"error": "Patient Doe"}, K.UNAVAILABLE, "TOKEN_HTTP_503"),
            (400, b"<html>", K.AUTH, "TOKEN_REFUSED"),
            (403, b"", K.AUTH, "TOKEN_REFUSED"),
            (500, b"", K.UNAVAILABLE, "TOKEN_HTTP_500"),
            (302, b"", K.UNAVAILABLE, "TOKEN_HTTP_302"),
            (200, b"<html>log in</html>", K.UNAVAILABLE, "TOKEN_UNREADABLE"),
            (200, {"access_token": ""}, K.UNAVAILABLE, "TOKEN_UNREADABLE"),
            (200, {"access_token": "a\r\nX: y"}, K.UNAVAILABLE, "TOKEN_UNREADABLE"),
            (200, [], K.UNAVAILABLE, "TOKEN_UNREADABLE"),
        ],
    )
    def test_refusals(self, status, body, kind, code):
        with pytest.raises(AuthFailure) as caught:
            self.read(status, body)
        assert (caught.value.kind, caught.value.code) == (kind, code)

    def test_a_vendor_s_own_word(self):
        # Zoho: too many requests for tokens are answered 200 {"error":"Access Denied"}.
        with pytest.raises(AuthFailure) as caught:
            self.read(200, {"error": "Access Denied"}, meanings={"Access Denied": K.RATE_LIMITED})
        assert (caught.value.kind, caught.value.code) == (K.RATE_LIMITED, "TOKEN_ACCESS_DENIED")


class TestFetching:
    async def test_one_fetches_while_the_others_wait(self, clock):
        issuer = Issuer(clock)
        credential = make_client_credentials(issuer, clock)
        issuer.gate = asyncio.Event()
        calls = [asyncio.create_task(read_access(credential)) for _ in range(50)]
        await asyncio.sleep(0.01)
        issuer.gate.set()
        assert set(await asyncio.gather(*calls)) == {"access-1"}
        assert issuer.asked == [{"grant_type": "client_credentials", "scope": "a b"}]

    @pytest.mark.parametrize(("life", "early"), [(300, 30), (3600, 120), (86400, 120)])
    async def test_it_is_renewed_a_little_before_it_expires(self, clock, life, early):
        credential = make_client_credentials(Issuer(clock, life=life), clock)
        assert await read_access(credential) == "access-1"
        clock.now += life - early - 1
        assert await read_access(credential) == "access-1"
        clock.now += 1
        assert await read_access(credential) == "access-2"

    async def test_a_failed_early_renewal_leaves_the_old_one_in_use_until_its_end(self, clock):
        issuer = Issuer(clock, life=300)
        credential = make_client_credentials(issuer, clock)
        await read_access(credential)
        clock.now += 280
        issuer.answers = [HttpResponse(503, {}, b""), HttpResponse(503, {}, b"")]
        assert [await read_access(credential) for _ in range(5)] == ["access-1"] * 5
        assert len(issuer.asked) == 2  # one failure, then a pause
        clock.now += 20
        with pytest.raises(AuthFailure):
            await read_access(credential)
        clock.now += 2
        assert await read_access(credential) == "access-4"

    @pytest.mark.parametrize(
        ("answer", "kind", "pause"),
        [
            (HttpResponse(401, {}, b'{"error":"invalid_client"}'), K.AUTH, 60),
            (HttpResponse(429, {}, b""), K.RATE_LIMITED, 60),
            (HttpResponse(429, {"retry-after": "90"}, b""), K.RATE_LIMITED, 90),
            (HttpResponse(503, {}, b""), K.UNAVAILABLE, 1),
            (HttpFailure(K.UNAVAILABLE, "CONNECT_FAILED"), K.UNAVAILABLE, 1),
            (HttpFailure(K.AMBIGUOUS, "NO_ANSWER"), K.UNAVAILABLE, 1),
        ],
    )
    async def test_a_refusal_is_for_all_and_the_endpoint_is_left_alone(self, clock, answer, kind, pause):
        issuer = Issuer(clock)
        issuer.answers = [answer]
        credential = make_client_credentials(issuer, clock)
        seen = await asyncio.gather(*(credential.authorise() for _ in range(20)), return_exceptions=True)
        assert {failure.kind for failure in seen} == {kind}
        clock.now += pause - 0.5
        with pytest.raises(AuthFailure):
            await credential.authorise()
        assert len(issuer.asked) == 1
        clock.now += 0.5
        assert await read_access(credential) == "access-2"

    async def test_a_clock_set_back_does_not_make_the_pause_longer(self, clock):
        issuer = Issuer(clock)
        issuer.answers = [HttpResponse(401, {}, b'{"error":"invalid_client"}')]
        credential = make_client_credentials(issuer, clock)
        with pytest.raises(AuthFailure):
            await credential.authorise()
        clock.now -= 3600
        assert await read_access(credential) == "access-2"

    async def test_a_person_may_end_the_pause(self, clock):
        issuer = Issuer(clock)
        issuer.answers = [HttpResponse(401, {}, b'{"error":"invalid_client"}')]
        credential = make_client_credentials(issuer, clock)
        with pytest.raises(AuthFailure):
            await credential.authorise()
        credential.forget_refusal()
        assert await read_access(credential) == "access-2"

    async def test_no_secret_is_shown(self, clock, caplog, vault):
        caplog.set_level("DEBUG")
        issuer = Issuer(clock, refresh="other")
        credential = make_refreshing(issuer, clock, vault)
        shown = [repr(credential), repr(use_basic("u", SecretStr("client-secret")))]
        with pytest.raises(AuthFailure) as caught:
            await credential.authorise()
        shown += traceback.format_exception(caught.value)
        issuer.refresh = "seed-refresh"
        credential.forget_refusal()
        authorisation = await credential.authorise()
        shown += [repr(authorisation), repr(credential._token), repr(vault.read()), repr(vars(credential))]
        text = "\n".join(shown) + caplog.text
        for secret in ("seed-refresh", "client-secret", "access-2", "refresh-2"):
            assert secret not in text
        assert authorisation.headers["authorization"] == "Bearer access-2"  # the control: it does hold it


class TestRenewing:
    async def test_one_renewal_for_all_who_were_refused(self, clock):
        issuer = Issuer(clock)
        credential = make_client_credentials(issuer, clock)
        await credential.authorise()
        clock.now += 600
        issuer.valid.clear()  # the vendor forgot it early

        async def call():
            request = HttpRequest("POST", "https://api.example.com/", body=b"pay")
            return await send_authorised(issuer, request, credential, deadline=5)

        seen = await asyncio.gather(*(call() for _ in range(30)))
        assert {(response.status, generation) for response, generation in seen} == {(201, 2)}
        assert len(issuer.asked) == 2

    async def test_who_is_refused_late_gets_the_token_that_is_there_by_then(self, clock):
        issuer = Issuer(clock)
        credential = make_client_credentials(issuer, clock)
        old = await credential.authorise()
        clock.now += 600
        assert (await credential.renew(old)).generation == 2
        assert (await credential.renew(old)).generation == 2
        assert len(issuer.asked) == 2

    async def test_a_token_of_a_later_clock_is_renewed_when_it_is_refused(self, clock):
        issuer = Issuer(clock)
        credential = make_client_credentials(issuer, clock)
        await credential.authorise()
        clock.now -= 7200  # our clock was ahead when the token came
        issuer.valid.clear()  # and by now the vendor says that it is over
        request = HttpRequest("POST", "https://api.example.com/")
        response, generation = await send_authorised(issuer, request, credential, deadline=5)
        assert (response.status, generation) == (201, 2)
        assert len(issuer.asked) == 2

    async def test_a_fresh_token_that_is_refused_is_refused(self, clock):
        issuer = Issuer(clock)
        credential = make_client_credentials(issuer, clock)
        request = HttpRequest("POST", "https://api.example.com/")
        issuer.valid = ForgetfulDict()
        for _ in range(10):
            response, generation = await send_authorised(issuer, request, credential, deadline=5)
            assert (response.status, generation) == (401, 1)
        assert len(issuer.asked) == 1
        clock.now += 600
        response, generation = await send_authorised(issuer, request, credential, deadline=5)
        assert (response.status, generation) == (401, 2)
        assert len(issuer.asked) == 2  # once, not in a loop

    async def test_the_same_bytes_go_again_with_other_headers_only(self, clock):
        issuer, bodies = Issuer(clock), []
        issuer.on_post = lambda request: bodies.append((request.method, request.url, request.body))
        credential = make_client_credentials(issuer, clock)
        await credential.authorise()
        clock.now += 600
        issuer.valid.clear()
        request = HttpRequest(
            "POST", "https://api.example.com/x?requestid=1", {"Authorization": "old", "X": "1"}, b"pay"
        )
        checks = []
        await send_authorised(issuer, request, credential, deadline=5, before_write=lambda: checks.append(1))
        assert bodies == [("POST", "https://api.example.com/x?requestid=1", b"pay")] * 2
        assert issuer.posted == [
            {"X": "1", "authorization": "Bearer access-1"},
            {"X": "1", "authorization": "Bearer access-2"},
        ]
        assert len(checks) == 2

    async def test_the_repeat_waits_for_the_rate_like_any_call(self, clock):
        issuer, taken = Issuer(clock), []

        class Limiter:
            async def take(self):
                taken.append(len(issuer.posted))

        credential = make_client_credentials(issuer, clock)
        await credential.authorise()
        clock.now += 600
        issuer.valid.clear()
        request = HttpRequest("POST", "https://api.example.com/")
        await send_authorised(issuer, request, credential, deadline=5, limiter=Limiter())
        assert taken == [1]

    async def test_a_fixed_credential_is_not_tried_twice(self, clock):
        issuer = Issuer(clock)
        request = HttpRequest("POST", "https://api.example.com/")
        response, generation = await send_authorised(issuer, request, use_bearer(SecretStr("x")), deadline=5)
        assert (response.status, generation, len(issuer.posted)) == (401, 0, 1)

    async def test_nothing_is_posted_without_a_token_in_time(self, clock):
        issuer = Issuer(clock)
        issuer.gate = asyncio.Event()
        credential = make_client_credentials(issuer, clock)
        request = HttpRequest("POST", "https://api.example.com/")
        with pytest.raises(AuthFailure) as caught:
            await send_authorised(issuer, request, credential, deadline=0.01)
        assert (caught.value.kind, caught.value.code) == (K.UNAVAILABLE, "TOKEN_LATE")
        assert not issuer.posted
        issuer.gate.set()
        await credential.close()
        assert await read_access(credential) == "access-1"  # the fetch went on and is not lost


class ForgetfulDict(dict):
    def __setitem__(self, name, value):
        pass


class TestRotation:
    async def test_the_new_refresh_token_is_stored_before_the_access_token_is_used(self, clock, vault):
        issuer, kept = Issuer(clock), []
        issuer.on_post = lambda _request: kept.append(vault.read().refresh.get_secret_value())
        credential = make_refreshing(issuer, clock, vault)
        for _ in range(4):
            request = HttpRequest("POST", "https://api.example.com/")
            response, _ = await send_authorised(issuer, request, credential, deadline=5)
            assert response.status == 201
            clock.now += 3600
        assert kept == ["refresh-1", "refresh-2", "refresh-3", "refresh-4"]
        assert [form["refresh_token"] for form in issuer.asked] == [
            "seed-refresh",
            "refresh-1",
            "refresh-2",
            "refresh-3",
        ]

    async def test_a_restart_goes_on_where_it_was_without_asking(self, clock, vault):
        issuer = Issuer(clock)
        await make_refreshing(issuer, clock, vault).authorise()
        assert await read_access(make_refreshing(issuer, clock, vault)) == "access-1"
        assert len(issuer.asked) == 1
        clock.now += 4000
        assert await read_access(make_refreshing(issuer, clock, vault)) == "access-2"

    async def test_an_account_connected_again_beats_the_vault(self, clock, vault):
        issuer = Issuer(clock)
        await make_refreshing(issuer, clock, vault).authorise()
        issuer.refresh = "new-consent"
        credential = make_refreshing(issuer, clock, vault, seed="new-consent")
        assert await read_access(credential) == "access-2"
        assert issuer.asked[-1]["refresh_token"] == "new-consent"
        clock.now += 4000
        assert await read_access(credential) == "access-3"

    async def test_processes_share_one_token_and_never_use_a_refresh_token_twice(self, clock, vault):
        issuer = Issuer(clock)
        processes = [make_refreshing(issuer, clock, Vault(vault.path.parent, "north", KEY)) for _ in range(5)]
        for round_number in range(1, 4):
            seen = await asyncio.gather(*(read_access(credential) for credential in processes for _ in range(4)))
            assert set(seen) == {f"access-{round_number}"}
            clock.now += 3600
        assert len(issuer.asked) == 3

    async def test_a_token_that_cannot_be_stored_is_not_used_and_not_lost(self, clock, vault, monkeypatch):
        issuer = Issuer(clock)
        credential = make_refreshing(issuer, clock, vault)
        replace = os.replace

        def fail(_old, _new):
            raise OSError(28, "No space left on device")

        monkeypatch.setattr(os, "replace", fail)
        for _ in range(3):
            with pytest.raises(AuthFailure) as caught:
                await credential.authorise()
            assert (caught.value.kind, caught.value.code) == (K.UNAVAILABLE, "TOKEN_NOT_STORED")
            clock.now += 2
        monkeypatch.setattr(os, "replace", replace)
        assert await read_access(credential) == "access-1"
        # The old refresh token is dead at the vendor: asking with it again would have locked us out.
        assert len(issuer.asked) == 1
        assert vault.read().refresh.get_secret_value() == "refresh-1"

    async def test_an_unstored_token_is_not_lost_to_a_clock_set_back(self, clock, vault, monkeypatch):
        issuer = Issuer(clock)
        credential = make_refreshing(issuer, clock, vault)
        assert await read_access(credential) == "access-1"
        issuer.valid.clear()
        clock.now -= 7200
        refused = await credential.authorise()
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda _old, _new: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(AuthFailure):
                await credential.renew(refused)
        clock.now += 2
        assert (await credential.renew(refused)).headers["authorization"] == "Bearer access-2"
        assert vault.read().refresh.get_secret_value() == "refresh-2"
        assert len(issuer.asked) == 2

    async def test_an_unstored_token_gives_way_to_a_newer_stored_one(self, clock, vault, monkeypatch):
        issuer = Issuer(clock)
        credential = make_refreshing(issuer, clock, vault)
        with monkeypatch.context() as patch:
            patch.setattr(os, "replace", lambda _old, _new: (_ for _ in ()).throw(OSError(28, "full")))
            with pytest.raises(AuthFailure):
                await credential.authorise()
        clock.now += 10
        newer = StoredToken(SecretStr("theirs"), clock.now + 3600, clock.now, SecretStr("r9"), credential._fingerprint)
        vault.write(newer)
        assert await read_access(credential) == "theirs"
        assert vault.read() == newer

    async def test_cancelled_callers_do_not_lose_a_rotated_token(self, clock, vault):
        issuer = Issuer(clock)
        issuer.gate, asked = asyncio.Event(), asyncio.Event()
        issuer.on_ask = asked.set
        credential = make_refreshing(issuer, clock, vault)
        calls = [asyncio.create_task(credential.authorise()) for _ in range(3)]
        await asked.wait()
        for call in calls:
            call.cancel()
        await asyncio.gather(*calls, return_exceptions=True)
        closing = asyncio.create_task(credential.close())
        await asyncio.sleep(0)
        issuer.gate.set()
        await closing
        assert vault.read().refresh.get_secret_value() == "refresh-1"

    async def test_a_refused_refresh_token_is_auth_and_the_vault_stays(self, clock, vault):
        issuer = Issuer(clock)
        await make_refreshing(issuer, clock, vault).authorise()
        before = vault.read()
        issuer.refresh = "revoked"
        clock.now += 4000
        with pytest.raises(AuthFailure) as caught:
            await make_refreshing(issuer, clock, vault).authorise()
        assert (caught.value.kind, caught.value.code) == (K.AUTH, "TOKEN_INVALID_GRANT")
        assert vault.read() == before

    async def test_a_vendor_that_keeps_the_refresh_token_may_leave_it_out(self, clock, vault):
        issuer = Issuer(clock, rotates=False)
        issuer.answers = [HttpResponse(200, {}, b'{"access_token":"only"}')]
        await make_refreshing(issuer, clock, vault).authorise()
        assert vault.read().refresh.get_secret_value() == "seed-refresh"

    async def test_client_credentials_may_share_a_token_too(self, clock, vault):
        issuer = Issuer(clock)
        both = [make_client_credentials(issuer, clock, vault=vault) for _ in range(2)]
        assert {await read_access(credential) for credential in both} == {"access-1"}
        assert vault.read().refresh is None

    async def test_a_folder_that_cannot_be_made_is_no_crash(self, clock, tmp_path):
        blocker = tmp_path / "file"
        blocker.write_text("")
        credential = make_refreshing(Issuer(clock), clock, Vault(blocker / "vault", "north", KEY))
        with pytest.raises(AuthFailure) as caught:
            await credential.authorise()
        assert (caught.value.kind, caught.value.code) == (K.UNAVAILABLE, "TOKEN_STORE_FAILED")


async def test_a_recipe_of_a_target_s_own(clock):
    # Prophet 21: JSON in, names of its own out.
    def request(_refresh):
        return HttpRequest("POST", URL, {"content-type": "application/json"}, b"GrantType=client_credentials")

    def read(response):
        return read_grant(response, names=("AccessToken", "ExpiresInSeconds", "RefreshToken"))

    issuer = Issuer(clock)
    issuer.answers = [HttpResponse(200, {}, b'{"AccessToken":"p21","ExpiresInSeconds":86400}')]
    credential = OAuthCredential(TokenRecipe(request=request, read=read, refreshes=False), issuer, clock=clock)
    assert await read_access(credential) == "p21"
    clock.now += 86400 - 121
    assert await read_access(credential) == "p21"

"""The HTTP transport against the simulated QuickBooks company, which shares no code with it."""

import asyncio
import json
import os
from decimal import Decimal

import pytest
from pydantic import SecretStr, ValidationError

from clients.vault import Vault, VaultKey, VaultKeyWrong
from sandbox.http_receiver import Trouble
from sandbox.quickbooks import Company
from schemas.events import MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.money import Money
from schemas.tenancy import Authority, Facility
from sinks.catalog import load
from sinks.contract import PostingContext
from sinks.transport import HttpTransport, open_transport

VAULT_KEY = SecretStr("k" * 32)
MRN = Reference("NORTH", "MR", "N1")
CONTEXT = PostingContext(
    Facility(
        id="north", time_zone="America/Chicago", default_authority="NORTH", authorities=(Authority(name="NORTH"),)
    ),
    MRN,
    1_772_355_605_000,
)
TARGET = load("quickbooks_online")
GIVEN = {
    "name": "books",
    "connector": "quickbooks_online",
    "facilities": ["north"],
    "environment": "simulator",
    "client_id": "app",
    "client_secret": "app-secret",
    "refresh_token": "refresh-0",
    "realm": "4620",
    "home_currency": "USD",
    "customer": "58",
    "deposit_account": "35",
    "refund_item": "19",
    "other_movements": "skip",
    "requestid_window_hours": 24,
}


def build_event(name="pi_1", kind="capture", minor=1250, currency="USD"):
    return MoneyEvent(
        event_id=name.ljust(32, "0"), transaction_key=name, tenant="acme", facility="north", source="stripe",
        account="north", kind=kind, status="succeeded", money=Money(minor, currency, 2),
        occurred_at=1_772_355_600_000, received_at=1_772_355_600_000, object_id=name, root="pi_1",
        source_event_id="evt", patient=MRN, mrn=MRN, mapping_version="1", origin="t:0:0",
    )  # fmt: skip


@pytest.fixture
async def company():
    company = Company("4620", client_id="app", client_secret="app-secret", refresh_token="refresh-0")
    await company.start()
    yield company
    await company.stop()


@pytest.fixture
def settings(company, tmp_path):
    return TARGET.settings.model_validate(
        GIVEN | {"simulator_url": company.url, "token_folder": tmp_path / "tokens", "call_deadline_seconds": 0.5}
    )


@pytest.fixture
async def transport(settings):
    transport = open_transport(TARGET, settings, VAULT_KEY)
    assert isinstance(transport, HttpTransport)
    yield transport
    await transport.close()


def freeze(settings, **changes):
    return TARGET.freeze(build_event(**changes), CONTEXT, settings)


def allow():
    """The last look before a write: nothing against it."""


async def test_posts_the_frozen_bytes_and_gives_the_documents_id(company, settings, transport):
    payment, refund = freeze(settings), freeze(settings, name="re_1", kind="refund", minor=5)
    answers = [await transport.send(request, allow) for request in (payment, refund)]
    assert [(answer.kind, answer.reference) for answer in answers] == [(None, p.id) for p in company.postings]
    assert [(p.entity, p.amount, p.note, p.number) for p in company.postings] == [
        ("payment", Decimal("12.50"), "pi_1", payment.reference),
        ("refundreceipt", Decimal("0.05"), "re_1", refund.reference),
    ]
    assert [seen.body for seen in company.seen] == [payment.body, refund.body]
    assert company.counts["renewals"] == 1


async def test_a_timeout_after_success_is_in_doubt_and_the_resend_posts_nothing_new(company, settings, transport):
    company.trouble(Trouble.HANG_AFTER_POSTING)
    request = freeze(settings)
    with pytest.raises(Failure) as caught:
        await transport.send(request, allow)
    assert caught.value.kind is FailureKind.AMBIGUOUS
    answer = await transport.send(request, allow)
    assert answer.kind is None
    assert answer.reference == company.postings[0].id
    assert len(company.postings) == 1
    first, second = company.seen
    assert (first.query["requestid"], first.body) == (second.query["requestid"], second.body)
    assert first.query["requestid"] == request.control_id


async def test_one_caller_renews_a_stale_token_and_all_requests_go_once_more(company, settings, transport):
    await transport.send(freeze(settings), allow)
    company.expire_token()
    # A token refused right after its issue is not renewed: age it.
    token = transport._credential._token
    object.__setattr__(token, "issued_at", token.issued_at - 600)
    requests = [freeze(settings, name=f"pi_{n}") for n in range(2, 6)]
    looks = []
    answers = await asyncio.gather(*(transport.send(request, lambda: looks.append(1)) for request in requests))
    assert [answer.kind for answer in answers] == [None] * 4
    assert company.counts["renewals"] == 2
    assert sorted(p.note for p in company.postings) == ["pi_1", "pi_2", "pi_3", "pi_4", "pi_5"]
    refused = [seen for seen in company.seen if seen.status == 401]
    assert {seen.body for seen in refused} <= {request.body for request in requests}
    assert len(looks) >= len(requests) + len(refused)


async def test_a_revoked_connection_is_auth_and_nothing_is_posted(company, settings, transport):
    company.revoke()
    with pytest.raises(Failure) as caught:
        await transport.send(freeze(settings), allow)
    assert (caught.value.kind, caught.value.code) == (FailureKind.AUTH, "TOKEN_INVALID_GRANT")
    assert company.seen == []
    assert "refresh-0" not in repr(caught.value)


def test_a_refresh_token_without_a_key_to_seal_it_is_refused(settings):
    with pytest.raises(VaultKeyWrong, match=r"secrets\.vault_key"):
        open_transport(TARGET, settings)


async def test_the_replaced_refresh_token_outlives_the_transport(company, settings, transport):
    await transport.send(freeze(settings), allow)
    kept = settings.token_folder / "books.token"
    assert Vault(settings.token_folder, "books", VaultKey(VAULT_KEY)).read().refresh.get_secret_value() == "refresh-1"
    assert "refresh-1" not in kept.read_text()
    assert kept.stat().st_mode & 0o777 == 0o600
    await transport.close()
    again = open_transport(TARGET, settings, VAULT_KEY)
    try:
        assert (await again.send(freeze(settings, name="pi_2"), allow)).kind is None
    finally:
        await again.close()
    assert company.counts["renewals"] == 1


@pytest.mark.parametrize(
    ("trouble", "kind", "code", "wait"),
    [
        (Trouble.THROTTLE, "RATE_LIMITED", "HTTP_429", 7),
        (Trouble.ERROR_AT_200, "REJECTED", "QBO_6000", 0),
        (Trouble.UNAVAILABLE, "UNAVAILABLE", "HTTP_503", 0),
    ],
)
async def test_troubles_are_named_and_post_nothing(company, settings, transport, trouble, kind, code, wait):
    company.trouble(trouble, retry_after="7")
    answer = await transport.send(freeze(settings), allow)
    assert (answer.kind, answer.code, answer.retry_after) == (kind, code, wait)
    assert answer.is_outage == (trouble is Trouble.UNAVAILABLE)
    assert company.postings == []


async def test_after_429_no_call_leaves_before_its_time(company, settings, transport):
    company.trouble(Trouble.THROTTLE, retry_after="60")
    await transport.send(freeze(settings), allow)
    with pytest.raises(Failure) as caught:
        await transport.send(freeze(settings), allow)
    assert (caught.value.kind, caught.value.code) == (FailureKind.RATE_LIMITED, "RATE_WAIT")
    assert len(company.seen) == 1


async def test_what_the_last_look_raises_withdraws_the_call(company, settings, transport):
    class Stop(Exception):
        pass

    def look():
        raise Stop

    with pytest.raises(Stop):
        await transport.send(freeze(settings), look)
    assert company.seen == []


async def test_a_request_frozen_for_another_system_does_not_leave(company, settings, transport):
    elsewhere = settings.model_copy(update={"environment": "production", "simulator_url": None})
    with pytest.raises(Failure) as caught:
        await transport.send(freeze(elsewhere), allow)
    assert (caught.value.kind, caught.value.code) == (FailureKind.INVALID, "HOST_UNDECLARED")
    assert company.seen == []


async def test_a_folder_open_to_others_holds_the_token_back(company, settings, transport):
    settings.token_folder.mkdir(mode=0o755)
    os.chmod(settings.token_folder, 0o755)  # noqa: PTH101, S103 - the mistake under test
    with pytest.raises(Failure) as caught:
        await transport.send(freeze(settings), allow)
    assert (caught.value.kind, caught.value.code) == (FailureKind.AUTH, "RS180")
    assert company.counts["renewals"] == 0


@pytest.mark.parametrize(
    ("changes", "named"),
    [
        ({"environment": "sandbox"}, "simulator_url"),
        ({"simulator_url": None}, "simulator_url"),
        ({"simulator_url": "http://books.example.com:80"}, "127.0.0.1"),
        ({"simulator_url": "http://127.0.0.1"}, "PORT"),
        ({"simulator_url": "http://u:p@127.0.0.1:80/x"}, "127.0.0.1"),
        ({"connections": 11}, "connections"),
        ({"realm": "46/20"}, "realm"),
        ({"other_movements": "maybe"}, "other_movements"),
    ],
)
def test_settings_that_cannot_be_are_refused(tmp_path, changes, named):
    good = GIVEN | {"simulator_url": "http://127.0.0.1:99", "token_folder": tmp_path}
    TARGET.settings.model_validate(good)
    with pytest.raises(ValidationError, match=named):
        TARGET.settings.model_validate(good | changes)


@pytest.mark.parametrize(
    ("changes", "code"),
    [
        ({"currency": "EUR"}, "CURRENCY_FOREIGN"),
        ({"minor": 0}, "AMOUNT_NOT_POSITIVE"),
        ({"minor": -5}, "AMOUNT_NOT_POSITIVE"),
        ({"kind": "chargeback"}, "KIND_WITHOUT_DOCUMENT"),
    ],
)
def test_what_quickbooks_cannot_book_is_a_dead_letter(settings, changes, code):
    with pytest.raises(Failure) as caught:
        freeze(settings, **changes)
    assert caught.value.code == code


@pytest.mark.parametrize(("choice", "routed"), [("skip", False), ("dead_letter", True)])
@pytest.mark.parametrize("kind", ["chargeback", "chargeback_reversal", "refund_reversal"])
def test_movements_without_a_document_are_left_out_or_seen_as_the_site_says(settings, choice, routed, kind):
    chosen = settings.model_copy(update={"other_movements": choice})
    assert TARGET.routes(build_event(kind=kind), chosen) is routed


def test_without_a_window_nothing_is_resent(settings):
    assert TARGET.classify(settings) == "A"
    assert TARGET.window(settings) == 86_400
    unknown = settings.model_copy(update={"requestid_window_hours": None})
    assert TARGET.classify(unknown) == "D"


def test_an_overlay_adds_members_but_not_the_amount(settings, tmp_path):
    overlay = tmp_path / "overlay.yaml"
    text = (
        "target: quickbooks_online\noverlay: true\nfields:\n  - {{to: {name}, expr: \"'9'\"}}\nexamples:\n"
        '  - name: one\n    given: {{object_id: pi, posting: {{customer: "1", date: "2026-01-01"}}}}\n'
        '    then: {{CustomerRef.value: "1", TxnDate: "2026-01-01", PrivateNote: pi, {name}: "9"}}\n'
    )
    overlay.write_text(text.format(name="PaymentMethodRef.value"))
    plain = settings.model_dump() | {"mapping_overlay": overlay}
    request = freeze(TARGET.settings.model_validate(plain))
    assert json.loads(request.body)["PaymentMethodRef"] == {"value": "9"}
    other = tmp_path / "other.yaml"
    other.write_text(text.format(name="TotalAmt"))
    with pytest.raises(ValidationError, match="TotalAmt"):
        TARGET.settings.model_validate(plain | {"mapping_overlay": other})

"""Each target over its transport against its simulated receiver, which shares no code with it: what is really posted.

The receivers know no idempotency key unless the vendor has one: here a request that is sent twice is posted twice.
"""

import json
from decimal import Decimal

import pytest
from pydantic import SecretStr

from clients.limits import RateLimiter
from sandbox.athena import Practice
from sandbox.http_receiver import Trouble
from sandbox.prophet21 import Service, Tenant
from sandbox.twilio import Account
from sandbox.zoho import Organization
from schemas.events import MoneyEvent, Reference
from schemas.failure import Failure, FailureKind
from schemas.money import Money
from schemas.tenancy import Authority, Facility
from sinks.catalog import load
from sinks.contract import Absent, Found, PostingContext, TargetClass, Unclear
from sinks.transport import open_transport
from tests.conformance.test_targets import find_fixtures

MRN = Reference("NORTH", "MR", "100234")
CONTEXT = PostingContext(
    Facility(
        id="north", time_zone="America/Chicago", default_authority="NORTH", authorities=(Authority(name="NORTH"),)
    ),
    MRN,
    1_772_355_605_000,
)
ATTRIBUTES = {"receipt_consent": "yes", "receipt_phone": "+15005550009", "last4": "4242"}
WRITTEN_AT = 1_772_355_605_000


def build_event(name="pi_1", kind="capture", minor=1250, root="pi_1"):
    return MoneyEvent(
        event_id=name.ljust(32, "0"), transaction_key=name, tenant="acme", facility="north", source="stripe",
        account="north-main", kind=kind, status="succeeded", money=Money(minor, "USD", 2),
        occurred_at=1_772_355_600_000, received_at=1_772_355_600_000, object_id=name, root=root,
        source_event_id="evt", patient=MRN, mrn=MRN, attributes=ATTRIBUTES, mapping_version="1", origin="t:0:0",
    )  # fmt: skip


def build_receiver(name):
    """The receiver, what its postings are (amounts by name of the event), and settings beside the fixtures'."""
    if name == "zoho_books":
        receiver = Organization(
            "10234695", client_id="app", client_secret="s", refresh_token="r", unique_label="Remitstream key"
        )
        return receiver, lambda: [payment.amount for payment in receiver.payments.values()], {
            "client_id": "app", "client_secret": "s", "refresh_token": "r",
        }  # fmt: skip
    if name == "twilio_sms":
        receiver = Account("AC" + "0" * 31 + "1", user="SK1", password="s")
        return receiver, lambda: [Decimal(message.body.split()[4]) for message in receiver.messages], {
            "user": "SK1", "password": "s",
        }  # fmt: skip
    if name == "epicor_p21":
        receiver = Tenant(
            {
                "CashReceipts": Service(("customer_id", "check_no"), "receipt_amount", "receipt_no", "ar_receipts"),
                "CreditMemo": Service(("customer_id", "po_no"), "credit_amount", "invoice_no", "invoice_hdr"),
            },
            user="remitstream",
            password="s",
        )
        fields = {"CashReceipts": "receipt_amount", "CreditMemo": "credit_amount"}
        return receiver, lambda: [Decimal(d.values[fields[d.service]]) for d in receiver.documents], {"secret": "s"}
    receiver = Practice("195900", ["100234"], client_id="app", client_secret="s")
    return receiver, lambda: [payment.amount for payment in receiver.payments], {
        "client_id": "app", "client_secret": "s",
    }  # fmt: skip


class Link:
    """One target, connected to its receiver."""

    def __init__(self, name, folder):
        self.target = load(name)
        self.receiver, self.list_amounts, self._settings = build_receiver(name)
        self._folder = folder
        self.writes = []

    async def open(self, **changes):
        given = json.loads((find_fixtures(self.target.name) / "settings.json").read_text("utf-8"))
        given |= {"environment": "simulator", "simulator_url": self.receiver.url, "call_deadline_seconds": 20.0}
        if "token_folder" in given:
            given["token_folder"] = str(self._folder / "tokens")
        self.settings = self.target.settings.model_validate(given | self._settings | changes)
        self.transport = open_transport(self.target, self.settings, SecretStr("k" * 32))
        self.transport._limiter = RateLimiter(())  # the vendors' rates are a test of their own

    @property
    def target_class(self):
        return self.target.classify(self.settings)

    def freeze(self, **changes):
        return self.target.freeze(build_event(**changes), CONTEXT, self.settings)

    async def send(self, request):
        return await self.transport.send(request, lambda: self.writes.append(request))

    async def lose_answer(self, trouble):
        """The next call is not answered, and given up soon. The token is there before: it is not what is lost."""
        if not self.transport._is_open:
            self.transport._is_open = True
            await self.transport._client.__aenter__()
        await self.transport._credential.authorise()
        self.receiver.trouble(trouble)
        self.transport.call_deadline = 1.0

    async def find(self, request):
        self.transport.call_deadline = 20.0
        return await self.transport.find(request, WRITTEN_AT, lambda: None)


@pytest.fixture(params=["zoho_books", "twilio_sms", "epicor_p21", "athenahealth"])
async def link(request, tmp_path):
    link = Link(request.param, tmp_path)
    await link.receiver.start()
    await link.open()
    yield link
    await link.transport.close()
    await link.receiver.stop()


@pytest.fixture
async def zoho(tmp_path):
    link = Link("zoho_books", tmp_path)
    await link.receiver.start()
    await link.open()
    yield link
    await link.transport.close()
    await link.receiver.stop()


async def test_a_capture_is_posted_with_its_amount(link):
    answer = await link.send(link.freeze())
    assert answer.kind is None
    assert answer.reference
    assert link.list_amounts() == [Decimal("12.50")]


async def test_after_a_lost_answer_the_posting_is_recognised_or_a_person_decides(link):
    request = link.freeze()
    await link.lose_answer(Trouble.HANG_AFTER_POSTING)
    with pytest.raises(Failure) as caught:
        await link.send(request)
    assert caught.value.kind is FailureKind.AMBIGUOUS
    assert len(link.list_amounts()) == 1
    if link.target_class is TargetClass.C:
        assert isinstance(await link.find(request), Found)
        assert len(link.list_amounts()) == 1
    else:
        assert link.target_class is TargetClass.D
        # Why nobody may send it again.
        link.transport.call_deadline = 20.0
        await link.send(request)
        assert len(link.list_amounts()) == 2


async def test_what_was_not_posted_is_found_absent_and_posted_once(link):
    request = link.freeze()
    await link.lose_answer(Trouble.HANG_BEFORE_POSTING)
    with pytest.raises(Failure) as caught:
        await link.send(request)
    assert caught.value.kind is FailureKind.AMBIGUOUS
    if link.target_class is TargetClass.C:
        assert await link.find(request) == Absent()
        await link.send(request)
        found = await link.find(request)
        assert isinstance(found, Found)
        assert len(link.list_amounts()) == 1


async def test_another_posting_is_not_taken_for_ours(link):
    if link.target_class is not TargetClass.C:
        assert link.target.http.look_up is None
        return
    await link.send(link.freeze(name="pi_2", root="pi_2"))
    assert await link.find(link.freeze()) == Absent()


async def test_refusals_are_told_apart_and_nothing_is_posted(link):
    receiver = link.receiver
    receiver.trouble(Trouble.ERROR_AT_200)
    refused = await link.send(link.freeze())
    assert refused.kind in {FailureKind.REJECTED, FailureKind.AMBIGUOUS}
    receiver.trouble(Trouble.UNAVAILABLE)
    away = await link.send(link.freeze())
    assert (away.kind, away.is_outage) == (FailureKind.UNAVAILABLE, True)
    receiver.trouble(Trouble.THROTTLE, retry_after="7")
    told = await link.send(link.freeze())
    assert (told.kind, told.retry_after) == (FailureKind.RATE_LIMITED, 7)
    assert link.list_amounts() == []
    assert len(receiver.seen) == 3


async def test_a_stale_token_is_renewed_once_and_the_same_bytes_go_again(link):
    await link.send(link.freeze())
    if not link.receiver.token_path:
        # A key that a person replaces: refused once, not tried again.
        link.receiver._basic = ""
        assert (await link.send(link.freeze(name="pi_2"))).kind is FailureKind.AUTH
        assert [seen.status for seen in link.receiver.seen] == [201, 401]
        return
    token = link.transport._credential._token
    object.__setattr__(token, "issued_at", token.issued_at - 4000)
    link.receiver.expire_token()
    answer = await link.send(link.freeze(name="pi_2", root="pi_2"))
    assert answer.kind is None
    assert link.receiver.counts["renewals"] == 2
    statuses = [(seen.status, seen.body) for seen in link.receiver.seen]
    assert [status for status, _ in statuses] in ([200, 401, 200], [201, 401, 201])
    assert statuses[1][1] == statuses[2][1]
    assert len(link.list_amounts()) == 2


async def test_without_rights_nothing_is_posted(link):
    await link.transport.close()
    secrets = {name: "wrong" for name in link._settings if name in {"client_secret", "password", "secret"}}
    assert secrets
    await link.open(**secrets)
    try:
        kind = (await link.send(link.freeze())).kind
    except Failure as failure:
        kind = failure.kind
    assert kind is FailureKind.AUTH
    assert link.list_amounts() == []


async def test_zoho_payments_alone_are_of_class_b_and_an_upsert_meets_itself(zoho):
    await zoho.transport.close()
    await zoho.open(refunds="skip")
    assert zoho.target_class is TargetClass.B
    request = zoho.freeze()
    await zoho.lose_answer(Trouble.HANG_AFTER_POSTING)
    with pytest.raises(Failure):
        await zoho.send(request)
    zoho.transport.call_deadline = 20.0
    answer = await zoho.send(request)
    assert answer.kind is None
    assert zoho.list_amounts() == [Decimal("12.50")]
    assert zoho.receiver.counts["updates"] == 1
    first, second = zoho.receiver.seen
    assert (first.body, first.path) == (second.body, second.path)


async def test_a_zoho_refund_finds_its_payment_and_waits_for_one_that_is_not_there(zoho):
    refund = zoho.freeze(name="re_1", kind="refund", minor=500)
    answer = await zoho.send(refund)
    assert (answer.kind, answer.code, answer.is_outage) == (FailureKind.UNAVAILABLE, "PAYMENT_NOT_FOUND", False)
    assert zoho.receiver.seen == []
    for name in ("pi_2", "pi_1", "pi_3"):
        await zoho.send(zoho.freeze(name=name, root=name))
    answer = await zoho.send(refund)
    assert answer.kind is None
    posted = {payment.description: [r.amount for r in payment.refunds] for payment in zoho.receiver.payments.values()}
    assert posted == {"pi_1": [Decimal("5.00")], "pi_2": [], "pi_3": []}
    # More than is left is refused for good.
    answer = await zoho.send(zoho.freeze(name="re_2", kind="refund", minor=800))
    assert (answer.kind, answer.code) == (FailureKind.REJECTED, "ZOHO_12007")


async def test_a_zoho_refund_is_looked_up_over_pages(zoho):
    await zoho.send(zoho.freeze())
    names = [f"re_{number}" for number in range(5)]
    for name in names[:-1]:
        await zoho.send(zoho.freeze(name=name, kind="refund", minor=100))
    zoho.receiver.page_length = 2
    found = await zoho.find(zoho.freeze(name="re_3", kind="refund", minor=100))
    (payment,) = zoho.receiver.payments.values()
    assert found == Found(payment.refunds[3].id)
    assert await zoho.find(zoho.freeze(name="re_4", kind="refund", minor=100)) == Absent()
    zoho.receiver.payments.clear()
    assert await zoho.find(zoho.freeze(name="re_4", kind="refund", minor=100)) == Unclear("PAYMENT_NOT_FOUND")


async def test_a_lost_question_posts_nothing(zoho):
    zoho.receiver.url = ""
    await zoho.receiver.stop()
    with pytest.raises(Failure) as caught:
        await zoho.send(zoho.freeze(name="re_1", kind="refund", minor=500))
    assert caught.value.kind is FailureKind.UNAVAILABLE


async def test_a_message_is_found_on_a_later_page_and_an_opted_out_number_refused(tmp_path):
    link = Link("twilio_sms", tmp_path)
    await link.receiver.start()
    await link.open()
    for number in range(5):
        await link.send(link.freeze(name=f"pi_{number}", root=f"pi_{number}"))
    link.receiver.page_length = 2
    assert await link.find(link.freeze(name="pi_0", root="pi_0")) == Found(link.receiver.messages[0].sid)
    assert await link.find(link.freeze(name="pi_9", root="pi_9")) == Absent()
    link.receiver.opted_out.add("+15005550009")
    answer = await link.send(link.freeze(name="pi_9", root="pi_9"))
    assert (answer.kind, answer.code) == (FailureKind.REJECTED, "TWILIO_21610")
    await link.transport.close()
    await link.receiver.stop()

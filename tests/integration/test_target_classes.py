"""Targets without an idempotency key on the real stack: what became of a lost answer is asked, or told to a person.

The receivers post a request as often as it comes; what they hold is the oracle.
"""

from __future__ import annotations

from collections import Counter
from decimal import Decimal

import msgspec
import pytest
from pydantic import SecretStr

from clients.limits import RateLimiter
from sandbox.athena import Practice
from sandbox.http_receiver import Trouble
from sandbox.prophet21 import Service, Tenant
from sandbox.twilio import Account
from sandbox.zoho import Organization
from schemas.events import Reference
from sinks.catalog import load
from sinks.runner import Runner
from tests.conformance.test_targets import build_settings
from tests.integration.test_delivery import EverybodyKnown, Running, Site, build_tenancy, count_final, wait_until

pytestmark = pytest.mark.integration

ATTRIBUTES = {"receipt_consent": "yes", "receipt_phone": "+15005550009", "last4": "4242"}


class Dressed:
    """Encodes events with what these targets need beside the money: a numeric patient, attributes."""

    def __init__(self, encoder):
        self._encoder = encoder

    def encode(self, event):
        patient = Reference("NORTH", "MR", "100234")
        return self._encoder.encode(msgspec.structs.replace(event, patient=patient, mrn=patient, attributes=ATTRIBUTES))


class Receiving(Site):
    """A site whose target is a simulated receiver."""

    def __init__(self, stack, folder, connector, receiver, **settings):
        super().__init__(stack, folder, dedupe=True)
        self.encoder = Dressed(self.encoder)
        self.receiver = receiver
        self._target = load(connector)
        self._given = {
            "name": self.name,
            "facilities": [self.name],
            "environment": "simulator",
            "simulator_url": receiver.url,
            "call_deadline_seconds": 1.0,
            **settings,
        }
        if connector == "athenahealth":
            self._given |= {"departments": {self.name: "1"}, "accounts": [self.name]}
        if connector in {"zoho_books", "epicor_p21"}:
            self._given |= {"facility_customers": {}}

    def build_runner(self, patients=None, **options):
        settings = build_settings(self._target.name, self._given)
        runner = Runner(
            self.kafka,
            self._target,
            settings,
            build_tenancy(self.name),
            registry=self.registry,
            identities=patients or EverybodyKnown(),
            instance="test",
            vault_key=SecretStr("k" * 32),
            **options,
        )
        runner._transport._limiter = RateLimiter(())  # the vendors' rates would only make the test slow
        return runner


@pytest.fixture
async def open_site(stack, tmp_path):
    sites = []

    async def open_(connector, receiver, **settings):
        await receiver.start()
        site = Receiving(stack, tmp_path, connector, receiver, **settings)
        sites.append(site)
        return site

    yield open_
    for site in sites:
        await site.receiver.stop()


def make_books(tmp_path):
    books = Organization(
        "10234695", client_id="app", client_secret="s", refresh_token="r", unique_label="Remitstream key"
    )
    given = {"client_id": "app", "client_secret": "s", "refresh_token": "r", "token_folder": str(tmp_path / "tokens")}
    return books, given


def list_final(site):
    return Counter(outcomes[-1].outcome for outcomes in site.read_outcomes().values() if outcomes)


async def test_zoho_posts_payments_and_refunds_once_through_lost_answers(open_site, tmp_path):
    books, given = make_books(tmp_path)
    site = await open_site("zoho_books", books, **given, other_movements="skip")
    books.trouble(Trouble.HANG_AFTER_POSTING)
    books.trouble(Trouble.HANG_BEFORE_POSTING)
    books.trouble(Trouble.THROTTLE, retry_after="1")
    facts = [("capture", f"pi_{n}", f"pi_{n}", 1000 + n) for n in range(5)]
    facts += [("refund", f"re_{n}", f"pi_{n}", 100 + n) for n in range(5)]
    facts.append(("chargeback", "dp_1", "pi_1", 1001))
    site.publish(facts)
    async with Running(site.build_runner()):
        await wait_until(lambda: len(books.payments) == 5)
        books.trouble(Trouble.HANG_AFTER_POSTING)
        await wait_until(lambda: count_final(site) == len(facts), 120)
    posted = {payment.description: payment for payment in books.payments.values()}
    assert len(books.payments) == 5
    assert {name: payment.amount for name, payment in posted.items()} == {
        f"pi_{n}": Decimal(1000 + n) / 100 for n in range(5)
    }
    for n in range(5):
        (refund,) = posted[f"pi_{n}"].refunds
        assert (refund.description, refund.amount) == (f"re_{n}", Decimal(100 + n) / 100)
    assert list_final(site) == {"posted": 10, "not_routed": 1}
    assert site.read_dead_letters() == []
    # What was found by a look-up has the books' own number.
    outcomes = site.read_outcomes()
    assert {outcomes[name][-1].reference for name in posted} == set(books.payments)


async def test_zoho_payments_alone_are_sent_again_and_meet_themselves(open_site, tmp_path):
    books, given = make_books(tmp_path)
    site = await open_site("zoho_books", books, **given, refunds="skip", other_movements="skip")
    books.trouble(Trouble.HANG_AFTER_POSTING, 2)
    site.publish([("capture", f"pi_{n}", f"pi_{n}", 1000) for n in range(4)] + [("refund", "re_1", "pi_1", 100)])
    async with Running(site.build_runner()):
        await wait_until(lambda: count_final(site) == 5, 120)
    assert Counter(payment.description for payment in books.payments.values()) == {f"pi_{n}": 1 for n in range(4)}
    assert books.counts["updates"] == 2
    assert list_final(site) == {"posted": 4, "not_routed": 1}


async def test_prophet_21_is_asked_before_a_receipt_is_entered_again(open_site):
    services = {
        "CashReceipts": Service(("customer_id", "check_no"), "receipt_amount", "receipt_no", "ar_receipts"),
        "CreditMemo": Service(("customer_id", "po_no"), "credit_amount", "invoice_no", "invoice_hdr"),
    }
    tenant = Tenant(services, user="remitstream", password="s")
    site = await open_site("epicor_p21", tenant, secret="s", other_movements="skip")
    tenant.trouble(Trouble.HANG_AFTER_POSTING, 2)
    tenant.trouble(Trouble.HANG_BEFORE_POSTING)
    tenant.trouble(Trouble.ERROR_AT_200)
    site.publish([("capture", f"pi_{n}", f"pi_{n}", 1000 + n) for n in range(6)] + [("refund", "re_5", "pi_5", 100)])
    async with Running(site.build_runner()):
        await wait_until(lambda: count_final(site) == 7, 120)
    rejected = [name for name, found in site.read_outcomes().items() if found[-1].outcome == "rejected"]
    assert len(rejected) == 1
    behind = {"re_5"} if rejected == ["pi_5"] else set()
    amounts = Counter(values.get("receipt_amount") for values in (one.values for one in tenant.documents))
    names = {f"pi_{n}": f"{(1000 + n) // 100}.{(1000 + n) % 100:02d}" for n in range(6)}
    wanted = Counter({amount: 1 for name, amount in names.items() if name not in rejected})
    assert amounts == wanted + Counter({None: 0 if behind else 1})
    (letter,) = site.read_dead_letters()
    assert b"Customer ID" not in letter.value


async def test_a_receipt_by_sms_goes_out_once(open_site):
    account = Account("AC" + "0" * 31 + "1", user="SK1", password="s")
    site = await open_site("twilio_sms", account, user="SK1", password="s")
    account.trouble(Trouble.HANG_AFTER_POSTING)
    account.trouble(Trouble.HANG_BEFORE_POSTING)
    site.publish([("capture", f"pi_{n}", f"pi_{n}", 1000 + n) for n in range(4)] + [("refund", "re_1", "pi_1", 100)])
    async with Running(site.build_runner()):
        await wait_until(lambda: count_final(site) == 5, 120)
    assert Counter(message.body.split()[4] for message in account.messages) == Counter(f"10.0{n}" for n in range(4))
    assert list_final(site) == {"posted": 4, "not_routed": 1}


async def test_athenahealth_is_never_sent_a_payment_again(open_site):
    practice = Practice("195900", ["100234"], client_id="app", client_secret="s")
    site = await open_site(
        "athenahealth", practice, client_id="app", client_secret="s", other_movements="skip", practice="195900"
    )
    practice.trouble(Trouble.HANG_AFTER_POSTING)
    practice.trouble(Trouble.HANG_BEFORE_POSTING)
    site.publish([("capture", f"pi_{n}", f"pi_{n}", 1000 + n) for n in range(4)])
    async with Running(site.build_runner()):
        await wait_until(lambda: count_final(site) == 4, 120)
    # The two lost answers look alike from here: neither is silent, neither is sent again.
    assert list_final(site) == {"posted": 2, "unknown": 2}
    assert len(practice.payments) == 3
    assert set(Counter(payment.amount for payment in practice.payments).values()) == {1}

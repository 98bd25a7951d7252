"""Delivery over HTTP on the real stack against the simulated QuickBooks company: posted once, whatever happens."""

from __future__ import annotations

import asyncio
from collections import Counter
from decimal import Decimal

import pytest
from pydantic import SecretStr

from sandbox.http_receiver import Trouble
from sandbox.quickbooks import Company
from sinks.catalog import load
from sinks.runner import Runner
from tests.integration.test_delivery import EverybodyKnown, Running, Site, build_tenancy, count_final, wait_until

pytestmark = pytest.mark.integration


class Books(Site):
    """A site whose target is a company in QuickBooks Online."""

    def __init__(self, stack, tmp_path, company):
        super().__init__(stack, tmp_path, dedupe=True)
        self.company = company
        self.tokens = tmp_path / "tokens"

    def build_runner(self, patients=None, **options):
        target = load("quickbooks_online")
        settings = target.settings.model_validate(
            {
                "name": self.name,
                "connector": "quickbooks_online",
                "facilities": [self.name],
                "environment": "simulator",
                "simulator_url": self.company.url,
                "client_id": "app",
                "client_secret": "app-secret",
                "refresh_token": "refresh-0",
                "token_folder": self.tokens,
                "realm": "4620",
                "home_currency": "USD",
                "customer": "58",
                "deposit_account": "35",
                "refund_item": "19",
                "other_movements": "skip",
                "requestid_window_hours": 24,
                "call_deadline_seconds": 1.0,
            }
        )
        return Runner(
            self.kafka,
            target,
            settings,
            build_tenancy(self.name),
            registry=self.registry,
            identities=patients or EverybodyKnown(),
            instance="test",
            vault_key=SecretStr("k" * 32),
            **options,
        )


@pytest.fixture
async def books(stack, tmp_path):
    company = Company("4620", client_id="app", client_secret="app-secret", refresh_token="refresh-0")
    await company.start()
    yield Books(stack, tmp_path, company)
    await company.stop()


def count_posted(books):
    return Counter(posting.note for posting in books.company.postings)


async def test_everything_is_posted_once_through_a_hang_a_stale_token_and_a_429(books):
    company = books.company
    company.trouble(Trouble.HANG_AFTER_POSTING)
    facts = [("capture", f"pi_{n}", f"pi_{n}", 1000 + n) for n in range(4)]
    facts += [("refund", f"re_{n}", f"pi_{n}", 100 + n) for n in range(4)]
    facts.append(("chargeback", "dp_1", "pi_1", 1001))
    books.publish(facts)
    async with Running(books.build_runner()) as runner:
        await wait_until(lambda: count_final(books) == len(facts))
        # The hung request was sent again with its own key and bytes, and the company knew it.
        by_key = {}
        for seen in company.seen:
            by_key.setdefault(seen.query["requestid"], []).append(seen.body)
        assert sorted(len(bodies) for bodies in by_key.values()) == [1] * 7 + [2]
        assert all(len(set(bodies)) == 1 for bodies in by_key.values())
        assert company.counts["replays"] == 1

        # The token goes stale under load: renewed once, and what was refused is posted.
        token = runner._transport._credential._token
        object.__setattr__(token, "issued_at", token.issued_at - 600)
        company.expire_token()
        books.publish([("capture", f"pi_{n}", f"pi_{n}", 500) for n in range(10, 16)])
        await wait_until(lambda: count_final(books) == len(facts) + 6)
        assert company.counts["renewals"] == 2

        # Told to wait two seconds: nobody calls before, nothing is dead-lettered.
        company.trouble(Trouble.THROTTLE, retry_after="2")
        books.publish([("capture", "pi_20", "pi_20", 500)])
        await wait_until(lambda: company.seen[-1].status == 429)
        books.publish([("capture", "pi_21", "pi_21", 500)])
        await wait_until(lambda: count_final(books) == len(facts) + 8)

        # An error in an answer with status 200 is no posting.
        company.trouble(Trouble.ERROR_AT_200)
        books.publish([("capture", "pi_30", "pi_30", 500)])
        await wait_until(lambda: count_final(books) == len(facts) + 9)
    refused = next(seen for seen in company.seen if seen.status == 429)
    later = [seen.at - refused.at for seen in company.seen if seen.at > refused.at]
    assert len(later) == 3
    assert min(later) >= 2

    names = [name for kind, name, *_ in facts if kind != "chargeback"]
    assert count_posted(books) == Counter([*names, *(f"pi_{n}" for n in (*range(10, 16), 20, 21))])
    amounts = {posting.note: posting.amount for posting in company.postings}
    assert (amounts["pi_3"], amounts["re_3"]) == (Decimal("10.03"), Decimal("1.03"))
    places = {posting.note: place for place, posting in enumerate(company.postings)}
    assert all(places[f"pi_{n}"] < places[f"re_{n}"] for n in range(4))
    outcomes = books.read_outcomes()
    assert [outcome.outcome for outcome in outcomes["dp_1"]] == ["not_routed"]
    (refusal,) = outcomes.pop("pi_30")
    assert (refusal.outcome, refusal.failure, refusal.code) == ("rejected", "REJECTED", "QBO_6000")
    by_note = {posting.note: posting.id for posting in company.postings}
    assert {name: [(o.outcome, o.reference) for o in found] for name, found in outcomes.items() if name != "dp_1"} == {
        name: [("posted", by_note[name])] for name in by_note
    }
    assert len(books.read_dead_letters()) == 1
    assert len(books.read_open_entries()) == 1


async def test_a_process_that_dies_in_a_call_leaves_a_request_that_is_resent_as_it_was(books):
    company = books.company
    company.trouble(Trouble.HANG_AFTER_POSTING)
    books.publish([("capture", "pi_1", "pi_1", 700), ("refund", "re_1", "pi_1", 200)])
    first = books.build_runner()
    task = asyncio.create_task(first.run())
    await wait_until(lambda: len(company.seen) == 1)
    task.cancel()
    await asyncio.gather(task, return_exceptions=True)
    async with Running(books.build_runner()):
        await wait_until(lambda: count_final(books) == 2)
    assert count_posted(books) == {"pi_1": 1, "re_1": 1}
    sent = [(seen.query["requestid"], seen.body) for seen in company.seen]
    assert sent[0] == sent[1]
    assert company.counts["replays"] == 1


async def test_a_revoked_connection_pauses_the_target_and_loses_nothing(books):
    company = books.company
    company.revoke()
    books.publish([("capture", "pi_1", "pi_1", 700)])
    async with Running(books.build_runner()) as runner:
        await wait_until(lambda: "target" in runner.ready()[1])
        assert runner.ready()[1]["target"] == "TOKEN_INVALID_GRANT"
    assert company.seen == []
    assert books.read_outcomes()["pi_1"] == []
    assert books.read_dead_letters() == []
    assert len(books.read_open_entries()) == 1

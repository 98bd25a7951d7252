"""Four target systems, one of each class, that live on while the deliverer dies; and what they hold.

They run in this process, on a thread of their own, are slow on purpose, and lose answers.
"""

from __future__ import annotations

import asyncio
import threading
from dataclasses import dataclass
from decimal import Decimal

from sandbox.billing import BillingSystem, Mode, ModeKind
from sandbox.http_receiver import Trouble
from sandbox.prophet21 import Service, Tenant
from sandbox.transactions import Instance
from sandbox.zoho import Organization
from tests.ports import find_ports

DEADLINE = 1.0
"""Seconds after which the deliverer gives up waiting for an answer."""
LATE = 0.9
"""Seconds after which a slow write is posted: its sender may be dead by then, but its deadline is not over."""
MOVED = {"capture": 1, "refund": -1, "chargeback": -1}
"""Kinds that a ledger of payments holds, and whether money came or went."""


@dataclass(frozen=True, slots=True)
class TargetRule:
    """What a target must hold."""

    name: str
    target_class: str
    facility: str
    kinds: tuple[str, ...]


RULES = (
    TargetRule("key", "A", "harbor", ("capture", "refund", "chargeback")),
    # Of Zoho's postings only payments are upserted, so an entity has one event here.
    TargetRule("upsert", "B", "harbor", ("capture",)),
    TargetRule("look-up", "C", "north", ("capture", "refund")),
    TargetRule("nothing", "D", "north", ("capture", "refund", "chargeback")),
)

_EPIC = """
[[targets]]
name = "{rule.name}"
connector = "epic_dft"
facilities = ["{rule.facility}"]
host = "127.0.0.1"
port = {port}
sending_application = "REMITSTREAM"
sending_facility = "LAKESHORE"
receiving_application = "EPICPB"
receiving_facility = "{receiver}"
payment_code = "1001"
refund_as = "negative"
{duplicates}
call_deadline_seconds = {deadline}
"""
_DUPLICATES = {
    "key": 'duplicate_control = "msh10"\nduplicate_window_hours = 72',
    "nothing": 'duplicate_control = "none"',
}
"""What each of the two billing systems says of messages that come twice."""

_SETTINGS = """
[[targets]]
name = "upsert"
connector = "zoho_books"
facilities = ["harbor"]
environment = "simulator"
simulator_url = "{upsert}"
client_id = "app"
client_secret = "file:{secret}"
refresh_token = "file:{secret}"
token_folder = "{tokens}"
data_center = "com"
organization = "10234695"
currency = "USD"
customer = "903000000000099"
account = "903000000000350"
unique_field = "cf_remitstream_key"
unique_label = "Remitstream key"
refunds = "skip"
other_movements = "skip"
call_deadline_seconds = {deadline}

[[targets]]
name = "look-up"
connector = "epicor_p21"
facilities = ["north"]
environment = "simulator"
simulator_url = "{look_up}"
host = "p21.example.org"
user = "remitstream"
secret = "file:{secret}"
company = "ACME"
customer = "100198"
currency = "USD"
date_form = "us"
refunds = "post"
other_movements = "skip"
call_deadline_seconds = {deadline}

[targets.receipt]
service = "CashReceipts"
element = "TABPAGE_1.receipt"
number_field = "receipt_no"
table = "ar_receipts"
reference_column = "check_no"
number_column = "receipt_no"

[targets.receipt.fields]
company = "company_id"
customer = "customer_id"
amount = "receipt_amount"
reference = "check_no"
description = "memo"

[targets.credit]
service = "CreditMemo"
element = "TABPAGE_1.credit"
number_field = "invoice_no"
table = "invoice_hdr"
reference_column = "po_no"
number_column = "invoice_no"

[targets.credit.fields]
company = "company_id"
customer = "customer_id"
amount = "credit_amount"
reference = "po_no"
description = "memo"

"""

_SECRET = "planted-secret-of-the-simulators"


class Targets:
    """The four systems. ``settings`` is their part of the configuration, ``overrides`` the rest of it."""

    def __init__(self, folder, dice):
        self._folder = folder
        self._dice = dice
        self._billing = BillingSystem(
            folder / "billing.sqlite",
            [
                Instance("key", port=find_ports(), duplicate_control="msh10"),
                Instance("nothing", port=find_ports(), duplicate_control="none"),
            ],
            None,
        )
        self._books = Organization(
            "10234695",
            client_id="app",
            client_secret=_SECRET,
            refresh_token=_SECRET,
            unique_label="Remitstream key",
        )
        self._books.most_tokens = 100_000  # each process asks for one, and there will be many
        services = {
            "CashReceipts": Service(("customer_id", "check_no"), "receipt_amount", "receipt_no", "ar_receipts"),
            "CreditMemo": Service(("customer_id", "po_no"), "credit_amount", "invoice_no", "invoice_hdr"),
        }
        self._tenant = Tenant(services, user="remitstream", password=_SECRET)
        for receiver in (self._books, self._tenant):
            receiver.pace = self._draw_pace
        self._loop = asyncio.new_event_loop()
        self._thread = threading.Thread(target=self._loop.run_forever, name="targets", daemon=True)

    def start(self):
        """Open all ports."""
        self._thread.start()
        self._call(self._start())

    def close(self):
        """Close them."""
        self._call(self._stop())
        self._loop.call_soon_threadsafe(self._loop.stop)
        self._thread.join()
        self._loop.close()

    @property
    def settings(self):
        """The target instances, as TOML."""
        secret = self._folder / "simulators.key"
        secret.write_text(_SECRET, "utf-8")
        secret.chmod(0o600)
        epic = "".join(
            _EPIC.format(
                rule=rule,
                port=self._billing.ports[rule.name],
                receiver=f"LS{rule.facility.upper()}",
                duplicates=_DUPLICATES[rule.name],
                deadline=DEADLINE,
            )
            for rule in RULES
            if rule.name in _DUPLICATES
        )
        return epic + _SETTINGS.format(
            upsert=self._books.url,
            look_up=self._tenant.url,
            secret=secret,
            tokens=self._folder / "tokens",
            deadline=DEADLINE,
        )

    @property
    def overrides(self):
        """Settings beside the targets."""
        return {"secrets.vault_key": f"file:{self._folder / 'simulators.key'}"}

    def count_open(self):
        """Calls that have arrived and are not answered, by target."""
        return {
            "key": self._billing.count_open("key"),
            "nothing": self._billing.count_open("nothing"),
            "upsert": self._books.open_writes,
            "look-up": self._tenant.open_writes,
        }

    def lose_an_answer(self):
        """The next write at each system over HTTP is posted and not answered; over MLLP each 25th is anyway."""
        for receiver in (self._books, self._tenant):
            self._loop.call_soon_threadsafe(receiver.trouble, Trouble.HANG_AFTER_POSTING)

    def read_holdings(self):
        """Target -> (object id, signed minor units) in the order in which they were posted."""
        return self._call(self._read_holdings())

    async def _read_holdings(self):
        return {
            "key": self._read_billing("key"),
            "nothing": self._read_billing("nothing"),
            "upsert": [(payment.description, _to_minor(payment.amount)) for payment in self._books.payments.values()],
            "look-up": [_read_document(document) for document in self._tenant.documents],
        }

    def _read_billing(self, instance):
        return [(row["description"], row["minor"]) for row in self._billing.read_ledger(instance=instance)]

    async def _start(self):
        await self._billing.start()
        for mode in (
            Mode(ModeKind.HANG_AFTER_POSTING, every=25),
            Mode(ModeKind.SLOW, every=20, seconds=LATE),
            Mode(ModeKind.SLOW, seconds=0.15),
        ):
            await self._billing.set_mode(mode)
        await self._books.start()
        await self._tenant.start()

    async def _stop(self):
        await self._tenant.stop()
        await self._books.stop()
        await self._billing.stop()

    def _draw_pace(self):
        before = LATE if self._dice.random() < 0.05 else self._dice.uniform(0, 0.2)
        return before, self._dice.uniform(0, 0.2)

    def _call(self, work):
        return asyncio.run_coroutine_threadsafe(work, self._loop).result(30)


def _to_minor(amount):
    return int(Decimal(amount) * 100)


def _read_document(document):
    is_receipt = document.service == "CashReceipts"
    amount = document.values["receipt_amount" if is_receipt else "credit_amount"]
    return document.values["memo"], _to_minor(amount) if is_receipt else -_to_minor(amount)

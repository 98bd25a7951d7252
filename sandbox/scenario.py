"""Makes a plan concrete: every item's bytes, in phases, and the expected result beside it.

The story: patients are admitted (phase ``admissions``); they pay, get money back, dispute, and some of their events
come twice, early or broken (``main``); admissions that were late arrive and identities are merged (``late``); people go
on paying, some under the retired number (``after``).
"""

from __future__ import annotations

import hashlib
import random
from collections import Counter, defaultdict
from dataclasses import dataclass, field, replace
from itertools import count
from typing import TYPE_CHECKING, Any

from sandbox import stripe_objects as stripe
from sandbox.adt import Envelope, Patient, write_admission, write_merge
from sandbox.coins import DECIMALS
from sandbox.expected import Expected, ExpectedRow, TargetCounts
from sandbox.people import PlantRegister, invent_card, invent_name, write_card
from sandbox.plan import Channel, FacilityPlan, Fate, Item, Phase, Traffic, TrafficPlan

if TYPE_CHECKING:
    from collections.abc import Iterable

PHASES = ("admissions", "main", "late", "after")

_LETTERS = "ABCDEFGHJKLMNPQRSTUVWXYZabcdefghijkmnopqrstuvwxyz23456789"

# The first payments of every plan show each situation once; the rest is drawn by chance.
_SHOWN = (
    {"sister"}, {"refund", "sister"}, {"refund_first"}, {"dispute"}, {"duplicate", "sister"}, {"twin"}, {"late"},
    {"late", "refund"}, {"late", "duplicate"}, {"refund", "refund_duplicate"}, {"refund", "second_refund"},
    {"created"}, {"customer"}, {"charge_updated"}, {"late", "dispute"}, {"dispute", "dispute_duplicate"},
)  # fmt: skip
_CHANCES = (
    ("sister", 0.75), ("created", 0.10), ("customer", 0.04), ("charge_updated", 0.06), ("duplicate", 0.01),
    ("twin", 0.005), ("late", 0.01),
)  # fmt: skip


@dataclass(slots=True, eq=False)
class _Draft:
    """An item before it has its place: phases sort by ``position``, then by the order of making."""

    phase: str
    position: float
    channel: Channel
    facility: str
    kind: str
    identity: str
    fate: Fate
    body: bytes
    after: _Draft | None = None
    waits: bool = False
    made: int = 0


@dataclass(slots=True)
class _Site:
    """One facility while its traffic is made."""

    plan: FacilityPlan
    number: int
    run: str
    api_version: str
    patients: list[Patient] = field(default_factory=list)
    late_patients: list[Patient] = field(default_factory=list)
    foreign_left: int = 0
    captured: Counter[str] = field(default_factory=Counter)


class _Author:
    """Makes the drafts and, from the same story, the rows that must be posted."""

    def __init__(self, plan: TrafficPlan) -> None:
        self.plan = plan
        self.random = random.Random(f"remitstream traffic {plan.seed}")
        self.run = _name_run(plan.seed)
        self.drafts: list[_Draft] = []
        self.rows: list[ExpectedRow] = []
        self.rejected: Counter[str] = Counter()
        self.poison: dict[str, list[str]] = defaultdict(list)
        self.plants = PlantRegister()
        self.survivors: dict[tuple[str, str], str] = {}
        self.sites = [
            _Site(facility, number, self.run, stripe.OLD_API if number == 2 else stripe.NEW_API)
            for number, facility in enumerate(plan.facilities)
        ]
        self._controls = count(1)
        self._mrn_base = 10_000_000 + int.from_bytes(hashlib.sha256(self.run.encode()).digest()[:4], "big") % 80_000_000
        self._fresh_mrns = count(self._mrn_base + (len(self.sites) + 2) * self.patients_per_site)

    @property
    def patients_per_site(self) -> int:
        return max(10, self.plan.events // 60)

    # --- the phases

    def admit_patients(self) -> None:
        """Every patient but the late ones; some are updated; some messages lack PID-3."""
        position = count()
        per_site = self.patients_per_site
        shared = per_site // 4
        for index in range(per_site):
            for site in self.sites:
                # The first quarter of the MRNs is the same text everywhere: other people all the same.
                number = index if index < shared else (site.number + 1) * per_site + index
                patient = self._invent_patient(site, str(self._mrn_base + number))
                site.patients.append(patient)
                site.foreign_left = per_site - shared
                trigger = self.random.choice(("A01", "A04", "A04", "A28"))
                self._add_admission("admissions", next(position), site, trigger, patient, note=self._maybe_note(index))
                if self.random.random() < 0.2:
                    trigger = self.random.choice(("A08", "A31"))
                    self._add_admission("admissions", next(position), site, trigger, patient)
        for number in range(self._poison_of_a_kind()):
            self._poison_admission(self.sites[number % len(self.sites)], number)

    def take_payments(self) -> None:
        """The main phase: payments until the plan's number of events is reached."""
        merges = self._merges_per_site() + 2
        reserve = len(self.sites) * merges * 5
        kept: list[tuple[_Site, stripe.Payment, Patient]] = []
        for site in self.sites:
            for patient in site.patients[-2 * merges :: 2]:
                payment = self._pay(site, patient, "main", float(len(kept)), {"sister"})
                kept.append((site, payment, patient))
        number = len(kept)
        shown = 0
        while shown < len(_SHOWN) * len(self.sites) or len(self.drafts) + reserve < self.plan.events:
            site = self.sites[number % len(self.sites)]
            features = set(_SHOWN[shown // len(self.sites)]) if shown < len(_SHOWN) * len(self.sites) else self._draw()
            patient = self._late_patient(site) if "late" in features else self.random.choice(site.patients)
            self._pay(site, patient, "main", float(number), features)
            if self.random.random() < 0.02:
                self._add_admission("main", number + 0.5, site, "A08", self.random.choice(site.patients))
            number, shown = number + 1, shown + 1
        for index in range(self._poison_of_a_kind()):
            for kind in ("bad_json", "amount_missing", "unknown_currency", "rejected"):
                site = self.sites[(index + len(kind)) % len(self.sites)]
                self._poison_payment(site, kind, self.random.uniform(0, number))
        for site in self.sites:
            self._pay_out(site, float(number))
        self._kept = kept

    def admit_late_and_merge(self) -> None:
        """Late admissions; merges, among them a chain and one of a number never seen."""
        for site in self.sites:
            for patient in site.late_patients:
                self._add_admission("late", self.random.random(), site, "A04", patient)
            merges = self._merges_per_site() + 2
            pairs = site.patients[-2 * merges :]
            for index in range(merges - 2):
                self._merge(site, self.random.random(), pairs[2 * index + 1], pairs[2 * index].mrn)
            # A chain: the survivor of the first merge is retired by the second.
            first, second, third = pairs[-4], pairs[-3], pairs[-1]
            self._merge(site, 1.0, second, first.mrn)
            self._merge(site, 1.1, third, second.mrn)
            self._merge(site, self.random.random(), pairs[-2], str(next(self._fresh_mrns)))

    def pay_after_the_merge(self) -> None:
        """Payments under retired numbers, and refunds of what retired numbers paid before."""
        position = count()
        for site in self.sites:
            for (facility, retired), _ in list(self.survivors.items()):
                if facility != site.plan.id:
                    continue
                person = next((p for p in site.patients if p.mrn == retired), None)
                patient = person or self._invent_patient(site, retired)
                self._pay(site, patient, "after", float(next(position)), {"sister"})
        for site, payment, patient in self._kept:
            if (site.plan.id, patient.mrn) in self.survivors:
                self._refund(site, payment, patient, "after", float(next(position)), payment.amount)
        for site in self.sites:
            patient = self.random.choice(site.patients)
            self._pay(site, patient, "after", float(next(position)), {"sister", "refund"})

    # --- people

    def _invent_patient(self, site: _Site, mrn: str) -> Patient:
        given, family = invent_name(self.random)
        number = self._make_id("", site)[-9:].upper()
        return Patient(facility=site.plan.id, mrn=mrn, given=given, family=family, account_number="H" + number)

    def _late_patient(self, site: _Site) -> Patient:
        """Somebody admitted in a later phase; every second one has an MRN text that another facility knows already."""
        number = len(site.late_patients)
        other = self.sites[(site.number + 1) % len(self.sites)]
        if number % 2 == 0 and other is not site and number // 2 < site.foreign_left:
            mrn = other.patients[-1 - number // 2].mrn
        else:
            mrn = str(next(self._fresh_mrns))
        patient = self._invent_patient(site, mrn)
        site.late_patients.append(patient)
        return patient

    def _merge(self, site: _Site, position: float, survivor: Patient, retired: str) -> None:
        facility = site.plan.id
        for key, current in self.survivors.items():
            if key[0] == facility and current == retired:
                self.survivors[key] = survivor.mrn
        self.survivors[facility, retired] = survivor.mrn
        envelope = self._address(site, "late", position)
        body = write_merge(envelope, survivor, retired)
        self.plants.add("name", f"{survivor.given} {survivor.family}", "hl7.PID-5")
        self._add(_Draft("late", position, Channel.ADMISSION, facility, "A40", envelope.control_id,
                         Fate.PATIENT_UPDATE, body))  # fmt: skip

    def _add_admission(
        self, phase: str, position: float, site: _Site, trigger: str, patient: Patient, *, note: str | None = None
    ) -> None:
        envelope = self._address(site, phase, position)
        body = write_admission(envelope, trigger, patient, note=note)
        self.plants.add("name", f"{patient.given} {patient.family}", "hl7.PID-5")
        self._add(_Draft(phase, position, Channel.ADMISSION, site.plan.id, trigger, envelope.control_id,
                         Fate.PATIENT_UPDATE, body))  # fmt: skip

    def _poison_admission(self, site: _Site, number: int) -> None:
        """An A04 without PID-3, in the middle of the feed."""
        position = self.random.uniform(0, self.patients_per_site)
        patient = self._invent_patient(site, f"none{number}")
        envelope = self._address(site, "admissions", position)
        self.plants.add("name", f"{patient.given} {patient.family}", "hl7.PID-5")
        body = write_admission(envelope, "A04", patient, with_id=False)
        self.poison["adt_without_pid3"].append(envelope.control_id)
        self._add(_Draft("admissions", position, Channel.ADMISSION, site.plan.id, "A04", envelope.control_id,
                         Fate.DEAD_LETTERED, body))  # fmt: skip

    def _address(self, site: _Site, phase: str, position: float) -> Envelope:
        plan = site.plan
        authority = plan.assigning_authority
        aliases = [alias for alias in plan.authority_aliases if "://" not in alias]
        if aliases and self.random.random() < 0.25:
            alias = self.random.choice(aliases)
            authority = f"&{alias}&ISO" if alias.replace(".", "").isdigit() else alias
        return Envelope(
            application=plan.sending_application,
            facility=plan.sending_facility,
            control_id=f"{self.run}{next(self._controls):07d}",
            time=self._tell_time(phase, position),
            authority=authority,
        )

    def _maybe_note(self, index: int) -> str | None:
        if index % 15 != 2:
            return None
        return f"Paid at the desk, card {self._plant_card('hl7.NTE-3')}, receipt given"

    # --- money

    def _draw(self) -> set[str]:
        features = {name for name, chance in _CHANCES if self.random.random() < chance}
        money_back = self.random.random()
        if money_back < 0.10:
            features.add("refund")
            features |= {name for name in ("second_refund", "refund_duplicate") if self.random.random() < 0.05}
        elif money_back < 0.11:
            features.add("refund_first")
        elif money_back < 0.117:
            features.add("dispute")
        return features

    def _pay(self, site: _Site, patient: Patient, phase: str, position: float, features: set[str]) -> stripe.Payment:
        """One payment with everything that belongs to it."""
        payment = self._invent_payment(site, patient, phase, position)
        late = "late" in features
        intent = stripe.build_payment_intent(payment, status="succeeded", api_version=site.api_version)
        capture = self._add_event(phase, position, site, "payment_intent.succeeded", intent, Fate.CANONICAL, waits=late)
        self._expect(site, payment.intent_id, patient, payment, payment.amount)
        self._surround(site, payment, phase, position, features)
        if "duplicate" in features:
            self._repeat(capture, site)
        if "twin" in features:
            twin = self._add_event(
                phase,
                position + 0.8,
                site,
                "payment_intent.succeeded",
                intent,
                Fate.SUPPRESSED,
                created=payment.created + 1,
            )
            twin.after = capture
        if features & {"refund", "refund_first"}:
            first = "refund_first" in features
            amount = payment.amount if first or self.random.random() < 0.5 else _take_part(payment, 2)
            if "second_refund" in features:
                amount = _take_part(payment, 3)
            when = position - 0.9 if first else position + self.random.uniform(2, 30)
            refund = self._refund(site, payment, patient, phase, when, amount, waits=late)
            if first:
                capture.after = refund
            if "refund_duplicate" in features:
                self._repeat(refund, site)
            if "second_refund" in features:
                self._refund(site, payment, patient, phase, when + 1, amount, waits=late, before=amount)
        if "dispute" in features:
            self._dispute(site, payment, patient, phase, position + self.random.uniform(3, 40), features)
        return payment

    def _surround(self, site: _Site, payment: stripe.Payment, phase: str, position: float, features: set[str]) -> None:
        """Events that are evidence or of no interest."""
        charge = stripe.build_charge(payment)
        if "sister" in features:
            shift = self.random.choice((-0.1, 0.1, 0.1))
            self._add_event(phase, position + shift, site, "charge.succeeded", charge, Fate.IGNORED)
        if "created" in features:
            fresh = stripe.build_payment_intent(payment, status="requires_payment_method", api_version=site.api_version)
            self._add_event(phase, position - 0.3, site, "payment_intent.created", fresh, Fate.IGNORED)
        if "charge_updated" in features:
            self._add_event(phase, position + 3, site, "charge.updated", charge, Fate.IGNORED)
        if "customer" in features:
            customer = stripe.build_customer(self._make_id("cus_", site), payment.payer, payment.created)
            self._add_event(phase, position - 0.4, site, "customer.created", customer, Fate.IGNORED)
        if features & {"sister", "charge_updated", "customer"} or site.api_version == stripe.OLD_API:
            self.plants.add("name", payment.payer, "stripe.billing_details.name")

    def _refund(
        self,
        site: _Site,
        payment: stripe.Payment,
        patient: Patient,
        phase: str,
        position: float,
        amount: int,
        *,
        waits: bool = False,
        before: int = 0,
    ) -> _Draft:
        """A refund of ``amount``; ``before`` was refunded earlier."""
        refund_id = self._make_id("re_", site)
        refund = stripe.build_refund(payment, refund_id, amount, self._tell_time(phase, position))
        draft = self._add_event(phase, position, site, "refund.created", refund, Fate.CANONICAL, waits=waits)
        if self.random.random() < 0.8:
            charge = stripe.build_charge(payment, refunded=before + amount)
            self.plants.add("name", payment.payer, "stripe.billing_details.name")
            self._add_event(phase, position + 0.05, site, "charge.refunded", charge, Fate.IGNORED)
        self._expect(site, refund_id, patient, payment, amount, back=True)
        return draft

    def _dispute(
        self, site: _Site, payment: stripe.Payment, patient: Patient, phase: str, position: float, features: set[str]
    ) -> None:
        dispute_id = self._make_id("du_", site)
        late = "late" in features
        created = self._tell_time(phase, position)
        opened = stripe.build_dispute(payment, dispute_id, created, withdrawn=False)
        taken = stripe.build_dispute(payment, dispute_id, created, withdrawn=True)
        self._add_event(phase, position, site, "charge.dispute.created", opened, Fate.CANONICAL, waits=late)
        kind = "charge.dispute.funds_withdrawn"
        withdrawn = self._add_event(phase, position + 0.5, site, kind, taken, Fate.CANONICAL, waits=late)
        self._expect(site, dispute_id, patient, payment, payment.amount, back=True)
        if "dispute_duplicate" in features:
            self._repeat(withdrawn, site)

    def _pay_out(self, site: _Site, position: float) -> None:
        currency = site.plan.currencies[0]
        amount = max(1, site.captured[currency] * 97 // 100)
        payout = stripe.build_payout(self._make_id("po_", site), amount, currency, self._tell_time("main", position))
        self._add_event("main", position, site, "payout.paid", payout, Fate.CANONICAL)

    def _poison_payment(self, site: _Site, kind: str, position: float) -> None:
        patient = self.random.choice(site.patients)
        payment = replace(self._invent_payment(site, patient, "main", position, plant=False), description="Statement")
        fate = Fate.CANONICAL if kind == "rejected" else Fate.DEAD_LETTERED
        if kind == "rejected":
            payment = replace(payment, intent_id=payment.intent_id + self.plan.reject_marker)
            self.rejected[site.plan.target_name] += 1
        intent = stripe.build_payment_intent(payment, status="succeeded", api_version=stripe.NEW_API)
        if kind == "amount_missing":
            intent["amount_received"] = None
        if kind == "unknown_currency":
            intent["currency"] = "zzz"
        draft = self._add_event("main", position, site, "payment_intent.succeeded", intent, fate)
        if kind == "bad_json":
            draft.body = draft.body[: len(draft.body) * 2 // 3]
        self.poison[kind].append(payment.intent_id if kind == "rejected" else draft.identity)

    def _invent_payment(
        self, site: _Site, patient: Patient, phase: str, position: float, *, plant: bool = True
    ) -> stripe.Payment:
        plan = site.plan
        usual = self.random.random() < 0.8 or len(plan.currencies) == 1
        currency = plan.currencies[0] if usual else self.random.choice(plan.currencies[1:])
        # 5 to 900 in major units; the gateway wants three-decimal currencies rounded to tens.
        amount = self.random.randint(500, 90_000) * (10 if DECIMALS[currency] == 3 else 1)
        site.captured[currency] += amount
        payer = f"{patient.given} {patient.family}"
        metadata = {plan.mrn_key: patient.mrn}
        if self.random.random() < 0.3:
            names = [plan.assigning_authority, *plan.authority_aliases]
            metadata[plan.authority_key] = self.random.choice(names)
        for name, chance in (("visit", 0.5), ("invoice", 0.6)):
            if self.random.random() < chance:
                metadata[name] = f"{name[0].upper()}-{self.random.randint(10_000, 99_999)}"
        if self.random.random() < 0.5:
            metadata["clinic"] = self.random.choice(("Cardiology", "Pediatrics", "Imaging", "Main Street"))
        description: str | None = self.random.choice(("Copay", "Statement balance", None))
        if plant and self.random.random() < 0.15:
            description = f"Copay for {payer}"
            self.plants.add("name", payer, "stripe.description")
        intent_id = self._make_id("pi_", site)
        if plant and int(position) % (25 if position < 100 else 250) in (3, 4):
            if int(position) % 2:
                metadata["note"] = f"by phone: {self._plant_card('stripe.metadata.note')} exp 08/31"
            else:
                description = f"Card on file {self._plant_card('stripe.description')}"
        return stripe.Payment(
            intent_id=intent_id,
            charge_id=self._make_id("ch_", site),
            amount=amount,
            currency=currency,
            created=self._tell_time(phase, position),
            payer=payer,
            description=description,
            metadata=metadata,
            postal_code=str(self.random.randint(10_000, 99_999)),
            last4=str(self.random.randint(1000, 9999)),
        )

    def _plant_card(self, place: str) -> str:
        card = invent_card(self.random)
        self.plants.add("card", card, place)
        return write_card(card, self.random.choice(("", " ", "-")))

    def _expect(
        self, site: _Site, object_id: str, patient: Patient, payment: stripe.Payment, amount: int,
        *, back: bool = False,
    ) -> None:  # fmt: skip
        """Expect a posting of ``amount``; ``back``: money that goes back."""
        plan = site.plan
        # Survivors are filled by the merges of phase `late`, which are made after `main`: main rows keep their own MRN.
        mrn = self.survivors.get((plan.id, patient.mrn), patient.mrn)
        self.rows.append(
            ExpectedRow(
                target=plan.target_name,
                facility=plan.id,
                object_id=object_id,
                mrn=mrn,
                authority=plan.assigning_authority,
                type=plan.refund_type if back else plan.payment_type,
                minor=amount * plan.refund_sign if back else amount,
                currency=payment.currency,
            )
        )

    # --- items

    def _add_event(
        self,
        phase: str,
        position: float,
        site: _Site,
        kind: str,
        subject: dict[str, Any],
        fate: Fate,
        *,
        waits: bool = False,
        created: int | None = None,
    ) -> _Draft:
        event_id = self._make_id("evt_", site)
        when = self._tell_time(phase, position) if created is None else created
        event = stripe.build_event(
            event_id, kind, when, subject, api_version=site.api_version, pending_webhooks=self.random.randint(1, 2)
        )
        body = stripe.write_event(event)
        draft = _Draft(phase, position, Channel.WEBHOOK, site.plan.id, kind, event_id, fate, body, waits=waits)
        return self._add(draft)

    def _repeat(self, first: _Draft, site: _Site) -> None:
        """The same event again, as a gateway resends it: only the number of pending deliveries differs."""
        pending = b'"pending_webhooks": '
        head, _, tail = first.body.partition(pending)
        body = head + pending + b"3" + tail[1:]
        position = first.position + self.random.uniform(0.2, 30)
        self._add(_Draft(first.phase, position, Channel.WEBHOOK, site.plan.id, first.kind, first.identity,
                         Fate.SUPPRESSED, body, after=first))  # fmt: skip

    def _add(self, draft: _Draft) -> _Draft:
        draft.made = len(self.drafts)
        self.drafts.append(draft)
        return draft

    def _make_id(self, prefix: str, site: _Site) -> str:
        start = "".join(self.random.choices(_LETTERS, k=8))
        end = "".join(self.random.choices(_LETTERS, k=7))
        return f"{prefix}3{start}{site.run}{end}"

    def _tell_time(self, phase: str, position: float) -> int:
        # An hour per phase, however many events: a later phase is never earlier.
        scale = min(1.0, 3500 / self.plan.events)
        return self.plan.start + PHASES.index(phase) * 3600 + max(0, int(position * scale))

    def _poison_of_a_kind(self) -> int:
        return max(1, self.plan.events // 4000)

    def _merges_per_site(self) -> int:
        return max(1, min(self.patients_per_site // 10, self.plan.events // 2000))


def build(plan: TrafficPlan) -> Traffic:
    """Make every item and the expected result. Equal plans give equal traffic, byte for byte."""
    author = _Author(plan)
    author.admit_patients()
    author.take_payments()
    author.admit_late_and_merge()
    author.pay_after_the_merge()
    phases = _number_items(author.drafts)
    return Traffic(plan, phases, _conclude(author))


def _name_run(seed: int) -> str:
    """Eight letters that every id of this seed's run holds."""
    digest = int.from_bytes(hashlib.sha256(f"run {seed}".encode()).digest()[:8], "big")
    letters = []
    for _ in range(8):
        digest, index = divmod(digest, len(_LETTERS))
        letters.append(_LETTERS[index])
    return "".join(letters)


def _take_part(payment: stripe.Payment, part: int) -> int:
    """A part of the amount, in tens as three-decimal currencies want it."""
    return max(10, payment.amount // part // 10 * 10)


def _number_items(drafts: Iterable[_Draft]) -> tuple[Phase, ...]:
    by_phase: dict[str, list[_Draft]] = {name: [] for name in PHASES}
    for draft in drafts:
        by_phase[draft.phase].append(draft)
    numbers: dict[_Draft, int] = {}
    phases = []
    numbering = count()
    for name, members in by_phase.items():
        members.sort(key=lambda draft: (draft.position, draft.made))
        items = []
        for draft in members:
            numbers[draft] = next(numbering)
            after = None if draft.after is None else numbers[draft.after]
            items.append(
                Item(
                    numbers[draft],
                    draft.channel,
                    draft.facility,
                    draft.kind,
                    draft.identity,
                    draft.fate,
                    after,
                    draft.body,
                )
            )
        phases.append(Phase(name, tuple(items)))
    return tuple(phases)


def _conclude(author: _Author) -> Expected:
    fates = Counter(draft.fate for draft in author.drafts)
    posted = Counter(row.target for row in author.rows)
    canonical = fates[Fate.CANONICAL]
    targets = {}
    for site in author.sites:
        target = site.plan.target_name
        rejected = author.rejected[target]
        targets[target] = TargetCounts(posted[target], canonical - posted[target] - rejected, rejected)
    waiting = sum(draft.waits for draft in author.drafts)
    dead_letters = {kind: len(names) for kind, names in sorted(author.poison.items()) if kind != "rejected"}
    return Expected(
        seed=author.plan.seed,
        run=author.run,
        rows=tuple(author.rows),
        counts={
            "accepted": len(author.drafts),
            **{fate.value: fates[fate] for fate in Fate},
            "waiting": 0,
            "in_review": 0,
        },
        dead_letters=dead_letters,
        poison={kind: tuple(names) for kind, names in sorted(author.poison.items())},
        targets=targets,
        waiting_after={name: waiting if name == "main" else 0 for name in PHASES},
        plants=author.plants.list_plants(),
    )

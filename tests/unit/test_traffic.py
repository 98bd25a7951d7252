"""The traffic generator: its promises about its own traffic, and that a small honest pipeline meets the expectation.

The pipeline below is written for these tests alone, from the raw bytes; it shares no code with the generator.
"""

import asyncio
import hashlib
import hmac
import json
import re
import time
from collections import Counter, defaultdict
from dataclasses import replace

import pytest

from sandbox.billing import BillingSystem, Instance
from sandbox.expected import (
    Plant,
    compare_counts,
    compare_ledger,
    compare_targets,
    find_plants,
    read_expected,
    select_run,
)
from sandbox.traffic import FacilityPlan, TrafficPlan, build, drive

CURRENCIES = {"north": ("USD",), "harbor": ("USD", "JPY"), "valley": ("USD", "KWD")}
OID = {"north": "2.16.840.1.113883.3.9999.1", "harbor": "2.16.840.1.113883.3.9999.2", "valley": "1.2.3"}


def plan(events=200, seed=7, **changes):
    facilities = tuple(
        FacilityPlan(
            id=name,
            account=f"{name}-card",
            webhook_secret=f"whsec_{name}",
            sending_application="EPICADT",
            sending_facility=f"LS{name.upper()}",
            assigning_authority=name.upper(),
            authority_aliases=(f"LS{name.upper()}", OID[name]),
            currencies=currencies,
        )
        for name, currencies in CURRENCIES.items()
    )
    options = {
        "facilities": facilities,
        "events": events,
        "seed": seed,
        "webhook_url": "http://127.0.0.1:1/webhooks/stripe/{account}",
        "mllp_host": "127.0.0.1",
        "mllp_port": 1,
    }
    return TrafficPlan(**(options | changes))


def list_items(traffic):
    return [item for phase in traffic.phases for item in phase.items]


def list_bodies(traffic):
    return [(item.identity, item.body) for item in list_items(traffic)]


# --- an honest pipeline, from raw bytes to DFT messages


AUTHORITATIVE = {
    "payment_intent.succeeded": "capture",
    "refund.created": "refund",
    "charge.dispute.created": "dispute_opened",
    "charge.dispute.funds_withdrawn": "chargeback",
    "payout.paid": "payout",
}
EXPONENTS = {"USD": 2, "JPY": 0, "KWD": 3}


class Pipeline:
    """Does what the system under test must do, in the plainest way, in memory."""

    def __init__(self):
        self.counts = Counter()
        self.seen = set()
        self.known = set()
        self.merged = {}
        self.roots = {}
        self.waiting = []
        self.outbox = []
        self.outcomes = defaultdict(Counter)

    def find_authority(self, facility, text):
        assert text in ("", facility.upper(), f"LS{facility.upper()}", OID[facility])
        return facility.upper()

    def take_admission(self, raw):
        self.counts["accepted"] += 1
        segments = {line.split("|")[0]: line.split("|") for line in raw.decode().strip("\r").split("\r")}
        facility = segments["MSH"][3].removeprefix("LS").lower()
        if not segments["PID"][3]:
            self.counts["dead_lettered"] += 1
            return
        self.counts["patient_update"] += 1
        patient = self.read_identifier(facility, segments["PID"][3])
        self.known.add(patient)
        if "MRG" in segments:
            retired = self.read_identifier(facility, segments["MRG"][1])
            self.known.add(retired)
            self.merged[retired] = patient
        self.release()

    def read_identifier(self, facility, field):
        components = field.split("~")[0].split("^")
        assert components[4] == "MR"
        authority = components[3].split("&")
        return self.find_authority(facility, authority[0] or authority[1]), components[0]

    def take_webhook(self, facility, body):
        self.counts["accepted"] += 1
        try:
            event = json.loads(body)
        except ValueError:
            self.counts["dead_lettered"] += 1
            return
        kind = AUTHORITATIVE.get(event["type"])
        if kind is None:
            self.counts["ignored"] += 1
            return
        subject = event["data"]["object"]
        minor = subject["amount_received"] if kind == "capture" else subject["amount"]
        if minor is None or subject["currency"].upper() not in EXPONENTS:
            self.counts["dead_lettered"] += 1
            return
        key = (kind, subject["id"])
        if key in self.seen:
            self.counts["suppressed"] += 1
            return
        self.seen.add(key)
        self.waiting.append((facility, kind, subject, minor))
        self.release()

    def release(self):
        progress = True
        while progress:
            progress = False
            for entry in list(self.waiting):
                if self.publish(*entry):
                    self.waiting.remove(entry)
                    progress = True

    def publish(self, facility, kind, subject, minor):
        patient = None
        if kind == "capture":
            metadata = subject["metadata"]
            authority = self.find_authority(facility, metadata.get("assigning_authority", ""))
            patient = authority, metadata["mrn"]
            if patient not in self.known:
                return False
            self.roots[subject["id"]] = patient
        elif kind != "payout":
            patient = self.roots.get(subject["payment_intent"])
            if patient is None:
                return False
        self.counts["canonical"] += 1
        sign = 1 if kind == "capture" else -1
        for target in CURRENCIES:
            if target == facility and kind in ("capture", "refund", "chargeback"):
                self.outbox.append(
                    (f"epic-{facility}", subject["id"], patient, sign * minor, subject["currency"].upper())
                )
            else:
                self.outcomes[f"epic-{target}"]["not_routed"] += 1
        return True

    async def settle(self, ports):
        """Post what is ready, under the patient's number of now."""
        for number, (target, object_id, named, minor, currency) in enumerate(self.outbox):
            patient = named
            while patient in self.merged:
                patient = self.merged[patient]
            exponent = EXPONENTS[currency]
            digits = f"{abs(minor):0{exponent + 1}d}"
            amount = digits if not exponent else f"{digits[:-exponent]}.{digits[-exponent:]}"
            control_id = hashlib.sha256(object_id.encode()).hexdigest()[:20]
            message = (
                f"MSH|^~\\&|R|L|E|X|20260101||DFT^P03|{control_id}|P|2.5.1\rPID|||{patient[1]}^^^{patient[0]}^MR\r"
                f"FT1|1|{number}||20260101||PY|PAY|{object_id}||1|{'-' if minor < 0 else ''}{amount}&{currency}\r"
            )
            reader, writer = await asyncio.open_connection("127.0.0.1", ports[target])
            writer.write(b"\x0b" + message.encode() + b"\x1c\r")
            answer = await asyncio.wait_for(reader.readuntil(b"\x1c\r"), 5)
            writer.close()
            code = re.search(rb"MSA\|(\w\w)\|", answer)[1]
            self.outcomes[target]["posted" if code == b"AA" else "rejected"] += 1
        self.outbox.clear()


class Edge:
    """Receiver and MLLP listener in front of something that takes webhooks and admissions; may misbehave."""

    def __init__(self, take_webhook, take_admission):
        self.take_webhook = take_webhook
        self.take_admission = take_admission
        self.webhook_trouble = None
        self.admission_trouble = None
        self.signatures = defaultdict(list)
        self.received = []

    async def __aenter__(self):
        self.http = await asyncio.start_server(self.serve_http, "127.0.0.1", 0)
        self.mllp = await asyncio.start_server(self.serve_mllp, "127.0.0.1", 0)
        port = self.http.sockets[0].getsockname()[1]
        self.places = {
            "webhook_url": f"http://127.0.0.1:{port}/webhooks/stripe/{{account}}",
            "mllp_port": self.mllp.sockets[0].getsockname()[1],
        }
        return self

    async def __aexit__(self, *_error):
        self.http.close()
        self.mllp.close()

    async def serve_http(self, reader, writer):
        try:
            while True:
                head = (await reader.readuntil(b"\r\n\r\n")).decode()
                length = int(re.search(r"content-length: (\d+)", head, re.IGNORECASE)[1])
                body = await reader.readexactly(length)
                status = self.answer_webhook(head, body)
                if status is None:
                    break
                writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: 0\r\n\r\n".encode())
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()

    def answer_webhook(self, head, body):
        facility = re.match(r"POST /webhooks/stripe/(\w+)-card HTTP", head)[1]
        stated = re.search(r"stripe-signature: t=(\d+),v1=([0-9a-f]{64})\r", head, re.IGNORECASE)
        signed = stated[1].encode() + b"." + body
        if hmac.new(f"whsec_{facility}".encode(), signed, "sha256").hexdigest() != stated[2]:
            return 401
        self.signatures[body].append(stated[0])
        trouble = self.webhook_trouble and self.webhook_trouble(body)
        if trouble != 503:
            self.received.append(body)
            self.take_webhook(facility, body)
        return trouble or 200

    async def serve_mllp(self, reader, writer):
        try:
            while True:
                raw = (await reader.readuntil(b"\x1c\r"))[1:-2]
                head = raw.decode().split("\r")[0].split("|")
                trouble = self.admission_trouble and self.admission_trouble(raw)
                if trouble == "close":
                    break
                self.received.append(raw)
                self.take_admission(raw)
                code, echo = trouble or ("AA", head[9])
                writer.write(f"\x0bMSH|^~\\&|||||||ACK|1|P|2.5.1\rMSA|{code}|{echo}\r\x1c\r".encode())
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


async def do_nothing():
    return


@pytest.fixture
async def billing(tmp_path):
    system = BillingSystem(tmp_path / "ledger.db", [Instance(f"epic-{name}") for name in CURRENCIES], control_port=None)
    await system.start()
    yield system
    await system.stop()


@pytest.mark.parametrize(("events", "seed"), [(200, 1), (200, 2), (900, 3)])
async def test_an_honest_pipeline_gives_exactly_the_expected_result(billing, events, seed):
    pipeline = Pipeline()
    waited = []

    async def settled():
        await pipeline.settle(billing.ports)
        waited.append(len(pipeline.waiting))

    async with Edge(pipeline.take_webhook, pipeline.take_admission) as edge:
        traffic = build(plan(events, seed, **edge.places))
        summary = await drive(traffic, settled)
        await settled()
    expected = traffic.expected
    assert compare_ledger(expected, billing.read_ledger()) == []
    assert compare_counts(expected, pipeline.counts) == []
    assert compare_targets(expected, pipeline.outcomes) == []
    assert waited == list(expected.waiting_after.values())
    assert (summary.retries, summary.given_up) == (0, ())
    assert summary.webhooks + summary.admissions == expected.counts["accepted"] == pipeline.counts["accepted"]
    assert sum(expected.dead_letters.values()) == pipeline.counts["dead_lettered"]


async def test_trouble_at_the_edge_costs_repetitions_and_nothing_else(billing):
    """503 before storing, 500 after it, cut connections, wrong acknowledgements: all is sent until accepted."""
    pipeline = Pipeline()
    troubled = Counter()

    def trouble_webhook(body):
        number = int(hashlib.sha256(body).hexdigest()[:6], 16)
        troubled[body] += 1
        return {0: 503, 1: 500}.get(number % 6) if troubled[body] <= 2 else None

    def trouble_admission(raw):
        number = int(hashlib.sha256(raw).hexdigest()[:6], 16)
        troubled[raw] += 1
        return {0: "close", 1: ("AA", "OTHER")}.get(number % 6) if troubled[raw] <= 1 else None

    async with Edge(pipeline.take_webhook, pipeline.take_admission) as edge:
        edge.webhook_trouble, edge.admission_trouble = trouble_webhook, trouble_admission
        traffic = build(plan(**edge.places))
        ticks = iter(range(1_000_000, 2_000_000))
        summary = await drive(traffic, lambda: pipeline.settle(billing.ports), clock=lambda: next(ticks))
        await pipeline.settle(billing.ports)
    assert compare_ledger(traffic.expected, billing.read_ledger()) == []
    assert summary.given_up == ()
    assert summary.retries >= summary.resent > 0
    assert summary.answers["503"] > 0
    assert summary.answers["500"] > 0
    assert summary.answers["ANSWER_CUT"] > 0
    assert summary.answers["ACK_WRONG"] > 0
    assert compare_counts(traffic.expected, pipeline.counts, resent=summary.resent) == []
    assert compare_counts(traffic.expected, pipeline.counts) != []
    again = [stamps for stamps in edge.signatures.values() if len(stamps) > 1]
    assert again
    assert all(len(set(stamps)) == len(stamps) for stamps in again)


async def test_messages_of_a_feed_keep_their_order_and_repetitions_follow_their_first():
    async with Edge(lambda _facility, _body: None, lambda _raw: None) as edge:
        traffic = build(plan(400, **edge.places))
        await drive(traffic, do_nothing)
    places = {body: number for number, body in reversed(list(enumerate(edge.received)))}
    items = {item.number: item for item in list_items(traffic)}
    for facility in CURRENCIES:
        feed = [item.body for item in items.values() if item.channel == "admission" and item.facility == facility]
        assert [raw for raw in edge.received if raw in set(feed)] == feed
    repetitions = [item for item in items.values() if item.after is not None]
    assert repetitions
    assert all(places[items[item.after].body] < places[item.body] for item in repetitions)


async def test_phases_are_separated_by_the_callback():
    async with Edge(lambda _facility, _body: None, lambda _raw: None) as edge:
        traffic = build(plan(**edge.places))
        sizes = []

        async def settled():
            sizes.append(len(edge.received))

        reports = []
        await drive(traffic, settled, reports.append)
    ends = [sum(len(phase.items) for phase in traffic.phases[: number + 1]) for number in range(4)]
    assert sizes == ends[:3]
    assert len(edge.received) == ends[3]
    assert [report.sent for report in reports][-1] == reports[-1].total == ends[3]
    assert {report.phase for report in reports} == {"admissions", "main", "late", "after"}


async def test_a_refusal_is_final_and_a_dead_receiver_ends_the_patience():
    async with Edge(lambda _facility, _body: None, lambda _raw: None) as edge:
        edge.webhook_trouble = lambda _body: 404
        edge.admission_trouble = lambda raw: ("AR", raw.decode().split("|")[9])
        summary = await drive(build(plan(**edge.places)), do_nothing)
    assert summary.webhooks == summary.admissions == summary.retries == 0
    assert set(summary.answers) == {"404", "AR"}
    assert len(summary.given_up) == sum(summary.answers.values())
    nobody = plan(webhook_url="http://127.0.0.1:1/{account}", mllp_port=1)
    summary = await drive(nobody, do_nothing, patience=0.0)
    assert set(summary.answers) == {"CONNECT_FAILED"}
    assert summary.resent == 0
    assert len(summary.given_up) == len(list_items(build(nobody)))


async def test_the_expected_result_is_on_disk_before_the_first_send(tmp_path):
    path = tmp_path / "out" / "expected.json"
    seen = []
    async with Edge(lambda _f, _b: seen.append(path.exists()), lambda _r: seen.append(path.exists())) as edge:
        traffic = build(plan(**edge.places))
        await drive(traffic, do_nothing, expected_path=path)
    assert seen[0]
    assert read_expected(path) == traffic.expected


# --- what the traffic itself promises


def test_equal_plans_give_equal_bytes_and_other_seeds_other_ids():
    first, second, other = build(plan(500)), build(plan(500)), build(plan(500, seed=8))
    assert list_bodies(first) == list_bodies(second)
    assert first.expected == second.expected
    assert not {row.object_id for row in first.expected.rows} & {row.object_id for row in other.expected.rows}
    assert not {row.mrn for row in first.expected.rows} & {row.mrn for row in other.expected.rows}


def read_events(traffic):
    return [
        (item, json.loads(item.body))
        for item in list_items(traffic)
        if item.channel == "webhook" and item.identity not in traffic.expected.poison["bad_json"]
    ]


@pytest.mark.parametrize("events", [200, 3000])
def test_the_mixture_holds_one_of_everything(events):
    traffic = build(plan(events))
    expected = traffic.expected
    assert set(expected.poison) == {"bad_json", "amount_missing", "unknown_currency", "adt_without_pid3", "rejected"}
    assert all(expected.poison.values())
    assert sum(expected.counts[name] for name in expected.counts if name != "accepted") == expected.counts["accepted"]
    assert expected.waiting_after["main"] > 0
    kinds = Counter(item.kind for item in list_items(traffic))
    for kind in (
        "payment_intent.succeeded", "payment_intent.created", "charge.succeeded", "charge.updated", "charge.refunded",
        "customer.created", "refund.created", "charge.dispute.created", "charge.dispute.funds_withdrawn", "payout.paid",
        "A01", "A04", "A08", "A28", "A40",
    ):  # fmt: skip
        assert kinds[kind] > 0, kind
    assert {row.currency for row in expected.rows} == {"USD", "JPY", "KWD"}
    assert {row.target for row in expected.rows} == {"epic-north", "epic-harbor", "epic-valley"}
    # Refunds that arrive before the capture they belong to.
    events_read = read_events(traffic)
    captured_at = {
        event["data"]["object"]["id"]: item.number
        for item, event in reversed(events_read)
        if event["type"] == "payment_intent.succeeded"
    }
    early = sum(
        item.number < captured_at[event["data"]["object"]["payment_intent"]]
        for item, event in events_read
        if event["type"] == "refund.created"
    )
    assert early > 0


def test_duplicates_differ_only_where_a_resend_differs():
    repeats = []
    events = read_events(build(plan(3000)))
    by_number = {item.number: event for item, event in events}
    twins = 0
    for item, event in events:
        if item.fate != "suppressed":
            continue
        first = by_number[item.after]
        assert event["data"] == first["data"]
        assert event["type"] == first["type"]
        if event["id"] == first["id"]:
            assert event["pending_webhooks"] != first["pending_webhooks"]
            repeats.append(event | {"pending_webhooks": 0} == first | {"pending_webhooks": 0})
        else:
            twins += 1
    assert repeats
    assert all(repeats)
    assert twins > 0


def test_the_same_mrn_text_names_patients_of_several_facilities():
    expected = build(plan(3000)).expected
    facilities = defaultdict(set)
    for row in expected.rows:
        facilities[row.mrn].add(row.facility)
        assert row.authority == row.facility.upper()
    assert any(len(names) > 1 for names in facilities.values())


def test_payments_under_a_retired_number_are_expected_at_the_survivor():
    traffic = build(plan(2000))
    named = {}
    for _, event in read_events(traffic):
        if event["type"] == "payment_intent.succeeded":
            named[event["data"]["object"]["id"]] = event["data"]["object"]["metadata"]["mrn"]
    moved = [row for row in traffic.expected.rows if named.get(row.object_id, row.mrn) != row.mrn]
    assert len(moved) >= 3 * len(CURRENCIES)
    # A chain ends at its last survivor: no expected number of the last phase is itself retired.
    retired = set()
    for item in list_items(traffic):
        if item.kind == "A40":
            mrg = next(line for line in item.body.decode().split("\r") if line.startswith("MRG"))
            retired.add((item.facility, mrg.split("|")[1].split("^")[0]))
    assert retired
    assert not {(row.facility, row.mrn) for row in moved} & retired


def test_only_payment_intents_name_the_patient():
    for _, event in read_events(build(plan(1000))):
        subject = event["data"]["object"]
        assert bool(subject["metadata"]) == (subject["object"] == "payment_intent")


def test_bodies_have_the_size_of_real_ones():
    sizes = [len(item.body) for item in list_items(build(plan(1000))) if item.channel == "webhook"]
    assert min(sizes) > 600
    assert max(sizes) < 4500


def test_control_ids_are_unique_and_short():
    ids = [item.identity for item in list_items(build(plan(3000))) if item.channel == "admission"]
    assert len(set(ids)) == len(ids)
    assert max(map(len, ids)) <= 20


def luhn(digits):
    total = 0
    for place, digit in enumerate(reversed([int(digit) for digit in digits])):
        total += digit if place % 2 == 0 else (digit * 2 if digit < 5 else digit * 2 - 9)
    return total % 10 == 0


def test_every_plant_is_in_the_traffic_and_found_there():
    traffic = build(plan(1000))
    plants = traffic.expected.plants
    cards = [plant for plant in plants if plant.kind == "card"]
    assert {place for plant in cards for place in plant.places} == {
        "stripe.metadata.note", "stripe.description", "hl7.NTE-3",
    }  # fmt: skip
    assert {place for plant in plants if plant.kind == "name" for place in plant.places} == {
        "hl7.PID-5", "stripe.description", "stripe.billing_details.name",
    }  # fmt: skip
    assert all(luhn(plant.text) and len(plant.text) in (15, 16) for plant in cards)
    bodies = b"\n".join(body for _, body in list_bodies(traffic)).decode()
    assert any(plant.text in bodies for plant in cards)
    assert any(f"{c[:4]} {c[4:8]}" in bodies for c in (plant.text for plant in cards))
    assert any(f"{c[:4]}-{c[4:8]}" in bodies for c in (plant.text for plant in cards))
    found = {finding.plant for finding in find_plants(list_bodies(traffic), plants)}
    assert found == set(plants)


def test_plants_stay_out_of_the_fields_a_mapping_needs():
    traffic = build(plan(1000))
    needed = []
    for _, event in read_events(traffic):
        subject = dict(event["data"]["object"])
        metadata = {name: value for name, value in subject.pop("metadata").items() if name != "note"}
        for name in ("description", "billing_details", "charges", "name"):
            subject.pop(name, None)
        needed.append((event["id"], json.dumps([subject, metadata]).encode()))
    for item in list_items(traffic):
        if item.channel == "admission":
            lines = [line.split("|") for line in item.body.decode().split("\r") if line]
            kept = [line[:5] if line[0] == "PID" else line[:6] for line in lines if line[0] != "NTE"]
            needed.append((item.identity, str(kept).encode()))
    assert find_plants(needed, traffic.expected.plants) == []


def test_a_plan_that_cannot_be_made_is_refused():
    for changes in ({"events": 199}, {"facilities": ()}, {"webhook_url": "http://x/"}):
        with pytest.raises(ValueError):
            plan(**changes)


def test_secrets_stay_out_of_reprs():
    assert "whsec_" not in repr(plan())


def test_one_facility_is_enough():
    alone = build(replace(plan(), facilities=plan().facilities[:1]))
    assert set(alone.expected.targets) == {"epic-north"}
    assert alone.expected.targets["epic-north"].rejected == 1


# --- comparisons: they must be able to fail


@pytest.fixture(scope="module")
def expected():
    return build(plan()).expected


def rows_of(expected):
    return [
        {
            "instance": row.target, "description": row.object_id, "mrn": row.mrn, "authority": row.authority,
            "type": row.type, "minor": row.minor, "currency": row.currency,
        }
        for row in expected.rows
    ]  # fmt: skip


def test_equal_ledgers_have_no_difference(expected):
    assert compare_ledger(expected, reversed(rows_of(expected))) == []


@pytest.mark.parametrize(
    ("spoil", "problems"),
    [
        (lambda rows: rows.append(dict(rows[3])), ["twice"]),
        (lambda rows: rows.pop(3), ["missing"]),
        (lambda rows: rows[3].update(minor=rows[3]["minor"] + 1), ["wrong"]),
        (lambda rows: rows[3].update(minor=-rows[3]["minor"]), ["wrong"]),
        (lambda rows: rows[3].update(mrn="1"), ["wrong"]),
        (lambda rows: rows[3].update(authority="OTHER"), ["wrong"]),
        (lambda rows: rows[3].update(currency="EUR"), ["wrong"]),
        (lambda rows: rows[3].update(type="AJ"), ["wrong"]),
        (lambda rows: rows[3].update(instance="epic-elsewhere"), ["missing", "unexpected"]),
        (lambda rows: rows[3].update(description="pi_stranger"), ["missing", "unexpected"]),
        (lambda rows: rows.clear(), None),
    ],
)
def test_every_difference_of_a_ledger_is_found(expected, spoil, problems):
    rows = rows_of(expected)
    spoil(rows)
    found = sorted(difference.problem for difference in compare_ledger(expected, rows))
    assert found == (["missing"] * len(expected.rows) if problems is None else problems)


def test_rows_of_other_runs_are_left_out(expected):
    other = rows_of(build(plan(seed=8)).expected)
    mixed = rows_of(expected) + other
    assert compare_ledger(expected, select_run(expected, mixed)) == []
    assert len(compare_ledger(expected, mixed)) == len(other)


def test_counts_are_exact_without_repetitions_and_bounded_with_them(expected):
    counts = dict(expected.counts)
    assert compare_counts(expected, counts) == []
    more = counts | {"accepted": counts["accepted"] + 2, "suppressed": counts["suppressed"] + 2}
    assert [difference.place for difference in compare_counts(expected, more)] == ["accepted", "suppressed"]
    assert compare_counts(expected, more, resent=2) == []
    assert compare_counts(expected, more, resent=1) != []
    lost = counts | {"canonical": counts["canonical"] - 1}
    assert {difference.place for difference in compare_counts(expected, lost, resent=9)} == {
        "canonical",
        "sum of fates",
    }
    twice = counts | {"canonical": counts["canonical"] + 1, "accepted": counts["accepted"] + 1}
    assert [difference.place for difference in compare_counts(expected, twice, resent=9)] == ["canonical"]
    assert compare_counts(expected, {}) != []


def test_outcomes_of_targets_are_exact(expected):
    outcomes = {
        name: {"posted": counts.posted, "not_routed": counts.not_routed, "rejected": counts.rejected}
        for name, counts in expected.targets.items()
    }
    assert compare_targets(expected, outcomes) == []
    outcomes["epic-north"]["parked"] = 1
    assert [difference.place for difference in compare_targets(expected, outcomes)] == ["epic-north parked"]
    outcomes["epic-north"] = {}
    assert len(compare_targets(expected, outcomes)) >= 2
    assert compare_targets(expected, {"epic-unknown": {"posted": 1}}) != []


def test_a_refused_resend_may_be_unknown_only_when_calls_were_cut(expected):
    name, counts = next((name, counts) for name, counts in expected.targets.items() if counts.rejected)
    outcomes = {
        target: {"posted": known.posted, "not_routed": known.not_routed, "rejected": known.rejected}
        for target, known in expected.targets.items()
    }
    outcomes[name] |= {"rejected": counts.rejected - 1, "unknown": 1}
    assert compare_targets(expected, outcomes, cut=True) == []
    assert len(compare_targets(expected, outcomes)) == 2
    outcomes[name] |= {"rejected": counts.rejected}
    assert [difference.place for difference in compare_targets(expected, outcomes, cut=True)] == [f"{name} unknown"]
    outcomes[name] |= {"rejected": counts.rejected - 1, "unknown": 0}
    assert [difference.place for difference in compare_targets(expected, outcomes, cut=True)] == [f"{name} rejected"]


CARD = Plant("card", "4242424242424242", ("stripe.description",))
AMEX = Plant("card", "378282246310005", ("hl7.NTE-3",))
NAME = Plant("name", "Zo\u00eb Quollmarrow", ("hl7.PID-5",))


@pytest.mark.parametrize(
    ("text", "plant"),
    [
        (b"x4242424242424242y", CARD),
        (b"4242 4242 4242 4242", CARD),
        (b"4242-4242-4242-4242", CARD),
        (b"4242.4242\t4242\n4242", CARD),
        ("4242\u00a04242\u00a04242\u00a04242".encode(), CARD),
        (b"\x00\x01\xff3782 822463 10005\xfe", AMEX),
        ("Zo\u00eb Quollmarrow".encode(), NAME),
        (b"PID|1||||QUOLLMARROW^Zoe", NAME),
        (b'{"family": "quoll-marrow"}', NAME),
    ],
)
def test_a_plant_is_found_however_it_is_written(text, plant):
    found = find_plants([("elsewhere", b"nothing here"), ("log", text)], [CARD, AMEX, NAME])
    assert [(finding.place, finding.plant) for finding in found] == [("log", plant)]


@pytest.mark.parametrize("text", [b"", b"4242 4242 4242 4243", b"424242******4242", b"Quoll", b"marrow", b"quollmarro"])
def test_what_is_no_plant_is_not_found(text):
    assert find_plants([("log", text)], [CARD, AMEX, NAME]) == []
    assert find_plants([("log", b"4242424242424242")], []) == []


def test_signatures_are_made_of_time_and_body():
    """The scheme as documented, computed here by hand."""
    from sandbox.traffic import sign  # noqa: PLC0415 - only this test looks at one signature

    now = int(time.time())
    key, message = b"whsec_x", str(now).encode() + b'.{"a":1}'
    padded = key.ljust(64, b"\0")
    inner = hashlib.sha256(bytes(byte ^ 0x36 for byte in padded) + message).digest()
    outer = hashlib.sha256(bytes(byte ^ 0x5C for byte in padded) + inner).hexdigest()
    assert sign(b'{"a":1}', "whsec_x", now) == f"t={now},v1={outer}"

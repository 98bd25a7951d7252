"""The desk on the real stack: dead letters redriven, edited and waived, unknown outcomes and reviews decided.

A worker and a projector run as processes, the deliverers of two simulated billing systems inside the test. What was
posted is read from the billing system's own ledger, what became of the rest from the conservation account.
"""

import asyncio
import contextlib
import dataclasses
import json
import time

import msgspec
import pytest
from confluent_kafka import Producer

from identity.resolution import Known, Unknown
from runtime.cli import main
from runtime.desk import dead_letters, reviews, unknown
from runtime.desk.dead_letters import EditRefused
from runtime.desk.letters import Choice, LetterBook, group, name_decision
from runtime.desk.office import ActRefused, NothingFound, Office, SecondPersonNeeded, find_actor
from runtime.settings import read_settings
from sandbox.billing import BillingSystem, Mode, ModeKind
from sandbox.transactions import Instance
from schemas.events import Action, Reference
from schemas.keys import HmacKey
from sinks.catalog import load
from sinks.desk import DecisionRefused, TargetBook, build_decision
from sinks.runner import Runner
from topics import audit
from topics.audit import DeskBusy
from topics.registry import Registry

pytestmark = pytest.mark.integration

SECRET = "QZX-7781"
"""In every planted MRN and body; must not be seen anywhere but where it is asked for."""
NORTH, VALLEY = "epic-north", "epic-valley"


class EverybodyKnown:
    async def resolve(self, refs):
        return [Known(ref) for ref in refs]


class NobodyKnown:
    async def resolve(self, refs):
        return [Unknown("x") for _ in refs]


class Place:
    """The deployment, what is sent into it, and the desk."""

    def __init__(self, deployment, world, billing):
        self.deployment, self.world, self.billing = deployment, world, billing
        self.settings = deployment.settings
        self.office = Office(self.settings)
        self.registry = Registry(self.settings.registry)
        self.hmac = HmacKey(self.settings.secrets.hmac_key.get_secret_value().encode())
        self.producer = Producer({"bootstrap.servers": self.settings.kafka.bootstrap, "partitioner": "murmur2_random"})
        self.told = []

    def send(self, name, kind="payment_intent.succeeded", *, account="north-card", facility="north", **members):
        """One raw record, as a receiver would have written it."""
        body = {"id": name, "amount": 700, "currency": "usd", "status": "succeeded", "metadata": {}} | members
        body |= {"amount_received": body["amount"]} if kind.startswith("payment_intent") else {}
        entity = members.get("payment_intent", name)
        value = json.dumps({"id": f"evt_{name}", "type": kind, "created": 1_767_225_600, "data": {"object": body}})
        self.producer.produce(
            "raw.stripe",
            value.encode(),
            f"{account}/{entity}".encode(),
            headers=[
                ("source", b"stripe"),
                ("account", account.encode()),
                ("facility", facility.encode()),
                ("ingest_time", str(time.time_ns() // 1_000_000).encode()),
            ],
        )
        self.producer.poll(0)

    def pay(self, name, *, refund=None, authority="north", **members):
        """A capture (and its refund) of a patient everybody knows."""
        where = {"account": f"{authority}-card", "facility": authority}
        self.send(name, metadata={"mrn": f"{SECRET}-1"}, **where, **members)
        if refund:
            self.send(refund, "refund.created", payment_intent=name, amount=100, **where)

    def admit(self, *numbers, authority="NORTH"):
        for key, value in self.deployment.build_patients(*numbers, authority=authority):
            self.producer.produce("patients", value, key)
        self.flush()

    def flush(self):
        assert self.producer.flush(30) == 0

    async def settle(self, condition, complaint="the books do not settle"):
        self.flush()
        return await asyncio.to_thread(self.deployment.await_account, condition, complaint, 120)

    async def desk(self, function, *arguments, **options):
        """What a function of the desk tells; kept for the search for payload."""
        told = await asyncio.to_thread(function, self.office, *arguments, **options)
        self.told.append(told)
        return told

    def letters(self, **choice):
        return LetterBook(self.office).choose(Choice(**choice))

    @contextlib.asynccontextmanager
    async def delivering(self, *targets, patients=None):
        runners = [
            Runner(
                self.settings.kafka, load(target.connector), target, self.settings.tenancy, registry=self.registry,
                identities=patients or EverybodyKnown(), instance="test",
            )
            for target in self.settings.targets
            if target.name in targets
        ]  # fmt: skip
        tasks = [asyncio.create_task(runner.run()) for runner in runners]
        try:
            yield runners
        finally:
            for runner in runners:
                runner.stop()
            await asyncio.wait_for(asyncio.gather(*tasks), 90)

    def posted(self, target):
        return [posting["description"] for posting in self.billing.read_ledger(instance=target)]

    async def until(self, condition, seconds=90):
        until = time.monotonic() + seconds
        while not await asyncio.to_thread(condition):
            assert time.monotonic() < until, f"not reached in time\n{self.deployment.read_logs()}"
            await asyncio.sleep(0.1)


class Overtaken(Office):
    """The desk of somebody slow: others act between what they see and what they do."""

    def __init__(self, settings, others):
        super().__init__(settings)
        self.others = others

    def open_log(self, actor, *, seen=None):
        self.others()
        return super().open_log(actor, seen=seen)


def by(name, why="TICKET-1"):
    return find_actor(name, why)


ADA = by("Ada")


@pytest.fixture(scope="module")
def shared(deploy_for_module):
    # Ports of the billing systems are known only once they listen; each test makes settings of its own from these.
    deployment = deploy_for_module(worker__partitions="2")
    yield deployment
    deployment.close()


@pytest.fixture
async def place(shared, outside, tmp_path):
    shared.provision()
    billing = BillingSystem(
        tmp_path / "billing.db", [Instance(NORTH), Instance(VALLEY, duplicate_control="none")], None
    )
    await billing.start()
    ports = {f"targets.{name}.port": str(port) for name, port in billing.ports.items()}
    shared.overrides |= ports | {"targets.epic-valley.call_deadline_seconds": "1"}
    shared.overrides["redis.key_prefix"] = f"t{time.time_ns()}"
    shared.overrides["worker.state"] = str(tmp_path / "state")
    shared.settings = read_settings(shared.path, shared.overrides.items())
    for role in ("project", "worker"):
        shared.start(role)
    place = Place(shared, outside(shared), billing)
    try:
        place.admit(f"{SECRET}-1")
        place.admit(f"{SECRET}-1", authority="VALLEY")
        yield place
        check_silence(place)
    finally:
        for role in ("project", "worker"):
            if role in shared.processes:
                shared.stop(role)
        await billing.stop()


def check_silence(place):
    """Nothing that was printed, logged or audited holds what was planted; the chain is whole."""
    assert SECRET not in json.dumps(place.told)
    for message in place.world.read_topic("audit"):
        assert SECRET.encode() not in message.value()
    for log in place.deployment.folder.glob("*.log"):
        assert SECRET not in log.read_text("utf-8", "replace")
    assert audit.verify(place.settings.kafka, place.hmac).problems == []


async def test_raw_letters_go_on_once_after_the_cause_is_mended(place):
    for number in range(20):
        place.send(f"pi_{number}", account="late-card", metadata={"mrn": f"{SECRET}-1"})
    await place.settle(lambda books: books.raw.parts["dead_lettered"] == 20)
    (counted,) = group(await asyncio.to_thread(place.letters))
    assert (counted["stage"], counted["letters"]) == ("normalise", 20)
    code = counted["code"]

    dry = await place.desk(dead_letters.redrive, Choice(code=code), None, per_second=1000)
    assert (dry["dry_run"], dry["letters"], len(dry["would"])) == (True, 20, 20)
    assert {line["to"] for line in dry["would"]} == {"raw.stripe"}
    ends = place.world.read_ends("raw.stripe")
    assert place.world.read_topic("audit") == []

    text = place.deployment.path.read_text("utf-8")
    account = text[text.index('[[accounts]]\nname = "north-card"') : text.index('[[accounts]]\nname = "harbor-card"')]
    mended = text.replace(account, account + account.replace("north-card", "late-card"))
    place.deployment.path.write_text(mended, "utf-8")
    try:
        place.deployment.stop("worker")
        place.deployment.start("worker")
        assert place.world.read_ends("raw.stripe") == ends, "a dry run changes nothing"
        pauses = []
        await place.desk(dead_letters.redrive, Choice(code=code), ADA, per_second=20, sleep=pauses.append)
        assert pauses == [0.25] * 3, "20 letters at 20 a second: turns of 5"
        books = await place.settle(lambda books: books.raw.parts["canonical"] == 20)
        assert books.raw.parts["dead_lettered"] == 20
        assert books.balanced
        originals = [m for m in place.world.read_topic("raw.stripe") if not dict(m.headers()).get("origin")]
        copies = [m for m in place.world.read_topic("raw.stripe") if dict(m.headers()).get("origin")]
        assert sorted(m.value() for m in originals) == sorted(m.value() for m in copies)
        assert [m.key() for m in originals] != []
        origins = {dict(m.headers())["origin"] for m in copies}
        assert len(origins) == 20
        assert {m.partition() for m in originals} == {m.partition() for m in copies}

        told = await place.desk(dead_letters.redrive, Choice(code=code), ADA, per_second=1000)
        assert (told["letters"], told["left"]) == (0, {"redriven": 20})
        with pytest.raises(ActRefused):
            await place.desk(dead_letters.redrive, Choice(ids=("0:0",)), ADA, per_second=1000)
        await place.desk(dead_letters.redrive, Choice(code=code), ADA, per_second=1000, again=True)
        books = await place.settle(lambda books: books.raw.parts["suppressed"] == 20)
        assert books.raw.parts["canonical"] == 20
        assert books.balanced
    finally:
        place.deployment.path.write_text(text, "utf-8")


async def test_a_thousand_letters_of_a_target_go_on_in_order(place):
    for number in range(1000):
        place.pay(f"pi_{number}", refund=f"re_{number}")
    await place.billing.set_mode(Mode(ModeKind.REJECT), instance=NORTH)
    async with place.delivering(NORTH):
        await place.settle(lambda books: books.targets[NORTH].parts["rejected"] == 1000)
        assert place.posted(NORTH) == []
        dry = await place.desk(dead_letters.redrive, Choice(stage=NORTH), None, per_second=2000)
        assert (dry["letters"], {line["then_behind_it"] for line in dry["would"]}) == (1000, {1})
        await place.billing.reset(instance=NORTH)
        await place.desk(dead_letters.redrive, Choice(stage=NORTH), ADA, per_second=4000)
        books = await place.settle(lambda books: books.targets[NORTH].parts["posted"] == 2000)
    assert books.balanced
    posted = place.posted(NORTH)
    places = {name: index for index, name in enumerate(posted)}
    assert len(posted) == len(places) == 2000, "each once"
    assert all(places[f"pi_{n}"] < places[f"re_{n}"] for n in range(1000))
    left = await place.desk(dead_letters.redrive, Choice(stage=NORTH), None, per_second=1)
    assert (left["letters"], left["left"]) == (0, {"done": 1000})


async def test_an_edit_and_a_waiver_need_a_second_person(place, tmp_path):
    place.pay("pi_1", refund="re_1")
    place.pay("pi_2", refund="re_2")
    await place.billing.set_mode(Mode(ModeKind.REJECT), instance=NORTH)
    async with place.delivering(NORTH):
        await place.settle(lambda books: books.targets[NORTH].parts["rejected"] == 2)
        first, second = await asyncio.to_thread(place.letters, stage=NORTH)
        shown = await place.desk(dead_letters.show, first.id, None)
        assert shown["at_target"] == {
            "state": "REJECTED", "attempts": 1, "behind": 1, "last_decision": "", "ruling": ""
        }  # fmt: skip
        assert "money.minor" in shown["fields"]

        revealed = await asyncio.to_thread(dead_letters.show, place.office, first.id, ADA)
        event = revealed["content"]
        assert event["patient"]["value"] == f"{SECRET}-1"
        file = tmp_path / "edited.json"

        async def propose(changes):
            file.write_text(json.dumps(event | changes), "utf-8")
            return await place.desk(dead_letters.propose_edit, first.id, file, ADA)

        for wrong in (
            {"event_id": "other"}, {"money": {"minor": "ten", "currency": "USD", "exponent": 2}}, {"more": SECRET},
            {"attributes": {"note": "4111111111111111"}},
        ):  # fmt: skip
            with pytest.raises(EditRefused) as caught:
                await propose(wrong)
            assert SECRET not in str(caught.value)
            assert "ten" not in caught.value.detail
        edit = await propose({"money": {"minor": 701, "currency": "USD", "exponent": 2}})
        assert edit["changed"] == ["money"]
        waiver = await place.desk(dead_letters.propose_waiver, [second.id], ADA)
        assert {letter.status for letter in await asyncio.to_thread(place.letters)} == {"proposed"}
        await place.billing.reset(instance=NORTH)
        for name in ("Ada", " ADA "):
            with pytest.raises(SecondPersonNeeded):
                await asyncio.to_thread(place.office.find_proposal, edit["proposal"], by(name))
        assert place.posted(NORTH) == []
        for proposal in (edit, waiver):
            found = await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], by("Grace"))
            await place.desk(dead_letters.approve, found, by("Grace"))
        with pytest.raises(ActRefused):
            await asyncio.to_thread(place.office.find_proposal, edit["proposal"], by("Grace"))
        books = await place.settle(
            lambda books: books.targets[NORTH].parts["posted"] == 3 and books.targets[NORTH].parts["waived"] == 1
        )
    assert books.balanced
    names = {first.record.key: "1", second.record.key: "2"}
    edited = "1" if b"pi_1" in first.record.key else "2"
    assert len(names) == 2
    postings = {p["description"]: p["minor"] for p in place.billing.read_ledger(instance=NORTH)}
    waived = {"1": "2", "2": "1"}[edited]
    assert set(postings) == {f"pi_{edited}", f"re_{edited}", f"re_{waived}"}
    assert abs(postings[f"pi_{edited}"]) == 701
    acts = [act.act for act in await asyncio.to_thread(place.office.read_acts)]
    assert acts == ["dlq.reveal", "dlq.edit", "dlq.waive", "approve", "approve"]


async def test_an_event_whose_patient_is_not_resolved_may_be_waived_but_not_redriven(place):
    place.pay("pi_1")
    async with place.delivering(NORTH, patients=NobodyKnown()):
        await place.settle(lambda books: books.targets[NORTH].parts["parked"] == 1)
        (parked,) = await asyncio.to_thread(place.letters)
        assert (parked.status, parked.code, parked.id) == ("parked", "MRN_UNRESOLVED", f"{NORTH}/{parked.event_id}")
        with pytest.raises(ActRefused, match="parked"):
            await place.desk(dead_letters.redrive, Choice(ids=(parked.id,)), ADA, per_second=1)
        # Approved while the event went on to its next attempt: the deliverer leaves that decision aside.
        await asyncio.to_thread(_waive_attempt, place, parked, 7)
        (left,) = await asyncio.to_thread(place.letters)
        assert left.status == "parked"
        proposal = await place.desk(dead_letters.propose_waiver, [parked.id], ADA)
        found = await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], by("Grace"))
        await place.desk(dead_letters.approve, found, by("Grace"))
        books = await place.settle(lambda books: books.targets[NORTH].parts["waived"] == 1)
    assert books.balanced
    assert place.posted(NORTH) == []


async def test_a_raw_record_is_edited_against_its_source(place, tmp_path):
    place.send("pi_1", account="north-card", amount=None, metadata={"mrn": f"{SECRET}-1"})
    await place.settle(lambda books: books.raw.parts["dead_lettered"] == 1)
    (letter,) = await asyncio.to_thread(place.letters)
    body = json.loads(letter.record.value)
    file = tmp_path / "edited.json"
    for wrong in ("no json", json.dumps([1]), letter.record.value.decode().replace(f"{SECRET}-1", "4111111111111111")):
        file.write_text(wrong, "utf-8")
        with pytest.raises(EditRefused):
            await place.desk(dead_letters.propose_edit, letter.id, file, ADA)
    body["data"]["object"] |= {"amount": 42, "amount_received": 42}
    file.write_text(json.dumps(body), "utf-8")
    proposal = await place.desk(dead_letters.propose_edit, letter.id, file, ADA)
    books = await asyncio.to_thread(place.deployment.account)
    assert (books.raw.parts["dead_lettered"], books.balanced) == (1, True), "a version is no fate of its own"
    found = await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], by("Grace"))
    await place.desk(dead_letters.approve, found, by("Grace"))
    books = await place.settle(lambda books: books.raw.parts["canonical"] == 1)
    assert (books.raw.total, books.balanced) == (2, True)
    (again,) = await asyncio.to_thread(place.letters)
    assert again.status == "edited"


async def test_an_unknown_outcome_is_decided_by_a_person(place):
    for name in ("pi_1", "pi_2"):
        place.pay(name, refund=name.replace("pi", "re"), authority="valley")
    await place.billing.set_mode(Mode(ModeKind.HANG_AFTER_POSTING, count=1, object_id="pi_1"), instance=VALLEY)
    await place.billing.set_mode(Mode(ModeKind.CLOSE_BEFORE_POSTING, count=1, object_id="pi_2"), instance=VALLEY)
    async with place.delivering(VALLEY):
        await place.settle(lambda books: books.targets[VALLEY].parts["unknown"] == 2)
        listed = {item["object"]: item for item in await place.desk(unknown.list_unknown, ())}
        assert set(listed) == {"pi_1", "pi_2"}
        event_id = listed["pi_1"]["event_id"]
        # Past the desk's own check: the deliverer refuses by itself what is about another attempt or state.
        found = TargetBook(place.settings.kafka, VALLEY).find(event_id)
        schema_id = place.office.find_schema_id(f"decisions.{VALLEY}", "decision")
        for decision in (
            build_decision(_at_attempt(found, 2), Action.POSTED, "another", schema_id),
            build_decision(found, Action.REDRIVE, "redrive", schema_id),
        ):
            place.producer.produce(
                decision.topic, decision.value, decision.key, partition=decision.partition, headers=[]
            )
        place.flush()
        await place.until(lambda: TargetBook(place.settings.kafka, VALLEY).find(event_id).entry.decision == "redrive")
        entry = TargetBook(place.settings.kafka, VALLEY).find(event_id).entry
        assert (entry.state, entry.ruling, entry.round) == ("UNKNOWN", "NOT_REJECTED", 1)

        await asyncio.sleep(6)
        told = await place.desk(unknown.decide, event_id, VALLEY, Action.POSTED, ADA, reference="T-1", wait=30)
        assert told["deliverer"] == "taken"
        other = listed["pi_2"]["event_id"]
        found = TargetBook(place.settings.kafka, VALLEY).find(other)
        with pytest.raises(DecisionRefused):
            found.check(Action.REDRIVE)
        told = await place.desk(unknown.decide, other, VALLEY, Action.NOT_POSTED, ADA, wait=30)
        assert told["deliverer"] == "taken"
        books = await place.settle(lambda books: books.targets[VALLEY].parts["posted"] == 4)
    assert books.balanced
    assert sorted(place.posted(VALLEY)) == ["pi_1", "pi_2", "re_1", "re_2"], "each once"
    assert place.posted(VALLEY).index("pi_2") < place.posted(VALLEY).index("re_2")


async def test_of_two_who_decide_about_one_write_the_later_is_told_by_whom_and_when(place, monkeypatch):
    grace = by("Grace", "TICKET-2")
    for name in ("pi_1", "pi_2"):
        place.pay(name, authority="valley")
        await place.billing.set_mode(Mode(ModeKind.HANG_AFTER_POSTING, count=1, object_id=name), instance=VALLEY)
    async with place.delivering(VALLEY):
        await place.settle(lambda books: books.targets[VALLEY].parts["unknown"] == 2)
        first, second = [item["event_id"] for item in await place.desk(unknown.list_unknown, ())]
        await asyncio.sleep(6)

        # Grace is quicker between Ada's look and her act: nothing of Ada's is written.
        quicker = Overtaken(
            place.settings, lambda: unknown.decide(place.office, first, VALLEY, Action.POSTED, grace, wait=30)
        )
        with pytest.raises(DeskBusy, match=r"unknown\.decide by Grace at 20"):
            await asyncio.to_thread(unknown.decide, quicker, first, VALLEY, Action.POSTED, ADA)
        with pytest.raises(NothingFound, match=r"Grace decided 'posted' at 20.*\(act 1\)"):
            await place.desk(unknown.decide, first, VALLEY, Action.NOT_POSTED, ADA)
        assert [m.key().decode() for m in place.world.read_topic(f"decisions.{VALLEY}")] == [first]

        # Ada's is written and used up without effect; before she looks again, Grace has ended the event.
        found = TargetBook(place.settings.kafka, VALLEY).find(second)
        schema_id = place.office.find_schema_id(f"decisions.{VALLEY}", "decision")

        def spoil():
            refused = build_decision(found, Action.REDRIVE, "refused", schema_id)
            place.producer.produce(refused.topic, refused.value, refused.key, partition=refused.partition)
            place.flush()

        looks = []

        def look(*arguments, **options):
            looks.append(1)
            if len(looks) == 2:
                until = time.monotonic() + 60
                while TargetBook(*arguments, **options).find(second).entry.round == 0:
                    assert time.monotonic() < until, "the deliverer does not take what it has to refuse"
                    time.sleep(0.1)
                told.append(unknown.decide(place.office, second, VALLEY, Action.POSTED, grace, wait=30))
            return TargetBook(*arguments, **options)

        told = []
        monkeypatch.setattr(unknown, "TargetBook", look)
        slow = Overtaken(place.settings, spoil)
        late = await asyncio.to_thread(unknown.decide, slow, second, VALLEY, Action.NOT_POSTED, ADA, wait=30)
        assert told[0]["deliverer"] == "taken"
        assert late["deliverer"] == "refused: OVERTAKEN"
        whose = late["overtaken_by"]
        assert (whose["by"], whose["decision"], whose["act"]) == ("Grace", "posted", 3)
        assert whose["time"].startswith("20")
        books = await place.settle(lambda books: books.targets[VALLEY].parts["posted"] == 2)
    assert books.balanced
    assert sorted(place.posted(VALLEY)) == ["pi_1", "pi_2"], "each once"
    acts = await asyncio.to_thread(place.office.read_acts)
    assert [(act.act, act.by) for act in acts] == [
        ("unknown.decide", "Grace"), ("unknown.decide", "Ada"), ("unknown.decide", "Grace")
    ]  # fmt: skip


async def test_reviews_end_as_people_decide(place):
    place.send("pi_1")
    place.send("re_1", "refund.created", payment_intent="pi_1", amount=100)
    place.pay("pi_2")
    place.send("pi_2", amount=999, metadata={"mrn": f"{SECRET}-1"})
    place.send("pi_3")
    await place.settle(lambda books: books.raw.parts["in_review"] == 4)
    questions = {
        (question.review.reason, question.review.root.rpartition("/")[2], question.review.event_type): question.key
        for question in await asyncio.to_thread(reviews.read_questions, place.office)
    }
    place.told.append([q.describe() for q in await asyncio.to_thread(reviews.read_questions, place.office)])
    conflict = questions["CONFLICTING_COPY", "pi_2", "capture"]
    unnamed = questions["PATIENT_NOT_NAMED", "pi_1", "capture"]
    child = questions["PATIENT_NOT_NAMED", "pi_1", "refund"]
    nobody = questions["PATIENT_NOT_NAMED", "pi_3", "capture"]
    with pytest.raises(ActRefused):
        await place.desk(reviews.decide, conflict, "retry", ADA)
    await place.desk(reviews.decide, conflict, "keep", ADA)
    # A patient whom nobody knows yet: the event waits for the admission, as any other would.
    await place.desk(reviews.decide, unnamed, "patient", ADA, patient=Reference("NORTH", "MR", f"{SECRET}-9"))
    await place.settle(lambda books: books.raw.parts["waiting"] == 1)
    place.admit(f"{SECRET}-9")
    await place.settle(lambda books: books.raw.parts["canonical"] == 2)
    await place.desk(reviews.decide, child, "retry", ADA)
    proposal = await place.desk(reviews.propose, [nobody], "dismiss", ADA)
    with pytest.raises(SecondPersonNeeded):
        await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], ADA)
    found = await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], by("Grace"))
    # Ada has looked, Grace is quicker: the money is not passed on after all.
    ends = place.world.read_ends("raw.stripe")
    slow = Overtaken(place.settings, lambda: reviews.approve(place.office, found, by("Grace")))
    with pytest.raises(DeskBusy):
        await asyncio.to_thread(reviews.decide, slow, nobody, "retry", ADA)
    assert place.world.read_ends("raw.stripe") == ends
    books = await place.settle(lambda books: books.raw.parts["canonical"] == 3 and not books.raw.parts["in_review"])
    assert books.balanced
    assert (books.raw.parts["suppressed"], books.raw.parts["ignored"]) == (3, 1)
    headers = [dict(m.headers()) for m in place.world.read_topic("raw.stripe")]
    assert not any(SECRET.encode() in value for record in headers for value in record.values())
    assert await asyncio.to_thread(reviews.read_questions, place.office) == []


async def test_a_second_copy_is_published_only_where_the_first_came_to_nothing(place):
    """Published beside one that stands, the money would be in the canonical topics twice."""
    grace = by("Grace")
    place.pay("pi_1")
    place.pay("pi_1", amount=999)
    place.send("pi_2")
    for amount in (800, 999):
        place.pay("pi_2", amount=amount)
    place.send("re_2", "refund.created", payment_intent="pi_2", amount=100)
    async with place.delivering(NORTH):
        await place.settle(
            lambda books: books.raw.parts["in_review"] == 5 and books.targets[NORTH].parts["posted"] == 1
        )
        questions = await asyncio.to_thread(reviews.read_questions, place.office)
        copies = {}
        for question in questions:
            if question.review.reason == "CONFLICTING_COPY":
                told = await place.desk(reviews.show, question.key)
                copies[told["copies"]["this"]["object"], told["copies"]["this"]["amount"]] = question.key, told
        posted, shown = copies["pi_1", "9.99 USD"]
        assert shown["copies"]["first"] | {"status": "", "source_event": ""} == {
            "state": "canonical", "kind": "capture", "status": "", "amount": "7.00 USD", "object": "pi_1",
            "source_event": "", "targets": {NORTH: "posted"},
        }  # fmt: skip
        second, third = (copies["pi_2", amount][0] for amount in ("8.00 USD", "9.99 USD"))
        assert copies["pi_2", "8.00 USD"][1]["copies"]["first"] == {"state": "in_review"}

        for key, way, state in ((posted, "accept", "canonical"), (posted, "dismiss", "canonical"),
                                (second, "accept", "in_review")):  # fmt: skip
            with pytest.raises(ActRefused, match=state):
                await place.desk(reviews.propose, [key], way, ADA)
        with pytest.raises(ActRefused, match="accept"):
            await place.desk(reviews.decide, second, "accept", ADA)

        async def release(keys, way):
            proposal = await place.desk(reviews.propose, keys, way, ADA)
            with pytest.raises(SecondPersonNeeded):
                await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], ADA)
            found = await asyncio.to_thread(place.office.find_proposal, proposal["proposal"], grace)
            return await place.desk(reviews.approve, found, grace)

        (unnamed,) = (
            q.key for q in questions if (q.review.reason, q.review.event_type) == ("PATIENT_NOT_NAMED", "capture")
        )
        await release([unnamed], "dismiss")
        with pytest.raises(ActRefused, match="nobody"):
            await place.desk(reviews.decide, second, "keep", ADA)
        # Two proposals stand; only one copy may take the place.
        rival = await place.desk(reviews.propose, [third], "accept", ADA)
        await release([second], "accept")
        found = await asyncio.to_thread(place.office.find_proposal, rival["proposal"], grace)
        with pytest.raises(ActRefused, match=r"sent_again|canonical"):
            await place.desk(reviews.approve, found, grace)
        await place.settle(lambda books: books.targets[NORTH].parts["posted"] == 2)
        for key in (posted, third):
            await place.desk(reviews.decide, key, "keep", ADA)
        (child,) = (q.key for q in await asyncio.to_thread(reviews.read_questions, place.office))
        await place.desk(reviews.decide, child, "retry", ADA)
        place.pay("pi_2", amount=800)
        books = await place.settle(
            lambda books: books.targets[NORTH].parts["posted"] == 3 and books.raw.parts["suppressed"] == 5
        )
    assert (books.balanced, books.raw.doubled, books.raw.parts["in_review"]) == (True, 0, 0)
    assert {p["description"]: p["minor"] for p in place.billing.read_ledger(instance=NORTH)} == {
        "pi_1": 700, "pi_2": 800, "re_2": -100
    }  # fmt: skip
    events = [dict(m.headers())["event_id"] for m in place.world.read_topic("payments")]
    assert len(events) == len(set(events)) == 3


async def test_the_command_line_says_the_same(place, capsys):
    place.send("pi_1", account="late-card", metadata={"mrn": f"{SECRET}-1"})
    await place.settle(lambda books: books.raw.parts["dead_lettered"] == 1)
    (letter,) = await asyncio.to_thread(place.letters)
    arguments = place.settings.list_arguments()

    def run(*command):
        with pytest.raises(SystemExit) as caught:
            main([*command, *arguments, "--json"])
        return caught.value.code, capsys.readouterr().out

    code, text = await asyncio.to_thread(run, "dlq", "list")
    assert (code, [item["id"] for item in json.loads(text)]) == (0, [letter.id])
    assert SECRET not in text
    code, text = await asyncio.to_thread(run, "dlq", "show", letter.id)
    assert (code, json.loads(text)["status"]) == (0, "open")
    assert SECRET not in text
    code, text = await asyncio.to_thread(run, "dlq", "show", letter.id, "--reveal")
    assert (code, json.loads(text)["error"]["code"]) == (1, "RS401")
    code, text = await asyncio.to_thread(run, "dlq", "show", letter.id, "--reveal", "--by", "Ada", "--why", "T")
    assert code == 0
    assert SECRET in text
    code, text = await asyncio.to_thread(run, "audit", "list")
    assert [act["act"] for act in json.loads(text)] == ["dlq.reveal"]
    assert SECRET not in text
    code, text = await asyncio.to_thread(run, "audit", "verify")
    assert (code, json.loads(text)["whole"]) == (0, True)
    code, text = await asyncio.to_thread(run, "dlq", "redrive", "--dry-run")
    assert json.loads(text)["error"]["code"] == "RS404"


def _at_attempt(found, number):
    """The same event, as if another attempt had been made."""
    return dataclasses.replace(found, entry=msgspec.structs.replace(found.entry, number=number))


def _waive_attempt(place, letter, number):
    """An approved waiver of another attempt than the one that is there now."""
    found = TargetBook(place.settings.kafka, NORTH).find(letter.event_id)
    schema_id = place.office.find_schema_id(f"decisions.{NORTH}", "decision")
    with place.office.open_log(by("Grace")) as log:
        decision_id = name_decision(log.next_number, letter.id)
        output = build_decision(_at_attempt(found, number), Action.WAIVE, decision_id, schema_id)
        log.append("approve", [letter.id], {"proposal": "0", "of": "dlq.waive"}, [output])

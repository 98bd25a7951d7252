"""Decisions of people in the ledger: which attempt they are about, when they open, what they lead to, once."""

import msgspec
import pytest

from schemas.events import Action, Decision, MoneyEvent, Outcome
from schemas.failure import Failure, FailureKind, TemporaryError
from schemas.money import Money
from sinks.attempts import BEHIND_ENTITY, Failed, Source, State, decode_entry
from sinks.contract import Answer, Request, TargetClass
from sinks.decisions import LOOK_INTERVAL, Decisions
from sinks.ledger import Ledger
from sinks.policy import Moment, Policy
from sinks.shards import Shard

DEADLINE, SESSION, CLOCK_ERROR = 10.0, 45.0, 5.0
TIMEOUT = Failed(FailureKind.AMBIGUOUS, "NO_ANSWER")
REJECTED = Answer(FailureKind.REJECTED, "MSA_AR")
ACCEPTED = Answer(None, "MSA_AA")


class Feed:
    """The topic of decisions: everything again when the partitions change."""

    def __init__(self):
        self.topic, self.followed, self.position, self.error = [], None, 0, None

    def read(self, partitions):
        if self.error is not None:
            raise self.error
        if partitions != self.followed:
            self.followed, self.position = partitions, 0
        found, self.position = self.topic[self.position :], len(self.topic)
        return found


class Intake:
    """Values are event ids; ``!id`` is not routed, ``?id`` cannot be routed, ``#`` cannot be read."""

    def __init__(self):
        self.error = None

    def decode(self, value):
        if self.error is not None:
            raise self.error
        text = value.decode()
        if text.startswith("#"):
            return None, Failure(FailureKind.INVALID, "NOT_AVRO", "value")
        names = dict.fromkeys(
            ("transaction_key", "tenant", "facility", "source", "account", "kind", "status", "object_id", "root",
             "source_event_id", "mapping_version", "origin"), text
        )  # fmt: skip
        event_id = text.lstrip("!?").partition(".")[0]
        return MoneyEvent(event_id=event_id, money=Money(1, "USD", 2), occurred_at=1, received_at=1, **names), None

    def route(self, event):
        if event.root.startswith("?"):
            return False, Failure(FailureKind.UNMAPPED, "FACILITY_UNKNOWN", "facility")
        return not event.root.startswith("!"), None


class Bench:
    def __init__(self, target_class=TargetClass.D):
        self.policy = Policy(
            target_class=target_class, call_deadline=DEADLINE, session_timeout=SESSION, window=None,
            clock_error=CLOCK_ERROR,
        )  # fmt: skip
        self.steady, self.wall = 1000.0, 1_700_000_000_000
        self.log, self.frontier, self.reports, self.topic, self.bodies = {}, 0, [], [], []
        self.feed, self.intake = Feed(), Intake()
        self.restart()

    @property
    def now(self):
        return Moment(self.steady, self.wall)

    def wait(self, seconds):
        self.steady += seconds
        self.wall += int(seconds * 1000)

    def restart(self):
        """Kill -9: only the changelog, the frontier and the topic of decisions are left."""
        self.ledger = Ledger("payments", self.policy)
        for event_id, entry in self.log.items():
            self.ledger.restore(event_id, entry)
        self.ledger.open(self.frontier, self.now)
        self.feed.followed = None
        self.decisions = Decisions(self.feed, "t")
        self.read()
        self.commit()

    def publish(self, *events):
        self.topic += events
        self.read()
        self.commit()

    def read(self):
        for offset in range(self.ledger.position, len(self.topic)):
            event_id, entity = self.topic[offset]
            source = Source(b"k", event_id.encode())
            attempt = self.ledger.admit(event_id, offset, entity, source, None, self.now)
            if attempt is not None:
                self.ledger.line_up(attempt, self.now)

    def commit(self):
        flush = self.ledger.flush()
        for event_id, value in flush.records:
            if value is None:
                self.log.pop(event_id, None)
            else:
                self.log[event_id] = decode_entry(value)
        self.reports += [
            (report.attempt.event_id, report.outcome.value, report.dead_letter) for report in flush.reports
        ]
        self.frontier = flush.frontier
        self.ledger.confirm(flush)

    def post(self, result=ACCEPTED):
        """Every call that may begin now, with one result; ids in order."""
        begun = self.ledger.take(100, self.now)
        for attempt in begun:
            frozen = attempt.source.value + b" frozen at %d" % self.wall
            self.ledger.start(attempt, attempt.request or Request(frozen, "c", "r"), self.now)
        self.commit()
        for attempt in begun:
            assert self.ledger.may_write(attempt, self.now)
            self.bodies.append(attempt.request.body)
            self.ledger.settle(attempt, result, self.now)
        self.commit()
        return [attempt.event_id for attempt in begun]

    def decide(self, event_id, action, **changes):
        entry = self.log[event_id]
        made = {
            "decision_id": f"d{len(self.feed.topic)}", "target": "t", "event_id": event_id, "topic": entry.topic,
            "offset": entry.offset, "attempt": entry.number, "round": entry.round, "action": action,
            "reference": "", "decided_at": self.wall,
        } | changes  # fmt: skip
        self.feed.topic.append(Decision(**made))
        return made["decision_id"]

    async def act(self):
        self.wait(LOOK_INTERVAL)
        await self.decisions.act([Shard("payments", 0, self.ledger)], self.intake, self.now)
        self.commit()


@pytest.fixture
def bench():
    return Bench()


@pytest.fixture
def stopped(bench):
    """One unknown event of class D, past every deadline, and two behind it."""
    bench.publish(("a", "A"), ("b", "A"), ("c", "A"))
    bench.post(TIMEOUT)
    bench.wait(DEADLINE + CLOCK_ERROR)
    assert bench.log["a"].state == "UNKNOWN"
    return bench


@pytest.fixture
def refused(bench):
    bench.publish(("a", "A"), ("b", "A"), ("c", "A"))
    bench.post(REJECTED)
    assert bench.log["a"].state == "REJECTED"
    return bench


async def test_posted_ends_the_event_and_lets_the_next_go(stopped):
    stopped.decide("a", Action.POSTED, reference="T-1")
    await stopped.act()
    assert stopped.reports[-1] == ("a", "posted", False)
    assert "a" not in stopped.log
    assert [stopped.post(), stopped.post()] == [["b"], ["c"]]
    assert stopped.log == {}


async def test_not_posted_sends_the_same_bytes_as_a_first_write(stopped):
    stopped.decide("a", Action.NOT_POSTED)
    await stopped.act()
    assert stopped.post() == ["a"]
    assert stopped.bodies[0] == stopped.bodies[1]
    assert [outcome for event_id, outcome, _ in stopped.reports if event_id == "a"] == ["unknown", "posted"]


async def test_a_rejection_of_what_was_sent_again_is_a_rejection(stopped):
    stopped.decide("a", Action.NOT_POSTED)
    await stopped.act()
    stopped.post(REJECTED)
    assert stopped.log["a"].state == "REJECTED"


@pytest.mark.parametrize("action", [Action.POSTED, Action.NOT_POSTED])
async def test_a_decision_made_before_the_deadline_is_refused_for_good(bench, action):
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    assert bench.log["a"].decidable_at == bench.wall + DEADLINE * 1000
    bench.wait(DEADLINE + CLOCK_ERROR - 0.1)
    name = bench.decide("a", action)
    bench.wait(1000)
    await bench.act()
    entry = bench.log["a"]
    assert (entry.state, entry.decision, entry.ruling, entry.round) == ("UNKNOWN", name, "TOO_EARLY", 1)
    bench.restart()
    bench.wait(1000)
    await bench.act()
    assert bench.log["a"].round == 1
    bench.decide("a", action)
    await bench.act()
    assert bench.ledger.queues.peek("a") is None or bench.ledger.queues.peek("a").state is State.RETRY_AT


async def test_after_a_takeover_a_decision_waits_until_no_write_can_land(bench):
    bench.publish(("a", "A"), ("b", "A"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.start(attempt, Request(b"x", "c", "r"), bench.now)
    bench.commit()
    bench.restart()
    assert bench.log["a"].decidable_at == bench.wall + (DEADLINE + SESSION) * 1000
    bench.wait(DEADLINE + SESSION + CLOCK_ERROR)
    bench.decide("a", Action.POSTED)
    bench.restart()
    await bench.act()
    assert bench.log["a"].state == "UNKNOWN", "the next event must not start either"
    assert bench.post() == []
    bench.wait(DEADLINE + SESSION)
    await bench.act()
    assert bench.post() == ["b"]


@pytest.mark.parametrize("changes", [{"attempt": 2}, {"round": 1}, {"offset": 7}, {"topic": "settlements"}])
async def test_a_decision_about_another_attempt_changes_nothing(stopped, changes):
    stopped.decide("a", Action.POSTED, **changes)
    await stopped.act()
    assert (stopped.log["a"].state, stopped.log["a"].round) == ("UNKNOWN", 0)


@pytest.mark.parametrize(
    ("action", "ruling"), [(Action.REDRIVE, "NOT_REJECTED"), (Action.WAIVE, "NOT_WAIVABLE"), ("x", "ACTION_UNKNOWN")]
)
async def test_what_is_unknown_is_neither_redriven_nor_waived(stopped, action, ruling):
    stopped.decide("a", action)
    await stopped.act()
    assert (stopped.log["a"].state, stopped.log["a"].ruling) == ("UNKNOWN", ruling)
    assert stopped.post() == []


async def test_what_was_refused_is_no_unknown_outcome(refused):
    refused.decide("a", Action.POSTED)
    await refused.act()
    assert (refused.log["a"].state, refused.log["a"].ruling) == ("REJECTED", "NOT_UNKNOWN")


async def test_a_redrive_builds_a_new_request_and_the_entity_follows_in_order(refused):
    refused.decide("a", Action.REDRIVE)
    await refused.act()
    assert [refused.post(), refused.post(), refused.post()] == [["a"], ["b"], ["c"]]
    assert refused.bodies[0] != refused.bodies[1]
    assert refused.log == {}


async def test_a_redrive_that_is_refused_again_is_a_new_letter_and_the_entity_waits_on(refused):
    refused.decide("a", Action.REDRIVE)
    await refused.act()
    assert refused.post(REJECTED) == ["a"]
    assert refused.post() == []
    assert [report for report in refused.reports if report[0] == "a"] == [("a", "rejected", True)] * 2
    assert {refused.log[name].code for name in "bc"} == {BEHIND_ENTITY}


async def test_a_redrive_survives_kill_9_and_is_not_taken_twice(refused):
    refused.decide("a", Action.REDRIVE)
    await refused.act()
    refused.restart()
    await refused.act()
    assert refused.log["a"].round == 1
    assert refused.post(REJECTED) == ["a"]
    refused.restart()
    await refused.act()
    assert refused.post() == [], "the old decision is about an attempt that is over"


async def test_the_same_decision_twice_is_one(refused):
    for _ in range(2):
        refused.decide("a", Action.REDRIVE)
    await refused.act()
    assert refused.log["a"].round == 1
    assert refused.post(REJECTED) == ["a"]
    await refused.act()
    assert refused.post() == []


async def test_a_waived_event_lets_the_entity_go_on(refused):
    refused.decide("a", Action.WAIVE)
    await refused.act()
    assert refused.reports[-1] == ("a", Outcome.WAIVED.value, False)
    assert [refused.post(), refused.post()] == [["b"], ["c"]]


async def test_what_is_put_off_may_be_waived_unless_it_may_have_landed(bench):
    bench.publish(("a", "A"), ("b", "A"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.park(attempt, None, "MRN_UNRESOLVED", bench.now, pause=1000)
    bench.commit()
    marked = bench.log["a"]
    bench.decide("a", Action.WAIVE)
    await bench.act()
    assert bench.post() == ["b"]

    other = Bench()
    other.publish(("a", "A"))
    other.log["a"] = msgspec.structs.replace(marked, may_have_landed=True)
    other.frontier = 1
    other.restart()
    other.decide("a", Action.WAIVE)
    await other.act()
    assert other.log["a"].ruling == "NOT_WAIVABLE"


async def test_while_a_call_is_under_way_nothing_is_decided(bench):
    bench.publish(("a", "A"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.start(attempt, Request(b"x", "c", "r"), bench.now)
    bench.commit()
    bench.decide("a", Action.WAIVE)
    await bench.act()
    assert bench.log["a"].ruling == "CALL_UNDER_WAY"


async def test_an_edited_event_takes_the_place_of_the_one_read(refused):
    refused.decide("a", Action.REDRIVE, value=b"a.edited")
    await refused.act()
    refused.restart()
    assert refused.post() == ["a"]
    assert refused.bodies[-1].startswith(b"a.edited")


@pytest.mark.parametrize("value", [b"#", b"b.edited"])
async def test_an_edit_that_is_unreadable_or_another_event_is_refused(refused, value):
    refused.decide("a", Action.REDRIVE, value=value)
    await refused.act()
    assert (refused.log["a"].state, refused.log["a"].ruling) == ("REJECTED", "EDIT_UNUSABLE")
    assert refused.log["a"].value == b"a"


async def test_an_edit_that_sends_the_event_elsewhere_ends_it_here(refused):
    refused.decide("a", Action.REDRIVE, value=b"!a")
    await refused.act()
    assert refused.reports[-1] == ("a", "not_routed", False)
    assert refused.post() == ["b"]


async def test_an_event_that_still_cannot_be_routed_is_a_letter_again(refused):
    refused.decide("a", Action.REDRIVE, value=b"?a")
    await refused.act()
    assert refused.reports[-1] == ("a", "dead_lettered", True)
    assert refused.log["a"].round == 1
    assert refused.post() == []


async def test_redriven_behind_a_stopped_event_it_waits_without_holding_the_frontier(bench):
    bench.publish(("a", "A"), ("b", "A"))
    bench.post(REJECTED)
    late = bench.ledger.queues.find("b")
    bench.ledger.reject(late, FailureKind.UNMAPPED, "X", bench.now)
    bench.commit()
    assert bench.frontier == 2
    bench.decide("b", Action.REDRIVE)
    await bench.act()
    assert (bench.log["b"].state, bench.log["b"].code, bench.frontier) == ("PARKED", BEHIND_ENTITY, 2)
    assert bench.post() == []
    bench.decide("a", Action.WAIVE)
    await bench.act()
    assert bench.post() == ["b"]


async def test_while_the_topic_or_the_registry_is_away_a_decision_is_kept(refused):
    refused.decide("a", Action.REDRIVE)
    refused.feed.error = TemporaryError("down.", place="here")
    await refused.act()
    assert refused.log["a"].round == 0
    refused.feed.error, refused.intake.error = None, TemporaryError("down.", place="there")
    await refused.act()
    assert (refused.log["a"].state, refused.log["a"].round) == ("REJECTED", 0)
    refused.intake.error = None
    await refused.act()
    assert refused.post() == ["a"]

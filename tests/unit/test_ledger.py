"""The attempt ledger, rule by rule, on a clock of its own; and a small world that judges it with rules left out.

The world (target, network, changelog) is written here and shares no code with the ledger.
"""

import itertools
import random

import msgspec
import pytest

from schemas.events import Outcome
from schemas.failure import FailureKind
from sinks.attempts import BEHIND_ENTITY, Entry, Failed, Source, State, decode_entry, encode_entry
from sinks.contract import Absent, Answer, Found, Request, TargetClass, Unclear
from sinks.ledger import RESEND_REJECTED, WINDOW_OVER, Ledger
from sinks.policy import Moment, Policy, Step

DEADLINE = 10.0
SESSION = 45.0
WINDOW = 3600.0
MARGIN = DEADLINE + SESSION + 5.0

TIMEOUT = Failed(FailureKind.AMBIGUOUS, "NO_ANSWER")
REFUSED_CONNECTION = Failed(FailureKind.UNAVAILABLE, "CONNECT_FAILED")
ACCEPTED = Answer(None, "MSA_AA")
REJECTED = Answer(FailureKind.REJECTED, "MSA_AR")
LATER = Answer(FailureKind.UNAVAILABLE, "MSA_AE_206")


def make_policy(target_class=TargetClass.A, window=WINDOW, **changes):
    return Policy(
        target_class=target_class,
        call_deadline=DEADLINE,
        session_timeout=SESSION,
        window=window,
        clock_error=5.0,
        **changes,
    )


class Bench:
    """One ledger with its changelog (compacted) and a clock."""

    def __init__(self, policy=None, ledger_type=Ledger):
        self.policy = policy or make_policy()
        self.ledger_type = ledger_type
        self.steady = 1000.0
        self.wall = 1_700_000_000_000
        self.log = {}
        self.frontier = 0
        self.reports = []
        self.topic = []
        self.ledger = ledger_type("payments", self.policy)
        self.ledger.open(0, self.now)

    @property
    def now(self):
        return Moment(self.steady, self.wall)

    def wait(self, seconds):
        self.steady += seconds
        self.wall += int(seconds * 1000)

    def publish(self, *events):
        """Events as (id, entity)."""
        self.topic.extend(events)
        self.read()

    def read(self):
        for offset in range(self.ledger.position, len(self.topic)):
            event_id, entity = self.topic[offset]
            attempt = self.ledger.admit(event_id, offset, entity, Source(b"k", event_id.encode()), None, self.now)
            if attempt is not None:
                self.ledger.line_up(attempt, self.now)

    def commit(self):
        flush = self.ledger.flush()
        for event_id, value in flush.records:
            if value is None:
                self.log.pop(event_id, None)
            else:
                self.log[event_id] = decode_entry(value)
        self.reports += [(report.attempt.event_id, report.outcome.value, report.code) for report in flush.reports]
        self.frontier = flush.frontier
        self.ledger.confirm(flush)
        return flush

    def begin(self, room=100):
        """Take and start what may begin, committed; the attempts whose calls may now be made."""
        begun = []
        for attempt in self.ledger.take(room, self.now):
            if attempt.state is State.UNKNOWN:
                if self.ledger.resume(attempt, self.now) is not Step.PERSON:
                    begun.append(attempt)
            else:
                body = f"body of {attempt.event_id} frozen at {self.wall}".encode()
                request = attempt.request or Request(body, f"C-{attempt.event_id}", f"R-{attempt.event_id}")
                self.ledger.start(attempt, request, self.now)
                begun.append(attempt)
        self.commit()
        return begun

    def write(self, attempt):
        return self.ledger.may_write(attempt, self.now)

    def settle(self, attempt, result):
        self.ledger.settle(attempt, result, self.now)
        return self.commit()

    def post(self, result=ACCEPTED):
        """Begin everything, write, and settle all alike."""
        begun = self.begin()
        for attempt in begun:
            assert self.write(attempt)
            self.settle(attempt, result)
        return [attempt.event_id for attempt in begun]

    def restart(self, policy=None):
        """Kill -9: only the changelog and the frontier are left."""
        self.policy = policy or self.policy
        self.ledger = self.ledger_type("payments", self.policy)
        for event_id, entry in self.log.items():
            self.ledger.restore(event_id, decode_entry(encode_entry(entry)))
        self.ledger.open(self.frontier, self.now)
        self.read()

    def state(self, event_id):
        return self.ledger.queues.peek(event_id).state

    def outcomes(self, event_id):
        return [outcome for known, outcome, _ in self.reports if known == event_id]


# Frontier and tombstones.


def test_a_posted_event_leaves_no_entry_and_moves_the_frontier():
    bench = Bench()
    bench.publish(("a", "A"))
    assert bench.post() == ["a"]
    assert bench.log == {}
    assert bench.frontier == 1
    assert bench.outcomes("a") == ["posted"]


def test_the_entry_is_durable_with_its_request_before_the_call():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.begin()
    entry = bench.log["a"]
    assert entry.state == "IN_FLIGHT"
    assert entry.body == f"body of a frozen at {bench.wall}".encode()
    assert (entry.control_id, entry.reference) == ("C-a", "R-a")
    assert bench.frontier == 0


def test_done_above_a_held_frontier_stays_until_the_frontier_passes_it():
    bench = Bench()
    bench.publish(("a", "A"), ("b", "B"), ("c", "C"))
    first, *others = bench.begin()
    for attempt in others:
        bench.write(attempt)
        bench.settle(attempt, ACCEPTED)
    assert bench.frontier == 0
    assert {key: entry.state for key, entry in bench.log.items()} == {"a": "IN_FLIGHT", "b": "DONE", "c": "DONE"}
    bench.write(first)
    flush = bench.settle(first, ACCEPTED)
    assert sorted(flush.records) == [("a", None), ("b", None), ("c", None)]
    assert bench.frontier == 3
    assert bench.log == {}


def test_nothing_done_above_a_held_frontier_is_posted_again_after_kill_9():
    bench = Bench(make_policy(TargetClass.D))
    bench.publish(("a", "A"), *((f"n{n}", f"N{n}") for n in range(500)))
    first, *others = bench.begin(room=1000)
    for attempt in others:
        bench.write(attempt)
        bench.ledger.settle(attempt, ACCEPTED, bench.now)
    bench.commit()
    bench.restart()
    assert bench.post() == []
    assert all(bench.outcomes(f"n{n}") == ["posted"] for n in range(500))
    assert first.event_id == "a"
    assert bench.outcomes("a") == ["unknown"]


def test_done_entries_carry_neither_request_nor_event():
    bench = Bench()
    bench.publish(("a", "A"), ("b", "B"))
    _, second = bench.begin()
    bench.write(second)
    bench.settle(second, ACCEPTED)
    assert bench.log["b"].state == "DONE"
    assert bench.log["b"].body is None
    assert bench.log["b"].value is None


@pytest.mark.parametrize("result", [REJECTED, TIMEOUT])
def test_rejected_and_unknown_stay_but_do_not_hold_the_frontier(result):
    bench = Bench(make_policy(TargetClass.D))
    bench.publish(("a", "A"))
    bench.post(result)
    assert bench.frontier == 1
    assert list(bench.log) == ["a"]
    bench.restart()
    bench.wait(1_000_000)
    assert bench.post() == []


def test_an_event_finished_below_the_frontier_is_tombstoned_in_its_outcome_transaction():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.park(attempt, None, "MRN_UNRESOLVED", bench.now, pause=1.0)
    bench.commit()
    assert bench.frontier == 1
    bench.wait(1.0)
    (attempt,) = bench.begin()
    assert bench.log["a"].state == "IN_FLIGHT"
    bench.write(attempt)
    assert bench.settle(attempt, ACCEPTED).records == [("a", None)]


def test_an_abort_changes_nothing_and_the_same_is_asked_again():
    bench = Bench()
    bench.publish(("a", "A"), ("b", "A"))
    bench.post()
    once, again = bench.ledger.flush(), bench.ledger.flush()
    assert (once.records, once.frontier, once.reports) == (again.records, again.frontier, again.reports)


def test_an_event_not_routed_waits_for_nobody_and_is_told_once_over_restarts():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.begin()
    bench.topic.append(("b", "A"))
    attempt = bench.ledger.admit("b", 1, "A", Source(b"", b""), None, bench.now)
    bench.ledger.skip(attempt)
    bench.commit()
    bench.restart()
    bench.commit()
    assert bench.outcomes("b") == ["not_routed"]


def test_records_read_again_after_a_rewind_are_dropped():
    bench = Bench()
    bench.publish(("a", "A"))
    assert bench.ledger.admit("a", 0, "A", Source(b"", b""), None, bench.now) is None
    assert bench.post() == ["a"]
    assert bench.post() == []


def test_a_second_record_of_a_known_event_is_not_posted():
    bench = Bench()
    bench.publish(("a", "A"), ("b", "B"))
    bench.begin()
    bench.publish(("a", "A"))
    assert bench.begin() == []
    assert bench.ledger.position == 3


# Order and quarantine.


def test_one_entity_strictly_in_order_and_others_beside_it():
    bench = Bench()
    bench.publish(("a1", "A"), ("a2", "A"), ("b1", "B"))
    first = bench.begin()
    assert [attempt.event_id for attempt in first] == ["a1", "b1"]
    assert bench.begin() == []
    bench.write(first[0])
    bench.settle(first[0], ACCEPTED)
    assert [attempt.event_id for attempt in bench.begin()] == ["a2"]


@pytest.mark.parametrize("result", [REJECTED, TIMEOUT])
def test_behind_a_stopped_event_its_entity_is_parked_in_order_and_others_flow(result):
    bench = Bench(make_policy(TargetClass.D))
    bench.publish(("a1", "A"), ("a2", "A"))
    bench.post(result)
    bench.publish(("a3", "A"), ("b1", "B"))
    assert bench.post() == ["b1"]
    assert bench.frontier == 4
    for event_id in ("a2", "a3"):
        assert bench.log[event_id].state == "PARKED"
        assert bench.log[event_id].code == BEHIND_ENTITY
        assert bench.log[event_id].value == event_id.encode()
        assert bench.outcomes(event_id) == ["parked"]
    bench.restart()
    bench.publish(("a4", "A"))
    bench.wait(1_000_000)
    assert bench.post() == []
    assert bench.log["a4"].state == "PARKED"


def test_a_parked_event_and_those_behind_it_go_on_in_order():
    bench = Bench()
    bench.publish(("a1", "A"), ("a2", "A"), ("a3", "A"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.park(attempt, None, "MRN_UNRESOLVED", bench.now, pause=1.0)
    bench.commit()
    assert bench.frontier == 3
    bench.restart()
    bench.wait(1.0)
    posted = []
    while done := bench.post():
        posted += done
    assert posted == ["a1", "a2", "a3"]
    assert bench.log == {}
    assert bench.outcomes("a1") == ["parked", "posted"]


def test_putting_an_event_off_again_writes_nothing():
    bench = Bench()
    bench.publish(("a", "A"))
    for _ in range(3):
        (attempt,) = bench.ledger.take(1, bench.now)
        bench.ledger.park(attempt, None, "MRN_UNRESOLVED", bench.now, pause=1.0)
        flush = bench.commit()
        bench.wait(1.0)
    assert flush.records == []
    assert bench.outcomes("a") == ["parked"]


# Unknown outcomes.


def test_class_a_resends_the_same_bytes_after_the_deadline_and_not_before():
    bench = Bench()
    bench.publish(("a", "A"), ("a2", "A"))
    (attempt,) = bench.begin()
    body = attempt.request.body
    bench.write(attempt)
    bench.wait(3.0)
    bench.settle(attempt, TIMEOUT)
    assert bench.frontier == 0
    bench.wait(DEADLINE - 3.0 - 0.1)
    assert bench.begin() == []
    bench.wait(0.2)
    (again,) = bench.begin()
    assert again.event_id == "a"
    assert again.request.body == body
    assert bench.write(again)
    bench.settle(again, ACCEPTED)
    assert bench.outcomes("a") == ["posted"]


def test_class_a_after_kill_9_waits_for_deadline_and_session_then_resends_the_stored_bytes():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    body = attempt.request.body
    bench.write(attempt)
    bench.restart()
    assert bench.state("a") is State.UNKNOWN
    bench.wait(DEADLINE + SESSION - 0.1)
    assert bench.begin() == []
    bench.wait(0.2)
    (again,) = bench.begin()
    assert again.request.body == body


def test_a_second_kill_9_waits_again():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.begin()
    bench.restart()
    bench.wait(DEADLINE + SESSION)
    (again,) = bench.begin()
    bench.write(again)
    bench.restart()
    assert bench.begin() == []
    assert bench.state("a") is State.UNKNOWN


def test_class_a_does_not_resend_when_the_clock_is_before_the_first_write():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    bench.wall -= 3_600_000  # set back: by this clock the window has an hour more
    bench.wait(DEADLINE)
    assert bench.begin() == []
    assert bench.outcomes("a") == ["unknown"]


@pytest.mark.parametrize("refused", [LATER, REFUSED_CONNECTION])
def test_a_clock_that_was_ahead_puts_nothing_off_for_days(refused):
    bench = Bench()
    bench.publish(("a", "A"))
    bench.wall += 7 * 86_400_000
    for _ in range(bench.policy.park_after):
        bench.post(refused)
        bench.wait(60)
    bench.post(refused)
    assert bench.state("a") is (State.PARKED if refused is LATER else State.RETRY_AT)
    bench.wall -= 7 * 86_400_000
    bench.restart()
    bench.wait(bench.policy.longest_pause)
    assert bench.post() == ["a"]


def test_class_a_does_not_resend_into_the_margin_of_the_window():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    bench.write(attempt)
    bench.wait(WINDOW - MARGIN)
    bench.settle(attempt, TIMEOUT)
    bench.wait(DEADLINE + 1)
    assert bench.begin() == []
    assert bench.outcomes("a") == ["unknown"]
    assert bench.log["a"].code == WINDOW_OVER


def test_the_window_is_looked_at_again_just_before_the_write():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    bench.write(attempt)
    bench.settle(attempt, TIMEOUT)
    bench.wait(DEADLINE)
    (again,) = bench.begin()
    bench.wait(WINDOW)  # it stood in line for a connection
    assert not bench.write(again)
    bench.settle(again, Failed("WITHDRAWN", "WINDOW"))
    assert bench.outcomes("a") == ["unknown"]


def test_the_window_begins_with_the_first_write_not_with_a_failed_connection():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    bench.settle(attempt, REFUSED_CONNECTION)
    bench.wait(WINDOW * 2)
    (attempt,) = bench.begin()
    bench.write(attempt)
    bench.settle(attempt, TIMEOUT)
    bench.wait(DEADLINE)
    assert [a.event_id for a in bench.begin()] == ["a"]


def test_the_window_does_not_begin_anew_with_a_resend():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    start = bench.steady
    bench.write(attempt)
    bench.settle(attempt, TIMEOUT)
    while bench.steady - start < WINDOW * 2:
        bench.wait(DEADLINE)
        for again in bench.begin():
            assert bench.write(again)
            assert bench.steady - start <= WINDOW - MARGIN
            bench.settle(again, TIMEOUT)
    assert bench.outcomes("a")[-1] == "unknown"
    assert bench.log["a"].code == WINDOW_OVER


@pytest.mark.parametrize("policy", [make_policy(TargetClass.D), make_policy(TargetClass.C), make_policy(window=None)])
def test_without_a_safe_resend_the_event_stops_for_a_person(policy):
    bench = Bench(policy)
    bench.publish(("a", "A"), ("a2", "A"))
    bench.post(TIMEOUT)
    bench.wait(1_000_000)
    assert bench.post() == []
    bench.restart()
    bench.wait(1_000_000)
    assert bench.post() == []
    assert bench.outcomes("a") == ["unknown"]
    assert bench.log["a"].may_have_landed
    assert bench.log["a"].body is not None


def test_class_d_in_flight_at_kill_9_is_unknown_and_told_once():
    bench = Bench(make_policy(TargetClass.D))
    bench.publish(("a", "A"))
    bench.begin()
    bench.restart()
    bench.commit()
    bench.restart()
    bench.commit()
    assert bench.outcomes("a") == ["unknown"]
    assert bench.frontier == 1


def test_class_b_resends_without_a_window():
    bench = Bench(make_policy(TargetClass.B, window=None))
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    bench.wait(DEADLINE)
    assert bench.post() == ["a"]


def test_a_rejected_resend_is_unknown_not_rejected():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    bench.wait(DEADLINE)
    bench.post(REJECTED)
    assert bench.outcomes("a") == ["unknown"]
    assert bench.log["a"].code == RESEND_REJECTED
    assert not [report for report in bench.reports if report[1] == "rejected"]


def test_a_resend_that_cannot_be_sent_stays_unknown():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    bench.wait(DEADLINE)
    (again,) = bench.begin()
    bench.settle(again, REFUSED_CONNECTION)
    assert bench.state("a") is State.UNKNOWN
    bench.wait(60)
    assert bench.post() == ["a"]
    assert bench.outcomes("a") == ["posted"]


def test_an_event_that_makes_the_target_hang_is_parked_with_its_mark_and_goes_on_as_unknown():
    bench = Bench(make_policy(window=1_000_000.0))
    bench.publish(("a", "A"), ("b", "B"))
    while "parked" not in bench.outcomes("a"):
        for attempt in bench.begin():
            assert bench.write(attempt)
            bench.settle(attempt, TIMEOUT if attempt.event_id == "a" else ACCEPTED)
        bench.wait(70)
    assert bench.frontier == 2
    assert bench.log["a"].may_have_landed
    bench.restart()
    bench.wait(DEADLINE + SESSION + 70)
    (again,) = bench.begin()
    assert again.number > 1
    assert bench.write(again)
    bench.settle(again, REJECTED)
    assert bench.outcomes("a")[-1] == "unknown"


# Definite failures.


def test_a_target_out_of_reach_is_retried_for_ever_and_nothing_is_in_doubt_after_kill_9():
    bench = Bench(make_policy(TargetClass.D))
    bench.publish(("a", "A"))
    for _ in range(50):
        (attempt,) = bench.begin()
        bench.settle(attempt, REFUSED_CONNECTION)
        assert bench.log["a"].state == "RETRY_AT"
        bench.wait(30)
    bench.restart()
    assert bench.post() == ["a"]
    assert bench.outcomes("a") == ["posted"]


def test_a_withdrawn_call_is_no_attempt_in_doubt():
    bench = Bench(make_policy(TargetClass.D))
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    bench.settle(attempt, Failed("WITHDRAWN", "STOPPING"))
    bench.restart()
    assert bench.post() == ["a"]


def test_a_request_refused_for_now_pauses_longer_each_time_then_is_parked_and_still_retried():
    bench = Bench(make_policy(park_after=3))
    bench.publish(("a", "A"), ("a2", "A"), ("b", "B"))
    pauses = []
    for _ in range(3):
        begun = [attempt for attempt in bench.begin() if attempt.event_id == "a"]
        assert bench.write(begun[0])
        bench.settle(begun[0], LATER)
        start = bench.steady
        while not bench.ledger.flush() or not (due := bench.ledger.queues.peek("a").due) <= bench.steady:
            bench.wait(0.25)
        pauses.append(bench.steady - start)
        assert due <= bench.steady
    assert pauses == sorted(pauses)
    assert pauses[0] < pauses[-1]
    assert bench.state("a") is State.PARKED
    assert bench.outcomes("a") == ["parked"]
    posted = []
    while done := bench.post():
        posted += done
    assert [event_id for event_id in posted if event_id.startswith("a")] == ["a", "a2"]


def test_a_message_the_client_refuses_is_a_dead_letter_not_a_rejection():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.begin()
    bench.settle(attempt, Failed(FailureKind.INVALID, "FRAME_BYTES"))
    assert bench.outcomes("a") == [Outcome.DEAD_LETTERED]


def test_a_duplicate_under_our_own_key_is_success():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.post(Answer(FailureKind.DUPLICATE, "HTTP_409"))
    assert bench.outcomes("a") == ["posted"]


def test_the_codec_keeps_every_member_and_its_repr_no_payload():
    entry = Entry(
        "IN_FLIGHT", "payments", 7, "E", 2, 11, 12, True, "C", "R", b"secret body", 13, 3, "AMBIGUOUS", "NO_ANSWER",
        "parked", b"key", b"secret value", [("h", b"secret header")], 14,
    )  # fmt: skip
    assert decode_entry(encode_entry(entry)) == entry
    assert "secret" not in repr(entry)
    assert "secret" not in repr(Source(b"secret key", b"secret value", [("h", b"secret header")]))
    assert "secret" not in repr(Request(b"secret body", "C", "R"))


# A world that judges: random faults, then quiet; every event applied once (or in a person's hands), in order.


class World:
    """A target of class A or D over a network that may keep a request until its deadline, with a process that dies."""

    def __init__(self, seed, ledger_type, target_class):
        self.draw = random.Random(seed)
        self.bench = Bench(make_policy(target_class), ledger_type)
        self.target_class = target_class
        self.applied = []
        self.seen = {}
        self.refusing = set()
        self.late = []

    def apply(self, event_id, body):
        if self.target_class is TargetClass.A and event_id in self.seen:
            assert self.seen[event_id] == body, "the key was used with other bytes"
            return ACCEPTED
        if event_id in self.refusing:
            return REJECTED
        self.seen[event_id] = body
        self.applied.append(event_id)
        return ACCEPTED

    def call(self, attempt):
        fate = self.draw.choice(["ok"] * 6 + ["lost", "late", "unsent", "never"])
        if fate == "unsent":
            return REFUSED_CONNECTION
        if not self.bench.write(attempt):
            return Failed("WITHDRAWN", "WINDOW")
        # The network has its own copy: the ledger may put its own away.
        written = attempt.event_id, attempt.request.body
        if fate == "never":
            return TIMEOUT
        if fate == "late":
            # It lands at any time up to its deadline, whatever its writer has learnt by then.
            self.late.append((self.bench.steady + self.draw.uniform(0, DEADLINE), *written))
            return TIMEOUT
        answer = self.apply(*written)
        return TIMEOUT if fate == "lost" else answer

    def pass_time(self, seconds):
        self.bench.wait(seconds)
        for arrival in list(self.late):
            due, *written = arrival
            if due <= self.bench.steady:
                self.late.remove(arrival)
                self.apply(*written)

    def run(self):
        bench = self.bench
        for number in range(12):
            entity = self.draw.choice("XYZ")
            bench.topic.append((f"{entity}{number}", entity))
        self.refusing = {self.draw.choice(bench.topic)[0]} if self.draw.random() < 0.3 else set()
        for _ in range(150):
            bench.read()
            begun = bench.begin(room=self.draw.randint(1, 4))
            if self.draw.random() < 0.1:
                for attempt in begun[: self.draw.randint(0, len(begun))]:
                    self.call(attempt)  # written, and nobody learns the answer
                bench.restart()
                continue
            for attempt in begun:
                result = self.call(attempt)
                self.pass_time(self.draw.choice([0, 0.1, DEADLINE if result is TIMEOUT else 0.5]))
                bench.ledger.settle(attempt, result, bench.now)
            if self.draw.random() < 0.9:  # else: killed before the answers are committed
                bench.commit()
            else:
                bench.restart()
            self.pass_time(self.draw.choice([0.1, 1, 15, 40]))

    def judge(self):
        """What is wrong, or None."""
        doubled = sorted({event_id for event_id in self.applied if self.applied.count(event_id) > 1})
        if doubled:
            return f"doubled {doubled}"
        for entity in "XYZ":
            order = [int(event_id[1:]) for event_id in self.applied if event_id[0] == entity]
            if order != sorted(order):
                return f"out of order {order}"
        for event_id, _ in self.bench.topic:
            last = self.bench.outcomes(event_id)[-1:]
            if last == ["posted"] and event_id not in self.applied:
                return f"{event_id} is said to be posted and is not"
            if last == ["rejected"] and event_id in self.applied:
                return f"{event_id} is said to be rejected and is posted"
            if not last and not (event_id in self.bench.log or self.bench.frontier < len(self.bench.topic)):
                return f"{event_id} is lost"
        return None


def search(ledger_type, target_class, seeds=150):
    found = []
    for seed in range(seeds):
        world = World(seed, ledger_type, target_class)
        world.run()
        problem = world.judge()
        if problem:
            found.append((seed, problem))
    return found


@pytest.mark.parametrize("target_class", [TargetClass.A, TargetClass.D])
def test_no_fault_doubles_loses_or_reorders(target_class):
    assert search(Ledger, target_class) == []


class BlindResend(Ledger):
    """Resends whatever is unknown, at any class, without waiting."""

    def settle(self, attempt, result, moment):
        if result is TIMEOUT:
            result = Failed("WITHDRAWN", "BLIND")
            attempt.settled_at = 0.0
        super().settle(attempt, result, moment)


class CrashMeansFailed(Ledger):
    """Takes IN_FLIGHT after a crash for a call that never was."""

    def restore(self, event_id, entry):
        if entry.state == "IN_FLIGHT":
            entry = Entry(**{**{f: getattr(entry, f) for f in entry.__struct_fields__}, "state": "RETRY_AT"})
        super().restore(event_id, entry)


class TombstoneAtOnce(Ledger):
    """Tombstones DONE in its outcome transaction, wherever the frontier is."""

    def flush(self):
        flush = super().flush()
        for index, (event_id, value) in enumerate(flush.records):
            if value is not None and decode_entry(value).state == "DONE":
                flush.records[index] = (event_id, None)
        return flush


class Refreeze(Ledger):
    """Builds the request anew for a resend."""

    def resume(self, attempt, moment):
        attempt.request = Request(f"frozen again at {moment.wall}".encode(), "C", "R")
        return super().resume(attempt, moment)


class NoOrder(Ledger):
    """Starts later events of an entity beside the first."""

    def line_up(self, attempt, moment):
        attempt.entity = f"{attempt.entity}-{attempt.offset}"
        super().line_up(attempt, moment)


@pytest.mark.parametrize(
    ("ledger_type", "target_class"),
    [
        (BlindResend, TargetClass.D),
        (CrashMeansFailed, TargetClass.D),
        (TombstoneAtOnce, TargetClass.D),
        (NoOrder, TargetClass.A),
    ],
)
def test_each_rule_left_out_is_found(ledger_type, target_class):
    assert search(ledger_type, target_class, seeds=60)


def test_a_request_built_anew_is_found():
    with pytest.raises(AssertionError, match="other bytes"):
        search(Refreeze, TargetClass.A, seeds=60)


def test_a_request_over_http_is_given_back_whole_after_kill_9():
    bench = Bench()
    bench.publish(("a", "e1"))
    (attempt,) = bench.ledger.take(1, bench.now)
    request = Request(b"body", "key", "ref", "POST", "https://books.example/x?requestid=key", (("accept", "a/b"),))
    bench.ledger.start(attempt, request, bench.now)
    written = [value for _, value in bench.ledger.flush().records]
    restored = Ledger("payments", bench.policy)
    restored.restore("a", decode_entry(written[0]))
    assert restored.queues.attempts["a"].request == request


def test_an_entry_written_before_there_was_http_is_read():
    old = Entry("IN_FLIGHT", "payments", 7, "e1", control_id="C", reference="R", body=b"x", since=5)
    members = msgspec.msgpack.decode(encode_entry(old))[:20]  # as many as an entry had then, up to ``since``
    assert members[-1] == 5
    ledger = Ledger("payments", make_policy())
    ledger.restore("a", decode_entry(msgspec.msgpack.encode(members)))
    assert ledger.queues.attempts["a"].request == Request(b"x", "C", "R")


def test_a_call_may_look_again_but_another_call_may_not_write_while_the_first_write_can_land():
    bench = Bench()
    bench.publish(("a", "e1"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.start(attempt, Request(b"x", "C", "R"), bench.now)
    assert bench.ledger.may_write(attempt, bench.now)
    assert bench.ledger.may_write(attempt, bench.now)
    bench.ledger.settle(attempt, TIMEOUT, bench.now)
    assert bench.ledger.take(1, bench.now) == []
    assert not bench.ledger.may_write(attempt, bench.now)
    attempt.calling, attempt.written = True, False
    assert not bench.ledger.may_write(attempt, bench.now)


def test_a_call_refused_after_its_write_was_answered_leaves_no_write_to_wait_for():
    bench = Bench()
    bench.publish(("a", "e1"))
    (attempt,) = bench.ledger.take(1, bench.now)
    bench.ledger.start(attempt, Request(b"x", "C", "R"), bench.now)
    assert bench.ledger.may_write(attempt, bench.now)
    bench.ledger.settle(attempt, Failed(FailureKind.AUTH, "TOKEN_INVALID_GRANT"), bench.now)
    assert bench.ledger.take(1, bench.now) == [attempt]
    bench.ledger.start(attempt, attempt.request, bench.now)
    assert bench.ledger.may_write(attempt, bench.now)


@pytest.mark.parametrize(("is_outage", "state"), [(False, State.PARKED), (True, State.RETRY_AT)])
def test_refusals_for_now_park_the_event_unless_the_whole_target_is_away(is_outage, state):
    bench = Bench()
    bench.publish(("a", "e1"))
    for _ in range(bench.policy.park_after):
        (attempt,) = bench.ledger.take(1, bench.now)
        bench.ledger.start(attempt, Request(b"x", "C", "R"), bench.now)
        assert bench.ledger.may_write(attempt, bench.now)
        bench.ledger.settle(attempt, Answer(FailureKind.UNAVAILABLE, "HTTP_503", is_outage=is_outage), bench.now)
        bench.wait(100)
    assert attempt.state is state


# Class C: asked before it is posted again.


def make_asked(**changes):
    return make_policy(TargetClass.C, window=None, looks_up=True, **changes)


def ask(bench):
    """Begin what may begin; all of it must be look-ups."""
    begun = bench.begin()
    assert all(attempt.asks for attempt in begun)
    return begun


def test_class_c_asks_after_the_deadline_and_finishes_what_it_finds():
    bench = Bench(make_asked())
    bench.publish(("a", "A"), ("a2", "A"))
    bench.post(TIMEOUT)
    bench.wait(DEADLINE - 0.1)
    assert bench.begin() == []
    bench.wait(0.1)
    (attempt,) = ask(bench)
    assert not bench.write(attempt)
    assert bench.ledger.may_ask(attempt, bench.now)
    bench.ledger.settle_look_up(attempt, Found("doc-7"), bench.now)
    flush = bench.commit()
    assert bench.outcomes("a") == ["posted"]
    assert [report.reference for report in flush.reports] == ["doc-7"]
    assert bench.post() == ["a2"]


def test_class_c_posts_the_same_bytes_once_they_are_surely_absent():
    bench = Bench(make_asked())
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    body = bench.log["a"].body
    bench.wait(DEADLINE)
    (attempt,) = ask(bench)
    bench.ledger.settle_look_up(attempt, Absent(), bench.now)
    bench.commit()
    assert not bench.log["a"].may_have_landed
    (again,) = bench.begin()
    assert not again.asks
    assert bench.log["a"].state == "IN_FLIGHT"
    assert again.request.body == body
    assert bench.write(again)
    bench.settle(again, REJECTED)
    # Nothing of it was there, so a refusal is a refusal.
    assert bench.outcomes("a") == ["rejected"]


def test_class_c_after_kill_9_waits_for_deadline_and_session_before_it_asks():
    bench = Bench(make_asked(visible_after=3.0))
    bench.publish(("a", "A"))
    bench.begin()
    bench.restart()
    bench.wait(DEADLINE + SESSION + 2.9)
    assert bench.begin() == []
    bench.wait(0.2)
    assert [attempt.event_id for attempt in ask(bench)] == ["a"]


def test_an_unclear_look_up_is_asked_again_with_growing_pauses_and_ends_with_a_person():
    bench = Bench(make_asked(ask_person_after=4, park_after=99))
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    bench.wait(DEADLINE)
    asked_at = []
    while bench.outcomes("a") != ["unknown"]:
        for attempt in ask(bench):
            asked_at.append(bench.steady)
            bench.ledger.settle_look_up(attempt, Unclear("TWO_FOUND"), bench.now)
            bench.commit()
        bench.wait(0.5)
        assert bench.steady < 2000
    assert len(asked_at) == 3
    pauses = [later - earlier for earlier, later in itertools.pairwise(asked_at)]
    assert pauses == sorted(pauses)
    assert pauses[-1] > pauses[0]
    assert bench.log["a"].code == "TWO_FOUND"
    bench.restart()
    bench.wait(10_000)
    assert bench.begin() == []


@pytest.mark.parametrize(
    "result", [Failed("WITHDRAWN", "LEASE_OLD"), REFUSED_CONNECTION, Answer(FailureKind.AUTH, "HTTP_401")]
)
def test_a_question_that_could_not_be_asked_decides_nothing_and_is_no_try(result):
    bench = Bench(make_asked())
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    tries = bench.ledger.queues.attempts["a"].tries
    bench.wait(DEADLINE)
    for _ in range(30):
        (attempt,) = ask(bench)
        bench.ledger.settle_look_up(attempt, result, bench.now)
        bench.commit()
        bench.wait(1)
    assert bench.state("a") is State.UNKNOWN
    assert bench.ledger.queues.attempts["a"].tries == tries
    assert bench.outcomes("a") == []


def test_class_a_outside_its_window_asks_where_it_can():
    bench = Bench(make_policy(looks_up=True))
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    bench.wait(WINDOW)
    (attempt,) = bench.begin()
    assert attempt.asks
    bench.ledger.settle_look_up(attempt, Absent(), bench.now)
    bench.commit()
    (again,) = bench.begin()
    assert not again.asks
    assert bench.write(again)
    bench.settle(again, TIMEOUT)
    bench.wait(DEADLINE)
    # Its window begins anew with the new first write.
    (resent,) = bench.begin()
    assert not resent.asks
    bench.restart()
    assert bench.log["a"].may_have_landed is False
    bench.wait(DEADLINE + SESSION)
    assert bench.begin()


# Records that the broker does not take.


def test_a_refused_record_is_a_dead_letter_without_its_request_and_the_others_go_on():
    bench = Bench()
    bench.publish(("a", "A"), ("a2", "A"), ("b", "B"))
    taken = bench.ledger.take(10, bench.now)
    for attempt in taken:
        bench.ledger.start(attempt, Request(b"x" * 10, "C", "R"), bench.now)
    refused = bench.ledger.queues.attempts["a"]
    assert bench.ledger.refuse(refused, "MSG_SIZE_TOO_LARGE", bench.now)
    bench.commit()
    assert bench.outcomes("a") == ["dead_lettered"]
    assert bench.outcomes("a2") == ["parked"]
    assert bench.log["a"].body is None
    assert bench.log["a"].value == b"a"
    assert not refused.calling
    assert not bench.write(refused)
    assert bench.log["b"].state == "IN_FLIGHT"


def test_a_dead_letter_that_is_refused_too_goes_without_the_event_and_then_not_at_all():
    bench = Bench()
    bench.publish(("a", "A"))
    (attempt,) = bench.ledger.take(10, bench.now)
    bench.ledger.start(attempt, Request(b"x", "C", "R"), bench.now)
    assert bench.ledger.refuse(attempt, "MSG_SIZE_TOO_LARGE", bench.now)
    assert bench.ledger.refuse(attempt, "MSG_SIZE_TOO_LARGE", bench.now)
    assert attempt.source.value == b""
    assert not bench.ledger.refuse(attempt, "MSG_SIZE_TOO_LARGE", bench.now)


def test_what_may_have_landed_is_never_made_smaller():
    bench = Bench()
    bench.publish(("a", "A"))
    bench.post(TIMEOUT)
    attempt = bench.ledger.queues.attempts["a"]
    assert not bench.ledger.refuse(attempt, "MSG_SIZE_TOO_LARGE", bench.now)
    assert attempt.request is not None


# What is stopped lies on disk.


def test_what_is_parked_is_on_disk_and_comes_back_with_the_same_bytes():
    bench = Bench(make_policy(park_after=1))
    bench.publish(("a", "A"), ("a2", "A"), ("b", "B"))
    bench.post(LATER)
    assert bench.state("a") is State.PARKED
    assert bench.ledger.queues.shelved == 3
    assert bench.ledger.queues.attempts == {}
    body = bench.log["a"].body
    bench.restart()
    assert bench.ledger.queues.shelved == 3
    bench.wait(60)
    begun = bench.begin()
    assert sorted((attempt.event_id, attempt.request.body) for attempt in begun) == [
        ("a", body), ("b", bench.log["b"].body),
    ]  # fmt: skip
    assert all(attempt.source.value == attempt.event_id.encode() for attempt in begun)
    for attempt in begun:
        assert bench.write(attempt)
        bench.settle(attempt, ACCEPTED)
    assert bench.post() == ["a2"]
    assert bench.ledger.queues.shelved == 0
    assert bench.log == {}
    assert [bench.outcomes(name)[-1] for name in ("a", "a2", "b")] == ["posted"] * 3


def test_an_event_that_is_only_put_off_goes_back_to_disk():
    bench = Bench()
    bench.publish(("a", "A"))
    for _ in range(5):
        (attempt,) = bench.ledger.take(10, bench.now)
        assert bench.ledger.queues.shelved == 0
        bench.ledger.park(attempt, None, "MRN_UNRESOLVED", bench.now, pause=60)
        bench.commit()
        assert bench.ledger.queues.shelved == 1
        assert bench.ledger.queues.attempts == {}
        bench.wait(60)
    assert bench.outcomes("a") == ["parked"]


def test_a_full_disk_costs_memory_and_nothing_else(monkeypatch):
    bench = Bench(make_policy(park_after=1))

    monkeypatch.setattr(bench.ledger.queues._shelf, "put", lambda _attempt: False)
    bench.publish(("a", "A"))
    bench.post(LATER)
    assert bench.ledger.queues.shelved == 0
    bench.wait(60)
    assert bench.post() == ["a"]
    assert bench.outcomes("a")[-1] == "posted"


def test_one_that_was_only_looked_up_keeps_its_time():
    bench = Bench(make_policy(park_after=1))
    bench.publish(("a", "A"))
    bench.post(LATER)
    assert bench.ledger.queues.shelved == 1
    assert bench.ledger.queues.find("a").state is State.PARKED
    assert bench.ledger.queues.shelved == 0
    bench.wait(60)
    assert bench.post() == ["a"]


def test_what_lies_on_disk_is_known_when_it_is_read_again_and_holds_no_frontier():
    bench = Bench(make_policy(park_after=1))
    bench.publish(("x", "X"), ("a", "A"), ("a2", "A"))
    bench.begin(room=1)  # x holds the frontier
    bench.post(LATER)
    assert (bench.frontier, bench.ledger.queues.shelved) == (0, 2)
    bench.restart()
    assert (bench.frontier, bench.ledger.queues.shelved, len(bench.ledger.queues.line)) == (0, 2, 3)
    bench.publish(("a", "A"), ("a3", "A"))  # a copy, and one that comes behind what is on disk
    bench.commit()
    assert bench.outcomes("a") == ["parked"]
    assert (bench.state("a3"), bench.ledger.queues.shelved) == (State.PARKED, 3)
    posted = []
    for _ in range(20):
        bench.wait(60)
        posted += bench.post()
    assert [name for name in posted if name != "x"] == ["a", "a2", "a3"]
    assert bench.log == {}
    assert bench.frontier == 5

"""The breaker: when calls may begin. A clock only tests move."""

import random
from itertools import pairwise

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from clients.breaker import Breaker, BreakerState
from clients.limits import Backoff
from schemas.failure import FailureKind

K = FailureKind


def make(threshold=3, draw=lambda: 0.99999999, **options):
    return Breaker(draw, threshold=threshold, backoff=Backoff(1.0, 30.0), probe_seconds=60.0, **options)


def break_it(breaker, now=0.0, kind=K.UNAVAILABLE, calls=3, **options):
    for ticket in [breaker.admit(now) for _ in range(calls)]:
        breaker.fail(ticket, now, kind, "CONNECT_FAILED", **options)


def test_it_opens_after_failures_in_a_row_and_not_before():
    breaker = make()
    for _ in range(20):
        break_it(breaker, calls=2)
        breaker.succeed(breaker.admit(0.0), 0.0)
    assert breaker.name_state(0.0) is BreakerState.CLOSED
    break_it(breaker, 7.0)
    assert (breaker.name_state(7.0), breaker.reason, breaker.since) == (BreakerState.OPEN, "CONNECT_FAILED", 7.0)
    assert breaker.admit(7.0) is None


@pytest.mark.parametrize("kind", [K.REJECTED, K.DUPLICATE, K.RATE_LIMITED, K.INTERNAL, K.INVALID, K.UNMAPPED])
def test_news_about_a_record_is_no_outage(kind):
    breaker = make(threshold=1)
    break_it(breaker, kind=kind, calls=50)
    assert breaker.name_state(0.0) is BreakerState.CLOSED


def test_an_answer_about_a_record_ends_a_row_and_silence_about_the_target_does_not():
    breaker = make()
    break_it(breaker, calls=2)
    break_it(breaker, kind=K.REJECTED, calls=1)
    break_it(breaker, calls=2)
    break_it(breaker, kind=K.INTERNAL, calls=1)
    assert breaker.name_state(0.0) is BreakerState.CLOSED
    break_it(breaker, calls=1)
    assert breaker.name_state(0.0) is BreakerState.OPEN


def test_one_probe_at_a_time_and_its_success_closes():
    breaker = make()
    break_it(breaker)
    assert breaker.measure_wait(0.0) == pytest.approx(1.0)
    assert breaker.admit(0.99) is None
    probe = breaker.admit(1.0)
    assert probe.probe
    assert breaker.name_state(1.0) is BreakerState.HALF_OPEN
    assert [breaker.admit(1.0 + second) for second in range(50)] == [None] * 50
    breaker.succeed(probe, 2.0)
    assert (breaker.name_state(2.0), breaker.reason, breaker.since) == (BreakerState.CLOSED, "", 2.0)
    assert all(breaker.admit(2.0) for _ in range(50))


def test_failed_probes_wait_longer_each_up_to_the_ceiling_and_success_forgets():
    breaker, now, pauses = make(), 0.0, []
    break_it(breaker)
    for _ in range(8):
        pauses.append(breaker.measure_wait(now))
        now += pauses[-1]
        breaker.fail(breaker.admit(now), now, K.AMBIGUOUS, "NO_ANSWER")
    assert pauses == pytest.approx([1, 2, 4, 8, 16, 30, 30, 30], rel=1e-3)
    now += 31
    breaker.succeed(breaker.admit(now), now)
    break_it(breaker, now)
    assert breaker.measure_wait(now) == pytest.approx(1, rel=1e-3)


def test_it_waits_at_least_as_long_as_the_target_asked():
    breaker = make()
    break_it(breaker, retry_after=300.0)
    assert breaker.admit(299.0) is None
    assert breaker.admit(300.0) is not None


def test_jitter_is_drawn_for_each_opening():
    draws = iter([0.5, 0.25])
    breaker = make(draw=lambda: next(draws))
    break_it(breaker)
    assert breaker.measure_wait(0.0) == pytest.approx(0.5)
    breaker.fail(breaker.admit(0.5), 0.5, K.UNAVAILABLE, "CONNECT_FAILED")
    assert breaker.measure_wait(0.5) == pytest.approx(0.5)


def test_late_news_of_calls_from_before_changes_nothing():
    breaker = make()
    old = [breaker.admit(0.0) for _ in range(6)]
    break_it(breaker)
    breaker.succeed(old[0], 0.1)
    breaker.fail(old[1], 0.1, K.UNAVAILABLE, "CONNECT_FAILED")
    assert breaker.name_state(0.1) is BreakerState.OPEN
    assert breaker.measure_wait(0.1) == pytest.approx(0.9)
    breaker.succeed(breaker.admit(1.0), 1.1)
    for ticket in old[2:]:
        breaker.fail(ticket, 1.2, K.AMBIGUOUS, "NO_ANSWER")
    assert breaker.name_state(1.2) is BreakerState.CLOSED


def test_a_withdrawn_or_forgotten_probe_leaves_its_place():
    breaker = make()
    break_it(breaker)
    breaker.withdraw(breaker.admit(1.0))
    forgotten = breaker.admit(1.0)
    assert breaker.admit(60.9) is None
    assert breaker.measure_wait(1.0) == 60.0
    probe = breaker.admit(61.0)
    breaker.succeed(forgotten, 61.5)  # too late to count
    breaker.withdraw(forgotten)
    assert breaker.admit(61.5) is None
    breaker.succeed(probe, 62.0)
    assert breaker.name_state(62.0) is BreakerState.CLOSED


class TestRefused:
    def test_one_refusal_opens_it_for_good(self):
        breaker = make()
        break_it(breaker, kind=K.AUTH, calls=1)
        assert (breaker.name_state(0.0), breaker.measure_wait(0.0)) == (BreakerState.REFUSED, None)
        assert breaker.admit(10**9) is None

    def test_a_new_token_earns_one_probe(self):
        breaker = make()
        break_it(breaker, kind=K.AUTH, calls=1)
        breaker.change_credential(0, 5.0)
        assert breaker.admit(5.0) is None
        breaker.change_credential(1, 5.0)
        probe = breaker.admit(5.0)
        assert breaker.admit(5.0) is None
        breaker.fail(probe, 6.0, K.AUTH, "HTTP_401")
        assert breaker.admit(10**9) is None
        breaker.change_credential(2, 7.0)
        breaker.succeed(breaker.admit(7.0), 8.0)
        assert breaker.name_state(8.0) is BreakerState.CLOSED

    def test_a_person_may_say_try_now(self):
        breaker = make()
        break_it(breaker, kind=K.AUTH, calls=1)
        breaker.allow_probe(5.0)
        assert breaker.admit(5.0) is not None
        assert breaker.admit(5.0) is None
        down = make()
        break_it(down, retry_after=3600)
        down.allow_probe(5.0)
        probe = down.admit(5.0)
        down.allow_probe(5.0)
        assert down.admit(5.0) is None
        down.succeed(probe, 6.0)
        assert down.name_state(6.0) is BreakerState.CLOSED

    def test_a_refusal_of_an_older_token_is_no_news(self):
        breaker = make()
        old = breaker.admit(0.0)
        breaker.change_credential(1, 1.0)
        breaker.fail(old, 2.0, K.AUTH, "HTTP_401")
        assert breaker.name_state(2.0) is BreakerState.CLOSED

    def test_a_token_renewed_on_the_way_and_refused_too_is_news(self):
        # Otherwise every call would renew, be refused, and count as older than its own token.
        breaker = make()
        breaker.fail(breaker.admit(0.0), 1.0, K.AUTH, "HTTP_401", credential=1)
        assert breaker.name_state(1.0) is BreakerState.REFUSED
        breaker.change_credential(1, 2.0)
        assert breaker.admit(2.0) is None

    def test_refusals_of_calls_from_before_do_not_undo_a_person_s_word(self):
        breaker = make()
        old = [breaker.admit(0.0) for _ in range(3)]
        breaker.fail(old[0], 1.0, K.AUTH, "HTTP_401")
        breaker.allow_probe(2.0)
        breaker.fail(old[1], 3.0, K.AUTH, "HTTP_401")
        probe = breaker.admit(3.0)
        breaker.fail(old[2], 3.5, K.AUTH, "HTTP_401")
        breaker.succeed(probe, 4.0)
        assert breaker.name_state(4.0) is BreakerState.CLOSED


def test_the_states_have_the_names_of_the_console():
    assert [state.value for state in BreakerState] == ["closed", "open", "half-open", "refused"]


def test_a_senseless_threshold_is_refused():
    with pytest.raises(ValueError):
        make(threshold=0)


class Machine(RuleBasedStateMachine):
    """Any order of events. What is checked is said in terms of what callers see, not of the breaker's fields."""

    def __init__(self):
        super().__init__()
        self.breaker = make(threshold=2)
        self.now = 0.0
        self.tickets = []
        self.credential = 0
        self.openings = []
        self.probes = []
        """(issued, ticket) of probes not reported yet."""
        self.refused_with = None

    @rule(seconds=st.integers(0, 40))
    def wait(self, seconds):
        self.now += seconds

    @rule()
    def ask(self):
        before = self.breaker.name_state(self.now)
        wait = self.breaker.measure_wait(self.now)
        ticket = self.breaker.admit(self.now)
        assert (ticket is not None) == (wait == 0.0)
        if before is BreakerState.CLOSED:
            assert not ticket.probe
        if self.refused_with is not None and self.credential == self.refused_with:
            assert ticket is None
        if ticket is None:
            return
        self.tickets.append(ticket)
        if ticket.probe:
            assert before is BreakerState.OPEN
            running = [issued for issued, _ in self.probes if self.now < issued + 60]
            assert not running, "one probe at a time"
            self.probes.append((self.now, ticket))

    @precondition(lambda self: self.tickets)
    @rule(data=st.data(), kind=st.sampled_from([None, *FailureKind, K.UNAVAILABLE, K.UNAVAILABLE, "withdraw"]))
    def report(self, data, kind):
        ticket = self.tickets.pop(data.draw(st.integers(0, len(self.tickets) - 1)))
        before = self.breaker.name_state(self.now)
        if kind is None:
            self.breaker.succeed(ticket, self.now)
        elif kind == "withdraw":
            self.breaker.withdraw(ticket)
        else:
            self.breaker.fail(ticket, self.now, kind, "CODE")
        after = self.breaker.name_state(self.now)
        self.probes = [entry for entry in self.probes if entry[1] is not ticket]
        if after is not BreakerState.HALF_OPEN and before is BreakerState.HALF_OPEN:
            self.probes = []
        if before is not BreakerState.CLOSED and after is BreakerState.CLOSED:
            assert ticket.probe
            assert kind in {None, K.REJECTED, K.DUPLICATE, K.RATE_LIMITED}
        if before is BreakerState.CLOSED and after is not BreakerState.CLOSED:
            assert kind in {K.UNAVAILABLE, K.AMBIGUOUS, K.AUTH}
        if after is BreakerState.REFUSED and before is not BreakerState.REFUSED:
            assert kind is K.AUTH
            self.refused_with = self.credential

    @rule()
    def renew(self):
        self.credential += 1
        self.breaker.change_credential(self.credential, self.now)
        self.refused_with = None

    @rule()
    def say_try(self):
        self.breaker.allow_probe(self.now)
        self.refused_with = None

    @invariant()
    def it_is_never_stuck(self):
        # Left alone, every state but REFUSED lets a call through in bounded time.
        wait = self.breaker.measure_wait(self.now)
        state = self.breaker.name_state(self.now)
        assert (wait is None) == (state is BreakerState.REFUSED)
        assert wait is None or wait < 60.001
        assert bool(self.breaker.reason) == (state is not BreakerState.CLOSED)


TestMachine = Machine.TestCase
TestMachine.settings = settings(max_examples=100, stateful_step_count=30)


def test_the_pauses_of_a_real_outage_are_spread():
    # Full jitter: a hundred instances do not come back together.
    draw = random.Random(7).random
    breakers = [make(draw=draw) for _ in range(100)]
    for breaker in breakers:
        break_it(breaker)
    waits = sorted(breaker.measure_wait(0.0) for breaker in breakers)
    assert 0.09 < waits[0] < 0.3
    assert 0.8 < waits[-1] <= 1.0
    assert sum(later > earlier for earlier, later in pairwise(waits)) > 80

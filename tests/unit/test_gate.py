"""The gate of a target: what shuts it, what it lets through meanwhile, and how wide it opens."""

import pytest

from schemas.failure import FailureKind
from sinks.attempts import Failed
from sinks.contract import Absent, Answer
from sinks.gate import Gate

OK = Answer(None, "OK")
DOWN = Failed(FailureKind.UNAVAILABLE, "CONNECT_FAILED")


def make_gate(**changes):
    return Gate(lambda: 0.999, **{"ceiling": 32} | changes)


def run(gate, now, results, *, latency=0.1):
    """Calls one after the other."""
    for result in results:
        leave = gate.enter(now)
        assert leave is not None
        now += latency
        gate.leave(leave, now, result)
    return now


def run_round(gate, now, result=OK, latency=0.1):
    """As many calls at once as there is room for."""
    leaves = []
    while (leave := gate.enter(now)) is not None:
        leaves.append(leave)
    for leave in leaves:
        gate.leave(leave, now + latency, result)
    return len(leaves)


def test_it_opens_wider_while_all_goes_well_up_to_its_ceiling():
    gate = make_gate()
    assert [run_round(gate, float(n)) for n in range(6)] == [4, 8, 16, 32, 32, 32]
    assert gate.limit == 32


def test_it_halves_when_calls_get_slow_and_grows_by_one_from_then_on():
    gate = make_gate()
    for n in range(6):
        run_round(gate, float(n))
    run_round(gate, 10.0, latency=3.0)
    assert gate.limit == 16
    run_round(gate, 20.0)
    assert gate.limit == 17


def test_one_record_in_ten_without_an_answer_leaves_it_wide_and_many_do_not():
    gate = make_gate(threshold=100)
    for n in range(200):
        leaves = [gate.enter(float(n)) for _ in range(gate.limit)]
        for place, leave in enumerate(leaves):
            result = Failed(FailureKind.AMBIGUOUS, "NO_ANSWER") if place % 10 == 9 else OK
            gate.leave(leave, n + 0.1, result)
    assert gate.limit == 32
    for n in range(200, 204):
        leaves = [gate.enter(float(n)) for _ in range(gate.limit)]
        for place, leave in enumerate(leaves):
            result = Failed(FailureKind.AMBIGUOUS, "NO_ANSWER") if place % 2 else OK
            gate.leave(leave, n + 0.1, result)
    assert gate.limit <= 4


@pytest.mark.parametrize(
    "result",
    [
        DOWN,
        Answer(FailureKind.UNAVAILABLE, "HTTP_503", is_outage=True),
        Answer(FailureKind.AMBIGUOUS, "HTTP_502"),
        Failed(FailureKind.AMBIGUOUS, "NO_ANSWER"),
    ],
)
def test_three_in_a_row_shut_it_and_one_probe_opens_it(result):
    gate = make_gate()
    now = run(gate, 0.0, [result, result])
    assert gate.count_room(now) > 1
    now = run(gate, now, [result])
    assert gate.is_shut(now)
    assert gate.explain(now) == result.code
    assert gate.count_room(now) == 0
    assert gate.enter(now) is None
    now += 0.6
    assert gate.count_room(now) == 1
    probe = gate.enter(now)
    assert probe is not None
    assert gate.enter(now) is None
    assert gate.name_state(now) == "half-open"
    gate.leave(probe, now, OK)
    assert not gate.is_shut(now)
    assert gate.explain(now) == ""
    assert gate.count_room(now) == 4


def test_an_answer_between_two_failures_keeps_it_open():
    gate = make_gate()
    now = run(gate, 0.0, [DOWN, DOWN, Answer(FailureKind.REJECTED, "NO"), DOWN, DOWN, Absent(), DOWN, DOWN])
    assert not gate.is_shut(now)


def test_an_event_that_is_refused_for_now_says_nothing_about_the_target():
    gate = make_gate()
    now = run(gate, 0.0, [Answer(FailureKind.UNAVAILABLE, "LOCKED")] * 20)
    assert not gate.is_shut(now)
    assert gate.limit >= 4


def test_refused_credentials_shut_it_at_once_and_are_tried_ever_more_rarely():
    gate = make_gate()
    now = run(gate, 0.0, [Answer(FailureKind.AUTH, "HTTP_401")])
    assert gate.name_state(now) == "refused"
    pauses = []
    for _ in range(12):
        shut_at = now
        while not gate.count_room(now):
            now += 0.5
        pauses.append(round(now - shut_at, 1))
        now = run(gate, now, [Answer(FailureKind.AUTH, "HTTP_401")], latency=0.0)
    assert pauses[0] <= 1.5
    assert pauses == sorted(pauses)
    assert 250 <= pauses[-1] <= 301


def test_a_target_that_names_a_time_is_left_alone_so_long():
    gate = make_gate()
    now = run(gate, 0.0, [Answer(FailureKind.UNAVAILABLE, "HTTP_503", retry_after=40.0, is_outage=True)])
    assert gate.count_room(now + 39.9) == 0
    assert gate.count_room(now + 40.0) == 1


def test_throttling_waits_its_time_halves_the_calls_and_does_not_open_the_breaker():
    gate = make_gate()
    for n in range(4):
        run_round(gate, float(n))
    now = run(gate, 10.0, [Answer(FailureKind.RATE_LIMITED, "HTTP_429", retry_after=7.0)])
    assert gate.limit == 16
    assert gate.name_state(now) == "waiting"
    assert gate.explain(now) == "HTTP_429"
    assert not gate.is_shut(now)
    assert gate.enter(now + 6.9) is None
    assert gate.count_room(now + 7.0) == 16
    assert gate.explain(now + 7.0) == ""


def test_throttling_without_a_time_waits_longer_each_time():
    gate, now, pauses = make_gate(), 0.0, []
    for _ in range(5):
        now = run(gate, now, [Answer(FailureKind.RATE_LIMITED, "HTTP_429")])
        began = now
        while not gate.count_room(now):
            now += 0.01
        pauses.append(now - began)
    assert pauses == sorted(pauses)
    assert pauses[-1] > 4 * pauses[0]


def test_a_wait_for_our_own_limits_does_not_shut_it():
    gate = make_gate()
    now = run(gate, 0.0, [Failed(FailureKind.RATE_LIMITED, "RATE_WAIT")])
    assert gate.count_room(now) > 0


def test_a_withdrawn_call_is_no_news_and_gives_its_place_back():
    gate = make_gate()
    now = run(gate, 0.0, [Failed("WITHDRAWN", "LEASE_OLD")] * 50)
    assert not gate.is_shut(now)
    assert run_round(gate, now) == 4
    now = run(gate, now, [DOWN] * 3) + 1.0
    probe = gate.enter(now)
    gate.leave(probe, now, Failed("WITHDRAWN", "LEASE_OLD"))
    assert gate.enter(now) is not None

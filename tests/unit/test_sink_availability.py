"""Back-off over a whole target."""

from sinks.availability import Availability


def test_open_until_something_fails():
    target = Availability(lambda: 0.5)
    assert target.is_open
    assert target.limit_calls(0.0, 32) == 32


def test_closed_then_one_probe_then_open():
    target = Availability(lambda: 0.999, first=1.0)
    target.fail(10.0, "CONNECT_FAILED")
    assert (target.is_open, target.reason) == (False, "CONNECT_FAILED")
    assert target.limit_calls(10.5, 32) == 0
    assert target.limit_calls(11.0, 32) == 1
    target.succeed()
    assert target.limit_calls(11.0, 32) == 32


def test_pauses_grow_to_their_limit_and_never_vanish():
    for jitter in (0.0, 0.999):
        target = Availability(lambda jitter=jitter: jitter, first=1.0, longest=30.0)
        now, pauses = 0.0, []
        for _ in range(12):
            target.fail(now, "CONNECT_FAILED")
            start = now
            while not target.limit_calls(now, 4):
                now += 0.01
            pauses.append(now - start)
        assert min(pauses) >= 0.09
        assert max(pauses) <= 30.02
        assert pauses[:4] == sorted(pauses[:4])
        assert pauses[-1] > pauses[0] * 10


def test_many_failures_of_one_moment_count_once():
    target = Availability(lambda: 0.999, first=1.0)
    for _ in range(32):
        target.fail(10.0, "CONNECT_FAILED")
    assert target.limit_calls(11.0, 4) == 1


def test_the_target_is_left_alone_as_long_as_it_asked():
    target = Availability(lambda: 0.999, first=1.0)
    target.fail(10.0, "HTTP_429", 20.0)
    assert target.limit_calls(29.9, 4) == 0
    assert target.limit_calls(30.0, 4) == 1


def test_the_longest_wait_of_a_closed_time_holds():
    target = Availability(lambda: 0.999, first=1.0)
    target.fail(10.0, "CONNECT_FAILED")
    target.fail(10.1, "HTTP_429", 5.0)
    target.fail(10.2, "HTTP_429", 1.0)
    assert target.limit_calls(15.0, 4) == 0
    assert target.limit_calls(15.1, 4) == 1

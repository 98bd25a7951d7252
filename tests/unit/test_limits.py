"""Rates, the limiter's order, adaptive concurrency, back-off. All on clocks that only tests move."""

import asyncio

import pytest
from hypothesis import given
from hypothesis import strategies as st

from clients.limits import Backoff, ConcurrencyLimit, Rate, RateLimiter, TokenBucket
from schemas.failure import ConfigurationError, FailureKind


@st.composite
def rates(draw):
    calls = draw(st.integers(1, 12))
    return Rate(calls, draw(st.sampled_from([0.5, 1.0, 7.0, 60.0])), draw(st.integers(1, calls)))


def count_worst_window(times, seconds):
    """Most calls in any half-open window: counted by looking at each, in whole nanoseconds."""
    ticks = [round(moment * 1e9) for moment in times]
    width = round(seconds * 1e9)
    return max((sum(begin <= tick < begin + width for tick in ticks) for begin in ticks), default=0)


def take_all(bucket, steps):
    now, taken = 0.0, []
    for step in steps:
        now += step
        if bucket.take(now):
            taken.append(now)
    return taken


@given(rates(), st.lists(st.floats(0, 8), max_size=80))
def test_no_window_ever_holds_more_than_the_rate(rate, steps):
    taken = take_all(TokenBucket(rate), steps)
    assert count_worst_window(taken, rate.seconds) <= rate.calls
    assert bool(taken) == bool(steps)


def test_the_oracle_sees_a_plain_bucket_break_the_promise():
    # Burst 10 and a refill of 10 a second: 19 calls within the first second.
    tokens, now, taken = 10.0, 0.0, []
    for _ in range(100):
        if tokens >= 1:
            tokens -= 1
            taken.append(now)
        now += 0.01
        tokens = min(10.0, tokens + 0.1)
    assert count_worst_window(taken, 1.0) > 10


@given(rates())
def test_a_greedy_caller_gets_the_whole_rate_in_the_long_run(rate):
    bucket, now, taken = TokenBucket(rate), 0.0, 0
    while now < 100 * rate.seconds and taken < 2000:
        while bucket.take(now):
            taken += 1
        now += max(bucket.measure_wait(now), 1e-6)
    # What the burst costs: the refill is the window's rest.
    assert taken >= (rate.calls - rate.burst + 1) * now / rate.seconds * 0.99


@given(rates(), st.lists(st.floats(0, 3), max_size=30))
def test_the_wait_is_exactly_until_the_next_token(rate, steps):
    bucket, now = TokenBucket(rate), 0.0
    for step in steps:
        now += step
        wait = bucket.measure_wait(now)
        assert bucket.take(now) == (wait == 0)
        if wait > 0.001:
            assert not bucket.take(now + wait - 0.001)
            now += wait - 0.001


def test_a_clock_that_goes_back_gives_nothing():
    bucket = TokenBucket(Rate(1, 10))
    assert bucket.take(100.0)
    assert not bucket.take(5.0)
    assert not bucket.take(109.0)
    assert bucket.take(110.0)


@given(rates(), st.floats(0, 100), st.integers(0, 5))
def test_a_drained_bucket_is_silent_for_the_pause_and_has_no_burst_after(rate, pause, before):
    bucket = TokenBucket(rate)
    for _ in range(before):
        bucket.take(50.0)
    bucket.drain(50.0, pause)
    assert not bucket.take(50.0)
    assert bucket.measure_wait(50.0) >= pause
    now = 50.0 + bucket.measure_wait(50.0) + 1e-6
    assert pause < 1e-3 or not bucket.take(50.0 + pause * 0.999)
    assert bucket.take(now)
    assert not bucket.take(now)


def test_draining_never_shortens_a_longer_pause():
    bucket = TokenBucket(Rate(10, 1, 10))
    bucket.drain(0.0, 60.0)
    bucket.drain(0.0, 1.0)
    assert not bucket.take(59.0)


@given(rates(), st.integers(1, 12), st.lists(st.floats(0, 4), max_size=30))
def test_the_parts_of_a_rate_never_exceed_it_together(rate, processes, steps):
    if processes > rate.calls:
        with pytest.raises(ConfigurationError):
            rate.divide(processes, place="targets.x")
        return
    part = rate.divide(processes, place="targets.x")
    together = []
    for _ in range(processes):  # the worst case: all at the same moments
        together += take_all(TokenBucket(part), steps)
    assert count_worst_window(together, rate.seconds) <= rate.calls


@pytest.mark.parametrize("values", [(0, 1, 1), (1, 0, 1), (1, float("inf"), 1), (5, 1, 6), (5, 1, 0)])
def test_a_senseless_rate_is_refused(values):
    with pytest.raises(ValueError):
        Rate(*values)


class Clock:
    """A clock that sleeping moves; at each sleep others may run first."""

    def __init__(self):
        self.now = 1000.0
        self.on_sleep = None

    def __call__(self):
        return self.now

    async def sleep(self, seconds):
        assert seconds > 0
        for _ in range(5):
            await asyncio.sleep(0)
        if self.on_sleep is not None:
            self.on_sleep()
        self.now += seconds


async def test_many_callers_are_served_in_order_and_within_the_rate():
    clock, served = Clock(), []
    limiter = RateLimiter([Rate(10, 1, 3), Rate(60, 60, 10)], clock=clock, sleep=clock.sleep)

    async def call(number):
        await limiter.take()
        served.append((number, clock.now))

    await asyncio.gather(*(call(number) for number in range(150)))
    assert [number for number, _ in served] == list(range(150))
    times = [moment for _, moment in served]
    assert count_worst_window(times, 1) <= 10
    assert count_worst_window(times, 60) <= 60
    # Both bind: ten at once at the most by the second, and 51 a minute in the long run.
    assert times[-1] - times[0] < 190


async def test_a_cancelled_waiter_takes_nothing_and_holds_nobody_up():
    clock, served = Clock(), []
    limiter = RateLimiter([Rate(1, 10)], clock=clock, sleep=clock.sleep)

    async def call(number):
        await limiter.take()
        served.append((number, clock.now))

    await call(0)
    tasks = [asyncio.create_task(call(number)) for number in range(1, 5)]
    await asyncio.sleep(0)
    tasks[0].cancel()  # asleep for its token
    tasks[2].cancel()  # in the queue
    await asyncio.gather(*tasks, return_exceptions=True)
    assert served == [(0, 1000.0), (2, pytest.approx(1010.0)), (4, pytest.approx(1020.0))]


async def test_rate_limited_reaches_those_who_wait_already():
    clock = Clock()
    limiter = RateLimiter([Rate(10, 1, 1)], clock=clock, sleep=clock.sleep)
    await limiter.take()
    clock.on_sleep = lambda: (limiter.drain(30.0), setattr(clock, "on_sleep", None))
    await limiter.take()
    assert clock.now >= 1030.0


async def test_no_rate_is_no_wait():
    clock = Clock()
    await asyncio.gather(*(RateLimiter([], clock=clock, sleep=clock.sleep).take() for _ in range(3)))
    assert clock.now == 1000.0


class TestConcurrency:
    def run_round(self, limit, now, *, width, latency, kind=None):
        calls = [call for call in (limit.begin(now) for _ in range(width)) if call]
        for call in calls:
            limit.end(call, now + latency, kind)
        return now + latency

    def test_it_grows_by_one_a_round_up_to_its_ceiling(self):
        limit, now, seen = ConcurrencyLimit(ceiling=6, initial=2), 0.0, []
        for _ in range(8):
            now = self.run_round(limit, now, width=100, latency=0.1)
            seen.append(limit.limit)
        assert seen == [3, 4, 5, 6, 6, 6, 6, 6]

    def test_it_does_not_grow_while_places_are_free(self):
        limit, now = ConcurrencyLimit(ceiling=50, initial=8), 0.0
        for _ in range(500):
            now = self.run_round(limit, now, width=7, latency=0.1)
        assert limit.limit == 8
        for _ in range(2):
            now = self.run_round(limit, now, width=8, latency=0.1)
        assert limit.limit > 8

    @pytest.mark.parametrize("kind", [FailureKind.RATE_LIMITED, FailureKind.UNAVAILABLE, FailureKind.AMBIGUOUS])
    def test_pressure_shrinks_it_once_for_all_calls_under_way(self, kind):
        limit = ConcurrencyLimit(ceiling=100, initial=40)
        self.run_round(limit, 0.0, width=40, latency=0.1, kind=kind)
        assert limit.limit == 28
        self.run_round(limit, 1.0, width=40, latency=0.1, kind=kind)
        assert limit.limit == 19
        for second in range(2, 60):
            self.run_round(limit, second, width=40, latency=0.1, kind=kind)
        assert limit.limit == 1

    @pytest.mark.parametrize("kind", [FailureKind.REJECTED, FailureKind.DUPLICATE, FailureKind.AUTH])
    def test_answers_about_a_record_are_no_pressure(self, kind):
        limit = ConcurrencyLimit(ceiling=100, initial=40)
        self.run_round(limit, 0.0, width=40, latency=0.1, kind=kind)
        assert limit.limit == 41

    def test_slowness_shrinks_it_and_is_believed_in_the_end(self):
        limit, now = ConcurrencyLimit(ceiling=20, initial=20, floor=2), 0.0
        for _ in range(30):
            now = self.run_round(limit, now, width=20, latency=0.1)
        assert limit.limit == 20
        for _ in range(8):
            now = self.run_round(limit, now, width=20, latency=2.0)
        assert limit.limit < 10
        for _ in range(60):
            now = self.run_round(limit, now, width=20, latency=2.0)
        assert limit.limit == 20

    def test_fast_refusals_between_slow_posts_do_not_make_them_look_slow(self):
        limit, now = ConcurrencyLimit(ceiling=10, initial=10), 0.0
        for _ in range(50):
            calls = [limit.begin(now) for _ in range(10)]
            for number, call in enumerate(calls):
                limit.end(call, now + (0.001 if number < 2 else 0.4), None)
            now += 1
        assert limit.limit == 10

    def test_what_the_caller_spent_is_not_the_target_s(self):
        limit, now = ConcurrencyLimit(ceiling=10, initial=10), 0.0
        for own in ({"before": 2.0}, {"unread": 2.0}, {"before": 1.0, "unread": 1.0}):
            for _ in range(20):
                calls = [limit.begin(now) for _ in range(10)]
                for call in calls:
                    limit.end(call, now + 0.1, None)
                now += 1
            for call in [limit.begin(now) for _ in range(10)]:
                limit.end(call, now + 2.1, None, **own)
            assert limit.limit == 10
        for call in [limit.begin(now) for _ in range(10)]:
            limit.end(call, now + 4.1, None, before=1.0, unread=1.0)
        assert limit.limit == 7

    @given(st.data())
    def test_it_stays_within_its_bounds_and_counts_its_places(self, data):
        limit = ConcurrencyLimit(floor=2, ceiling=9, initial=data.draw(st.integers(0, 20)))
        under_way, now = [], 0.0
        kinds = st.sampled_from([None, None, None, FailureKind.RATE_LIMITED, FailureKind.AMBIGUOUS])
        for step in data.draw(st.lists(st.integers(0, 2), max_size=120)):
            now += 0.05
            before = limit.limit
            if step == 0 and under_way:
                limit.end(under_way.pop(0), now, data.draw(kinds))
            elif step == 1 and under_way:
                under_way.pop()
                limit.withdraw()
            else:
                call = limit.begin(now)
                assert (call is None) == (len(under_way) >= before)
                under_way += [call] if call else []
            assert limit.under_way == len(under_way)
            assert 2 <= limit.limit <= 9
            assert limit.limit - before <= 1

    def test_senseless_bounds_are_refused(self):
        with pytest.raises(ValueError):
            ConcurrencyLimit(floor=5, ceiling=4)


@given(st.integers(0, 10_000), st.floats(0, 1, exclude_max=True))
def test_back_off_has_a_floor_and_a_ceiling(failures, jitter):
    pause = Backoff(0.5, 30.0).draw_pause(failures, lambda: jitter)
    ceiling = min(30.0, 0.5 * 2 ** (max(failures, 1) - 1)) if failures < 50 else 30.0
    assert 0.1 * ceiling <= pause <= ceiling

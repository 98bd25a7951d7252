"""Calls: whose time they take, and that none ends unnoticed. In virtual time, on a loop that is made to stall."""

import asyncio
from types import SimpleNamespace

import pytest

from sinks.calls import Call, Calls
from sinks.contract import Answer, TargetClass
from sinks.gate import Gate, make_gate
from sinks.policy import Moment, Policy
from sinks.stalls import TICK, Stalls
from telemetry.metrics import Metrics
from tests.delivery_faults import virtual_time

OK = Answer(None, "OK")


def stall(seconds):
    """The loop, or the whole process, stands still."""
    asyncio.get_running_loop()._jumping.now += seconds


def test_a_stall_is_seen_at_once_and_only_once():
    async def play():
        needed = [True]
        stalls = Stalls(lambda: needed[0])
        assert stalls.measure() == 0
        stalls.watch()
        await asyncio.sleep(10)
        assert stalls.measure() == pytest.approx(0, abs=1e-6)
        stall(0.3)
        seen = stalls.measure()
        assert seen == pytest.approx(0.3, abs=TICK)
        await asyncio.sleep(10)
        assert stalls.measure() == pytest.approx(seen, abs=1e-6)
        needed[0] = False
        await asyncio.sleep(1)
        stall(5)
        assert stalls.measure() == pytest.approx(seen, abs=1e-6), "nobody watches any more"
        needed[0] = True
        stalls.watch()
        await asyncio.sleep(1)
        assert stalls.measure() == pytest.approx(seen, abs=1e-6)

    virtual_time.run(play())


class Target:
    """A transport: its own waits, the write, the target's time."""

    connections = 64
    call_deadline = 10.0

    def __init__(self, before=0.0, takes=0.05):
        self.before, self.takes = before, takes

    async def send(self, _request, before_write):
        await asyncio.sleep(self.before)
        before_write()
        await asyncio.sleep(self.takes)
        return OK

    async def find(self, _request, _first_write_at, before_ask):
        return await self.send(None, before_ask)

    async def close(self):
        pass


class Listening(Gate):
    """A gate that notes how long the target is said to have taken."""

    def leave(self, leave, now, result, *, before, unread):
        super().leave(leave, now, result, before=before, unread=unread)
        self.heard = now - leave.place.began - before - unread


def make_calls(target, gate):
    clock = asyncio.get_running_loop().time
    return Calls(
        target,
        None,
        SimpleNamespace(name="t"),
        gate,
        now=lambda: Moment(clock(), 0),
        is_lease_fresh=lambda: True,
        metrics=Metrics(strict=True),
    )


def make_call(*, asks=False):
    attempt = SimpleNamespace(asks=asks, request=object(), first_write_at=0, written=False)
    ledger = SimpleNamespace(may_write=lambda *_: True, may_ask=lambda *_: True)
    return Call(SimpleNamespace(owned=True, is_leaving=False, ledger=ledger), attempt)


def test_a_call_that_breaks_inside_us_is_told():
    class Broken(Gate):
        def leave(self, *_arguments, **_options):
            raise ZeroDivisionError

    async def play():
        calls = make_calls(Target(), Broken(lambda: 0.5, ceiling=4))
        calls.line_up([make_call(), make_call()])
        await asyncio.sleep(60)
        assert calls.on_wire == 0
        with pytest.raises(ZeroDivisionError):
            calls.take_results()
        await calls.close()

    virtual_time.run(play())


@pytest.mark.parametrize("asks", [False, True])
@pytest.mark.parametrize(
    ("before", "takes", "stalls"), [(0, 0.05, {}), (7, 0.05, {}), (0, 3, {}), (0, 0.05, {0.03: 0.4}), (2, 3, {1: 5})]
)
def test_a_call_s_latency_is_the_target_s(before, takes, stalls, asks):
    async def play():
        gate = Listening(lambda: 0.5, ceiling=4)
        calls = make_calls(Target(before, takes), gate)
        calls.line_up([make_call(asks=asks)])
        for at, seconds in stalls.items():
            asyncio.get_running_loop().call_later(at, stall, seconds)
        await asyncio.sleep(60)
        assert [result for _, result in calls.take_results()] == [OK]
        assert gate.heard == pytest.approx(takes, abs=TICK)

    virtual_time.run(play())


def post_many(target, stalls_every, stall_seconds):
    """How many calls at once are allowed at the end, and the fewest on the way after the first second."""

    async def play():
        loop = asyncio.get_running_loop()
        policy = Policy(target_class=TargetClass.A, call_deadline=10, session_timeout=45)
        gate = make_gate(lambda: 0.5, policy, target.connections)
        calls, seen = make_calls(target, gate), []
        calls.line_up([make_call() for _ in range(20_000)])
        until = loop.time() + 10
        while loop.time() < until:
            await asyncio.sleep(stalls_every)
            stall(stall_seconds)
            seen.append(gate.limit)
        calls.withdraw_line("END")
        await calls.close()
        return gate.limit, min(seen[len(seen) // 4 :])

    return virtual_time.run(play())


def test_a_process_without_a_core_does_not_take_its_target_for_slow():
    assert post_many(Target(), 0.3, 0.3) == (64, 64)


def test_a_stall_at_the_start_does_not_make_the_usual_look_slow():
    """The first answers lay unread for nearly all their time; what comes after them is not slower."""

    async def play():
        policy = Policy(target_class=TargetClass.A, call_deadline=10, session_timeout=45)
        gate = make_gate(lambda: 0.5, policy, 64)
        calls, seen = make_calls(Target(takes=0.5), gate), []
        calls.line_up([make_call() for _ in range(2_000)])
        for _ in range(6):
            asyncio.get_running_loop().call_later(0.03, stall, 0.45)
            await asyncio.sleep(0.6)
            seen.append(gate.limit)
        await asyncio.sleep(20)
        assert seen == sorted(seen)
        assert gate.limit == 64

    virtual_time.run(play())


def test_a_target_that_gets_slow_under_many_calls_is_still_seen_between_stalls():
    class Overloaded(Target):
        on_it = 0

        async def send(self, request, before_write):
            self.on_it += 1
            self.takes = 0.05 if self.on_it <= 20 else 0.05 * (self.on_it - 19)
            try:
                return await super().send(request, before_write)
            finally:
                self.on_it -= 1

    limit, _ = post_many(Overloaded(), 0.3, 0.3)
    assert limit < 48

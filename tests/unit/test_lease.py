"""The lease: known only from statistics that prove an answered heartbeat, and dated before it."""

import json
import time
from types import SimpleNamespace

import pytest

from topics import group
from topics.cluster import KafkaSettings
from topics.group import GroupConsumer
from topics.lease import Lease, choose_sleepless_clock
from topics.reading import build_record


class Clock:
    def __init__(self):
        self.now = 100.0

    def __call__(self):
        return self.now


def report(age, heartbeats, tx, rx, *, waiting=0, join_state="steady", state="up"):
    coordinator = {"req": {"Heartbeat": heartbeats}, "tx": tx, "rx": rx, "waitresp_cnt": waiting, "outbuf_cnt": 0}
    group = {"state": state, "join_state": join_state}
    return json.dumps({"age": age * 1e6, "brokers": {"GroupCoordinator": coordinator}, "cgrp": group})


def test_nothing_is_known_at_first():
    assert Lease(Clock()).renewed_at == float("-inf")


def test_an_answered_heartbeat_is_dated_by_the_report_before_it():
    lease = Lease(Clock())
    lease.take_statistics(report(1.0, 0, 5, 5))
    lease.take_statistics(report(1.5, 1, 6, 6))
    assert lease.renewed_at == 101.0


def test_a_heartbeat_without_answer_renews_nothing():
    lease = Lease(Clock())
    lease.take_statistics(report(1.0, 0, 5, 5))
    lease.take_statistics(report(1.5, 1, 6, 5, waiting=1))
    assert lease.renewed_at == float("-inf")
    lease.take_statistics(report(2.0, 1, 6, 5))  # the connection broke: nothing waits any more, nothing was answered
    assert lease.renewed_at == float("-inf")


def test_a_slow_answer_is_dated_before_its_question():
    lease = Lease(Clock())
    lease.take_statistics(report(1.0, 0, 5, 5))
    lease.take_statistics(report(1.5, 1, 6, 5, waiting=1))
    lease.take_statistics(report(2.0, 1, 6, 6))
    assert lease.renewed_at == 101.0


def test_other_answers_renew_nothing():
    lease = Lease(Clock())
    lease.take_statistics(report(1.0, 3, 5, 5))
    lease.take_statistics(report(1.5, 3, 9, 9))
    assert lease.renewed_at == float("-inf")


def test_a_member_that_was_thrown_out_renews_nothing():
    lease = Lease(Clock())
    lease.take_statistics(report(1.0, 0, 5, 5))
    lease.take_statistics(report(1.5, 1, 6, 6, join_state="init"))
    assert lease.renewed_at == float("-inf")


def test_an_old_report_read_late_keeps_its_own_time():
    clock = Clock()
    lease = Lease(clock)
    lease.take_statistics(report(1.0, 0, 5, 5))
    clock.now = 500.0  # the process was frozen; the report below waited in the queue
    lease.take_statistics(report(1.5, 1, 6, 6))
    assert lease.renewed_at == 101.0


def test_assignment_begins_a_lease():
    clock = Clock()
    lease = Lease(clock)
    lease.begin()
    assert lease.renewed_at == 100.0


def test_where_heartbeats_have_no_name_the_nameless_requests_count():
    lease = Lease(Clock(), is_nameless=True)
    lease.take_statistics(report(1.0, 2, 5, 5, join_state="init"))
    lease.take_statistics(report(1.5, 4, 7, 7, join_state="init"))
    assert lease.renewed_at == 101.0, "named ones count as ever"
    lease.take_statistics(report(2.0, 4, 7, 7, join_state="init"))
    assert lease.renewed_at == 101.0
    lease.take_statistics(report(2.5, 4, 8, 8, join_state="init"))
    assert lease.renewed_at == 102.0
    lease.take_statistics(report(3.0, 4, 9, 8, join_state="init"))
    assert lease.renewed_at == 102.0, "not answered"


class Machine:
    """A machine whose clock stands still while it sleeps; a second clock goes on."""

    def __init__(self):
        self.awake, self.slept, self.set_ahead = 100.0, 0.0, 0.0

    def steady(self):
        return self.awake

    def sleepless(self):
        return self.awake + self.slept

    def time_of_day(self):
        return 1e9 + self.awake + self.slept + self.set_ahead


def follow(machine, lease, *, since, begin=100.0, heartbeats=1):
    """Two reports, half a second apart, each read as it is taken; the second proves a heartbeat."""
    for number in (heartbeats - 1, heartbeats):
        lease.take_statistics(report(since() - begin, number, 5 + number, 5 + number))
        machine.awake += 0.5
    machine.awake -= 0.5


def measure_age(machine, lease):
    return machine.steady() - lease.renewed_at


@pytest.mark.parametrize("is_sleepless", [True, False])
def test_a_lease_grows_old_while_the_machine_sleeps(is_sleepless):
    """Without the second clock (the control) it is as young as before."""
    machine = Machine()
    lease = Lease(machine.steady, machine.sleepless if is_sleepless else None)
    follow(machine, lease, since=machine.steady)
    machine.slept += 3600
    assert measure_age(machine, lease) == (3600.5 if is_sleepless else 0.5)


@pytest.mark.parametrize("is_sleepless", [True, False])
def test_an_assignment_before_the_sleep_is_no_fresh_lease_after_it(is_sleepless):
    machine = Machine()
    lease = Lease(machine.steady, machine.sleepless if is_sleepless else None)
    lease.begin()
    machine.slept += 3600
    assert measure_age(machine, lease) == (3600.0 if is_sleepless else 0.0)


def test_after_the_sleep_a_heartbeat_renews_it_as_ever():
    machine = Machine()
    lease = Lease(machine.steady, machine.sleepless)
    follow(machine, lease, since=machine.steady)
    machine.slept += 3600
    machine.awake += 0.5
    # These two were taken after it; the first still counts from before, for it may have been taken before.
    lease.take_statistics(report(machine.awake - 100, 2, 7, 7))
    assert measure_age(machine, lease) == 3600.5
    machine.awake += 0.5
    lease.take_statistics(report(machine.awake - 100, 3, 8, 8))
    assert measure_age(machine, lease) == 3600.5
    machine.awake += 0.5
    lease.take_statistics(report(machine.awake - 100, 4, 9, 9))
    assert measure_age(machine, lease) == 0.5


def test_a_report_that_waited_over_the_sleep_is_dated_before_it():
    machine = Machine()
    lease = Lease(machine.steady, machine.sleepless)
    follow(machine, lease, since=machine.steady)
    machine.awake += 1.0
    machine.slept += 3600
    for age, number in ((1.0, 2), (1.5, 3)):  # taken just before it, read after it
        lease.take_statistics(report(age, number, 5 + number, 5 + number))
    assert measure_age(machine, lease) == 3600.5


def test_where_the_client_counts_by_the_time_of_day_a_sleep_makes_the_lease_no_younger():
    machine = Machine()
    lease = Lease(machine.steady, machine.sleepless, machine.time_of_day)
    machine.slept += 3600
    machine.awake += 0.5
    follow(machine, lease, since=machine.time_of_day, begin=1e9 + 100.0)
    machine.awake += 60
    assert measure_age(machine, lease) == 60.5


@pytest.mark.parametrize("seconds", [3600.0, -3600.0])
def test_a_time_of_day_that_is_set_makes_the_lease_no_younger_and_is_got_over(seconds):
    machine = Machine()
    lease = Lease(machine.steady, machine.sleepless, machine.time_of_day)
    follow(machine, lease, since=machine.time_of_day, begin=1e9 + 100.0)
    machine.set_ahead += seconds
    for number in (2, 3, 4):
        machine.awake += 0.5
        lease.take_statistics(report(machine.time_of_day() - 1e9 - 100.0, number, 5 + number, 5 + number))
        assert measure_age(machine, lease) >= 0.5
    assert measure_age(machine, lease) == 0.5


def test_a_member_asks_the_clock_that_goes_on(monkeypatch):
    machine = Machine()
    monkeypatch.setattr(group.time, "monotonic", machine.steady)
    monkeypatch.setattr(group, "read_sleepless_time", machine.sleepless)
    member = GroupConsumer(
        KafkaSettings(), group="g", topics=["raw.stripe"], instance="i", transactional_id="t", build=build_record
    )
    member._lease.begin()
    machine.slept += 60
    assert machine.steady() - member.last_heartbeat == 60


@pytest.mark.skipif(not hasattr(time, "CLOCK_BOOTTIME"), reason="Linux only")
def test_on_linux_it_is_the_clock_since_boot():
    before = time.clock_gettime(time.CLOCK_BOOTTIME)
    now = choose_sleepless_clock("linux")()
    assert before <= now <= time.clock_gettime(time.CLOCK_BOOTTIME)


def test_each_system_has_its_clock_and_one_without_keeps_the_old():
    clocks = SimpleNamespace(CLOCK_BOOTTIME=time.CLOCK_REALTIME, CLOCK_MONOTONIC_RAW=time.CLOCK_MONOTONIC)
    chosen = [choose_sleepless_clock(platform, clocks) for platform in ("linux", "darwin")]
    assert [clock.args for clock in chosen] == [(time.CLOCK_REALTIME,), (time.CLOCK_MONOTONIC,)]
    unknown = SimpleNamespace(CLOCK_BOOTTIME=-9999)
    assert choose_sleepless_clock("linux", unknown) is choose_sleepless_clock("sunos", SimpleNamespace())
    assert choose_sleepless_clock("sunos", SimpleNamespace()) is time.monotonic

"""The lease: known only from statistics that prove an answered heartbeat, and dated before it."""

import json

from topics.lease import Lease


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

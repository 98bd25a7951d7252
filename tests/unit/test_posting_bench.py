"""The posting bench's server and input: what would be counted wrongly if they were wrong."""

import json

from bench.posting import build_event, is_refund, save
from bench.posting_plan import LATE_SHARE, REFUSED_SHARE, Plan, choose_plan
from bench.programs.posting_target import Books


def find_key(plan):
    return next(key for number in range(10_000) if choose_plan(key := f"key-{number}") is plan)


def write_body(kind="capture", name="pi_1", root="pi_1"):
    return json.dumps({"kind": kind, "object": name, "root": root}).encode()


def test_one_posting_in_ten_fails_at_first():
    plans = [choose_plan(f"key-{number}") for number in range(50_000)]
    assert abs(plans.count(Plan.REFUSED) / 50_000 - REFUSED_SHARE) < 0.005
    assert abs(plans.count(Plan.LATE) / 50_000 - LATE_SHARE) < 0.002


def test_a_refused_posting_is_not_applied_and_a_late_one_is():
    books = Books()
    refused, late = find_key(Plan.REFUSED), find_key(Plan.LATE)
    assert books.take(refused, write_body()) is Plan.REFUSED
    assert books.applied == 0
    assert books.take(refused, write_body()) is Plan.WELL
    assert books.take(late, write_body()) is Plan.LATE
    assert books.take(late, write_body()) is Plan.WELL
    assert (books.applied, books.replays, books.requests) == (2, 1, 4)


def test_other_bytes_and_early_refunds_are_seen():
    books, key = Books(), find_key(Plan.WELL)
    books.take(key, write_body("refund", "re_1"))
    books.take(key, write_body("refund", "re_2"))
    assert (books.early, books.wrong_bytes, books.replays) == (1, 1, 1)


def test_refunds_follow_their_capture_and_nothing_is_made_twice():
    events = [build_event("x", number) for number in range(100)]
    assert len({event.event_id for event in events}) == 100
    captures = {event.object_id: place for place, event in enumerate(events) if event.kind == "capture"}
    refunds = [(place, event) for place, event in enumerate(events) if event.kind == "refund"]
    assert [place for place, _ in refunds] == [place for place in range(100) if is_refund(place)]
    assert len(refunds) == 20
    for place, event in refunds:
        assert captures[event.root] < place
        assert event.patient == events[captures[event.root]].patient


def test_ratios_are_of_the_deliverer_to_the_loops(tmp_path):
    figures = {"deliverer": (500, 0.4), "aiohttp": (1000, 0.1), "httpx": (100, 2.0)}
    results = {name: {"posts_per_second": rate, "cpu_ms_per_post": cpu} for name, (rate, cpu) in figures.items()}
    save({"results": {"5ms": results}}, tmp_path / "out.json")
    assert json.loads((tmp_path / "out.json").read_text())["ratios"] == {
        "5ms_posts_vs_aiohttp": 0.5,
        "5ms_cpu_vs_aiohttp": 4.0,
        "5ms_posts_vs_httpx": 5.0,
        "5ms_cpu_vs_httpx": 0.2,
    }

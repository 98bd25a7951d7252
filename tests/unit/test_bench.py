"""The bench's own judgement: a wrong output must not get a number, and the arithmetic of the table is right."""

import argparse
import importlib.util
import io
import json
import re
import struct
from pathlib import Path

import fastavro
import msgspec
import pytest

from bench.codecs import list_decoders, list_writers
from bench.environments import read_java_parts
from bench.ground import BenchBroken
from bench.latency import describe_ages
from bench.meter import Mark, build_ratios, compare_marks, compare_threads, find_percentile
from bench.outputs import SCHEMA, Checker, WrongOutput, build_constant, parse_schema
from bench.plan import GUESSED_RATES, estimate_minutes, estimate_posting_minutes
from bench.profiler import sum_up, write_summary
from bench.programs.collected_worker import CollectorClock
from bench.programs.local_store import Runs
from bench.report import describe_command, judge, read_report, write_report
from bench.scenario import Run, Scenario, compare_shares, has_idle_process
from bench.scenarios import SCENARIOS
from bench.soak import describe_steps
from bench.trend import average_blocks, find_steps, fit_slope
from bench.webhooks import Traffic, expect_event, expect_headers, read_number
from schemas.events import MoneyEvent

PROGRAMS = Path(__file__).parents[2] / "bench" / "programs"
COUNT = 20
HOPS = [(number % 4, number // 4) for number in range(COUNT)]
TRAFFIC = Traffic(COUNT)
FRAME = struct.pack(">bI", 0, 7)


def build_checker():
    return Checker(TRAFFIC, HOPS, topic_id="topic", mapping_version="stripe/1/x", schema_id=7)


def build_records(change=lambda number, event: None, *, enriched=False):
    """What a contender without fault writes; ``change`` spoils an event before it is encoded."""
    records = []
    for number, (partition, offset) in enumerate(HOPS):
        event = expect_event(
            TRAFFIC.draw(number),
            hop=f"topic:{partition}:{offset}",
            mapping_version="stripe/1/x",
            enriched=enriched,
        )
        key, headers = event["root"].encode(), expect_headers(event)
        change(number, event)
        out = io.BytesIO()
        fastavro.schemaless_writer(out, parse_schema(), event)
        records.append((key, FRAME + out.getvalue(), headers))
    return records


def spoil(field, value, at=3):
    def change(number, event):
        if number == at:
            event[field] = value

    return change


@pytest.mark.parametrize("enriched", [False, True])
def test_the_right_output_passes(enriched):
    assert build_checker().check_events(build_records(enriched=enriched), enriched=enriched) == COUNT


@pytest.mark.parametrize(
    ("change", "complaint"),
    [
        (spoil("money", {"minor": 1, "currency": "USD", "exponent": 2}), "event 3 differs in money"),
        (spoil("event_id", "0" * 32), "event 3 differs in event_id"),
        (spoil("root", "north-card/pi_other"), "event 3 differs in root"),
        (spoil("origin", "topic:0:999"), "event 3 differs in origin"),
        (spoil("mrn", {"authority": "NORTH", "id_type": "MR", "value": "other"}), "event 3 differs in mrn"),
        (spoil("object_id", "pi_3Rb00000000000000000004"), "event 4 differs"),
        (spoil("object_id", "pi_3Rb00000000000000000099"), "event 99 was never sent"),
    ],
)
def test_a_wrong_event_fails_the_contender(change, complaint):
    with pytest.raises(WrongOutput, match=re.escape(complaint)):
        build_checker().check_events(build_records(change), enriched=False)


def test_an_event_without_its_mrn_fails_the_full_path():
    with pytest.raises(WrongOutput, match="differs in mrn"):
        build_checker().check_events(build_records(enriched=False), enriched=True)


def test_a_missing_and_a_repeated_event_fail_the_contender():
    records = build_records()
    with pytest.raises(WrongOutput, match="1 events are missing, event 5 first"):
        build_checker().check_events(records[:5] + records[6:], enriched=False)
    with pytest.raises(WrongOutput, match="event 5 came twice"):
        build_checker().check_events([*records, records[5]], enriched=False)


def test_a_wrong_key_header_or_frame_fails_the_contender():
    (key, value, headers), *rest = build_records()
    for spoilt in ((b"other", value, headers), (key, value, headers[1:]), (key, b"\0\0\0\0\x08" + value[5:], headers)):
        with pytest.raises(WrongOutput):
            build_checker().check_events([spoilt, *rest], enriched=False)


def test_a_copy_must_be_the_same_bytes():
    copies = []
    for number in range(COUNT):
        fact = TRAFFIC.draw(number)
        copies.append((fact.root.encode(), TRAFFIC.write_body(fact), []))
    assert build_checker().check_copies(copies) == COUNT
    key, value, headers = copies[2]
    copies[2] = (key, value.replace(b'"livemode":false', b'"livemode":true'), headers)
    with pytest.raises(WrongOutput, match="record 2 was changed"):
        build_checker().check_copies(copies)


def test_a_ready_made_event_is_written_once_for_each_record():
    constant = build_constant(TRAFFIC, "stripe/1/x", 7)
    records = [(TRAFFIC.draw(number).root.encode(), *constant) for number in range(COUNT)]
    assert build_checker().check_constants(records) == COUNT
    key, value, headers = records[4]
    for spoilt in ((key, value[:-1], headers), (key, value, headers[1:])):
        with pytest.raises(WrongOutput, match="record 4 is not the ready-made one"):
            build_checker().check_constants([*records[:4], spoilt, *records[5:]])
    with pytest.raises(WrongOutput, match="event 4 came twice"):
        build_checker().check_constants([*records, records[4]])
    with pytest.raises(WrongOutput, match="1 events are missing, event 4 first"):
        build_checker().check_constants(records[:4] + records[5:])


def test_a_ready_made_event_has_the_size_of_a_real_one():
    value, headers = build_constant(TRAFFIC, "stripe/1/x", 7)
    _, real, real_headers = build_records(enriched=True)[0]
    assert len(headers) == len(real_headers) == 11
    # A longer place: a topic's id has 22 characters, an offset up to six digits.
    longer = len(f"{'x' * 22}:0:100000") - len("topic:0:0")
    assert len(value) == len(real) + longer


def test_the_mapping_of_the_python_contenders_gives_the_expected_events():
    spec = importlib.util.spec_from_file_location("bench_canonical", PROGRAMS / "canonical.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    mapper = module.Mapper({"schema": str(SCHEMA), "schema_id": 7, "mapping_version": "stripe/1/x", "raw_id": "topic"})
    records = []
    for number, (partition, offset) in enumerate(HOPS):
        fact = TRAFFIC.draw(number)
        body = TRAFFIC.write_body(fact)
        records.append(mapper.map(body, TRAFFIC.write_headers(fact, body), partition, offset))
    assert build_checker().check_events(records, enriched=False) == COUNT


def test_a_webhook_is_json_of_the_size_it_claims_and_a_longer_log_begins_the_same():
    longer = Traffic(COUNT * 3)
    for number in range(COUNT):
        body = TRAFFIC.write_body(TRAFFIC.draw(number))
        assert body == longer.write_body(longer.draw(number))
        intent = json.loads(body)["data"]["object"]
        assert intent["amount"] == intent["amount_received"] == TRAFFIC.draw(number).minor
        assert read_number(intent["id"]) == number
        assert 1_150 <= len(body) <= 1_300
    assert Traffic(COUNT, seed=2).draw(0) != TRAFFIC.draw(0)


def test_rates_are_those_between_the_readings():
    first = Mark(10.0, 1_000, 2.0, 5.0, 0.5, {"a": 1.0, "b": 1.0}, others=7.0)
    last = Mark(12.0, 5_000, 2.2, 5.1, 0.5, {"a": 1.2, "b": 1.0, "c": 0.4}, others=7.5)
    assert compare_marks(first, last) == pytest.approx(
        {
            "events_per_second": 2_000,
            "cpu_per_million": 50,
            "broker_cpu_per_million": 25,
            "redis_cpu_per_million": 0,
            "foreign_cores": 0.25,
        }
    )
    assert compare_threads(first, last) == {"c": 100.0, "a": 50.0}
    with pytest.raises(ValueError, match="nothing happened"):
        compare_marks(last, last)


def test_percentiles_are_of_the_nearest_rank():
    values = [float(number) for number in range(1, 101)]
    assert find_percentile(values, 0.5) == 50
    assert find_percentile(values, 0.99) == 99
    assert find_percentile(values, 1.0) == 100
    assert find_percentile([7.0], 0.99) == 7
    with pytest.raises(ValueError, match="no values"):
        find_percentile([], 0.5)


def test_ratios_leave_out_contenders_without_a_result():
    results = {
        "full": {"cpu_per_million": 30.0, "whole_run": {"cpu_per_million": 33.0}},
        "mapping": {"cpu_per_million": 20.0, "whole_run": {"cpu_per_million": 22.0}},
        "kafka-streams": {"cpu_per_million": 25.0, "whole_run": {"cpu_per_million": 44.0}},
        "kafka-streams-documented": {"cpu_per_million": 40.0, "whole_run": {"cpu_per_million": 55.0}},
        "quixstreams": {"error": "WrongOutput"},
        "passthrough": {"cpu_per_million": 10.0, "whole_run": {"cpu_per_million": 11.0}},
    }
    assert build_ratios(results) == pytest.approx(
        {
            "cpu_per_event_vs_kafka_streams": 0.8,
            "cpu_per_event_vs_kafka_streams_whole_run": 0.5,
            "full_cpu_per_event_vs_kafka_streams": 1.2,
            "full_cpu_per_event_vs_kafka_streams_whole_run": 0.75,
            "cpu_per_event_vs_kafka_streams_documented": 0.5,
            "cpu_per_event_vs_kafka_streams_documented_whole_run": 0.4,
            "full_cpu_per_event_vs_kafka_streams_documented": 0.75,
            "full_cpu_per_event_vs_kafka_streams_documented_whole_run": 0.6,
            "passthrough_ratio": 3.0,
            "passthrough_ratio_whole_run": 3.0,
            "mapping_passthrough_ratio": 2.0,
            "mapping_passthrough_ratio_whole_run": 2.0,
        }
    )


def test_both_java_programs_run_on_the_same_kafka_streams():
    parts = read_java_parts()
    plain, documented = (
        {artifact.coordinate for artifact in parts[name].files}
        for name in ("kafka-streams", "kafka-streams-documented")
    )
    assert {one for one in plain if ".kafka:" in one} == {one for one in documented if ".kafka:" in one} != set()
    assert any(one.startswith("org.apache.avro:avro:") for one in documented)


def read_mark(events, cpu, shares=()):
    return Mark(float(events), events, cpu, 0.0, 0.0, shares=dict(shares))


def run_in_two():
    scenario = Scenario(
        name="two", title="", group="", command=lambda _ground, _arguments: [], transactional=True, processes=2
    )
    return Run(None, scenario)


def test_two_processes_count_only_while_both_have_work():
    start, warm, last, end = (read_mark(events, 0.0) for events in (0, 300, 550, 1000))
    window = run_in_two()._build_window(start, warm, last, end)
    assert (window.warm, window.last, window.end) == (warm, last, end)
    for unshared in ((None, None), (warm, None), (read_mark(301, 0.0), last)):
        with pytest.raises(BenchBroken, match="side by side"):
            run_in_two()._build_window(start, *unshared, end)


def test_a_process_is_idle_when_all_its_partitions_are_written():
    owners, ends = [frozenset({0, 2}), frozenset({1, 3})], dict.fromkeys(range(4), 10)
    assert not has_idle_process(owners, {0: 10, 1: 10, 2: 9, 3: 9}, ends)
    assert has_idle_process(owners, {0: 9, 1: 11, 2: 9, 3: 10}, ends)


def test_a_process_that_did_little_spoils_the_figures():
    warm = read_mark(0, 0.0, {1: 0.5, 2: 1.0, 3: 1.0})
    assert compare_shares(warm, read_mark(9, 0.0, {1: 0.6, 2: 5.0, 3: 4.0}), 2) == [4.0, 3.0]
    with pytest.raises(BenchBroken, match=r"not shared: 4\.0 CPU s, 0\.5 CPU s"):
        compare_shares(warm, read_mark(9, 0.0, {1: 0.5, 2: 5.0, 3: 1.5}), 2)
    with pytest.raises(BenchBroken, match="not shared"):
        compare_shares(warm, read_mark(9, 0.0, {2: 5.0}), 2)


def test_latency_is_told_with_and_without_what_everyone_pays():
    seen = {"canonical": [20.0, 30.0], "added": [15.0, 24.0], "raw": [5.0, 6.0]}
    figures = describe_ages(seen, 2)
    assert (figures["p50_ms"], figures["added_p99_ms"], figures["raw_max_ms"]) == (20.0, 24.0, 6.0)
    with pytest.raises(BenchBroken, match="1 of 2 events came"):
        describe_ages(seen | {"added": [15.0]}, 2)


def test_a_figure_is_judged_by_its_largest_or_smallest_allowed_value():
    assert judge(0.9, 1.0, 0.8) == "  floor 1 met  goal 0.8 MISSED"
    assert judge(0.9, 0.5, 1.0, least=True) == "  floor 0.5 met  goal 1 MISSED"
    assert judge(1.0, 1.0, None) == "  floor 1 met"


def test_a_report_is_read_as_it_was_written_and_a_broken_one_is_none(tmp_path):
    path = tmp_path / "results" / "latest.json"
    assert read_report(path) == {}
    write_report(path, {"results": {"full": 1.5}})
    assert read_report(path) == {"results": {"full": 1.5}}
    path.write_text("{")
    assert read_report(path) == {}


@pytest.mark.parametrize("out", [["--out", "/somewhere/else.json"], ["--out=/somewhere/else.json"]])
def test_a_report_names_no_place_of_its_machine(out):
    command = describe_command("bench.posting", ["--events", "3000", *out, "--no-entity"])
    assert command == "python -m bench.posting --events 3000 --no-entity"


def test_a_profile_is_summed_up_by_thread_and_function():
    folded = (
        "thread (1): MainThread;main (a.py:1);work (b.py:3) 3\n"
        "thread (1): MainThread;main (a.py:2);main (a.py:9) 1\n"
        "thread (2): kafka-x_0;poll (c.py:7) 2\n"
    )
    threads = sum_up(folded)
    assert set(threads) == {"MainThread", "kafka-x_0"}
    assert threads["MainThread"].total == 4
    assert threads["MainThread"].own == {"work (b.py)": 3, "main (a.py)": 1}
    assert threads["MainThread"].whole == {"main (a.py)": 4, "work (b.py)": 3}
    assert threads["kafka-x_0"].own == {"poll (c.py)": 2}


def test_a_profile_is_given_in_microseconds_an_event():
    summary = write_summary(
        "thread (1): MainThread;main (a.py:1) 400\n", events=100_000, cpu_per_million=25.0, threads={"python 0": 24.5}
    )
    assert "== MainThread: 20.0 us an event" in summary
    assert "   20.00  main (a.py)" in summary
    assert "   24.50  python 0" in summary


def test_a_profile_of_a_crowded_machine_is_scaled_to_the_cpu_of_its_threads():
    folded = "thread (1): MainThread;main (a.py:1) 300\nthread (2): kafka-x_0;poll (c.py:7) 100\n"
    threads = {"python 0": 8.0, "python 7": 2.0, "rdk:broker1": 3.0}
    summary = write_summary(folded, events=100_000, cpu_per_million=13.0, threads=threads)
    assert "the machine was busy" in summary
    assert "== MainThread: 7.5 us an event" in summary
    assert "== kafka-x_0: 2.5 us an event" in summary


def test_a_slope_is_that_of_the_line_and_its_interval_holds_it():
    exact = fit_slope([(0.0, 10.0), (1.0, 12.0), (2.0, 14.0), (3.0, 16.0)])
    assert (exact.value, exact.low, exact.high) == pytest.approx((2.0, 2.0, 2.0))
    # By hand: mean 1, residuals 1/6 -1/3 1/6, 12.7062 * sqrt((1/6) / 2) to each side.
    rough = fit_slope([(0.0, 1.0), (1.0, 1.0), (2.0, 2.0)])
    assert rough.value == pytest.approx(0.5)
    assert (rough.low, rough.high) == pytest.approx((0.5 - 3.66796, 0.5 + 3.66796), rel=1e-4)
    with pytest.raises(ValueError, match="three points"):
        fit_slope([(0.0, 1.0), (1.0, 1.0)])
    with pytest.raises(ValueError, match="one time"):
        fit_slope([(1.0, 1.0), (1.0, 2.0), (1.0, 3.0)])


def test_the_quantile_of_a_slope_is_that_of_students_t():
    # Slope 0 with residuals of one size: the reach divided by its standard error is the quantile. Tables give these.
    for count, quantile in ((4, 4.3027), (6, 2.7764), (12, 2.2281), (32, 2.0423)):
        points = [(float(number), (-1.0) ** (number + number // 2)) for number in range(count)]
        slope = fit_slope(points)
        mean = sum(value for _, value in points) / count
        middle = (count - 1) / 2
        spread = sum((at - middle) ** 2 for at, _ in points)
        errors = sum((value - mean - slope.value * (at - middle)) ** 2 for at, value in points)
        assert (slope.high - slope.value) / (errors / (count - 2) / spread) ** 0.5 == pytest.approx(quantile, rel=0.01)


def test_blocks_are_means_of_time_and_value():
    points = [(0.0, 1.0), (5.0, 3.0), (31.0, 10.0), (59.0, 20.0)]
    assert average_blocks(points, 30.0) == [(2.5, 2.0), (45.0, 15.0)]


def test_steps_are_rises_between_neighbours_and_come_with_the_backlog_of_their_time():
    assert find_steps([(0.0, 1.0), (1.0, 1.4), (2.0, 3.0), (3.0, 1.0)], 0.5) == [(2.0, pytest.approx(1.6))]
    readings = [
        {"at": at, "anon_mib": 10.0 if at < 90 else 12.0, "lag": lag}
        for at, lag in ((20.0, 9000.0), (40.0, 1.0), (70.0, 700.0), (100.0, 5.0), (130.0, 8000.0))
    ]
    assert describe_steps(readings) == [{"minute": pytest.approx(100 / 60), "mib": 2.0, "largest_lag": 700.0}]


def test_the_collector_is_charged_with_cpu_not_with_waiting_for_a_processor(monkeypatch):
    elapsed, used = iter((0.0, 5.0, 10.0, 11.0)), iter((0.0, 0.25, 1.0, 1.5))
    monkeypatch.setattr("bench.programs.collected_worker.time.perf_counter", lambda: next(elapsed))
    monkeypatch.setattr("bench.programs.collected_worker.time.thread_time", lambda: next(used))
    clock = CollectorClock()
    for _ in range(2):
        clock("start", {"generation": 1, "collected": 0, "uncollectable": 0})
        clock("stop", {"generation": 1, "collected": 3, "uncollectable": 0})
    assert clock.generations[1] == {"collections": 2, "seconds": 0.75, "longest": 5.0, "collected": 6}


def test_sorted_runs_keep_the_latest_entry_of_a_key(tmp_path):
    runs = Runs(str(tmp_path / "store"))
    runs.add([(b"b", b"1"), (b"a", b"1"), (b"b", b"2")])
    runs.add([(b"c", b"1"), (b"a", b"2")])
    runs.add([(b"b", b"3")])
    assert list(runs.merge()) == [(b"a", b"2"), (b"b", b"3"), (b"c", b"1")]


def test_the_codecs_that_are_compared_agree():
    fact = TRAFFIC.draw(0)
    body = TRAFFIC.write_body(fact)
    assert len(list_decoders(body)) == 7
    plain = expect_event(fact, hop="topic:0:0", mapping_version="stripe/1/x", enriched=True)
    event = msgspec.convert(plain, MoneyEvent)
    assert len(list_writers(event, plain)) == 5
    with pytest.raises(AssertionError):
        list_writers(event, plain | {"root": "another"})


def test_the_plan_grows_with_the_events_and_believes_the_last_run():
    options = argparse.Namespace(
        only=["full", "faust"], events=1_000_000, faust_events=20_000, latency_seconds=0, no_scaling=True, profile=False
    )
    first = estimate_minutes(options, {})
    fast = {"results": {"full": {"whole_run": {"events_per_second": 1e9}}}}
    assert estimate_minutes(options, fast) == pytest.approx(first - 1_000_000 / GUESSED_RATES["full"] / 60, rel=0.001)
    options.events = 2_000_000
    assert estimate_minutes(options, {}) > first * 1.5
    assert set(GUESSED_RATES) == {scenario.name for scenario in SCENARIOS}


def test_the_plan_of_posting_counts_every_contender_at_its_own_rate():
    options = argparse.Namespace(
        only=["httpx"], delays=[50], events=6_000, latency_seconds=0.0, no_entity=True, hours=1.0
    )
    slow, fast = (
        estimate_posting_minutes(options, {"results": {"50ms": {"httpx": {"posts_per_second": rate}}}})
        for rate in (50, 100)
    )
    assert slow - fast == pytest.approx(1.0)
    options.delays = [50, 50]
    assert estimate_posting_minutes(options, {}) > fast

"""Metrics: names known beforehand, labels bounded, and no call that stops the caller."""

import ast
import re
import threading
from pathlib import Path

import pytest
from prometheus_client.parser import text_string_to_metric_families

from telemetry.metrics import Kind, Metric, Metrics


def parse(metrics):
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(metrics.render().decode())
        for sample in family.samples
    }


def test_counts_show_in_the_text_format():
    metrics = Metrics(strict=True)
    metrics.count("raw_accepted_total", source="stripe", facility="north")
    metrics.add(Metric.RAW_ACCEPTED, 4, source="stripe", facility="north")
    metrics.set(Metric.WAITING, 7, source="stripe")
    metrics.observe(Metric.BATCH_SECONDS, 0.02, source="stripe")
    samples = parse(metrics)
    assert samples["remitstream_raw_accepted_total", (("facility", "north"), ("source", "stripe"))] == 5
    assert samples["remitstream_waiting_entries", (("source", "stripe"),)] == 7
    assert samples["remitstream_batch_seconds_bucket", (("le", "0.025"), ("source", "stripe"))] == 1
    assert samples["remitstream_batch_seconds_bucket", (("le", "0.01"), ("source", "stripe"))] == 0
    assert metrics.read(Metric.RAW_ACCEPTED, source="stripe", facility="north") == 5


WRONG = [
    ("no_such_total", {}),
    ("raw_accepted_total", {"source": "stripe"}),
    ("raw_accepted_total", {"source": "stripe", "facility": "north", "event": "evt_1"}),
    ("waiting_entries", {"source": "stripe"}),  # a gauge cannot be counted
]


@pytest.mark.parametrize(("name", "labels"), WRONG)
def test_misuse_is_counted_and_does_not_stop_the_caller(name, labels):
    metrics = Metrics()
    metrics.count(name, **labels)
    assert metrics.read(Metric.MISUSE, name=name) == 1
    with pytest.raises(ValueError, match=name):
        Metrics(strict=True).count(name, **labels)


@pytest.mark.parametrize(
    "value",
    [
        "evt_1234567890",
        "00419283",
        "a3f1c09be2d84f55",
        "x" * 65,
        "PID|1",
        "line\nbreak",
        "Ada's",
        "ü",
        "4242424242424242",
    ],
)
def test_ids_and_free_text_never_become_a_label(value):
    metrics = Metrics(strict=True)
    metrics.count("refused_total", source="stripe", reason=value)
    assert value not in metrics.render().decode()
    assert metrics.read(Metric.REFUSED, source="stripe", reason="other") == 1


def test_the_number_of_series_is_bounded():
    metrics = Metrics(strict=True, max_series=3)
    for number in range(10):
        metrics.count("mllp_repeats_total", feed=f"feed-{number}")
    assert metrics.read(Metric.MLLP_REPEATS, feed="feed-2") == 1
    assert metrics.read(Metric.MLLP_REPEATS, feed="feed-3") == 0
    assert metrics.read(Metric.MLLP_REPEATS, feed="other") == 7


def test_threads_lose_no_count():
    metrics = Metrics(strict=True)

    def work():
        for _ in range(500):
            metrics.count("refused_total", source="stripe", reason="stale")

    threads = [threading.Thread(target=work) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert metrics.read(Metric.REFUSED, source="stripe", reason="stale") == 2000


def test_every_metric_is_named_by_the_rules():
    names = [metric.value.name for metric in Metric]
    assert len(names) == len(set(names))
    for metric in Metric:
        spec = metric.value
        assert re.fullmatch(r"[a-z][a-z0-9_]*", spec.name)
        assert spec.help.endswith(".")
        assert spec.name.endswith("_total") == (spec.kind is Kind.COUNTER), spec.name
        assert spec.name.endswith("_seconds") or spec.kind is not Kind.HISTOGRAM
        forbidden = {"id", "mrn", "patient", "event_id", "offset", "amount", "partition"}
        assert not forbidden.intersection(spec.labels), spec.name


def test_every_metric_can_be_used_once():
    metrics = Metrics(strict=True)
    for metric in Metric:
        labels = dict.fromkeys(metric.value.labels, "x")
        {Kind.COUNTER: metrics.add, Kind.GAUGE: metrics.set, Kind.HISTOGRAM: metrics.observe}[metric.value.kind](
            metric, 1, **labels
        )
    samples = parse(metrics)
    for metric in Metric:
        name = f"remitstream_{metric.value.name}"
        assert any(found in {name, f"{name}_count"} for found, _ in samples), name


def find_counts(source):
    """Every call of something named count with a literal name and labels."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Call) and node.args and isinstance(node.args[0], ast.Constant):
            function = node.func.attr if isinstance(node.func, ast.Attribute) else getattr(node.func, "id", "")
            if function in {"count", "_count"} and re.fullmatch(r"[a-z_]{3,}", str(node.args[0].value)):
                yield node.args[0].value.removesuffix("_total"), frozenset(keyword.arg for keyword in node.keywords)


def test_every_metric_counted_by_name_in_our_code_exists_with_these_labels():
    root = Path(__file__).parents[2]
    known = {(m.value.name.removesuffix("_total"), frozenset(m.value.labels)) for m in Metric}
    used = {
        (str(path.relative_to(root)), *call)
        for folder in ("sources", "streams", "sinks", "clients", "topics", "runtime")
        for path in (root / folder).rglob("*.py")
        for call in find_counts(path.read_text("utf-8"))
    }
    assert {(path, name, labels) for path, name, labels in used if (name, labels) not in known} == set()


def test_that_search_finds_calls():
    source = 'self._count("refused_total", source=x, reason="r")\nfeeder.count("pauses", reason=y)\n"a".count("b")'
    assert set(find_counts(source)) == {("refused", frozenset({"source", "reason"})), ("pauses", frozenset({"reason"}))}


def test_the_ending_total_may_be_left_out():
    metrics = Metrics(strict=True)
    metrics.count("refused", source="stripe", reason="stale")
    assert metrics.read(Metric.REFUSED, source="stripe", reason="stale") == 1

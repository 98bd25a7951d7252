"""Every metric of ours: name, help, labels, kind; counted over prometheus-client.

Labels are bounded: connector names, facilities, reasons; never an id, an amount or text from a payload. A label value
that does not look like a name, or one too many, is counted as ``other``. A wrong metric name or label does not stop the
caller: it is counted in ``metric_misuse_total`` (tests make it raise).
"""

from __future__ import annotations

import re
import threading
from dataclasses import dataclass
from enum import Enum, StrEnum
from typing import Protocol

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram, generate_latest
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

PREFIX = "remitstream_"
OTHER = "other"
MAX_SERIES = 1000
"""Label combinations of one metric; further ones are counted under ``other``."""

CONTENT_TYPE = CONTENT_TYPE_PLAIN_0_0_4
_BATCH = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.0, 3.0, 5.0, 10.0)
_CALL = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_LABEL = re.compile(r"[A-Za-z0-9_.:^ -]{0,64}\Z")
_IDENTIFIER = re.compile(r"\d{6,}|[0-9a-f]{16,}")


class Kind(StrEnum):
    """Kinds of metric."""

    COUNTER = "counter"
    GAUGE = "gauge"
    HISTOGRAM = "histogram"


@dataclass(frozen=True, slots=True)
class Spec:
    """One metric. ``buckets`` (seconds) only for histograms."""

    name: str
    help: str
    kind: Kind
    labels: tuple[str, ...] = ()
    buckets: tuple[float, ...] = ()


def _counter(name: str, text: str, *labels: str) -> Spec:
    return Spec(name, text, Kind.COUNTER, labels)


def _gauge(name: str, text: str, *labels: str) -> Spec:
    return Spec(name, text, Kind.GAUGE, labels)


def _seconds(name: str, text: str, *labels: str, buckets: tuple[float, ...] = _CALL) -> Spec:
    return Spec(name, text, Kind.HISTOGRAM, labels, buckets)


class Metric(Enum):
    """All metrics. The exposed name has the prefix ``remitstream_``."""

    # Edge: receiver and listener.
    RAW_ACCEPTED = _counter("raw_accepted_total", "Raw records durably written.", "source", "facility")
    REFUSED = _counter("refused_total", "Deliveries refused; nothing was published.", "source", "reason")
    REDACTIONS = _counter("redactions_total", "Card data replaced at the edge before publishing.", "source", "kind")
    MLLP_MESSAGES = _counter("mllp_messages_total", "HL7 messages received, by the answer given.", "feed", "answer")
    MLLP_REPEATS = _counter("mllp_repeats_total", "Repeated MSH-10 with equal bytes, answered again.", "feed")
    MLLP_FRAMING = _counter("mllp_framing_errors_total", "Connections closed for broken framing.", "reason")
    # Streams.
    RECORDS = _counter("records_total", "Raw records decided, by fate.", "source", "fate", "reason")
    BATCH_SECONDS = _seconds("batch_seconds", "Time of one batch from read to commit.", "source", buckets=_BATCH)
    BATCH_RECORDS = _gauge("batch_records", "Records of the last batch.", "source")
    ABORTS = _counter("transactions_rolled_back_total", "Transactions aborted and read again.", "role", "reason")
    WAITING = _gauge("waiting_entries", "Records on hold for a patient or a parent.", "source")
    WAITING_AGE = _gauge("waiting_oldest_seconds", "Age of the oldest record on hold.", "source")
    RELEASED = _counter("released_total", "Records that left the waiting room.", "source", "reason")
    REVIEWS = _counter("reviews_total", "Records a person must decide.", "source", "reason")
    PAUSED = _gauge("worker_paused", "1 while paused for this reason.", "role", "reason")
    DEAD_LETTERS = _counter("dead_letters_total", "Dead letters written.", "stage", "code")
    # Identity.
    PROJECTION_BEHIND = _gauge("projection_behind", "Records of `patients` the projection in Redis has not applied.")
    PROJECTION_APPLIED = _counter("projection_applied_total", "Records of `patients` applied to Redis.")
    PROJECTION_REPLAYS = _counter("projection_replays_total", "Replays after Redis lost data.", "reason")
    IDENTITY_LOOKUPS = _counter("identity_lookups_total", "Patient look-ups, by result.", "result")
    IDENTITY_SECONDS = _seconds("identity_seconds", "Time of one look-up of a batch.", buckets=_BATCH)
    # Sinks.
    DELIVERIES = _counter("deliveries_total", "Outcomes at a target.", "target", "outcome")
    ATTEMPTS = _counter("attempts_total", "Calls to a target, by failure kind (`ok` for none).", "target", "kind")
    ATTEMPT_SECONDS = _seconds("attempt_seconds", "Time of one call to a target.", "target")
    OPEN_ATTEMPTS = _gauge("open_attempts", "Ledger entries not done.", "target", "state")
    TARGET_OPEN = _gauge("target_available", "1 while calls to the target are allowed.", "target")
    CALL_LIMIT = _gauge("call_limit", "Calls that may be under way at a target at once, as it bears them.", "target")
    # Everything.
    UP = _gauge("ready", "1 while this process says that it is ready.")
    MISUSE = _counter("metric_misuse_total", "Calls with an unknown metric or wrong labels.", "name")


class Count(Protocol):
    """The shape of hook that sources and sinks take: ``count("refused_total", source="stripe", reason="stale")``."""

    def __call__(self, name: str, /, **labels: str) -> None:
        """Count one."""


class Metrics:
    """The metrics of one process. Thread-safe; no call raises unless ``strict``."""

    def __init__(self, *, strict: bool = False, max_series: int = MAX_SERIES) -> None:
        self._strict = strict
        self._max_series = max_series
        self._registry = CollectorRegistry(auto_describe=False)
        self._lock = threading.Lock()
        self._series: dict[str, set[tuple[str, ...]]] = {}
        self._specs: dict[str, Spec] = {}
        self._collectors: dict[str, Counter | Gauge | Histogram] = {}
        for metric in Metric:
            spec = metric.value
            self._specs[spec.name] = spec
            self._series[spec.name] = set()
            self._collectors[spec.name] = self._build(spec)

    def count(self, name: str, /, **labels: str) -> None:
        """Count one. This method has the shape ``Count``."""
        self.add(name, 1, **labels)

    def add(self, metric: str | Metric, amount: float, /, **labels: str) -> None:
        """Add to a counter."""
        child = self._find(metric, Kind.COUNTER, labels)
        if isinstance(child, Counter):
            child.inc(amount)

    def set(self, metric: str | Metric, value: float, /, **labels: str) -> None:
        """Set a gauge."""
        child = self._find(metric, Kind.GAUGE, labels)
        if isinstance(child, Gauge):
            child.set(value)

    def observe(self, metric: str | Metric, seconds: float, /, **labels: str) -> None:
        """Record a duration."""
        child = self._find(metric, Kind.HISTOGRAM, labels)
        if isinstance(child, Histogram):
            child.observe(seconds)

    def read(self, metric: str | Metric, /, **labels: str) -> float:
        """Value of a counter or gauge, 0 when it was never touched; for tests, readiness and the live view."""
        spec = self._specs[metric if isinstance(metric, str) else metric.value.name]
        return self._registry.get_sample_value(PREFIX + spec.name, labels) or 0.0

    def render(self) -> bytes:
        """All metrics in the Prometheus text format 0.0.4."""
        return generate_latest(self._registry)

    def _build(self, spec: Spec) -> Counter | Gauge | Histogram:
        name = PREFIX + spec.name
        if spec.kind is Kind.COUNTER:
            return Counter(name, spec.help, spec.labels, registry=self._registry)
        if spec.kind is Kind.GAUGE:
            return Gauge(name, spec.help, spec.labels, registry=self._registry)
        return Histogram(name, spec.help, spec.labels, registry=self._registry, buckets=spec.buckets)

    def _find(self, metric: str | Metric, kind: Kind, labels: dict[str, str]) -> Counter | Gauge | Histogram | None:
        name = metric if isinstance(metric, str) else metric.value.name
        if name not in self._specs and f"{name}_total" in self._specs:
            name = f"{name}_total"  # the ending belongs to the exposed format; callers may leave it out
        spec = self._specs.get(name)
        if spec is None or spec.kind is not kind or set(labels) != set(spec.labels):
            self._report_misuse(name, labels)
            return None
        collector = self._collectors[name]
        if not spec.labels:
            return collector
        values = tuple(_bound(labels[label]) for label in spec.labels)
        with self._lock:
            known = self._series[name]
            if values not in known:
                if len(known) >= self._max_series:
                    values = (OTHER,) * len(values)
                known.add(values)
        return collector.labels(*values)

    def _report_misuse(self, name: str, labels: dict[str, str]) -> None:
        if self._strict:
            raise ValueError(f"no metric {name} with labels {sorted(labels)}")
        misuse = self._collectors[Metric.MISUSE.value.name]
        if isinstance(misuse, Counter):
            misuse.labels(name if re.fullmatch(r"[a-z_]{1,40}", name) else OTHER).inc()


def _bound(value: object) -> str:
    """A label value that can only be a name; ids, long numbers and free text become ``other``."""
    text = str(value)
    return text if _LABEL.match(text) and not _IDENTIFIER.search(text) else OTHER


METRICS = Metrics()
"""The metrics of this process, as its health endpoint shows them."""

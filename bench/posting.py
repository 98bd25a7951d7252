"""Run the posting bench: ``python -m bench.posting``. Prints a table, writes ``bench/results/posting.json``.

One shipped deliverer process (``remitstream deliver``, ledger and order, class A) beside a bare aiohttp loop and a
plain httpx loop, one after the other against the same local server, each with the same requests and 64 connections.
One posting in ten fails at first: 9.5 % with 503, 0.5 % applied and answered after the caller has given up.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka import Producer
from rich.console import Console
from rich.table import Table

from bench.ground import PARTITIONS, ROOT, BenchBroken, Ground, find_free_port
from bench.meter import Mark, Meter, compare_marks, compare_threads, find_percentile
from bench.one_entity import measure_one_entity
from bench.plan import estimate_posting_minutes
from bench.posting_plan import LATE_SHARE, REFUSED_SHARE, Plan, choose_plan
from bench.profiler import sample, write_summary
from bench.report import QUIET_CORES, describe_machine, describe_plan, judge, read_report, write_report
from bench.webhooks import BORN, FACILITIES, TENANT, Traffic, write_mrn
from runtime.settings import read_settings
from schemas.events import DeliveryOutcome, MoneyEvent, Reference
from schemas.keys import build_event_id
from schemas.money import Money
from schemas.wire import Decoder, Encoder
from sinks import catalog as targets
from sinks.contract import PostingContext
from topics import catalog, provision
from topics.reading import Record, read_to_end
from topics.registry import Registry, find_ids, register_schemas

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from runtime.settings import Settings

RESULTS = Path(__file__).with_name("results")
CONNECTIONS = 64
DEADLINE = 1.0
"""Seconds of a call."""
LATE = 1.5
"""Seconds until a late answer."""
PATIENTS = 500
REFUND_EVERY = 5
"""Each fifth event refunds the capture four before it."""
FROM, TO = 0.2, 0.9
"""The part of the postings on which rates and CPU rest: before it all warms up, after it the last retries wait."""
CONTENDERS = ("deliverer", "aiohttp", "httpx")
_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))

LIMITS = {
    "50ms_posts_vs_aiohttp": (0.5, 0.8),
    "5ms_posts_vs_httpx": (3.0, None),
    "5ms_posts_vs_aiohttp": (None, 0.28),
}
"""Smallest value of the floor and of the goal."""


def main() -> int:
    """Exit code: 0 when every contender posted everything exactly once, 1 otherwise."""
    options = parse_options()
    console = Console(width=140)
    report: dict[str, Any] = describe_machine("bench.posting", options.events) | {
        "connections": CONNECTIONS,
        "failing": {"refused_503": REFUSED_SHARE, "answered_late": LATE_SHARE},
        "results": {},
    }
    report["planned_minutes"] = estimate_posting_minutes(options, read_report(RESULTS / "posting.json"))
    console.print(describe_plan(report))
    if not options.no_entity:
        report["one_entity"] = measure_one_entity(options.hours)
        console.print(f"one entity: {report['one_entity']}", markup=False)
    with contextlib.ExitStack() as stack:
        if options.delays:
            ground = stack.enter_context(Ground(Traffic(1), patients=PATIENTS))
            for delay in options.delays:
                measure_delay(ground, delay, options, report, console)
        report["load_at_end"] = [round(value, 2) for value in os.getloadavg()]
        save(report, options.out)
    print_table(console, report)
    console.print(f"written: {options.out}")
    found = [figures for results in report["results"].values() for figures in results.values()]
    return 1 if any("error" in figures for figures in found) else 0


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.posting", description="Benchmark of the deliverer.")
    parser.add_argument("--events", type=int, default=20_000, help="postings of each run (default 20000)")
    parser.add_argument("--delays", type=int, nargs="*", default=[50, 5], help="answer times in ms (default 50 5)")
    parser.add_argument("--only", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--latency-seconds", type=float, default=15.0, help="of the runs at a steady rate; 0: none")
    parser.add_argument("--hours", type=float, default=1.0, help="virtual time for which one entity fails")
    parser.add_argument("--no-entity", action="store_true", help="leave that out")
    parser.add_argument("--profile", action="store_true", help="profile the deliverer too, in runs of their own")
    parser.add_argument("--out", type=Path, default=RESULTS / "posting.json")
    options = parser.parse_args()
    if not 1_000 <= options.events <= 500_000 or not 0 <= options.latency_seconds <= 120 or not 0 < options.hours <= 10:
        parser.error("--events is 1000 to 500000, --latency-seconds 0 to 120, --hours above 0 to 10")
    return options


def measure_delay(
    ground: Ground, delay: int, options: argparse.Namespace, report: dict[str, Any], console: Console
) -> None:
    """All contenders against one answer time, then the ones that can at half of the deliverer's rate."""
    results = report["results"].setdefault(f"{delay}ms", {})

    def attempt(name: str, key: str, **how: Any) -> None:
        try:
            figures = Trial(ground, f"{name}-{delay}-{key}".replace("_", "-"), delay, **how).execute(name)
        except BenchBroken as error:
            figures = {"error": str(error)}
            console.print(f"{name} {delay} ms: {error}", style="red", markup=False)
        console.print(f"{name} {delay} ms {key}: {figures}", markup=False)
        if key == "full":
            results[name] = figures
        elif key == "steady":
            results[name]["steady"] = figures
        save(report, options.out)

    for name in options.only:
        attempt(name, "full", events=options.events)
    ours = results.get("deliverer", {}).get("posts_per_second")
    if ours and options.latency_seconds:
        rate = ours / 2
        for name in options.only:
            # Who cannot keep up only shows how long the line was.
            if results[name].get("posts_per_second", 0) > rate * 1.2:
                attempt(name, "steady", events=max(100, int(rate * options.latency_seconds)), rate=rate)
    if options.profile:
        path = options.out.parent / f"profile-posting-{delay}ms.txt"
        attempt("deliverer", "profile", events=options.events, profile=path)


class Trial:
    """One contender once, on fresh topics and a fresh server."""

    def __init__(
        self, ground: Ground, name: str, delay: int, *, events: int, rate: float = 0.0, profile: Path | None = None
    ) -> None:
        self._ground = ground
        self._name = name
        self._delay = delay
        self._rate = rate
        self._profile = profile
        self._port = find_free_port()
        ground.wipe()
        self._settings = self._write_settings()
        provision.apply(self._settings.kafka, self._settings.topics, partitions=PARTITIONS, embedded=True)
        self._registry = Registry(self._settings.registry)
        register_schemas(self._registry, self._settings.topics)
        self._events = [build_event(name, number) for number in range(events)]
        self._requests = self._freeze()

    def execute(self, contender: str) -> dict[str, Any]:
        """Figures. Raises ``BenchBroken`` when anything is not posted exactly once."""
        plan = {"port": self._port, "delay": self._delay / 1000, "late": LATE}
        server = self._ground.start(
            [sys.executable, "-m", "bench.programs.posting_target", json.dumps(plan)], pipe=True
        )
        assert server.stdout is not None
        if server.stdout.readline() != b"ready\n":
            raise BenchBroken(f"the server does not start:\n{self._ground.read_log(server)}")
        try:
            return self._run_deliverer() if contender == "deliverer" else self._run_loop(contender)
        finally:
            server.kill()
            server.wait()

    # ---------------------------------------------------------------- input

    def _write_settings(self) -> Settings:
        path = self._ground.folder / f"{self._name}.toml"
        text = (ROOT / "bench" / "deployment.toml").read_text("utf-8")
        text += f"""
[connectors]
targets = "{ROOT / "bench" / "targets"}"

[[targets]]
name = "{self._name}"
connector = "bench_books"
facilities = ["north", "harbor"]
environment = "simulator"
simulator_url = "http://127.0.0.1:{self._port}"
call_deadline_seconds = {DEADLINE}
connections = {CONNECTIONS}
"""
        path.write_text(text, "utf-8")
        overrides = self._ground.overrides | {"health.deliverer": str(find_free_port())}
        return read_settings(path, overrides.items())

    def _freeze(self) -> dict[str, str]:
        """Event id by key; the requests as the connector makes them go to a file for the loops."""
        settings = self._settings.targets[0]
        target = targets.load("bench_books", self._settings.connectors.targets)
        keys, lines = {}, []
        for event in self._events:
            assert event.mrn is not None
            context = PostingContext(self._settings.tenancy.get_facility(event.facility), event.mrn, BORN * 1000)
            request = target.freeze(event, context, settings)
            keys[request.control_id] = event.event_id
            lines.append(
                json.dumps({"url": request.url, "headers": dict(request.headers), "body": request.body.decode()})
            )
        self._file = self._ground.folder / f"{self._name}.requests"
        self._file.write_text("\n".join(lines) + "\n", "utf-8")
        return keys

    def _produce(self) -> float:
        """All canonical events, at the rate when there is one. When the first was due, in steady seconds."""
        encoder = Encoder("money_event", find_ids(self._registry, self._settings.topics)["payments-value"])
        producer = Producer(
            {"bootstrap.servers": self._ground.bootstrap, "partitioner": "murmur2_random", "acks": "all"}
            | {"linger.ms": 2 if self._rate else 20, "queue.buffering.max.messages": 600_000, "log_level": 2}
        )
        records = [(encoder.encode(event), f"{event.account}/{event.root}".encode(), event) for event in self._events]
        began = time.monotonic()
        for number, (value, key, event) in enumerate(records):
            if self._rate and (wait := began + number / self._rate - time.monotonic()) > 0:
                time.sleep(wait)
            producer.produce(catalog.PAYMENTS, value, key, headers=[("event_id", event.event_id.encode())])
            producer.poll(0)
        if producer.flush(60):
            raise BenchBroken("canonical events could not be written")
        return began

    # ---------------------------------------------------------------- contenders

    def _run_deliverer(self) -> dict[str, Any]:
        command = [sys.executable, "-m", "runtime.cli", "deliver", self._name, *self._settings.list_arguments()]
        began = 0.0 if self._rate else self._produce()
        process = self._ground.start(command)
        try:
            self._await_ready(process)
            found: list[float] = []
            sender = threading.Thread(target=lambda: found.append(self._produce()))
            if self._rate:
                sender.start()
            figures = self._watch(process)
            if self._rate:
                sender.join()
                began = found[0]
            self._await_outcomes(process)
            self._ground.stop(process)
        finally:
            self._ground.stop(process)
        return figures | self._judge(began, ordered=True)

    def _run_loop(self, library: str) -> dict[str, Any]:
        given = {
            "library": library,
            "requests": str(self._file),
            "connections": CONNECTIONS,
            "deadline": DEADLINE,
            "rate": self._rate,
        }
        process = subprocess.Popen(
            [sys.executable, "-m", "bench.programs.posting_loop", json.dumps(given)],
            cwd=ROOT,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
        )
        assert process.stdin is not None
        assert process.stdout is not None
        try:
            if process.stdout.readline() != b"ready\n":
                raise BenchBroken(f"{library} does not start")
            process.stdin.write(b"go\n")
            process.stdin.flush()
            began = float(process.stdout.readline())
            figures = self._watch(process)
            if process.stdout.readline() != b"done\n":
                raise BenchBroken(f"{library} did not finish")
        finally:
            process.kill()
            process.wait()
        return figures | self._judge(began, ordered=False)

    # ---------------------------------------------------------------- measuring

    def _watch(self, process: subprocess.Popen[bytes]) -> dict[str, Any]:
        """Until everything is applied; rate and CPU between two readings."""
        meter = Meter([process.pid])
        count = len(self._events)
        first: Mark | None = None
        last: Mark | None = None
        until = time.monotonic() + 120 + count / 50
        with contextlib.ExitStack() as stack:
            folded = self._ground.folder / f"{self._name}.folded"
            sampling: Callable[[], None] | None = None
            while (applied := self._ask("counts")["applied"]) < count:
                if process.poll() is not None:
                    log = self._ground.read_log(process) if self._name.startswith("deliverer") else ""
                    raise BenchBroken(f"it ended after {applied} of {count}\n{log}")
                if time.monotonic() > until:
                    raise BenchBroken(f"only {applied} of {count} in time")
                if first is None and applied >= count * FROM:
                    if self._profile is not None:
                        sampled = stack.enter_context(contextlib.ExitStack())
                        sampled.enter_context(sample(process.pid, folded))
                        sampling = sampled.close
                        applied = self._ask("counts")["applied"]
                    first = self._ground.read_mark(meter, applied)
                if first is not None and last is None and applied >= count * TO:
                    last = self._ground.read_mark(meter, applied)
                    if sampling is not None:
                        sampling()
                time.sleep(0.05)
        if first is None or last is None:
            raise BenchBroken("too fast to measure: more events are needed")
        rates = compare_marks(first, last)
        if self._profile is not None:
            threads = compare_threads(first, last)
            events = last.events - first.events
            summary = write_summary(
                folded.read_text("utf-8"), events=events, cpu_per_million=rates["cpu_per_million"], threads=threads
            )
            self._profile.write_text(summary, "utf-8")
        return {
            "events": count,
            "posts_per_second": round(rates["events_per_second"], 1),
            "cpu_ms_per_post": round(rates["cpu_per_million"] / 1000, 4),
            "broker_cpu_ms_per_post": round(rates["broker_cpu_per_million"] / 1000, 4),
            "foreign_cores": round(rates["foreign_cores"], 2),
            "threads_cpu_us_per_post": compare_threads(first, last),
            "peak_rss_mib": round(meter.peak_rss / 2**20),
            "load": round(os.getloadavg()[0], 2),
        }

    def _ask(self, what: str) -> dict[str, Any]:
        with _DIRECT.open(f"http://127.0.0.1:{self._port}/{what}", timeout=30) as answer:
            told: dict[str, Any] = json.loads(answer.read())
        return told

    def _await_ready(self, process: subprocess.Popen[bytes]) -> None:
        if self._rate:
            self._ground.await_ready(process, self._settings.health.deliverer)

    def _read_outcomes(self) -> Iterator[DeliveryOutcome]:
        decoder = Decoder("delivery_outcome", DeliveryOutcome, self._registry.find_schema)
        for item in read_to_end(self._settings.kafka, catalog.DELIVERIES):
            if isinstance(item, Record) and item.value is not None:
                yield decoder.decode(item.value)

    def _await_outcomes(self, process: subprocess.Popen[bytes]) -> None:
        """Every event is once `posted` in `deliveries`, and nothing else is told at last."""
        until = time.monotonic() + 60
        while True:
            told = list(self._read_outcomes())
            posted = Counter(outcome.event_id for outcome in told if str(outcome.outcome) == "posted")
            if len(posted) == len(self._events) or time.monotonic() > until or process.poll() is not None:
                break
            time.sleep(1)
        last = {outcome.event_id: str(outcome.outcome) for outcome in told}
        wanted = {event.event_id for event in self._events}
        if set(posted) != wanted or set(posted.values()) != {1} or set(last.values()) != {"posted"}:
            raise BenchBroken(
                f"outcomes are wrong: {Counter(last.values())} of {len(wanted)}, "
                f"{sum(number > 1 for number in posted.values())} posted twice\n{self._ground.read_log(process)}"
            )

    def _judge(self, began: float, *, ordered: bool) -> dict[str, Any]:
        counts = self._ask("counts")
        times: dict[str, float] = self._ask("times")
        if times.keys() != self._requests.keys() or counts["applied"] != len(times) or counts["wrong_bytes"]:
            raise BenchBroken(f"not every event is posted once: {counts} of {len(self._requests)}")
        if ordered and counts["early"]:
            raise BenchBroken(f"{counts['early']} refunds before their capture")
        figures: dict[str, Any] = {"server": counts}
        if self._rate:
            late = [(times[key] - began - number / self._rate) * 1000 for number, key in enumerate(self._requests)]
            well = self._list_well()
            for name, values in (("", late), ("undisturbed_", [late[number] for number in well])):
                values.sort()
                figures |= {
                    f"{name}p50_ms": round(find_percentile(values, 0.5), 1),
                    f"{name}p99_ms": round(find_percentile(values, 0.99), 1),
                }
            figures["rate"] = round(self._rate, 1)
        return figures

    def _list_well(self) -> list[int]:
        """Numbers of events that are not planned to fail, nor their capture."""
        plans = [choose_plan(key) for key in self._requests]
        return [
            number
            for number, plan in enumerate(plans)
            if plan is Plan.WELL and (not is_refund(number) or plans[number - REFUND_EVERY + 1] is Plan.WELL)
        ]


def is_refund(number: int) -> bool:
    """Whether that event is a refund."""
    return number % REFUND_EVERY == REFUND_EVERY - 1


def build_event(name: str, number: int) -> MoneyEvent:
    """Captures, each of an entity of its own, and refunds of some."""
    refund = is_refund(number)
    root = f"pi_{name}_{number - REFUND_EVERY + 1 if refund else number:08d}"
    object_id = f"re_{name}_{number:08d}" if refund else root
    patient = (number - REFUND_EVERY + 1 if refund else number) % PATIENTS
    facility = FACILITIES[patient % 2]
    key = f"stripe:{facility}:{object_id}"
    reference = Reference(facility.upper(), "MR", write_mrn(patient))
    return MoneyEvent(
        event_id=build_event_id(key),
        transaction_key=key,
        tenant=TENANT,
        facility=facility,
        source="stripe",
        account=f"{facility}-card",
        kind="refund" if refund else "capture",
        status="succeeded",
        money=Money(100 + number % 1000, "USD", 2),
        occurred_at=BORN * 1000 + number,
        received_at=BORN * 1000 + number,
        object_id=object_id,
        root=root,
        source_event_id=f"evt_{object_id}",
        patient=reference,
        mrn=reference,
        mapping_version="bench",
        origin=f"bench:0:{number}",
    )


def save(report: dict[str, Any], out: Path) -> None:
    """Write what is known so far, with the comparisons the budgets speak of."""
    ratios: dict[str, float] = {}
    for delay, results in report["results"].items():
        ours = results.get("deliverer", {})
        for other in CONTENDERS[1:]:
            theirs = results.get(other, {})
            if "posts_per_second" in ours and "posts_per_second" in theirs:
                ratios[f"{delay}_posts_vs_{other}"] = round(ours["posts_per_second"] / theirs["posts_per_second"], 3)
                ratios[f"{delay}_cpu_vs_{other}"] = round(ours["cpu_ms_per_post"] / theirs["cpu_ms_per_post"], 3)
    report["ratios"] = ratios
    write_report(out, report)


def print_table(console: Console, report: dict[str, Any]) -> None:
    """All figures for people."""
    table = Table(title=f"Posting, {CONNECTIONS} connections, 10 % fail at first ({report['commit'][:12]})")
    table.add_column("answer time, contender")
    for name in ("posts/s", "CPU ms/post", "broker", "peak MiB", "at rate", "p50 ms", "p99 ms", "p99 undisturbed"):
        table.add_column(name, justify="right")
    table.add_column("others, cores", justify="right")
    for delay, results in report["results"].items():
        for name, figures in results.items():
            if "error" in figures:
                table.add_row(f"{delay} {name}", *["failed"] * 9)
                continue
            steady = figures.get("steady", {})
            names = ("rate", "p50_ms", "p99_ms", "undisturbed_p99_ms")
            table.add_row(
                f"{delay} {name}",
                f"{figures['posts_per_second']:.0f}",
                f"{figures['cpu_ms_per_post']:.3f}",
                f"{figures['broker_cpu_ms_per_post']:.3f}",
                f"{figures['peak_rss_mib']}",
                *(f"{steady[key]:.0f}" if key in steady else "" for key in names),
                f"{figures['foreign_cores']:.2f}",
            )
    console.print(table)
    if any(figures.get("foreign_cores", 0) > QUIET_CORES for r in report["results"].values() for figures in r.values()):
        console.print("[yellow]Not quiet: rates and latencies count for little, CPU for less than it looks.[/yellow]")
    if "one_entity" in report:
        console.print(f"one entity failing: {report['one_entity']}", markup=False)
    for name, ratio in report["ratios"].items():
        floor, goal = LIMITS.get(name, (None, None))
        console.print(f"{name}: {ratio:.3f}{judge(ratio, floor, goal, least=True)}")


if __name__ == "__main__":
    sys.exit(main())

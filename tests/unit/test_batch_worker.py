"""The Faust app around the batches: what an agent does with each way a batch may end. Real Faust, no broker."""

import asyncio
import socket
from collections.abc import Collection, Mapping
from types import SimpleNamespace

import faust
import psutil
import pytest

from schemas.failure import FatalError, TemporaryError
from streams.app import Worker
from streams.decision import Decision, Room
from streams.feeder import Feeder
from streams.transport import WorkerStuck
from telemetry.metrics import Metrics
from topics.cluster import KafkaSettings
from topics.group import Polled
from topics.headers import RawRecord

RAW = "raw.stripe"


class Group:
    """Gives one record a poll, notes what is committed."""

    def __init__(self, polls):
        self.topic_ids = {RAW: "T"}
        self.frontier = 0
        self.position = 0
        self.polls = polls
        self.committed = []
        self.calls = []
        self.failure = None
        self.number = 1
        self.last_heartbeat = float("inf")

    def frontiers(self):
        return {(RAW, 0): self.frontier}

    async def poll(self, _limit, _wait):
        self.calls.append("poll")
        await asyncio.sleep(0.001)
        if self.failure is not None:
            raise self.failure
        if self.position >= self.polls:
            return Polled(1)
        self.position += 1
        offset = self.position - 1
        record = RawRecord(
            hop=f"T:0:{offset}", partition=0, offset=offset, key=b"k", value=b"v", headers=[], timestamp=0
        )
        return Polled(1, {(RAW, 0): [record]})

    async def commit(self, _number, _outputs, positions, *, changelogs, committed):
        self.frontier = positions[RAW, 0]
        committed()
        self.committed.append(self.frontier)

    async def rewind(self):
        self.position = self.frontier

    def is_ready(self):
        return True

    def __getattr__(self, name):
        async def note():
            self.calls.append(name)

        return note


class Decider:
    source = "stripe"

    def __init__(self, *answers):
        self.answers = list(answers)
        self.seen = []

    async def decide(self, _rooms, records, _refused):
        self.seen.append([record.offset for record in records])
        answer = self.answers.pop(0) if self.answers else None
        if isinstance(answer, Exception):
            raise answer
        decision = Decision()
        if answer is not None:
            decision.rooms = [SimpleNamespace(apply=answer, released=[])]
        return decision


@pytest.fixture
def build(tmp_path, monkeypatch):
    monkeypatch.setattr("streams.feeder.IDLE_SECONDS", 0.001)

    def build(*answers, polls=3):
        feeder = Feeder(
            KafkaSettings(),
            {"stripe": Decider(*answers)},
            instance="i",
            slot=0,
            state_folder=tmp_path,
            batch_size=10,
            metrics=Metrics(),
        )
        feeder.group = Group(polls)
        feeder.rooms = {(RAW, 0): Room(SimpleNamespace(close=lambda: None, is_purge_due=lambda _now: False))}
        return Worker(feeder)

    return build


class Runner(faust.Worker):
    def install_signal_handlers(self):
        """Signals are the test runner's."""


async def run(worker, until):
    """Run the worker until something holds or it stops by itself; then stop it in order."""
    runner = Runner(
        worker.app, loglevel="CRITICAL", override_logging=False, redirect_stdouts=False, quiet=True, daemon=False
    )
    async with asyncio.timeout(60):
        await runner.start()
        stopped = asyncio.create_task(worker.app.wait_until_stopped())
        while not until() and not stopped.done():  # noqa: ASYNC110 - the fakes have no event to wait for
            await asyncio.sleep(0.01)
        stopped.cancel()
        await runner.stop()


async def test_batches_are_decided_and_committed_in_order(build):
    worker = build()
    await run(worker, lambda: len(worker.feeder.group.committed) == 3)
    assert worker.feeder.group.committed == [1, 2, 3]
    assert worker.feeder.deciders[RAW].seen == [[0], [1], [2]]
    assert worker.explain() is None


def count_held(*owners):
    """Entries of every container that an object has as an attribute, and of the containers in those."""
    held = 0
    for owner in owners:
        for container in vars(owner).values():
            if not isinstance(container, Collection) or isinstance(container, str):
                continue
            held += len(container)
            inner = container.values() if isinstance(container, Mapping) else list(container)
            held += sum(len(one) for one in inner if isinstance(one, Collection) and not isinstance(one, str))
    return held


async def test_faust_keeps_nothing_of_the_batches_that_are_over(build):
    worker = build(polls=700)
    app, committed, held = worker.app, worker.feeder.group.committed, {}

    def look():
        # Faust's averages hold their last hundred readings.
        for name, batches in (("early", 200), ("late", 700)):
            if len(committed) >= batches and name not in held:
                held[name] = count_held(app.consumer, app.topics, app.monitor, *app.agents.values())
        return "late" in held

    await run(worker, look)
    assert held["early"] > 100, "this looks at the wrong containers"
    assert held["late"] - held["early"] < 20


async def test_no_port_is_opened(build):
    """Faust's web server would serve table data and assignments without a password."""

    def list_ports():
        return {c.laddr.port for c in psutil.Process().net_connections("inet") if c.status == psutil.CONN_LISTEN}

    before, seen = list_ports(), []
    worker = build()

    def is_done():
        seen.append(list_ports())
        return len(worker.feeder.group.committed) == 3

    await run(worker, is_done)
    assert worker.feeder.group.committed == [1, 2, 3]
    assert all(ports == before for ports in seen)
    with socket.create_server(("127.0.0.1", 0)) as server:
        assert server.getsockname()[1] in list_ports(), "an open port would be seen"


async def test_a_batch_given_back_is_decided_again(build):
    worker = build(TemporaryError("down.", place="redis"))
    await run(worker, lambda: len(worker.feeder.group.committed) == 3)
    assert worker.feeder.deciders[RAW].seen == [[0], [0], [1], [2]]
    assert "pause" in worker.feeder.group.calls
    assert worker.explain() is None


@pytest.mark.parametrize(
    ("error", "code"),
    [(RuntimeError("text of a record"), WorkerStuck.code), (FatalError("broken.", place="here"), "RS300")],
)
async def test_an_unexpected_error_stops_the_worker_and_nothing_after_it_is_taken(build, error, code):
    worker = build(None, error)
    await run(worker, lambda: False)
    assert worker.feeder.group.committed == [1]
    assert worker.feeder.deciders[RAW].seen == [[0], [1]], "the batch behind the broken one is never decided"
    assert worker.explain().code == code
    assert "text of a record" not in str(worker.explain())


async def test_state_that_cannot_be_written_after_a_commit_stops_the_worker(build):
    def fail():
        raise FatalError("the disk is full.", place="here")

    worker = build(None, fail)
    await run(worker, lambda: False)
    assert worker.feeder.group.committed == [1]
    assert worker.feeder.deciders[RAW].seen == [[0], [1]]
    assert worker.explain().detail == "the disk is full."


async def test_a_record_that_ends_every_process_is_found_and_dead_lettered_alone(build):
    """Offset 2 of 5 ends whoever decides it; 3 ends over the batch, 2 with it alone in hand, then all is done."""
    ends, letters, done = 0, [], []
    while len(done) < 5:
        worker = build(polls=5)
        group, decider = worker.feeder.group, worker.feeder.deciders[RAW]
        group.frontier = group.position = len(done)

        async def decide(_rooms, records, _refused):
            if any(record.offset == 2 for record in records):
                raise MemoryError
            return Decision()

        async def commit(_number, outputs, positions, *, group=group, **more):
            letters.extend(dict(output.headers) for output in outputs)
            done[:] = range(positions[RAW, 0])
            group.frontier = positions[RAW, 0]
            more["committed"]()

        decider.decide, group.commit = decide, commit
        await run(worker, lambda: len(done) == 5)
        ends += worker.failure is not None
        assert ends <= 5, "it is not found"
    assert ends == 5
    assert [letter["dead_letter_code"] for letter in letters] == [b"CRASHED_WORKER"]
    assert letters[0]["hop"] == b"T:0:2"


async def test_a_group_that_failed_stops_the_worker(build):
    worker = build()
    worker.feeder.group.failure = FatalError("fenced.", place="here")
    await run(worker, lambda: False)
    assert worker.explain().detail == "fenced."
    assert worker.feeder.group.committed == []

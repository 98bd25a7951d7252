"""Worker processes on the real stack: several under one parent, one that a record ends again and again, two of one
name."""

import signal
import subprocess
import sys
from collections import Counter

import psutil
import pytest

from streams.slot import SlotTaken
from streams.suspects import ALONE, EXITS
from tests.integration import lethal_worker
from tests.integration.conftest import ROOT
from tests.integration.test_streams import Plant, build_body, plan_traffic
from tests.ports import find_ports

pytestmark = pytest.mark.integration


def find_worker(parent, slot):
    """The process of a slot under ``remitstream worker --processes``; None while it does not run its program."""
    for child in psutil.Process(parent.pid).children():
        try:
            arguments = child.cmdline()
        except psutil.Error:
            continue
        if arguments[1:6] == ["-m", "runtime.cli", "worker", "--slot", str(slot)]:
            return child
    return None


def list_loaded(deployment, slot):
    """Partitions whose stores a slot has opened, by the folders it keeps them in."""
    folder = deployment.settings.worker.state / f"{deployment.settings.instance}-{slot}"
    return {path.name for path in folder.glob("stripe-*")}


@pytest.mark.parametrize("protocol", ["classic", "consumer"])
def test_two_workers_share_the_work_and_one_that_is_killed_comes_back(deploy, protocol):
    port = find_ports(2)
    deployment = deploy(
        worker__partitions="4",
        worker__batch_records="25",
        worker__group_protocol=protocol,
        health__worker=str(port),
    )
    deployment.ports |= {"worker": port, "second": port + 1}
    plant = Plant(deployment)
    entities = 500
    sequence, facts, fates = plan_traffic(5, entities)
    plant.admit(*(f"M{number}" for number in range(entities)))
    deployment.start("project")
    deployment.await_ready("projector")
    parent = deployment.start("worker", "--processes", "2")
    for role in ("worker", "second"):
        deployment.await_ready(role)
    deployment.wait_until(
        lambda: all(list_loaded(deployment, slot) for slot in (0, 1)), "one worker has all the partitions"
    )
    half = len(sequence) // 2
    for entity, body in sequence[:half]:
        plant.send(entity, body)
    plant.flush()
    plant.await_count("payments", 60)
    victim = find_worker(parent, 1)
    victim.kill()
    deployment.wait_until(
        lambda: (find_worker(parent, 1) or victim).pid != victim.pid, "the killed worker is not started again"
    )
    for entity, body in sequence[half:]:
        plant.send(entity, body)
    plant.flush()
    account = deployment.await_account(
        lambda account: account.raw.total == len(sequence) and not account.raw.pending, timeout=90
    )
    assert account.balanced, account.build_report()
    assert {fate: count for fate, count in account.raw.parts.items() if count} == dict(fates)
    assert Counter((e.kind, e.object_id, e.money.minor, e.mrn.value) for e in plant.read_events()) == facts
    deployment.await_ready("second")
    children = [find_worker(parent, slot) for slot in (0, 1)]
    assert deployment.stop("worker") == 0
    assert not any(child.is_running() for child in children)
    assert "worker_ended" in deployment.read_logs()


def test_a_record_that_ends_its_process_is_dead_lettered_alone(deploy):
    deployment = deploy(worker__partitions="2", worker__batch_records="50")
    plant = Plant(deployment)
    count, lethal = 200, 77
    plant.admit(*(f"M{number}" for number in range(count)))
    deployment.start("project")
    deployment.await_ready("projector")
    for number in range(count):
        more = {"description": "lethal"} if number == lethal else {}
        plant.send(
            f"pi_{number}", build_body("payment_intent.succeeded", f"pi_{number}", 100, mrn=f"M{number}", **more)
        )
    plant.flush()
    ends = 0
    with (deployment.folder / "lethal.log").open("ab") as log:
        while plant.count("payments") < count - 1:
            worker = subprocess.Popen(
                [sys.executable, "-m", lethal_worker.__name__, *deployment.settings.list_arguments()],
                cwd=ROOT,
                stdout=log,
                stderr=log,
            )
            deployment.processes["lethal"] = worker
            deployment.wait_until(
                lambda worker=worker: worker.poll() is not None or plant.count("payments") >= count - 1,
                "the worker neither ends nor goes on",
            )
            if worker.poll() is not None:
                assert worker.returncode == lethal_worker.EXIT, deployment.read_logs()
                ends += 1
                assert ends <= EXITS + ALONE, "the record is not found"
    account = deployment.await_account(lambda account: not account.raw.pending)
    assert account.balanced
    assert account.raw.parts["canonical"] == count - 1
    assert account.reasons == {"dead_lettered:CRASHED_WORKER": 1}
    assert Counter(event.object_id for event in plant.read_events()) == {
        f"pi_{number}": 1 for number in range(count) if number != lethal
    }
    (letter,) = plant.read("dlq")
    assert b"lethal" in letter.value
    assert ends == EXITS + ALONE
    assert deployment.stop("lethal") == 0


def test_a_second_process_of_a_slot_is_refused_and_names_the_first(deployment):
    first = deployment.start("worker")
    deployment.await_ready("worker")
    first.send_signal(signal.SIGSTOP)
    second = subprocess.run(
        [sys.executable, "-m", "runtime.cli", "worker", *deployment.settings.list_arguments(),
         "--set", "health.worker=0"],
        cwd=deployment.folder,
        capture_output=True,
        check=False,
        timeout=60,
    )  # fmt: skip
    assert second.returncode == 75
    assert SlotTaken.code.encode() in second.stderr
    assert f"process {first.pid}, which is stopped".encode() in second.stderr
    # A killed holder holds nothing: its successor starts at once.
    assert deployment.stop("worker", kill=True) == -signal.SIGKILL
    deployment.start("worker")
    deployment.await_ready("worker")

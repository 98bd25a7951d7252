"""``python -m tests.crash_points``: the sweep by itself, on a stack of its own (or the one in ``KEEP_TEST_STACK``)."""

from __future__ import annotations

import argparse
import contextlib
import shutil
import sys
import tempfile
from pathlib import Path

from tests.crash_points.admissions import Admissions
from tests.crash_points.sweep import Sweep
from tests.crash_points.traffic import Payments
from tests.crash_points.trials import (
    COMMIT_STEPS,
    choose_trials,
    find_batch_trials,
    find_points,
    find_rollback_trials,
    list_trials,
    sweep_all,
)
from tests.integration.conftest import Deployment
from tests.stacks import open_stack

SECONDS_EACH = 3
"""What one run takes on a quiet machine."""


def say(text):
    print(text, flush=True)  # noqa: T201 - a command's output


def main():
    parser = argparse.ArgumentParser(description=__doc__.split(":")[0])
    chosen = parser.add_mutually_exclusive_group()
    chosen.add_argument("--all", action="store_true", help="every point (the default)")
    chosen.add_argument("--sample", type=int, metavar="N", help="all steps of the commit and others, N in all")
    parser.add_argument("--seed", default="1", help="of the sample")
    parser.add_argument("--only", default="", metavar="TEXT", help="points whose name holds this text")
    parser.add_argument("--source", choices=("stripe", "hl7"), help="batches of this source only")
    parser.add_argument("--list", action="store_true", help="print the points and stop")
    arguments = parser.parse_args()
    folder = Path(tempfile.mkdtemp(prefix="crash-points-"))
    with contextlib.ExitStack() as opened:
        opened.callback(shutil.rmtree, folder, ignore_errors=True)
        stack = opened.enter_context(open_stack())
        # State and secrets lie beside a deployment's folder.
        own = folder / "deployment"
        own.mkdir()
        deployment = Deployment(own, stack.up(), {"worker.partitions": "1"})
        opened.callback(deployment.close)
        deployment.provision()
        payments = Sweep(deployment, Payments(deployment))
        opened.callback(payments.close)
        points = find_points(payments, say)
        trials = list_trials(points) + find_rollback_trials(payments, points, say)
        admissions = Sweep(deployment, Admissions(), payments.nursery)
        opened.callback(admissions.close)
        points, others = find_batch_trials(admissions, say)
        others += find_rollback_trials(admissions, points, say, steps=COMMIT_STEPS[-1:])
        chosen = [
            (sweep, [trial for trial in found if arguments.only in str(trial)])
            for sweep, found in ((payments, trials), (admissions, others))
            if arguments.source in (None, sweep.traffic.source)
        ]
        if arguments.sample:
            chosen = [
                (sweep, choose_trials(found, arguments.seed, arguments.sample // len(chosen)))
                for sweep, found in chosen
            ]
        runs = sum(len(found) for _, found in chosen)
        say(f"{runs} runs, about {max(1, runs * SECONDS_EACH // 60)} minutes, seed {arguments.seed}")
        for sweep, found in chosen:
            if arguments.list:
                for trial in found:
                    say(f"{sweep.traffic.source}: {trial}")
            else:
                say(f"{sweep.traffic.source}: {sweep_all(sweep, found, say)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())

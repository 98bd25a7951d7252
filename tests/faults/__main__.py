"""``python -m tests.faults``: faults of every kind on a real stack, then whether each money fact is there once.

With ``--kills`` the deliverer is killed instead of workers, and the targets' books are judged.
"""

from __future__ import annotations

import argparse
import datetime as dt
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from runtime.stack import EmbeddedStack
from tests.faults import plan as plans
from tests.faults.deliverer import run_deliverer
from tests.faults.report import DELIVERER, build_deliverer_result, build_result, render, save
from tests.faults.run import run_plan
from tests.faults.targets import RULES
from tests.integration.conftest import ROOT
from tests.stacks import CACHE, choose_ports


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="replays a plan")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="minutes of faults")
    length.add_argument("--long", action="store_true", help=f"{plans.FULL_MINUTES:.0f} minutes of faults (default)")
    length.add_argument("--short", action="store_true", help="a handful of each fault")
    length.add_argument(
        "--kills", type=int, metavar="N", help=f"kill the deliverer so often; the long form: {plans.DELIVERER_KILLS}"
    )
    parser.add_argument("--result", type=Path, help="folder of faults.json and faults.md (long form: docs/generated)")
    parser.add_argument("--keep", type=Path, help="keep logs and topics in this folder")
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    chosen = parser.parse_args()
    if chosen.kills:
        whole = chosen.kills >= plans.DELIVERER_KILLS
        plan = plans.draw_deliverer(chosen.seed, chosen.kills, [rule.name for rule in RULES])
    else:
        minutes = chosen.minutes or (plans.SHORT_MINUTES if chosen.short else plans.FULL_MINUTES)
        whole = minutes >= plans.FULL_MINUTES
        plan = plans.draw(chosen.seed, minutes)
    sys.stdout.write(f"about {plan.minutes:.0f} minutes; seed {plan.seed}\n{plan.describe()}\n")
    sys.stdout.flush()
    if chosen.plan:
        return 0
    home = chosen.keep or Path(tempfile.mkdtemp(prefix="rs-faults-"))
    folder = home / "site"
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    stack = EmbeddedStack(home / "stack", CACHE, ports=choose_ports())
    try:
        stack.reset()
        result = _run(folder, stack, plan)
    finally:
        if chosen.keep:
            stack.down()
        else:
            stack.reset()
            shutil.rmtree(home, ignore_errors=True)
    target = chosen.result or (ROOT / "docs" / "generated" if whole else None)
    if target is not None:
        save(target, result)
    sys.stdout.write("\n" + render(result))
    return 1 if result.get(DELIVERER, result)["violations"] else 0


def _run(folder, stack, plan):
    if isinstance(plan, plans.DelivererPlan):
        found = run_deliverer(folder, stack, plan)
        return {DELIVERER: build_deliverer_result(plan, found, dt.datetime.now(dt.UTC))}
    verdict, fault_run = run_plan(folder, stack, plan, on_start=_listen)
    return build_result(plan, verdict, fault_run, dt.datetime.now(dt.UTC))


def _listen(fault_run):
    """Ctrl-C ends the faults, not the verdict."""
    signal.signal(signal.SIGINT, lambda *_: fault_run.stopped.set())


if __name__ == "__main__":
    sys.exit(main())

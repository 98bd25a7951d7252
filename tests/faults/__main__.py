"""``python -m tests.faults``: faults of every kind on a real stack, then whether each money fact is there once."""

from __future__ import annotations

import argparse
import datetime as dt
import json
import secrets
import shutil
import signal
import sys
import tempfile
from pathlib import Path

from runtime.stack import EmbeddedStack
from tests.faults import plan as plans
from tests.faults.report import build_result, render
from tests.faults.run import run_plan
from tests.integration.conftest import ROOT
from tests.stacks import CACHE, choose_ports


def main():
    parser = argparse.ArgumentParser(prog="python -m tests.faults", description=__doc__)
    parser.add_argument("--seed", type=int, default=secrets.randbelow(10**6), help="replays a plan")
    length = parser.add_mutually_exclusive_group()
    length.add_argument("--minutes", type=float, help="minutes of faults")
    length.add_argument("--long", action="store_true", help=f"{plans.FULL_MINUTES:.0f} minutes of faults (default)")
    length.add_argument("--short", action="store_true", help="a handful of each fault")
    parser.add_argument("--result", type=Path, help="folder of faults.json and faults.md (long form: docs/generated)")
    parser.add_argument("--keep", type=Path, help="keep logs and topics in this folder")
    parser.add_argument("--plan", action="store_true", help="print the plan and end")
    chosen = parser.parse_args()
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
        verdict, fault_run = run_plan(folder, stack, plan, on_start=_listen)
    finally:
        if chosen.keep:
            stack.down()
        else:
            stack.reset()
            shutil.rmtree(home, ignore_errors=True)
    result = build_result(plan, verdict, fault_run, dt.datetime.now(dt.UTC))
    target = chosen.result or (ROOT / "docs" / "generated" if whole else None)
    if target is not None:
        (target / "faults.json").write_text(json.dumps(result, indent=2) + "\n", "utf-8")
        (target / "faults.md").write_text(render(result), "utf-8")
    sys.stdout.write("\n" + render(result))
    return 1 if result["violations"] else 0


def _listen(fault_run):
    """Ctrl-C ends the faults, not the verdict."""
    signal.signal(signal.SIGINT, lambda *_: fault_run.stopped.set())


if __name__ == "__main__":
    sys.exit(main())

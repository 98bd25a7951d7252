"""``python -m tests.delivery_faults [--long]``: prints what was counted; ends with 1 when a promise did not hold."""

import argparse
import sys
import time
from collections.abc import Callable

from sinks.contract import TargetClass
from tests.delivery_faults.cases import (
    CONTROLS,
    run_blocked,
    run_control,
    run_freeze,
    run_order,
    run_outage,
    run_timeouts,
)
from tests.delivery_faults.deaths import sweep_deaths
from tests.delivery_faults.world import World


def main() -> int:
    """Run everything; the exit code."""
    parser = argparse.ArgumentParser(description="The deliverer in a simulated world, in virtual time.")
    parser.add_argument("--long", action="store_true", help="10,000 lost answers per class, 1,000,000 events in order")
    parser.add_argument("--seed", type=int, default=1)
    given = parser.parse_args()
    timeouts, events = (10_000, 1_000_000) if given.long else (300, 4_000)
    failed = 0
    for target_class in TargetClass:
        failed += _show(f"timeouts {target_class}", lambda c=target_class: run_timeouts(c, timeouts, given.seed))
    # Class A and C in equal parts: what resends, and what asks.
    for target_class in (TargetClass.A, TargetClass.C):
        failed += _show(
            f"order {target_class}", lambda c=target_class: run_order(c, events // 2, events // 100, given.seed)
        )
    failed += _show("order D", lambda: run_order(TargetClass.D, events // 50, events // 100, given.seed))
    for target_class in TargetClass:
        failed += _show(f"outage {target_class}", lambda c=target_class: run_outage(c, 5_000, given.seed))
        failed += _show(f"blocked {target_class}", lambda c=target_class: run_blocked(c, 5_000))
    for target_class in (TargetClass.A, TargetClass.B, TargetClass.D):  # class C: the documented hole
        failed += _show(f"frozen {target_class}", lambda c=target_class: run_freeze(c, 300, given.seed))
    for target_class in TargetClass:
        failed += _show_deaths(target_class, every=given.long)
    for control in CONTROLS:
        judgement = run_control(control, 400, given.seed).judge()
        seen = {name: count for name, count in judgement.items() if count}
        is_red = bool(set(seen) & control.seen_as)
        failed += not is_red
        _say(f"{'red' if is_red else 'NOT SEEN':9} without: {control.name}: {seen}")
    return 1 if failed else 0


def _show(name: str, run: Callable[[], World]) -> int:
    began = time.perf_counter()
    world = run()
    broken = {promise: count for promise, count in world.judge().items() if count}
    books = world.books
    _say(
        f"{'BROKEN' if broken else 'ok':9} {name}: {world.events} events, {books.calls} calls, {books.look_ups} "
        f"look-ups, {books.timeouts_after_success} answers lost after success, {books.kills} kills, "
        f"{books.lost_sessions} lost sessions, {dict(world.count_outcomes())}, "
        f"{broken or 'nothing doubled, lost, silent or out of order'}; {time.perf_counter() - began:.0f} s"
    )
    return int(bool(broken))


def _show_deaths(target_class: TargetClass, *, every: bool) -> int:
    failed = 0
    for loses_answers in (False, True):
        began = time.perf_counter()
        deaths = sweep_deaths(target_class, loses_answers=loses_answers, every=every)
        answered = "no first write" if loses_answers else "every write"
        _say(
            f"{'BROKEN' if deaths.wrong else 'ok':9} deaths {target_class}, {answered} answered: "
            f"{deaths.deaths} deaths at {deaths.places} places, {deaths.unknown} events unknown over all, "
            f"{deaths.wrong or 'nothing doubled, lost or silent'}; {time.perf_counter() - began:.0f} s"
        )
        failed += bool(deaths.wrong)
    return failed


def _say(line: str) -> None:
    sys.stdout.write(f"{line}\n")
    sys.stdout.flush()


if __name__ == "__main__":
    sys.exit(main())

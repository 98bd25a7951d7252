"""The result of a run of faults, as data and as a page."""

from __future__ import annotations

import os
import platform

_NAMES = {
    "kills": "kill -9 of a worker",
    "kills_in_open_transaction": "of these: its transaction was open",
    "kills_in_commit": "of these: commit decided, markers on the way",
    "kills_state_unknown": "of these: state not known (the broker was away)",
    "zombies": "frozen past the session timeout, then woken",
    "zombies_in_open_transaction": "of these: its transaction was open",
    "broker_restarts": "broker restarts",
    "redis_flushes": "Redis FLUSHALL",
    "redis_restarts": "Redis restarts without persistence",
    "storms": "rebalance storms with full queues",
    "storm_joins": "workers that joined in them",
    "storm_leaves": "workers that left in them",
    "state_lost": "local stores deleted",
    "state_old": "local stores replaced by an old copy",
    "state_cut": "local stores cut",
    "offsets_reset": "group offsets set to 0",
    "offsets_deleted": "group deleted with its offsets",
    "replays": "replays of the whole raw log",
    "replayed_records": "records of these",
    "redrives": "redrives of dead letters",
    "redriven_records": "records of these, each dead letter twice",
    "redriven_corrected": "dead letters redriven corrected, each twice",
    "worker_exits_by_itself": "workers that ended by themselves and were restarted",
    "transactions_committed": "transactions committed",
    "transactions_aborted": "transactions aborted",
}


def build_result(plan, verdict, fault_run, now):
    """All that was done and found."""
    return {
        "date": now.strftime("%Y-%m-%d"),
        "seed": plan.seed,
        "planned_minutes": round(plan.minutes, 1),
        "minutes": round(fault_run.seconds / 60, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "faults": {name: fault_run.counts[name] for name in _NAMES},
        "accepted": verdict.accepted,
        "fates": verdict.fates,
        "money_facts_due": verdict.facts,
        "violations_by_kind": dict(verdict.kinds),
        "violations": verdict.violations,
    }


def render(result):
    """The page."""
    lines = [
        "# Fault run",
        "",
        (
            f"Written by `make faults`; {result['date']}, seed {result['seed']}, {result['minutes']} minutes,"
            f" {result['machine']}. What is done and how it is judged: [faults.md](../faults.md)."
        ),
        "",
        "| fault | count |",
        "| --- | ---: |",
        *(f"| {_NAMES[name]} | {count:,} |" for name, count in result["faults"].items()),
        "",
        f"accepted {result['accepted']:,} = "
        + " + ".join(f"{name} {count:,}" for name, count in result["fates"].items()),
        "",
        f"Money facts due: {result['money_facts_due']:,}, each published exactly once, in order per key."
        if not result["violations"]
        else "**Violations:**",
        "",
    ]
    lines += [f"- {violation}" for violation in result["violations"]]
    return "\n".join(lines).rstrip() + "\n"

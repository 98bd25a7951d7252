"""The result of a run of faults, as data and as a page."""

from __future__ import annotations

import json
import os
import platform

from tests.faults.targets import RULES

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

_DELIVERER_NAMES = {
    "kills": "kill -9 of the deliverer",
    "kills_hit": "of these: a call or an entry IN_FLIGHT was hit",
    "kills_open_call": "of these: a call at a target was without an answer",
    "kills_in_flight": "of these: an entry IN_FLIGHT, written in that life, was left",
    "open_calls_hit": "calls hit",
    "in_flight_hit": "entries hit",
    "raw_records": "raw records",
    "canonical": "canonical events",
    "exits_by_itself": "deliverers that ended by themselves and were restarted",
}
DELIVERER = "deliverer"
"""Key of the deliverer's run in the file."""


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


def build_deliverer_result(plan, deliverer_run, now):
    """The same of a run that kills the deliverer."""
    return {
        "date": now.strftime("%Y-%m-%d"),
        "seed": plan.seed,
        "planned_minutes": round(plan.minutes, 1),
        "minutes": round(deliverer_run.seconds / 60, 1),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPUs",
        "faults": {name: deliverer_run.counts[name] for name in _DELIVERER_NAMES},
        "targets": {
            rule.name: {
                "class": rule.target_class,
                "due": deliverer_run.counts[f"due_{rule.name}"],
                "held": deliverer_run.held[rule.name],
                "kills_hit": deliverer_run.hits[rule.name],
                "outcomes": deliverer_run.outcomes[rule.name],
            }
            for rule in RULES
        },
        "violations": deliverer_run.violations,
    }


def save(folder, change):
    """Lay a run over what the files know: those of workers and of the deliverer are made one by one."""
    path = folder / "faults.json"
    known = json.loads(path.read_text("utf-8")) if path.exists() else {}
    kept = {name: part for name, part in known.items() if (name == DELIVERER) is not (DELIVERER in change)}
    kept = dict(sorted((kept | change).items(), key=lambda item: item[0] == DELIVERER))
    path.write_text(json.dumps(kept, indent=2) + "\n", "utf-8")
    (folder / "faults.md").write_text(render(kept), "utf-8")


def render(result):
    """The page, of one run or of both."""
    parts = ["# Fault run"]
    if "faults" in result:
        parts.append(_render_workers(result))
    if DELIVERER in result:
        parts.append(_render_deliverer(result[DELIVERER]))
    return "\n\n".join(parts) + "\n"


def _render_deliverer(result):
    lines = [
        "## The deliverer",
        "",
        (
            f"{result['date']}, seed {result['seed']}, {result['minutes']} minutes, {result['machine']}. One process"
            " delivers to four targets while raw records flow through a worker."
        ),
        "",
        "| fault | count |",
        "| --- | ---: |",
        *(f"| {_DELIVERER_NAMES[name]} | {count:,} |" for name, count in result["faults"].items()),
        "",
        "| target | class | kills that hit it | due | held by it | posted | unknown | parked | not routed |",
        "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for name, part in result["targets"].items():
        told = " | ".join(
            f"{part['outcomes'].get(word, 0):,}" for word in ("posted", "unknown", "parked", "not_routed")
        )
        numbers = f"{part['kills_hit']:,} | {part['due']:,} | {part['held']:,}"
        lines.append(f"| {name} | {part['class']} | {numbers} | {told} |")
    lines.append("")
    if result["violations"]:
        lines += ["**Violations:**", "", *(f"- {violation}" for violation in result["violations"])]
    else:
        lines += [
            "Class A, B, C: every due posting is held once, in order per entity. Class D: held once or not at all;",
            "each that is not surely held is told as unknown, and nothing went on behind one. The account explains",
            "every record.",
        ]
    return "\n".join(lines)


def _render_workers(result):
    lines = [
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
    return "\n".join(lines).rstrip()

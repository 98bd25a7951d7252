"""Unknown outcomes: writes that may have landed at a target that nobody but a person can ask.

The person looks for the posting at the target, by the evidence shown here, and says whether it is there. A decision
counts only when it was made after the last moment at which the write could still land.
"""

from __future__ import annotations

import time
from typing import TYPE_CHECKING, Any

from runtime.account import TopicScan
from runtime.desk import office
from runtime.desk.letters import name_decision, write_time
from runtime.desk.office import ActRefused, NothingFound, Office
from schemas.events import Action, DeliveryOutcome, MoneyEvent
from schemas.failure import Failure
from schemas.wire import Decoder
from sinks.desk import TargetBook, build_decision, describe_ruling, find_rival, read_decisions
from telemetry.masking import mask_text
from topics import catalog

if TYPE_CHECKING:
    from collections.abc import Callable

    from schemas.events import Decision
    from sinks.desk import Open
    from topics.audit import Actor

LONGEST_REFERENCE = 64
LOOK_PAUSE = 0.5
_FINISHED = "it is finished at this target, or was never there."


def list_unknown(office_: Office, targets: tuple[str, ...]) -> list[dict[str, Any]]:
    """What waits for a person, oldest first; no payload."""
    return [
        _describe(office_, found)
        for target in office_.settings.targets
        if not targets or target.name in targets
        for found in TargetBook(office_.settings.kafka, target.name).list_unknown()
    ]


def show(office_: Office, event_id: str, target: str, actor: Actor | None) -> dict[str, Any]:
    """The evidence for one event; with an actor also the frozen request, which is an audited act."""
    book = TargetBook(office_.settings.kafka, _check_target(office_, target))
    found = _find(book, event_id)
    scan = TopicScan(office_.settings)
    decoder = scan.build_decoder("delivery_outcome", DeliveryOutcome)
    outcomes = [decoder.decode(record.value or b"") for record in scan.read(catalog.DELIVERIES)]
    told = {
        **_describe(office_, found),
        "behind": book.count_behind(found),
        "last_decision": found.entry.decision,
        "ruling": found.entry.ruling,
        "outcomes": [
            {"time": write_time(told.decided_at), "outcome": told.outcome, "code": told.code, "attempt": told.attempt}
            for told in outcomes
            if told.event_id == event_id and told.target == target
        ],
    }
    if actor is not None:
        with office_.open_log(actor) as log:
            log.append(office.REVEAL_UNKNOWN, [event_id], {"target": target, "attempt": str(found.entry.number)})
        told["request"] = (found.entry.body or b"").decode("utf-8", "replace")
    return told


def decide(
    office_: Office,
    event_id: str,
    target: str,
    action: Action,
    actor: Actor,
    *,
    reference: str = "",
    wait: float = 15.0,
    sleep: Callable[[float], None] = time.sleep,
) -> dict[str, Any]:
    """Say what a person found at the target, and wait up to ``wait`` seconds until the deliverer has taken it.

    When somebody else's decision counted in its place, ``overtaken_by`` tells whose and when.
    """
    if len(reference) > LONGEST_REFERENCE or not reference.isprintable() or mask_text(reference) != reference:
        raise ActRefused(
            f"a reference has at most {LONGEST_REFERENCE} characters and no patient or card data.", place="--reference"
        )
    last_act = office_.find_last_act()
    book = TargetBook(office_.settings.kafka, _check_target(office_, target))
    found = book.find(event_id)
    if found is None:
        raise NothingFound(_FINISHED + _tell_last(office_, event_id, target), place=f"{target} {event_id}")
    found.check(action)
    if event_id in book.list_decided(office_.registry.find_schema):
        raise ActRefused(
            "a decision about it is on its way to the deliverer." + _tell_last(office_, event_id, target),
            place=f"{target} {event_id}",
        )
    schema_id = office_.find_schema_id(catalog.name_decisions(target), "decision")
    with office_.open_log(actor, seen=last_act) as log:
        decision_id = name_decision(log.next_number, event_id)
        output = build_decision(found, action, decision_id, schema_id, reference=reference)
        facts = {
            "target": target,
            "decision": action.value,
            "attempt": str(found.entry.number),
            "code": found.entry.code,
            "reference": reference,
        }
        log.append(office.DECIDE_UNKNOWN, [event_id], facts, [output])
    return {"decision": decision_id, **await_ruling(office_, found, decision_id, wait, sleep)}


def await_ruling(
    office_: Office, found: Open, decision_id: str, wait: float, sleep: Callable[[float], None] = time.sleep
) -> dict[str, Any]:
    """``deliverer``: ``taken``, ``refused: CODE``, or ``waiting`` when the deliverer has not taken it in time.

    With ``overtaken_by`` when somebody else's decision counted.
    """
    kafka, place = office_.settings.kafka, [found.partition]
    until = time.monotonic() + wait
    while True:
        now = TargetBook(kafka, found.target, partitions=place).find(found.event_id)
        ruling = describe_ruling(now, decision_id, found)
        rival = None
        if ruling != "waiting" and (now is None or now.entry.decision != decision_id):
            made = list(read_decisions(kafka, found.target, office_.registry.find_schema, place))
            ruling, rival = describe_ruling(now, decision_id, found, made), find_rival(made, decision_id, found)
        if ruling != "waiting" or time.monotonic() >= until:
            told: dict[str, Any] = {"deliverer": ruling}
            if rival is not None:
                told["overtaken_by"] = _tell_rival(office_, rival)
            return told
        sleep(LOOK_PAUSE)


def _tell_rival(office_: Office, rival: Decision) -> dict[str, Any]:
    told = {"decision": rival.action, "time": write_time(rival.decided_at)}
    number = rival.decision_id.partition("/")[0]
    for act in office_.read_acts():
        if str(act.number) == number:
            return told | {"act": act.number, "by": act.by, "os_user": act.os_user}
    return told


def _tell_last(office_: Office, event_id: str, target: str) -> str:
    """A sentence: who decided about it last. Empty when nobody did."""
    told = ""
    for act in office_.read_acts():
        if act.act == office.DECIDE_UNKNOWN and event_id in act.ids and act.facts.get("target") == target:
            told = f" {act.by} decided {act.facts.get('decision')!r} at {write_time(act.time)} (act {act.number})."
    return told


def _describe(office_: Office, found: Open) -> dict[str, Any]:
    entry = found.entry
    told: dict[str, Any] = {
        "target": found.target,
        "event_id": found.event_id,
        "entity": entry.entity,
        "code": entry.code,
        "attempts": entry.number,
        "first_write": write_time(entry.first_write_at),
        "decidable_from": write_time(entry.decidable_at),
        "control_id": entry.control_id,
        "reference": entry.reference,
    }
    decoder = Decoder("money_event", MoneyEvent, office_.registry.find_schema)
    try:
        event: MoneyEvent = decoder.decode(entry.value or b"")
    except Failure:
        return told
    return told | {
        "kind": event.kind,
        "facility": event.facility,
        "amount": f"{event.money.major()} {event.money.currency}",
        "object": event.object_id,
    }


def _check_target(office_: Office, target: str) -> str:
    if target not in {known.name for known in office_.settings.targets}:
        raise NothingFound("there is no such target in the configuration.", place=target)
    return target


def _find(book: TargetBook, event_id: str) -> Open:
    found = book.find(event_id)
    if found is None:
        raise NothingFound(_FINISHED, place=f"{book.target} {event_id}")
    return found

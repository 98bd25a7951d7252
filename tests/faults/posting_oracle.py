"""What the targets hold, against what was published and what was told about it.

Nothing here is code of the project: the simulators' own books, the canonical events and the topic ``deliveries`` read
by a plain consumer, and the promises written once more. Class A, B, C: each posting once. Class D: once or never, and
what may be missing is told as unknown, its followers as parked.
"""

from __future__ import annotations

from collections import Counter, defaultdict

import msgspec

from tests.faults.oracle import SHOWN, Oracle, Tail
from tests.faults.targets import MOVED, RULES

DELIVERIES = "deliveries"


class InFlight:
    """The deliverers' own ledgers, looked into after each death."""

    def __init__(self, bootstrap):
        topics = [f"attempts.{rule.name}" for rule in RULES]
        self._tail = Tail(bootstrap, topics)

    def count_new(self):
        """By target: entries written since the last call, whose last state is that a call may be under way."""
        states = {}
        for message in self._tail.read(patience=20):
            # An array; its first member is the state.
            state = None if message.value() is None else msgspec.msgpack.decode(message.value())[0]
            states[message.topic(), message.key()] = state
        found = Counter(topic for (topic, _), state in states.items() if state == "IN_FLIGHT")
        return {rule.name: found[f"attempts.{rule.name}"] for rule in RULES}

    def close(self):
        self._tail.close()


class PostingOracle:
    """Follows canonical events (by ``Oracle``) and outcomes."""

    def __init__(self, bootstrap, registry_url):
        self.stream = Oracle(bootstrap, registry_url)
        self._tail = Tail(bootstrap, [DELIVERIES])
        self.outcomes = {rule.name: defaultdict(list) for rule in RULES}
        """Target -> event id -> outcomes in order."""

    def follow(self):
        """Read on to the end."""
        self.stream.follow()
        for message in self._tail.read():
            outcome = self.stream.decode(message.value())
            self.outcomes[outcome["target"]][outcome["event_id"]].append(outcome["outcome"])

    def count_told(self):
        """How many outcomes there are."""
        return sum(len(told) for outcomes in self.outcomes.values() for told in outcomes.values())

    def is_settled(self):
        """Whether every event is posted, left out, waits for a person, or behind one that does."""
        events = self.list_events()
        return all(find_open(rule, events, self.outcomes[rule.name]) == [] for rule in RULES)

    def list_events(self):
        """Canonical events as (id, facility, kind, root, object id, minor units), in the order of their topics."""
        published = sorted(self.stream.published, key=lambda one: (one.topic, one.partition, one.offset))
        return [
            (
                one.event["event_id"],
                one.event["facility"],
                one.event["kind"],
                one.event["root"],
                one.event["object_id"],
                one.event["money"]["minor"],
            )
            for one in published
        ]

    def close(self):
        self._tail.close()
        self.stream.close()


def is_due(rule, event):
    """Whether the target takes this event."""
    return event[1] == rule.facility and event[2] in rule.kinds


def find_open(rule, events, outcomes):
    """Events without an end: no outcome yet, or parked although nothing before it waits for a person."""
    stopped, found = set(), []
    for event in events:
        last = (outcomes.get(event[0]) or [None])[-1]
        if last == "unknown":
            stopped.add(event[3])
        elif last is None or (last == "parked" and event[3] not in stopped):
            found.append(event)
    return found


def judge(rule, events, held, outcomes):
    """Every promise that does not hold at one target, by its name. ``held``: (object id, signed minor) in order."""
    found = defaultdict(list)
    due = [event for event in events if is_due(rule, event)]
    names = {(event[4], MOVED[event[2]] * event[5]): event for event in due}
    counts = Counter(held)
    for posting, count in counts.items():
        if posting not in names:
            found["unknown posting"].append(f"{posting}")
        elif count > 1:
            found["twice"].append(f"{posting}, {count} times")
    _judge_told(rule, events, outcomes, found)
    stopped = set()
    for posting, event in names.items():
        told = (outcomes.get(event[0]) or ["nothing"])[-1]
        if rule.target_class != "D":
            if not counts[posting]:
                found["lost"].append(f"{posting}, told {told}")
            if told != "posted":
                found["outcome"].append(f"{posting} is told {told}")
            continue
        if event[3] in stopped and (counts[posting] or told != "parked"):
            found["behind a doubt"].append(f"{posting} is told {told}, held {counts[posting]} times")
        elif event[3] not in stopped and told != "unknown" and (told != "posted" or not counts[posting]):
            found["silent"].append(f"{posting} is told {told}, held {counts[posting]} times")
        if told == "unknown":
            stopped.add(event[3])
    _judge_order(due, held, names, found)
    return found


def _judge_told(rule, events, outcomes, found):
    for event in events:
        told = outcomes.get(event[0], [])
        if not is_due(rule, event) and told != ["not_routed"]:
            found["not routed"].append(f"{event[4]} is told {told}")
        if told.count("posted") > 1:
            found["told twice"].append(f"{event[4]} is told {told}")
    for event_id in outcomes.keys() - {event[0] for event in events}:
        found["told of nothing"].append(event_id)


def _judge_order(due, held, names, found):
    lanes, wanted = defaultdict(list), defaultdict(list)
    for posting in dict.fromkeys(held):
        if posting in names:
            lanes[names[posting][3]].append(posting)
    for event in due:
        wanted[event[3]].append((event[4], MOVED[event[2]] * event[5]))
    for root, lane in lanes.items():
        if lane != [posting for posting in wanted[root] if posting in lane]:
            found["order"].append(f"{root}: {lane}")


def show(rule, found):
    """Violations as lines, some of each kind."""
    return [f"{rule.name}: {kind}: {text}" for kind, texts in sorted(found.items()) for text in texts[:SHOWN]]

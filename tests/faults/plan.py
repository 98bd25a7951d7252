"""The faults of a run, drawn from a seed before it begins: kinds, order, targets and waits."""

from __future__ import annotations

import itertools
import random
from dataclasses import dataclass, field

FULL_MINUTES = 18.0
"""Minutes of faults in the long form; every count below is for these."""
KILLS, ZOMBIES, STORMS, MOVES = 150, 50, 5, 10
SHORT_MINUTES = 1.0
STATES = ("lost", "old", "cut")
OFFSETS = ("reset", "deleted", "kept")


@dataclass(frozen=True, slots=True)
class Fault:
    """One fault. ``wait``: seconds before it; ``seconds``: how long it lasts, where it lasts."""

    kind: str
    slot: int = 0
    wait: float = 0.0
    seconds: float = 0.0
    detail: tuple = ()


@dataclass(slots=True)
class Plan:
    """Three lanes that run beside each other. ``minutes`` is the estimate of faults and drain together."""

    seed: int
    minutes: float
    rate: int
    kills: list[Fault] = field(default_factory=list)
    zombies: list[Fault] = field(default_factory=list)
    world: list[Fault] = field(default_factory=list)

    def describe(self):
        """One line per lane."""
        return "\n".join(
            f"{name}: {' '.join(_shorten(fault) for fault in lane)}"
            for name, lane in (("slot 0", self.kills), ("slot 1", self.zombies), ("world", self.world))
        )


def draw(seed, minutes):
    """The plan of a run with about so many minutes of faults. Every kind of fault is in it at least once."""
    dice = random.Random(f"faults {seed}")
    share = minutes / FULL_MINUTES
    kills, zombies = max(8, round(KILLS * share)), max(2, round(ZOMBIES * share))
    # Each frozen worker goes on after it woke, or is killed once or twice.
    later = [dice.choices((0, 1, 2), (10, 20, 70))[0] for _ in range(zombies)]
    plan = Plan(seed, minutes + 2, rate=120)
    plan.kills = [_draw_kill(dice, 0) for _ in range(kills)]
    for killed in later:
        # A third sleeps longer than a transaction may stay open: the broker aborts it.
        seconds = dice.uniform(11, 12.5) if dice.random() < 0.3 else dice.uniform(6.5, 8.5)
        plan.zombies.append(Fault("zombie", 1, dice.uniform(0, 0.8), seconds))
        plan.zombies += [_draw_kill(dice, 1) for _ in range(killed)]
    plan.world = _draw_world(dice, share)
    return plan


DELIVERER_KILLS = 200
"""In the long form."""


@dataclass(slots=True)
class DelivererPlan:
    """Kills of the deliverer, one after another. ``rate``: raw records a second; ``lanes``: entities under way."""

    seed: int
    minutes: float
    rate: int
    lanes: int
    kills: list[Fault]

    def describe(self):
        """One line."""
        return "deliverer: " + " ".join("-".join(kill.detail) + f"+{kill.wait:.2f}" for kill in self.kills)


def draw_deliverer(seed, kills, targets):
    """As the kills of a worker; an aimed one waits for an open call at the target drawn.

    One life in eight is longer than a take-over waits (call deadline and session timeout): what an earlier life left
    is settled there, and hit again.
    """
    dice = random.Random(f"deliverer {seed}")
    plan = []
    for number in range(kills):
        fault = _draw_kill(dice, 0)
        wait = dice.uniform(7.5, 10) if number % 8 == 7 else fault.wait
        plan.append(Fault("kill", 0, wait, detail=(*fault.detail, dice.choice(targets))))
    return DelivererPlan(seed, sum(fault.wait + 3.5 for fault in plan) / 60 + 2, 4, min(60, 3 * kills), plan)


def _draw_kill(dice, slot):
    """Of ten kills two are ``blind``: they do not wait until the worker works, and fall into its start, the joining or
    the loading. Three hit it at work, at any point. Five are ``aimed``: it must hold an open transaction."""
    aim = dice.choices(("blind", "any", "aimed"), (2, 3, 5))[0]
    return Fault("kill", slot, dice.uniform(0, 2.0) if aim == "blind" else dice.uniform(0.05, 0.9), detail=(aim,))


def _draw_world(dice, share):
    def some(number, least=1):
        return max(least, round(number * share))

    faults = [Fault("broker", detail=("kill" if number % 2 == 0 else "stop",)) for number in range(some(6))]
    faults += [Fault("redis_flush") for _ in range(some(5))]
    faults += [Fault("redis_restart") for _ in range(some(4))]
    moves = MOVES if share > 0.3 else 4
    for _ in range(some(STORMS)):
        leaves = tuple(
            (2 + number // 2 % 2 if moves == MOVES else 2, dice.uniform(0.3, 2.0), dice.random() < 0.6)
            for number in range(moves)
        )
        faults.append(Fault("storm", detail=leaves))
    faults += [Fault("halt") for _ in range(some(9, 3))]
    faults += [Fault("redrive") for _ in range(some(3))]
    dice.shuffle(faults)
    # Late enough that there is something to replay, early enough that faults fall into its work.
    faults.insert(round(len(faults) * 0.6), Fault("replay"))
    # An old copy of the stores is taken at the halt before the one that brings it back.
    halts = ((STATES[n % 3], OFFSETS[(n + n // 3) % 3]) for n in itertools.count())
    return [
        Fault(
            fault.kind,
            fault.slot,
            dice.uniform(1, 4),
            fault.seconds,
            next(halts) if fault.kind == "halt" else fault.detail,
        )
        for fault in faults
    ]


def _shorten(fault):
    if fault.kind == "kill":
        return f"kill-{fault.detail[0]}+{fault.wait:.2f}"
    if fault.kind == "zombie":
        return f"zombie+{fault.wait:.2f}/{fault.seconds:.1f}"
    if fault.kind == "storm":
        return f"storm({len(fault.detail)})+{fault.wait:.1f}"
    return "-".join([fault.kind, *fault.detail]) + f"+{fault.wait:.1f}"

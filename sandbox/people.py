"""Invented people and test card numbers, and the register of what was planted where."""

from __future__ import annotations

from typing import TYPE_CHECKING

from sandbox.expected import Plant

if TYPE_CHECKING:
    import random

_GIVEN = (
    "Ada", "Zo\u00eb", "Orrin", "Maelis", "Tobin", "Ysolde", "Corwin", "Bettina", "Ren\u00e9", "Sunniva", "Ilse",
    "Dorian", "Petra", "Hollis", "Amadi", "Ruth", "J\u00fcrgen", "Naoko", "Emeka", "Lucinda",
)  # fmt: skip
# Two syllables that no word of any language joins: a family name found anywhere was planted by us.
_FAMILY_STARTS = (
    "Quoll", "Zephr", "Brinx", "Vokk", "Thrawb", "Gwimm", "Plozz", "Skarv", "Drumf", "Jexx", "Kwill", "Mubb",
    "Norx", "Fjolb", "Wozz", "Yarg", "Hrubb", "Clynx", "Spuzz", "Tweff",
)  # fmt: skip
_FAMILY_ENDS = (
    "marrow", "wicket", "thistle", "hammer", "lantern", "bramble", "copper", "feather", "gable", "harrow", "juniper",
    "kettle", "mallow", "needle", "pepper", "quarry", "saddle", "tinder", "velvet", "willow",
)  # fmt: skip

# Ranges the networks and gateways publish for testing: (first digits, length).
_TEST_RANGES = (("424242", 16), ("400005", 16), ("555555", 16), ("222300", 16), ("378282", 15), ("601111", 16))


def invent_name(rng: random.Random) -> tuple[str, str]:
    """(given, family)."""
    return rng.choice(_GIVEN), rng.choice(_FAMILY_STARTS) + rng.choice(_FAMILY_ENDS)


def invent_card(rng: random.Random) -> str:
    """A card number with a right check digit in a test range."""
    first, length = rng.choice(_TEST_RANGES)
    body = first + "".join(rng.choices("0123456789", k=length - len(first) - 1))
    return body + compute_check_digit(body)


def compute_check_digit(body: str) -> str:
    """Luhn check digit to append to these digits."""
    total = 0
    for position, digit in enumerate(reversed(body)):
        doubled = int(digit) * (2 if position % 2 == 0 else 1)
        total += doubled - 9 if doubled > 9 else doubled
    return str(-total % 10)


def write_card(card: str, separator: str) -> str:
    """A card number as people write it: groups of four, 4-6-5 for fifteen digits; no separator, no groups."""
    sizes = (4, 6, 5) if len(card) == 15 else (4, 4, 4, 4)
    groups, position = [], 0
    for size in sizes:
        groups.append(card[position : position + size])
        position += size
    return separator.join(groups)


class PlantRegister:
    """What was planted, and in which kinds of places."""

    def __init__(self) -> None:
        self._places: dict[tuple[str, str], set[str]] = {}

    def add(self, kind: str, text: str, place: str) -> None:
        """Note that ``text`` (``card``: digits only; ``name``: given and family) stands in ``place``."""
        self._places.setdefault((kind, text), set()).add(place)

    def list_plants(self) -> tuple[Plant, ...]:
        """All plants, sorted."""
        return tuple(Plant(kind, text, tuple(sorted(places))) for (kind, text), places in sorted(self._places.items()))

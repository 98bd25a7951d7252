"""What must come of the traffic, written before the first byte is sent, and the comparisons with what came.

Nothing here knows how the system under test works; it imports nothing of ours.
"""

from __future__ import annotations

import json
import re
from collections import defaultdict
from dataclasses import asdict, dataclass
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping, Sequence
    from pathlib import Path

_COMPARED = ("mrn", "authority", "type", "minor", "currency")


@dataclass(frozen=True, slots=True)
class ExpectedRow:
    """One posting: every member must be found as it stands here. ``minor`` is signed, in minor units."""

    target: str
    facility: str
    object_id: str
    mrn: str
    authority: str
    type: str
    minor: int
    currency: str


@dataclass(frozen=True, slots=True)
class TargetCounts:
    """Outcomes of all canonical events at one target instance."""

    posted: int
    not_routed: int
    rejected: int


@dataclass(frozen=True, slots=True)
class Plant:
    """Something that must not be found: a ``card`` (digits) or a ``name`` (given and family).

    ``places`` says where it was put: ``stripe.description``, ``stripe.metadata.note``, ``stripe.billing_details.name``,
    ``hl7.NTE-3``, ``hl7.PID-5``.
    """

    kind: str
    text: str
    places: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class Expected:
    """The expected result of one run.

    ``counts`` has the names of the conservation equation: accepted, canonical, suppressed, ignored, patient_update,
    waiting (0 at the end), in_review (0), dead_lettered. ``dead_letters`` counts the latter by kind of poison, and
    ``poison`` names each poisoned item. ``waiting_after`` is how many items wait when a phase has settled.
    ``run`` is the text that every object id of this run holds.
    """

    seed: int
    run: str
    rows: tuple[ExpectedRow, ...]
    counts: Mapping[str, int]
    dead_letters: Mapping[str, int]
    poison: Mapping[str, tuple[str, ...]]
    targets: Mapping[str, TargetCounts]
    waiting_after: Mapping[str, int]
    plants: tuple[Plant, ...]


@dataclass(frozen=True, slots=True)
class Difference:
    """One thing that is not as expected. ``problem``: missing, unexpected, twice, wrong."""

    problem: str
    place: str
    expected: str
    found: str

    def __str__(self) -> str:
        return f"{self.problem} at {self.place}: expected {self.expected or 'nothing'}, found {self.found or 'nothing'}"


@dataclass(frozen=True, slots=True)
class Finding:
    """A plant found: in which text, and which."""

    place: str
    plant: Plant


def write_expected(path: Path, expected: Expected) -> None:
    """Write the expected result as JSON."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(asdict(expected), indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def read_expected(path: Path) -> Expected:
    """Read what ``write_expected`` wrote."""
    data = json.loads(path.read_text(encoding="utf-8"))
    return Expected(
        **data
        | {
            "rows": tuple(ExpectedRow(**row) for row in data["rows"]),
            "poison": {kind: tuple(identities) for kind, identities in data["poison"].items()},
            "targets": {name: TargetCounts(**counts) for name, counts in data["targets"].items()},
            "plants": tuple(Plant(p["kind"], p["text"], tuple(p["places"])) for p in data["plants"]),
        }
    )


def select_run(expected: Expected, rows: Iterable[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    """The rows of this run in a ledger that outlives runs.

    A row whose FT1-8 is wholly wrong belongs to no run: its own posting is then missing.
    """
    return [row for row in rows if expected.run in row["description"]]


def compare_ledger(expected: Expected, rows: Iterable[Mapping[str, Any]]) -> list[Difference]:
    """Compare with the billing system's rows: exactly one row for each expected one, equal in every member.

    Rows have the members of ``sandbox.ledger.Posting``: ``instance`` is the target, ``description`` the object id.
    """
    wanted = {(row.target, row.object_id): row for row in expected.rows}
    found: dict[tuple[str, str], list[Mapping[str, Any]]] = defaultdict(list)
    for row in rows:
        found[row["instance"], row["description"]].append(row)
    differences = []
    for key in sorted(wanted.keys() | found.keys()):
        place = f"{key[0]} {key[1]}"
        present = [_describe(row) for row in found.get(key, ())]
        expected_row = wanted.get(key)
        if expected_row is None:
            differences.append(Difference("unexpected", place, "", "; ".join(present)))
            continue
        text = _describe(asdict(expected_row))
        if not present:
            differences.append(Difference("missing", place, text, ""))
        elif len(present) > 1:
            differences.append(Difference("twice", place, text, "; ".join(present)))
        elif present[0] != text:
            differences.append(Difference("wrong", place, text, present[0]))
    return differences


def _describe(row: Mapping[str, Any]) -> str:
    return " ".join(f"{name}={row[name]!r}" for name in _COMPARED)


def compare_counts(expected: Expected, counts: Mapping[str, int], *, resent: int = 0) -> list[Difference]:
    """Compare the fates of all raw records; a name that is absent counts as 0.

    ``resent`` is how often the driver sent something again that may have been stored: each can add one raw record that
    is suppressed, ignored, updates a patient again or is dead-lettered again. What is canonical, waiting or in review
    stays exact.
    """
    repeatable = ("accepted", "suppressed", "ignored", "patient_update", "dead_lettered")
    differences = []
    for name, wanted in expected.counts.items():
        actual = counts.get(name, 0)
        most = wanted + (resent if name in repeatable else 0)
        if not wanted <= actual <= most:
            text = str(wanted) if most == wanted else f"{wanted} to {most}"
            differences.append(Difference("wrong", name, text, str(actual)))
    fates = sum(counts.get(name, 0) for name in expected.counts if name != "accepted")
    if fates != counts.get("accepted", 0):
        differences.append(Difference("wrong", "sum of fates", str(counts.get("accepted", 0)), str(fates)))
    return differences


def compare_targets(
    expected: Expected, outcomes: Mapping[str, Mapping[str, int]], *, cut: bool = False
) -> list[Difference]:
    """Compare outcomes per target instance: posted, not_routed and rejected as expected, every other outcome 0.

    ``cut`` says that calls were interrupted. Then what the billing system refuses may be unknown instead of rejected:
    its second copy was refused, and nobody can tell from that what became of the first.
    """
    differences: list[Difference] = []
    for target in sorted(expected.targets.keys() | outcomes.keys()):
        known = expected.targets.get(target)
        wanted: dict[str, int] = asdict(known) if known else {}
        actual = dict(outcomes.get(target, {}))
        unknown = actual.get("unknown", 0)
        if cut and actual.get("rejected", 0) + unknown == wanted.get("rejected", 0):
            actual |= {"rejected": wanted.get("rejected", 0), "unknown": 0}
        differences.extend(
            Difference("wrong", f"{target} {name}", str(wanted.get(name, 0)), str(actual.get(name, 0)))
            for name in sorted(wanted.keys() | actual.keys())
            if wanted.get(name, 0) != actual.get(name, 0)
        )
    return differences


_CARD_SEPARATORS = re.compile(rb"[\s\-._/\\]+|\xc2\xa0")
_NAME_SEPARATORS = re.compile(rb"[^a-z0-9]+")


def find_plants(texts: Iterable[tuple[str, bytes]], plants: Sequence[Plant]) -> list[Finding]:
    """Every plant found in any (place, bytes), once per place.

    Cards are searched as digits with separators removed; of a name the family name is searched, lower case, with
    everything but letters and digits removed: it is invented and stands nowhere else.
    """
    cards: dict[bytes, list[Plant]] = defaultdict(list)
    families: dict[bytes, list[Plant]] = defaultdict(list)
    for plant in plants:
        if plant.kind == "card":
            cards[plant.text.encode()].append(plant)
        else:
            families[plant.text.split()[-1].lower().encode()].append(plant)
    card_pattern, family_pattern = _compile_words(cards), _compile_words(families)
    findings: list[Finding] = []
    for place, text in texts:
        found = {plant for match in card_pattern.findall(_CARD_SEPARATORS.sub(b"", text)) for plant in cards[match]}
        letters = _NAME_SEPARATORS.sub(b"", text.lower())
        found |= {plant for match in family_pattern.findall(letters) for plant in families[match]}
        findings.extend(Finding(place, plant) for plant in sorted(found, key=lambda plant: (plant.kind, plant.text)))
    return findings


def _compile_words(words: Iterable[bytes]) -> re.Pattern[bytes]:
    """A pattern that finds any of the words in one pass: a tree of their first letters. Of no words, one that fails."""
    tree: dict[str, Any] = {}
    for word in words:
        node = tree
        for letter in word.decode():
            node = node.setdefault(letter, {})
        node[""] = {}
    return re.compile((_write_tree(tree) if tree else "(?!)").encode())


def _write_tree(node: dict[str, Any]) -> str:
    branches = [re.escape(letter) + _write_tree(child) for letter, child in sorted(node.items()) if letter]
    if not branches:
        return ""
    return f"(?:{'|'.join(branches)}){'?' if '' in node else ''}"

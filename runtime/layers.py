"""Flag before environment before file: three trees of settings laid over each other, with the origin of every value.

Elements of a list of tables (facilities, accounts, feeds, targets) are spoken of by name in flags and environment
variables: ``targets.epic-north.port``, ``REMITSTREAM_TARGETS__EPIC_NORTH__PORT``.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from enum import IntEnum
from pathlib import Path
from typing import Any

from runtime.configuration import Document, Issue, Key

PREFIX = "REMITSTREAM_"


class Rank(IntEnum):
    """Where a value comes from; the higher wins."""

    DEFAULT = 0
    FILE = 1
    ENVIRONMENT = 2
    FLAG = 3


@dataclass(frozen=True, slots=True)
class Origin:
    """Where one value was written: ``place`` for people, ``folder`` for the relative paths in it."""

    rank: Rank
    place: str
    folder: Path


@dataclass(frozen=True, slots=True)
class Layer:
    """One source of settings. ``locate`` names the place of a key as it is spelt in this layer."""

    rank: Rank
    tree: dict[str, Any]
    locate: Callable[[Key], str]
    folder: Path


@dataclass(frozen=True, slots=True)
class At:
    """Where laying over has come to: the key in the merged tree, and as this layer spells it."""

    key: Key
    spelt: Key

    def enter(self, part: str | int, spelt: str | int) -> At:
        """One step down."""
        return At((*self.key, part), (*self.spelt, spelt))


@dataclass(slots=True)
class Merged:
    """The effective tree, the origin of each value and table in it, and what could not be laid over."""

    tree: dict[str, Any] = field(default_factory=dict)
    origins: dict[Key, Origin] = field(default_factory=dict)
    issues: list[Issue] = field(default_factory=list)
    home: str = "settings"
    """Where a person would add what is missing: the configuration file."""

    def find_origin(self, key: Key) -> Origin | None:
        """Origin of a key, else of the nearest table around it."""
        for length in range(len(key), 0, -1):
            origin = self.origins.get(key[:length])
            if origin is not None:
                return origin
        return None

    def say_place(self, key: Key) -> str:
        """Where a person finds a key, or where it would have to be added."""
        origin = self.find_origin(key)
        return origin.place if origin is not None else self.home

    def get_rank(self, *key: str | int) -> Rank:
        """How a value was given; DEFAULT when it was not."""
        origin = self.origins.get(key)
        return origin.rank if origin is not None else Rank.DEFAULT

    def spell(self, key: Key) -> str:
        """A key as people write it: list elements by name where they have one."""
        parts: list[str] = []
        node: Any = self.tree
        for part in key:
            try:
                node = node[part]
            except (KeyError, IndexError, TypeError):
                node = None
            parts.append(str(name_element(node) or part) if isinstance(part, int) else part)
        return ".".join(parts)

    def drop(self, key: Key) -> None:
        """Forget a value, as if it had not been given."""
        node: Any = self.tree
        for part in key[:-1]:
            node = node[part]
        del node[key[-1]]
        self.origins = {path: origin for path, origin in self.origins.items() if path[: len(key)] != key}


def name_element(node: Any) -> str | None:
    """Name of a list element: its ``name`` or ``id``."""
    if isinstance(node, dict):
        for member in ("name", "id"):
            if isinstance(node.get(member), str):
                return str(node[member])
    return None


def build_file_layer(document: Document) -> Layer:
    """The configuration file."""
    return Layer(Rank.FILE, document.tree, document.locate, document.path.absolute().parent)


def build_flag_layer(assignments: Iterable[tuple[str, str]]) -> Layer:
    """Flags: pairs of dotted key and text. A text beginning with ``[`` or ``{`` is JSON."""
    tree: dict[str, Any] = {}
    for key, text in assignments:
        node = tree
        parts = key.split(".")
        for part in parts[:-1]:
            below = node.setdefault(part, {})
            if not isinstance(below, dict):
                below = node[part] = {}
            node = below
        node[parts[-1]] = text
    return Layer(Rank.FLAG, tree, lambda key: f"flag --set {'.'.join(map(str, key))}", Path.cwd())


def build_environment_layer(tree: dict[str, Any], names: Iterable[str]) -> Layer:
    """Environment variables; ``tree`` as pydantic-settings unfolds them, ``names`` the variables that exist."""
    known = {name.upper() for name in names}

    def locate(key: Key) -> str:
        for length in range(len(key), 0, -1):
            name = PREFIX + "__".join(str(part).upper() for part in key[:length])
            if name in known:
                return f"environment variable {name}"
        return "environment variables " + PREFIX + "__".join(str(part).upper() for part in key) + "__*"

    return Layer(Rank.ENVIRONMENT, tree, locate, Path.cwd())


def merge(layers: Iterable[Layer]) -> Merged:
    """Lay the layers over each other; tables merge, lists and values replace, named elements are changed in place."""
    merged = Merged()
    for layer in sorted(layers, key=lambda layer: layer.rank):
        _lay_table(merged, layer, merged.tree, layer.tree, at=At((), ()))
    return merged


def _lay_table(merged: Merged, layer: Layer, below: dict[str, Any], above: dict[str, Any], *, at: At) -> None:
    for part, value in above.items():
        if isinstance(value, dict) and isinstance(below.get(part), list):
            _lay_elements(merged, layer, below[part], value, at=at.enter(part, part))
        else:
            _lay_value(merged, layer, below, part, value, at=at.enter(part, part))


def _lay_value(merged: Merged, layer: Layer, below: Any, part: str | int, value: Any, *, at: At) -> None:
    key = at.key
    origin = Origin(layer.rank, layer.locate(at.spelt), layer.folder)
    value = _decode(value) if layer.rank > Rank.FILE else value
    if isinstance(value, dict):
        if not (isinstance(part, str) and isinstance(below.get(part), dict)):
            below[part] = {}
            merged.origins[key] = origin
        merged.origins.setdefault(key, origin)
        _lay_table(merged, layer, below[part], value, at=at)
        return
    merged.origins = {path: known for path, known in merged.origins.items() if path[: len(key)] != key}
    merged.origins[key] = origin
    if isinstance(value, list):
        below[part] = [None] * len(value)
        for position, element in enumerate(value):
            _lay_value(merged, layer, below[part], position, element, at=at.enter(position, position))
    else:
        below[part] = value


def _lay_elements(merged: Merged, layer: Layer, below: list[Any], above: dict[str, Any], *, at: At) -> None:
    names = {_fold(name_element(element) or ""): position for position, element in enumerate(below)}
    names |= {str(position): position for position in range(len(below))}
    for name, value in above.items():
        position = names.get(_fold(name))
        spelt = (*at.spelt, name)
        if position is None:
            known = sorted(filter(None, map(name_element, below)))
            merged.issues.append(
                Issue(
                    key=".".join(map(str, spelt)),
                    place=layer.locate(spelt),
                    problem="no such element.",
                    accepted=", ".join(known),
                    remedy=suggest(name, known) or "Name an element of the list.",
                )
            )
        elif isinstance(value, dict) and isinstance(below[position], dict):
            _lay_table(merged, layer, below[position], value, at=at.enter(position, name))
        else:
            _lay_value(merged, layer, below, position, value, at=at.enter(position, name))


def _fold(name: str) -> str:
    """Environment variables are upper case and have no dashes."""
    return name.lower().replace("-", "_")


def _decode(value: Any) -> Any:
    """Lists and tables arrive as JSON text; a text that is not JSON stays text and fails validation by its type."""
    if isinstance(value, str) and re.match(r"\s*[\[{]", value):
        try:
            return json.loads(value)
        except ValueError:
            return value
    return value


def suggest(given: str, accepted: Iterable[str]) -> str:
    """``Did you mean x?`` for a near miss, else nothing."""
    choices = {_fold(choice): choice for choice in accepted}
    near = difflib.get_close_matches(_fold(given), choices, n=1, cutoff=0.6)
    return f"Did you mean `{choices[near[0]]}`?" if near else ""

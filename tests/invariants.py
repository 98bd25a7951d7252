"""Which tests show which invariant, and the table of it."""

from __future__ import annotations

import fnmatch
import json
import tomllib
from collections import Counter
from pathlib import Path
from typing import Any

FILE = Path(__file__).with_name("invariants.toml")

README = Path(__file__).parents[1] / "README.md"
BEGIN, END = "<!-- invariants -->\n", "<!-- end -->\n"

INTRODUCTION = """\
<!-- Written by `make test`; do not edit. -->

# Invariants and their tests

Counts are of the tests that passed in the last full run; one test may show several invariants.
`tests/invariants.toml` names them.

| Invariant | What must always hold | Tests passed | Where |
| --- | --- | --- | --- |
"""


def read() -> dict[str, Any]:
    """Invariant -> its ``name``, what it ``says``, and its ``tests``."""
    return tomllib.loads(FILE.read_text("utf-8"))


def find(known: dict[str, Any], nodeid: str) -> list[str]:
    """Invariants that a test shows, by its node id; a parameter in brackets does not count."""
    plain = nodeid.partition("[")[0]
    return [name for name, entry in known.items() if any(match(pattern, plain) for pattern in entry["tests"])]


def match(pattern: str, nodeid: str) -> bool:
    """Whether a name of the file means a test."""
    return fnmatch.fnmatchcase(nodeid, pattern) or (pattern.endswith(".py") and nodeid.startswith(f"{pattern}::"))


class Tally:
    """Tests that passed, by invariant and file."""

    def __init__(self) -> None:
        self._files: dict[str, Counter[str]] = {name: Counter() for name in read()}

    def add(self, file: str, names: list[str]) -> None:
        """One test that passed."""
        for name in names:
            self._files[name][file] += 1

    def write(self, path: Path, readme: Path = README) -> None:
        """Write the counts as JSON, the table beside it, and the short one into the README."""
        counts = {
            name: {"passed": files.total(), "tests": dict(sorted(files.items()))} for name, files in self._files.items()
        }
        path.write_text(json.dumps(counts, indent=2) + "\n", "utf-8")
        path.with_suffix(".md").write_text(render(counts), "utf-8")
        readme.write_text(put_summary(readme.read_text("utf-8"), counts), "utf-8")


def render(counts: dict[str, Any]) -> str:
    """The table of the documentation."""
    rows = []
    for name, entry in read().items():
        where = ", ".join(f"`{file.removeprefix('tests/')}` {count}" for file, count in counts[name]["tests"].items())
        rows.append(f"| **{name}** {entry['name']} | {entry['says']} | {counts[name]['passed']} | {where} |\n")
    return INTRODUCTION + "".join(rows)


def render_summary(counts: dict[str, Any]) -> str:
    """The short table of the README: the three files that show most."""
    lines = ["| Invariant | Shown by | Tests |\n", "| --- | --- | --- |\n"]
    for name, entry in read().items():
        files = Counter(counts[name]["tests"]).most_common()
        shown = ", ".join(f"`{file.removeprefix('tests/')}`" for file, _ in files[:3])
        more = f" and {len(files) - 3} more" if len(files) > 3 else ""
        lines.append(f"| **{name}** {entry['name']} | {shown}{more} | {counts[name]['passed']} |\n")
    return "".join(lines)


def put_summary(text: str, counts: dict[str, Any]) -> str:
    """The README with its table brought up to date."""
    before, rest = text.split(BEGIN)
    return before + BEGIN + render_summary(counts) + END + rest.split(END)[1]

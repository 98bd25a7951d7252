"""A user's folder of connectors, and the conformance suite over it in a process of its own."""

from __future__ import annotations

import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).parents[2]
SHARED = "REMITSTREAM_SHARED"
"""Where shared data lies: of the machine, not of a configuration."""


@dataclass(frozen=True, slots=True)
class SuiteResult:
    """What pytest said."""

    code: int
    output: str

    @property
    def passed(self):
        """How many tests passed."""
        return int(self.output.rsplit(" passed", 1)[0].rsplit(None, 1)[-1])

    @property
    def failed(self):
        """Names of the tests that failed, without their parameters."""
        lines = [line for line in self.output.splitlines() if line.startswith("FAILED")]
        return {line.partition("::")[2].partition("[")[0] for line in lines}


def make_folder(parent, monkeypatch, configuration):
    """The folder ``ours`` beside a configuration, which alone decides: no variable of this machine sets anything."""
    for name in [name for name in os.environ if name.startswith("REMITSTREAM_") and name != SHARED]:
        monkeypatch.delenv(name)
    folder = parent / "ours"
    folder.mkdir()
    (parent / "remitstream.toml").write_text(configuration, "utf-8")
    return folder


def make_mistakes(folder, mistakes):
    """Write each mistake (file, what stands there, what takes its place, the test that must see it) into the folder."""
    for file, old, new, _ in mistakes:
        text = (folder / file).read_text("utf-8")
        assert old in text
        (folder / file).write_text(text.replace(old, new), "utf-8")


def run_suite(setting, folder, chosen, *files):
    """The result of these files with ``connectors.<setting>`` naming the folder; ``chosen`` is what ``-k`` takes."""
    paths = [f"tests/conformance/{file}" for file in files]
    told = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", *paths, "-k", chosen],
        cwd=ROOT,
        env=os.environ | {f"REMITSTREAM_CONNECTORS__{setting.upper()}": str(folder)},
        capture_output=True,
        text=True,
        check=False,
    )
    return SuiteResult(told.returncode, told.stdout)

"""``mapping check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from schemas.mapping import Problem, check_files


def check(files: Sequence[Path]) -> list[Problem]:
    """Every problem of these mapping files, their examples included."""
    return check_files(files)


def summarise(files: Sequence[Path], problems: Sequence[Problem]) -> dict[str, Any]:
    """The outcome as data."""
    return {
        "valid": not problems,
        "files": [str(file) for file in files],
        "problems": [asdict(problem) for problem in problems],
    }

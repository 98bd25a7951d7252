"""``mapping check``."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

from schemas.mapping import Problem, check_files, describe_compilation


def check(files: Sequence[Path]) -> list[Problem]:
    """Every problem of these mapping files, their examples included."""
    return check_files(files)


def summarise(files: Sequence[Path], problems: Sequence[Problem]) -> dict[str, Any]:
    """The outcome as data; ``compiled`` says of source mappings whether their events take the fast way."""
    return {
        "valid": not problems,
        "files": [str(file) for file in files],
        "compiled": describe_compilation(files),
        "problems": [asdict(problem) for problem in problems],
    }

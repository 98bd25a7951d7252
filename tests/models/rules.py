"""What the tests of both protocols share: which rules of the model have a test, and what a trace must end in."""

from __future__ import annotations

import importlib.util
import os
from pathlib import Path

import pytest


class Rules:
    """Marks tests with the rules they are about; ``covered`` names all that have one."""

    def __init__(self):
        self.covered = set()

    def __call__(self, *names):
        """The test is about these rules and runs with (``kept``) and without them."""
        self.covered.update(names)
        return pytest.mark.parametrize("kept", [True, False], ids=["kept", "left-out"])


def conclude(story, kept, wrong):
    """With the rule all is right; without it, this is wrong."""
    found = story.judge()
    if kept:
        assert found == [], found
    else:
        assert wrong in found, found


def load_model(name):
    """The module of a model; skips the test where the models are not."""
    folder = Path(os.environ.get("REMITSTREAM_SHARED") or Path(__file__).parents[3] / "shared")
    source = folder / "design" / "model" / f"{name}.py"
    if not source.exists():
        pytest.skip("the models are not here")
    spec = importlib.util.spec_from_file_location(name, source)
    model = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(model)
    return model

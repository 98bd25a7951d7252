"""A stack of its own: its broker and its Redis are restarted and emptied here."""

from __future__ import annotations

import os
import shutil
import tempfile
from pathlib import Path

import pytest

from runtime.stack import EmbeddedStack
from tests.faults.fleet import choose_stack_ports
from tests.integration.conftest import CACHE


@pytest.fixture(scope="session")
def embedded_stack():
    """The stack; ``KEEP_TEST_STACK`` may name a folder where it is kept running between runs."""
    kept = os.environ.get("KEEP_TEST_STACK")
    home = Path(kept) if kept else Path(tempfile.mkdtemp(prefix="rs-"))
    stack = EmbeddedStack(home, CACHE, ports=None if kept else choose_stack_ports())
    try:
        stack.up()
        yield stack
    finally:
        if not kept:
            stack.reset()
            shutil.rmtree(home, ignore_errors=True)

"""The embedded stack of a test run."""

from __future__ import annotations

import contextlib
import os
import shutil
import tempfile
from pathlib import Path

from runtime.stack import EmbeddedStack
from tests.ports import find_ports

CACHE = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "remitstream"


def choose_ports():
    """Ports of a stack: another one on this machine must not take one while a part of this one is down."""
    roles = ("kafka", "controller", "registry", "redis")
    first = find_ports(len(roles))
    return {role: first + number for number, role in enumerate(roles)}


@contextlib.contextmanager
def open_stack():
    """A stack that is gone afterwards.

    ``KEEP_TEST_STACK`` may name a folder whose stack is kept running between runs (while developing); each
    pytest-xdist worker has one below it.
    """
    kept = os.environ.get("KEEP_TEST_STACK")
    if kept:
        yield EmbeddedStack(Path(kept) / os.environ.get("PYTEST_XDIST_WORKER", ""), CACHE)
        return
    home = Path(tempfile.mkdtemp(prefix="rs-"))
    stack = EmbeddedStack(home, CACHE, ports=choose_ports())
    try:
        yield stack
    finally:
        stack.reset()
        shutil.rmtree(home, ignore_errors=True)

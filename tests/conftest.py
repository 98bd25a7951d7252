"""For all tests: hypothesis without deadlines, the stack, and the count of tests behind each invariant.

``tests/invariants.toml`` and the marker ``invariant`` say which tests show which invariant. A run of everything writes
the counts to the file named by ``INVARIANTS_FILE`` (``make test`` sets it), and the table of them beside it.

``make test`` shares the files out to three processes of pytest-xdist, each with a stack and ports of its own.
"""

from __future__ import annotations

import os
from pathlib import Path

import hypothesis
import pytest

from tests import invariants
from tests.stacks import open_stack

# A shared machine stalls; how long one example takes says nothing about us.
hypothesis.settings.register_profile("remitstream", deadline=None)
hypothesis.settings.load_profile("remitstream")

TALLY = pytest.StashKey[invariants.Tally]()
COUNTS = pytest.StashKey[str]()


LONG = ("tests/faults/", "tests/crash_points/", "tests/integration/")
"""Folders whose files take minutes. They go first: short files at the end let the processes end together."""


@pytest.fixture(scope="session")
def embedded_stack():
    """The stack itself, for tests that stop and kill its components; they must bring it ``up`` again."""
    with open_stack() as stack:
        stack.up()
        yield stack


def pytest_configure(config: pytest.Config) -> None:
    config.stash[TALLY] = invariants.Tally()
    # Taken out: a pytest that a test starts would write its own few counts there.
    config.stash[COUNTS] = os.environ.pop("INVARIANTS_FILE", "")


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    if is_share(config):
        items.sort(key=lambda item: next((n for n, name in enumerate(LONG) if item.nodeid.startswith(name)), len(LONG)))
    known = invariants.read()
    for item in items:
        for name in invariants.find(known, item.nodeid):
            item.add_marker(pytest.mark.invariant(name))
        marked = {name for marker in item.iter_markers("invariant") for name in marker.args}
        if not marked <= set(known):
            raise pytest.UsageError(f"{item.nodeid}: no such invariant: {', '.join(sorted(marked - set(known)))}")
        # The report of a test carries them to the tally.
        item.user_properties.extend(("invariant", name) for name in sorted(marked))


def is_share(config: pytest.Config) -> bool:
    """Whether this is one of pytest-xdist's processes. All reports come together in the one that started them."""
    return hasattr(config, "workerinput")


@pytest.hookimpl(tryfirst=True)
def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    target = session.config.stash[COUNTS]
    if target and not is_share(session.config) and exitstatus in {pytest.ExitCode.OK, pytest.ExitCode.TESTS_FAILED}:
        session.config.stash[TALLY].write(Path(target))


class _Watch:
    def __init__(self, tally: invariants.Tally) -> None:
        self._tally = tally

    def pytest_runtest_logreport(self, report: pytest.TestReport) -> None:
        if report.when == "call" and report.passed:
            names = [str(name) for key, name in report.user_properties if key == "invariant"]
            self._tally.add(report.nodeid.partition("::")[0], names)


def pytest_sessionstart(session: pytest.Session) -> None:
    session.config.pluginmanager.register(_Watch(session.config.stash[TALLY]))

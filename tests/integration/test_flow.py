"""The flow on the real stack: webhooks and admissions in, canonical events out, every record accounted for."""

import pytest

pytestmark = pytest.mark.integration


def test_roles_become_ready(deployment):
    for command, role in (
        ("receive", "receiver"),
        ("listen", "listener"),
        ("project", "projector"),
        ("worker", "worker"),
    ):
        deployment.start(command)
        deployment.await_ready(role)
    account = deployment.account()
    assert account.raw.total == 0
    assert account.balanced
    for command in ("receive", "listen", "project", "worker"):
        assert deployment.stop(command) == 0

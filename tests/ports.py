"""Free ports for what the tests start, below the range that the system takes for outgoing connections.

Each pytest-xdist worker has a range of its own, and a port is not given twice before the range is through: what is
down for a while, or is started again, finds its port free.
"""

from __future__ import annotations

import os
import random
import socket

FIRST, COUNT = 10_000, 6_000
"""The range of all workers together; the embedded stack's own choice and common services lie above."""


class Ports:
    """Ports of one range, one after another from a random place."""

    def __init__(self, first, count):
        self._range = range(first, first + count)
        self._next = random.SystemRandom().randrange(count)

    def take(self, count=1):
        """The first of so many free ports in a row."""
        for _ in range(len(self._range)):
            if self._next + count > len(self._range):
                self._next = 0
            row = self._range[self._next : self._next + count]
            taken = [port for port in row if not is_free(port)]
            self._next += taken[-1] - row[0] + 1 if taken else count
            if not taken:
                return row[0]
        raise RuntimeError(f"no {count} free ports in a row in {self._range}")


def is_free(port):
    """Whether nobody listens there."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
        return True


def open_range():
    """The ports of this xdist worker; all of them without one."""
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    number = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    share = COUNT // max(workers, number + 1)
    return Ports(FIRST + share * number, share)


_OWN = open_range()


def find_ports(count=1):
    """The first of so many free ports in a row."""
    return _OWN.take(count)

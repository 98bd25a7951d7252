"""Which postings fail at first, known to the bench's server and to those who read its figures."""

from __future__ import annotations

import zlib
from enum import Enum, auto

REFUSED_SHARE = 0.095
LATE_SHARE = 0.005


class Plan(Enum):
    """What becomes of a posting's first request."""

    WELL = auto()
    REFUSED = auto()
    """503, not applied."""
    LATE = auto()
    """Applied; answered after the caller has given up."""


def choose_plan(key: str) -> Plan:
    """One in ten fails, always the same ones."""
    share = zlib.crc32(key.encode()) / 2**32
    if share < REFUSED_SHARE:
        return Plan.REFUSED
    return Plan.LATE if share < REFUSED_SHARE + LATE_SHARE else Plan.WELL

"""A straight line through readings over time, and how sure its slope is."""

from __future__ import annotations

import math
from dataclasses import dataclass
from itertools import pairwise
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Sequence

_NORMAL = 1.959964
"""97.5 % quantile of the normal distribution."""


@dataclass(frozen=True, slots=True)
class Slope:
    """Change per unit of time, with the ends of its 95 % confidence interval."""

    value: float
    low: float
    high: float


def average_blocks(points: Sequence[tuple[float, float]], seconds: float) -> list[tuple[float, float]]:
    """Means of time and value over blocks of time: neighbouring readings are alike and would feign certainty."""
    blocks: dict[int, list[tuple[float, float]]] = {}
    for at, value in points:
        blocks.setdefault(int(at // seconds), []).append((at, value))
    return [
        (sum(at for at, _ in block) / len(block), sum(value for _, value in block) / len(block))
        for _, block in sorted(blocks.items())
    ]


def find_steps(points: Sequence[tuple[float, float]], least: float) -> list[tuple[float, float]]:
    """Time and height of every rise by more than ``least`` from one point to the next: what a slope may rest on."""
    return [(at, value - before) for (_, before), (at, value) in pairwise(points) if value - before > least]


def fit_slope(points: Sequence[tuple[float, float]]) -> Slope:
    """Least squares. Raises ``ValueError`` for fewer than three points or all at one time."""
    count = len(points)
    if count < 3:
        raise ValueError("a slope with its confidence needs three points")
    mean_at = sum(at for at, _ in points) / count
    mean = sum(value for _, value in points) / count
    spread = sum((at - mean_at) ** 2 for at, _ in points)
    if spread <= 0:
        raise ValueError("all readings are of one time")
    slope = sum((at - mean_at) * (value - mean) for at, value in points) / spread
    errors = sum((value - mean - slope * (at - mean_at)) ** 2 for at, value in points)
    reach = _find_quantile(count - 2) * math.sqrt(errors / (count - 2) / spread)
    return Slope(slope, slope - reach, slope + reach)


def _find_quantile(freedom: int) -> float:
    """97.5 % quantile of Student's t: exact for 1 and 2, else the expansion around the normal (within 0.2 %)."""
    if freedom == 1:
        return 12.7062
    if freedom == 2:
        return 4.3027
    z = _NORMAL
    return (
        z
        + (z**3 + z) / (4 * freedom)
        + (5 * z**5 + 16 * z**3 + 3 * z) / (96 * freedom**2)
        + (3 * z**7 + 19 * z**5 + 17 * z**3 - 15 * z) / (384 * freedom**3)
    )

"""Whether the embedded stack serves a deployment, or services of its own."""

from __future__ import annotations

from runtime.configuration import Issue
from runtime.layers import Merged, Rank

ADDRESSES = (("kafka", "bootstrap"), ("registry", "url"), ("redis", "url"))
"""Settings that hold the address of a service: section and name."""


def decide_embedded(merged: Merged, issues: list[Issue]) -> bool:
    """Whether the embedded stack serves: asked for, and no Kafka address of higher rank.

    Drops the addresses it replaces. At equal rank in flags and environment the address is that of the stack itself.
    """
    stack = merged.tree.get("stack")
    asked = stack.get("embedded") if isinstance(stack, dict) else False
    if str(asked).lower() not in ("true", "1", "yes", "on"):
        return False
    rank, address = merged.get_rank("stack", "embedded"), merged.get_rank("kafka", "bootstrap")
    if address > rank:
        return False
    if address == rank == Rank.FILE:
        origin = merged.origins[("kafka", "bootstrap")]
        issues.append(
            Issue(
                key="kafka.bootstrap",
                place=origin.place,
                problem="given beside `stack.embedded = true`.",
                remedy="Remove it for the embedded stack, or set `stack.embedded = false` for your own.",
            )
        )
    for section, name in ADDRESSES:
        if Rank.DEFAULT < merged.get_rank(section, name) < rank:
            merged.drop((section, name))
    return True

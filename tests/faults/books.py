"""The conservation account as a second judge: it shares no code with the oracle, and neither reads the other."""

from __future__ import annotations

from runtime.account import balance_books


def find_unexplained(settings, fates, outcomes=None):
    """What the account cannot explain, or explains in another way than the oracle did. Empty when all is well.

    ``fates``: fate -> count over all raw records. ``outcomes``: target -> outcome -> count; without it nothing was
    delivered, and all canonical events must be pending at each target.
    """
    books = balance_books(settings)
    found = []
    if not books.balanced or books.lost or books.raw.pending:
        found.append(f"account: {books.build_report()}")
    if books.raw.parts != fates:
        found.append(f"account: raw records are {books.raw.parts}, the oracle says {fates}")
    for name, balance in books.targets.items():
        told = {} if outcomes is None else outcomes[name]
        if {part: count for part, count in balance.parts.items() if count} != told:
            found.append(f"account: {name} has {balance.parts}, the oracle says {told}")
        if balance.pending != (balance.total if outcomes is None else 0):
            found.append(f"account: {name} has {balance.pending} pending of {balance.total}")
    return found

"""Canonical to targets: the target contract, the runner, the attempt ledger, one file per target.

It is not: where events are interpreted; a sink maps canonical events to requests and records every outcome.
"""

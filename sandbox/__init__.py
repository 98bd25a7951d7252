"""Simulators of target systems and the traffic generator with its expected ledger.

It is not: built on our codecs. It imports none of them, so that it cannot agree with our mistakes.
"""

"""The deliverer against a simulated broker, network and target, in virtual time, at a scale no real stack allows.

Everything but ``sinks`` is written here and shares no code with it: the world keeps its own books of what arrived at
the target, and judges by them. ``python -m tests.delivery_faults --long`` runs the full counts.
"""

"""The shortest failures of the protocol's models, told to the shipped code.

Each test is one trace: the code survives it, and goes wrong in it once the rule that answers it is switched off here.
``kafka`` is the broker of these tests: its markers, rebalances and refusals come when a trace says so.
"""

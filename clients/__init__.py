"""How we CALL others: HTTP and MLLP clients, verdicts (what an answer means for the caller).

It is not: what to send (sinks) or when to send it again (the ledger of a sink). It knows neither Kafka nor connectors.
"""

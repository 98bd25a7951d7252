"""What operators SEE: structured logs with masking, metric names, health endpoints.

It is not: a place for business counts that must be exact; those are read from the topics (runtime.account).
"""

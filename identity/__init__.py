"""WHO an event is about: patient identifiers, merges, and their projection in Redis.

It is not: the parser of admission messages (sources, streams); it reads the `patients` topic only.
"""

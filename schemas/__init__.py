"""What an event IS: typed events, Avro schemas, Money, failure kinds, field sensitivity, mappings, wire format.

It is not: where events live (topics), who they are about (identity), or how they move (sources, streams, sinks).
It performs no network or Kafka I/O.
"""

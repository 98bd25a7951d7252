"""Bring raw events in: the connector contract, the webhook receiver, the MLLP listener, one file per gateway or feed.

It is not: where raw events become canonical ones (streams). A source answers its sender only after Kafka has
acknowledged the raw record.
"""

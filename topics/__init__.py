"""WHERE events live: the catalog of topics, Kafka and registry clients, headers, dead letters, provisioning.

It is not: what an event means (schemas) or what is done with it (streams, sinks).
"""

"""The embedded stack: Kafka, registry and Redis from locked artifacts, without Docker, root or Java."""

"""The embedded stack: Kafka, registry and Redis from locked artifacts, without Docker, root or a system Java.

It is: the download of the locked files, three background processes on loopback with their data in one folder, and
single-component control for fault tests. It is not: a production set-up (one broker, no replicas), nor a place where
topics or schemas are declared.

``EmbeddedStack`` in ``runtime.stack.embedded`` is the way in.
"""

from __future__ import annotations

from runtime.stack.download import Cancelled
from runtime.stack.embedded import ComponentStatus, EmbeddedStack, StackAddresses
from runtime.stack.progress import Progress, SilentProgress

__all__ = ["Cancelled", "ComponentStatus", "EmbeddedStack", "Progress", "SilentProgress", "StackAddresses"]

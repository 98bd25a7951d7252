"""Publishing raw records: returns only after Kafka has acknowledged them on all in-sync replicas."""

from __future__ import annotations

import asyncio
import threading
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaException, Producer

from topics.cluster import PRODUCER, KafkaSettings, KafkaUnreachable, name_error

if TYPE_CHECKING:
    from topics.headers import Headers


class Publisher:
    """An idempotent producer for one asyncio loop; many publishes may be under way at once."""

    def __init__(self, kafka: KafkaSettings, client_id: str, *, timeout_seconds: float = 5.0) -> None:
        self._bootstrap = kafka.bootstrap
        self._producer = Producer(
            kafka.build_client(client_id)
            | PRODUCER
            | {
                "linger.ms": 2,
                "delivery.timeout.ms": int(timeout_seconds * 1000),
                "request.timeout.ms": int(timeout_seconds * 1000),
                "queue.buffering.max.messages": 50_000,
            }
        )
        self._closing = threading.Event()
        self._poller = threading.Thread(target=self._serve_reports, name="kafka-publisher", daemon=True)
        self._poller.start()

    async def publish(self, topic: str, key: bytes, value: bytes, headers: Headers) -> None:
        """Publish one record and wait for its acknowledgement. Raises ``KafkaUnreachable`` when there is none in time.

        After that error the record may still have been written; the sender's retry is suppressed downstream.
        """
        loop = asyncio.get_running_loop()
        acknowledged: asyncio.Future[None] = loop.create_future()

        def settle(error: Any) -> None:
            if acknowledged.done():
                return
            if error is None:
                acknowledged.set_result(None)
            else:
                acknowledged.set_exception(KafkaUnreachable(f"not acknowledged ({error.name()}).", place=topic))

        def report(error: Any, _message: Any) -> None:
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, error)

        try:
            self._producer.produce(topic, value, key, headers=headers, on_delivery=report)
        except BufferError:
            raise KafkaUnreachable("the send queue is full.", place=topic) from None
        except KafkaException as error:
            raise KafkaUnreachable(f"not sent ({name_error(error)}).", place=topic) from None
        await acknowledged

    def is_connected(self, timeout: float = 2.0) -> bool:
        """Whether a broker answers now (readiness)."""
        try:
            return bool(self._producer.list_topics(timeout=timeout).brokers)
        except KafkaException:
            return False

    def close(self, timeout: float = 5.0) -> None:
        """Wait for outstanding acknowledgements, at most ``timeout`` seconds."""
        self._producer.flush(timeout)
        self._closing.set()
        self._poller.join(timeout)

    def _serve_reports(self) -> None:
        while not self._closing.is_set():
            self._producer.poll(0.1)

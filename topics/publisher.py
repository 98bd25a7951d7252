"""Publishing raw records: returns only after Kafka has acknowledged them on all in-sync replicas."""

from __future__ import annotations

import asyncio
import threading
import time
from typing import TYPE_CHECKING, Any

from confluent_kafka import KafkaError, KafkaException, Producer

from telemetry.log import get_log
from topics.cluster import PRODUCER, KafkaSettings, KafkaUnreachable, name_error, reaches_broker

if TYPE_CHECKING:
    from collections.abc import Callable

    from topics.headers import Headers

SILENT_SECONDS = 30.0
"""A client that no broker has answered for so long is replaced."""


class _Silence:
    """Since when no broker has answered one client. Any thread may tell it."""

    def __init__(self, clock: Callable[[], float]) -> None:
        self._clock = clock
        self._lock = threading.Lock()
        self._since: float | None = None
        self._is_over = False
        self.is_too_long = False

    def hear(self, error: Any) -> None:
        """The outcome of a record: librdkafka's own errors are negative, others a broker's answer."""
        if error is not None and is_over(error):
            self.end()
        elif error is None or error.code() > 0:
            self.break_off()
        else:
            self.prolong()

    def break_off(self) -> None:
        """A broker has answered."""
        with self._lock:
            self._since = None
            self.is_too_long = self._is_over

    def prolong(self) -> None:
        """A broker was asked and has not answered."""
        with self._lock:
            now = self._clock()
            if self._since is None:
                self._since = now
            self.is_too_long = self._is_over or now - self._since >= SILENT_SECONDS

    def forget(self) -> None:
        """Begin anew, as if nothing had been heard."""
        with self._lock:
            self._since = None
            self._is_over = self.is_too_long = False

    def end(self) -> None:
        """The client itself has given up, whatever brokers say."""
        with self._lock:
            self._is_over = self.is_too_long = True


def is_over(error: Any) -> bool:
    """Whether an idempotent client will never send again, for instance after the broker lost what it had written."""
    return bool(error.fatal()) or error.code() == KafkaError._FATAL  # noqa: SLF001 - the public name of that constant


class Publisher:
    """An idempotent producer for one asyncio loop; many publishes may be under way at once.

    librdkafka 2.16 was seen to lose all its brokers for good when they restarted, while a new client reached them. So a
    client that for ``SILENT_SECONDS`` no broker has answered is replaced, which does no harm when Kafka itself is away;
    one that has given up for good is replaced at once.
    What was given to the old one is still acknowledged by it, or fails when its time is over.
    """

    def __init__(
        self,
        kafka: KafkaSettings,
        client_id: str,
        *,
        timeout_seconds: float = 5.0,
        clock: Callable[[], float] = time.monotonic,
    ) -> None:
        self._client_id = client_id
        self._clock = clock
        self._configuration = (
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
        # One lock for the change of clients and for giving a record to one: its reporter must know of every record.
        self._lock = threading.Lock()
        self._asking = threading.Lock()
        self._reporters: list[threading.Thread] = []
        self._use(Producer(self._configuration))

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
            silence.hear(error)
            if not loop.is_closed():
                loop.call_soon_threadsafe(settle, error)

        try:
            with self._lock:
                silence = self._silence
                self._producer.produce(topic, value, key, headers=headers, on_delivery=report)
        except BufferError:
            silence.prolong()
            raise KafkaUnreachable("the send queue is full.", place=topic) from None
        except KafkaException as error:
            if is_over(error.args[0]):
                silence.end()
            raise KafkaUnreachable(f"not sent ({name_error(error)}).", place=topic) from None
        await acknowledged

    def is_connected(self, timeout: float = 2.0) -> bool:
        """Whether a broker answers now (readiness). Any thread may ask."""
        with self._asking:
            silence = self._silence
            answered = reaches_broker(self._producer, timeout=timeout)
        if answered:
            silence.break_off()
        else:
            silence.prolong()
        return answered

    def close(self, timeout: float = 5.0) -> None:
        """Wait for outstanding acknowledgements, at most ``timeout`` seconds."""
        end = time.monotonic() + timeout
        self._producer.flush(timeout)
        with self._lock:
            *replaced, current = self._reporters
        for reporter in replaced:  # ends when its client has nothing outstanding
            reporter.join(max(0.0, end - time.monotonic()))
        self._closing.set()
        current.join(timeout)

    def _use(self, producer: Producer) -> None:
        """Publish with this client from now on; a thread of its own serves its reports."""
        silence = _Silence(self._clock)
        reporter = threading.Thread(
            target=self._serve_reports, args=(producer, silence), name="kafka-publisher", daemon=True
        )
        with self._lock:
            reporter.start()  # first: a client whose reports nobody serves would leave its callers waiting
            self._producer, self._silence = producer, silence
            self._reporters = [*(other for other in self._reporters if other.is_alive()), reporter]

    def _serve_reports(self, producer: Producer, silence: _Silence) -> None:
        """Serve a client until it is replaced and has nothing outstanding, then let go of it.

        Letting go closes it, which may take as long as what it hangs in; here nobody waits for that.
        """
        while not self._closing.is_set():
            producer.poll(0.1)
            with self._lock:
                is_current = producer is self._producer
            if is_current and silence.is_too_long:
                self._replace(silence)
            elif not is_current and len(producer) == 0:
                with self._asking:  # else the thread that still asks it would be the last to let go
                    return

    def _replace(self, silence: _Silence) -> None:
        log = get_log("kafka")
        try:
            self._use(Producer(self._configuration))
        except (KafkaException, RuntimeError) as error:  # no thread, or a file that cannot be read now
            silence.forget()  # tried again when there is reason to
            log.warning("client_not_replaced", client=self._client_id, error=name_error(error))
        else:
            log.warning("client_replaced", client=self._client_id)

"""The subscriber in the README, run as it stands there, against the real stack."""

import ast
import os
import queue
import re
import subprocess
import sys
import threading
from pathlib import Path

import pytest
from confluent_kafka import Producer

from runtime.installation import PACKAGES
from schemas.events import MoneyEvent
from schemas.money import Money
from schemas.wire import Encoder
from topics.catalog import PAYMENTS
from topics.registry import Registry, find_ids

pytestmark = pytest.mark.integration

README = Path(__file__).parents[2] / "README.md"


def read_snippet():
    (snippet,) = re.findall(r"```python\n(.*?)```", README.read_text("utf-8"), re.DOTALL)
    return snippet


def build_event(number):
    return MoneyEvent(
        event_id=f"{number:032x}",
        transaction_key=f"stripe/north-card/capture/pi_{number}",
        tenant="lakeshore",
        facility="north",
        source="stripe",
        account="north-card",
        kind="capture",
        status="succeeded",
        money=Money(1000 + number, "KWD", 3),
        occurred_at=1_700_000_000_000,
        received_at=1_700_000_000_500,
        object_id=f"pi_{number}",
        root=f"north-card/pi_{number}",
        source_event_id=f"evt_{number}",
        mapping_version="stripe/1/0",
        origin="topic:0:0",
    )


@pytest.fixture
def publish(deployment):
    """Write events to `payments` in one transaction, which is committed or rolled back."""
    settings = deployment.settings
    encoder = Encoder("money_event", find_ids(Registry(settings.registry), settings.topics)[f"{PAYMENTS}-value"])
    producer = Producer({"bootstrap.servers": settings.kafka.bootstrap, "transactional.id": "readme-test"})
    producer.init_transactions()

    def write(*events, commit):
        producer.begin_transaction()
        for event in events:
            producer.produce(PAYMENTS, key=event.root, value=encoder.encode(event))
        producer.flush()
        if commit:
            producer.commit_transaction()
        else:
            producer.abort_transaction()

    return write


@pytest.fixture
def subscribe(deployment, tmp_path):
    """Start the snippet; returns the queue of its lines."""
    started = []

    def start():
        settings = deployment.settings
        process = subprocess.Popen(
            [sys.executable, "-c", read_snippet()],
            cwd=tmp_path,
            env={
                **os.environ,
                "KAFKA_BOOTSTRAP": settings.kafka.bootstrap,
                "REGISTRY_URL": settings.registry.url,
                "NO_PROXY": "127.0.0.1",
            },
            stdout=subprocess.PIPE,
            text=True,
        )
        started.append(process)
        lines = queue.Queue()
        threading.Thread(target=lambda: [lines.put(line.split()) for line in process.stdout], daemon=True).start()
        return process, lines

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_the_subscriber_reads_committed_events_and_goes_on_where_it_stopped(publish, subscribe):
    publish(build_event(1), commit=True)
    publish(build_event(2), commit=False)
    publish(build_event(3), commit=True)
    process, lines = subscribe()
    expected = [[f"{number:032x}", "capture", "north", str(1000 + number), "KWD"] for number in (1, 3)]
    assert sorted(lines.get(timeout=60) for _ in expected) == expected

    # Its next line is proof that the commit of the one before was answered.
    publish(build_event(4), commit=True)
    assert lines.get(timeout=60)[3] == "1004"
    publish(build_event(5), commit=True)
    assert lines.get(timeout=60)[3] == "1005"
    process.kill()
    process.wait()
    publish(build_event(6), commit=True)
    _, lines = subscribe()
    again = []
    while "1006" not in again:
        again.append(lines.get(timeout=60)[3])
    assert not {"1001", "1002", "1003", "1004"} & set(again)


def test_the_subscriber_imports_nothing_of_ours():
    imported = set()
    for node in ast.walk(ast.parse(read_snippet())):
        if isinstance(node, ast.Import):
            imported |= {name.name.partition(".")[0] for name in node.names}
        elif isinstance(node, ast.ImportFrom):
            imported.add(node.module)
    assert {"confluent_kafka", "fastavro"} <= imported
    assert not imported & set(PACKAGES)

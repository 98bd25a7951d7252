"""What a member of a group tells when its client stands still: no broker needed."""

from types import SimpleNamespace

import pytest
from confluent_kafka import KafkaError

from topics import group as module
from topics.cluster import KafkaSettings
from topics.group import GroupConsumer
from topics.reading import build_record

MESSAGE = SimpleNamespace(topic=lambda: "raw.stripe", partition=lambda: 0)


@pytest.fixture
def clock(monkeypatch):
    clock = SimpleNamespace(now=1000.0)
    monkeypatch.setattr(module.time, "monotonic", lambda: clock.now)
    return clock


@pytest.fixture
def reports():
    return []


@pytest.fixture
def member(reports):
    return GroupConsumer(
        KafkaSettings(),
        group="g",
        topics=["raw.stripe"],
        instance="i",
        transactional_id="t",
        build=build_record,
        report=lambda event, error: reports.append((event, error.place, error.detail, error.remedy)),
    )


@pytest.mark.parametrize(
    "code",
    [
        KafkaError.TOPIC_AUTHORIZATION_FAILED,
        KafkaError.GROUP_AUTHORIZATION_FAILED,
        KafkaError.UNKNOWN_TOPIC_OR_PART,
    ],
)
def test_a_standstill_is_told_now_and_then_with_what_to_do(member, reports, clock, code):
    for seconds in (0, 1, 28, 2):
        clock.now += seconds
        member._judge(MESSAGE, KafkaError(code))
    assert [(event, place, detail) for event, place, detail, _ in reports] == [
        ("client_trouble", "raw.stripe", f"{KafkaError(code).name()}.")
    ] * 2
    assert "rights" in reports[0][3]


def test_what_the_client_mends_itself_is_not_told(member, reports, clock):
    member._judge(MESSAGE, KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION))
    assert reports == []

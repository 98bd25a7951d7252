"""What a member of a group tells when its client stands still: no broker needed."""

from types import SimpleNamespace
from unittest.mock import Mock

import pytest
from confluent_kafka import KafkaError

from topics import group as module
from topics.cluster import KafkaSettings, KafkaUnreachable
from topics.group import GroupConsumer
from topics.reading import TopicMissing, build_record

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


@pytest.mark.parametrize("code", [KafkaError.INCONSISTENT_GROUP_PROTOCOL, KafkaError.INVALID_SESSION_TIMEOUT])
def test_a_group_that_refuses_a_member_is_told_and_named(member, reports, clock, code):
    answer = SimpleNamespace(topic=lambda: None)
    for seconds in (0, 1, 28, 2):
        clock.now += seconds
        member._judge(answer, KafkaError(code))
    assert [report[:3] for report in reports] == [("client_trouble", "g", f"{KafkaError(code).name()}.")] * 2
    assert (member.hindrance.code, member.hindrance.place) == ("RS398", "g")


def test_a_missing_topic_hinders_until_it_is_seen_again(member, reports):
    missing = TopicMissing("the topic was deleted.", place="raw.stripe")
    looks = [missing, KafkaUnreachable("no answer.", place="here"), missing, None]
    found = []
    for look in looks:
        member._footing.check = Mock(side_effect=look)
        member._watch_topics()
        found.append(member.hindrance)
    assert found == [missing, missing, missing, None]
    assert [report[:2] for report in reports] == [
        ("topics_not_seen", place) for place in ("raw.stripe", "here", "raw.stripe")
    ]
    assert member.failure is None


def test_what_the_client_mends_itself_is_not_told(member, reports, clock):
    member._judge(MESSAGE, KafkaError(KafkaError.NOT_LEADER_FOR_PARTITION))
    assert reports == []
    assert member.hindrance is None

"""The catalog of topics: what the protocols ask of each."""

import pytest

from schemas.wire import SCHEMA_NAMES
from streams.state import STALE_SECONDS
from topics import catalog, provision
from topics.catalog import list_topics
from topics.registry import list_subjects

TOPICS = {topic.name: topic for topic in list_topics(["stripe", "hl7"], ["epic-north"])}
DAY = 86_400_000


def test_all_topics_of_a_deployment():
    assert set(TOPICS) == {
        "payments",
        "settlements",
        "patients",
        "frontiers",
        "dispositions",
        "deliveries",
        "reviews",
        "dlq",
        "raw.stripe",
        "seen.stripe",
        "waiting.stripe",
        "lineage.stripe",
        "raw.hl7",
        "seen.hl7",
        "attempts.epic-north",
        "decisions.epic-north",
        "audit",
    }
    assert len(list_topics(["stripe", "hl7"], ["epic-north"])) == len(TOPICS)


def test_state_is_aligned_with_its_raw_topic():
    for name in ("raw.stripe", "seen.stripe", "waiting.stripe", "lineage.stripe", "attempts.epic-north",
                 "decisions.epic-north"):  # fmt: skip
        assert TOPICS[name].partitions == 0, "the flow's own count"
    assert TOPICS["frontiers"].partitions == TOPICS["audit"].partitions == 1


def test_state_that_must_not_expire_is_only_compacted():
    for name in ("frontiers", "waiting.stripe", "attempts.epic-north", "patients", "reviews"):
        assert TOPICS[name].configuration["cleanup.policy"] == "compact", name


def test_seen_keys_outlive_raw_records():
    seen = TOPICS["seen.stripe"].configuration
    assert set(seen["cleanup.policy"].split(",")) == {"compact", "delete"}
    assert int(seen["retention.ms"]) == 45 * DAY
    assert int(TOPICS["raw.stripe"].configuration["retention.ms"]) == 30 * DAY
    assert int(TOPICS["dlq"].configuration["retention.ms"]) == 90 * DAY


def test_changelogs_are_compacted_early_and_tombstones_stay_a_week():
    for topic in TOPICS.values():
        if "compact" in topic.cleanup:
            assert topic.configuration["max.compaction.lag.ms"] == "3600000"
            assert topic.configuration["min.cleanable.dirty.ratio"] == "0.1"
            assert topic.configuration["segment.ms"] == "600000"
            assert int(topic.configuration["delete.retention.ms"]) == 7 * DAY


def test_a_store_is_given_up_well_before_its_tombstones_are():
    assert STALE_SECONDS * 1000 * 2 < 7 * DAY


def test_whatever_holds_payloads_or_patients_is_marked():
    marked = {name for name, topic in TOPICS.items() if topic.phi}
    assert marked == {
        "payments",
        "patients",
        "dlq",
        "raw.stripe",
        "raw.hl7",
        "waiting.stripe",
        "lineage.stripe",
        "attempts.epic-north",
        "decisions.epic-north",
    }


def test_every_topic_says_what_it_is_for_and_who_touches_it():
    for topic in TOPICS.values():
        assert topic.purpose.endswith("."), topic.name
        assert topic.key, topic.name
        assert topic.writer, topic.name
        assert topic.readers, topic.name


def test_subjects():
    subjects = list_subjects(TOPICS.values())
    assert subjects["payments-value"] == subjects["settlements-value"] == "money_event"
    assert set(subjects.values()) == set(SCHEMA_NAMES)
    assert "raw.stripe-value" not in subjects


@pytest.mark.parametrize("embedded", [True, False])
def test_whatever_is_taken_in_fits_where_it_may_end(embedded):
    sizes = {
        name: int(provision.build_configuration(topic, embedded=embedded)["max.message.bytes"])
        for name, topic in TOPICS.items()
    }
    largest_body = 4_194_304
    assert largest_body < sizes["raw.stripe"] < min(sizes["waiting.stripe"], sizes["dlq"])
    assert sizes["raw.hl7"] == sizes["raw.stripe"]


def test_production_topics_survive_a_broker_and_never_elect_an_unclean_leader():
    for topic in TOPICS.values():
        config = provision.build_configuration(topic, embedded=False)
        assert config["min.insync.replicas"] == "2"
        assert config["unclean.leader.election.enable"] == "false"
    assert provision.REPLICATION == 3


def test_names_follow_the_source():
    assert [
        name("adyen") for name in (catalog.name_raw, catalog.name_seen, catalog.name_waiting, catalog.name_lineage)
    ] == [
        "raw.adyen",
        "seen.adyen",
        "waiting.adyen",
        "lineage.adyen",
    ]
    assert catalog.name_attempts("epic") == "attempts.epic"

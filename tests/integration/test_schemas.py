"""Schemas on a real registry: what is committed is FULL_TRANSITIVE, and a break is refused."""

import copy
import json
import uuid

import pytest

from schemas import wire
from topics.catalog import Topic, list_topics
from topics.registry import (
    Registry,
    RegistrySettings,
    RegistryUnreachable,
    SchemaBreak,
    SchemaMissing,
    find_ids,
    list_subjects,
    register_schemas,
)

pytestmark = pytest.mark.integration


@pytest.fixture
def registry(stack):
    return Registry(RegistrySettings(url=stack.registry_url))


def build_topics(prefix="", schemas=wire.SCHEMA_NAMES):
    """One topic per schema under names of their own, so that nobody else's subjects are touched."""
    prefix = prefix or f"t{uuid.uuid4().hex[:8]}"
    return [
        Topic(name=f"{prefix}.{schema}", purpose="", key="", schema=schema, writer="", readers="") for schema in schemas
    ]


def test_the_committed_history_registers_and_every_pair_is_compatible(registry):
    topics = build_topics()
    ids = register_schemas(registry, topics)
    assert ids == find_ids(registry, topics) == register_schemas(registry, topics)
    for topic in topics:
        for version in wire.load_history(topic.schema):
            assert registry.check(topic.subject, version)
            assert registry.find_id(topic.subject, version) is not None
        found = json.loads(registry.find_schema(ids[topic.subject]))
        assert [field["name"] for field in found["fields"]] == [
            field["name"] for field in json.loads(wire.load_schema(topic.schema))["fields"]
        ]


def test_every_avro_topic_of_a_deployment_has_a_subject():
    subjects = list_subjects(list_topics(["stripe", "hl7"], ["epic"]))
    assert {"payments-value", "settlements-value", "patients-value", "waiting.stripe-value"} <= set(subjects)


def remove_field(schema):
    del schema["fields"][0]


def change_type(schema):
    schema["fields"][0]["type"] = "long"


def add_without_default(schema):
    schema["fields"].append({"name": "added", "type": "string"})


def rename_record(schema):
    schema["fields"][0]["name"] = "renamed"


def narrow_a_union(schema):
    next(field for field in schema["fields"] if isinstance(field["type"], list))["type"] = "string"


BREAKS = [remove_field, change_type, add_without_default, rename_record, narrow_a_union]


@pytest.mark.parametrize("break_schema", BREAKS)
def test_a_break_is_refused_and_registers_nothing(registry, monkeypatch, break_schema):
    topics = build_topics(schemas=("money_event",))
    before = register_schemas(registry, topics)
    schema = json.loads(wire.load_schema("money_event"))
    break_schema(schema)
    monkeypatch.setattr(wire, "load_schema", lambda _name: json.dumps(schema))
    with pytest.raises(SchemaBreak) as refused:
        register_schemas(registry, topics)
    assert refused.value.place == topics[0].subject
    with pytest.raises(SchemaBreak):
        find_ids(registry, topics)
    with pytest.raises(SchemaBreak):
        registry.register(topics[0].subject, json.dumps(schema))
    assert registry.find_id(topics[0].subject, json.dumps(schema)) is None
    monkeypatch.undo()
    assert find_ids(registry, topics) == before


def test_a_field_with_a_default_is_taken(registry, monkeypatch):
    topics = build_topics(schemas=("money_event",))
    before = register_schemas(registry, topics)
    schema = json.loads(wire.load_schema("money_event"))
    schema["fields"].append({"name": "added", "type": ["null", "string"], "default": None})
    monkeypatch.setattr(wire, "load_schema", lambda _name: json.dumps(schema))
    with pytest.raises(SchemaMissing):
        find_ids(registry, topics)
    after = register_schemas(registry, topics)
    assert after != before
    assert find_ids(registry, topics) == after


def test_compatibility_is_with_all_versions_not_only_the_last(registry):
    """A field that went away may not come back as something else: FULL would take it, FULL_TRANSITIVE does not."""
    (topic,) = build_topics(schemas=("money_event",))
    first = json.loads(wire.load_schema("money_event"))
    optional = {"name": "extra", "type": ["null", "string"], "default": None}
    with_extra, changed = copy.deepcopy(first), copy.deepcopy(first)
    with_extra["fields"].append(optional)
    changed["fields"].append(optional | {"type": ["null", "long"]})
    registry.register(topic.subject, json.dumps(with_extra))
    registry.register(topic.subject, json.dumps(first))
    with pytest.raises(SchemaBreak):
        registry.register(topic.subject, json.dumps(changed))


def test_a_registry_that_is_away_or_empty_is_told_apart(registry):
    topics = build_topics(schemas=("review",))
    with pytest.raises(SchemaMissing) as missing:
        find_ids(registry, topics)
    assert missing.value.exit_code == 78
    with pytest.raises(SchemaMissing):
        registry.find_schema(2_000_000_000)
    with pytest.raises(RegistryUnreachable):
        find_ids(Registry(RegistrySettings(url="http://127.0.0.1:1/apis"), timeout=2), topics)

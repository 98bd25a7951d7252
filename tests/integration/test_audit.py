"""The hash chain of `audit` on a real broker: it grows, cannot fork, and whoever changes it is found."""

import json

import pytest
from confluent_kafka import Producer, TopicPartition
from confluent_kafka.admin import AdminClient

from schemas.keys import HmacKey
from topics import audit
from topics.audit import Actor, AuditLog, DeskBusy, ReasonRefused
from topics.transaction import Output

pytestmark = pytest.mark.integration

KEY = HmacKey(b"k" * 32)
ADA = Actor(os_user="ada", host="desk-1", by="Ada", why="TICKET-1")


@pytest.fixture(scope="module")
def shared(deploy_for_module):
    return deploy_for_module(worker__partitions="1")


@pytest.fixture
def kafka(shared):
    shared.provision()
    return shared.settings.kafka


def write_acts(kafka, count, key=KEY):
    with AuditLog(kafka, key, ADA) as log:
        return [log.append("dlq.redrive", [f"0:{n}"], {"codes": "X"}) for n in range(count)]


def read_values(outside, shared):
    return [(m.key(), m.value(), m.headers()) for m in outside(shared).read_topic("audit")]


def plant(kafka, key, value, headers):
    producer = Producer({"bootstrap.servers": kafka.bootstrap})
    producer.produce("audit", value, key, headers=headers)
    assert producer.flush(10) == 0


def test_a_chain_of_two_commands_is_whole(kafka, shared, outside):
    write_acts(kafka, 2)
    write_acts(kafka, 1)
    chain = audit.verify(kafka, KEY)
    assert (chain.acts, chain.first, chain.last, chain.problems) == (3, 1, 3, [])
    acts = [json.loads(value) for _, value, _ in read_values(outside, shared)]
    assert [act["number"] for act in acts] == [1, 2, 3]
    assert {(act["by"], act["os_user"], act["host"], act["why"], act["act"]) for act in acts} == {
        ("Ada", "ada", "desk-1", "TICKET-1", "dlq.redrive")
    }
    assert audit.verify(kafka, KEY, expected=(chain.last, chain.head)).problems == []
    assert [act.ids for act in audit.read_acts(kafka)] == [["0:0"], ["0:1"], ["0:0"]]


def test_an_empty_chain_is_whole(kafka):
    assert audit.verify(kafka, KEY).acts == 0


def test_an_act_added_by_somebody_without_the_key_is_found(kafka, shared, outside):
    write_acts(kafka, 2)
    key, value, headers = read_values(outside, shared)[-1]
    forged = json.loads(value) | {"number": 3, "previous": audit.hash_value(value), "why": "nothing to see"}
    plant(kafka, key, json.dumps(forged).encode(), headers)
    (problem,) = audit.verify(kafka, KEY).problems
    assert "seal" in problem


def test_a_copied_a_left_out_and_a_foreign_record_are_found(kafka, shared, outside):
    write_acts(kafka, 3)
    records = read_values(outside, shared)
    plant(kafka, *records[0])
    assert any("does not follow" in problem for problem in audit.verify(kafka, KEY).problems)
    shared.provision()
    for record in (records[0], records[2]):
        plant(kafka, *record)
    (problem,) = audit.verify(kafka, KEY).problems
    assert "act 3 does not follow act 1" in problem
    shared.provision()
    plant(kafka, b"x", b"not json", [])
    assert any("no act" in problem for problem in audit.verify(kafka, KEY).problems)


def test_another_key_of_a_record_is_found(kafka, shared, outside):
    write_acts(kafka, 1)
    (record,) = read_values(outside, shared)
    shared.provision()
    plant(kafka, b"Grace", record[1], record[2])
    assert audit.verify(kafka, KEY).problems == ["audit@0: the key is not who acted"]


def test_a_cut_end_is_found_by_an_end_noted_before(kafka, shared, outside):
    write_acts(kafka, 3)
    end = audit.verify(kafka, KEY)
    records = read_values(outside, shared)
    shared.provision()
    for record in records[:2]:
        plant(kafka, *record)
    assert audit.verify(kafka, KEY).problems == []
    (problem,) = audit.verify(kafka, KEY, expected=(end.last, end.head)).problems
    assert "act 3" in problem


def test_a_begin_that_retention_removed_is_no_fault(kafka):
    write_acts(kafka, 4)
    admin = AdminClient({"bootstrap.servers": kafka.bootstrap})
    for future in admin.delete_records([TopicPartition("audit", 0, 2)]).values():
        future.result()
    chain = audit.verify(kafka, KEY)
    assert chain.problems == []
    assert chain.first > 1


def test_two_desks_cannot_fork_the_chain(kafka, shared, outside):
    with AuditLog(kafka, KEY, ADA) as first:
        first.append("dlq.redrive", ["0:1"], {})
        with AuditLog(kafka, KEY, Actor(os_user="g", by="Grace", why="TICKET-2")) as second:
            with pytest.raises(DeskBusy):
                first.append("dlq.redrive", ["0:2"], {}, [Output("dlq", b"k", b"v")])
            second.append("dlq.redrive", ["0:3"], {})
    chain = audit.verify(kafka, KEY)
    assert (chain.acts, chain.problems) == (2, [])
    assert outside(shared).read_topic("dlq") == []


def test_who_acts_on_a_state_that_somebody_changed_since_must_look_again(kafka):
    with AuditLog(kafka, KEY, ADA, seen=0) as log:
        log.append("dlq.redrive", ["0:1"], {})
        log.append("dlq.redrive", ["0:2"], {})
    with pytest.raises(DeskBusy, match="act 2 came after act 1"), AuditLog(kafka, KEY, ADA, seen=1):
        pass
    with AuditLog(kafka, KEY, ADA, seen=2) as log:
        log.append("dlq.redrive", ["0:3"], {})
    assert audit.verify(kafka, KEY).acts == 3


def test_an_act_and_what_it_leads_to_are_one(kafka, shared, outside):
    with AuditLog(kafka, KEY, ADA) as log:
        log.append("dlq.redrive", ["0:1"], {}, [Output("dlq", b"k", b"v")])
    assert [m.value() for m in outside(shared).read_topic("dlq")] == [b"v"]


@pytest.mark.parametrize(("by", "why"), [("", "x"), ("Ada", " "), ("Ada", "x" * 501), ("Ada", "4111 1111 1111 1111")])
def test_who_and_why_are_needed_and_hold_no_card(kafka, by, why):
    with pytest.raises(ReasonRefused) as caught:
        AuditLog(kafka, KEY, Actor(os_user="ada", by=by, why=why))
    assert "4111" not in str(caught.value)

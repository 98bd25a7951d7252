"""The index of the waiting room, compared with a plain list."""

from hypothesis import given
from hypothesis import strategies as st

from streams.waiting import BEHIND_ENTITY, PARENT_UNKNOWN, PATIENT_UNKNOWN, Held, WaitingDraft, WaitingRoom


def held(offset, entity="e", reason=PATIENT_UNKNOWN, awaited="p", since=0):
    return Held(f"T:0:{offset}", entity, reason, awaited, since)


def test_order_is_arrival_not_text():
    draft = WaitingDraft(WaitingRoom())
    for offset in (10, 9, 100):
        draft.hold(held(offset))
    assert [item.hop for item in draft.list_entity("e")] == ["T:0:9", "T:0:10", "T:0:100"]


def test_only_missing_patients_are_looked_up_and_only_missing_parents_expire():
    room = WaitingRoom()
    room.hold(held(1, "a", PATIENT_UNKNOWN, "p1"))
    room.hold(held(2, "a", BEHIND_ENTITY, "a"))
    room.hold(held(3, "b", PARENT_UNKNOWN, "b", since=5))
    room.hold(held(4, "c", PARENT_UNKNOWN, "c", since=10))
    assert set(room.list_awaited()) == {"p1"}
    assert room.list_entities("p1") == ["a"]
    assert room.list_entities("nobody") == []
    assert [item.hop for item in room.list_expired(10)] == ["T:0:3"]
    assert room.find_oldest() == 0


def test_an_empty_room():
    room = WaitingRoom()
    assert (len(room), room.find_oldest(), list(room.list_awaited()), room.get_entity("e")) == (0, None, [], {})
    room.release("e", "T:0:1")


def test_a_draft_changes_the_room_only_when_applied():
    room = WaitingRoom()
    room.hold(held(1))
    draft = WaitingDraft(room)
    draft.release(held(1))
    draft.hold(held(2))
    assert [item.hop for item in draft.list_entity("e")] == ["T:0:2"]
    assert [item.hop for item in room] == ["T:0:1"]
    draft.apply()
    assert [item.hop for item in room] == ["T:0:2"]


CHANGES = st.lists(
    st.tuples(
        st.integers(0, 5),
        st.sampled_from((None, PATIENT_UNKNOWN, PARENT_UNKNOWN, BEHIND_ENTITY)),
        st.sampled_from(("p", "q")),
    ),
    max_size=20,
)


@given(batches=st.lists(st.tuples(CHANGES, st.booleans()), max_size=6))
def test_the_index_says_what_a_plain_list_says(batches):
    room, plain = WaitingRoom(), {}
    for changes, committed in batches:
        draft, wanted = WaitingDraft(room), dict(plain)
        for offset, reason, awaited in changes:
            # A record never changes its entity, and what ended its wait does not come back in the same batch.
            entity = "ab"[offset % 2]
            item = held(offset, entity, reason or PATIENT_UNKNOWN, awaited, since=offset)
            if reason is None:
                draft.release(item)
                wanted.pop(item.hop, None)
            elif item not in draft.released and item.hop not in {gone.hop for gone in draft.released}:
                draft.hold(item)
                wanted[item.hop] = item
            assert {i.hop for i in draft.list_entity(entity)} == {
                hop for hop, i in wanted.items() if i.entity == entity
            }
        if committed:
            draft.apply()
            plain = wanted
        assert {item.hop: item for item in room} == plain
        assert len(room) == len(plain)
        patients = {item.awaited for item in plain.values() if item.reason == PATIENT_UNKNOWN}
        assert set(room.list_awaited()) == patients
        for name in ("p", "q"):
            assert room.list_entities(name) == sorted(
                {i.entity for i in plain.values() if i.reason == PATIENT_UNKNOWN and i.awaited == name}
            )
        assert room.find_oldest() == min((item.since for item in plain.values()), default=None)

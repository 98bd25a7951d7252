"""Every rule of the stream's protocol: the shortest trace that needs it, with the rule and without.

Shipped feeder, group consumer, transactions, decider, local store and loading run; the broker is
``tests.models.kafka``. The names are those of the model's rules. "Without" switches the rule off here, mostly at the
broker's door.
"""

from __future__ import annotations

import asyncio
import shutil
import threading

import msgspec
import pytest

from streams.state import Draft
from tests.models.kafka import Consumer, Death
from tests.models.rules import Rules, conclude, load_model
from tests.models.stream import K1, K2, K3, POISON, Story, capture
from topics import frontier
from topics.footing import PositionBroken
from topics.transaction import Transactor

rule = Rules()
GROUP = "remitstream.worker"
EMPTY = msgspec.msgpack.encode([])


@pytest.fixture
async def tell(monkeypatch, tmp_path):
    """Begin a story; whatever it started ends with the test."""
    opened = []

    def begin(*raw):
        opened.append(Story(monkeypatch, tmp_path, *raw))
        return opened[-1]

    yield begin
    for story in opened:
        story.kafka.before = lambda step, txid: None
        story.kafka.holds_markers = False
        story.kafka.write_markers()
        await story.close()


def die_at(story, step, txid):
    """The process of this transactional id ends before this step, once."""
    done = []

    def before(at, who):
        if (at, who) == (step, txid) and not done:
            done.append(at)
            raise Death

    story.kafka.before = before
    return done


async def take_over_before_markers(story, *first):
    """``w0`` loses everything to ``w1`` while markers of its last transaction are on the way.

    Those of the offsets and of the topics ``first`` come at once, the others when ``w1`` is loaded or waits for them.
    """
    (old,) = story.workers
    new = await story.start("w1")
    story.give_to("w1")
    await old.look()
    story.kafka.write_first_markers(*first)
    loading = asyncio.create_task(new.look())
    await asyncio.wait({loading}, timeout=0.15)
    story.kafka.holds_markers = False
    story.kafka.write_markers()
    await loading
    return new


@rule("no-frontier")
async def test_reset_offsets_do_not_replay_history(tell, monkeypatch, kept):
    """w0 commits all. An operator resets the group's offset to 0 and w1 takes over. Without the frontier w1 begins at
    the group's offset and decides every record a second time."""
    story = tell(POISON, K1)
    story.refuse(0)
    await (await story.start("w0")).run()
    story.kafka.groups[GROUP].offsets.clear()
    if not kept:
        monkeypatch.setattr(
            frontier,
            "read_frontiers",
            lambda _kafka, name: {(f"id-{t}", 0): offset for t, offset in story.kafka.groups[name].offsets.items()},
        )
    new = await story.start("w1")
    story.give_to("w1")
    await story.workers[0].look()
    await new.run()
    conclude(story, kept, "hop 1 has ['canonical', 'suppressed']")


@rule("seen-before-commit")
async def test_an_aborted_batch_leaves_no_key_behind(tell, kept):
    """One batch holds a copy that the broker refuses, and a good one. The transaction aborts and the batch is decided
    again. If the store changed when the batch was decided, the good copy is the duplicate of nothing."""
    story = tell(POISON, K1)
    story.refuse(0)

    async def change_early(_worker, _batch, decision):
        decision.apply()

    if not kept:
        story.before_commit = change_early
    await (await story.start("w0")).run()
    conclude(story, kept, "pi_1 is nowhere")


@rule("seen-outside-transaction")
async def test_seen_keys_are_written_with_their_outputs(tell, monkeypatch, kept):
    """w0 commits a fact and dies right after. If its key was to be written after the commit, w1 does not know the fact
    and publishes a replayed copy."""
    story = tell(K1)
    original = Transactor.commit

    def commit_seen_later(self, outputs, offsets, metadata, changelogs=()):
        seen = [log for log in changelogs if log.topic.startswith("seen.")]
        original(self, outputs, offsets, metadata, [log for log in changelogs if log not in seen])
        story.kafka.before("later", self.transactional_id)
        for log in seen:
            for key, (value, _) in log.entries.items():
                log.offset = story.kafka.append(log.topic, key, value)

    if not kept:
        monkeypatch.setattr(Transactor, "commit", commit_seen_later)
    old = await story.start("w0")
    died = die_at(story, "committed" if kept else "later", old.txid)
    await old.run()
    assert died
    story.send(K1)
    new = await story.start("w1")
    story.give_to("w1")
    await new.run()
    conclude(story, kept, "pi_1 2 times in canonical")


@rule("dead-letter-writes-seen")
async def test_a_dead_letter_marks_no_key(tell, kept):
    """A copy is refused by the broker and becomes a dead letter. If that wrote its key, the next good copy would be
    suppressed as the duplicate of nothing."""
    story = tell(POISON, K1)
    story.refuse(0)

    async def mark_too(worker, batch, decision):
        if decision.dead_letters:
            # What the record would have written had it passed.
            passed = await worker.decider.decide(batch.rooms, batch.records)
            for log in passed.list_changelogs():
                for key, (value, _) in log.entries.items() if log.topic == "seen.stripe" else ():
                    decision.drafts[0].write_seen(key.decode(), msgspec.msgpack.decode(value))

    if not kept:
        story.before_commit = mark_too
    await (await story.start("w0", size=1)).run()
    assert story.list_fates()[0] == ["dead_lettered"]
    conclude(story, kept, "pi_1 is nowhere")


@rule("metadata-late")
async def test_a_batch_of_an_earlier_generation_is_fenced(tell, monkeypatch, kept):
    """w0 has decided a batch when everything goes to w1, which commits it. w0 has not polled since. With group metadata
    taken when it commits, of the new generation, nothing would fence w0."""
    story = tell(K1)
    old = await story.start("w0")
    batch = await old.fetch()
    decision = await old.decide(batch)
    new = await story.start("w1")
    story.give_to("w1")
    await new.run()
    if not kept:
        monkeypatch.setattr(
            Consumer,
            "consumer_group_metadata",
            lambda self: (GROUP, story.kafka.groups[GROUP].generation, story.kafka.groups[GROUP].owner),
        )
    await old.commit(batch, decision)
    conclude(story, kept, "pi_1 2 times in canonical")


@pytest.mark.parametrize("polls", [0, 1])
async def test_a_batch_does_not_outlive_a_rebalance(tell, polls):
    """As before, and w0 gets everything back before it commits: its generation is current again when it has polled, and
    only the assignment number tells that the batch is of another life."""
    story = tell(K1)
    old = await story.start("w0")
    batch = await old.fetch()
    decision = await old.decide(batch)
    new = await story.start("w1")
    story.give_to("w1")
    await new.run()
    story.give_to("w0")
    for _ in range(polls):
        await old.look()
    assert not await old.commit(batch, decision)
    await new.look()
    await old.run()
    assert story.judge() == []


@rule("no-seek-after-rebalance")
async def test_a_kept_partition_is_sought_to_its_frontier(tell, kept):
    """w0 has fetched records when a rebalance leaves it its partition. The batch is discarded. Without the seek the
    next one begins behind it, and the commit would jump over the records; here the worker stops instead."""
    story = tell(K1, K1, capture("pi_3"), capture("pi_4"))
    worker = await story.start("w0")
    batch = await worker.fetch()
    decision = await worker.decide(batch)
    story.kafka.seeks = kept
    story.give_to("w0")
    if kept:
        assert (await worker.fetch()).records[0].offset == 0
        assert not await worker.commit(batch, decision)
        await worker.run()
        assert story.judge() == []
    else:
        with pytest.raises(PositionBroken, match="skipped"):
            await worker.fetch()
        assert story.list_fates() == {0: [], 1: [], 2: [], 3: []}


@rule("reload-to-lso")
async def test_the_waiting_room_is_loaded_to_its_end(tell, kept):
    """w0 parks two events and loses its partition. The markers of the offsets and of the frontier come first; that of
    the waiting room is on the way when w1 loads. Up to the last stable offset the room is empty, for good."""
    story = tell(K2, K3)
    old = await story.start("w0")
    story.kafka.holds_markers = True
    await old.run(until=lambda: any(t.state == "prepared" for t in story.kafka.transactions))
    if not kept:
        story.kafka.ends_at_stable = {"waiting.stripe"}
    new = await take_over_before_markers(story, "frontiers", "seen.stripe", "lineage.stripe")
    story.patients.admit("M-late")
    await new.run()
    conclude(story, kept, "hop 0 has ['waiting']")


@rule("seen-to-lso")
async def test_the_store_is_caught_up_to_its_end(tell, kept):
    """As before with the changelog of seen keys: the key of a published fact is on the way when w1 catches up. A
    replayed copy would be published again."""
    story = tell(K1)
    old = await story.start("w0")
    story.kafka.holds_markers = True
    await old.run(until=lambda: any(t.state == "prepared" for t in story.kafka.transactions))
    if not kept:
        story.kafka.ends_at_stable = {"seen.stripe"}
    new = await take_over_before_markers(story, "frontiers", "waiting.stripe", "lineage.stripe")
    story.send(K1)
    await new.run()
    conclude(story, kept, "pi_1 2 times in canonical")


@rule("frontier-to-lso")
async def test_the_frontier_is_read_to_its_end(tell, kept):
    """As before with the frontier itself: the offsets' marker has come, so nothing is pending, but the frontier is not
    visible yet. w1 would begin at the old one and decide records that are decided. (Had there been none before, it
    would stop: an offset never comes without one.)"""
    story = tell(capture("pi_0"), K1)
    old = await story.start("w0", size=1)
    await old.run(until=lambda: story.kafka.read("frontiers"))
    story.kafka.holds_markers = True
    await old.run(until=lambda: any(t.state == "prepared" for t in story.kafka.transactions))
    if not kept:
        story.kafka.ends_at_stable = {"frontiers"}
    new = await take_over_before_markers(story)
    await new.run()
    conclude(story, kept, "hop 1 has ['canonical', 'suppressed']")


async def overtake_between_offsets_and_commit(story):
    """``w1`` takes over between ``w0``'s offsets and its commit, and works if it can; then ``w0`` goes on."""
    old, new = await story.start("w0"), await story.start("w1")
    reached, go_on = threading.Event(), threading.Event()

    def before(step, txid):
        if (step, txid) == ("commit", old.txid):
            reached.set()
            assert go_on.wait(20)

    story.kafka.before = before
    first = asyncio.create_task(old.run())
    await asyncio.to_thread(reached.wait, 20)
    story.give_to("w1")
    second = asyncio.create_task(new.run(until=lambda: story.kafka.read("frontiers")))
    await asyncio.wait({second}, timeout=0.5)
    go_on.set()
    await asyncio.wait_for(second, 20)
    await asyncio.wait_for(first, 20)
    await new.run()


@rule("late-flush")
async def test_everything_is_flushed_before_the_offsets_are_sent(tell, kept):
    """w0 sends its offsets, which is where a broker fences; then w1 takes over. If w0's records leave its queue only at
    the commit, and nobody waits for pending offsets, w1 sees nothing of them, and both commit the same records."""
    story = tell(K1)
    story.kafka.flushes_late = not kept
    await overtake_between_offsets_and_commit(story)
    conclude(story, kept, "pi_1 2 times in canonical")


async def test_pending_offsets_are_waited_for_and_would_alone_suffice(tell, monkeypatch):
    """The same trace without the barrier: harmless as long as everything is flushed first (the frontier's undecided
    record holds w1 back)."""
    story = tell(K1)
    asked = []
    monkeypatch.setattr(frontier, "await_pending_offsets", lambda *place: asked.append(place) or {})
    await overtake_between_offsets_and_commit(story)
    assert asked, "the barrier was not there to be taken away"
    assert story.judge() == []


rule.covered.add("no-barrier")


@rule("park-without-seen")
async def test_a_waiting_event_is_known(tell, monkeypatch, kept):
    """An event waits for its patient, is released and published; later a copy is replayed. If parking did not write
    the key (and releasing does not), the copy is published again."""
    story = tell(K1, K2)
    if not kept:
        original_hold, original_write = Draft.write_waiting, Draft.write_seen
        parked = set()

        def write_waiting(self, hop, entry):
            parked.add(hop)
            original_hold(self, hop, entry)

        def write_seen(self, key, entries):
            if not entries or entries[-1].hop not in parked:
                original_write(self, key, entries)

        monkeypatch.setattr(Draft, "write_waiting", write_waiting)
        monkeypatch.setattr(Draft, "write_seen", write_seen)
    worker = await story.start("w0")
    await worker.run()
    assert story.list_waiting() == [1]
    story.patients.admit("M-late")
    await worker.run()
    assert story.list_published() == ["pi_1", "pi_2"]
    story.send(K2)
    await worker.run()
    conclude(story, kept, "pi_2 2 times in canonical")


@rule("ignore-applied")
async def test_a_store_found_on_disk_is_caught_up(tell, kept):
    """w0 commits a fact and dies before its store has it; the store on disk is from before. Taken as it is, it does
    not know the fact, and a replayed copy is published."""
    story = tell(K1)
    first = await story.start("w0")
    await first.run()
    story.send(capture("pi_9"))
    died = die_at(story, "committed", first.txid)
    await first.run()
    assert died
    story.kafka.hides = set() if kept else {"seen.stripe"}
    story.send(capture("pi_9"))
    again = await story.start("w0")
    story.give_to("w0")
    await again.run()
    conclude(story, kept, "pi_9 2 times in canonical")


async def refuse_release(story, worker):
    """What waited is refused when it is released, and becomes a dead letter; then a copy is replayed."""
    await worker.run()
    assert story.list_waiting() == [1]
    story.refuse(1)
    story.patients.admit("M-late")
    await worker.run()
    assert story.list_fates()[1] == ["dead_lettered"]


@rule("void")
async def test_a_release_that_fails_gives_its_key_back(tell, monkeypatch, kept):
    """An event waits and has its key. Its release is refused by the broker: a dead letter. If the key stayed, every
    good copy and every redrive would be the duplicate of nothing."""
    story = tell(K1, K2)
    if not kept:
        original = Draft.write_seen
        monkeypatch.setattr(Draft, "write_seen", lambda self, key, entries: entries and original(self, key, entries))
    worker = await story.start("w0")
    await refuse_release(story, worker)
    story.send(K2)
    await worker.run()
    conclude(story, kept, "pi_2 is nowhere")


@rule("tombstone")
async def test_a_key_given_back_survives_compaction(tell, kept):
    """As before, and the worker then finds an old copy of its store, in which the key is taken. Void is a value, which
    compaction keeps; a tombstone would be gone, and the old store would never hear of it."""
    story = tell(K1, K2)
    if not kept:
        story.kafka.rewrites = lambda topic, value: None if topic == "seen.stripe" and value == EMPTY else value
    worker = await story.start("w0")
    await worker.run()
    await worker.feeder.close()
    shutil.copytree(story.folder, story.folder.parent / f"{story.folder.name}-old")
    worker = await story.start("w0")
    story.give_to("w0")
    await refuse_release(story, worker)
    await worker.feeder.close()
    shutil.rmtree(story.folder)
    shutil.copytree(story.folder.parent / f"{story.folder.name}-old", story.folder)
    story.kafka.compact("seen.stripe")
    story.send(K2)
    worker = await story.start("w0")
    story.give_to("w0")
    await worker.run()
    conclude(story, kept, "pi_2 is nowhere")


@rule("review-adds")
async def test_a_review_adds_its_digest_to_the_entry(tell, monkeypatch, kept):
    """Copies of one fact alternate between two digests. If a review replaced the entry, each copy would differ from
    the last, and one that is published long since would go to a person."""
    one, other = K1, capture("pi_1", 7)
    story = tell(one, other, one, other)
    if not kept:
        original = Draft.write_seen
        monkeypatch.setattr(Draft, "write_seen", lambda self, key, entries: original(self, key, list(entries)[-1:]))
    await (await story.start("w0")).run()
    if kept:
        assert [fates for _, fates in sorted(story.list_fates().items())] == [
            ["canonical"],
            ["in_review"],
            ["suppressed"],
            ["suppressed"],
        ]
    else:
        assert story.list_fates()[2] == ["in_review"]


def test_every_rule_of_the_model_has_a_test():
    model = load_model("stream_model")
    assert set(model.RULES) | set(model.CONTROLS) == rule.covered

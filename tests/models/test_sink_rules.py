"""Every rule of a sink's protocol: the shortest trace that needs it, with the rule and without.

Shipped runner, ledger, group consumer and transactions run; broker, network, target and time are this package's. The
names are those of the model's rules. X0 is a parent, X1 its child, Y0 of another entity.
"""

from __future__ import annotations

import asyncio
import dataclasses
import functools
import threading

import pytest

from schemas.events import Action
from schemas.failure import FailureKind
from sinks.attempts import Attempt, Ruling, State
from sinks.contract import Answer
from sinks.ledger import Ledger
from sinks.policy import Policy
from sinks.runner import Runner
from sinks.shards import Shards
from tests.models.rules import Rules, conclude, load_model
from tests.models.sink import ATTEMPTS, DEADLINE, GROUP, SESSION, WINDOW, X0, X1, Y0, Story, read_state
from topics import catalog, frontier
from topics.group import LastWork

rule = Rules()
OVER = DEADLINE + SESSION + 10
"""Longer than any earlier write can take to land, after a take-over too."""


@pytest.fixture
async def tell(monkeypatch):
    """Begin a story about a target of a class; whatever it started ends with the test."""
    opened = []

    def begin(kind, *events):
        opened.append(Story(monkeypatch, kind, *events))
        return opened[-1]

    yield begin
    for story in opened:
        story.kafka.before = lambda step, txid: None
        await story.close()


def tombstone(story, *states):
    """Entries of these states are written as tombstones."""

    def rewrite(topic, value):
        return None if topic == ATTEMPTS and value is not None and read_state(value) in states else value

    story.kafka.rewrites = rewrite


@rule("tombstone-at-once")
async def test_done_stays_until_the_frontier_passes_it(tell, kept):
    """X0 hangs and holds the frontier. Y0 is posted. Kill -9. If Y0's entry was tombstoned in its outcome transaction,
    the next owner finds no entry above the frontier and posts Y0 again."""
    story = tell("D", X0, Y0)
    story.plan["x0"] = ["hang"]
    if not kept:
        tombstone(story, "DONE")
    await story.start("w0")
    await story.until(lambda: story.list_outcomes().get("y0") == ["posted"])
    assert story.get_frontier() == 0
    await story.kill("w0")
    await story.take_over("w1")
    await story.live(OVER)
    conclude(story, kept, "y0 was applied twice")


@rule("commit-lowest-unfinished-without-frontier")
async def test_reset_offsets_post_nothing_again(tell, monkeypatch, kept):
    """X0 is posted, its entry tombstoned as the frontier passes it. An operator resets the group's offset to 0 and
    another owner loads. Without a frontier of its own it begins at 0, finds no entry, and posts X0 again."""
    story = tell("C", X0)
    await story.start("w0")
    await story.until(lambda: story.list_outcomes().get("x0") == ["posted"])
    await story.settle()
    assert story.list_entries() == {}
    story.kafka.groups[GROUP].offsets.clear()
    if not kept:
        monkeypatch.setattr(
            frontier,
            "read_frontiers",
            lambda _kafka, name: {(f"id-{t}", 0): offset for t, offset in story.kafka.groups[name].offsets.items()},
        )
    await story.take_over("w1")
    await story.settle()
    conclude(story, kept, "x0 was applied twice")


@rule("blind-resend")
@pytest.mark.parametrize("kind", ["C", "D"])
async def test_a_write_without_answer_is_not_repeated_where_that_doubles(tell, monkeypatch, kind, kept):
    """X0 is written and applied, the answer is lost. A target without keys takes a resend for another posting: class C
    looks first, class D asks a person."""
    story = tell(kind, X0)
    story.plan["x0"] = ["lost"]
    if not kept:
        monkeypatch.setattr(Policy, "may_resend", lambda *_: True)
    await story.start("w0")
    await story.until(lambda: story.written)
    await story.live(OVER)
    conclude(story, kept, "x0 was applied twice")
    if kept:
        assert story.list_outcomes()["x0"][-1] == {"C": "posted", "D": "unknown"}[kind]


async def take_over_before_the_look(story, *, told):
    """X0's call is about to look before its write when w1 takes over, waits, sees nothing there and posts."""
    story.plan["x0"] = ["held ok"]
    await story.start("w0")
    await story.until(lambda: story.holding)
    if not told:
        story.out_of_touch.add("w0")
    await story.take_over("w1", deaf=() if told else ("w0",))
    await story.until(lambda: story.list_entries() == {"x0": "IN_FLIGHT"})
    await story.settle()
    await story.live(OVER)
    await story.until(lambda: story.asked and "x0" in story.site.applied)
    story.gates["x0"].set()
    await story.settle()


@rule("no-lease")
async def test_who_lost_touch_with_the_group_writes_no_more(tell, kept):
    """w0's call for X0 stands before its write when w0 loses its session without knowing. w1 takes over, waits, looks
    X0 up (absent) and posts it. Without a look at the lease w0 then writes, too."""
    story = tell("C", X0)
    story.fresh_for_ever = not kept
    await take_over_before_the_look(story, told=False)
    conclude(story, kept, "x0 was applied twice")


@rule("lease-only")
async def test_who_gave_its_partition_up_writes_no_more(tell, monkeypatch, kept):
    """The same in a rebalance that w0 knows of: its touch with the group is perfect. A look at the lease alone lets it
    write; the assignment must be looked at, and the revoke withdraw the call."""
    if not kept:
        monkeypatch.setattr(Shards, "release", lambda *_: None)
        monkeypatch.setattr(Shards, "drop_lost", _forget)
        monkeypatch.setattr(Runner, "_hand_over", lambda *_: LastWork())
    story = tell("C", X0)
    await take_over_before_the_look(story, told=True)
    conclude(story, kept, "x0 was applied twice")


def _forget(shards, frontiers):
    for key in [key for key in shards._shards if key not in frontiers]:
        del shards._shards[key]


@rule("ack-before-outcome")
async def test_the_frontier_does_not_pass_a_call_under_way(tell, monkeypatch, kept):
    """X0 is frozen and its call under way; kill -9 before anything was written. If the frontier had passed it, which
    means that its entry may go, nobody would ever post it."""
    story = tell("A", X0)
    story.plan["x0"] = ["held ok"]
    if not kept:
        original = Attempt.is_passable
        monkeypatch.setattr(
            Attempt, "is_passable", property(lambda self: self.state is State.IN_FLIGHT or original.fget(self))
        )
        tombstone(story, "IN_FLIGHT")
    await story.start("w0")
    await story.until(lambda: story.holding)
    await story.kill("w0")
    await story.take_over("w1")
    await story.live(OVER)
    conclude(story, kept, "x0 has neither outcome nor anybody who cares")


@rule("refreeze")
async def test_a_resend_has_the_bytes_of_the_first_write(tell, monkeypatch, kept):
    """X0 is applied, its answer lost; then the mapping changes. The resend must be the frozen request: the same key
    with other bytes is refused by some targets and a second posting at others."""
    story = tell("A", X0)
    story.plan["x0"] = ["lost"]
    if not kept:
        original = Ledger.resume

        def resume(self, attempt, moment):
            body = f"mapping {story.mapping}: {attempt.request.reference}".encode()
            attempt.request = dataclasses.replace(attempt.request, body=body)
            return original(self, attempt, moment)

        monkeypatch.setattr(Ledger, "resume", resume)
    await story.start("w0")
    await story.until(lambda: story.written)
    story.mapping = 1
    await story.kill("w0")
    await story.take_over("w1")
    await story.live(OVER)
    assert len(story.written) == 2
    conclude(story, kept, "the key of x0 came again with other bytes")


@rule("lookup-too-early")
async def test_nobody_looks_before_the_first_write_is_over(tell, kept):
    """X0 is written and nobody answers; the request is still on its way. Who looks it up at once sees nothing there,
    posts again, and both arrive."""
    story = tell("C", X0)
    story.plan["x0"] = ["late"]
    if not kept:
        story.deadline = 0.0
    await story.start("w0")
    await story.until(lambda: story.wire)
    await story.live(1, step=0.5)
    assert bool(story.asked) is not kept
    story.deliver()
    await story.live(OVER)
    conclude(story, kept, "x0 was applied twice")


@rule("resend-now")
async def test_nothing_is_resent_before_the_first_write_is_over(tell, kept):
    """At a target that keeps one state per entity, X0 is written, on its way, and resent at once with success; X1
    follows. Then the first write of X0 arrives and overwrites X1."""
    story = tell("BE", X0, X1)
    story.plan["x0"] = ["late"]
    if not kept:
        story.deadline = 0.0
    await story.start("w0")
    await story.until(lambda: story.wire)
    await story.live(1, step=0.5)
    assert ("x1" in story.site.applied) is not kept
    story.deliver()
    await story.live(OVER)
    conclude(story, kept, "an older state of x overwrote a later one")


@rule("offsets-first")
async def test_records_are_in_the_log_before_the_offsets_are_sent(tell, kept):
    """w0 sends the offsets of the transaction that says X0 is done; that is where it is fenced. Then w1 takes over. If
    the records reach the log only now, w1 has loaded a ledger without them, and X0 gets two final outcomes."""
    story = tell("C", X0)
    await story.start("w0")
    reached, go_on = threading.Event(), threading.Event()

    def before(step, txid):
        if step == "commit" and txid == f"{GROUP}.w0.0" and story.site.applied and not reached.is_set():
            reached.set()
            assert go_on.wait(20)

    story.kafka.before = before
    story.kafka.flushes_late = not kept
    await story.until(reached.is_set)
    taking = asyncio.create_task(story.take_over("w1"))
    await asyncio.wait({taking}, timeout=0.3)
    assert taking.done() is not kept
    go_on.set()
    await taking
    await story.live(OVER)
    conclude(story, kept, "x0 has two final outcomes")


@rule("empty-offsets")
async def test_every_transaction_is_fenced_also_when_no_frontier_moves(tell, kept):
    """X0 hangs, so the frontier stands still; Y0 is applied. w0 loses its session without knowing, w1 takes over and
    settles Y0. Then w0 commits its answer: without offsets nothing fences that, and Y0 has two final outcomes."""
    story = tell("A", X0, Y0)
    story.plan["x0"], story.plan["y0"] = ["hang", "hang"], ["held ok"]
    story.kafka.fences_unmoved = kept
    await story.start("w0")
    await story.until(lambda: "y0" in story.holding and "x0" in story.begun)
    consumer = story.runners["w0"]._consumer
    reached, go_on = threading.Event(), threading.Event()

    def before(step, txid):
        if step == "flush" and txid == f"{GROUP}.w0.0" and "y0" in story.site.applied and not reached.is_set():
            # The transaction was begun under the old generation; before its records are out all is another's.
            reached.set()
            assert go_on.wait(20)

    story.kafka.before = before
    story.gates["y0"].set()
    await story.until(reached.is_set)
    await story.take_over("w1", deaf=("w0",))
    await story.live(OVER)
    await story.until(lambda: "posted" in story.list_outcomes().get("y0", []))
    go_on.set()
    await story.settle()
    consumer._consumer.is_deaf = False
    story.gates["x0"].set()
    await story.live(OVER)
    conclude(story, kept, "y0 has two final outcomes")


@rule("park-forgets")
async def test_parked_keeps_that_a_write_may_have_landed(tell, monkeypatch, kept):
    """X0 is applied, its answers are lost, and it is parked while unknown. When it goes on, the window of its key is
    over. If PARKED forgot the mark, it would be posted as if for the first time."""
    monkeypatch.setattr("sinks.policy.Policy", functools.partial(Policy, park_after=1))
    story = tell("A", X0)
    story.plan["x0"] = ["lost", "lost"]
    if not kept:
        original = Ledger.park

        def park(self, attempt, *arguments, **options):
            original(self, attempt, *arguments, **options)
            attempt.may_have_landed = False

        monkeypatch.setattr(Ledger, "park", park)
    await story.start("w0")
    await story.until(lambda: story.written)
    await story.live(DEADLINE + 5)
    await story.until(lambda: story.list_entries() == {"x0": "PARKED"})
    story.wait(WINDOW)
    story.site.forget_keys()
    await story.live(OVER)
    conclude(story, kept, "x0 was applied twice")
    if kept:
        assert story.list_outcomes()["x0"][-1] == "unknown"


async def decide(story, action):
    """A person looked at the target just now and says what is there."""
    ((_, published),) = story.kafka.read(catalog.PAYMENTS)
    event_id = dict(published.headers)["event_id"].decode()
    (attempt,) = filter(None, (shard.ledger.queues.peek(event_id) for shard in story.runners["w0"]._shards))
    story.decide(
        attempt.event_id, offset=attempt.offset, attempt=attempt.number, round=attempt.round, action=action.value
    )
    await story.live(2, step=1)


@rule("human-early")
async def test_a_person_decides_when_the_first_write_is_over(tell, monkeypatch, kept):
    """X0 at a target that can do nothing but post: no answer, the request is on its way. A person looks, sees nothing
    and says so at once. Acted on before the deadline, X0 is posted again, and both arrive."""
    story = tell("D", X0)
    story.plan["x0"] = ["late"]
    if not kept:
        monkeypatch.setattr("sinks.rulings.rule", lambda *_: Ruling.APPLIED)
    await story.start("w0")
    await story.until(lambda: story.list_outcomes().get("x0") == ["unknown"])
    await decide(story, Action.NOT_POSTED)
    story.deliver()
    await story.live(OVER)
    conclude(story, kept, "x0 was applied twice")
    if kept:
        # A person who looks later sees it there, and then it counts.
        await decide(story, Action.POSTED)
        assert story.list_outcomes()["x0"][-1] == "posted"
        assert story.judge() == []


@rule("window-edge")
async def test_no_resend_into_the_last_moments_of_the_window(tell, monkeypatch, kept):
    """X0 is applied, the answer lost. Its resend stands before its write until a second before the target forgets the
    key, is written, and takes two seconds. The margin must hold it back, at that last look, too."""
    story = tell("A", X0)
    story.plan["x0"] = ["lost", "held late"]
    if not kept:
        monkeypatch.setattr(
            Policy, "may_resend", lambda self, first, moment: bool(first) and moment.wall <= first + self.window * 1000
        )
    await story.start("w0")
    await story.until(lambda: story.written)
    began = story.steady
    await story.live(DEADLINE + 5)
    await story.until(lambda: story.holding)
    story.wait(WINDOW - 1 - (story.steady - began))
    story.gates["x0"].set()
    await story.settle()
    assert bool(story.wire) is not kept
    story.wait(2)
    story.site.forget_keys()
    story.deliver()
    await story.live(OVER)
    conclude(story, kept, "x0 was applied twice")


@rule("tombstone-rejected")
async def test_a_rejected_parent_is_remembered(tell, kept):
    """X0 is refused for good, and the frontier passes it. Kill -9; then X1, its child, comes. If the refusal left no
    entry, which below the frontier means done, X1 is posted without its parent."""
    story = tell("B", X0)
    story.plan["x0"] = ["reject"]
    if not kept:
        tombstone(story, "REJECTED")
    await story.start("w0")
    await story.until(lambda: story.list_outcomes().get("x0") == ["rejected"])
    await story.kill("w0")
    story.publish(*X1)
    await story.take_over("w1")
    await story.until(lambda: "x1" in story.list_outcomes())
    await story.settle()
    conclude(story, kept, "x1 came before x0")


@rule("reject-final")
async def test_a_refused_resend_does_not_say_that_nothing_landed(tell, monkeypatch, kept):
    """X0 is applied, the answer is lost, and the target refuses the resend (because it has it?). Taken as a refusal of
    X0, the books say rejected and the money is there."""
    story = tell("B", X0)
    story.plan["x0"] = ["lost", "reject"]
    if not kept:
        original = Ledger.settle

        def settle(self, attempt, result, moment):
            if isinstance(result, Answer) and result.kind is FailureKind.REJECTED:
                attempt.may_have_landed = False
            original(self, attempt, result, moment)

        monkeypatch.setattr(Ledger, "settle", settle)
    await story.start("w0")
    await story.until(lambda: story.written)
    await story.live(OVER)
    assert len(story.written) == 2
    conclude(story, kept, "x0 is said to be rejected and is posted")
    if kept:
        assert story.list_outcomes()["x0"] == ["unknown"]


@pytest.mark.parametrize(("kind", "wrong"), [("C", "x0 was applied twice"), ("B", None)])
async def test_the_documented_hole_is_where_it_is_said_to_be(tell, kind, wrong):
    """A process frozen between the look and the socket write, for longer than everything else: its write comes after
    the next owner has waited, looked and posted. Class C doubles, as the documents say; an upsert does not."""
    story = tell(kind, X0)
    story.plan["x0"] = ["late"]
    await story.start("w0")
    await story.until(lambda: story.wire)
    await story.kill("w0")
    await story.take_over("w1")
    await story.live(OVER)
    await story.until(lambda: story.list_outcomes().get("x0") == ["posted"])
    story.deliver()
    assert story.judge() == ([wrong] if wrong else [])


def test_every_rule_of_the_model_has_a_test():
    model = load_model("sink_model")
    assert set(model.LITERALS) | set(model.CONTROLS) == rule.covered

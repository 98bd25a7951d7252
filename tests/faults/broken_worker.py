"""The shipped worker with one protection taken out, or a fault at one exact point; for the negative controls only.

``python -m tests.faults.broken_worker PROTECTION FAULT worker --slot 0 ...``: both names may be ``none``. What follows
is given to the shipped command line. Nothing of the project imports this file.

Each protection is taken out where the modules meet: the batch's commit (``GroupConsumer.commit``), the transaction
(``Transactor.commit``, the client's ``Producer``) and the reading of changelogs (``TopicReader.end_offsets``).
"""

from __future__ import annotations

import os
import signal
import sys
import time

import confluent_kafka

from runtime import cli
from streams import batch, decide
from streams.state import SeenEntry
from topics import frontier, group, reading, transaction

EXIT = 86
"""Exit code of a fault, so that nobody takes it for another end."""


# ---------------------------------------------------------------- protections


def commit_offsets_first():
    """Frontier and offsets in a transaction of their own, before that of the outputs."""
    shipped = transaction.Transactor.commit

    def commit(self, outputs, offsets, group_metadata, changelogs=()):
        frontiers = [output for output in outputs if output.topic == "frontiers"]
        shipped(self, frontiers, offsets, group_metadata)
        others = [output for output in outputs if output.topic != "frontiers"]
        shipped(self, others, offsets, group_metadata, changelogs)

    transaction.Transactor.commit = commit


def change_store_before_commit():
    """The local store is changed, then the transaction is begun."""
    shipped = group.GroupConsumer.commit

    async def commit(self, number, outputs, positions, *, committed, **more):
        await self.call(committed)
        await shipped(self, number, outputs, positions, **more)

    group.GroupConsumer.commit = commit


def write_seen_outside():
    """The changelog of seen keys is written by a producer without transactions, before the transaction."""
    shipped = transaction.Transactor.commit

    def commit(self, outputs, offsets, group_metadata, changelogs=()):
        plain = confluent_kafka.Producer({"bootstrap.servers": self._bootstrap, "enable.idempotence": True})
        for changelog in changelogs:
            if changelog.topic.startswith("seen."):
                for key, (value, _cause) in changelog.entries.items():
                    plain.produce(changelog.topic, value, key, partition=changelog.partition)
        plain.flush(10)
        others = [changelog for changelog in changelogs if not changelog.topic.startswith("seen.")]
        shipped(self, outputs, offsets, group_metadata, others)

    transaction.Transactor.commit = commit


def let_dead_letters_mark():
    """A record that the broker refused writes its key as if it had been published."""
    shipped = decide.MoneyDecider.decide

    async def build_decision(self, rooms, records, refused=frozenset()):
        decision = await shipped(self, rooms, records, refused)
        for record in records:
            if record.hop in refused:
                normalised = self._normaliser.normalise(record)
                draft = next(one for one in decision.drafts if one.state.partition == record.partition)
                digest = self.hash_facts(normalised.facts)
                draft.write_seen(normalised.event.transaction_key, [SeenEntry(digest, record.hop)])
        return decision

    decide.MoneyDecider.decide = build_decision


def take_metadata_late():
    """A batch is committed under whatever assignment is in force now."""
    shipped = group.GroupConsumer.commit

    async def commit(self, number, *arguments, **more):
        del number
        await shipped(self, self.number, *arguments, **more)

    group.GroupConsumer.commit = commit


def stop_reload_at_stable_offset():
    """Changelogs and frontiers are read up to what is decided, not up to what is written."""
    shipped = reading.TopicReader.end_offsets

    def end_offsets(self, isolation="read_committed"):
        del isolation
        return shipped(self, "read_committed")

    reading.TopicReader.end_offsets = end_offsets


# ---------------------------------------------------------------- faults


def _hook_producer(method, before):
    """Run ``before`` ahead of a method of the transactional producer."""

    class Hooked(confluent_kafka.Producer):
        pass

    def call(self, *arguments, **more):
        before()
        return getattr(confluent_kafka.Producer, method)(self, *arguments, **more)

    setattr(Hooked, method, call)
    transaction.Producer = Hooked


def _watch_records(found):
    """Note when a batch with records of the gateway is being committed."""
    shipped = transaction.Transactor.commit

    def commit(self, outputs, offsets, group_metadata, changelogs=()):
        found[:] = [output for output in outputs if output.topic != "frontiers"]
        shipped(self, outputs, offsets, group_metadata, changelogs)

    transaction.Transactor.commit = commit


def die_before_commit():
    """End at the first batch with outputs, when all is flushed and nothing is committed."""
    under_way = []
    _watch_records(under_way)
    _hook_producer("commit_transaction", lambda: os._exit(EXIT) if under_way else None)


def _freeze():
    """Stop as SIGSTOP does. Any thread may take the signal: this one must not go on until it has."""
    os.kill(os.getpid(), signal.SIGSTOP)
    time.sleep(0.3)


def freeze_before_commit():
    """Stop at the first batch with outputs, when all is flushed and nothing is committed."""
    under_way, frozen = [], []

    def freeze():
        if under_way and not frozen:
            frozen.append(True)
            _freeze()

    _watch_records(under_way)
    _hook_producer("commit_transaction", freeze)


def freeze_with_batch():
    """Stop with a decided batch in hand; once awake, take part in the rebalance, then commit the batch."""
    shipped = batch.Batch.commit
    frozen = []

    async def commit(self, decision):
        if self.records and not frozen:
            frozen.append(True)
            _freeze()
            # Lost, then assigned again: two changes at least.
            consumer = self.feeder.group
            while consumer.number < self.number + 2 or not consumer.is_ready():
                await consumer.poll(1, 0.1)
        return await shipped(self, decision)

    batch.Batch.commit = commit


def ignore_pending_offsets():
    """The other of the two barriers of an assignment is away: the one that asks for stable group offsets."""
    frontier.await_pending_offsets = lambda *_arguments, **_more: {}


PROTECTIONS = {
    "offsets_first": commit_offsets_first,
    "store_before_commit": change_store_before_commit,
    "seen_outside": write_seen_outside,
    "dead_letter_marks": let_dead_letters_mark,
    "late_metadata": take_metadata_late,
    "reload_to_stable": stop_reload_at_stable_offset,
    "none": lambda: None,
}
FAULTS = {
    "die_before_commit": die_before_commit,
    "freeze_before_commit": freeze_before_commit,
    "freeze_with_batch": freeze_with_batch,
    "ignore_pending_offsets": ignore_pending_offsets,
    "none": lambda: None,
}


if __name__ == "__main__":
    _, protection, fault, *command = sys.argv
    # The fault first: a protection that is out wraps what the fault watches.
    FAULTS[fault]()
    PROTECTIONS[protection]()
    sys.argv = ["remitstream", *command]
    sys.exit(cli.main())

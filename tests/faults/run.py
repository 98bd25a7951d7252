"""One run of faults: a steady stream, three lanes of faults beside each other, then the verdict."""

from __future__ import annotations

import contextlib
import sys
import threading
import time
from collections import Counter

import redis
from confluent_kafka import KafkaException

from tests.faults.books import find_unexplained
from tests.faults.fleet import ONGOING, PREPARED, Site, build_dice
from tests.faults.oracle import Oracle
from tests.faults.traffic import RAW_MONEY, Sender, Stream

READY_SECONDS = 20.0
"""A worker that is not ready after so long is hit all the same."""
AIM_SECONDS = 4.0
"""An aimed kill waits no longer than this for an open transaction."""
BURST = 2_000
DRAIN_SECONDS = 150.0
"""Without any progress for this long, what is missing counts as lost."""


class Gate:
    """Faults of the lanes run beside each other; those that need every worker stopped run alone."""

    def __init__(self):
        self._condition = threading.Condition()
        self._inside = 0
        self._closed = False

    @contextlib.contextmanager
    def shared(self):
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._inside += 1
        try:
            yield
        finally:
            with self._condition:
                self._inside -= 1
                self._condition.notify_all()

    @contextlib.contextmanager
    def alone(self):
        with self._condition:
            self._condition.wait_for(lambda: not self._closed)
            self._closed = True
            self._condition.wait_for(lambda: not self._inside)
        try:
            yield
        finally:
            with self._condition:
                self._closed = False
                self._condition.notify_all()


class FaultRun:
    """Does what a plan says. ``counts`` says what really happened, from facts."""

    def __init__(self, site, plan):
        self.site = site
        self.plan = plan
        self.counts = Counter()
        self.failures = []
        self.sender = Sender(site.stack.kafka_bootstrap, Stream(plan.seed), plan.rate)
        self._dice = build_dice(plan.seed, "cuts")
        self._gate = Gate()
        self._begun = time.monotonic()
        self._tell_lock = threading.Lock()
        self._has_copy = False
        self.stopped = threading.Event()
        """Set: no further fault is begun; what was done is judged, and what is missing is told."""
        for number in range(4):
            site.add_slot(number)

    def run(self):
        """Bring the fleet up, do everything, wait until all is worked off; the verdict."""
        for item in self.sender.stream.admissions:
            self.sender.send(item)
        self.sender.flush()
        self.site.start_projector()
        for number in (0, 1):
            self.site.slots[number].start()
        for number in (0, 1):
            if not self.site.slots[number].await_ready(60):
                raise AssertionError(f"the fleet does not start\n{self.site.deployment.read_logs()}")
        self._tell("the fleet works")
        self.sender.start()
        lanes = [
            threading.Thread(target=self._follow, args=(lane,), name=name, daemon=True)
            for name, lane in (
                ("slot 0", self.plan.kills),
                ("slot 1", self.plan.zombies),
                ("world", self.plan.world),
            )
        ]
        for lane in lanes:
            lane.start()
        for lane in lanes:
            lane.join()
        self._tell("all faults are done; waiting until everything is worked off")
        oracle = Oracle(self.site.stack.kafka_bootstrap, self.site.stack.registry_url)
        try:
            self.sender.finish()
            self._drain(oracle)
            verdict = oracle.judge(self.sender.meanings, self.sender.sent)
        finally:
            oracle.close()
        verdict.violations += find_unexplained(self.site.deployment.settings, verdict.fates)
        verdict.violations += self.failures
        verdict.violations += self._find_shortfalls()
        self.site.transactions.find_state("")
        self.counts["transactions_committed"] = self.site.transactions.ends["committed"]
        self.counts["transactions_aborted"] = self.site.transactions.ends["aborted"]
        self.counts["worker_exits_by_itself"] = sum(slot.exits.total() for slot in self.site.slots.values())
        return verdict

    @property
    def seconds(self):
        return time.monotonic() - self._begun

    # ---------------------------------------------------------------- lanes

    def _follow(self, lane):
        for fault in lane:
            if self.stopped.is_set():
                return
            try:
                getattr(self, f"_do_{fault.kind}")(fault)
            except Exception as error:  # noqa: BLE001 - a fault that cannot be done must not hide in a thread
                self.failures.append(f"the fault {fault.kind} was not done: {type(error).__name__} {error}"[:500])
                self._tell(self.failures[-1])

    def _do_kill(self, fault):
        slot, (aim,) = self.site.slots[fault.slot], fault.detail
        with self._gate.shared():
            if aim != "blind":
                slot.await_ready(READY_SECONDS)
            time.sleep(fault.wait)
            if aim == "aimed":
                slot.freeze_in_transaction(AIM_SECONDS)
            self._note_kill(slot.kill(), slot.number, aim)

    def _note_kill(self, state, slot, aim="any"):
        self.counts["kills"] += 1
        if state is None:
            self.counts["kills_state_unknown"] += 1
        elif state == ONGOING:
            self.counts["kills_in_open_transaction"] += 1
        elif state in PREPARED:
            self.counts["kills_in_commit"] += 1
        done, opened = self.counts["kills"], self.counts["kills_in_open_transaction"]
        self._tell(f"kill {done} ({aim}) of slot {slot}, transaction state {state}; {opened} hit an open one")

    def _do_zombie(self, fault):
        slot = self.site.slots[fault.slot]
        with self._gate.shared():
            slot.await_ready(READY_SECONDS)
            time.sleep(fault.wait)
            opened = slot.freeze() == ONGOING
            time.sleep(fault.seconds)
            slot.thaw()
        self.counts["zombies"] += 1
        self.counts["zombies_in_open_transaction"] += opened
        self._tell(f"zombie {self.counts['zombies']}: slot {slot.number} was frozen for {fault.seconds:.1f} s")

    def _do_broker(self, fault):
        time.sleep(fault.wait)
        with self._gate.shared():
            (way,) = fault.detail
            getattr(self.site.embedded, way)("kafka")
            self.site.embedded.start("kafka")
        self._count("broker_restarts", way)

    def _do_redis_flush(self, fault):
        time.sleep(fault.wait)
        with redis.Redis.from_url(self.site.stack.redis_url) as client:
            client.flushall()
        self._count("redis_flushes")

    def _do_redis_restart(self, fault):
        time.sleep(fault.wait)
        self.site.embedded.kill("redis")
        self.site.embedded.start("redis")
        self._count("redis_restarts", "nothing was kept on disk")

    def _do_storm(self, fault):
        time.sleep(fault.wait)
        with self._gate.shared():
            self.sender.burst(BURST)
            inside = set()
            for number, wait, patient in fault.detail:
                slot = self.site.slots[number]
                if number in inside:
                    inside.discard(number)
                    if patient:
                        slot.stop()
                    else:
                        self._note_kill(slot.kill(restart=False), number)
                    self.counts["storm_leaves"] += 1
                else:
                    inside.add(number)
                    slot.start()
                    if patient:
                        slot.await_ready(READY_SECONDS)
                    self.counts["storm_joins"] += 1
                time.sleep(wait)
            for number in inside:
                self.site.slots[number].stop()
                self.counts["storm_leaves"] += 1
        self._count("storms", f"{self.counts['storm_joins']} joins, {self.counts['storm_leaves']} leaves")

    def _do_halt(self, fault):
        """All workers end; their stores and the group's offsets are spoilt; they start again."""
        time.sleep(fault.wait)
        state, offsets = fault.detail
        with self._gate.alone():
            for number in (0, 1):
                self._note_kill(self.site.slots[number].kill(restart=False), number)
            try:
                state = self._spoil_state(state)
                self._spoil_offsets(offsets)
            finally:
                for number in (0, 1):
                    self.site.slots[number].start()
        self._count(f"state_{state}", f"offsets {offsets}")

    def _spoil_state(self, state):
        if state == "old" and self._has_copy:
            self.site.bring_back_state()
            self._has_copy = False
            return state
        if not self._has_copy:
            self.site.save_state()
            self._has_copy = True
        if state == "cut":
            if not self.site.cut_state(self._dice):
                raise AssertionError("no store was found")
            return state
        self.site.lose_state()
        return "lost"

    def _spoil_offsets(self, offsets):
        if offsets == "kept":
            return
        self.site.await_empty_group()
        (self.site.reset_offsets if offsets == "reset" else self.site.delete_group)()
        self.counts[f"offsets_{offsets}"] += 1

    def _do_replay(self, fault):
        """Every raw record once more, as a new hop that names its origin."""
        time.sleep(fault.wait)
        count = 0
        ids = self._read_topic_ids()
        for message in self.site.read_raw():
            headers = list(message.headers())
            if "origin" not in dict(headers):
                hop = f"{ids[message.topic()]}:{message.partition()}:{message.offset()}"
                headers.append(("origin", hop.encode()))
            self.sender.publish(message.topic(), message.key(), message.value(), headers)
            count += 1
        self.counts["replayed_records"] += count
        self._count("replays", f"{count} records")

    def _do_redrive(self, fault):
        """The last dead letters twice as they are; those that a person can correct twice corrected."""
        time.sleep(fault.wait)
        letters = list(self.site.read_raw(["dlq"]))[-10:]
        repaired = 0
        for message in letters:
            kept = [
                (name, text)
                for name, text in message.headers()
                if name != "hop" and not name.startswith("dead_letter_")
            ]
            for _ in range(2):
                self.sender.publish(RAW_MONEY, message.key(), message.value(), kept)
                self.counts["redriven_records"] += 1
            repair = self.sender.stream.repairs.get(int(dict(kept)["delivery_id"]))
            if repair is not None:
                for _ in range(2):
                    self.sender.send(repair)
                repaired += 1
        self.counts["redriven_corrected"] += repaired
        self._count("redrives", f"{len(letters)} dead letters, {repaired} of them also corrected")

    # ---------------------------------------------------------------- the end

    def _drain(self, oracle):
        """Read until everything is decided; give up when nothing moves any more."""
        moved, last = time.monotonic(), None
        while True:
            try:
                oracle.follow()
            except (KafkaException, TimeoutError) as error:
                if time.monotonic() - moved > DRAIN_SECONDS:
                    raise
                self._tell(f"the oracle cannot read: {type(error).__name__}")
                continue
            if oracle.is_settled(self.sender.meanings) and len(oracle.raw) >= self.sender.sent:
                return
            now = (len(oracle.raw), len(oracle.fates))
            if now != last:
                last, moved = now, time.monotonic()
            if time.monotonic() - moved > DRAIN_SECONDS:
                return
            time.sleep(0.3)

    def _find_shortfalls(self):
        """A run that did not do what its plan says proves less than it claims."""
        planned = Counter()
        for lane in (self.plan.kills, self.plan.zombies, self.plan.world):
            planned.update(fault.kind for fault in lane)
        names = {
            "kill": "kills",
            "zombie": "zombies",
            "broker": "broker_restarts",
            "redis_flush": "redis_flushes",
            "redis_restart": "redis_restarts",
            "storm": "storms",
            "replay": "replays",
            "redrive": "redrives",
        }
        short = [
            f"plan: {self.counts[names[kind]]} times {kind}, {count} were planned"
            for kind, count in planned.items()
            if kind in names and self.counts[names[kind]] < count
        ]
        halts = sum(self.counts[f"state_{state}"] for state in ("lost", "old", "cut"))
        if halts < planned["halt"]:
            short.append(f"plan: {halts} times halt, {planned['halt']} were planned")
        # Half of the kills of a whole run must hit an open transaction; of a short one, some.
        least = 100 if self.counts["kills"] >= 200 else max(1, self.counts["kills"] // 6)
        if self.counts["kills_in_open_transaction"] < least:
            short.append(
                f"plan: {self.counts['kills_in_open_transaction']} kills hit an open transaction, {least} must"
            )
        return short

    def _read_topic_ids(self):
        oracle = Oracle(self.site.stack.kafka_bootstrap, self.site.stack.registry_url)
        oracle.close()
        return oracle.topic_ids

    def _count(self, name, text=""):
        self.counts[name] += 1
        self._tell(f"{name.replace('_', ' ')} {self.counts[name]}{': ' if text else ''}{text}")

    def _tell(self, text):
        with self._tell_lock:
            sys.stdout.write(f"{self.seconds:7.1f} s  {text}\n")
            sys.stdout.flush()


def run_plan(folder, embedded, plan, *, on_start=lambda _fault_run: None):
    """Run a plan on a deployment of its own; (verdict, counts, seconds, raw records sent)."""
    site = Site(folder, embedded)
    try:
        fault_run = FaultRun(site, plan)
        on_start(fault_run)
        verdict = fault_run.run()
        return verdict, fault_run
    finally:
        site.close()

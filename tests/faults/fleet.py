"""One deployment on the embedded stack with workers that can be killed, frozen and robbed of their state."""

from __future__ import annotations

import contextlib
import os
import random
import shutil
import signal
import struct
import subprocess
import sys
import threading
import time
from collections import Counter

import psutil
from confluent_kafka import ConsumerGroupTopicPartitions, KafkaException, TopicPartition
from confluent_kafka.admin import AdminClient, AlterConfigOpType, ConfigEntry, ConfigResource, ResourceType

from tests.faults.oracle import DIRECT, QUIET, RAW, Tail
from tests.integration.conftest import Deployment
from tests.ports import find_ports

GROUP = "remitstream.worker"
SHIPPED = (sys.executable, "-m", "runtime.cli")
LEFT, ONGOING, PREPARED = -1, 1, (2, 3)
"""States of a transaction in the coordinator's log: not of this life (a mark of ours); open; commit or abort decided,
markers not all written."""


class TransactionLog:
    """What the broker's transaction coordinators know, read from their own log ``__transaction_state``."""

    def __init__(self, bootstrap):
        self.ends = Counter()
        """Transactions that ended, by ``committed`` and ``aborted``."""
        self._bootstrap = bootstrap
        self._tail = None
        self._lock = threading.Lock()
        self._states = {}

    def find_state(self, transactional_id):
        """The state now, as the protocol's number; None when it is not known (no answer, or never seen)."""
        found = self.find(transactional_id)
        return None if found is None else found[0]

    def find(self, transactional_id):
        """The state now and the place of its record in the log, or None."""
        with self._lock:
            try:
                if self._tail is None:
                    self._tail = Tail(self._bootstrap, ["__transaction_state"], isolation="read_uncommitted")
                for message in self._tail.read(patience=10):
                    self._take(message)
            except (KafkaException, KeyError, TimeoutError):
                return None
            return self._states.get(transactional_id)

    def close(self):
        if self._tail is not None:
            self._tail.close()

    def _take(self, message):
        key, value = message.key(), message.value()
        (length,) = struct.unpack_from(">h", key, 2)
        name = key[4 : 4 + length].decode()
        if value is None:
            self._states.pop(name, None)
            return
        # version, producer id, epoch, timeout, state
        state = struct.unpack_from(">hqhib", value)[4]
        self._states[name] = (state, message.offset())
        if state in (4, 5):
            self.ends["committed" if state == 4 else "aborted"] += 1


class Slot:
    """One worker of the fleet: started again at once when it ends, until it is told to stay away."""

    def __init__(self, site, number, program=SHIPPED):
        self.number = number
        self.exits = Counter()
        """How often it ended by itself, by exit code."""
        self.lock = threading.RLock()
        self.program = program
        self._site = site
        self._process = None
        self._wanted = False
        self._left = None
        """What the coordinator knew when it was killed last."""

    @property
    def transactional_id(self):
        return f"remitstream.worker.{self._site.deployment.settings.instance}.{self.number}"

    @property
    def port(self):
        """Of its health endpoint."""
        return self._site.worker_port + self.number

    @property
    def pid(self):
        return self._process.pid

    def start(self, *, keep=True):
        """Start it, and keep it running."""
        with self.lock:
            self._wanted = keep
            self._spawn()

    def await_exit(self, timeout=60):
        """Wait until it ends by itself (it was started with ``keep=False``); its exit code."""
        return self._process.wait(timeout)

    def is_frozen(self):
        """Whether it was stopped, by us or by itself."""
        return psutil.Process(self.pid).status() == psutil.STATUS_STOPPED

    def is_ready(self):
        """What its health endpoint says."""
        try:
            with DIRECT.open(f"http://127.0.0.1:{self.port}/ready", timeout=1) as answer:
                return answer.status == 200
        except OSError:
            return False

    def await_ready(self, timeout):
        """Wait for it, no longer than this; True when it is ready."""
        until = time.monotonic() + timeout
        while not self.is_ready():
            if time.monotonic() > until:
                return False
            time.sleep(0.03)
        return True

    def kill(self, *, restart=True):
        """SIGKILL; the state of its transaction as it left it (None: not known). It is started again at once."""
        with self.lock:
            if self._process is None:
                return None
            self._process.kill()
            self._process.wait()
            # Dead, and its successor does not run yet: nobody but the coordinator can change this now.
            state = self._examine()
            self._wanted = restart
            self._process = None
            if restart:
                self._spawn()
            return state

    def freeze(self):
        """SIGSTOP; the state of its transaction meanwhile."""
        with self.lock:
            self._process.send_signal(signal.SIGSTOP)
            return self._find_own_state()

    def freeze_in_transaction(self, patience):
        """Stop it while its transaction is open, as the coordinator says; after ``patience`` seconds anywhere."""
        until = time.monotonic() + patience
        while self.freeze() != ONGOING and time.monotonic() < until:
            self.thaw()
            # Not in step with the worker's batches.
            time.sleep(random.uniform(0.002, 0.05))

    def thaw(self):
        """SIGCONT."""
        with self.lock:
            self._process.send_signal(signal.SIGCONT)

    def stop(self):
        """An orderly end; its exit code."""
        with self.lock:
            self._wanted = False
            process, self._process = self._process, None
        if process is None:
            return None
        process.send_signal(signal.SIGCONT)
        process.terminate()
        try:
            return process.wait(30)
        except subprocess.TimeoutExpired:
            process.kill()
            return process.wait()

    def tend(self):
        """Start it again when it ended by itself."""
        if not self.lock.acquire(blocking=False):
            return
        try:
            if self._wanted and self._process is not None and self._process.poll() is not None:
                self.exits[self._process.returncode] += 1
                self._spawn()
        finally:
            self.lock.release()

    def _examine(self):
        """What the dead process left behind."""
        state = self._find_own_state()
        self._left = self._site.transactions.find(self.transactional_id)
        return state

    def _find_own_state(self):
        """State of the transaction of this life; ``LEFT`` when the last one is still the killed predecessor's."""
        found = self._site.transactions.find(self.transactional_id)
        if found is None:
            return None
        return LEFT if found == self._left else found[0]

    def _spawn(self):
        self._process = self._site.spawn(f"worker-{self.number}", self.program, "worker", "--slot", str(self.number))


class Site:
    """A deployment with fresh topics, its stack, and its processes.

    ``overrides`` are dotted settings; ``targets``, as TOML, replaces the example's target instances.
    """

    def __init__(self, folder, embedded, overrides=None, targets=None):
        self.embedded = embedded
        self.stack = embedded.up()
        self.folder = folder
        self.worker_port = find_ports(6)
        self.deployment = Deployment(
            folder,
            self.stack,
            {
                "health.worker": str(self.worker_port),
                "health.projector": str(find_ports()),
                "worker.partitions": "4",
                **(overrides or {}),
            },
            targets,
        )
        self.deployment.provision()
        # A review that was written twice under one key must be there to be counted.
        self.alter_topic("reviews", "cleanup.policy", "delete")
        self.transactions = TransactionLog(self.stack.kafka_bootstrap)
        self.slots = {}
        self._others = []
        self._over = threading.Event()
        self._keeper = threading.Thread(target=self._keep, name="keeper", daemon=True)
        self._keeper.start()

    def open_admin(self):
        """A new one each time: an old one may keep asking a broker that was restarted under what it knew before.

        It must be kept until the answer is there.
        """
        return AdminClient({"bootstrap.servers": self.stack.kafka_bootstrap, **QUIET})

    @property
    def state(self):
        return self.deployment.settings.worker.state

    def add_slot(self, number, program=SHIPPED):
        """A worker that is not started yet."""
        self.slots[number] = Slot(self, number, program)
        return self.slots[number]

    def keep(self, name, slot):
        """Tend another process as if it were a worker."""
        self.slots[name] = slot
        return slot

    def spawn(self, name, program, *arguments):
        """Start a program with the settings of this deployment; its output goes to ``<name>.log``."""
        with (self.folder / f"{name}.log").open("ab") as log:
            return subprocess.Popen(
                [*program, *arguments, *self.deployment.settings.list_arguments()],
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                cwd=self.folder,
            )

    def start_projector(self):
        """The process that fills Redis."""
        self._others.append(self.spawn("project", SHIPPED, "project"))

    def alter_topic(self, topic, name, value):
        """Set a topic's configuration."""
        entry = ConfigEntry(name, value, incremental_operation=AlterConfigOpType.SET)
        resource = ConfigResource(ResourceType.TOPIC, topic, incremental_configs=[entry])
        admin = self.open_admin()
        for future in admin.incremental_alter_configs([resource]).values():
            future.result()

    def list_members(self):
        """Members of the workers' group as (instance id, whether it owns something)."""
        admin = self.open_admin()
        found = admin.describe_consumer_groups([GROUP], request_timeout=10)[GROUP].result()
        return [(member.group_instance_id, bool(member.assignment.topic_partitions)) for member in found.members]

    def await_empty_group(self, timeout=40):
        """Wait until the sessions of all members have ended."""
        found = []

        def is_empty():
            found[:] = self._try(self.list_members, default=["unknown"])
            return not found

        self.wait_until(is_empty, f"the group keeps members {found}", timeout)

    def reset_offsets(self):
        """Set the group's offsets of all raw partitions to 0; the group must be empty."""
        admin = self.open_admin()
        topics = admin.list_topics(timeout=10).topics
        places = [TopicPartition(topic, partition, 0) for topic in RAW for partition in topics[topic].partitions]
        wanted = [ConsumerGroupTopicPartitions(GROUP, places)]
        for future in admin.alter_consumer_group_offsets(wanted).values():
            found = future.result()
            errors = [place.error for place in found.topic_partitions if place.error is not None]
            if errors:
                raise AssertionError(f"offsets are not reset: {errors[0].name()}")

    def delete_group(self):
        """Forget the group and its offsets, as after a week of silence."""
        admin = self.open_admin()
        for future in admin.delete_consumer_groups([GROUP]).values():
            future.result()

    def cut_state(self, dice):
        """Cut every file of the stores somewhere."""
        files = [path for path in sorted(self.state.rglob("*")) if path.is_file() and path.stat().st_size > 64]
        for path in files:
            os.truncate(path, round(path.stat().st_size * dice.uniform(0.05, 0.95)))
        return len(files)

    def lose_state(self):
        """Delete all stores."""
        shutil.rmtree(self.state, ignore_errors=True)

    def save_state(self):
        """Keep a copy of all stores; no worker may run."""
        copy = self.folder / "old-state"
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(self.state, copy)

    def bring_back_state(self):
        """Replace all stores by the copy."""
        self.lose_state()
        shutil.copytree(self.folder / "old-state", self.state)

    def read_raw(self, topics=RAW):
        """Every record of the raw topics, by a plain consumer."""
        tail = Tail(self.stack.kafka_bootstrap, topics)
        try:
            yield from tail.read()
        finally:
            tail.close()

    def wait_until(self, condition, complaint, timeout=60):
        """Wait for a condition, or fail with the complaint and the ends of all logs."""
        until = time.monotonic() + timeout
        while not condition():
            if time.monotonic() > until:
                raise AssertionError(f"{complaint}\n{self.deployment.read_logs()}")
            time.sleep(0.05)

    def close(self):
        """End everything that was started, and free what belongs to it."""
        self._over.set()
        self._keeper.join()
        for slot in self.slots.values():
            slot.kill(restart=False)
        for process in self._others:
            process.terminate()
        for process in self._others:
            try:
                process.wait(15)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self.transactions.close()

    def _keep(self):
        while not self._over.wait(0.1):
            for slot in list(self.slots.values()):
                slot.tend()

    @staticmethod
    def _try(function, default):
        with contextlib.suppress(KafkaException):
            return function()
        return default


def build_dice(seed, name):
    """Dice of their own for each purpose, so that one does not move another."""
    return random.Random(f"{name} {seed}")

"""What came of it, by plain confluent-kafka, fastavro and LMDB; nothing here is code of the project."""

from __future__ import annotations

import io
import json
import struct
import time
import urllib.request
from collections import Counter, defaultdict

import fastavro
import lmdb
from confluent_kafka import OFFSET_BEGINNING, Consumer, KafkaError, TopicCollection, TopicPartition
from confluent_kafka.admin import AdminClient

DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
TOPICS = ("payments", "settlements", "patients", "dispositions", "dlq", "reviews", "frontiers")
RAW = ("raw.stripe", "raw.hl7")


class Oracle:
    """Follows every topic the worker writes, committed records only, and what comes of one source there."""

    def __init__(self, bootstrap, registry_url, source, changelogs, group="remitstream.worker"):
        self._registry_url = registry_url
        self._group = group
        self._schemas = {}
        admin = AdminClient({"bootstrap.servers": bootstrap})
        found = admin.describe_topics(TopicCollection(list(RAW)))
        ids = {topic: str(found[topic].result().topic_id) for topic in RAW}
        self.topic_id = ids.pop(f"raw.{source}")
        self._others = tuple(f"{topic_id}:" for topic_id in ids.values())
        self.fates = defaultdict(list)
        """Hop -> fates, waiting not among them."""
        self.events = []
        self.links = {}
        self.states = defaultdict(list)
        """Identifier -> (hop, status, identifier it is merged into), in the topic's order."""
        self._latest = {}
        self._late = []
        self.frontier = 0
        self.stores = {name: {} for name in changelogs}
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "crash-oracle",
                "enable.auto.commit": False,
                "isolation.level": "read_committed",
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 10,
                "fetch.queue.backoff.ms": 5,
                "enable.partition.eof": True,
            }
        )
        known = self._consumer.list_topics(timeout=20).topics
        topics = [*TOPICS, *(f"{name}.{source}" for name in changelogs)]
        self._places = [TopicPartition(t, p, OFFSET_BEGINNING) for t in topics for p in known[t].partitions]
        self._consumer.assign(self._places)

    def close(self):
        self._consumer.close()

    def name_hop(self, offset):
        return f"{self.topic_id}:0:{offset}"

    def follow(self, wait):
        """Take what comes within some seconds."""
        for message in self._consumer.consume(2000, wait):
            if message.error() is None:
                self._take(message)
            else:
                assert message.error().code() == KafkaError._PARTITION_EOF, message.error()

    def follow_to_end(self):
        """Take everything that is committed now."""
        ends = {
            (at.topic, at.partition): self._consumer.get_watermark_offsets(at, timeout=10)[1] for at in self._places
        }
        until = time.monotonic() + 20
        while any(
            at.offset < ends[at.topic, at.partition]
            for at in self._consumer.position(self._places)
            if ends[at.topic, at.partition]
        ):
            assert time.monotonic() < until, "the end is not reached: a transaction hangs"
            self.follow(0.05)

    def judge(self, sent):
        """Every rule that does not hold, for records as (offset, planned); empty when all is right."""
        wrong = []
        for offset, planned in sent:
            fates = self.fates.get(self.name_hop(offset), [])
            if fates != [planned.fate]:
                wrong.append(f"hop {offset}: {planned.fate} expected, {fates or 'nothing'} found")
        facts = Counter(planned.fact for _, planned in sent if planned.fact)
        found = Counter(fact for fact, _ in self.events)
        wrong += [f"lost: {fact}" for fact in facts - found]
        wrong += [f"too many: {fact}" for fact in found - facts]
        first = {}
        for place, ((kind, name, _, _), root) in enumerate(self.events):
            first.setdefault((root, kind), place)
            if kind == "refund" and (root, "capture") not in first:
                wrong.append(f"{name} was published before its capture")
        wrong += self._judge_states(sent)
        known = {self.name_hop(offset) for offset, _ in sent}
        wrong += [f"hop {hop} was never sent" for hop in self.fates if hop not in known]
        by_body = {}
        for offset, planned in sent:
            origin = by_body.setdefault(planned.body, offset)
            if planned.fate == "suppressed" and self.links.get(self.name_hop(offset)) != self.name_hop(origin):
                wrong.append(f"hop {offset} is not linked to the copy that was taken, {origin}")
        return wrong

    def _judge_states(self, sent):
        """Every identifier has gone through the states its messages made, once each and in the feed's order."""
        due = defaultdict(list)
        for offset, planned in sent:
            for identifier, status, survivor in planned.states:
                due[identifier].append((self.name_hop(offset), status, survivor))
        wrong = [f"identifiers of {hop} come after those of a later message" for hop in self._late]
        return wrong + [
            f"{identifier}: {due.get(identifier, [])[-4:]} expected, {self.states.get(identifier, [])[-4:]} found"
            for identifier in sorted(due.keys() | self.states.keys())
            if due.get(identifier, []) != self.states.get(identifier, [])
        ]

    def judge_store(self, folder):
        """Differences between the local store and the changelogs."""
        wrong = []
        environment = lmdb.open(str(folder), readonly=True, lock=False, max_dbs=16)
        try:
            for name in self.stores:
                database = environment.open_db(name.encode(), create=False)
                with environment.begin() as transaction:
                    held = {bytes(key): bytes(value) for key, value in transaction.cursor(db=database)}
                wanted = self.stores[name]
                if held != wanted:
                    keys = sorted(key for key in held.keys() | wanted.keys() if held.get(key) != wanted.get(key))
                    wrong.append(f"store {name} differs from its changelog in {len(keys)} keys, first {keys[0]!r}")
        finally:
            environment.close()
        return wrong

    def _take(self, message):
        topic, key, value = message.topic(), message.key() or b"", message.value()
        headers = dict(message.headers() or [])
        if headers.get("hop", b"").decode().startswith(self._others):
            return
        if topic in ("payments", "settlements"):
            event = self._decode(value)
            mrn = event["mrn"]["value"] if event["mrn"] else ""
            fact = (event["kind"], event["object_id"], event["money"]["minor"], mrn)
            self.events.append((fact, key.decode()))
            self.fates[headers["hop"].decode()].append("canonical")
        elif topic == "patients":
            # Those without a hop were put there by hand.
            if "hop" in headers:
                self._note_order(message.partition(), headers["hop"].decode())
                record = self._decode(value)
                survivor = record["merged_into"] and _name(record["merged_into"])
                self.states[_name(record["identifier"])].append(
                    (headers["hop"].decode(), record["status"], survivor or "")
                )
        elif topic == "dispositions":
            record = self._decode(value)
            if record["hop"].startswith(self._others):
                return
            self.fates[record["hop"]].append(record["fate"])
            self.links[record["hop"]] = record["linked"]
        elif topic == "dlq":
            self.fates[headers["hop"].decode()].append("dead_lettered")
        elif topic == "reviews":
            self.fates[headers["hop"].decode()].append("in_review")
        elif topic == "frontiers":
            group, topic_id, _ = key.decode().rsplit("|", 2)
            if (group, topic_id) == (self._group, self.topic_id):
                assert int(value) >= self.frontier, "the frontier went back"
                self.frontier = int(value)
        else:
            store = self.stores[topic.partition(".")[0]]
            if value is None:
                store.pop(key, None)
            else:
                store[key] = value

    def _note_order(self, partition, hop):
        offset = int(hop.rpartition(":")[2])
        if offset < self._latest.get(partition, offset):
            self._late.append(hop)
        self._latest[partition] = offset

    def _decode(self, value):
        magic, number = struct.unpack(">bI", value[:5])
        assert magic == 0
        if number not in self._schemas:
            with DIRECT.open(f"{self._registry_url}/schemas/ids/{number}", timeout=10) as answer:
                self._schemas[number] = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
        return fastavro.schemaless_reader(io.BytesIO(value[5:]), self._schemas[number])


def _name(reference):
    return "|".join(reference[part] for part in ("authority", "id_type", "value"))

"""What came out, read by a plain client, against what the records mean.

Nothing here is code of the project: records by confluent-kafka's own consumer, Avro by fastavro with the schema the
registry gives, and the rules written once more: the first copy of a fact is published, an equal one suppressed, one
that says something else goes to a person.
"""

from __future__ import annotations

import io
import json
import time
import urllib.request
from collections import Counter, defaultdict
from dataclasses import dataclass, field

import fastavro
from confluent_kafka import (
    OFFSET_BEGINNING,
    Consumer,
    IsolationLevel,
    KafkaError,
    KafkaException,
    TopicCollection,
    TopicPartition,
)
from confluent_kafka.admin import AdminClient, OffsetSpec

from tests.faults.traffic import RAW_MONEY, RAW_PATIENTS, Fact

RAW = (RAW_MONEY, RAW_PATIENTS)
CANONICAL = ("payments", "settlements")
WAITING = "waiting.stripe"
FATES = ("canonical", "suppressed", "ignored", "patient_update", "waiting", "in_review", "dead_lettered")
"""The names of the conservation equation."""
QUIET = {"log_level": 2, "error_cb": lambda _error: None}
DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
ATTEMPTS = 4
SHOWN = 8
"""Violations of one kind that are shown in full."""


class Tail:
    """Reads topics to their end again and again, each record once."""

    def __init__(self, bootstrap, topics, *, isolation="read_committed"):
        self._level = (
            IsolationLevel.READ_COMMITTED if isolation == "read_committed" else IsolationLevel.READ_UNCOMMITTED
        )
        self._bootstrap = bootstrap
        self._admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
        self._consumer = Consumer(
            {
                "bootstrap.servers": bootstrap,
                "group.id": "oracle",
                "enable.auto.commit": False,
                "enable.partition.eof": True,
                "isolation.level": isolation,
                "auto.offset.reset": "earliest",
                "fetch.wait.max.ms": 20,
                "fetch.queue.backoff.ms": 10,
                "check.crcs": True,
                **QUIET,
            }
        )
        known = self._consumer.list_topics(timeout=20).topics
        self._next = {(topic, partition): 0 for topic in topics for partition in known[topic].partitions}
        self._consumer.assign([TopicPartition(*place, OFFSET_BEGINNING) for place in self._next])

    def read(self, patience=60.0):
        """Every record up to the end that the topics have now. Raises ``KafkaException`` or ``TimeoutError``."""
        ends = self._list_ends()
        until = time.monotonic() + patience
        while any(self._next[place] < end for place, end in ends.items()):
            if time.monotonic() > until:
                raise TimeoutError("the topics cannot be read to their end")
            for message in self._consumer.consume(5000, 0.05):
                place, error = (message.topic(), message.partition()), message.error()
                if error is None:
                    self._next[place] = message.offset() + 1
                    yield message
                elif error.code() == KafkaError._PARTITION_EOF:
                    self._next[place] = max(self._next[place], message.offset())
                elif not error.retriable() and error.code() not in (
                    KafkaError._ALL_BROKERS_DOWN,
                    KafkaError._TRANSPORT,
                ):
                    raise KafkaException(error)

    def close(self):
        self._consumer.close()

    def _list_ends(self):
        wanted = {TopicPartition(*place): OffsetSpec.latest() for place in self._next}
        for attempt in range(ATTEMPTS):
            try:
                futures = self._admin.list_offsets(wanted, isolation_level=self._level, request_timeout=3)
                return {(tp.topic, tp.partition): future.result().offset for tp, future in futures.items()}
            except KafkaException:
                # The client may go on asking under the leader it knows, long after a broker was restarted.
                self._admin = AdminClient({"bootstrap.servers": self._bootstrap, **QUIET})
                if attempt == ATTEMPTS - 1:
                    raise
                time.sleep(0.2)
        raise AssertionError("the last attempt returns or raises")


@dataclass(slots=True)
class Published:
    """A canonical event as a reader sees it."""

    topic: str
    partition: int
    offset: int
    key: str
    hop: str
    event: dict


@dataclass(slots=True)
class Verdict:
    """What was found. ``violations`` is empty when every rule held."""

    violations: list[str]
    fates: dict[str, int]
    accepted: int
    facts: int
    kinds: Counter = field(default_factory=Counter)
    """Violations by kind."""


class Oracle:
    """Follows raw, canonical and every other topic that holds a fate, committed records only."""

    def __init__(self, bootstrap, registry_url):
        self._registry_url = registry_url
        self._schemas = {}
        self._tail = Tail(bootstrap, [*RAW, *CANONICAL, "dispositions", "dlq", "reviews", WAITING])
        admin = AdminClient({"bootstrap.servers": bootstrap, **QUIET})
        found = admin.describe_topics(TopicCollection(list(RAW)))
        self.topic_ids = {name: str(future.result().topic_id) for name, future in found.items()}
        self.raw = {}
        """Hop -> (number of the record, topic, partition, offset, raw key)."""
        self.fates = defaultdict(list)
        self.published = []
        self.dead_letters = []
        """Dead letters as (number, key, value, headers)."""
        self._waiting = {}

    def follow(self):
        """Read on to the end."""
        for message in self._tail.read():
            self._take(message)

    def is_settled(self, meanings):
        """Whether every raw record has a fate, and only what can never be decided still waits."""
        waiting = set(self._waiting.values())
        if any(not self.fates.get(hop) and hop not in waiting for hop in self.raw):
            return False
        return all(
            isinstance(meanings.get(self.raw[hop][0]), Fact) and meanings[self.raw[hop][0]].stuck
            for hop in waiting
            if hop in self.raw
        )

    def close(self):
        self._tail.close()

    def judge(self, meanings, sent):
        """Every rule that does not hold. ``sent``: raw records that were stored."""
        found = defaultdict(list)
        fates = {hop: list(self.fates.get(hop, ())) for hop in self.raw}
        for hop in self._waiting.values():
            if hop in fates:
                fates[hop].append("waiting")
        for hop in self.fates.keys() - fates.keys():
            found["unknown hop"].append(f"{hop} has a fate and is no raw record")
        if sent != len(self.raw):
            found["raw"].append(f"{sent} raw records were sent, {len(self.raw)} are stored")
        expected, order = self._expect(meanings)
        for hop, (number, *_place) in self.raw.items():
            has = fates[hop]
            if not has:
                found["lost"].append(f"{hop} (record {number}) has no fate; {expected[hop]} was due")
            elif len(has) > 1:
                found["doubled"].append(f"{hop} (record {number}) has the fates {', '.join(has)}")
            elif has[0] != expected[hop]:
                found["other fate"].append(f"{hop} (record {number}) is {has[0]}; {expected[hop]} was due")
        facts = self._judge_facts(found, expected, meanings)
        self._judge_order(found, order)
        counts = Counter(name for has in fates.values() for name in has)
        balance = {name: counts[name] for name in FATES}
        if len(self.raw) != sum(balance.values()):
            found["equation"].append(f"accepted {len(self.raw)}, fates {balance}")
        violations = [f"{kind}: {text}" for kind, texts in sorted(found.items()) for text in texts[:SHOWN]]
        kinds = Counter({kind: len(texts) for kind, texts in found.items()})
        return Verdict(violations, balance, len(self.raw), facts, kinds)

    def _expect(self, meanings):
        """Fate of each hop, and per root the facts in the order in which they must be published."""
        expected, order, copies = {}, defaultdict(list), {}
        for hop, (number, topic, partition, offset, _key) in sorted(
            self.raw.items(), key=lambda item: (item[1][1], item[1][2], item[1][3])
        ):
            del partition, offset
            meaning = meanings[number]
            if not isinstance(meaning, Fact):
                first = topic == RAW_MONEY or number not in copies
                copies[number] = True
                expected[hop] = meaning if first else "suppressed"
            elif meaning.name not in copies:
                copies[meaning.name] = {meaning.content}
                expected[hop] = "waiting" if meaning.stuck else "canonical"
                if not meaning.stuck:
                    place = 0 if meaning.is_root else len(order[meaning.root])
                    order[meaning.root].insert(place, meaning.name)
            elif meaning.content in copies[meaning.name]:
                expected[hop] = "suppressed"
            else:
                copies[meaning.name].add(meaning.content)
                expected[hop] = "in_review"
        return expected, order

    def _judge_facts(self, found, expected, meanings):
        due = Counter()
        for hop, fate in expected.items():
            if fate == "canonical":
                meaning = meanings[self.raw[hop][0]]
                due[meaning.topic, *meaning.content, meaning.mrn] += 1
        got = Counter()
        ids = Counter()
        for published in self.published:
            event = published.event
            mrn = event["mrn"]
            got[
                published.topic,
                event["account"],
                event["kind"],
                event["object_id"],
                event["root"],
                event["money"]["minor"],
                mrn and mrn["value"],
            ] += 1
            ids[event["event_id"]] += 1
        for fact, count in (due - got).items():
            found["fact missing"].append(f"{fact}, {count} times")
        for fact, count in (got - due).items():
            found["fact twice" if fact in due else "fact unknown"].append(f"{fact}, {count} times too many")
        found_twice = [name for name, count in ids.items() if count > 1]
        if found_twice:
            found["event id"].extend(f"{name} is published {ids[name]} times" for name in found_twice)
        return due.total()

    def _judge_order(self, found, order):
        lanes = defaultdict(list)
        for published in sorted(self.published, key=lambda one: (one.topic, one.partition, one.offset)):
            event = published.event
            if published.key != event["root"]:
                found["key"].append(f"{event['root']} has the key {published.key}")
            lanes[event["root"]].append((published.partition, (event["account"], event["kind"], event["object_id"])))
        for root, lane in lanes.items():
            if len({partition for partition, _ in lane}) > 1:
                found["partition"].append(f"{root} is in several partitions")
            names = list(dict.fromkeys(name for _, name in lane))
            due = [name for name in order.get(root, ()) if name in names]
            if names != due:
                found["order"].append(f"{root}: {[name[1:] for name in names]}; due {[name[1:] for name in due]}")

    def _take(self, message):
        topic, headers = message.topic(), dict(message.headers() or ())
        if topic in RAW:
            place = (topic, message.partition(), message.offset())
            hop = f"{self.topic_ids[topic]}:{place[1]}:{place[2]}"
            self.raw[hop] = (int(headers["delivery_id"]), *place, message.key())
        elif topic in CANONICAL:
            hop = headers["hop"].decode()
            self.fates[hop].append("canonical")
            self.published.append(
                Published(
                    topic,
                    message.partition(),
                    message.offset(),
                    message.key().decode(),
                    hop,
                    self.decode(message.value()),
                )
            )
        elif topic == "dispositions":
            disposition = self.decode(message.value())
            self.fates[disposition["hop"]].append(disposition["fate"])
        elif topic == "dlq":
            self.fates[headers["hop"].decode()].append("dead_lettered")
            self.dead_letters.append((int(headers["delivery_id"]), message.key(), message.value(), message.headers()))
        elif topic == "reviews":
            self.fates[self.decode(message.value())["hop"]].append("in_review")
        elif message.value() is None:
            self._waiting.pop((message.partition(), message.key()), None)
        else:
            self._waiting[message.partition(), message.key()] = self.decode(message.value())["hop"]

    def decode(self, value):
        """A value in the registry's wire format."""
        if value[:1] != b"\0":
            raise AssertionError("not in the registry's wire format")
        number = int.from_bytes(value[1:5], "big")
        if number not in self._schemas:
            with DIRECT.open(f"{self._registry_url}/schemas/ids/{number}", timeout=10) as answer:
                self._schemas[number] = fastavro.parse_schema(json.loads(json.load(answer)["schema"]))
        return fastavro.schemaless_reader(io.BytesIO(value[5:]), self._schemas[number])

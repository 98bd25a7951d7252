"""Planted card numbers and names are in no topic, log, store or answer; with redaction off, all of them are found.

The search reads every topic of the catalog, aborted records too: keys, headers, values as they are and decoded. A name
may stand in PID-5 and MRG-7 of `raw.hl7` and of its dead letters, nowhere else; a card number nowhere.
"""

from __future__ import annotations

import subprocess
import sys
import time

import pytest
import redis

from identity.projection import ProjectionWriter
from sandbox.expected import find_plants
from sandbox.plan import FacilityPlan, TrafficPlan
from sandbox.scenario import build
from sandbox.traffic import drive
from schemas.keys import HmacKey
from tests.integration.traffic import Texts, assign_ports, read_files
from topics import catalog
from topics.reading import TopicReader

pytestmark = pytest.mark.integration

EVENTS = 500
ROLES = {
    "project": "projector",
    "worker": "worker",
    "deliver": "deliverer",
    "listen": "listener",
    "receive": "receiver",
}
# A role with its protections off, else as the command line runs it: no redaction at the edge, no masking of the log.
OPEN_ROLE = """
import sys
from importlib import import_module
from pathlib import Path
from runtime.roles import process
from runtime.settings import read_settings
role, config, *pairs = sys.argv[1:]
settings = read_settings(Path(config), [tuple(pair.split("=", 1)) for pair in pairs])
options = {
    "receiver": {"redact": False},
    "listener": {"redact": False},
    "deliverer": {"targets": tuple(target.name for target in settings.targets)},
}
process.run.__kwdefaults__["masking"] = False
sys.exit(import_module(f"runtime.roles.{role}").run(settings, **options.get(role, {})))
"""
SHOWN_BY_STRIPE = "stripe."


class Site:
    """A deployment with all its roles and the sandbox, through which traffic was driven."""

    def __init__(self, deployment):
        self.deployment = deployment
        self.settings = deployment.settings
        self._waiting = 0

    def start(self, *, protected):
        self.deployment.start("sandbox")
        for command, role in ROLES.items():
            if protected:
                self.deployment.start(command)
            else:
                self._start_open(command, role)
        for role in ROLES.values():
            self.deployment.await_ready(role)

    def _start_open(self, command, role):
        deployment = self.deployment
        pairs = [text for text in self.settings.list_arguments() if "=" in text]
        with (deployment.folder / f"{command}.log").open("ab") as log:
            deployment.processes[command] = subprocess.Popen(
                [sys.executable, "-c", OPEN_ROLE, role, str(deployment.path), *pairs],
                stdout=log,
                stderr=log,
                cwd=deployment.folder,
            )

    async def drive(self, seed):
        plan = self._plan(seed)
        traffic = build(plan)
        phases = iter(traffic.phases)

        async def settle():
            await self._settle(traffic.expected.waiting_after[next(phases).name])

        summary = await drive(traffic, settle)
        assert summary.given_up == ()
        await self._settle(0)
        return traffic.expected

    def _plan(self, seed):
        secrets = {account.facility: account.secrets[0].get_secret_value() for account in self.settings.accounts}
        facilities = tuple(
            FacilityPlan(
                id=name,
                account=f"{name}-card",
                webhook_secret=secrets[name],
                sending_application="EPICADT",
                sending_facility=f"LS{name.upper()}",
                assigning_authority=name.upper(),
                refund_type="AJ" if name == "harbor" else "PY",
            )
            for name in ("north", "harbor", "valley")
        )
        return TrafficPlan(
            facilities=facilities,
            events=EVENTS,
            seed=seed,
            webhook_url=f"http://127.0.0.1:{self.deployment.receiver_port}/webhooks/stripe/{{account}}",
            mllp_host="127.0.0.1",
            mllp_port=self.deployment.listener_port,
            start=int(time.time()) - 3600,
        )

    async def _settle(self, waiting):
        """Nothing pending, that many on hold, and every patient in Redis."""
        self.deployment.await_account(lambda books: not books.pending and books.raw.parts["waiting"] == waiting)
        reader = TopicReader(self.settings.kafka, catalog.PATIENTS)
        key = HmacKey(self.settings.secrets.hmac_key.get_secret_value().encode())
        writer = ProjectionWriter(self.settings.redis, key, reader.topic_id())
        try:
            ends = reader.end_offsets("read_committed")
            until = time.monotonic() + 60
            while True:
                state = await writer.read_state()
                if state is not None and all(state.offsets.get(p, 0) >= end for p, end in ends.items()):
                    return
                assert time.monotonic() < until, "the projection does not catch up"
        finally:
            await writer.close()
            reader.close()

    def read_topics(self):
        texts = Texts(self.settings.kafka.bootstrap, self.settings.registry.url)
        found = list(texts.read_topics([topic.name for topic in self.settings.topics]))
        return texts, found

    def read_redis(self):
        """Keys and values of the patient projection."""
        client = redis.Redis.from_url(self.settings.redis.url)
        for key in client.scan_iter(match=f"{self.settings.redis.key_prefix}*", count=1000):
            yield "redis key", key
            kind = client.type(key)
            value = client.hgetall(key) if kind == b"hash" else client.get(key)
            yield f"redis {kind.decode()}", value if isinstance(value, bytes) else repr(value).encode()
        client.close()

    def read_logs(self):
        return [(str(path), path.read_bytes()) for path in sorted(self.deployment.folder.glob("*.log"))]


@pytest.fixture
def site(deploy):
    ports = assign_ports()
    names = {key.replace(".", "__"): str(port) for key, port in ports.items() if key.startswith(("sand", "targets"))}
    return Site(deploy(**names, log__level="debug"))


async def test_planted_data_is_nowhere(site):
    site.start(protected=True)
    expected = await site.drive(seed=41)
    texts, found = site.read_topics()
    # The search saw something of every topic that this traffic reaches, decoded where values are encoded.
    # What people write at the desk has tests of its own.
    names = {topic.name for topic in site.settings.topics}
    desk = {"reviews", "audit"} | {name for name in names if name.startswith("decisions.")}
    reached = names - desk
    assert {name for name, count in texts.records.items() if count} >= reached
    encoded = {topic.name for topic in site.settings.topics if topic.schema} - desk
    assert {name for name, count in texts.decoded.items() if count} >= encoded
    logs, stored = site.read_logs(), list(site.read_redis())
    assert len(logs) == len(ROLES) + 1
    assert len(stored) > 20
    books = site.deployment.account().build_report()
    answers = [("account", repr(books).encode())]
    state = list(read_files(site.settings.worker.state))
    assert state
    findings = find_plants([*found, *logs, *stored, *state, *answers], expected.plants)
    assert findings == []


async def test_without_redaction_the_search_finds_all_of_it(site):
    site.start(protected=False)
    expected = await site.drive(seed=42)
    _, texts = site.read_topics()
    seen = {finding.plant for finding in find_plants(texts, expected.plants)}
    cards = {plant for plant in expected.plants if plant.kind == "card"}
    names = {
        plant
        for plant in expected.plants
        if plant.kind == "name" and any(place.startswith(SHOWN_BY_STRIPE) for place in plant.places)
    }
    assert len(cards) >= 5
    assert len(names) >= 5
    assert {place for plant in cards for place in plant.places} == {
        "stripe.description",
        "stripe.metadata.note",
        "hl7.NTE-3",
    }
    assert cards - seen == set()
    assert names - seen == set()
    # Masking is the second defence of the log: without it, and at level debug, no role writes payload either.
    assert find_plants(site.read_logs(), expected.plants) == []

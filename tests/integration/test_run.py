"""``remitstream run --once`` as a user sees it: green, green again, clean when interrupted, red when the ledger is off.

The tests share one folder and run in the order of this file: each leaves behind what the next must cope with.
"""

from __future__ import annotations

import contextlib
import json
import signal
import socket
import sqlite3

import pytest
from confluent_kafka import TopicPartition
from confluent_kafka.admin import AdminClient

from sandbox.expected import find_plants
from tests.integration.traffic import EQUATION, OUTCOMES, Home, assert_green, read_all, read_files, wait_for

pytestmark = pytest.mark.integration

PARTS = ("remitstream", "python", "kafka", "registry", "redis", "java", "faust-streaming", "confluent-kafka")


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    home = Home(tmp_path_factory.mktemp("run") / "home")
    yield home
    assert home.close() == [], "processes were left running"


@pytest.fixture(scope="module")
def first(home):
    """The first run of a fresh folder."""
    finished = home.start().wait()
    finished.expected = home.read_expected()
    finished.postings = home.read_postings()
    finished.left = home.describe_processes()
    return finished


def test_the_first_run_is_green(home, first):
    assert_green(home, first)
    counts = first.expected.counts
    assert counts["canonical"] > 0
    assert {name: first.report[name] for name in EQUATION} == {name: counts[name] for name in EQUATION}
    assert first.report["accepted"] == counts["accepted"]
    assert first.report["suppressed"] == counts["suppressed"] > 0
    assert first.report["posted"] == len(first.expected.rows) == len(first.postings)


def test_the_report_names_everything(first):
    report = first.report
    numbers = ("accepted", *EQUATION, *OUTCOMES, "lost", "doubled", "pending")
    assert all(type(report[name]) is int for name in numbers), report
    assert report["seconds"] > 0
    assert set(report["start_seconds"]) == {"cold", "warm"}
    assert [type(seconds) for seconds in report["start_seconds"].values() if seconds is not None] == [float]
    assert all(report["versions"][part] for part in PARTS), report["versions"]
    sent = report["sent"]
    assert sent["webhooks"] + sent["admissions"] == report["accepted"]
    assert sent["given_up"] == []
    assert set(report["restarts"].values()) == {0}
    assert f"lost: {report['lost']}" in first.output.splitlines()


def test_addresses_are_told_as_soon_as_they_answer(first):
    lines = first.output.splitlines()
    ready = next(number for number, line in enumerate(lines) if line.startswith("ready after"))
    assert [line.split()[0] for line in lines[ready + 1 : ready + 5]] == ["webhooks", "metrics", "ledger", "kafka"]


def test_nothing_is_left_running(first):
    assert first.left == []


def test_what_the_run_tells_holds_no_planted_data(home, first):
    plants = first.expected.plants
    assert {plant.kind for plant in plants} == {"card", "name"}
    texts = [("output", first.output.encode()), ("report", json.dumps(first.report).encode())]
    texts += list(read_files(home.data / "logs", home.data / "stack" / "logs"))
    assert len(texts) > 8
    assert find_plants(texts, plants) == []
    # The same search does find them in the file that names them all.
    assert {finding.plant for finding in find_plants([("x", home.expected_path.read_bytes())], plants)} == set(plants)


def test_an_interrupt_stops_everything_and_is_no_success(home, first):
    run = home.start()
    wait_for(lambda: run.is_over or len(home.read_postings()) > len(first.postings), run.read_output)
    run.signal(signal.SIGINT)
    finished = run.wait()
    assert finished.code != 0, finished
    assert "interrupted" in finished.output
    assert finished.report is None
    assert home.describe_processes() == []
    posted = {row["description"] for row in home.read_postings() if home.read_expected().run in row["description"]}
    assert 0 < len(posted) < len(home.read_expected().rows)


@pytest.fixture(scope="module")
def second(home, first):
    """A run after the interrupted one, while other programs hold the receiver's and the worker's ports."""
    taken = {key: home.ports[key] for key in ("receiver.port", "health.worker")}
    with contextlib.ExitStack() as held:
        for port in taken.values():
            held.enter_context(socket.create_server(("127.0.0.1", port)))
        finished = home.start().wait()
    finished.taken = taken
    return finished


def test_the_next_run_is_green_with_other_ids(home, first, second):
    assert_green(home, second)
    expected = home.read_expected()
    assert expected.run != first.expected.run
    before = {(row.target, row.object_id) for row in first.expected.rows}
    assert not before & {(row.target, row.object_id) for row in expected.rows}
    assert home.describe_processes() == []
    assert second.report["start_seconds"]["warm"] is not None


def test_taken_ports_are_replaced(first, second):
    for line, key in (("webhooks", "receiver.port"), ("metrics", "health.worker")):
        used = [
            next(text for text in finished.output.splitlines() if text.startswith(line)) for finished in (first, second)
        ]
        assert f":{second.taken[key]}/" in used[0], "the first run used the port it was given"
        assert f":{second.taken[key]}/" not in used[1]


def test_a_wrong_ledger_is_told_and_ends_in_failure(home, second):
    """The billing systems' own book is changed while the run goes on: a row lost, one twice, one cent too much."""
    run = home.start()
    known = {row["id"] for row in home.read_postings()}

    def list_new(instance):
        return [row for row in home.read_postings() if row["id"] not in known and row["instance"] == instance]

    instances = ("epic-north", "epic-harbor", "epic-valley")
    wait_for(lambda: run.is_over or all(list_new(instance) for instance in instances), run.read_output)
    lost, twice, wrong = (list_new(instance)[0] for instance in instances)
    members = ", ".join(name for name in twice if name != "id")
    with sqlite3.connect(home.database, timeout=30) as database:
        database.execute("DELETE FROM postings WHERE id = ?", (lost["id"],))
        database.execute(
            f"INSERT INTO postings ({members}) SELECT {members} FROM postings WHERE id = ?",  # noqa: S608
            (twice["id"],),
        )
        database.execute("UPDATE postings SET minor = minor + 1 WHERE id = ?", (wrong["id"],))
    database.close()
    finished = run.wait()
    assert finished.code == 1, finished
    assert not finished.report["ledger"]["equal"]
    assert [text.split(":")[0] for text in sorted(finished.report["ledger"]["differences"])] == [
        f"missing at epic-north {lost['description']}",
        f"twice at epic-harbor {twice['description']}",
        f"wrong at epic-valley {wrong['description']}",
    ]
    # The pipeline itself did nothing wrong, and says so.
    assert finished.report["balanced"]
    assert finished.report["lost"] == 0
    assert home.describe_processes() == []


@pytest.fixture(scope="module")
def attached(home, second):
    """The stack alone, as the runs left its data."""
    assert home.call("stack", "up")[0] == 0
    yield
    assert home.call("stack", "down")[0] == 0
    assert home.describe_processes() == []


def test_data_survives_the_runs(home, first, second, attached):
    """The topics hold all runs; the account over all of them still balances."""
    kept = home.read_postings()
    assert kept[: len(first.postings)] == first.postings
    code, text = home.call("account", "--json")
    books = json.loads(text)
    assert books["accepted"] > first.report["accepted"] + second.report["accepted"]
    assert books["lost"] == books["doubled"] == 0
    assert books["accepted"] == books["pending"] + sum(books[name] for name in EQUATION)
    assert code == 0


def test_a_deleted_record_is_a_loss_that_account_names(home, attached):
    """The first canonical record and the first delivery are removed from the log."""
    bootstrap = home.find_address()
    canonical = next(m for m in read_all(bootstrap, "payments") if m.headers())
    hop, event_id = (dict(canonical.headers())[name].decode() for name in ("hop", "event_id"))
    delivery = next(m for m in read_all(bootstrap, "deliveries") if event_id.encode() not in m.key())
    admin = AdminClient({"bootstrap.servers": bootstrap})
    for record in (canonical, delivery):
        place = TopicPartition(record.topic(), record.partition(), record.offset() + 1)
        for future in admin.delete_records([place]).values():
            future.result()
    code, text = home.call("account", "--json")
    books = json.loads(text)
    assert code == 1
    assert not books["balanced"]
    assert books["lost"] == 2
    assert hop in books["missing"]
    event, _, target = delivery.key().decode().partition("|")
    assert f"{target}:{event}" in books["missing"]

"""LMDB and RocksDB as the store of seen keys: ``python -m bench.stores``. Prints a table, writes results/stores.json.

``--restore`` measures instead how long ``PartitionState.load`` takes over a compacted changelog on a real broker.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import TYPE_CHECKING, Any

from confluent_kafka import Producer
from rich.console import Console
from rich.table import Table

from bench.environments import PROGRAMS, ensure_environment
from bench.ground import ROOT, BenchBroken, Ground, produce
from bench.programs.local_store import make_entry
from bench.report import read_report, write_report
from bench.webhooks import Traffic
from topics import catalog

if TYPE_CHECKING:
    from collections.abc import Iterator

RESULTS = Path(__file__).with_name("results") / "stores.json"
PROBED = 200_000
COLUMNS = ("get_each", "get_in_one", "get_many", "put_each", "put_many")


def main() -> int:
    """Exit code 0, or a traceback."""
    options = parse_options()
    console = Console(width=150)
    if options.restore:
        for row in measure_restores(options):
            save("restores", row, ("keys", "order"))
    else:
        for row in measure_stores(options):
            save("stores", row, ("store", "keys", "order", "load"))
    print_table(console, read_report(RESULTS))
    return 0


def parse_options() -> argparse.Namespace:
    """Options of the command line."""
    parser = argparse.ArgumentParser(prog="python -m bench.stores", description=__doc__)
    parser.add_argument("--keys", type=int, nargs="+", default=[1_000_000, 10_000_000, 35_000_000])
    parser.add_argument("--stores", nargs="+", default=["lmdb", "rocksdb"])
    parser.add_argument("--orders", nargs="+", default=["rising", "random"], choices=["rising", "random"])
    parser.add_argument("--loads", nargs="+", default=["batch"], choices=["batch", "chunk", "append"])
    parser.add_argument("--restore", action="store_true", help="from a changelog on a broker")
    return parser.parse_args()


def measure_stores(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One process a store, size, order and way of loading."""
    pythons = {"rocksdb": str(ensure_environment("stores"))}
    for keys in options.keys:
        for order in options.orders:
            for load in options.loads:
                for store in options.stores:
                    with scratch() as folder:
                        arguments = {"store": store, "order": order, "keys": keys, "load": load, "probe": PROBED}
                        program = [pythons.get(store, sys.executable), str(PROGRAMS / "local_store.py")]
                        yield run([*program, json.dumps(arguments | {"folder": str(folder / "store")})])


def measure_restores(options: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The changelog of one partition grows from size to size; each time an empty store is loaded from it."""
    order = options.orders[-1]
    with Ground(Traffic(1)) as ground:
        topic = catalog.name_seen("stripe")
        written = 0
        for keys in sorted(options.keys):
            write_changelog(ground, topic, range(written, keys), order)
            written = keys
            folder = ground.folder / f"restored-{keys}"
            program = [sys.executable, "-m", "bench.programs.restore", str(folder), str(keys), order]
            yield run([*program, *ground.settings.list_arguments()])
            shutil.rmtree(folder)


def write_changelog(ground: Ground, topic: str, numbers: range, order: str) -> None:
    """Entries of partition 0, as a worker's transactions would have left them."""
    producer = Producer(
        {"bootstrap.servers": ground.bootstrap, "compression.type": "lz4", "linger.ms": 20, "acks": "all"}
        | {"enable.idempotence": True, "queue.buffering.max.messages": 500_000, "log_level": 2}
    )
    for number in numbers:
        key, value = make_entry(number, order)
        produce(producer, topic, value, key, 0)
    if producer.flush(120):
        raise BenchBroken("the changelog could not be written")


def run(command: list[str]) -> dict[str, Any]:
    """What a program prints."""
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchBroken(f"{command[1]} failed:\n{done.stderr[-2000:]}")
    row: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return row


@contextlib.contextmanager
def scratch() -> Iterator[Path]:
    """A folder on the disk of temporary files."""
    with tempfile.TemporaryDirectory(prefix="remitstream-stores-", dir=os.environ.get("TMPDIR")) as folder:
        yield Path(folder)


def save(name: str, row: dict[str, Any], identity: tuple[str, ...]) -> None:
    """Put a row in, in place of an older one of the same."""
    report = read_report(RESULTS)
    same = tuple(row[column] for column in identity)
    rows = [other for other in report.get(name, []) if tuple(other[column] for column in identity) != same]
    report[name] = sorted([*rows, row], key=lambda other: [str(other[c]).rjust(12) for c in identity])
    write_report(RESULTS, report)


def describe_cost(row: dict[str, Any], name: str) -> str:
    """CPU where it was taken, else what elapsed, marked."""
    if "cpu_microseconds" in row:
        return f"{row['cpu_microseconds'][name]:.2f}"
    return f"{row['elapsed_microseconds'][name]:.2f}*"


def print_table(console: Console, report: dict[str, Any]) -> None:
    """All that is known, microseconds a key."""
    table = Table(title="stores of seen keys, batches of 2,000: CPU us a key (* elapsed, too long on a busy machine)")
    for name in (
        "store",
        "keys",
        "order",
        "load",
        "load us",
        "its CPU",
        *COLUMNS,
        "bytes a key",
        "private MiB",
        "load avg",
    ):
        table.add_column(name, justify="right")
    for row in report.get("stores", []):
        table.add_row(
            row["store"],
            f"{row['keys']:,}",
            row["order"],
            row["load"],
            f"{row['load_seconds'] / row['keys'] * 1e6:.2f}",
            f"{row['load_cpu_seconds'] / row['keys'] * 1e6:.2f}",
            *(describe_cost(row, name) for name in COLUMNS),
            f"{row['bytes_per_key']:.0f}",
            f"{row['private_mib']:.0f}",
            f"{row['load_average']:.1f}",
        )
    console.print(table)
    for row in report.get("restores", []):
        console.print(
            f"restore of {row['keys']:,} keys ({row['order']}): {row['seconds']:.1f} s, "
            f"{row['cpu_seconds']:.1f} CPU s, "
            f"{row['bytes_per_key']:.0f} bytes a key, {row['private_mib']:.0f} MiB private, "
            f"load average {row['load_average']:.1f}"
        )


if __name__ == "__main__":
    sys.exit(main())

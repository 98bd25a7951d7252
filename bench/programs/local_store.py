"""One local store of seen keys, filled, asked and written in batches. Runs in the environment of its library.

Argument: a JSON object with

* ``store``: lmdb, lmdb-writemap or rocksdb; ``keys``; ``order``: random or rising; ``folder``;
* ``load``: batch (as the worker writes after each commit), chunk (large sorted chunks) or append (sorted on disk first,
  then LMDB's append mode, or RocksDB's table files);
* ``probe``: how many keys are looked up and then written.

Prints JSON. Imports nothing of the project: entries have the shape of the worker's, 51 bytes of key and 57 of value.
"""

from __future__ import annotations

import hashlib
import heapq
import json
import marshal
import os
import random
import resource
import shutil
import sys
import threading
import time
from functools import partial
from itertools import islice
from operator import itemgetter
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Iterable, Iterator

BATCH = 2000
CHUNK = 200_000
RUN = 1_000_000
"""Entries sorted in memory at once."""
BLOCK = 2_000
FIRST = itemgetter(0)
MAP_BYTES = 64 * 1024**3
TOPIC_ID = "q0H6Nv1tTKe0mZ9wGv2rXA"


def make_entry(number: int, order: str) -> tuple[bytes, bytes]:
    """Key and value of one money fact. ``random``: ids that do not rise with time, the worst for a tree."""
    digest = hashlib.blake2b(number.to_bytes(8, "big"), digest_size=16).digest()
    name = digest.hex()[:20] if order == "random" else f"{number:020d}"
    hop = f"{TOPIC_ID}:{number % 12}:{number:010d}".encode()
    # MessagePack: a list of one entry, itself a list of digest and hop.
    value = b"\x91\x92\xc4\x10" + digest + bytes((0xD9, len(hop))) + hop
    return f"stripe:north-card:capture:pi_3R{name}".encode(), value


class Lmdb:
    """As in ``streams/state.py``: no fsync, one write transaction a batch, a named database."""

    def __init__(self, folder: str, *, writemap: bool = False) -> None:
        import lmdb  # noqa: PLC0415 - each library is in one environment only

        Path(folder).mkdir(parents=True)
        self.name = f"LMDB {'.'.join(map(str, lmdb.version()))}"
        self._environment = lmdb.open(
            folder,
            map_size=MAP_BYTES,
            max_dbs=8,
            sync=False,
            metasync=False,
            readahead=False,
            writemap=writemap,
        )
        self._database = self._environment.open_db(b"seen")

    def get_each(self, keys: list[bytes]) -> int:
        """As the worker did first: a transaction a key."""
        found = 0
        for key in keys:
            with self._environment.begin() as transaction:
                found += transaction.get(key, db=self._database) is not None
        return found

    def get_in_one(self, keys: list[bytes]) -> int:
        """One read transaction, a call a key."""
        with self._environment.begin(db=self._database) as transaction:
            return sum(transaction.get(key) is not None for key in keys)

    def get_many(self, keys: list[bytes]) -> int:
        """One call for all."""
        with self._environment.begin(db=self._database) as transaction, transaction.cursor() as cursor:
            return len(cursor.getmulti(keys))

    def put_each(self, entries: list[tuple[bytes, bytes]]) -> None:
        """One write transaction, a call a key."""
        with self._environment.begin(write=True) as transaction:
            for key, value in entries:
                transaction.put(key, value, db=self._database)

    def put_many(self, entries: list[tuple[bytes, bytes]]) -> None:
        """One write transaction, one call."""
        with self._environment.begin(write=True, db=self._database) as transaction, transaction.cursor() as cursor:
            cursor.putmulti(entries)

    def append(self, entries: Iterable[tuple[bytes, bytes]], _folder: str) -> None:
        """All entries, in order: pages are filled one after the other."""
        entries = iter(entries)
        while chunk := list(islice(entries, CHUNK)):
            with self._environment.begin(write=True, db=self._database) as transaction, transaction.cursor() as cursor:
                cursor.putmulti(chunk, append=True)

    def settle(self) -> None:
        """Nothing runs beside LMDB."""

    def close(self) -> None:
        """Close the file."""
        self._environment.close()


class Rocks:
    """RocksDB set up for look-ups of single keys: Bloom filters, LZ4, a 64 MiB block cache, no fsync; log on."""

    def __init__(self, folder: str) -> None:
        from importlib.metadata import version  # noqa: PLC0415

        import rocksdict  # noqa: PLC0415

        self._library = rocksdict
        self.name = f"RocksDB (rocksdict {version('rocksdict')})"
        self._options = rocksdict.Options(raw_mode=True)
        self._options.create_if_missing(True)  # noqa: FBT003 - its parameter has no name
        self._options.set_compression_type(rocksdict.DBCompressionType.lz4())
        self._options.set_write_buffer_size(64 * 2**20)
        self._options.set_max_background_jobs(2)
        self._options.set_level_compaction_dynamic_level_bytes(True)
        table = rocksdict.BlockBasedOptions()
        table.set_bloom_filter(10, False)  # noqa: FBT003
        table.set_block_cache(rocksdict.Cache(64 * 2**20))
        self._options.set_block_based_table_factory(table)
        self._db = rocksdict.Rdict(folder, self._options)

    def get_each(self, keys: list[bytes]) -> int:
        """A call a key."""
        return sum(self._db.get(key) is not None for key in keys)

    get_in_one = get_each

    def get_many(self, keys: list[bytes]) -> int:
        """One call for all."""
        return sum(value is not None for value in self._db.get(keys))

    def put_each(self, entries: list[tuple[bytes, bytes]]) -> None:
        """One atomic write of all; a call a key fills it."""
        batch = self._library.WriteBatch(raw_mode=True)
        for key, value in entries:
            batch.put(key, value)
        self._db.write(batch)

    put_many = put_each

    def append(self, entries: Iterable[tuple[bytes, bytes]], folder: str) -> None:
        """All entries, in order, as table files that are moved in."""
        entries, files = iter(entries), []
        while chunk := list(islice(entries, CHUNK)):
            files.append(f"{folder}-{len(files)}.sst")
            writer = self._library.SstFileWriter(options=self._options)
            writer.open(files[-1])
            for key, value in chunk:
                writer[key] = value
            writer.finish()
        options = self._library.IngestExternalFileOptions()
        options.set_move_files(True)
        self._db.ingest_external_file(files, options)

    def settle(self) -> None:
        """Let what runs beside it finish: its CPU belongs to the load."""
        self._db.flush()
        while self._db.property_int_value("rocksdb.num-running-compactions") or self._db.property_int_value(
            "rocksdb.compaction-pending"
        ):
            time.sleep(0.1)

    def close(self) -> None:
        """Close the files."""
        self._db.close()


class Runs:
    """Entries sorted in bounded memory: sorted runs on disk, then merged. Of equal keys the latest entry wins."""

    def __init__(self, folder: str) -> None:
        self._folder = Path(folder + "-runs")
        self._folder.mkdir()
        self._count = 0

    def add(self, entries: list[tuple[bytes, bytes]]) -> None:
        """One run, by time of arrival."""
        latest = sorted(dict(entries).items())
        with (self._folder / f"{self._count:06d}").open("wb") as stream:
            for start in range(0, len(latest), BLOCK):
                marshal.dump(latest[start : start + BLOCK], stream)
        self._count += 1

    def merge(self) -> Iterator[tuple[bytes, bytes]]:
        """All of them by key; among equals the latest comes last and wins."""
        runs = [self._read(number) for number in range(self._count)]
        last: tuple[bytes, bytes] | None = None
        for entry in heapq.merge(*runs, key=FIRST) if len(runs) > 1 else runs[0]:
            if last is not None and last[0] != entry[0]:
                yield last
            last = entry
        if last is not None:
            yield last
        shutil.rmtree(self._folder)

    def _read(self, number: int) -> Iterator[tuple[bytes, bytes]]:
        with (self._folder / f"{number:06d}").open("rb") as stream:
            while True:
                try:
                    yield from marshal.load(stream)  # noqa: S302 - written by this very process
                except EOFError:
                    return


class Peak:
    """The largest private memory of this process: pages of mapped files are the system's cache."""

    def __init__(self) -> None:
        self.private = 0
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        while not self._stop.wait(0.5):
            self.private = max(self.private, read_private())

    def close(self) -> None:
        """Stop looking."""
        self._stop.set()
        self._thread.join()


def read_private() -> int:
    """Anonymous resident bytes (Linux); 0 elsewhere."""
    status = Path("/proc/self/status")
    if not status.exists():
        return 0
    line = next((line for line in status.read_text("ascii").splitlines() if line.startswith("RssAnon")), "x 0")
    return int(line.split()[1]) * 1024


def measure_size(folder: str) -> int:
    """Bytes on disk, holes not counted."""
    return sum(path.stat().st_blocks * 512 for path in Path(folder).rglob("*") if path.is_file())


def count_cpu() -> float:
    """CPU seconds of this process with all its threads."""
    used = resource.getrusage(resource.RUSAGE_SELF)
    return used.ru_utime + used.ru_stime


def generate(arguments: dict[str, Any], size: int) -> Iterator[list[tuple[bytes, bytes]]]:
    """All entries in chunks, by time of arrival."""
    for start in range(0, arguments["keys"], size):
        numbers = range(start, min(arguments["keys"], start + size))
        yield [make_entry(number, arguments["order"]) for number in numbers]


def fill(store: Any, arguments: dict[str, Any]) -> tuple[float, float]:
    """Seconds and CPU seconds of the writes alone; making the entries is not counted."""
    seconds = cpu = 0.0
    runs = Runs(arguments["folder"])
    for chunk in generate(arguments, {"batch": BATCH, "chunk": CHUNK, "append": RUN}[arguments["load"]]):
        began, used = time.perf_counter(), count_cpu()
        if arguments["load"] == "append":
            runs.add(chunk)
        elif arguments["load"] == "chunk":
            chunk.sort()
            store.put_many(chunk)
        else:
            store.put_each(chunk)
        seconds += time.perf_counter() - began
        cpu += count_cpu() - used
    began, used = time.perf_counter(), count_cpu()
    if arguments["load"] == "append":
        store.append(runs.merge(), arguments["folder"])
    store.settle()
    return seconds + time.perf_counter() - began, cpu + count_cpu() - used


def probe(store: Any, arguments: dict[str, Any]) -> tuple[dict[str, float], dict[str, float]]:
    """CPU and elapsed microseconds a key, in batches of 2,000: look-ups (half of them find their key), then writes."""
    draw = random.Random(7)  # noqa: S311 - replayable on purpose
    known, count, order = arguments["keys"], arguments["probe"], arguments["order"]
    cpu: dict[str, float] = {}
    elapsed: dict[str, float] = {}
    fresh = known * 2
    for name in ("get_each", "get_in_one", "get_many", "put_each", "put_many"):
        seconds = used = 0.0
        for _ in range(0, count, BATCH):
            if name.startswith("get"):
                numbers = [draw.randrange(known * 2) for _ in range(BATCH)]
                batch: list[Any] = [make_entry(number, order)[0] for number in numbers]
            else:
                batch = [make_entry(number, order) for number in range(fresh, fresh + BATCH)]
                fresh += BATCH
            began, before = time.perf_counter(), count_cpu()
            found = getattr(store, name)(batch)
            seconds += time.perf_counter() - began
            used += count_cpu() - before
            if name.startswith("get") and found != sum(number < known for number in numbers):
                raise SystemExit(f"{name} found {found}")
        cpu[name], elapsed[name] = used / count * 1e6, seconds / count * 1e6
    return cpu, elapsed


def main() -> None:
    """Fill, measure, print."""
    arguments = json.loads(sys.argv[1])
    store: Any = {"lmdb": Lmdb, "lmdb-writemap": partial(Lmdb, writemap=True), "rocksdb": Rocks}[arguments["store"]](
        arguments["folder"]
    )
    before = read_private()
    peak = Peak()
    seconds, cpu = fill(store, arguments)
    private = peak.private
    os.sync()
    size = measure_size(arguments["folder"])
    spent, elapsed = probe(store, arguments)
    peak.close()
    store.close()
    report = {
        "store": store.name,
        **{name: arguments[name] for name in ("order", "keys", "load")},
        "load_seconds": seconds,
        "load_cpu_seconds": cpu,
        "bytes_per_key": size / arguments["keys"],
        "private_mib": max(0, private - before) / 2**20,
        "cpu_microseconds": spent,
        "elapsed_microseconds": elapsed,
        "load_average": os.getloadavg()[0],
    }
    print(json.dumps(report))


if __name__ == "__main__":
    main()

"""Loads an empty partition state from its changelog on a broker, as a worker does after it lost its disk. Prints JSON.

Arguments: folder, number of keys that must be there, their order, then the worker's settings.
"""

from __future__ import annotations

import json
import os
import sys
import time
from pathlib import Path

from bench.programs.local_store import Peak, count_cpu, make_entry, measure_size, read_private
from runtime.settings import read_settings
from streams.state import SEEN, PartitionState


def main() -> None:
    """Load, look whether all is there, print."""
    folder, keys, order, _, config, *rest = sys.argv[1:]
    overrides = [(key, text) for key, _, text in (pair.partition("=") for pair in rest[1::2])]
    settings = read_settings(Path(config), overrides)
    state = PartitionState(Path(folder), "stripe", 0, (SEEN,))
    before, peak = read_private(), Peak()
    began, used = time.perf_counter(), count_cpu()
    state.load(settings.kafka)
    seconds, cpu = time.perf_counter() - began, count_cpu() - used
    peak.close()
    found = sum(1 for _ in state.scan(SEEN))
    if found != int(keys) or any(
        state.read(SEEN, key) != value for key, value in (make_entry(n, order) for n in range(0, found, 997))
    ):
        raise SystemExit(f"{found} entries were loaded, or wrong ones")
    state.close()
    os.sync()
    print(
        json.dumps(
            {
                "keys": found,
                "order": order,
                "seconds": seconds,
                "cpu_seconds": cpu,
                "bytes_per_key": measure_size(folder) / found,
                "private_mib": (peak.private - before) / 2**20,
                "load_average": os.getloadavg()[0],
            }
        )
    )


if __name__ == "__main__":
    main()

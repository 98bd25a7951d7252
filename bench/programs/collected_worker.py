"""The shipped worker with a clock on the garbage collector: how often it ran, how long, what it found.

First argument: where the report goes (JSON, written every second and at the end). Second: ``shipped`` leaves the
worker's own thresholds, ``python`` keeps Python's, ``off`` turns the collector off, a number is the first threshold.
The rest are arguments of ``remitstream``. The worker's own work is untouched: two short calls a collection are added.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import threading
import time
from pathlib import Path
from typing import Any


class CollectorClock:
    """Counts collections by generation, their CPU seconds and the longest elapsed. ``gc`` calls it around each one."""

    def __init__(self) -> None:
        self.generations = [{"collections": 0, "seconds": 0.0, "longest": 0.0, "collected": 0} for _ in range(3)]
        self.uncollectable = 0
        self._began = self._used = 0.0

    def __call__(self, phase: str, info: dict[str, Any]) -> None:
        """Take note of one call of the collector."""
        if phase == "start":
            self._began, self._used = time.perf_counter(), time.thread_time()
            return
        spent = time.perf_counter() - self._began
        figures = self.generations[info["generation"]]
        figures["collections"] += 1
        figures["seconds"] += time.thread_time() - self._used
        figures["longest"] = max(figures["longest"], spent)
        figures["collected"] += info["collected"]
        self.uncollectable += info["uncollectable"]

    def write(self, target: Path) -> None:
        """Replace the report."""
        report = {
            "generations": self.generations,
            "uncollectable": self.uncollectable,
            "thresholds": gc.get_threshold() if gc.isenabled() else None,
            "frozen": gc.get_freeze_count(),
            "process_seconds": time.process_time(),
        }
        draft = target.with_suffix(".new")
        draft.write_text(json.dumps(report), "ascii")
        draft.replace(target)


def set_collector(mode: str) -> None:
    """Change the thresholds the worker sets when it starts."""
    from runtime.roles import process  # noqa: PLC0415 - the worker's modules come after the clock

    if mode == "off":
        process._calm_collector = gc.disable  # noqa: SLF001 - what is measured here
    elif mode == "python":
        process._calm_collector = lambda: None  # noqa: SLF001
    elif mode != "shipped":
        shipped = process._calm_collector  # noqa: SLF001
        process._calm_collector = lambda: (shipped(), gc.set_threshold(int(mode), 20, 20))  # noqa: SLF001


def main() -> None:
    """Run ``remitstream`` with the rest of the arguments."""
    target, mode = Path(sys.argv[1]), sys.argv[2]
    clock = CollectorClock()
    gc.callbacks.append(clock)
    set_collector(mode)

    def report() -> None:
        while True:
            time.sleep(1)
            clock.write(target)

    threading.Thread(target=report, daemon=True, name="collector-report").start()
    sys.argv = ["remitstream", *sys.argv[3:]]
    from runtime.cli import main as run  # noqa: PLC0415

    try:
        run()
    finally:
        clock.write(target)
        sys.stdout.flush()


if __name__ == "__main__":
    os.environ.setdefault("PYTHONUNBUFFERED", "1")
    main()

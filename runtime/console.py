"""What a run shows: downloads, stages with count, rate, lag and age, processes, and the traffic's progress.

On a terminal a live view; elsewhere a line every few seconds.
"""

from __future__ import annotations

import threading
import time
import urllib.request
from collections import deque
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from prometheus_client.parser import text_string_to_metric_families
from rich.console import Console, Group
from rich.live import Live
from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn
from rich.table import Table
from rich.text import Text

if TYPE_CHECKING:
    from collections.abc import Iterable, Mapping

    from runtime.lag import Lag
    from runtime.processes import ProcessStatus

_DIRECT = urllib.request.build_opener(urllib.request.ProxyHandler({}))
_LINE_SECONDS = 5.0

Sample = tuple[str, tuple[tuple[str, str], ...]]
"""Metric name and its labels."""


def scrape(url: str) -> dict[Sample, float]:
    """All samples of a metrics endpoint; empty when it does not answer."""
    try:
        with _DIRECT.open(url, timeout=2) as answer:
            text = answer.read().decode()
    except OSError:
        return {}
    return {
        (sample.name, tuple(sorted(sample.labels.items()))): sample.value
        for family in text_string_to_metric_families(text)
        for sample in family.samples
    }


@dataclass(slots=True)
class StageRow:
    """One stage as shown. Rates are over the last seconds."""

    name: str
    count: int = 0
    lag: Lag | None = None
    note: str = ""
    _history: deque[tuple[float, int]] = field(default_factory=lambda: deque(maxlen=8))

    def update(self, count: int, note: str = "") -> None:
        """Take a new count."""
        self.count, self.note = count, note
        self._history.append((time.monotonic(), count))

    @property
    def rate(self) -> float:
        """Per second."""
        if len(self._history) < 2:
            return 0.0
        (begin, first), (end, last) = self._history[0], self._history[-1]
        # A restarted process counts from zero again.
        return max(0.0, (last - first) / (end - begin)) if end > begin else 0.0


class StackProgress:
    """Downloads and component states of the embedded stack, drawn as they come (from other threads)."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._lock = threading.Lock()
        self._bars: dict[str, object] = {}
        self._progress = Progress(
            TextColumn("{task.description}"), BarColumn(), DownloadColumn(), TransferSpeedColumn(), console=console
        )
        self._started = False

    def download(self, file: str, done: int, total: int) -> None:
        """Bytes of one file so far."""
        if not self._console.is_terminal:
            return
        with self._lock:
            if not self._started:
                self._progress.start()
                self._started = True
            task = self._bars.get(file)
            if task is None:
                task = self._bars[file] = self._progress.add_task(file, total=total)
            self._progress.update(task, completed=done, total=total, visible=done < total)  # type: ignore[arg-type]

    def step(self, component: str, state: str) -> None:
        """A component changed its state."""
        self._console.print(f"[bold]{component}[/bold] {state}")

    def close(self) -> None:
        """Stop drawing."""
        if self._started:
            self._progress.stop()


class View:
    """The view of a run. ``update`` draws it; it is given everything it shows."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._live: Live | None = None
        self._last_line = 0.0
        self._begin = time.monotonic()

    def open(self) -> None:
        """Begin to draw."""
        if self._console.is_terminal:
            self._live = Live(console=self._console, refresh_per_second=4, transient=False)
            self._live.start()

    def close(self) -> None:
        """Stop drawing; the last picture stays."""
        if self._live is not None:
            self._live.stop()
            self._live = None

    def update(
        self,
        headline: str,
        stages: Iterable[StageRow],
        processes: Mapping[str, ProcessStatus],
        fates: Mapping[str, int],
    ) -> None:
        """Draw, or now and then print a line."""
        rows = list(stages)
        if self._live is not None:
            self._live.update(Group(Text(headline, style="bold"), _draw_stages(rows), _draw_processes(processes)))
        elif time.monotonic() - self._last_line >= _LINE_SECONDS:
            self._last_line = time.monotonic()
            told = " ".join(f"{name}={count}" for name, count in fates.items() if count)
            lag = sum(row.lag.records for row in rows if row.lag is not None)
            self._console.print(
                f"{time.monotonic() - self._begin:6.1f}s {headline} | {told} | lag={lag}", highlight=False
            )


def _draw_stages(rows: Iterable[StageRow]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title, justify in (
        ("stage", "left"),
        ("count", "right"),
        ("per s", "right"),
        ("lag", "right"),
        ("age s", "right"),
    ):
        table.add_column(title, justify=justify)  # type: ignore[arg-type]
    table.add_column("")
    for row in rows:
        table.add_row(
            row.name,
            str(row.count),
            f"{row.rate:.0f}",
            "" if row.lag is None else str(row.lag.records),
            "" if row.lag is None else f"{row.lag.seconds:.1f}",
            row.note,
        )
    return table


def _draw_processes(processes: Mapping[str, ProcessStatus]) -> Table:
    table = Table(box=None, pad_edge=False)
    for title in ("process", "state", "pid", "restarts"):
        table.add_column(title)
    for status in processes.values():
        state = f"{status.state}{' (flapping)' if status.flapping else ''}"
        table.add_row(status.name, state, str(status.pid or ""), str(status.restarts or ""))
    return table

"""Parent of workers.

An order has ``config`` and ``overrides`` as the command line has them, ``ahead`` (hours that decisions are ahead of the
clock), and what shall happen: ``record`` (a file), ``die`` (a point), or ``fail`` (point, kind of failure, file to
create) with ``then``, what shall happen after it; ``store_first`` breaks a rule of the worker.
"""

from __future__ import annotations

from pathlib import Path

from runtime.roles import worker
from runtime.settings import read_settings
from streams import decide, decision
from streams.batch import Batch
from tests.crash_points.doors import Killer, Point, Recorder, Saboteur, Watch
from tests.nursery import serve


def choose_witness(order):
    if "record" in order:
        return Recorder(Path(order["record"]))
    if "die" in order:
        return Killer(Point(*order["die"]))
    if "fail" in order:
        point, failure, reached = order["fail"]
        return Saboteur(Point(*point), failure, Path(reached), choose_witness(order.get("then", {})))
    return None


def set_ahead(hours):
    """Decisions see a later time, so that what was put on hold by an earlier process has waited long enough."""
    now_ms = decision.Clock.now_ms
    decision.Clock.now_ms = lambda self: now_ms(self) + hours * 3_600_000
    decide.EXPIRY_INTERVAL = decide.RELEASE_INTERVAL


def change_store_first():
    """Negative control: the local store changes before the commit."""
    commit = Batch.commit

    async def change_then_commit(self, decision):
        decision.apply()
        return await commit(self, decision)

    Batch.commit = change_then_commit


def run(order):
    settings = read_settings(Path(order["config"]), [tuple(pair) for pair in order["overrides"]])
    if order.get("store_first"):
        change_store_first()
    set_ahead(order["ahead"])
    witness = choose_witness(order)
    if witness is not None:
        Watch(witness).install()
    return worker.run(settings)


if __name__ == "__main__":
    serve(run)

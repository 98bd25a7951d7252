"""The points at which a worker can die: found while it runs, by asking the interpreter.

``sys.setprofile`` tells of every call into C and of every resumption and suspension of a frame. Of those we keep the
calls into confluent-kafka and LMDB, the commands of Redis, and the awaits of our own coroutines. So a new call in the
worker is a new point by itself.
"""

from __future__ import annotations

import json
import opcode
import os
import sys
import threading
from collections import Counter
from functools import cache
from pathlib import Path
from typing import NamedTuple

import confluent_kafka
import lmdb
import redis.exceptions
from confluent_kafka import KafkaError, KafkaException, cimpl

ROOT = Path(__file__).parents[2]
DIED = 137
"""Exit code of a process that dies at its point."""
AWAITS = tuple(f"{ROOT / name}{os.sep}" for name in ("streams", "topics", "identity"))
"""Our coroutines here; Faust's are between them."""
OURS = (*AWAITS, f"{ROOT / 'runtime'}{os.sep}")
KAFKA = (cimpl.Producer, cimpl.Consumer, cimpl._AdminClientImpl)
LMDB = (lmdb.Environment, lmdb.Transaction, lmdb.Cursor)
REDIS = f"{os.sep}redis{os.sep}asyncio{os.sep}client.py"
IDLE_POLLS = 4
"""A recording ends when this many polls in a row after a commit brought nothing."""
UNSTEADY = ("Environment.info", "Environment.stat")

_YIELD, _RESUME = opcode.opmap["YIELD_VALUE"], opcode.opmap["RESUME"]
_COROUTINE = 0x80 | 0x200
"""CO_COROUTINE and CO_ASYNC_GENERATOR."""


class Point(NamedTuple):
    """One place in the program and one side of it: ``before``, ``after``, ``suspended`` or ``resumed``."""

    door: str
    place: str
    side: str
    count: int = 1
    """Which passage."""

    def __str__(self):
        nth = "" if self.count == 1 else f", passage {self.count}"
        return f"{self.side} {self.door} at {self.place}{nth}"


def read_point(text):
    return Point(*json.loads(text))


@cache
def _read_code(code):
    return code.co_code


@cache
def _is_ours(filename):
    return filename.startswith(OURS)


def _name_frame(frame):
    code = frame.f_code
    return f"{Path(code.co_filename).relative_to(ROOT)}:{frame.f_lineno} {code.co_qualname}"


def _find_place(frame):
    while frame is not None and not _is_ours(frame.f_code.co_filename):
        frame = frame.f_back
    return None if frame is None else _name_frame(frame)


def _name_door(function):
    owner = getattr(function, "__self__", None)
    if isinstance(owner, (*KAFKA, *LMDB)):
        kind = next(base for base in (*KAFKA, *LMDB) if isinstance(owner, base))
        return f"{kind.__name__.strip('_')}.{function.__name__}"
    return None


class Watch:
    """Calls ``pass_through(point)`` at every point, in the thread that is there; what that raises is raised there."""

    def __init__(self, pass_through):
        self._pass = pass_through

    def install(self):
        """From here on, in this thread and in those that start later."""
        threading.setprofile(self._look)
        sys.setprofile(self._look)

    def _look(self, frame, event, argument):
        try:
            self._look_closely(frame, event, argument)
        except BaseException:
            self._come_back(frame)
            raise

    def _come_back(self, frame):
        """The interpreter takes a profile function that raised away from its thread: install it at the next step."""

        def install(*_):
            sys.settrace(None)
            sys.setprofile(self._look)

        sys.settrace(install)
        frame.f_trace = install

    def _look_closely(self, frame, event, argument):
        if event in ("call", "return"):
            self._look_at_frame(frame, event)
            return
        door = _name_door(argument)
        if door is not None and door not in UNSTEADY:
            place = _find_place(frame)
            if place is not None:
                self._pass(Point(door, place, "before" if event == "c_call" else "after"))

    def _look_at_frame(self, frame, event):
        code = frame.f_code
        if not code.co_flags & _COROUTINE:
            return
        if code.co_filename.startswith(AWAITS):
            side = _find_side(frame, event)
            if side is not None:
                self._pass(Point("await", _name_frame(frame), side))
        elif code.co_name in ("execute", "execute_command") and code.co_filename.endswith(REDIS):
            side = {None: "after" if event == "return" else "before"}.get(_find_side(frame, event))
            place = _find_place(frame) if side else None
            if place is not None:
                self._pass(Point(f"Redis.{code.co_qualname}", place, side))


def _find_side(frame, event):
    """Whether a coroutine is left or entered in its middle; None at its beginning and end."""
    code, at = _read_code(frame.f_code), frame.f_lasti
    if event == "return":
        return "suspended" if code[at] == _YIELD else None
    return "resumed" if code[at] == _RESUME and code[at + 1] & 3 else None


class Recorder:
    """Writes down every point of a run up to the moment when the worker has nothing to do any more."""

    def __init__(self, target):
        self._target = target
        self._seen = []
        self._lock = threading.Lock()
        self._idle = None

    def __call__(self, point):
        with self._lock:
            self._seen.append((threading.get_ident(), point))
            if (point.door, point.side) == ("Producer.commit_transaction", "after"):
                self._idle = 0
            elif self._idle is not None and (point.door, point.side) == ("Consumer.poll", "before"):
                self._idle += 1
                if self._idle > IDLE_POLLS:
                    self._target.write_text(json.dumps([[thread, *at] for thread, at in self._seen]), "utf-8")
                    os._exit(0)


def read_recording(target):
    """Every passage of a recording, as (thread, point)."""
    return [(thread, Point(*at)) for thread, *at in json.loads(target.read_text("utf-8"))]


def find_batch(recording):
    """Where the first committed batch begins: at the call that takes the rest of it from the client."""
    points = [point for _, point in recording]
    begun = next(n for n, point in enumerate(points) if point.door == "Producer.begin_transaction")
    polled = max(n for n, point in enumerate(points[:begun]) if point[::2] == ("Consumer.poll", "after"))
    return next(n for n in range(polled, begun) if points[n][::2] == ("Consumer.consume", "before"))


def find_rollback(recording):
    """The part up to the next poll."""
    return slice(next(n for n, (_, point) in enumerate(recording) if point.door == "Consumer.poll"))


def find_loaders(recording):
    """Threads that open stores: what they pass is the same for every batch, and comes beside it."""
    return {thread for thread, point in recording if point.door == "Environment.open_db"}


def choose_points(recording, part=None, without=()):
    """Distinct points of a recording, or of a part of it, in order of their first passage there.

    ``without`` are threads that are left out.

    A suspension goes through all frames of a chain of awaits, a resumption too: one of each is kept. Of a call that is
    made many times, the first and the last passage.
    """
    inside = range(len(recording))[part or slice(None)]
    counts, chosen, last, pending = Counter(), {}, {}, {}
    for number, (thread, (door, place, side, _)) in enumerate(recording[: inside.stop]):
        key = (door, place, side)
        counts[key] += 1
        if number not in inside or thread in without:
            continue
        point = Point(*key, counts[key])
        before, last[thread] = last.get(thread), side
        if side != "resumed" and thread in pending:
            # The innermost frame is resumed last.
            resumed = pending.pop(thread)
            chosen.setdefault(resumed[:3], resumed)
        if side == "resumed":
            pending[thread] = point
        elif not (side == "suspended" and before == "suspended"):
            chosen.setdefault(key, point)
    points = list(chosen.values())
    repeated = [
        point
        for point in points
        if point.door.startswith(("Producer.", "Transaction.")) and counts[point[:3]] > point.count
    ]
    return points + [point._replace(count=counts[point[:3]]) for point in repeated]


class Killer:
    """Ends the process at one passage of one point, as ``kill -9`` would."""

    def __init__(self, point):
        self._key = point[:3]
        self._left = point.count
        self._lock = threading.Lock()

    def __call__(self, point):
        if point[:3] == self._key:
            with self._lock:
                self._left -= 1
                if self._left == 0:
                    os._exit(DIED)


class Saboteur(Killer):
    """Makes the step at one point raise what its library raises; ``reached`` is then created.

    ``then`` is told of every point that is passed afterwards. No failure: the point is passed as ever.
    """

    def __init__(self, point, failure, reached, then=None):
        super().__init__(point)
        self._failure = failure
        self._reached = reached
        self._then = then

    def __call__(self, point):
        if self._left == 0:
            if self._then is not None:
                self._then(point)
        elif point[:3] == self._key:
            with self._lock:
                self._left -= 1
                is_here = self._left == 0
            if is_here:
                self._reached.touch()
                if self._failure:
                    failure = FAILURES[self._failure]()
                    raise failure


def _build_kafka_error(*, retriable=False, abortable=False):
    return KafkaException(KafkaError(KafkaError._TIMED_OUT, "injected", False, retriable, abortable))


FAILURES = {
    "abort": lambda: _build_kafka_error(abortable=True),
    "retry": lambda: _build_kafka_error(retriable=True),
    "full": lambda: BufferError("injected"),
    "lmdb": lambda: lmdb.Error("injected"),
    "redis": lambda: redis.exceptions.ConnectionError("injected"),
}


def list_failures(point):
    """How the step at a point can fail."""
    if point.side != "before":
        # The step was taken and its answer was lost: for a commit that is the hardest question.
        return ["retry"] if (point.door, point.side) == ("Producer.commit_transaction", "after") else []
    if point.door.startswith("Redis."):
        return ["redis"]
    if point.door.startswith(tuple(f"{kind.__name__}." for kind in LMDB)):
        return ["lmdb"]
    if point.door == "Producer.commit_transaction":
        return ["abort", "retry"]
    if point.door == "Producer.produce":
        return ["abort", "full"]
    if point.door == "Producer.abort_transaction":
        return ["abort", "retry"]
    if point.door.startswith("Producer."):
        return ["abort"]
    return ["retry"] if point.door != "await" else []


assert confluent_kafka.Producer is cimpl.Producer, "the doors are the C classes"

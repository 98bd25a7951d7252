"""A deliverer dies at every point of its way, one run for each, and another one goes on.

Points are every suspension of a coroutine of ``sinks`` and both sides of every boundary: transaction, last look, write,
answer. Nobody lists them: an undisturbed run in virtual time gives the list, and the same world passes the same points
again up to the death.
"""

from __future__ import annotations

import asyncio
import collections.abc
import contextlib
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any
from unittest import mock

from schemas.failure import Failure, FailureKind
from sinks import runner as runner_module
from sinks import shards as shards_module
from sinks.contract import TargetClass
from tests.delivery_faults import play, virtual_time
from tests.delivery_faults.play import QUIET, Process
from tests.delivery_faults.world import DEADLINE, Faults, Group, NobodyDecides, Patients, Wire, World, name_event

if TYPE_CHECKING:
    from sinks.contract import Answer, Request
    from topics.group import Polled
    from topics.reading import Record

EVENTS, ENTITIES = 4, 2
_SINKS = Path(runner_module.__file__).parent


class Died(BaseException):
    """The process is gone; nothing that handles errors may see it."""


@dataclass
class Way:
    """What the first process passes, and where it dies: at passage ``fatal``, counted from 0; None: nowhere."""

    fatal: int | None = None
    places: list[str] = field(default_factory=list)
    situations: list[object] = field(default_factory=list)
    """What the broker and the target held at each passage, and how many boundaries had been crossed."""
    is_over: bool = False
    _crossed: int = 0

    def pass_by(self, place: str) -> bool:
        """A suspension: the process does nothing any more after it. Return whether it dies here."""
        if self.is_over:
            return False
        self.places.append(place)
        self.situations.append((self._crossed, Group.world.frontier, tuple(Group.world.attempts.items())))
        self.is_over = len(self.places) - 1 == self.fatal
        if self.is_over:
            for task in asyncio.all_tasks() - Group.world.network:
                if task.get_name() != _PLAY:
                    task.cancel()
        return self.is_over

    def cross(self, place: str) -> None:
        """A boundary: what comes after it in the same step does not happen either."""
        self._crossed += place != _POLLED
        if self.pass_by(place):
            raise Died


_PLAY = "play"
_POLLED = "polled"


class _Steps(collections.abc.Coroutine[Any, Any, Any]):
    """A coroutine that tells of each of its suspensions."""

    def __init__(self, inner: Any, way: Way) -> None:
        self._inner, self._way = inner, way

    def send(self, value: Any) -> Any:
        waited = self._inner.send(value)
        self._way.pass_by(self._name_place())
        return waited

    def throw(self, *given: Any) -> Any:
        waited = self._inner.throw(*given)
        self._way.pass_by(self._name_place())
        return waited

    def close(self) -> None:
        self._inner.close()

    def __await__(self) -> Any:
        raise NotImplementedError("only a task steps it")

    def _name_place(self) -> str:
        """The innermost frame of the sinks."""
        place, coroutine = "", self._inner
        while getattr(coroutine, "cr_frame", None) is not None:
            code = coroutine.cr_code
            if _SINKS in Path(code.co_filename).parents:
                place = f"{Path(code.co_filename).name}:{coroutine.cr_frame.f_lineno} {code.co_qualname}"
            coroutine = coroutine.cr_await
        return place


class DyingGroup(Group):
    """Its transactions are boundaries. Only of the first process: nothing is passed after its death."""

    way: Way

    async def poll(self, max_records: int, wait: float) -> Polled[Record]:
        polled = await super().poll(max_records, wait)
        self.way.cross(_POLLED)
        return polled

    async def call(self, function: Any, *arguments: Any) -> Any:
        await asyncio.sleep(0)
        return function(*arguments)

    async def commit(self, number: int, outputs: Any, positions: Any) -> None:
        self.way.cross("before the transaction")
        await super().commit(number, outputs, positions)
        self.way.cross("the transaction stands")


class AwaitedPatients(Patients):
    """Identities that have to be waited for."""

    async def resolve(self, refs: Any) -> list[Any]:
        await asyncio.sleep(0.001)
        return await super().resolve(refs)


class DyingWire(Wire):
    """Look, write and answer are boundaries. With ``loses_answers`` no event's first write is answered."""

    def __init__(self, world: World, way: Way, *, loses_answers: bool) -> None:
        super().__init__(world)
        self._way = way
        self._loses_answers = loses_answers

    async def send(self, request: Request, before_write: Any) -> Answer:
        self._way.cross("before the last look")
        before_write()
        self._way.cross("looked, not written")
        is_first = not self.world.books.applied[int(request.control_id, 16)]
        self.world.books.calls += 1
        travel = self._travel(request, 0.02)
        self._way.cross("written")
        if self._loses_answers and is_first:
            self.world.books.timeouts_after_success += 1
            await asyncio.sleep(DEADLINE)
            raise Failure(FailureKind.AMBIGUOUS, "NO_ANSWER")
        answer = await asyncio.shield(travel)
        self._way.cross("answered")
        return answer

    async def find(self, request: Request, first_write_at: int, before_write: Any) -> Any:
        self._way.cross("before the question")
        finding = await super().find(request, first_write_at, before_write)
        self._way.cross("found or not")
        return finding


def deliver(target_class: TargetClass, way: Way, *, loses_answers: bool) -> World:
    """A few events of two entities, to the end; the process dies on its way where that says so."""
    return virtual_time.run(_deliver(World(target_class, EVENTS, ENTITIES, Faults(), 1), way, loses_answers))


async def _deliver(world: World, way: Way, loses_answers: bool) -> World:
    Group.world, DyingGroup.way = world, way
    loop = asyncio.get_running_loop()
    this = asyncio.current_task()
    assert this is not None
    this.set_name(_PLAY)
    loop.set_task_factory(lambda loop, coroutine, **named: _make_task(way, loop, coroutine, **named))
    wire = DyingWire(world, way, loses_answers=loses_answers)
    with (
        mock.patch.object(runner_module, "GroupConsumer", DyingGroup),
        mock.patch.object(runner_module, "DecisionFeed", NobodyDecides),
        mock.patch.object(shards_module, "read_to_end", world.read_ledger),
        mock.patch.object(play, "Patients", AwaitedPatients),
    ):
        process, is_second = Process(world, wire), False
        progress, changed_at = world.count_progress(), 0.0
        while (not _is_done(world) or (way.is_over and not is_second)) and loop.time() - changed_at < QUIET:
            await asyncio.sleep(0.1)
            if way.is_over and not is_second:
                with contextlib.suppress(Died):
                    await process.kill()
                world.books.kills += 1
                process, is_second = Process(world, wire), True
            process.check()
            if world.count_progress() != progress:
                progress, changed_at = world.count_progress(), loop.time()
        way.is_over = True
        # What should not happen any more has time to.
        await asyncio.sleep(DEADLINE)
        await process.kill()
        if world.network:
            await asyncio.wait(set(world.network))
    return world


def _is_done(world: World) -> bool:
    if world.target_class is TargetClass.D:
        return world.is_settled()
    return world.frontier == EVENTS and not world.attempts and world.count_outcomes() == {"posted": EVENTS}


def _make_task(way: Way, loop: Any, coroutine: Any, **named: Any) -> asyncio.Task[Any]:
    code = getattr(coroutine, "cr_code", None)
    if code is not None and _SINKS in Path(code.co_filename).parents:
        coroutine = _Steps(coroutine, way)
    return asyncio.Task(coroutine, loop=loop, **named)


def judge(world: World) -> list[str]:
    """What is wrong after a death; empty when all is right."""
    wrong = [f"{name}: {count}" for name, count in world.judge().items() if count]
    outcomes = world.count_outcomes()
    if world.target_class is not TargetClass.D:
        wrong += [f"{name_event(n)} applied {world.books.applied[n]} times" for n in range(EVENTS)
                  if world.books.applied[n] != 1]  # fmt: skip
        if outcomes != {"posted": EVENTS}:
            wrong.append(f"outcomes {dict(outcomes)}")
    elif outcomes["unknown"] > ENTITIES or outcomes["posted"] + outcomes["unknown"] + outcomes["parked"] != EVENTS:
        wrong.append(f"outcomes {dict(outcomes)}")
    return wrong


@dataclass
class Deaths:
    """Numbers of a sweep, and what was wrong: the place and the judgement."""

    deaths: int
    places: int
    unknown: int = 0
    """Events left to a person, over all runs."""
    wrong: list[tuple[str, list[str]]] = field(default_factory=list)

    def take(self, place: str, world: World, wrong: list[str]) -> None:
        """Count one run."""
        self.unknown += world.count_outcomes()["unknown"]
        if wrong:
            self.wrong.append((place, wrong))


def sweep_deaths(target_class: TargetClass, *, loses_answers: bool, every: bool) -> Deaths:
    """Die at every place in every situation, or (``every`` false) once at every place; a fresh world for each."""
    straight = Way()
    world = deliver(target_class, straight, loses_answers=loses_answers)
    keys: dict[object, int] = {}
    for number, place in enumerate(straight.places):
        keys.setdefault((place, straight.situations[number]) if every else place, number)
    deaths = Deaths(len(keys), len(set(straight.places)))
    deaths.take("nowhere", world, judge(world))
    for fatal in keys.values():
        way = Way(fatal)
        world = deliver(target_class, way, loses_answers=loses_answers)
        wrong = judge(world)
        if not world.books.kills or way.places[-1] != straight.places[fatal]:
            wrong.append("this point was never reached")
        deaths.take(f"passage {fatal}, {straight.places[fatal]}", world, wrong)
    return deaths

"""Runs a deliverer in a world until nothing is left to do, with kills and lost sessions on the way."""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any
from unittest import mock

from sinks import runner as runner_module
from sinks import shards as shards_module
from sinks.runner import Runner
from telemetry.metrics import Metrics
from tests.delivery_faults import virtual_time
from tests.delivery_faults.world import (
    DEADLINE,
    KAFKA,
    SESSION,
    SETTINGS,
    TENANCY,
    Faults,
    Group,
    NobodyDecides,
    Patients,
    Registry,
    Virtual,
    Wire,
    World,
    build_target,
)

if TYPE_CHECKING:
    from collections.abc import Callable, Iterator

    from sinks.contract import TargetClass

QUIET = 600.0
"""Seconds without anything happening, after which nothing will; the longest pause between two tries is 60 s."""


def play(
    target_class: TargetClass,
    *,
    events: int,
    entities: int,
    faults: Faults,
    seed: int = 1,
    seen: Callable[[World], bool] = lambda _world: False,
) -> World:
    """The world after all is settled, or after nothing has happened for long: what is missing then is lost.

    Also when ``seen`` has seen enough.
    """
    return virtual_time.run(_play(World(target_class, events, entities, faults, seed), seen))


def play_kill(target_class: TargetClass, *, events: int, faults: Faults, ready: Callable[[World], bool]) -> World:
    """One process until ``ready``, then kill -9, then another one until all is settled. Each event is an entity."""
    return virtual_time.run(_play_kill(World(target_class, events, events, faults, 1), ready))


async def _play_kill(world: World, ready: Callable[[World], bool]) -> World:
    with _install(world):
        first = Process(world)
        while not ready(world):
            await asyncio.sleep(1.0)
            first.check()
        world.books.kills += 1
        await first.kill()
        second = Process(world)
        while not world.is_settled():
            await asyncio.sleep(1.0)
            second.check()
        await asyncio.sleep(4 * SESSION + DEADLINE)
        await second.kill()
    return world


@contextlib.contextmanager
def _install(world: World) -> Iterator[None]:
    Group.world = world
    with (
        mock.patch.object(runner_module, "GroupConsumer", Group),
        mock.patch.object(runner_module, "DecisionFeed", NobodyDecides),
        mock.patch.object(shards_module, "read_to_end", world.read_ledger),
    ):
        yield


async def _play(world: World, seen: Callable[[World], bool]) -> World:
    with _install(world):
        processes = [Process(world)]
        faults = world.faults
        kill_at, lose_at = _draw(world, faults.kill_every), _draw(world, faults.lose_session_every)
        loop = asyncio.get_running_loop()
        progress, changed_at = world.count_progress(), 0.0
        while not world.is_settled() and loop.time() - changed_at < QUIET and not seen(world):
            await asyncio.sleep(1.0)
            processes[-1].check()
            if world.count_progress() != progress:
                progress, changed_at = world.count_progress(), loop.time()
            if loop.time() >= kill_at:
                world.books.kills += 1
                await processes[-1].kill()
                processes[-1] = Process(world)
                kill_at = loop.time() + _draw(world, faults.kill_every)
            if loop.time() >= lose_at:
                world.books.lost_sessions += 1
                zombie = processes[-1]
                zombie.group.is_heard = False
                await asyncio.sleep(SESSION)
                processes.append(Process(world))
                loop.call_later(2 * SESSION * world.random.random(), zombie.learn)
                lose_at = loop.time() + _draw(world, faults.lose_session_every)
        # Late writes, if there are any, still come.
        await asyncio.sleep(4 * SESSION + DEADLINE)
        for process in processes:
            await process.kill()
        if world.network:
            await asyncio.wait(set(world.network))
    return world


def _draw(world: World, mean: float) -> float:
    return world.random.expovariate(1 / mean) if mean else float("inf")


class Process:
    """One deliverer process. ``wire`` is its connection to the target."""

    def __init__(self, world: World, wire: Wire | None = None) -> None:
        self.runner = Runner(
            KAFKA,  # type: ignore[arg-type]
            build_target(world.target_class),
            SETTINGS,
            TENANCY,
            registry=Registry(),  # type: ignore[arg-type]
            identities=Patients(),
            instance="i",
            transport=wire or Wire(world),
            metrics=Metrics(),
            clock=Virtual(),  # type: ignore[arg-type]
            draw=world.random.random,
        )
        self.group: Any = self.runner._consumer
        self._task = asyncio.create_task(self.runner.run())

    def check(self) -> None:
        """Raise what ended it."""
        if self._task.done():
            self._task.result()
            raise AssertionError("the deliverer stopped by itself")

    def learn(self) -> None:
        """The zombie hears of the group again: its partition is gone."""
        self.group.lose()
        self.group.is_heard = True

    async def kill(self) -> None:
        """At once, as kill -9 does: nothing more is committed, what is written travels on."""
        self._task.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._task

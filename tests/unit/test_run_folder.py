"""A run apart from its traffic: one at a time in a folder, a full disk is named, Ctrl-C after the end is no failure."""

import asyncio
import os
import shutil
from types import SimpleNamespace

import pytest

from runtime.run import RunBusy, _Run, hold_folder
from runtime.stack.errors import DiskSpaceError
from schemas.failure import ExitCode
from topics.cluster import KafkaUnreachable


def test_a_second_run_in_a_folder_is_refused_and_told_who_is_there(tmp_path):
    folder = tmp_path / "data"
    with hold_folder(folder):
        with pytest.raises(RunBusy) as caught, hold_folder(folder):
            pass
        assert str(os.getpid()) in caught.value.detail
        assert caught.value.place == str(folder)
        assert caught.value.exit_code == ExitCode.RETRY
        with hold_folder(tmp_path / "other"):
            pass
    with hold_folder(folder):
        pass


@pytest.mark.parametrize(
    ("embedded", "free", "error"),
    [(True, 0, DiskSpaceError), (True, 1 << 40, KafkaUnreachable), (False, 0, KafkaUnreachable)],
)
async def test_a_broker_that_went_away_with_a_full_disk(tmp_path, monkeypatch, embedded, free, error):
    settings = SimpleNamespace(stack=SimpleNamespace(home=tmp_path / "stack"), embedded=embedded)
    run = _Run(settings, once=True, report=None, events=1, seed=1)

    async def lose_broker():
        raise KafkaUnreachable("no metadata.", place="raw.hl7")

    monkeypatch.setattr(run, "_bring_up", lose_broker)
    monkeypatch.setattr(shutil, "disk_usage", lambda _folder: SimpleNamespace(free=free))
    with pytest.raises(error):
        await run.execute()


@pytest.mark.parametrize("verdict", [ExitCode.OK, ExitCode.FAILED, None])
async def test_an_interrupt_after_the_traffic_leaves_its_verdict(tmp_path, monkeypatch, capsys, verdict):
    settings = SimpleNamespace(stack=SimpleNamespace(home=tmp_path / "stack"), embedded=False)
    run = _Run(settings, once=False, report=None, events=1, seed=1)

    async def do_nothing():
        pass

    async def watch():
        try:
            await asyncio.Event().wait()
        finally:
            await asyncio.sleep(0.02)  # a look at the metrics ends before it is given up

    async def drive():
        asyncio.get_running_loop().call_later(0.01, run._stop.set)
        return await asyncio.Event().wait() if verdict is None else verdict

    monkeypatch.setattr(run, "_bring_up", do_nothing)
    monkeypatch.setattr(run, "_watch", watch)
    monkeypatch.setattr(run, "_drive", drive)
    assert await run.execute() == (ExitCode.FAILED if verdict is None else verdict)
    assert ("interrupted" in capsys.readouterr().out) == (verdict is None)

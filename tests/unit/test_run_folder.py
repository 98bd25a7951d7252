"""The data folder of a run: one run at a time, and a full disk is named."""

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

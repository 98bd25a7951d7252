"""What a process leaves behind when it ends over its records, and what its successors make of it."""

import asyncio
import fcntl
import os
import signal
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest

from streams import slot
from streams.suspects import ALONE, EXITS, Suspects

P = "T:0"


def start(folder):
    """A new process of the slot; the one before has ended without a word."""
    suspects = Suspects(folder)
    suspects.open()
    return suspects


def end_over(folder, begin, end, *, alone=False):
    start(folder).take({P: (begin, end)}, alone=alone)


def test_three_ends_over_the_same_records_make_them_suspects(tmp_path):
    for count in range(EXITS):
        assert not start(tmp_path).is_suspected({P: 5}), count
        end_over(tmp_path, 5, 2005)
    suspects = start(tmp_path)
    assert suspects.is_suspected({P: 5})
    assert suspects.is_suspected({P: 2004})
    assert not suspects.is_suspected({P: 2005}), "all of them are done"
    assert not suspects.is_suspected({"T:1": 5})
    assert not suspects.is_suspected({"U:0": 5}), "a topic made anew begins with a clean sheet"


def test_the_culprit_lies_in_every_batch_that_ended_a_process(tmp_path):
    end_over(tmp_path, 0, 2000)
    # The next one did 300 of them, then ended over a batch that reaches further.
    end_over(tmp_path, 300, 2300)
    end_over(tmp_path, 300, 900)
    suspicion = start(tmp_path).known[P]
    assert (suspicion.begin, suspicion.end, suspicion.exits) == (300, 900, 3)


def test_progress_past_the_records_begins_the_count_anew(tmp_path):
    end_over(tmp_path, 0, 100)
    end_over(tmp_path, 0, 100)
    end_over(tmp_path, 100, 200)
    assert start(tmp_path).known[P].exits == 1


@pytest.mark.parametrize("way", ["committing", "orderly"])
def test_an_end_without_records_in_hand_counts_for_nothing(tmp_path, way):
    for _ in range(5):
        suspects = start(tmp_path)
        suspects.take({P: (0, 10)}, alone=True)
        if way == "committing":
            suspects.put_down()
        else:
            suspects.close()
    suspects = start(tmp_path)
    assert suspects.known == {}


def test_alone_in_hand_twice_is_the_culprit_and_only_that_record(tmp_path):
    for _ in range(EXITS):
        end_over(tmp_path, 0, 10)
    for count in range(ALONE):
        assert not start(tmp_path).is_culprit(P, 4), count
        end_over(tmp_path, 4, 5, alone=True)
    suspects = start(tmp_path)
    assert suspects.is_culprit(P, 4)
    assert not suspects.is_culprit(P, 5)
    assert not suspects.is_culprit("T:1", 4)


def test_two_records_alone_once_each_are_no_culprits(tmp_path):
    for _ in range(EXITS):
        end_over(tmp_path, 0, 10)
    end_over(tmp_path, 3, 4, alone=True)
    end_over(tmp_path, 4, 5, alone=True)
    suspects = start(tmp_path)
    assert not any(suspects.is_culprit(P, offset) for offset in range(10))


def test_suspects_are_acquitted_when_passed_or_when_the_culprit_is_found(tmp_path):
    for _ in range(EXITS):
        start(tmp_path).take({P: (0, 10), "T:1": (50, 60)}, alone=False)
    suspects = start(tmp_path)
    suspects.acquit({P: 9, "T:1": 60}, found=False)
    assert set(suspects.known) == {P}
    assert set(start(tmp_path).known) == {P}, "a successor knows"
    suspects.acquit({P: 5}, found=True)
    assert start(tmp_path).known == {}


def test_an_exception_that_is_nobodys_counts_without_waiting_for_the_next_start(tmp_path):
    suspects = start(tmp_path)
    suspects.take({P: (0, 10)}, alone=False)
    suspects.blame()
    suspects.close()
    assert start(tmp_path).known[P].exits == 1


def test_the_note_survives_kill_9(tmp_path):
    code = f"""
import os, pathlib, signal
from streams.suspects import Suspects
suspects = Suspects(pathlib.Path({str(tmp_path)!r}))
suspects.open()
suspects.take({{"T:0": (7, 9)}}, alone=False)
os.kill(os.getpid(), signal.SIGKILL)
"""
    ended = subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[2], check=False, timeout=60)
    assert ended.returncode == -signal.SIGKILL
    suspicion = start(tmp_path).known[P]
    assert (suspicion.begin, suspicion.end, suspicion.exits) == (7, 9, 1)


@pytest.mark.parametrize("content", [b"", b"{", b'{"T:0": 1}'])
def test_notes_cut_by_a_full_disk_stop_nobody(tmp_path, content):
    (tmp_path / "suspects.json").write_bytes(content)
    (tmp_path / "in_hand").write_bytes(b"\x01\xff\x00\x00\x00rubbish")
    assert start(tmp_path).known == {}


# The folder of a slot.


async def test_a_second_process_of_a_slot_is_told_of_the_first(tmp_path):
    folder = slot.name_folder(tmp_path, "host-a", 0)
    async with slot.hold(folder):
        with pytest.raises(slot.SlotTaken) as taken:
            async with slot.hold(folder, patience=0):
                pytest.fail("two hold it")
        assert str(os.getpid()) in taken.value.detail
        assert taken.value.place == str(folder)
        async with slot.hold(slot.name_folder(tmp_path, "host-a", 1), patience=0):
            pass  # another slot is another folder
    async with slot.hold(folder, patience=0):
        pass


async def test_a_predecessor_that_is_just_ending_is_waited_for(tmp_path, monkeypatch):
    answers = [False, False, True]
    monkeypatch.setattr(slot, "_try_lock", lambda _handle: answers.pop(0))
    async with slot.hold(tmp_path / "a-0"):
        assert answers == []


async def test_a_stopped_holder_is_named_and_a_killed_one_holds_nothing(tmp_path):
    code = f"""
import asyncio, pathlib, sys, time
from streams import slot
async def main():
    async with slot.hold(pathlib.Path({str(tmp_path)!r})):
        print("held", flush=True)
        time.sleep(600)
asyncio.run(main())
"""
    holder = subprocess.Popen(  # noqa: ASYNC220 - it only has to be started
        [sys.executable, "-c", code], cwd=Path(__file__).parents[2], stdout=subprocess.PIPE
    )
    try:
        assert holder.stdout.readline() == b"held\n"
        holder.send_signal(signal.SIGSTOP)
        await asyncio.to_thread(os.waitid, os.P_PID, holder.pid, os.WSTOPPED)
        with pytest.raises(slot.SlotTaken, match=f"process {holder.pid}, which is stopped"):
            async with slot.hold(tmp_path, patience=0):
                pytest.fail("two hold it")
    finally:
        holder.kill()
        holder.wait()
        holder.stdout.close()
    async with slot.hold(tmp_path, patience=0):
        pass


def test_a_lock_that_fails_for_another_reason_is_no_second_process(monkeypatch):
    def fail(*_):
        raise OSError(5, "disk")

    monkeypatch.setattr(slot, "fcntl", SimpleNamespace(flock=fail, LOCK_EX=fcntl.LOCK_EX, LOCK_NB=fcntl.LOCK_NB))
    with pytest.raises(OSError, match="disk"):
        slot._try_lock(0)

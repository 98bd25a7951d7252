"""The parent that forks the processes which tests kill."""

import array
import fcntl
import json
import os
import signal
import termios
import time

import pytest

from tests.nursery import FAILED, Nursery

PROGRAM = """
import sys
import time

from tests.nursery import serve


def run(order):
    print(order["told"], file=sys.stderr)
    time.sleep(order["seconds"])
    if "raised" in order:
        raise SystemExit(order["raised"])
    return order["returned"]


serve(run)
"""


@pytest.fixture
def nursery(tmp_path, monkeypatch):
    (tmp_path / "nursery_under_test.py").write_text(PROGRAM, "utf-8")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    opened = Nursery("nursery_under_test", tmp_path)
    yield opened
    opened.close()


def build_order(folder, told="a child", seconds=0, **rest):
    return {"log": str(folder / "child.log"), "told": told, "seconds": seconds, **rest}


def is_there(pid):
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    return True


def count_unread(pipe):
    """Bytes in a pipe that its reader has not taken."""
    found = array.array("i", [0])
    fcntl.ioctl(pipe, termios.FIONREAD, found)
    return found[0]


def test_each_order_has_a_child_with_an_exit_code_and_a_log(nursery, tmp_path):
    codes = [{"returned": 3}, {"returned": 0}, {"raised": 4}, {"raised": None}, {}]
    children = []
    for number, code in enumerate(codes):
        child = nursery.fork(build_order(tmp_path, f"child {number}", **code))
        child.wait()
        children.append(child)
    assert [child.returncode for child in children] == [3, 0, 4, 0, FAILED]
    assert len({child.pid for child in children}) == len(codes)
    told = (tmp_path / "child.log").read_text("utf-8").splitlines()
    assert [line for line in told if line.startswith("child ")] == [f"child {number}" for number in range(len(codes))]
    assert told[-1] == "KeyError: 'returned'"


def test_a_child_runs_until_it_is_told_to_end(nursery, tmp_path):
    for end, number in (("terminate", signal.SIGTERM), ("kill", signal.SIGKILL)):
        child = nursery.fork(build_order(tmp_path, seconds=600))
        assert child.poll() is None
        getattr(child, end)()
        assert child.wait() == child.poll() == -number
        # Nobody is hit by what comes too late.
        child.kill()


def test_an_order_that_comes_while_a_child_runs_is_kept(nursery, tmp_path):
    first = nursery.fork(build_order(tmp_path, seconds=600))
    for told in ("second", "third"):
        nursery._process.stdin.write(json.dumps(build_order(tmp_path, told, returned=5)) + "\n")
    nursery._process.stdin.flush()
    while count_unread(nursery._process.stdin):
        time.sleep(0.01)
    first.kill()
    assert first.wait() == -signal.SIGKILL
    answers = [nursery._answers.get(timeout=20) for _ in range(4)]
    assert [answer[0] for answer in answers] == ["pid", "exit"] * 2
    assert [answers[1], answers[3]] == [["exit", 5]] * 2


def test_the_end_of_stdin_ends_parent_and_child(nursery, tmp_path):
    child = nursery.fork(build_order(tmp_path, seconds=600))
    nursery._process.stdin.close()
    assert nursery._process.wait(20) == 0
    assert not is_there(child.pid)
    nursery._listener.join()
    with pytest.raises(AssertionError, match="the nursery died"):
        child.wait()

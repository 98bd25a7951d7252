"""Parents of processes that are killed often: each imports everything once, then forks one child for each order.

``Nursery`` is the end of those who give orders, ``serve`` the parent. An order is a line of JSON on the parent's
stdin; ``log`` names the file for the child's output, the rest is the program's own. The parent answers, one a line:
``["pid", n]`` when the child runs, ``["exit", code]`` when it is over (a signal's number negative). One child at a
time. When stdin closes, as it does when the giver of orders is killed, parent and child end.
"""

from __future__ import annotations

import contextlib
import json
import os
import queue
import select
import signal
import subprocess
import sys
import threading
import traceback
from pathlib import Path

ROOT = Path(__file__).parents[1]
FAILED = 70
"""Exit code of a child that ended with an exception; its log has the traceback."""


class Child:
    """One process, with the part of ``subprocess.Popen`` that tests use."""

    def __init__(self, pid, answers):
        self.pid = pid
        self.returncode = None
        self._answers = answers

    def send_signal(self, number):
        if self.poll() is None:
            # It may be over, and the answer that says so under way.
            with contextlib.suppress(ProcessLookupError):
                os.kill(self.pid, number)

    def kill(self):
        self.send_signal(signal.SIGKILL)

    def terminate(self):
        self.send_signal(signal.SIGTERM)

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=60):
        if self.returncode is None:
            try:
                answer = self._answers.get(timeout=timeout) if timeout else self._answers.get_nowait()
            except queue.Empty:
                raise subprocess.TimeoutExpired("child", timeout) from None
            self.returncode = _read_answer(answer, "exit")
        return self.returncode


class Nursery:
    """The parent, from outside: ``module`` is run as a program and calls ``serve``; its own output goes to a log."""

    def __init__(self, module, folder):
        with (folder / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", module],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=ROOT,
                text=True,
            )
        self._answers = queue.Queue()
        self._listener = threading.Thread(target=self._listen, name="nursery", daemon=True)
        self._listener.start()

    def fork(self, order):
        """A new child; the one before is over."""
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        return Child(_read_answer(self._answers.get(timeout=60), "pid"), self._answers)

    def close(self):
        """End it, and its child when one runs."""
        self._process.stdin.close()
        self._process.wait(20)
        self._listener.join()
        self._process.stdout.close()

    def _listen(self):
        for line in self._process.stdout:
            self._answers.put(json.loads(line))
        self._answers.put(None)


def _read_answer(answer, kind):
    assert answer is not None, "the nursery died"
    assert answer[0] == kind, answer
    return answer[1]


def serve(run):
    """The parent: ``run(order)`` in a child for each order, until stdin closes. It returns the exit code, or raises."""
    orders = b""
    while True:
        while b"\n" not in orders:
            more = os.read(0, 65536)
            if not more:
                return
            orders += more
        line, _, orders = orders.partition(b"\n")
        order = json.loads(line)
        # Nobody writes: the child holds the other end, and the kernel closes it however the child ends.
        life, held = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(life)
            _run_child(run, order)
        os.close(held)
        status = None
        try:
            _say("pid", child)
            while life not in (ready := select.select([0, life], [], [])[0]):
                more = os.read(0, 65536) if ready else b""
                if not more:
                    return
                orders += more
            _, status = os.waitpid(child, 0)
        finally:
            os.close(life)
            if status is None:
                os.kill(child, signal.SIGKILL)
                os.waitpid(child, 0)
        _say("exit", os.waitstatus_to_exitcode(status))


def _run_child(run, order):
    code = FAILED
    try:
        log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        code = run(order) or 0
    except SystemExit as end:
        code = end.code or 0
    except BaseException:  # noqa: BLE001 - told in the child's log; the exit code says it to who gave the order
        traceback.print_exc()
    finally:
        os._exit(code)


def _say(*words):
    os.write(1, (json.dumps(words) + "\n").encode())

"""Parent of processes that are killed often: imports the command line once, then forks one for each line it is given.

A line is JSON: ``log`` (a file) and ``arguments`` of the command line. Answers, one a line: ``["pid", n]`` when it
runs, ``["exit", code]`` when it is over (a signal's number negative). Run as a program it is the parent; ``Nursery`` is
its other end.
"""

from __future__ import annotations

import json
import os
import queue
import subprocess
import sys
import threading

from runtime import cli
from runtime.roles import deliverer

FORKED = (cli, deliverer)
"""What a child need not import."""


class Child:
    """One process, with the part of ``subprocess.Popen`` that a slot uses."""

    def __init__(self, pid, answers):
        self.pid = pid
        self.returncode = None
        self._answers = answers

    def send_signal(self, number):
        if self.poll() is None:
            os.kill(self.pid, number)

    def kill(self):
        self.send_signal(9)

    def terminate(self):
        self.send_signal(15)

    def poll(self):
        try:
            return self.wait(0)
        except subprocess.TimeoutExpired:
            return None

    def wait(self, timeout=60):
        if self.returncode is None:
            try:
                _, self.returncode = self._answers.get(timeout=timeout) if timeout else self._answers.get_nowait()
            except queue.Empty:
                raise subprocess.TimeoutExpired("child", timeout) from None
        return self.returncode


class Nursery:
    """The parent, from outside. One child at a time."""

    def __init__(self, folder, root):
        self._folder = folder
        with (folder / "nursery.log").open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-m", "tests.faults.nursery"],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                cwd=root,
                text=True,
            )
        self._answers = queue.Queue()
        self._reader = threading.Thread(target=self._read, name="nursery", daemon=True)
        self._reader.start()

    def fork(self, name, *arguments):
        """A new process with these arguments of the command line; its output goes to ``<name>.log``."""
        order = {"log": str(self._folder / f"{name}.log"), "arguments": arguments}
        self._process.stdin.write(json.dumps(order) + "\n")
        self._process.stdin.flush()
        _, pid = self._answers.get(timeout=60)
        return Child(pid, self._answers)

    def close(self):
        """End it; its child is over already."""
        self._process.stdin.close()
        self._process.wait(15)
        self._reader.join()
        self._process.stdout.close()

    def _read(self):
        for line in self._process.stdout:
            self._answers.put(json.loads(line))


def run(order):
    """In the child: the command line, with its output in the log."""
    log = os.open(order["log"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(log, 1)
    os.dup2(log, 2)
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    cli.main(order["arguments"])


def say(*words):
    os.write(1, (json.dumps(words) + "\n").encode())


def main():
    for line in sys.stdin:
        order = json.loads(line)
        child = os.fork()
        if child == 0:
            code = 70
            try:
                run(order)
            except SystemExit as end:
                code = end.code or 0
            finally:
                os._exit(code)
        say("pid", child)
        _, status = os.waitpid(child, 0)
        say("exit", os.waitstatus_to_exitcode(status))


if __name__ == "__main__":
    main()

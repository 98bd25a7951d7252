"""The process manager with real processes: small Python programs that live, die, refuse and hang as told."""

import asyncio
import os
import signal
import socket
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import pytest

from runtime.processes import (
    Backoff,
    ProcessConfigurationError,
    ProcessManager,
    ProcessNotReadyError,
    ProcessSpec,
)
from schemas.failure import ExitCode

QUICK = Backoff(first=0.01, last=0.04, stable=30.0)
FOREVER = "import time\nwhile True: time.sleep(1)"


def make_spec(name, code, *args, **more):
    return ProcessSpec(name, [sys.executable, "-I", "-S", "-c", textwrap.dedent(code), *args], **more)


async def until(condition):
    """Wait for a condition; the timeout only turns a hang into a failure."""
    async with asyncio.timeout(30):
        while not condition():  # noqa: ASYNC110 - it looks at other processes, which set no event
            await asyncio.sleep(0.01)


def is_alive(pid):
    answer = subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True).stdout
    return bool(answer.strip()) and not answer.startswith("Z")


async def test_a_killed_process_comes_back_under_a_new_pid_and_is_counted(tmp_path):
    manager = ProcessManager([make_spec("a", FOREVER), make_spec("b", FOREVER)], tmp_path, backoff=QUICK)
    await manager.start()
    first, other = manager.pid("a"), manager.pid("b")
    os.kill(first, signal.SIGKILL)
    await until(lambda: manager.restarts("a") == 1 and manager.pid("a") not in {None, first})
    status = manager.status()
    assert status["a"].exit_code == -signal.SIGKILL
    assert (status["b"].pid, status["b"].restarts) == (other, 0)
    second = manager.pid("a")
    await manager.stop()
    assert [is_alive(pid) for pid in (first, second, other)] == [False, False, False]
    assert {s.state for s in manager.status().values()} == {"stopped"}


async def test_three_short_lives_in_a_row_are_reported_and_it_goes_on(tmp_path):
    seen = []
    manager = ProcessManager([make_spec("a", "raise SystemExit(3)")], tmp_path, backoff=QUICK, on_change=seen.append)
    await manager.start()
    await until(lambda: manager.restarts("a") >= 5)
    await manager.stop()
    flapping = {s.restarts: s.flapping for s in seen if s.state == "restarting"}
    assert [flapping[n] for n in (1, 2, 3, 4, 5)] == [False, False, True, True, True]


async def test_a_long_life_ends_the_flapping(tmp_path):
    code = """
    import pathlib, sys, time
    lives = pathlib.Path(sys.argv[1])
    lives.write_text((lives.read_text() if lives.exists() else "") + "x")
    if len(lives.read_text()) <= 3:
        raise SystemExit(1)
    while True: time.sleep(1)
    """
    seen = []
    manager = ProcessManager(
        [make_spec("a", code, str(tmp_path / "lives"))],
        tmp_path,
        # On a busy machine a life that ends at once still takes a second or two.
        backoff=Backoff(first=0.01, last=0.01, stable=3.0),
        on_change=seen.append,
    )
    await manager.start()
    await until(lambda: any(s.flapping for s in seen))
    await until(lambda: not manager.status()["a"].flapping)
    assert manager.pid("a") is not None
    assert manager.restarts("a") == 3
    await manager.stop()


def test_waits_double_up_to_the_longest_and_never_overflow():
    backoff = Backoff()
    waits = [backoff.choose_wait(n) for n in range(8)]
    assert waits == [0.2, 0.2, 0.4, 0.8, 1.6, 3.2, 5.0, 5.0]
    assert backoff.choose_wait(100_000) == 5.0


def test_many_that_end_together_do_not_start_in_step():
    backoff = Backoff()
    drawn = {backoff.draw_wait(5) for _ in range(200)}
    assert len(drawn) > 100
    assert 1.6 <= min(drawn) < max(drawn) <= 3.2


async def test_exit_zero_is_the_end_of_a_job(tmp_path):
    manager = ProcessManager([make_spec("job", "pass")], tmp_path, backoff=QUICK)
    await manager.start()
    async with asyncio.timeout(30):
        await manager.wait()
    assert manager.status()["job"].state == "finished"
    assert manager.restarts("job") == 0


async def test_what_has_no_end_is_started_again_after_exit_zero_too(tmp_path):
    manager = ProcessManager([make_spec("a", "pass", endless=True)], tmp_path, backoff=QUICK)
    await manager.start()
    await until(lambda: manager.restarts("a") >= 2)
    await manager.stop()
    assert manager.status()["a"].state == "stopped"


async def test_without_a_folder_for_logs_processes_write_where_the_manager_writes(capfd):
    code = "import sys\nprint('out', flush=True)\nprint('err', file=sys.stderr)\nraise SystemExit(78)"
    manager = ProcessManager([make_spec("a", code)], None, backoff=QUICK)
    await manager.start(wait=False)
    with pytest.raises(ProcessConfigurationError) as caught:
        async with asyncio.timeout(30):
            await manager.wait()
    assert caught.value.place == "a"
    told = capfd.readouterr()
    assert (told.out, told.err) == ("out\n", "err\n")


async def test_peers_are_told_to_stop_at_once(tmp_path):
    """Each leaves only when it has seen that the other was told, too."""
    note = """
    import pathlib, signal, sys, time
    own, other = map(pathlib.Path, sys.argv[1:])
    def leave(*_):
        own.with_suffix(".told").touch()
        while not other.with_suffix(".told").exists(): time.sleep(0.01)
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, leave)
    own.touch()
    while True: time.sleep(0.05)
    """
    a, b = tmp_path / "a", tmp_path / "b"
    specs = [
        make_spec("a", note, str(a), str(b), ready=a.exists, stop_timeout=30),
        make_spec("b", note, str(b), str(a), ready=b.exists, stop_timeout=30),
    ]
    manager = ProcessManager(specs, tmp_path / "logs")
    await manager.start()
    async with asyncio.timeout(25):
        await manager.stop_together()
    assert {status.state for status in manager.status().values()} == {"stopped"}


async def test_a_refused_configuration_stops_all_with_its_own_message(tmp_path):
    refuse = """
    import pathlib, sys, time
    while not pathlib.Path(sys.argv[1]).exists(): time.sleep(0.01)
    print("starting up")
    print("RS100 at kafka.bootstrap: it is empty. Remedy: name a broker.")
    print("bye")
    raise SystemExit(78)
    """
    trigger = tmp_path / "now"
    manager = ProcessManager(
        [make_spec("good", FOREVER), make_spec("bad", refuse, str(trigger))], tmp_path / "logs", backoff=QUICK
    )
    await manager.start()
    good = manager.pid("good")
    trigger.touch()
    with pytest.raises(ProcessConfigurationError, match=r"bad refused .*RS100 at kafka\.bootstrap") as caught:
        async with asyncio.timeout(30):
            await manager.wait()
    assert caught.value.exit_code == ExitCode.CONFIGURATION
    assert caught.value.place == str(tmp_path / "logs" / "bad.log")
    assert manager.restarts("bad") == 0
    assert not is_alive(good)


async def test_a_configuration_refused_at_the_start_fails_the_start(tmp_path):
    manager = ProcessManager(
        [make_spec("good", FOREVER), make_spec("bad", "raise SystemExit(78)", ready=lambda: False)], tmp_path
    )
    with pytest.raises(ProcessConfigurationError):
        await manager.start()
    assert manager.status()["good"].state == "stopped"
    assert manager.pid("good") is None


async def test_start_waits_for_the_health_address(tmp_path):
    server = """
    import http.server, sys
    class Health(http.server.BaseHTTPRequestHandler):
        def do_GET(self):
            with open(sys.argv[2], "a") as asked: asked.write(self.path + "\\n")
            ready = len(open(sys.argv[2]).readlines()) > 2
            self.send_response(200 if ready and self.path == "/ready" else 503)
            self.end_headers()
        def log_message(self, *args): pass
    http.server.HTTPServer(("127.0.0.1", int(sys.argv[1])), Health).serve_forever()
    """
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    asked = tmp_path / "asked"
    seen = []
    spec = make_spec("web", server, str(port), str(asked), ready=f"http://127.0.0.1:{port}/ready")
    manager = ProcessManager([spec], tmp_path, on_change=seen.append)
    await manager.start()
    assert [s.state for s in seen] == ["starting", "ready"]
    assert len(asked.read_text().splitlines()) == 3, "503 is not ready"
    await manager.stop()


async def test_one_that_never_becomes_ready_is_told_with_its_last_words(tmp_path):
    code = "import time\nprint('no broker', flush=True)\nwhile True: time.sleep(1)"
    manager = ProcessManager([make_spec("a", code, ready=lambda: False, ready_timeout=1.0)], tmp_path)
    with pytest.raises(ProcessNotReadyError, match="no broker") as caught:
        await manager.start()
    assert caught.value.exit_code == ExitCode.RETRY
    assert manager.status()["a"].state == "stopped"


async def test_one_that_is_slow_but_has_not_ended_is_given_more_time(tmp_path):
    """On a busy machine a start takes long; one that ended and started again has shown that it is not only slow."""
    code = "import time\nprint('working', flush=True)\nwhile True: time.sleep(1)"
    begun = time.monotonic()
    slow = make_spec("slow", code, ready=lambda: time.monotonic() > begun + 1.2, ready_timeout=1.0)
    manager = ProcessManager([slow], tmp_path)
    await manager.start()
    assert manager.status()["slow"].state == "ready"
    await manager.stop()
    ends = ProcessSpec(name="ends", argv=["sh", "-c", "exit 1"], ready=lambda: False, ready_timeout=1.0)
    with pytest.raises(ProcessNotReadyError, match="not ready after 1 s"):
        await ProcessManager([ends], tmp_path).start()


async def test_stop_goes_backwards_and_kills_what_does_not_listen(tmp_path):
    note = """
    import signal, sys, time
    def leave(*_):
        with open(sys.argv[1], "a") as f: f.write(sys.argv[2])
        raise SystemExit(0)
    signal.signal(signal.SIGTERM, leave)
    open(sys.argv[1] + sys.argv[2], "w").close()
    while True: time.sleep(0.05)
    """
    deaf = """
    import signal, sys, time
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    open(sys.argv[1] + "deaf", "w").close()
    while True: time.sleep(1)
    """
    order = str(tmp_path / "order")
    specs = [
        make_spec("a", note, order, "a", ready=Path(order + "a").exists),
        make_spec("deaf", deaf, order, ready=Path(order + "deaf").exists, stop_timeout=0.2),
        make_spec("b", note, order, "b", ready=Path(order + "b").exists),
    ]
    manager = ProcessManager(specs, tmp_path / "logs")
    await manager.start()
    pids = [manager.pid(name) for name in ("a", "deaf", "b")]
    await manager.stop()
    assert (tmp_path / "order").read_text() == "ba"
    assert not any(is_alive(pid) for pid in pids)


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's parent-death signal is Linux only")
async def test_children_die_with_a_killed_manager(tmp_path):
    code = f"""
    import asyncio, pathlib, sys
    from runtime.processes import ProcessManager, ProcessSpec

    async def main():
        manager = ProcessManager(
            [ProcessSpec("a", [sys.executable, "-S", "-c", {FOREVER!r}])], pathlib.Path({str(tmp_path)!r}))
        await manager.start()
        print(manager.pid("a"), flush=True)
        await manager.wait()

    asyncio.run(main())
    """
    parent = subprocess.Popen(  # noqa: ASYNC220 - it only has to be started
        [sys.executable, "-c", textwrap.dedent(code)],
        stdout=subprocess.PIPE,
        cwd=Path(__file__).parents[2],
    )
    child = int(parent.stdout.readline())
    # the wrapper has become the program only when the kernel knows what to do
    await until(lambda: b"ctypes" not in Path(f"/proc/{child}/cmdline").read_bytes())
    assert is_alive(child)
    parent.kill()
    parent.wait()
    parent.stdout.close()
    await until(lambda: not is_alive(child))


def test_two_processes_of_one_name_are_refused(tmp_path):
    with pytest.raises(ValueError, match="must differ"):
        ProcessManager([make_spec("a", FOREVER), make_spec("a", FOREVER)], tmp_path)

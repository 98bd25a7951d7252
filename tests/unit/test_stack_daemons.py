"""Background processes, ports and platform checks of the embedded stack, without its parts."""

import json
import os
import platform
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from runtime.stack import EmbeddedStack, daemons
from runtime.stack.components import Kafka, Redis, check_platform, explain_redis_failure
from runtime.stack.daemons import Daemon, read_resident_bytes, read_start_time
from runtime.stack.embedded import Cache
from runtime.stack.errors import MissingLibraryError, PortTakenError, UnsupportedPlatformError
from schemas.failure import ExitCode

FOREVER = "import time\nprint('up', flush=True)\nwhile True: time.sleep(1)"
DEAF = "import signal\nsignal.signal(signal.SIGTERM, signal.SIG_IGN)\n" + FOREVER


def read_state(pid):
    return subprocess.run(["ps", "-o", "stat=", "-p", str(pid)], check=False, capture_output=True, text=True).stdout


def is_alive(pid):
    state = read_state(pid)
    return bool(state.strip()) and not state.startswith("Z")


@pytest.fixture(params=["proc", "ps"])
def daemon(request, tmp_path, monkeypatch):
    """Once by way of /proc, as on Linux, and once by way of ps, as on macOS."""
    if request.param == "ps":
        monkeypatch.setattr(daemons, "_ON_LINUX", False)
    elif sys.platform != "linux":
        pytest.skip("no /proc")
    daemon = Daemon(tmp_path / "x.pid")
    yield daemon
    daemon.kill()


def spawn(daemon, tmp_path, code=FOREVER):
    log = tmp_path / "x.log"
    log.touch()
    identity = daemon.spawn(
        [sys.executable, "-I", "-S", "-c", code], cwd=tmp_path, env={"MARK": "1"}, log=log, fingerprint="f"
    )
    deadline = time.monotonic() + 30
    while "up" not in log.read_text():
        assert time.monotonic() < deadline, "the process did not come up"
        time.sleep(0.01)
    return identity


def test_a_daemon_is_found_again_by_another_object_and_stopped(daemon, tmp_path):
    identity = spawn(daemon, tmp_path)
    again = Daemon(tmp_path / "x.pid")
    assert again.find() == identity
    assert is_alive(identity.pid)
    assert read_resident_bytes(identity.pid) > 1_000_000
    assert again.stop(20) is True
    assert not is_alive(identity.pid)
    assert again.find() is None
    assert not (tmp_path / "x.pid").exists()


def test_a_daemon_has_its_own_session_and_survives_its_starter(daemon, tmp_path):
    identity = spawn(daemon, tmp_path)
    assert os.getsid(identity.pid) != os.getsid(0)
    parent = subprocess.run(
        ["ps", "-o", "ppid=", "-p", str(identity.pid)], check=True, capture_output=True, text=True
    ).stdout
    assert int(parent) != os.getpid()


def test_one_that_does_not_listen_is_killed_after_the_deadline(daemon, tmp_path):
    identity = spawn(daemon, tmp_path, DEAF)
    assert daemon.stop(0.1) is False
    assert not is_alive(identity.pid)


def test_a_reused_pid_is_never_signalled(daemon, tmp_path):
    """The pid file speaks of a process of the same number that was started at another time."""
    other = subprocess.Popen([sys.executable, "-c", FOREVER], stdout=subprocess.DEVNULL)
    try:
        (tmp_path / "x.pid").write_text(json.dumps({"pid": other.pid, "started": "long ago", "fingerprint": "f"}))
        assert daemon.find() is None
        assert daemon.stop(0.1) is True
        daemon.kill()
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_damaged_pid_file_counts_as_none(daemon, tmp_path):
    (tmp_path / "x.pid").write_text("{")
    assert daemon.find() is None
    assert not (tmp_path / "x.pid").exists()


def test_a_start_time_does_not_depend_on_the_callers_clock_settings(daemon, tmp_path, monkeypatch):
    identity = spawn(daemon, tmp_path)
    monkeypatch.setenv("TZ", "Asia/Tokyo")
    monkeypatch.setenv("LC_ALL", "de_DE.UTF-8")
    assert daemon.find() == identity


def test_a_zombie_counts_as_gone(daemon):
    del daemon  # only for its two ways of asking
    child = subprocess.Popen([sys.executable, "-c", FOREVER], stdout=subprocess.DEVNULL)
    assert read_start_time(child.pid) is not None
    child.kill()
    deadline = time.monotonic() + 30
    while not read_state(child.pid).startswith("Z"):
        assert time.monotonic() < deadline
        time.sleep(0.01)
    assert read_start_time(child.pid) is None
    child.wait()
    assert child.returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("system", "machine", "supported"),
    [
        ("linux", "x86_64", True),
        ("darwin", "arm64", True),
        ("darwin", "x86_64", True),
        ("linux", "aarch64", False),
        ("win32", "AMD64", False),
        ("freebsd14", "amd64", False),
    ],
)
def test_other_machines_are_refused_in_one_sentence(monkeypatch, system, machine, supported):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: machine)
    if supported:
        check_platform()
    else:
        with pytest.raises(UnsupportedPlatformError, match=r"Linux x86-64 and macOS") as caught:
            check_platform()
        assert caught.value.exit_code == ExitCode.CONFIGURATION


@pytest.mark.parametrize(
    ("stderr", "remedy"),
    [
        (
            "redis-server: error while loading shared libraries: libssl.so.3: cannot open shared object file",
            "libssl3",
        ),
        ("dyld[1]: Library not loaded: /opt/homebrew/opt/openssl@3/lib/libssl.3.dylib", "openssl@3"),
        ("redis-server: /lib/libc.so.6: version `GLIBC_2.34' not found", "glibc 2.34"),
    ],
)
def test_a_missing_library_is_explained(stderr, remedy):
    error = explain_redis_failure(stderr, "redis-server")
    assert isinstance(error, MissingLibraryError)
    assert remedy in error.remedy
    assert stderr.splitlines()[0] in error.detail


def test_a_redis_that_cannot_be_loaded_is_found_before_the_start(tmp_path):
    stack = EmbeddedStack(tmp_path / "home", tmp_path / "cache")
    redis = Redis(tmp_path / "home", Cache(tmp_path / "cache"), stack._parts["redis"])
    program = redis.locate_program()
    program.parent.mkdir(parents=True)
    program.write_text("#!/bin/sh\necho 'libssl.so.3: cannot open shared object file' >&2\nexit 127\n")
    program.chmod(0o755)
    with pytest.raises(MissingLibraryError, match=r"libssl\.so\.3"):
        redis.prepare({"redis": 1})


def listen(port=0):
    link = socket.socket()
    link.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    link.bind(("127.0.0.1", port))
    link.listen()
    return link


def make_stack(tmp_path, **more):
    (tmp_path / "home").mkdir(exist_ok=True)
    return EmbeddedStack(tmp_path / "home", tmp_path / "cache", **more)


def test_a_taken_port_is_replaced_and_the_new_one_is_remembered(tmp_path, monkeypatch):
    stack = make_stack(tmp_path)
    redis = stack._components["redis"]
    with listen() as taken:
        preferred = taken.getsockname()[1]
        monkeypatch.setattr(Redis, "ports", {"redis": preferred})
        chosen = stack._assign_ports(redis, keep=False)["redis"]
        assert chosen > preferred
    assert make_stack(tmp_path)._assign_ports(redis, keep=False) == {"redis": chosen}, "also when it is free again"


def test_the_port_of_another_stack_is_left_to_it_while_it_is_down(tmp_path, monkeypatch):
    """Its clients try to come back to that port: they must not find our broker there."""
    with listen() as free:
        preferred = free.getsockname()[1]
    monkeypatch.setattr(Redis, "ports", {"redis": preferred})

    def choose(name, **more):
        (tmp_path / name).mkdir(exist_ok=True)
        stack = EmbeddedStack(tmp_path / name, tmp_path / "cache", **more)
        return stack._assign_ports(stack._components["redis"], keep=False)["redis"]

    first, second, third = choose("first"), choose("second"), choose("third")
    assert first == preferred
    assert len({first, second, third}) == 3
    assert (choose("first"), choose("second"), choose("third")) == (first, second, third)
    assert choose("fourth", ports={"redis": first}) == first, "who pins a port decides"
    (tmp_path / "second" / "ports.json").unlink()
    assert choose("fifth") == second, "a stack that was removed holds nothing"


def test_a_port_that_must_stay_is_an_error_when_it_is_taken(tmp_path):
    with listen() as taken:
        port = taken.getsockname()[1]
        pinned = make_stack(tmp_path, ports={"redis": port})
        with pytest.raises(PortTakenError, match=str(port)):
            pinned._assign_ports(pinned._components["redis"], keep=False)
        stack = make_stack(tmp_path)
        (tmp_path / "home" / "ports.json").write_text(json.dumps({"redis": port}))
        with pytest.raises(PortTakenError, match=str(port)) as caught:
            stack._assign_ports(stack._components["redis"], keep=True)
        assert caught.value.exit_code == ExitCode.RETRY
    assert stack._assign_ports(stack._components["redis"], keep=True) == {"redis": port}


def test_the_roles_of_kafka_never_share_a_port(tmp_path, monkeypatch):
    stack = make_stack(tmp_path)
    with listen() as one, listen() as two:
        monkeypatch.setattr(Kafka, "ports", {"kafka": one.getsockname()[1], "controller": one.getsockname()[1]})
        ports = stack._assign_ports(stack._components["kafka"], keep=False)
        assert len({*ports.values(), one.getsockname()[1], two.getsockname()[1]}) == 4


@pytest.mark.parametrize("answer", [b"", b"HTTP/1.1 503 Service Unavailable\r\nContent-Length: 0\r\n\r\n"])
def test_another_program_on_the_port_is_not_taken_for_ours(tmp_path, answer):
    stack = make_stack(tmp_path)
    with listen() as stranger:

        def reply():
            for _ in stack._components:
                link, _ = stranger.accept()
                with link:
                    link.recv(100)
                    link.sendall(answer)

        thread = threading.Thread(target=reply)
        thread.start()
        port = stranger.getsockname()[1]
        assert [component.probe(port) for component in stack._components.values()] == [False, False, False]
        thread.join()


def test_a_port_nobody_listens_on_is_not_taken_for_ours(tmp_path):
    with listen() as gone:
        port = gone.getsockname()[1]
    assert [c.probe(port) for c in make_stack(tmp_path)._components.values()] == [False, False, False]


def test_nothing_is_made_by_asking(tmp_path):
    stack = EmbeddedStack(tmp_path / "home", tmp_path / "cache")
    assert {status.state for status in stack.status().values()} == {"stopped"}
    stack.down()
    stack.reset()
    assert stack.versions()["kafka"].startswith("4.")
    assert list(Path(tmp_path).iterdir()) == []


def test_an_unknown_component_is_named(tmp_path):
    with pytest.raises(ValueError, match="kafka, registry, redis"):
        make_stack(tmp_path).kill("zookeeper")

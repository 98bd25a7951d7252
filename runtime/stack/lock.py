"""Maintenance: resolve the stack's parts and write ``artifacts.lock``.

    python -m runtime.stack.lock

Versions are changed here, nowhere else. Every file is downloaded into a throw-away folder, checked against the sha1
its repository publishes, and written down with its own sha256. Run the integration tests before you commit the result.
"""

from __future__ import annotations

import hashlib
import json
import sys
import tarfile
import tempfile
import urllib.request
import zipfile
from pathlib import Path
from typing import TYPE_CHECKING

from jgo.constants import MAVEN_CENTRAL_URL
from jgo.maven import MavenContext

from runtime.stack.artifacts import LOCK_NAME, digest_file

if TYPE_CHECKING:
    from jgo.maven import Artifact

KAFKA_VERSION = "4.4.0"
REGISTRY_VERSION = "2.6.13.Final"
REDIS_VERSION = "1.4.4"
KAFKA_ROOTS = (f"org.apache.kafka:kafka_2.13:{KAFKA_VERSION}", "org.slf4j:slf4j-simple:2.0.20")
REGISTRY = ("io.apicurio", "apicurio-registry-app", REGISTRY_VERSION, "all", "tar.gz")
REDIS = ("com.github.codemonstur", "embedded-redis", REDIS_VERSION, "", "jar")
REGISTRY_MEMBERS = ("apicurio-registry-app-", "lib/")
REDIS_MEMBERS = ("redis-server-6.2.6-v5-linux-amd64", "redis-server-6.2.6-v5-darwin-")

Entry = dict[str, str | int]


def describe_artifact(artifact: Artifact) -> Entry:
    """Lock entry of one artifact, downloaded and checked against its published sha1."""
    local = Path(artifact.resolve())
    path = f"{artifact.component.path_prefix}/{artifact.filename}".replace("\\", "/")
    with urllib.request.urlopen(f"{MAVEN_CENTRAL_URL}/{path}.sha1", timeout=60) as answer:  # noqa: S310 - https, a constant
        published = answer.read().decode().split()[0]
    # sha1 is what the repository publishes for every file; it guards this one download, the lock itself is sha256
    seen = hashlib.sha1(local.read_bytes(), usedforsecurity=False).hexdigest()
    if seen != published:
        raise SystemExit(f"{path}: sha1 is {seen}, its repository says {published}; nothing was written.")
    classifier = f":{artifact.classifier}" if artifact.classifier else ""
    coordinate = f"{artifact.groupId}:{artifact.artifactId}:{artifact.packaging}{classifier}:{artifact.version}"
    return {"coordinate": coordinate, "path": path, "sha256": digest_file(local), "size": local.stat().st_size}


def measure_unpacked(archive: Path, members: tuple[str, ...]) -> int:
    """Bytes the chosen members take when unpacked."""
    if archive.name.endswith(".tar.gz"):
        with tarfile.open(archive, "r:gz") as tar:
            return sum(m.size for m in tar if m.isfile() and m.name.removeprefix("./").startswith(members))
    with zipfile.ZipFile(archive) as zipped:
        return sum(i.file_size for i in zipped.infolist() if i.filename.startswith(members))


def build_lock(cache: Path) -> dict[str, object]:
    """Resolve everything into ``cache``; content of the lock file."""
    context = MavenContext(repo_cache=cache)
    inputs, rest = context.resolver.resolve([context.create_dependency(root) for root in KAFKA_ROOTS])
    jars = sorted((describe_artifact(d.artifact) for d in inputs + rest), key=lambda entry: str(entry["path"]))
    parts: dict[str, object] = {
        "kafka": {"version": KAFKA_VERSION, "members": [], "unpacked_size": 0, "files": jars},
    }
    for name, (group, artifact_id, version, classifier, packaging), members in (
        ("registry", REGISTRY, REGISTRY_MEMBERS),
        ("redis", REDIS, REDIS_MEMBERS),
    ):
        artifact = context.project(group, artifact_id).at_version(version).artifact(classifier, packaging)
        entry = describe_artifact(artifact)
        size = measure_unpacked(Path(artifact.resolve()), members)
        if not size:
            raise SystemExit(f"{entry['path']}: holds none of {', '.join(members)}; nothing was written.")
        parts[name] = {"version": version, "members": list(members), "unpacked_size": size, "files": [entry]}
    return {"about": "Written by `python -m runtime.stack.lock`; do not edit.", "parts": parts}


def main() -> None:
    """Write the lock next to this file."""
    target = Path(__file__).with_name(LOCK_NAME)
    with tempfile.TemporaryDirectory(prefix="remitstream-lock-") as folder:
        lock = build_lock(Path(folder))
    target.write_text(json.dumps(lock, indent=1) + "\n", encoding="utf-8")
    sys.stdout.write(f"{target} written\n")


if __name__ == "__main__":
    main()

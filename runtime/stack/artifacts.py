"""The locked files of the stack, and the cache folder that holds them.

``artifacts.lock`` is the committed truth: coordinates, sha256 and size in bytes of every file. ``runtime.stack.lock``
writes it. A file in the cache counts only while its size and sha256 are those of the lock.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import tarfile
import tempfile
import zipfile
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

LOCK_NAME = "artifacts.lock"
PARTS = ("kafka", "registry", "redis")


@dataclass(frozen=True, slots=True)
class Artifact:
    """One file: Maven ``coordinate``, its ``path`` below a Maven root, ``sha256`` in hex, ``size`` in bytes."""

    coordinate: str
    path: str
    sha256: str
    size: int

    @property
    def name(self) -> str:
        """File name, for people."""
        return self.path.rpartition("/")[2]


@dataclass(frozen=True, slots=True)
class Part:
    """One component's files.

    ``members`` is empty for plain jars. Otherwise ``files`` is one archive of which the members beginning with one of
    these prefixes are unpacked; they take ``unpacked_size`` bytes.
    """

    name: str
    version: str
    files: tuple[Artifact, ...]
    members: tuple[str, ...] = ()
    unpacked_size: int = 0


def parse_lock(text: str) -> dict[str, Part]:
    """Parts by name from the text of a lock file."""
    raw: dict[str, Any] = json.loads(text)
    parts = {
        name: Part(
            name=name,
            version=part["version"],
            files=tuple(
                Artifact(coordinate=f["coordinate"], path=f["path"], sha256=f["sha256"], size=f["size"])
                for f in part["files"]
            ),
            members=tuple(part["members"]),
            unpacked_size=part["unpacked_size"],
        )
        for name, part in raw["parts"].items()
    }
    if tuple(parts) != PARTS:
        raise ValueError(f"{LOCK_NAME} must hold exactly {', '.join(PARTS)} in this order, not {', '.join(parts)}")
    return parts


def read_lock() -> dict[str, Part]:
    """Parts by name from the committed lock."""
    return parse_lock((files("runtime.stack") / LOCK_NAME).read_text(encoding="utf-8"))


def digest_file(path: Path) -> str:
    """Sha256 of a file, in hex."""
    with path.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


class Cache:
    """The folder of verified files. Several stacks and several processes may share it."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def locate(self, artifact: Artifact) -> Path:
        """Where the file is, or would be. The layout is Maven's, so that a copied repository can fill it."""
        return self.folder / "maven" / artifact.path

    def locate_unpacked(self, part: Part) -> Path:
        """Folder of the unpacked archive; it appears only when complete."""
        return self.folder / "unpacked" / f"{part.name}-{part.version}-{part.files[0].sha256[:12]}"

    def holds(self, artifact: Artifact) -> bool:
        """Whether the very bytes of the lock are there."""
        path = self.locate(artifact)
        try:
            return path.stat().st_size == artifact.size and digest_file(path) == artifact.sha256
        except FileNotFoundError:
            return False

    def list_missing(self, part: Part) -> list[Artifact]:
        """Files of the part that must be downloaded."""
        if part.members and self.locate_unpacked(part).is_dir():
            return []
        return [artifact for artifact in part.files if not self.holds(artifact)]

    def needs_unpacking(self, part: Part) -> bool:
        """Whether the part is an archive that is not unpacked yet."""
        return bool(part.members) and not self.locate_unpacked(part).is_dir()

    def unpack(self, part: Part) -> None:
        """Unpack a verified archive and drop it. A crash in between leaves nothing that counts as unpacked."""
        archive = self.locate(part.files[0])
        target = self.locate_unpacked(part)
        target.parent.mkdir(parents=True, exist_ok=True)
        scratch = Path(tempfile.mkdtemp(prefix=f".{part.name}-", dir=target.parent))
        try:
            if archive.name.endswith(".tar.gz"):
                _unpack_tar(archive, scratch, part.members)
            else:
                _unpack_zip(archive, scratch, part.members)
            scratch.chmod(0o755)
            scratch.rename(target)
        except BaseException:
            shutil.rmtree(scratch, ignore_errors=True)
            raise
        archive.unlink()


def _unpack_tar(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Plain files only: no links, no devices, nothing outside the folder."""
    with tarfile.open(archive, "r:gz") as tar:
        for member in tar:
            path = os.path.normpath(member.name)
            if not member.isfile() or not path.startswith(members) or path.startswith(("/", "..")):
                continue
            source = tar.extractfile(member)
            assert source is not None
            target = folder / path
            target.parent.mkdir(parents=True, exist_ok=True)
            with source, target.open("wb") as sink:
                shutil.copyfileobj(source, sink, 1 << 20)


def _unpack_zip(archive: Path, folder: Path, members: tuple[str, ...]) -> None:
    """Programs, so every file is made executable."""
    with zipfile.ZipFile(archive) as zipped:
        for name in zipped.namelist():
            if name.startswith(members):
                path = Path(zipped.extract(name, folder))
                path.chmod(0o755)

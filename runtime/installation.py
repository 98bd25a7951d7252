"""This installation: its version, and whether every package of ours is really ours."""

from __future__ import annotations

import importlib.util
from collections.abc import Iterable
from importlib import metadata
from pathlib import Path

from schemas.failure import ConfigurationError

PACKAGES = (
    "schemas",
    "topics",
    "telemetry",
    "clients",
    "identity",
    "sources",
    "streams",
    "sinks",
    "sandbox",
    "runtime",
)  # fmt: skip
"""Our import packages. Their names are plain words, so another distribution may bring one of the same name."""

ROOT = Path(__file__).resolve().parent.parent
"""The folder all our packages lie in."""


class ShadowedPackageError(ConfigurationError):
    """Another distribution's package stands where ours should be."""

    code = "RS104"
    meaning = "Another distribution brings a package of the same name as one of ours, and Python finds it first."
    default_remedy = "Install remitstream into a virtual environment of its own, and start it outside other projects."


def read_version() -> str:
    """Version of the installed distribution; of a bare source tree, the one in its ``pyproject.toml``."""
    try:
        return metadata.version("remitstream")
    except metadata.PackageNotFoundError:
        for line in (ROOT / "pyproject.toml").read_text().splitlines():
            if line.startswith("version = "):
                return line.split('"')[1]
        raise


def check_packages(packages: Iterable[str] = PACKAGES, root: Path = ROOT) -> None:
    """Raise ``ShadowedPackageError`` unless Python would import each package from ``root``."""
    for name in packages:
        spec = importlib.util.find_spec(name)
        places = [Path(place).resolve() for place in (spec.submodule_search_locations or ()) if spec] if spec else []
        if places != [root / name]:
            found = ", ".join(map(str, places)) or (str(spec.origin) if spec else "nowhere")
            raise ShadowedPackageError(f"package `{name}` is found in {found}, not in {root / name}.", place=name)

"""Gateways under test and where their parts are.

Ours, and those of a folder of one's own when the setting that names it is in the environment
(``REMITSTREAM_CONNECTORS__GATEWAYS``): their mappings lie beside them, their fixtures in ``fixtures/<name>/``.
"""

from __future__ import annotations

import json
import os
from pathlib import Path

from schemas.tenancy import Tenancy
from sources.catalog import discover
from streams.normalise import MAPPINGS, Normaliser

ROOT = Path(__file__).parents[2]
OWN = Path(os.environ["REMITSTREAM_CONNECTORS__GATEWAYS"]) if "REMITSTREAM_CONNECTORS__GATEWAYS" in os.environ else None
GATEWAYS = discover(OWN)
MAPPING_FILES = {path.stem: path for folder in (MAPPINGS, OWN) if folder for path in sorted(folder.glob("*.yaml"))}
"""Mapping of each source."""


def find_fixtures(name: str) -> Path:
    """Folder with the fixtures of a gateway."""
    if OWN is not None and (OWN / f"{name}.py").exists():
        return OWN / "fixtures" / name
    return ROOT / "tests" / "fixtures" / "gateways" / name


def read_tenancy(name: str) -> dict:
    """Tenancy of a gateway's fixtures, as it is written."""
    return json.loads((find_fixtures(name) / "normalise" / "tenancy.json").read_text("utf-8"))


def load_normaliser(name: str, *, overlays: bool = True) -> Normaliser:
    """The mapping of a source over its fixtures' tenancy. Paths of overlays begin in the project's folder."""
    tenancy = read_tenancy(name)
    for facility in tenancy["facilities"]:
        overlay = facility.pop("mapping_overlay", None)
        if overlay is not None and overlays:
            facility["mapping_overlay"] = str(ROOT / overlay)
    return Normaliser.load(name, Tenancy.model_validate(tenancy), MAPPING_FILES[name].parent)

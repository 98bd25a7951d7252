"""Which targets there are: every Python file in ``sinks/targets/``, and in the user's own folder when one is named.

Nothing is registered anywhere. A file that cannot be imported, or that declares no ``TARGET`` of its own name, stops
the start with its path and the cause; it is never skipped.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from schemas.connector_files import ConnectorFiles, HeadWrong
from schemas.failure import ConfigurationError
from sinks import targets
from sinks.contract import Target, TargetSettings

if TYPE_CHECKING:
    from pathlib import Path
    from types import ModuleType


class TargetBroken(ConfigurationError):
    """A target file cannot be used."""

    code = "RS170"
    meaning = "A target file cannot be imported, or does not declare what its name promises."
    default_remedy = "Correct the named file, or remove it from the folder of targets."


class TargetUnknown(ConfigurationError):
    """A connector is named that no target file provides."""

    code = "RS171"
    meaning = "The configuration names a target connector for which there is no file."
    default_remedy = "Use one of the named connectors, or add a target file."


def discover(extra: Path | None = None) -> dict[str, Target]:
    """All target connectors by name, sorted; ``extra`` is a folder with the user's own target files.

    Raises ``TargetBroken`` for the first file that cannot be used, and for a name that exists twice.
    """
    return _FILES.discover(extra)


def load(name: str, extra: Path | None = None) -> Target:
    """One target connector; only its own file is imported. Raises ``TargetUnknown`` or ``TargetBroken``."""
    return _FILES.load(name, extra)


def _read_head(module: ModuleType, name: str) -> Target:
    target = getattr(module, "TARGET", None)
    if not isinstance(target, Target):
        raise HeadWrong("it declares no TARGET (an instance of sinks.contract.Target).")
    if target.name != name:
        raise HeadWrong(f"its TARGET is named {target.name!r}, the file {name!r}.")
    if not issubclass(target.settings, TargetSettings):
        raise HeadWrong("its settings are no TargetSettings.")
    return target


_FILES = ConnectorFiles(
    package=targets,
    user_package="remitstream_user_targets",
    noun="target",
    read=_read_head,
    broken=TargetBroken,
    unknown=TargetUnknown,
)

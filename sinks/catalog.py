"""Which targets there are: every Python file in ``sinks/targets/``, and in the user's own folder when one is named.

Nothing is registered anywhere. A file that cannot be imported, or that declares no ``TARGET`` of its own name, stops
the start with its path and the cause; it is never skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.failure import ConfigurationError
from sinks import targets
from sinks.contract import Target, TargetSettings

if TYPE_CHECKING:
    from types import ModuleType

_FOLDER = Path(targets.__path__[0])
_USER_PACKAGE = "remitstream_user_targets"


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
    paths = _list_files(_FOLDER)
    if extra is not None:
        if not extra.is_dir():
            raise TargetBroken("the folder of targets does not exist.", place=str(extra))
        for name, path in _list_files(extra).items():
            if name in paths:
                raise TargetBroken(f"there is already a target {name!r}.", place=str(path))
            paths[name] = path
    return {name: _load_file(name, paths[name]) for name in sorted(paths)}


def load(name: str, extra: Path | None = None) -> Target:
    """One target connector; only its own file is imported. Raises ``TargetUnknown`` or ``TargetBroken``."""
    paths = _list_files(_FOLDER) | (_list_files(extra) if extra is not None else {})
    if name not in paths:
        raise TargetUnknown(
            f"there is no target {name!r}.",
            place=str(extra or _FOLDER),
            remedy=f"Known are: {', '.join(sorted(paths))}.",
        )
    return _load_file(name, paths[name])


def _list_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def _load_file(name: str, path: Path) -> Target:
    try:
        module = _import_file(name, path)
    except Exception as error:
        raise TargetBroken(f"import failed with {type(error).__name__}: {error}.", place=str(path)) from error
    target = getattr(module, "TARGET", None)
    if not isinstance(target, Target):
        raise TargetBroken("it declares no TARGET (an instance of sinks.contract.Target).", place=str(path))
    if target.name != name:
        raise TargetBroken(f"its TARGET is named {target.name!r}, the file {name!r}.", place=str(path))
    if not issubclass(target.settings, TargetSettings):
        raise TargetBroken("its settings are no TargetSettings.", place=str(path))
    return target


def _import_file(name: str, path: Path) -> ModuleType:
    if path.parent == _FOLDER:
        return importlib.import_module(f"{targets.__name__}.{name}")
    full_name = f"{_USER_PACKAGE}.{name}"
    spec = importlib.util.spec_from_file_location(full_name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no loader for this file")
    module = importlib.util.module_from_spec(spec)
    # Pydantic and dataclasses look a module up here while it is being executed.
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module

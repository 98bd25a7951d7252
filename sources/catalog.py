"""Which gateways there are: every Python file in ``sources/payments/``, and in the user's own folder when one is named.

Nothing is registered anywhere. A file that cannot be imported, or that declares no ``GATEWAY`` of its own name, stops
the start with its path and the cause; it is never skipped.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from pathlib import Path
from typing import TYPE_CHECKING

from schemas.failure import ConfigurationError
from sources import payments
from sources.contract import Gateway

if TYPE_CHECKING:
    from types import ModuleType

_FOLDER = Path(payments.__path__[0])
_USER_PACKAGE = "remitstream_user_gateways"


class ConnectorBroken(ConfigurationError):
    """A connector file cannot be used."""

    code = "RS165"
    meaning = "A connector file cannot be imported, or does not declare what its name promises."
    default_remedy = "Correct the named file, or remove it from the connector folder."


class ConnectorUnknown(ConfigurationError):
    """A gateway is named that no connector file provides."""

    code = "RS166"
    meaning = "The configuration names a gateway for which there is no connector file."
    default_remedy = "Use one of the named gateways, or add a connector file."


def discover(extra: Path | None = None) -> dict[str, Gateway]:
    """All gateways by name, sorted; ``extra`` is a folder with the user's own connector files.

    Raises ``ConnectorBroken`` for the first file that cannot be used, and for a name that exists twice.
    """
    paths = _list_files(_FOLDER)
    if extra is not None:
        if not extra.is_dir():
            raise ConnectorBroken("the connector folder does not exist.", place=str(extra))
        for name, path in _list_files(extra).items():
            if name in paths:
                raise ConnectorBroken(f"there is already a gateway {name!r}.", place=str(path))
            paths[name] = path
    return {name: _load_file(name, paths[name]) for name in sorted(paths)}


def load(name: str, extra: Path | None = None) -> Gateway:
    """One gateway; only its own file is imported. Raises ``ConnectorUnknown`` or ``ConnectorBroken``."""
    paths = _list_files(_FOLDER) | (_list_files(extra) if extra is not None else {})
    if name not in paths:
        raise ConnectorUnknown(
            f"there is no gateway {name!r}.",
            place=str(extra or _FOLDER),
            remedy=f"Known are: {', '.join(sorted(paths))}.",
        )
    return _load_file(name, paths[name])


def _list_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}


def _load_file(name: str, path: Path) -> Gateway:
    try:
        module = _import_file(name, path)
    except Exception as error:
        raise ConnectorBroken(f"import failed with {type(error).__name__}: {error}.", place=str(path)) from error
    gateway = getattr(module, "GATEWAY", None)
    if not isinstance(gateway, Gateway):
        raise ConnectorBroken("it declares no GATEWAY (an instance of sources.contract.Gateway).", place=str(path))
    if gateway.name != name:
        raise ConnectorBroken(f"its GATEWAY is named {gateway.name!r}, the file {name!r}.", place=str(path))
    return gateway


def _import_file(name: str, path: Path) -> ModuleType:
    if path.parent == _FOLDER:
        return importlib.import_module(f"{payments.__name__}.{name}")
    full_name = f"{_USER_PACKAGE}.{name}"
    spec = importlib.util.spec_from_file_location(full_name, path)
    if spec is None or spec.loader is None:
        raise ImportError("no loader for this file")
    module = importlib.util.module_from_spec(spec)
    # Dataclasses and msgspec look a module up here while it is being executed.
    sys.modules[full_name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[full_name]
        raise
    return module

"""Finds connectors: every Python file of a package of ours, and of the user's own folder when one is named.

Nothing is registered anywhere. A file that cannot be used stops the start with its path and the cause; it is never
skipped. The catalogs of gateways and of targets are two uses of this.
"""

from __future__ import annotations

import importlib
import importlib.util
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

if TYPE_CHECKING:
    from collections.abc import Callable
    from types import ModuleType

    from schemas.failure import ConfigurationError

_Head = TypeVar("_Head")


class HeadWrong(Exception):
    """A file is no connector: what it lacks, as a sentence."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ConnectorFiles(Generic[_Head]):
    """One kind of connector, and where its files are."""

    package: ModuleType
    """Ours."""
    user_package: str
    """Name under which the user's files are imported."""
    noun: str
    """What one is called: ``target``."""
    read: Callable[[ModuleType, str], _Head]
    """The head that a module declares under this name. Raises ``HeadWrong``."""
    broken: type[ConfigurationError]
    unknown: type[ConfigurationError]

    def discover(self, extra: Path | None = None) -> dict[str, _Head]:
        """All connectors by name, sorted; ``extra`` is the user's folder.

        Raises ``broken`` for the first file that cannot be used, and for a name that exists twice.
        """
        paths = self._list_paths(extra)
        return {name: self._load_file(name, paths[name]) for name in sorted(paths)}

    def load(self, name: str, extra: Path | None = None) -> _Head:
        """One connector; only its own file is imported. Raises ``unknown`` or ``broken``."""
        paths = self._list_paths(extra)
        if name not in paths:
            raise self.unknown(
                f"there is no {self.noun} {name!r}.",
                place=str(extra or self._folder),
                remedy=f"Known are: {', '.join(sorted(paths))}.",
            )
        return self._load_file(name, paths[name])

    @property
    def _folder(self) -> Path:
        return Path(self.package.__path__[0])

    def _list_paths(self, extra: Path | None) -> dict[str, Path]:
        paths = _list_files(self._folder)
        if extra is None:
            return paths
        if not extra.is_dir():
            raise self.broken(f"the folder of {self.noun}s does not exist.", place=str(extra))
        for name, path in _list_files(extra).items():
            if name in paths:
                raise self.broken(f"there is already a {self.noun} {name!r}.", place=str(path))
            paths[name] = path
        return paths

    def _load_file(self, name: str, path: Path) -> _Head:
        try:
            module = self._import_file(name, path)
        except Exception as error:
            raise self.broken(f"import failed with {type(error).__name__}: {error}.", place=str(path)) from error
        try:
            return self.read(module, name)
        except HeadWrong as error:
            raise self.broken(str(error), place=str(path)) from None

    def _import_file(self, name: str, path: Path) -> ModuleType:
        if path.parent == self._folder:
            return importlib.import_module(f"{self.package.__name__}.{name}")
        full_name = f"{self.user_package}.{name}"
        known = sys.modules.get(full_name)
        if known is not None and known.__file__ == str(path):
            # Once per process, as any module: its classes must be the same ones everywhere.
            return known
        spec = importlib.util.spec_from_file_location(full_name, path)
        if spec is None or spec.loader is None:
            raise ImportError("no loader for this file")
        module = importlib.util.module_from_spec(spec)
        # Pydantic, dataclasses and msgspec look a module up here while it is being executed.
        sys.modules[full_name] = module
        try:
            spec.loader.exec_module(module)
        except BaseException:
            del sys.modules[full_name]
            raise
        return module


def _list_files(folder: Path) -> dict[str, Path]:
    return {path.stem: path for path in sorted(folder.glob("*.py")) if path.stem != "__init__"}

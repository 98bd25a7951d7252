"""``config check``, ``config show`` and ``init``."""

from __future__ import annotations

from collections.abc import Iterator
from importlib import resources
from pathlib import Path
from typing import Any

from pydantic import BaseModel, SecretStr

from runtime.configuration import Key, show_path
from runtime.layers import name_element
from runtime.settings import Settings
from schemas.failure import ConfigurationError

HIDDEN = "(hidden)"


class FileExistsAlreadyError(ConfigurationError):
    """``init`` will not write over a file."""

    code = "RS105"
    meaning = "`remitstream init` found a file where it would write one; nothing was changed."
    default_remedy = "Choose another path with `remitstream init PATH`, or move the file away."


def summarise(settings: Settings) -> dict[str, Any]:
    """What a correct configuration holds, for ``config check``."""
    return {
        "valid": True,
        "file": show_path(settings.file) if settings.file is not None else None,
        "embedded": settings.embedded,
        "tenant": settings.tenant,
        "facilities": [facility.id for facility in settings.facilities],
        "accounts": [account.name for account in settings.accounts],
        "feeds": [feed.name for feed in settings.feeds],
        "targets": [target.name for target in settings.targets],
        "issues": [],
    }


def list_settings(settings: Settings) -> dict[str, dict[str, Any]]:
    """Every effective setting by dotted key: value, origin and place. A secret shows as its reference."""
    return dict(_walk(settings, settings, (), ""))


def _walk(settings: Settings, node: BaseModel, key: Key, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    for field in type(node).model_fields:
        value = getattr(node, field)
        yield from _walk_value(settings, value, (*key, field), f"{name}.{field}" if name else field)


def _walk_value(settings: Settings, value: Any, key: Key, name: str) -> Iterator[tuple[str, dict[str, Any]]]:
    if isinstance(value, BaseModel):
        yield from _walk(settings, value, key, name)
    elif isinstance(value, tuple) and any(isinstance(element, (BaseModel, SecretStr)) for element in value):
        for position, element in enumerate(value):
            plain = element.model_dump(include={"name", "id"}) if isinstance(element, BaseModel) else None
            spelt = name_element(plain) or str(position)
            yield from _walk_value(settings, element, (*key, position), f"{name}.{spelt}")
    else:
        yield name, _describe(settings, value, key)


def _describe(settings: Settings, value: Any, key: Key) -> dict[str, Any]:
    origin = settings.find_origin(key)
    if isinstance(value, SecretStr):
        value = f"{settings.find_reference(key)} {HIDDEN}"
    return {
        "value": str(value) if isinstance(value, Path) else value,
        "origin": origin.rank.name.lower() if origin is not None else "default",
        "place": origin.place if origin is not None else "",
    }


def render_settings(entries: dict[str, dict[str, Any]]) -> str:
    """``config show`` as text: ``key = value``, and where it comes from."""
    lines = []
    for name, entry in entries.items():
        value = entry["value"]
        shown = "-" if value is None else ", ".join(map(str, value)) or "-" if isinstance(value, tuple) else str(value)
        place = f" {entry['place']}" if entry["place"] else ""
        lines.append(f"{name} = {shown}   [{entry['origin']}{':' if place else ''}{place}]")
    return "\n".join(lines)


def write_template(path: Path) -> Path:
    """Write the commented configuration. Raises ``FileExistsAlreadyError``; never writes over anything."""
    text = resources.files("runtime.commands").joinpath("template.toml").read_text()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("x") as file:
            file.write(text)
    except FileExistsError:
        raise FileExistsAlreadyError("it exists already.", place=show_path(path)) from None
    except OSError as error:
        raise ConfigurationError(
            f"it cannot be written ({error.strerror}).",
            place=show_path(path),
            remedy="Choose a folder you may write to.",
        ) from None
    return path

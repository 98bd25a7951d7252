"""The reference of all settings, ``docs/configuration.md``, rendered from their models."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from enum import Enum
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, Literal, Union, get_args, get_origin

from annotated_types import Ge, Gt, Le, Lt, MaxLen, MinLen
from pydantic import BaseModel, SecretStr
from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from runtime.connectors import list_targets
from runtime.layers import PREFIX
from runtime.markdown import NOTICE, join_parts, write_table
from runtime.settings import Settings
from runtime.validation import read_shape
from sinks.contract import TargetSettings

INTRODUCTION = """\
# Configuration

One file, `remitstream.toml`. `remitstream init` writes it with comments, `remitstream config check` names every
mistake at once, `remitstream config show` tells where each value comes from.

## Where a value comes from

| Precedence | Spelling | Example |
| --- | --- | --- |
| 1. Flag | `--set KEY=VALUE` on every command | `--set kafka.bootstrap=broker:9092` |
| 2. Environment variable | `REMITSTREAM_`, section, `__`, setting | `REMITSTREAM_KAFKA__BOOTSTRAP=broker:9092` |
| 3. File | `remitstream.toml` | `[kafka]` and below it `bootstrap = "broker:9092"` |
| 4. Default | the tables below | |

- The file is `--config FILE`, else `$REMITSTREAM_CONFIG`, else `remitstream.toml` in the working directory. Without a
  file, everything may come from variables and flags.
- An element of a list goes by its name, in variables in upper case and with `_` for `-`:
  `--set targets.epic-north.port=2575`, `REMITSTREAM_TARGETS__EPIC_NORTH__PORT=2575`. The tables say `NAME` there.
  Lists are JSON: `REMITSTREAM_TARGETS__EPIC_NORTH__FACILITIES=["north"]`. New elements are added in the file, or by
  giving the whole list as JSON (`REMITSTREAM_TARGETS=[...]`).
- `--embedded` and `--no-embedded` stand for `--set stack.embedded=true` and `=false`.
- An empty variable counts as not set.
- Relative paths begin in the folder of the file they are written in; those of variables and flags in the working
  directory.

## Secrets

A secret is never written in the configuration, only where it is: `env:NAME` or `file:/path`. A literal is refused, and
not repeated in the error. In the embedded mode, `remitstream run` and `remitstream stack up` create missing `file:`
secrets with random content and mode 0600.\
"""


def render_configuration() -> str:
    """The reference of all settings, from the models."""
    sections: list[str] = []
    plain: list[tuple[str, str, str, str, str]] = []
    for name, field in Settings.model_fields.items():
        kind, shape = read_shape(field.annotation)
        if kind == "model":
            sections += [f"## `[{name}]`", _read_purpose(shape), *_render_model(shape, name)]
        elif kind == "list":
            sections += _render_list(name, field, shape)
        else:
            plain.append(_describe_setting(name, name, field))
    top = ["## Top of the file", write_table(_HEAD, plain)]
    return join_parts([NOTICE, INTRODUCTION, *top, *sections])


_HEAD = ("Setting", "Type", "Default", "Variable", "Meaning")


def _render_model(
    model: type[BaseModel], name: str, *, prefix: str | None = None, known: type[BaseModel] = BaseModel
) -> list[str]:
    """Table of a section without the members of ``known``, then its tables inside."""
    variable = prefix or name.upper()
    rows: list[tuple[str, ...]] = []
    below: list[str] = []
    for member, field in model.model_fields.items():
        if member in known.model_fields:
            continue
        kind, shape = read_shape(field.annotation)
        if kind == "model":
            below += [f"### `[{name}.{member}]`", field.description or _read_purpose(shape)]
            below += _render_model(shape, f"{name}.{member}", prefix=f"{variable}__{member.upper()}")
        elif kind == "list" and read_shape(shape)[0] == "model":
            below += [f"### `{name}.{member}`", field.description or _read_purpose(shape)]
            below += _render_model(shape, f"{name}.{member}", prefix=f"{variable}__{member.upper()}__NAME")
        else:
            rows.append(_describe_setting(member, f"{variable}__{member}", field))
    return [write_table(_HEAD, rows), *below]


def _render_list(name: str, field: FieldInfo, shape: Any) -> list[str]:
    parts = [f"## `[[{name}]]`", field.description or ""]
    if read_shape(shape)[1] is not TargetSettings:
        return [*parts, *_render_model(shape, name, prefix=f"{name.upper()}__NAME")]
    parts += _render_model(TargetSettings, name, prefix=f"{name.upper()}__NAME")
    for target in list_targets().values():
        parts += [f'### `[[{name}]]` with `connector = "{target.name}"`', f"{target.display_name}."]
        parts += _render_model(target.settings, name, prefix=f"{name.upper()}__NAME", known=TargetSettings)
    return parts


def _read_purpose(model: type[BaseModel]) -> str:
    return (model.__doc__ or "").strip().splitlines()[0].replace("``", "`")


def _describe_setting(name: str, variable: str, field: FieldInfo) -> tuple[str, str, str, str, str]:
    return (
        f"`{name}`",
        _describe_type(field.annotation, field.metadata),
        _describe_default(field),
        f"`{PREFIX}{variable.upper()}`",
        field.description or "",
    )


def _describe_type(annotation: Any, metadata: Iterable[Any] = ()) -> str:
    origin: Any = get_origin(annotation)
    inner = get_args(annotation)
    if origin is Annotated:
        return _describe_type(inner[0], annotation.__metadata__)
    if origin in (Union, UnionType):
        return " or ".join(_describe_type(part, metadata) for part in inner if part is not type(None))
    if origin is Literal:
        return ", ".join(f"`{choice.value if isinstance(choice, Enum) else choice}`" for choice in inner)
    if origin is dict:
        return f"table of {_describe_type(inner[1])} by {_describe_type(inner[0])}"
    if origin is tuple:
        return f"list of {_describe_type(inner[0])}{_describe_bounds(metadata)}"
    names = {str: "text", int: "integer", float: "number", bool: "true or false", Path: "path", SecretStr: "secret"}
    if isinstance(annotation, type) and issubclass(annotation, Enum):
        return ", ".join(f"`{choice.value}`" for choice in annotation)
    if any(str(getattr(part, "pattern", "")).startswith("^[a-z0-9][a-z0-9_-]") for part in _flatten(metadata)):
        return "name"
    return names.get(annotation, str(getattr(annotation, "__name__", annotation))) + _describe_bounds(metadata)


def _flatten(metadata: Iterable[Any]) -> Iterator[Any]:
    for part in metadata:
        yield part
        yield from part.metadata if isinstance(part, FieldInfo) else ()


def _describe_bounds(metadata: Iterable[Any]) -> str:
    words = []
    for part in _flatten(metadata):
        match part:
            case Ge(ge=value):
                words.append(f"at least {value}")
            case Gt(gt=value):
                words.append(f"more than {value}")
            case Le(le=value):
                words.append(f"at most {value}")
            case Lt(lt=value):
                words.append(f"less than {value}")
            case MinLen(min_length=value):
                words.append(f"at least {value}")
            case MaxLen(max_length=value):
                words.append(f"at most {value}")
            case _:
                continue
    return f", {', '.join(words)}" if words else ""


def _describe_default(field: FieldInfo) -> str:
    if field.default is PydanticUndefined and field.default_factory is None:
        return "required"
    value = field.get_default(call_default_factory=True, validated_data={})
    if value is None or value in ((), "", {}):
        return ""
    if isinstance(value, tuple):
        return ", ".join(f"`{element}`" for element in value)
    if isinstance(value, Enum):
        value = value.value
    return f"`{str(value).lower() if isinstance(value, bool) else value}`"

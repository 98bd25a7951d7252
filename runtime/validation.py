"""Settings tree against its models: secrets resolved, relative paths made absolute, every mistake named at once.

Values are echoed only where the model says the field is plain and known; what stands under an unknown key could be a
misspelt password, and is not shown.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, TypeAlias, Union, get_args, get_origin

from pydantic import BaseModel, SecretStr, TypeAdapter, ValidationError

from runtime.configuration import Issue, Key
from runtime.layers import Merged, suggest
from schemas.tenancy import Name

Shape: TypeAlias = Any
"""The annotation of a field: a model class, a tuple of something, SecretStr, Path or a plain type."""

Chooser: TypeAlias = Callable[[Any], type[BaseModel]]
"""Concrete model of one element of ``targets``, from its tree."""

_WRAPPERS = (Annotated, Union, UnionType)

PLACEHOLDER = SecretStr("unresolved " * 8)
"""Stands for a secret that could not be resolved, so that the rest of the tree is still checked."""

NAME_RULE = "lower-case letters, digits, dash and underscore, at most 63 characters, beginning with a letter or digit"


def read_shape(annotation: Shape) -> tuple[str, Shape]:
    """What an annotation is: ``model``, ``list`` (with its element), ``secret``, ``path`` or ``plain``."""
    origin: Any = get_origin(annotation)
    inner = get_args(annotation)
    if origin in _WRAPPERS:
        parts = inner[:1] if origin is Annotated else [part for part in inner if part is not type(None)]
        shapes = [read_shape(part) for part in parts]
        return next((shape for shape in shapes if shape[0] != "plain"), ("plain", annotation))
    if origin is tuple:
        return "list", inner[0]
    kinds = {BaseModel: "model", SecretStr: "secret", Path: "path"} if isinstance(annotation, type) else {}
    return next((kind for parent, kind in kinds.items() if issubclass(annotation, parent)), "plain"), annotation


def find_shape(model: type[BaseModel], tree: Any, key: Key, choose: Chooser) -> Shape | None:
    """Annotation of a key, or None when the models do not know it."""
    shape: Shape = model
    node = tree
    for position, part in enumerate(key):
        kind, inner = read_shape(shape)
        if kind == "model" and isinstance(part, str) and part in inner.model_fields:
            shape = inner.model_fields[part].annotation
        elif kind == "list" and isinstance(part, int):
            shape = inner
        else:
            return None
        node = _get(node, part)
        if key[:position] == ("targets",):
            shape = choose(node)
    return shape


def walk(shape: Shape, node: Any, key: Key, choose: Chooser) -> Iterator[tuple[Key, str, Any]]:
    """Every given leaf that a model knows: its key, its kind and the value."""
    kind, inner = read_shape(shape)
    if kind == "model" and isinstance(node, dict):
        for name, field in inner.model_fields.items():
            if name in node:
                yield from walk(field.annotation, node[name], (*key, name), choose)
    elif kind == "list" and isinstance(node, list):
        for position, element in enumerate(node):
            element_shape = choose(element) if key == ("targets",) else inner
            yield from walk(element_shape, element, (*key, position), choose)
    else:
        yield key, kind, node


def holds_secret(shape: Shape) -> bool:
    """Whether a value written in this place could be a secret."""
    kind, inner = read_shape(shape)
    if kind == "list":
        return holds_secret(inner)
    if kind == "model":
        return any(holds_secret(field.annotation) for field in inner.model_fields.values())
    return kind == "secret"


def hide_credentials(text: str) -> str:
    """A URL without the user and password before its host."""
    return re.sub(r"//[^/@\s]*@", "//***@", text)


def set_value(tree: Any, key: Key, value: Any) -> None:
    """Replace one value of a tree."""
    node = tree
    for part in key[:-1]:
        node = node[part]
    node[key[-1]] = value


def translate(
    error: ValidationError, model: type[BaseModel], merged: Merged, choose: Chooser, base: Key
) -> list[Issue]:
    """Pydantic's complaints as issues; ``base`` is the key of the validated part."""
    issues = []
    details = error.errors(include_url=False)
    for detail in details:
        # A list whose elements failed counts as too short as well: that is no mistake of its own.
        below = [other for other in details if other["loc"][: len(detail["loc"])] == detail["loc"] != other["loc"]]
        if detail["type"] == "too_short" and below:
            continue
        key = _trim((*base, *detail["loc"]), merged.tree, detail["type"])
        issues.append(_translate_one(detail, key, model, merged, choose))
    return issues


def _translate_one(detail: Any, key: Key, model: type[BaseModel], merged: Merged, choose: Chooser) -> Issue:
    place = merged.say_place(key)
    name = merged.spell(key)
    if detail["type"] == "extra_forbidden":
        kind, owner = read_shape(find_shape(model, merged.tree, key[:-1], choose))
        accepted = sorted(owner.model_fields) if kind == "model" else []
        return Issue(
            key=name, place=place, problem="unknown key.", accepted=", ".join(accepted),
            remedy=suggest(str(key[-1]), accepted) or "Remove the key, or use one of the accepted ones.",
        )  # fmt: skip
    if detail["type"] == "missing":
        kind, owner = read_shape(find_shape(model, merged.tree, key[:-1], choose))
        field = owner.model_fields.get(key[-1]) if kind == "model" else None
        meaning = (field.description or "") if field is not None else ""
        return Issue(
            key=name, place=place, problem="missing.", accepted=meaning, remedy=f"Add `{key[-1]} = ...` there."
        )
    problem, accepted_text, remedy = _read_complaint(detail)
    return Issue(
        key=name, place=place, problem=problem, given=_show_given(detail, key, model, merged, choose),
        accepted=accepted_text, remedy=remedy,
    )  # fmt: skip


def _read_complaint(detail: Any) -> tuple[str, str, str]:
    """Problem, accepted values, remedy of one complaint."""
    context = detail.get("ctx", {})
    message = str(detail["msg"])
    if detail["type"] in ("literal_error", "enum"):
        choices = re.findall(r"'([^']*)'", str(context.get("expected", "")))
        return "not one of the accepted values.", ", ".join(choices), suggest(str(detail["input"]), choices)
    if detail["type"] == "string_pattern_mismatch" and context.get("pattern") == _NAME_PATTERN:
        return "not a name.", NAME_RULE, ""
    if detail["type"] == "value_error":
        return f"{message.removeprefix('Value error, ').rstrip('.')}.", "", ""
    accepted = re.sub(r"^(Input|Value|String|Tuple|Data) should ", "", message)
    accepted = re.sub(r"(, unable to|, got) .*$", "", accepted).removeprefix("be ")
    return "not accepted.", accepted, ""


_NAME_PATTERN = TypeAdapter(Name).json_schema()["pattern"]


def _show_given(detail: Any, key: Key, model: type[BaseModel], merged: Merged, choose: Chooser) -> str:
    shape = find_shape(model, merged.tree, key, choose)
    value = detail["input"]
    if shape is None or holds_secret(shape) or not isinstance(value, (str, int, float, bool)):
        return ""
    return repr(hide_credentials(value)) if isinstance(value, str) else repr(value)


def _trim(loc: Key, tree: Any, kind: str) -> Key:
    """The part of pydantic's location that is a key of the tree (union branches add words of their own)."""
    key: Key = ()
    node = tree
    for position, part in enumerate(loc):
        missing_here = kind == "missing" and position == len(loc) - 1
        if not missing_here and not _has(node, part):
            break
        key = (*key, part)
        node = _get(node, part)
    return key


def _has(node: Any, part: str | int) -> bool:
    if isinstance(node, dict):
        return part in node
    return isinstance(node, list) and isinstance(part, int) and part < len(node)


def _get(node: Any, part: str | int) -> Any:
    return node[part] if _has(node, part) else None

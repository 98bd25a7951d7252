"""Reading mapping files: YAML with the line of every member, and problems that name file, line, field and remedy.

The YAML is the plain part of the language: no anchors, no tags, no duplicate keys. A plain ``yes`` or ``1.50`` is text
(numbers with a fraction are text everywhere in mappings, so that no cent is lost in a float).
"""

from __future__ import annotations

import difflib
import re
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypeVar

import yaml
from pydantic import BaseModel, ConfigDict, ValidationError

from schemas.failure import ConfigurationError

if TYPE_CHECKING:
    from collections.abc import Iterable, Sequence
    from pathlib import Path

_INTEGER = re.compile(r"-?(0|[1-9][0-9]*)\Z")
_WORDS: dict[str, Any] = {"true": True, "false": False, "null": None, "~": None, "": None}

M = TypeVar("M", bound=BaseModel)


class Part(BaseModel):
    """A part of a mapping file; unknown members are refused."""

    model_config = ConfigDict(extra="forbid", frozen=True)


@dataclass(frozen=True, slots=True)
class Problem:
    """One thing wrong in a mapping file."""

    file: str
    line: int
    field: str
    detail: str
    remedy: str

    def __str__(self) -> str:
        return f"{self.file}:{self.line} {self.field}: {self.detail} {self.remedy}".replace("  ", " ")


class MappingError(ConfigurationError):
    """Mapping files with problems; ``problems`` holds all of them."""

    code = "RS160"
    meaning = "A mapping file is wrong: syntax, a path or function that does not exist, or an example that fails."
    default_remedy = "Correct the named lines; `remitstream mapping check FILE` lists all of them at once."

    def __init__(self, problems: Sequence[Problem]) -> None:
        self.problems = tuple(problems)
        first = self.problems[0]
        lines = "\n".join(f"  {problem}" for problem in self.problems)
        super().__init__(f"{len(self.problems)} problem(s):\n{lines}\n", place=f"{first.file}:{first.line}")


@dataclass(slots=True)
class MappingFile:
    """A parsed mapping file: plain data, the line of every member, and the problems found so far."""

    file: str
    content: bytes
    data: Any = None
    lines: dict[tuple[str | int, ...], int] = field(default_factory=dict)
    problems: list[Problem] = field(default_factory=list)

    def add(self, where: Sequence[str | int], detail: str, remedy: str) -> None:
        """Note a problem at the member ``where``; its line is that of the nearest member that is in the file."""
        known: tuple[str | int, ...] = ()
        for part in where:
            if (*known, part) in self.lines:
                known = (*known, part)
        name = ".".join(str(part) for part in where) or "file"
        self.problems.append(Problem(self.file, self.lines.get(known, 1), name, detail, remedy))

    def validate(self, model: type[M]) -> M | None:
        """The file as ``model``, or None after noting what does not fit."""
        if self.problems:
            return None
        try:
            return model.model_validate(self.data)
        except ValidationError as error:
            for issue in error.errors(include_url=False, include_context=False, include_input=False):
                extra = issue["type"] == "extra_forbidden"
                detail = "This member is not known here." if extra else f"{issue['msg']}."
                remedy = "Correct its spelling or remove it." if extra else "docs/mappings.md shows each member."
                self.add(issue["loc"], detail, remedy)
            return None


def read_mapping_file(path: Path) -> MappingFile:
    """Parse a YAML file. Problems (missing file, not UTF-8, not YAML) are noted in the result, never raised."""
    name = str(path)
    try:
        content = path.read_bytes()
    except OSError as error:
        missing = MappingFile(name, b"")
        missing.add((), f"The file cannot be read ({type(error).__name__}).", "Give the path of a readable YAML file.")
        return missing
    document = MappingFile(name, content)
    try:
        text = content.decode("utf-8")
        if any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, Loader=yaml.SafeLoader)):
            document.add((), "YAML anchors and aliases are not read here.", "Write the value out, or use `defaults`.")
            return document
        root = yaml.compose(text, Loader=yaml.SafeLoader)
    except yaml.MarkedYAMLError as error:
        document.lines[()] = error.problem_mark.line + 1 if error.problem_mark else 1
        document.add((), f"Not YAML: {error.problem or 'syntax error'}.", "Correct the YAML syntax of this line.")
    except (UnicodeDecodeError, yaml.YAMLError, RecursionError):
        document.add((), "Not a UTF-8 YAML text.", "Save the file as UTF-8 without control characters.")
    else:
        if root is None:
            document.add((), "The file is empty.", "docs/mappings.md shows what it holds.")
        else:
            document.data = _read_node(root, (), document)
    return document


def suggest(word: str, known: Iterable[str]) -> str:
    """A remedy that names the nearest known word, or all of them when none is near."""
    names = sorted(known)
    near = difflib.get_close_matches(word, names, n=1)
    return f"Did you mean `{near[0]}`?" if near else f"Known here: {', '.join(names) or 'none'}."


def _read_node(node: yaml.Node, where: tuple[str | int, ...], document: MappingFile) -> Any:
    document.lines[where] = node.start_mark.line + 1
    if isinstance(node, yaml.MappingNode):
        return _read_members(node, where, document)
    if isinstance(node, yaml.SequenceNode):
        return [_read_node(child, (*where, position), document) for position, child in enumerate(node.value)]
    assert isinstance(node, yaml.ScalarNode)
    text: str = node.value
    if not node.tag.startswith("tag:yaml.org,2002:"):
        document.add(where, "YAML tags are not read here.", "Remove the tag.")
    if node.style is not None:  # quoted or block text is always text
        return text
    if text in _WORDS:
        return _WORDS[text]
    return int(text) if _INTEGER.match(text) else text


def _read_members(node: yaml.MappingNode, where: tuple[str | int, ...], document: MappingFile) -> dict[str, Any]:
    members: dict[str, Any] = {}
    for key, value in node.value:
        if not isinstance(key, yaml.ScalarNode):
            document.add(where, "A member name must be text.", "Quote it.")
            continue
        if key.value in members:
            document.lines[(*where, key.value)] = key.start_mark.line + 1
            document.add((*where, key.value), "This member is there twice.", "Keep one of them.")
            continue
        members[key.value] = _read_node(value, (*where, key.value), document)
        document.lines[(*where, key.value)] = key.start_mark.line + 1
    return members

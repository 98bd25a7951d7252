"""The configuration file as text: its tree, the line of every key, and what is wrong with it.

``tomllib`` gives the values; ``find_lines`` walks the same text once more and says on which line each key, table and
array element stands, so that every complaint names a line. Nothing here knows which settings exist.
"""

from __future__ import annotations

import re
import tomllib
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from schemas.failure import ConfigurationError

Key = tuple[str | int, ...]
"""Path of a value: table names, and positions inside arrays."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Issue:
    """One wrong setting. ``given`` is empty when nothing was given or when it could be a secret."""

    key: str
    place: str
    problem: str
    given: str = ""
    accepted: str = ""
    remedy: str = ""

    def __str__(self) -> str:
        lines = [f"{self.place}: {self.key}: {self.problem}"]
        lines += [
            f"    {label}: {text}"
            for label, text in (("given", self.given), ("accepted", self.accepted), ("remedy", self.remedy))
            if text
        ]
        return "\n".join(lines)


class SettingsError(ConfigurationError):
    """One or more settings are wrong; ``issues`` holds all of them."""

    code = "RS101"
    meaning = "One or more settings are wrong; each is listed with its line, accepted values and remedy."
    default_remedy = "Correct every listed setting; `remitstream config check` repeats the list."

    def __init__(self, issues: list[Issue], *, place: str) -> None:
        noun = "setting is" if len(issues) == 1 else "settings are"
        super().__init__("\n".join([f"{len(issues)} {noun} wrong:", *map(str, issues)]), place=place)
        self.issues = tuple(issues)

    def list_issues(self) -> list[dict[str, str]]:
        """The issues as plain data."""
        return [asdict(issue) for issue in self.issues]


class MissingFileError(ConfigurationError):
    """There is no configuration file, or it cannot be read."""

    code = "RS102"
    meaning = "The configuration file is not there or cannot be read."
    default_remedy = "`remitstream init` writes one with comments; `--config` or REMITSTREAM_CONFIG names another."


class SyntaxIssueError(ConfigurationError):
    """The configuration file is not TOML."""

    code = "RS103"
    meaning = "The configuration file is not valid TOML; nothing in it could be read."
    default_remedy = "Correct the named line; text values need double quotes."


@dataclass(frozen=True, slots=True)
class Document:
    """A configuration file: its values, and the line of each key (first line is 1)."""

    path: Path
    tree: dict[str, Any]
    lines: dict[Key, int]

    def locate(self, key: Key) -> str:
        """``file:line`` of a key, of the nearest table around it when it is not written there."""
        for length in range(len(key), 0, -1):
            line = self.lines.get(key[:length])
            if line is not None:
                return f"{show_path(self.path)}:{line}"
        return show_path(self.path)


def show_path(path: Path) -> str:
    """A path as short as it can be said from the working directory."""
    return str(path.relative_to(Path.cwd())) if path.is_relative_to(Path.cwd()) else str(path)


def read_document(path: Path) -> Document:
    """Read a file. Raises ``MissingFileError`` or ``SyntaxIssueError``, whose texts never hold a value."""
    try:
        text = path.read_bytes().decode()
    except OSError as error:
        raise MissingFileError(f"it cannot be read ({error.strerror}).", place=show_path(path)) from None
    except UnicodeDecodeError:
        raise SyntaxIssueError("it is not UTF-8 text.", place=show_path(path)) from None
    text = text.replace("\r\n", "\n")
    try:
        tree = tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        message, _, position = str(error).rpartition(" (at ")
        line = re.search(r"line (\d+)", position)
        place = f"{show_path(path)}:{line[1]}" if line else f"{show_path(path)}:{text.count(chr(10)) + 1}"
        raise SyntaxIssueError(f"{message or 'the text cannot be parsed'}.", place=place) from None
    return Document(path, tree, find_lines(text))


def find_lines(text: str) -> dict[Key, int]:
    """Line of every key, table and array element of a text that ``tomllib`` has accepted."""
    return _Walk(text).run()


class _Walk:
    """One pass over valid TOML. It trusts the grammar, because the text was parsed before."""

    def __init__(self, text: str) -> None:
        self._text = text
        self._at = 0
        self._lines: dict[Key, int] = {}
        self._tables: dict[Key, int] = {}
        """Arrays of tables: path -> number of elements so far."""

    def run(self) -> dict[Key, int]:
        table: Key = ()
        while self._skip_blank():
            if self._peek() == "[":
                table = self._read_header()
            else:
                self._read_pair(table)
        return self._lines

    def _peek(self, width: int = 1) -> str:
        return self._text[self._at : self._at + width]

    def _note(self, key: Key, at: int | None = None) -> None:
        self._lines.setdefault(key, self._text.count("\n", 0, self._at if at is None else at) + 1)

    def _skip_blank(self) -> bool:
        """Move over spaces, line ends and comments; False at the end of the text."""
        while self._at < len(self._text):
            if self._peek() == "#":
                end = self._text.find("\n", self._at)
                self._at = len(self._text) if end < 0 else end
            elif self._peek() in " \t\n":
                self._at += 1
            else:
                return True
        return False

    def _read_header(self) -> Key:
        start = self._at
        array = self._peek(2) == "[["
        self._at += 2 if array else 1
        name = self._read_name("]")
        self._at += 2 if array else 1
        path: Key = ()
        for part in name[:-1]:
            path = self._enter(path, part)
        if not array:
            path = (*path, name[-1])
        else:
            path = (*path, name[-1])
            self._tables[path] = self._tables.get(path, 0) + 1
            self._note(path, start)
            path = (*path, self._tables[path] - 1)
        self._note(path, start)
        return path

    def _enter(self, path: Key, part: str) -> Key:
        """Path of a table named on the way of a header: the last element, where it is an array of tables."""
        path = (*path, part)
        self._note(path)
        return (*path, self._tables[path] - 1) if path in self._tables else path

    def _read_pair(self, table: Key) -> None:
        start = self._at
        name = self._read_name("=")
        self._at += 1
        path = table
        for part in name:
            path = (*path, part)
            self._note(path, start)
        self._skip_blank()
        self._read_value(path)

    def _read_name(self, end: str) -> tuple[str, ...]:
        """A dotted key up to (not including) ``end``."""
        parts: list[str] = []
        while True:
            self._skip_blank()
            start = self._at
            if self._peek() in "\"'":
                self._skip_string()
                parts.append(str(tomllib.loads(f"k = {self._text[start : self._at]}")["k"]))
            else:
                while self._peek() not in f". \t{end}":
                    self._at += 1
                parts.append(self._text[start : self._at])
            self._skip_blank()
            if self._peek() == end:
                return tuple(parts)
            self._at += 1  # the dot

    def _read_value(self, path: Key) -> None:
        opening = self._peek()
        if opening in "\"'":
            self._skip_string()
        elif opening == "[":
            self._at += 1
            self._read_array(path)
        elif opening == "{":
            self._at += 1
            while self._skip_blank() and self._peek() != "}":
                if self._peek() == ",":
                    self._at += 1
                else:
                    self._read_pair(path)
            self._at += 1
        else:
            while self._peek() and self._peek() not in ",]}#\n":
                self._at += 1

    def _read_array(self, path: Key) -> None:
        position = 0
        while self._skip_blank() and self._peek() != "]":
            if self._peek() == ",":
                self._at += 1
                continue
            self._note((*path, position))
            self._read_value((*path, position))
            position += 1
        self._at += 1

    def _skip_string(self) -> None:
        quote = self._peek()
        if self._peek(3) == quote * 3:
            self._at += 3
            while self._peek(3) != quote * 3:
                self._at += 2 if quote == '"' and self._peek() == "\\" else 1
            self._at += 3
            while self._peek() == quote:  # up to two quotes may stand before the closing three
                self._at += 1
            return
        self._at += 1
        while self._peek() != quote:
            self._at += 2 if quote == '"' and self._peek() == "\\" else 1
        self._at += 1

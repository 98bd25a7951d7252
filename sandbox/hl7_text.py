"""HL7 v2 as plain text for the sandbox: fields, components and escapes by string splitting, nothing else."""

from __future__ import annotations

from dataclasses import dataclass

_ESCAPES = {"F": "|", "S": "^", "T": "&", "R": "~", "E": "\\"}


@dataclass(frozen=True, slots=True)
class Hl7Text:
    """A message split into segments and fields by the delimiters its own MSH names."""

    segments: tuple[tuple[str, ...], ...]
    component: str
    repetition: str
    escape: str
    subcomponent: str

    def find(self, name: str) -> tuple[str, ...] | None:
        """Fields of the first segment of that name; index n is field n (MSH-1 is the separator itself)."""
        return next((fields for fields in self.segments if fields[0] == name), None)

    def find_all(self, name: str) -> list[tuple[str, ...]]:
        """Fields of every segment of that name, in order."""
        return [fields for fields in self.segments if fields[0] == name]

    def read(self, fields: tuple[str, ...] | None, field: int, component: int = 1, subcomponent: int = 1) -> str:
        """Text of one component of the first repetition; empty when absent."""
        return self.read_part(pick(fields, field).split(self.repetition)[0], component, subcomponent)

    def read_part(self, repetition: str, component: int, subcomponent: int = 1) -> str:
        """Text of one component of one repetition, escapes resolved; empty when absent."""
        parts = repetition.split(self.component)
        if component > len(parts):
            return ""
        pieces = parts[component - 1].split(self.subcomponent)
        return self._unescape(pieces[subcomponent - 1]) if subcomponent <= len(pieces) else ""

    def _unescape(self, text: str) -> str:
        if self.escape not in text:
            return text
        delimiters = _ESCAPES | {
            "S": self.component,
            "T": self.subcomponent,
            "R": self.repetition,
            "E": self.escape,
        }
        result: list[str] = []
        pieces = text.split(self.escape)
        position = 0
        while position < len(pieces):
            result.append(pieces[position])
            if position + 2 < len(pieces) and pieces[position + 1] in delimiters:
                result.append(delimiters[pieces[position + 1]])
                position += 2
                continue
            if position + 1 < len(pieces):
                result.append(self.escape)
            position += 1
        return "".join(result)


def pick(fields: tuple[str, ...] | None, field: int) -> str:
    """A whole field as sent, or empty text."""
    return fields[field] if fields is not None and field < len(fields) else ""


def split_message(raw: bytes) -> Hl7Text | None:
    """The message as fields, or None when it is no HL7 v2 (no MSH with its delimiters, not UTF-8)."""
    try:
        text = raw.decode("utf-8")
    except UnicodeDecodeError:
        return None
    text = text.replace("\r\n", "\r").replace("\n", "\r").strip("\r")
    if not text.startswith("MSH") or len(text) < 8:
        return None
    separator, marks = text[3], text[4:8]
    if len(set(separator + marks)) != 5:
        return None
    segments = []
    for line in text.split("\r"):
        fields = line.split(separator)
        if fields[0] == "MSH":
            fields.insert(1, separator)
        segments.append(tuple(fields))
    return Hl7Text(tuple(segments), component=marks[0], repetition=marks[1], escape=marks[2], subcomponent=marks[3])


def escape_text(text: str) -> str:
    """Text with the default delimiters escaped, fit for a field."""
    for character, code in (("\\", "E"), ("|", "F"), ("^", "S"), ("&", "T"), ("~", "R")):
        text = text.replace(character, f"\\{code}\\")
    return text

"""HL7 v2 in its delimited form (ER7): reader, writer and acknowledgements.

``parse`` turns bytes into a ``Message``; fields are read by their HL7 number and are split and unescaped only when
asked for. Any delimiters of MSH-1 and MSH-2 are honoured. Senders that end segments with LF or CRLF, or begin with a
byte order mark, are read as well. Everything that cannot be read raises ``Failure`` with a code and a field, never with
text of the message.

Sources: HL7 2.5.1 chapter 2 (delimiters, escape sequences, acknowledgement, MSH); tables 0008 (acknowledgement codes),
0155 (when to acknowledge), 0211 (character sets), 0357 (error conditions).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta, timezone, tzinfo
from functools import lru_cache
from typing import TYPE_CHECKING, NoReturn

from schemas.failure import Failure, FailureKind

if TYPE_CHECKING:
    from collections.abc import Mapping, Sequence

CONTENT_TYPE = "x-application/hl7-v2+er7"
"""Media type of a message in this form."""

SEGMENT_END = "\r"

ACKNOWLEDGEMENT_CODES = frozenset({"AA", "AE", "AR", "CA", "CE", "CR"})
"""Table 0008: original mode and application level (A.), accept level (C.)."""

_BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_FORBIDDEN_DELIMITERS = frozenset(' \r\n\x00\x0b\x1c"')
_SEGMENT_NAME = re.compile(r"[A-Z][A-Z0-9]{2}\Z")
_HEADERS = ("MSH", "FHS", "BHS")
_FRAME_BYTES = {0x0B: None, 0x1C: None, 0x0D: None}

_CHARSETS = {
    "UNICODE": "utf-8",
    "UNICODE UTF-8": "utf-8",
    "UTF-8": "utf-8",
    "UTF8": "utf-8",
    "WINDOWS-1252": "cp1252",
    "CP1252": "cp1252",
    "ISO IR6": "ascii",
    "ASCII": "ascii",
    "US-ASCII": "ascii",
    "ISO IR14": "iso2022_jp_2",
    "ISO IR87": "iso2022_jp_2",
    "ISO IR159": "iso2022_jp_2",
    "GB 18030-2000": "gb18030",
    "KS X 1001": "euc_kr",
    "BIG-5": "big5",
}
_ISO_8859 = re.compile(r"(?:ISO[- ]?)?8859[/-](\d{1,2})\Z")
_ISO_8859_PARTS = frozenset({*range(1, 12), 13, 14, 15, 16})

_HEX_ESCAPE = re.compile(r"X((?:[0-9A-Fa-f]{2})+)\Z")
_FORMAT_ESCAPE = re.compile(r"\.(br|sp|ce|sk|fi|nf|in|ti)[ +]?(-?\d{1,2})?\Z")

_TIMESTAMP = re.compile(
    r"(\d{4})(?:(\d\d)(?:(\d\d)(?:(\d\d)(?:(\d\d)(?:(\d\d)(?:\.(\d{1,4}))?)?)?)?)?)?(?:([+-])(\d\d)(\d\d))?\Z"
)
_EPOCH = datetime(1970, 1, 1, tzinfo=UTC)
_MILLISECOND = timedelta(milliseconds=1)


def _refuse(code: str, field: str) -> NoReturn:
    raise Failure(FailureKind.INVALID, code, field)


@dataclass(frozen=True, slots=True)
class Delimiters:
    """MSH-1 and MSH-2. An empty string means the sender has no such delimiter."""

    field: str = "|"
    component: str = "^"
    repetition: str = "~"
    escape: str = "\\"
    subcomponent: str = "&"
    truncation: str = ""

    @property
    def encoding_characters(self) -> str:
        """The text of MSH-2."""
        return self.component + self.repetition + self.escape + self.subcomponent + self.truncation


STANDARD = Delimiters()


@dataclass(frozen=True, slots=True)
class Dialect:
    """How one message is written: its delimiters and the Python codec of its bytes."""

    delimiters: Delimiters = STANDARD
    encoding: str = "utf-8"


class Repetition:
    """One repetition of a field: components and subcomponents by number, counted from 1."""

    __slots__ = ("_dialect", "raw")

    def __init__(self, raw: str, dialect: Dialect) -> None:
        self.raw = raw
        """Text as sent, still escaped."""
        self._dialect = dialect

    def text(self, component: int = 1, subcomponent: int = 1) -> str:
        """Unescaped text; empty when absent and when the sender wrote the HL7 null (two double quotes)."""
        delimiters = self._dialect.delimiters
        part = _pick(_pick(self.raw, delimiters.component, component), delimiters.subcomponent, subcomponent)
        return "" if part == '""' else unescape(part, self._dialect)


class Segment:
    """One segment: fields by HL7 number. MSH-1 is the field separator and MSH-2 the encoding characters."""

    __slots__ = ("_dialect", "_fields", "name")

    def __init__(self, line: str, dialect: Dialect) -> None:
        separator = dialect.delimiters.field
        self.name = line[:3]
        self._dialect = dialect
        self._fields = line.split(separator)
        if self.name in _HEADERS:
            self._fields.insert(1, separator)

    def __len__(self) -> int:
        """Number of the last field that was sent."""
        return len(self._fields) - 1

    def raw(self, field: int) -> str:
        """Text of the field as sent, still escaped; empty when absent."""
        return self._fields[field] if 0 < field < len(self._fields) else ""

    def repetitions(self, field: int) -> list[Repetition]:
        """The repetitions of a field, empty ones included; none for an absent or empty field."""
        raw = self.raw(field)
        if not raw:
            return []
        if self._is_delimiters(field):
            return [Repetition(raw, Dialect(Delimiters("", "", "", "", ""), self._dialect.encoding))]
        separator = self._dialect.delimiters.repetition
        parts = raw.split(separator) if separator else [raw]
        return [Repetition(part, self._dialect) for part in parts]

    def text(self, field: int, component: int = 1, subcomponent: int = 1) -> str:
        """Unescaped text in the first repetition of a field; empty when absent or the HL7 null."""
        if self._is_delimiters(field):
            return self.raw(field)
        first = _pick(self.raw(field), self._dialect.delimiters.repetition, 1)
        return Repetition(first, self._dialect).text(component, subcomponent)

    def _is_delimiters(self, field: int) -> bool:
        return field in {1, 2} and self.name in _HEADERS


@dataclass(frozen=True, slots=True)
class Header:
    """What the first segment says (MSH; FHS and BHS of a batch have the same first fields)."""

    segment: Segment
    dialect: Dialect

    @property
    def sending_application(self) -> str:
        """MSH-3.1."""
        return self.segment.text(3)

    @property
    def sending_facility(self) -> str:
        """MSH-4.1."""
        return self.segment.text(4)

    @property
    def time(self) -> str:
        """MSH-7 as sent."""
        return self.segment.text(7)

    @property
    def message_code(self) -> str:
        """MSH-9.1, for example ``ADT``; empty on a batch header."""
        return self.segment.text(9) if self.segment.name == "MSH" else ""

    @property
    def trigger(self) -> str:
        """MSH-9.2, for example ``A01``; empty on a batch header."""
        return self.segment.text(9, 2) if self.segment.name == "MSH" else ""

    @property
    def raw_control_id(self) -> str:
        """MSH-10 (FHS-11, BHS-11) as sent, still escaped: what an answer echoes."""
        return self.segment.raw(10 if self.segment.name == "MSH" else 11)

    @property
    def control_id(self) -> str:
        """MSH-10 (FHS-11, BHS-11)."""
        return self.segment.text(10 if self.segment.name == "MSH" else 11)

    @property
    def version(self) -> str:
        """MSH-12.1; empty on a batch header."""
        return self.segment.text(12) if self.segment.name == "MSH" else ""

    @property
    def accept_condition(self) -> str:
        """MSH-15: when an accept acknowledgement is wanted (AL, NE, ER, SU or empty)."""
        return self.segment.text(15) if self.segment.name == "MSH" else ""

    @property
    def application_condition(self) -> str:
        """MSH-16: when an application acknowledgement is wanted (AL, NE, ER, SU or empty)."""
        return self.segment.text(16) if self.segment.name == "MSH" else ""


@dataclass(frozen=True, slots=True)
class Message:
    """A parsed message: its header and its segments in order, the MSH included."""

    header: Header
    segments: tuple[Segment, ...]

    def find_segment(self, name: str) -> Segment | None:
        """The first segment of that name."""
        for segment in self.segments:
            if segment.name == name:
                return segment
        return None

    def list_segments(self, name: str) -> list[Segment]:
        """All segments of that name, in order."""
        return [segment for segment in self.segments if segment.name == name]


@dataclass(frozen=True, slots=True)
class Identifier:
    """A CX: an identifier with the authority that assigned it (CX.4 is namespace, universal id and its type)."""

    value: str
    namespace: str
    universal_id: str
    universal_id_type: str
    id_type: str


def parse(data: bytes) -> Message:
    """Read a whole message.

    The character set is MSH-18; when that is blank, ASCII or UTF-8 (senders get these wrong), UTF-8 and then
    Windows-1252. Raises ``Failure`` INVALID: HEADER_MISSING, DELIMITERS_INVALID, CHARSET_UNKNOWN, CHARSET_WRONG,
    SEGMENT_MALFORMED, HEADER_REPEATED.
    """
    data = _strip(data)
    dialect, line = _read_first_line(data, ("MSH",), strict=True)
    end = data[len(line) : len(line) + 1]
    text = _decode(data, dialect.encoding)
    # The end of the MSH tells the segment terminator; the other of CR and LF is only tolerated around it, so that a
    # line feed inside a field of a correct message never begins a segment.
    lines = text.split("\n" if end == b"\n" else "\r")
    segments: list[Segment] = []
    for number, padded in enumerate(lines, start=1):
        content = padded.strip("\r\n")
        if not content.strip():
            continue
        name, after = content[:3], content[3:4]
        if not _SEGMENT_NAME.match(name) or after not in {"", dialect.delimiters.field}:
            _refuse("SEGMENT_MALFORMED", f"segment {number}")
        if segments and name in _HEADERS:
            _refuse("HEADER_REPEATED", name)
        segments.append(Segment(content, dialect))
    return Message(Header(segments[0], dialect), tuple(segments))


def read_header(data: bytes) -> Header:
    """Read the first segment only: MSH, or FHS/BHS of a batch. An unknown character set is no failure here.

    Raises ``Failure`` INVALID HEADER_MISSING or DELIMITERS_INVALID.
    """
    dialect, line = _read_first_line(_strip(data), _HEADERS, strict=False)
    try:
        text = line.decode(dialect.encoding)
    except UnicodeDecodeError:
        dialect = Dialect(dialect.delimiters, "latin-1")
        text = line.decode("latin-1")
    return Header(Segment(text, dialect), dialect)


def read_identifiers(segment: Segment, field: int) -> list[Identifier]:
    """The CX repetitions of a field that have a value. Trailing blanks are padding (HL7 ST) and are dropped."""
    found = []
    for repetition in segment.repetitions(field):
        value = repetition.text(1).rstrip(" ")
        if value.strip():
            found.append(
                Identifier(
                    value=value,
                    namespace=repetition.text(4, 1).strip(),
                    universal_id=repetition.text(4, 2).strip(),
                    universal_id_type=repetition.text(4, 3).strip(),
                    id_type=repetition.text(5).strip(),
                )
            )
    return found


def read_timestamp(text: str, zone: tzinfo, field: str) -> int:
    """Milliseconds since the epoch of ``YYYY[MM[DD[HH[MM[SS[.SSSS]]]]]][+ZZZZ]``.

    Without an offset the time is local in ``zone`` (the first of the two when clocks are set back). ``field`` names the
    place for the ``Failure`` TIMESTAMP_INVALID.
    """
    match = _TIMESTAMP.match(text)
    if match is None or not text.isascii():
        _refuse("TIMESTAMP_INVALID", field)
    year, month, day, hour, minute, second, fraction, sign, offset_hours, offset_minutes = match.groups()
    try:
        if sign:
            offset = timedelta(hours=int(offset_hours), minutes=int(offset_minutes))
            zone = timezone(-offset if sign == "-" else offset)
        moment = datetime(
            int(year),
            int(month or 1),
            int(day or 1),
            int(hour or 0),
            int(minute or 0),
            int(second or 0),
            int((fraction or "0").ljust(6, "0")),
            tzinfo=zone,
        )
        return (moment - _EPOCH) // _MILLISECOND
    except (ValueError, OverflowError):
        _refuse("TIMESTAMP_INVALID", field)


def write_timestamp(milliseconds: int, zone: tzinfo) -> str:
    """``YYYYMMDDHHMMSS+ZZZZ`` in ``zone``; in UTC where that zone's offset has seconds (before standard time)."""
    moment = (_EPOCH + milliseconds * _MILLISECOND).astimezone(zone)
    if (moment.utcoffset() or timedelta()) % timedelta(minutes=1):
        moment = moment.astimezone(UTC)
    return f"{moment.year:04d}{moment:%m%d%H%M%S%z}"


class Raw(str):
    """Field text that is escaped already; the writer leaves it alone."""

    __slots__ = ()


Component = str | tuple[str, ...]
"""A component, or its subcomponents."""
Value = str | tuple[Component, ...]
"""A field, or its components."""
Content = Value | list[Value]
"""A field, or its repetitions."""


def escape(text: str, delimiters: Delimiters = STANDARD) -> str:
    """Escape delimiters, line ends and control characters.

    Raises ``Failure`` ESCAPE_IMPOSSIBLE when the text needs an escape and the delimiters have no escape character.
    """
    escaped = text.translate(_list_escapes(delimiters))
    if not delimiters.escape and escaped != text:
        _refuse("ESCAPE_IMPOSSIBLE", "MSH-2")
    return escaped


def unescape(text: str, dialect: Dialect) -> str:
    """Text with its escape sequences replaced.

    Formatting commands become blanks and line feeds, highlighting disappears. An unknown or unfinished sequence stays
    as it was sent: dropping it could turn one identifier into another.
    """
    mark = dialect.delimiters.escape
    if not mark or mark not in text:
        return text
    pieces = []
    position = 0
    while (start := text.find(mark, position)) >= 0 and (end := text.find(mark, start + 1)) >= 0:
        meaning = _expand(text[start + 1 : end], dialect)
        if meaning is None:
            pieces.append(text[position:end])
            position = end  # the closing character may open the next sequence
        else:
            pieces += (text[position:start], meaning)
            position = end + 1
    pieces.append(text[position:])
    return "".join(pieces)


def build_segment(name: str, fields: Mapping[int, Content], delimiters: Delimiters = STANDARD) -> str:
    """One segment without its terminator, from fields by number; a list repeats, a tuple has components.

    ``build_segment("PID", {3: [("0012", "", "", "NORTH", "MR")]})`` is ``PID|||0012^^^NORTH^MR``. Trailing empty fields
    and components are not written. MSH-1 and MSH-2 come from ``delimiters``.
    """
    if not _SEGMENT_NAME.match(name) or any(number < 1 for number in fields):
        raise ValueError(f"segment {name!r}: three capitals or digits, and fields counted from 1")
    written = {number: _render(content, delimiters) for number, content in fields.items()}
    last = max((number for number, text in written.items() if text), default=0)
    first = 1
    line = name
    if name in _HEADERS:
        line += delimiters.field + delimiters.encoding_characters
        first = 3
    for number in range(first, last + 1):
        line += delimiters.field + written.get(number, "")
    return line


def build_message(
    segments: Sequence[tuple[str, Mapping[int, Content]]],
    *,
    delimiters: Delimiters = STANDARD,
    encoding: str = "utf-8",
) -> bytes:
    """A message from (segment name, fields) pairs, each segment ended by CR. The caller states MSH-18 if needed."""
    text = "".join(build_segment(name, fields, delimiters) + SEGMENT_END for name, fields in segments)
    try:
        return text.encode(encoding)
    except UnicodeEncodeError:
        _refuse("CHARSET_WRONG", "MSH-18")


@dataclass(frozen=True, slots=True)
class Fault:
    """Why a message is refused: condition of table 0357, plain text, and the place (segment, sequence, field)."""

    condition: str
    text: str
    place: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Acknowledgement:
    """What an answer says: MSA-1, MSA-2 and the error condition (ERR-3.1, MSA-6.1 or ERR-1.4.1; empty when none)."""

    code: str
    control_id: str
    condition: str


def build_ack(header: Header, code: str, *, control_id: str, time: str, fault: Fault | None = None) -> bytes:
    """The answer to a message: sender and receiver swapped, its control id echoed exactly, in its own dialect.

    ``control_id`` and ``time`` are MSH-10 and MSH-7 of the answer. A fault is written as ERR of the sender's version
    (2.5 and later: location, condition, severity; before: the older ERR-1), and its text as MSA-3.
    """
    msh = header.segment
    structure = "ACK" if header.trigger and _reaches(header.version, 3) else ""
    is_batch = msh.name != "MSH"
    segments: list[tuple[str, Mapping[int, Content]]] = [
        (
            "MSH",
            {
                3: _echo(msh.raw(5)),
                4: _echo(msh.raw(6)),
                5: _echo(msh.raw(3)),
                6: _echo(msh.raw(4)),
                7: time,
                9: ("ACK", header.trigger, structure),
                10: control_id,
                11: _echo("P" if is_batch else msh.raw(11) or "P"),
                12: _echo("2.5.1" if is_batch else msh.raw(12) or "2.5.1"),
                18: _echo("" if is_batch else msh.raw(18)),
            },
        ),
        ("MSA", {1: code, 2: _echo(header.raw_control_id), 3: fault.text if fault else ""}),
    ]
    if fault:
        condition = (fault.condition, fault.text, "HL70357")
        if is_batch or not header.version or _reaches(header.version, 5):
            segments.append(("ERR", {2: fault.place, 3: condition, 4: "E"}))
        else:
            place = (*fault.place, "", "", "")[:3]
            # Without a subcomponent separator only the bare condition can be told.
            detail = condition if header.dialect.delimiters.subcomponent else condition[:1]
            segments.append(("ERR", {1: (*place, detail)}))
    lines = [build_segment(name, fields, header.dialect.delimiters) + SEGMENT_END for name, fields in segments]
    return "".join(lines).encode(header.dialect.encoding, "replace")


def read_ack(data: bytes) -> Acknowledgement:
    """Read an answer. Raises ``Failure`` INVALID as ``parse`` does, ACK_INVALID when MSA-1 is missing or unknown."""
    message = parse(data)
    msa = message.find_segment("MSA")
    if msa is None or msa.text(1) not in ACKNOWLEDGEMENT_CODES:
        _refuse("ACK_INVALID", "MSA-1")
    condition = ""
    for err in message.list_segments("ERR"):
        condition = condition or err.text(3) or err.text(1, 4)
    condition = condition or msa.text(6)
    # A condition is a short code; anything longer is free text, which may name a patient.
    if not re.fullmatch(r"[A-Za-z0-9_.-]{1,20}", condition):
        condition = ""
    return Acknowledgement(msa.text(1), unescape(msa.raw(2), message.header.dialect), condition)


def _strip(data: bytes) -> bytes:
    return data.removeprefix(_BYTE_ORDER_MARK).lstrip(b"\r\n \t").removeprefix(_BYTE_ORDER_MARK)


def _read_first_line(data: bytes, names: tuple[str, ...], *, strict: bool) -> tuple[Dialect, bytes]:
    """Dialect and bytes of the first segment. ``strict`` refuses a character set we do not know."""
    if not data.startswith(tuple(name.encode() for name in names)) or len(data) < 5:
        _refuse("HEADER_MISSING", "MSH")
    line = re.split(rb"[\r\n]", data, maxsplit=1)[0]
    text = line.decode("latin-1")
    separator = text[3:4]
    characters = text[4:].split(separator, 1)[0] if separator else ""
    if len(characters) == 5 and characters[2] == characters[3]:
        # Written by a program whose string literal doubled the escape character; no legal reading has it twice.
        characters = characters[:3] + characters[4:]
    every = separator + characters
    if (
        not 2 <= len(every) <= 6
        or len(set(every)) != len(every)
        or any(sign in _FORBIDDEN_DELIMITERS or sign.isalnum() or not sign.isascii() for sign in every)
    ):
        _refuse("DELIMITERS_INVALID", "MSH-2")
    delimiters = Delimiters(separator, *(sign.strip("\0") for sign in characters.ljust(5, "\0")))
    declared = Segment(text, Dialect(delimiters, "latin-1")).text(18) if text.startswith("MSH") else ""
    encoding = _find_encoding(declared)
    if encoding is None:
        if strict:
            _refuse("CHARSET_UNKNOWN", "MSH-18")
        encoding = "utf-8"
    return Dialect(delimiters, _prove_encoding(data if strict else line, encoding)), line


def _find_encoding(declared: str) -> str | None:
    name = declared.strip().upper()
    if not name:
        return "utf-8"
    if match := _ISO_8859.match(name):
        return f"iso8859-{int(match[1])}" if int(match[1]) in _ISO_8859_PARTS else None
    return _CHARSETS.get(name)


def _prove_encoding(data: bytes, encoding: str) -> str:
    """UTF-8 or ASCII that the bytes are not becomes Windows-1252, what such senders mostly mean."""
    if encoding not in {"utf-8", "ascii"}:
        return encoding
    try:
        data.decode("utf-8")
    except UnicodeDecodeError:
        return "cp1252"
    return "utf-8"


def _decode(data: bytes, encoding: str) -> str:
    try:
        return data.decode(encoding)
    except UnicodeDecodeError:
        _refuse("CHARSET_WRONG", "MSH-18")


def _pick(text: str, separator: str, number: int) -> str:
    if not separator or separator not in text:
        return text if number == 1 else ""
    parts = text.split(separator, number)
    return parts[number - 1] if 0 < number <= len(parts) else ""


def _expand(code: str, dialect: Dialect) -> str | None:
    """Meaning of an escape sequence, given without its escape characters; None when it has none we know."""
    delimiters = dialect.delimiters
    if len(code) == 1:
        meanings = {
            "F": delimiters.field,
            "S": delimiters.component,
            "T": delimiters.subcomponent,
            "R": delimiters.repetition,
            "E": delimiters.escape,
            "P": delimiters.truncation,
        }
        return "" if code in "HN" else meanings.get(code) or None
    if match := _HEX_ESCAPE.match(code):
        data = bytes.fromhex(match[1])
        for encoding in (dialect.encoding, "cp1252"):
            try:
                return data.decode(encoding)
            except UnicodeDecodeError:
                continue
        return data.decode("latin-1")
    if match := _FORMAT_ESCAPE.match(code):
        command, count = match[1], max(int(match[2] or 1), 0)
        return {"br": "\n", "ce": "\n", "sp": "\n" * count, "sk": " " * count}.get(command, "")
    return None


@lru_cache(maxsize=64)
def _list_escapes(delimiters: Delimiters) -> dict[int, str]:
    mark = delimiters.escape
    table = {code: f"{mark}X{code:02X}{mark}" for code in (*range(0x20), 0x7F)}
    if "." not in delimiters.encoding_characters + delimiters.field:
        table[0x0A] = f"{mark}.br{mark}"
    letters = {
        delimiters.field: "F",
        delimiters.component: "S",
        delimiters.repetition: "R",
        delimiters.subcomponent: "T",
        delimiters.escape: "E",
        delimiters.truncation: "P",
    }
    table.update({ord(sign): f"{mark}{letter}{mark}" for sign, letter in letters.items() if sign})
    return table


def _render(content: Content, delimiters: Delimiters) -> str:
    if isinstance(content, list):
        return _join(delimiters.repetition, [_render(value, delimiters) for value in content])
    if isinstance(content, Raw):
        return content
    if isinstance(content, str):
        return escape(content, delimiters)
    components = [
        _render(part, delimiters)
        if isinstance(part, str)
        else _join(delimiters.subcomponent, _trim([_render(text, delimiters) for text in part]))
        for part in content
    ]
    return _join(delimiters.component, _trim(components))


def _trim(parts: list[str]) -> list[str]:
    while parts and not parts[-1]:
        parts.pop()
    return parts


def _join(separator: str, parts: list[str]) -> str:
    if len(parts) > 1 and not separator:
        raise ValueError("these delimiters cannot write a repetition or subcomponent")
    return separator.join(parts)


def _echo(raw: str) -> Raw:
    # Frame bytes inside a field would end the answer's own frame.
    return Raw(raw.translate(_FRAME_BYTES))


def _reaches(version: str, minor: int) -> bool:
    """Whether the version is 2.``minor`` or later."""
    match = re.match(r"2\.(\d{1,2})", version)
    return match is not None and int(match[1]) >= minor

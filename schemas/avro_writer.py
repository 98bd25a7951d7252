"""Avro writers compiled from a schema: one Python function each, the same bytes as fastavro, several times faster.

Supports what our schemas use: records, strings, bytes, ints and longs, ``["null", X]`` unions, arrays and maps of
strings. Anything else is refused when the schema is compiled, not when an event is written. A record field is read as
an attribute of the same name; a record inside an array is read by position (our headers are tuples).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

_SMALL = 4096
_FOURTEEN = (1 << 14) - 1
_TEXTS = 4096
"""Repeated texts kept in their written form by one writer."""


def encode_long(number: int) -> bytes:
    """Zigzag variable-length coding of an integer of at most 64 bits. Raises ``ValueError`` beyond."""
    if 0 <= number < 1 << 41:  # an amount, or a time until the year 2039: two or three pieces made beforehand
        rest = number << 1
        if rest <= _FOURTEEN:
            return _ENDS[rest]
        high = rest >> 14
        if high <= _FOURTEEN:
            return _PIECES[rest & _FOURTEEN] + _ENDS[high]
        return _PIECES[rest & _FOURTEEN] + _PIECES[high & _FOURTEEN] + _ENDS[high >> 14]
    return _encode_any_long(number)


def _encode_any_long(number: int) -> bytes:
    if not -(1 << 63) <= number < 1 << 63:
        raise ValueError("not a 64-bit integer")
    rest = (number << 1) ^ (number >> 63)
    coded = bytearray()
    while rest > 0x7F:
        coded.append((rest & 0x7F) | 0x80)
        rest >>= 7
    coded.append(rest)
    return bytes(coded)


_PIECES = tuple(bytes((piece & 0x7F | 0x80, piece >> 7 | 0x80)) for piece in range(_FOURTEEN + 1))
"""Fourteen bits with more to come."""
_ENDS = tuple(bytes((end,)) if end <= 0x7F else bytes((end & 0x7F | 0x80, end >> 7)) for end in range(_FOURTEEN + 1))
"""The last bits."""
_NUMBERS = tuple(encode_long(number) for number in range(_SMALL))


class SchemaUnsupported(Exception):
    """The schema uses a type that cannot be compiled."""


class _Texts(dict[str, bytes]):
    """Written forms of texts that come again and again; begins anew when there are too many."""

    def __missing__(self, text: str) -> bytes:
        data = text.encode()
        if len(self) >= _TEXTS:
            self.clear()
        written = self[text] = encode_long(len(data)) + data
        return written


def compile_writer(
    schema: Mapping[str, Any], prefix: bytes = b"", *, repeated: Collection[str] = ()
) -> Callable[[Any], bytes]:
    """A function from an event to ``prefix`` and its Avro body.

    ``repeated`` names text fields with few different values (a facility, a currency), which are written faster; a wrong
    guess costs time only. The function raises ``TypeError``, ``AttributeError`` or ``ValueError`` for a value that does
    not fit.
    """
    compiler = _Compiler(frozenset(repeated))
    compiler.write(schema, "event")
    compiler.flush()
    source = "\n".join(["def write(event):", "    out = [prefix]", *compiler.lines, "    return b''.join(out)"])
    names: dict[str, Any] = {"prefix": prefix, "numbers": _NUMBERS, "long": encode_long, "texts": _Texts()}
    exec(compile(source, f"<avro writer of {schema['name']}>", "exec"), names)  # noqa: S102 - made from our own schema
    writer: Callable[[Any], bytes] = names["write"]
    return writer


class _Compiler:
    """Emits statements; values of one straight run are collected and added to the output in one go."""

    def __init__(self, repeated: frozenset[str]) -> None:
        self._repeated = repeated
        self.lines: list[str] = []
        self._named: dict[str, Mapping[str, Any]] = {}
        self._depth = 1
        self._counter = 0
        self._run: list[str] = []

    def write(self, schema: Any, value: str, *, positional: bool = False) -> None:
        """Statements that write ``value``, an expression, with a schema."""
        if isinstance(schema, list):
            self._write_optional(schema, value)
            return
        kind = schema if isinstance(schema, str) else schema["type"]
        if isinstance(kind, (dict, list)):
            self.write(kind, value)
        elif kind in self._named or kind == "record":
            self._write_record(self._named.get(kind, schema), value, positional=positional)
        elif kind == "string":
            self._write_bytes(self._assign(f"{value}.encode()"))
        elif kind == "bytes":
            self._write_bytes(value)
        elif kind in ("int", "long"):
            self._run.append(_say_number(value))
        elif kind == "map" and schema["values"] == "string":
            self._write_block(value, "for key, text in {}.items():", [("string", "key"), ("string", "text")])
        elif kind == "array":
            item = self._name()
            self._write_block(value, f"for {item} in {{}}:", [(schema["items"], item)])
        else:
            raise SchemaUnsupported(str(kind))

    def flush(self) -> None:
        """Emit what was collected."""
        if self._run:
            self._add(f"out += ({', '.join(self._run)},)")
            self._run.clear()

    def _write_record(self, schema: Mapping[str, Any], value: str, *, positional: bool) -> None:
        self._named[schema["name"]] = schema
        for position, field in enumerate(schema["fields"]):
            part = f"{value}[{position}]" if positional else f"{value}.{field['name']}"
            if field["type"] == "string" and field["name"] in self._repeated:
                self._run.append(self._assign(f"texts[{part}]"))
            else:
                self.write(field["type"], self._assign(part))

    def _write_bytes(self, value: str) -> None:
        size = self._assign(f"len({value})")
        self._run += [_say_number(size), value]

    def _write_optional(self, union: list[Any], value: str) -> None:
        if len(union) != 2 or union[0] != "null":
            raise SchemaUnsupported("a union other than null and one type")
        self.flush()
        self._add(f"if {value} is None:")
        self._add("    out.append(b'\\x00')")
        self._add("else:")
        self._depth += 1
        self._run.append("b'\\x02'")
        self.write(union[1], value)
        self.flush()
        self._depth -= 1

    def _write_block(self, value: str, loop: str, parts: list[tuple[Any, str]]) -> None:
        self.flush()
        self._add(f"if {value}:")
        self._depth += 1
        self._run.append(_say_number(self._assign(f"len({value})")))
        self.flush()
        self._add(loop.format(value))
        self._depth += 1
        for schema, part in parts:
            self.write(schema, part, positional=True)
        self.flush()
        self._depth -= 2
        self._run.append("b'\\x00'")

    def _assign(self, expression: str) -> str:
        name = self._name()
        self._add(f"{name} = {expression}")
        return name

    def _name(self) -> str:
        self._counter += 1
        return f"v{self._counter}"

    def _add(self, line: str) -> None:
        self.lines.append("    " * self._depth + line)


def _say_number(value: str) -> str:
    return f"numbers[{value}] if 0 <= {value} < {_SMALL} else long({value})"

"""A source mapping as Python code: one function per event type, for the ordinary event.

``Program.read`` gives what ``SourceMapping.read`` would give, or None: then the body is not ordinary (a failure, card
data was redacted in it, a text with odd escapes), and the caller asks ``SourceMapping.read``, which alone decides
failures. So the code here only has to be right when it answers.

    what is read of a body ── mapping_layout    expressions ── mapping_statements    functions of event types ── here
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from schemas.failure import Failure
from schemas.mapping_expressions import EVALUATION_ERRORS
from schemas.mapping_layout import Member, build_decoder
from schemas.mapping_reading import LATEST_MS, Reason, Skipped
from schemas.mapping_statements import Statements, View
from schemas.money import EXPONENTS, LARGEST_MINOR, Money, read_major

if TYPE_CHECKING:
    from collections.abc import Callable, Hashable, Mapping

    from schemas.events import Kind
    from schemas.mapping_expressions import Expression
    from schemas.mapping_reading import Attribute, Rule, Sister, SourceMapping

    Fact = tuple[int, str, str, str, Money, str, str, int, str | None, dict[str, str], Any, dict[str, Any]]
    Attach = Callable[[Any, dict[str, str]], dict[str, str] | None]

FACT: Final = (
    "rule",  # place of the rule in ``Program.rules``
    "event_type",
    "source_event_id",
    "status",
    "money",
    "object_id",
    "root",
    "occurred_at",
    "token_reference",
    "attributes",
    "focus",  # what overlays read; only for ``Program.overlays``
    "metadata",
)
"""Members of a fact as ``Program.read`` gives it: a plain tuple in this order."""

_DIGITS: Final = 4300  # msgspec refuses longer integers, but not in members that it skips
_WINDOW: Final = 16
_CURRENCIES: Final = {name: (code, exponent) for code, exponent in EXPONENTS.items() for name in (code, code.lower())}


class MappingNotCompiled(Exception):
    """The mapping cannot become code; the interpreter reads its events. The text says why."""


class NotOrdinary(Exception):
    """The interpreter decides this body."""


NOT_ORDINARY: Final = (Failure, NotOrdinary, msgspec.MsgspecError, *EVALUATION_ERRORS)
"""Whatever goes wrong in the code of a mapping means: ask the interpreter."""


@dataclass(frozen=True, slots=True)
class Program:
    """A compiled source mapping and the overlays it was compiled with."""

    read: Callable[[bytes], Fact | Skipped | None]
    """The fact of a body (members: ``FACT``), why it is none, or None: ask ``SourceMapping.read``."""
    rules: tuple[Rule, ...]
    overlays: Mapping[Hashable, Mapping[Kind, Attach]]
    """Per overlay and kind: adds its attributes to those of a fact and returns them, or None: ask the interpreter."""


def compile_mapping(
    mapping: SourceMapping, overlays: Mapping[Hashable, tuple[Attribute, ...]] | None = None
) -> Program:
    """Compile a mapping, with attributes of overlays that read the same bodies. Raises ``MappingNotCompiled``."""
    builder = _Builder(mapping, overlays or {})
    try:
        builder.write()  # the first time only to see which members are read
        decoder = build_decoder(builder.body)
        builder.write()
        names = builder.names | {"decode": decoder.decode}
        code = "\n".join(builder.lines)
        exec(compile(code, f"<mapping {mapping.source}>", "exec"), names)  # noqa: S102 - made from linted expressions
    except (SyntaxError, RecursionError, MemoryError, TypeError, ValueError) as error:
        raise MappingNotCompiled(f"{type(error).__name__}: {error}") from None
    handlers: dict[str, Any] = names["handlers"]
    handlers |= {event_type: names[function] for event_type, function in builder.handlers.items()}
    attached = {key: {kind: names[name] for kind, name in kinds.items()} for key, kinds in builder.attached.items()}
    return Program(names["read"], tuple(builder.rules), attached)


def has_long_number(body: bytes) -> bool:
    """Whether a body may hold an integer that the decoder refuses: one that long covers a probe."""
    limit = min(sys.get_int_max_str_digits() or _DIGITS, _DIGITS)
    return any(body[at : at + _WINDOW].isdigit() for at in range(0, len(body), limit // 2))


def as_text(value: Any) -> str:
    """Text of a whole number; whole numbers are ids too."""
    if type(value) is int:
        return str(value)
    raise NotOrdinary


def as_attribute(value: Any) -> str:
    """Text of a whole number, true or false."""
    return ("true" if value else "false") if type(value) is bool else as_text(value)


class _Builder:
    """Writes the functions of one mapping. ``body`` and what is inside it remember every member that is read."""

    def __init__(self, mapping: SourceMapping, overlays: Mapping[Hashable, tuple[Attribute, ...]]) -> None:
        self._mapping = mapping
        self._overlays = overlays
        self.body = Member()

    def write(self) -> None:
        """Write everything anew."""
        self.names: dict[str, Any] = {
            "NOT_ORDINARY": NOT_ORDINARY,
            "LIMIT": min(sys.get_int_max_str_digits() or _DIGITS, _DIGITS),
            "has_long_number": has_long_number,
            "handlers": {},
            "Skipped": Skipped,
            "Money": Money,
            "EVIDENCE": Reason.EVIDENCE,
            "UNKNOWN_TYPE": Reason.UNKNOWN_TYPE,
            "currencies": _CURRENCIES,
            "read_major": read_major,
            "as_text": as_text,
            "as_attribute": as_attribute,
        }
        self.lines: list[str] = []
        self.rules: list[Rule] = []
        self.handlers: dict[str, str] = {}
        self.attached: dict[Hashable, dict[Kind, str]] = {}
        self._write_read()
        mapping = self._mapping
        for event_type in dict.fromkeys((*mapping.rules, *mapping.evidence, *mapping.not_money)):
            if "redacted]" in event_type or not event_type.strip():
                continue  # bodies of such a type are failures
            name = self.handlers[event_type] = f"read_{len(self.handlers)}"
            self._write_handler(name, event_type)
        for key, attributes in self._overlays.items():
            self.attached[key] = {}
            for kind in dict.fromkeys(rule.kind for rule in self.rules):
                name = self.attached[key][kind] = f"attach_{len(self.attached)}_{kind.value}"
                self._write_overlay(name, attributes, kind)

    def _write_read(self) -> None:
        out = Statements(self.names)
        with out.block("try:"):
            # The decoder does not look into what it skips; these are all that it then would not refuse.
            with out.block("if not body.isascii():"):
                out.add("body.decode()")
            with out.block("if len(body) >= LIMIT and has_long_number(body):"):
                out.add("return None")
            out.add("data = decode(body)")
            out.sure.add("data")
            found = out.evaluate(self._mapping.event_type, View("data", self.body))
            with out.block(f"if {found}.__class__ is str and {found} in handlers:"):
                out.add(f"return handlers[{found}](data)")
            event_type = _Fields(out).check_text(found)
            out.add(f"handler = handlers.get({event_type})")
            out.add(f"return Skipped(UNKNOWN_TYPE, {event_type}) if handler is None else handler(data)")
        with out.block("except NOT_ORDINARY:"):
            out.add("return None")
        self._close("def read(body):", out)

    def _write_handler(self, name: str, event_type: str) -> None:
        out = Statements(self.names)
        out.sure.add("data")
        data = View("data", self.body)
        for rule in self._mapping.rules.get(event_type, ()):
            place = len(self.rules)
            self.rules.append(rule)
            if rule.when is None:
                self._write_fact(out, rule, place, event_type, data)
                break
            truth = _Fields(out).is_true(rule.when, self._focus(out, data))
            with out.block(f"if {truth}:"):
                self._write_fact(out, rule, place, event_type, data)
        else:
            self._write_skipped(out, event_type, data)
        self._close(f"def {name}(data):", out)

    def _write_skipped(self, out: Statements, event_type: str, data: View) -> None:
        sister = self._mapping.evidence.get(event_type)
        if sister is not None:
            self._write_evidence(out, sister, event_type, data)
            return
        known = event_type in self._mapping.not_money
        skipped = Skipped(Reason.NOT_MONEY if known else Reason.UNKNOWN_TYPE, event_type)
        out.add(f"return {out.hold(skipped, 'skipped')}")

    def _write_evidence(self, out: Statements, sister: Sister, event_type: str, data: View) -> None:
        nameless = out.hold(Skipped(Reason.EVIDENCE, event_type), "skipped")
        if sister.object_id is not None:
            named = out.evaluate(sister.object_id, self._focus(out, data))
            with out.block(f"if {named}.__class__ is str and {named}:"):
                out.add(f"return Skipped(EVIDENCE, {event_type!r}, {sister.kind!r}, {named})")
        out.add(f"return {nameless}")

    def _write_fact(self, out: Statements, rule: Rule, place: int, event_type: str, data: View) -> None:
        focus = self._focus(out, data)
        fields = _Fields(out)
        moment = (
            out.evaluate(self._mapping.occurred_at, data)
            if rule.occurred_at is None
            else out.evaluate(rule.occurred_at, focus)
        )
        with out.block(f"if {moment}.__class__ is not int or not 0 < {moment} < {LATEST_MS}:"):
            out.add("return None")
        metadata = "{}"
        if self._mapping.metadata is not None:
            found = out.evaluate(self._mapping.metadata, focus)
            metadata = out.assign(f"{found} if isinstance({found}, dict) else {{}}")
        values = {
            "rule": str(place),
            "event_type": repr(event_type),
            "source_event_id": fields.read_text(self._mapping.event_id, data),
            "status": fields.read_text(rule.status, focus),
            "money": fields.read_money(rule, focus),
            "object_id": fields.read_text(rule.object_id, focus),
            "root": fields.read_text(rule.root, focus),
            "occurred_at": moment,
            "token_reference": fields.read_optional_text(rule.token_reference, focus),
            "attributes": fields.read_attributes(rule.attributes, focus, rule.kind),
            "focus": focus.name,
            "metadata": metadata,
        }
        out.add(f"return ({', '.join(values[name] for name in FACT)})")

    def _write_overlay(self, name: str, attributes: tuple[Attribute, ...], kind: Kind) -> None:
        out = Statements(self.names)
        path = self._mapping.object.path
        member: Member | None = None
        if path is not None:
            member = out.walk(View("data", self.body), path, whole=False).member
            out.lines.clear()
        out.sure.add("focus")
        with out.block("try:"):
            _Fields(out).add_attributes(attributes, View("focus", member), kind, "attributes")
            out.add("return attributes")
        with out.block("except NOT_ORDINARY:"):
            out.add("return None")
        self._close(f"def {name}(focus, attributes):", out)

    def _focus(self, out: Statements, data: View) -> View:
        path = self._mapping.object.path
        if path is None:
            found = View(out.share("focus", lambda: out.evaluate(self._mapping.object, data)), None)
        else:
            found = out.walk(data, path, whole=False)
        return View(out.share("focus checked", lambda: self._check_focus(out, found)), found.member)

    @staticmethod
    def _check_focus(out: Statements, focus: View) -> str:
        if focus.member is None or focus.member.whole:
            condition = f"{focus.name} is None"
        elif focus.member.struct is None:  # the first time, when members are only collected
            condition = "False"
        else:
            condition = f"{focus.name}.__class__ is not {out.name_struct(focus.member.struct)}"
            out.sure.add(focus.name)
        with out.block(f"if {condition}:"):
            out.add("return None")
        return focus.name

    def _close(self, head: str, out: Statements) -> None:
        self.lines += [head, *out.lines, ""]


class _Fields:
    """Statements of single fields. ``return None`` in them means: ask the interpreter."""

    def __init__(self, out: Statements) -> None:
        self._out = out

    def is_true(self, expression: Expression, view: View) -> str:
        """Condition that JMESPath takes the value for true."""
        name = self._out.evaluate(expression, view)
        return f"{name} is not None and ({name} or not is_false({name}))"

    def read_text(self, expression: Expression, view: View) -> str:
        """Text that must be there."""
        name = self._out.evaluate(expression, view)
        return self._out.share(("text", name), lambda: self.check_text(name))

    def read_optional_text(self, expression: Expression | None, view: View) -> str:
        """Text or None."""
        if expression is None:
            return "None"
        out = self._out
        found = out.evaluate(expression, view)
        name = out.assign(found)
        with out.block(f"if {found} is not None:"):
            with out.block(f"if {found}.__class__ is not str:"):
                out.add(f"{name} = as_text({found})")
            with out.block(f"if 'redacted]' in {name}:"):
                out.add("return None")
            with out.block(f"if not {name} or {name}.isspace():"):
                out.add(f"{name} = None")
        return name

    def read_money(self, rule: Rule, focus: View) -> str:
        """Money of a rule, its sign checked."""
        out = self._out
        amount = out.evaluate(rule.amount, focus)
        currency = out.evaluate(rule.currency, focus)
        if rule.decimal:
            amount = out.assign(f"str({amount}) if {amount}.__class__ is int else {amount}")
            money = out.assign(f"read_major({amount}, {currency})")
            if not rule.may_be_negative:
                with out.block(f"if {money}.minor <= 0:"):
                    out.add("return None")
            return money
        least = -LARGEST_MINOR if rule.may_be_negative else 1
        with out.block(f"if {amount}.__class__ is not int or not {least} <= {amount} <= {LARGEST_MINOR}:"):
            out.add("return None")
        pair = out.assign(f"currencies[{currency}]")
        return out.assign(f"Money({amount}, {pair}[0], {pair}[1])")

    def read_attributes(self, attributes: tuple[Attribute, ...], view: View, kind: Kind) -> str:
        """A new dict of the attributes that apply to a kind."""
        name = self._out.assign("{}")
        self.add_attributes(attributes, view, kind, name)
        return name

    def add_attributes(self, attributes: tuple[Attribute, ...], view: View, kind: Kind, target: str) -> None:
        """Add the attributes that apply to a kind."""
        out = self._out
        for attribute in attributes:
            if attribute.kinds and kind not in attribute.kinds:
                continue
            found = out.evaluate(attribute.expression, view)
            place = f"{target}[{attribute.name!r}]"
            if attribute.required:
                text = out.assign(f"{found} if {found}.__class__ is str else as_attribute({found})")
                out.add(f"{place} = {out.share(('text', text), lambda text=text: self.check_text(text))}")  # type: ignore[misc]
                continue
            with out.block(f"if {found} is not None:"):
                text = out.assign(f"{found} if {found}.__class__ is str else as_attribute({found})")
                with out.block(f"if {text}:"):
                    out.add(f"{place} = {text}")

    def check_text(self, found: str) -> str:
        """Text of a value that must be there."""
        out = self._out
        name = out.assign(f"{found} if {found}.__class__ is str else as_text({found})")
        with out.block(f"if not {name} or 'redacted]' in {name} or {name}.isspace():"):
            out.add("return None")
        return name

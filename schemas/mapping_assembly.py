"""From a source mapping file or an overlay file to its compiled form: lint everything, then run the examples."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

import msgspec

from schemas.events import Kind
from schemas.failure import Failure
from schemas.mapping_expressions import Expression, ExpressionError
from schemas.mapping_files import MappingError, MappingFile, read_mapping_file, suggest
from schemas.mapping_functions import MappingFunctions
from schemas.mapping_lint import lint
from schemas.mapping_reading import Attribute, Reading, Rule, Sister, SourceMapping, read_attributes
from schemas.mapping_source import SETTLEMENTS, TOPICS, OverlayFile, RuleFields, SourceFile
from schemas.money import Money

if TYPE_CHECKING:
    from collections.abc import Mapping
    from pathlib import Path

    from schemas.mapping_source import AttributeRule, EventRule, Example

    Where = tuple[str | int, ...]

_NEEDED: Final = ("topic", "currency", "status", "object_id", "root")
_IDENTIFYING_FACTS: Final = frozenset({"kind", "object_id", "minor", "currency"})


@dataclass(frozen=True, slots=True)
class Overlay:
    """One facility's own attributes, by source."""

    facility: str
    digest: str
    """Sha256 of the file's bytes, in hex."""
    attributes: Mapping[str, tuple[Attribute, ...]]


def load_source(path: Path) -> SourceMapping:
    """Read, lint and try a source mapping. Raises ``MappingError`` with every problem."""
    document = read_mapping_file(path)
    mapping = assemble_source(document)
    if mapping is None or document.problems:
        raise MappingError(document.problems)
    return mapping


def load_overlay(path: Path) -> Overlay:
    """Read, lint and try an overlay. Raises ``MappingError`` with every problem."""
    document = read_mapping_file(path)
    overlay = assemble_overlay(document)
    if overlay is None or document.problems:
        raise MappingError(document.problems)
    return overlay


def assemble_source(document: MappingFile) -> SourceMapping | None:
    """Compile a parsed source mapping; None when it cannot be, with the problems noted in ``document``."""
    declared = document.validate(SourceFile)
    if declared is None:
        return None
    workshop = Workshop(document, declared.tables)
    defaults = workshop.compile_defaults(declared.defaults)
    rules: dict[str, tuple[Rule, ...]] = {}
    for event_type, parts in declared.events.items():
        built = [
            workshop.build_rule(part, declared.defaults, defaults, ("events", event_type, position))
            for position, part in enumerate(parts)
        ]
        rules[event_type] = tuple(rule for rule in built if rule is not None)
        _check_fates(document, declared, event_type)
    _check_lists(document, declared)
    envelope = declared.envelope
    event_type_, event_id, occurred_at, focus = (
        workshop.compile(text, where)
        for text, where in (
            (envelope.type, ("envelope", "type")),
            (envelope.id, ("envelope", "id")),
            (envelope.occurred_at, ("envelope", "occurred_at")),
            (declared.object, ("object",)),
        )
    )
    metadata = None if declared.metadata is None else workshop.compile(declared.metadata, ("metadata",))
    evidence = {
        name: Sister(
            kind=sister.of.value if sister.of else "",
            object_id=None
            if sister.object_id is None
            else workshop.compile(sister.object_id, ("evidence", name, "object_id")),
        )
        for name, sister in declared.evidence.items()
    }
    if document.problems or event_type_ is None or event_id is None or occurred_at is None or focus is None:
        return None
    mapping = SourceMapping(
        source=declared.source,
        version=declared.version,
        digest=hashlib.sha256(document.content).hexdigest(),
        event_type=event_type_,
        event_id=event_id,
        occurred_at=occurred_at,
        object=focus,
        metadata=metadata,
        facts=declared.facts,
        rules=rules,
        evidence=evidence,
        not_money=frozenset(declared.not_money),
    )
    for position, example in enumerate(declared.examples):
        _try_source_example(document, mapping, example, position)
    return mapping


def assemble_overlay(document: MappingFile) -> Overlay | None:
    """Compile a parsed overlay; None when it cannot be, with the problems noted in ``document``."""
    declared = document.validate(OverlayFile)
    if declared is None:
        return None
    attributes: dict[str, tuple[Attribute, ...]] = {}
    for source, part in declared.sources.items():
        workshop = Workshop(document, part.tables)
        attributes[source] = workshop.compile_attributes(part.attributes, ("sources", source, "attributes"))
    if document.problems:
        return None
    for source, part in declared.sources.items():
        for position, example in enumerate(part.examples):
            where = ("sources", source, "examples", position)
            kind = example.given.get("kind", Kind.CAPTURE.value)
            got: Mapping[str, Any]
            try:
                got = read_attributes(attributes[source], example.given.get("object"), Kind(kind))
            except ValueError:
                document.add((*where, "given", "kind"), f"`{kind}` is not a kind.", suggest(str(kind), Kind))
                continue
            except Failure as failure:
                got = {"failure": failure.code, "field": failure.field}
            compare_example(document, example, got, where, whole=True)
    return Overlay(declared.facility, hashlib.sha256(document.content).hexdigest(), attributes)


def compare_example(
    document: MappingFile, example: Example, got: Mapping[str, Any], where: Where, *, whole: bool
) -> None:
    """Note each member of ``then`` that differs; with ``whole`` also each result that ``then`` does not name."""
    for name, rest in (("failure", "field"), ("ignored", "event_type")):
        if name in got and name not in example.then:
            detail = f"Example `{example.name}` gives {name} {got[name]} ({got[rest] or 'body'})."
            document.add((*where, "then"), detail, "Correct the mapping or the example.")
            return
    for name, wanted in example.then.items():
        if name not in got:
            document.add(
                (*where, "then", name),
                f"Example `{example.name}` wants `{name}`, which the result does not have.",
                suggest(name, got),
            )
        elif type(got[name]) is not type(wanted) or got[name] != wanted:
            document.add(
                (*where, "then", name),
                f"Example `{example.name}` gives {got[name]!r}, not {wanted!r}.",
                "Correct the mapping or the example.",
            )
    for name in got if whole and "failure" not in got else ():
        if name not in example.then:
            document.add(
                (*where, "then"),
                f"Example `{example.name}` also gives `{name}`.",
                "Name it in `then`, or drop it from the mapping.",
            )


class Workshop:
    """Compiles and lints the expressions of one file, noting problems with their place."""

    def __init__(self, document: MappingFile, tables: Mapping[str, Mapping[str, str]]) -> None:
        self._document = document
        self._tables = tables
        self._functions = MappingFunctions(tables)

    def compile(self, text: str, where: Where) -> Expression | None:
        """Compile an expression over raw JSON; None after noting a problem."""
        try:
            expression = Expression(text, self._functions)
        except ExpressionError as error:
            self._document.add(where, f"`{text}` is {error}.", "See jmespath.org for the grammar.")
            return None
        issues = lint(expression.parsed, tables=self._tables).issues
        for detail, remedy in issues:
            self._document.add(where, detail, remedy)
        return None if issues else expression

    def compile_attributes(self, rules: Mapping[str, AttributeRule], where: Where) -> tuple[Attribute, ...]:
        """Compile attributes; those with problems are left out."""
        found = []
        for name, rule in rules.items():
            place = (*where, name)
            expression = self.compile(rule.expr, place)
            if expression is not None:
                found.append(Attribute(name, expression, rule.required, rule.sensitivity == "phi", rule.kinds))
        return tuple(found)

    def compile_defaults(self, defaults: RuleFields) -> dict[str, Expression | None]:
        """Compile the expressions of ``defaults`` once, so that each problem is noted once."""
        names = ("minor", "major", "currency", "status", "object_id", "root", "occurred_at", "token_reference")
        return {
            name: self.compile(text, ("defaults", name))
            for name in names
            if (text := getattr(defaults, name)) is not None
        }

    def build_rule(
        self, rule: EventRule, defaults: RuleFields, compiled: Mapping[str, Expression | None], where: Where
    ) -> Rule | None:
        """Merge a rule with the defaults and compile it; None after noting problems."""
        noted = len(self._document.problems)

        def pick(name: str) -> Expression | None:
            text = getattr(rule, name)
            return compiled.get(name) if text is None else self.compile(text, (*where, name))

        # An amount of the rule itself replaces the default amount, whichever unit that one has.
        own_amount = rule.minor is not None or rule.major is not None
        amounts = rule if own_amount else defaults
        if (amounts.minor is None) is (amounts.major is None):
            self._document.add(
                (*where, "minor"),
                "A rule needs one amount: `minor` or `major`.",
                "Give `minor` for whole minor units, or `major` for decimal text.",
            )
        for name in _NEEDED:
            if getattr(rule, name) is None and getattr(defaults, name) is None:
                self._document.add((*where, name), f"The rule has no `{name}`.", "Give it here or in `defaults`.")
        topic = rule.topic or defaults.topic
        if topic is not None and topic not in TOPICS:
            self._document.add((*where, "topic"), f"`{topic}` is not a topic of money events.", suggest(topic, TOPICS))
        decimal = amounts.major is not None
        amount = pick("major" if decimal else "minor")
        currency, status, object_id, root = (pick(name) for name in _NEEDED[1:])
        occurred_at, token_reference = pick("occurred_at"), pick("token_reference")
        when = None if rule.when is None else self.compile(rule.when, (*where, "when"))
        attributes = self.compile_attributes(defaults.attributes | rule.attributes, (*where, "attributes"))
        if topic == SETTLEMENTS and any(part.phi for part in attributes):
            detail = f"The topic `{SETTLEMENTS}` holds no protected health information."
            self._document.add((*where, "attributes"), detail, "Remove the attribute marked phi.")
        negative = defaults.may_be_negative if rule.may_be_negative is None else rule.may_be_negative
        if len(self._document.problems) > noted or amount is None or currency is None or status is None:
            return None
        if topic is None or object_id is None or root is None:
            return None
        return Rule(
            kind=rule.kind,
            topic=topic,
            when=when,
            amount=amount,
            decimal=decimal,
            may_be_negative=bool(negative),
            currency=currency,
            status=status,
            object_id=object_id,
            root=root,
            occurred_at=occurred_at,
            token_reference=token_reference,
            attributes=attributes,
        )


def _check_fates(document: MappingFile, declared: SourceFile, event_type: str) -> None:
    """Every type that has rules must be a fact or, where conditions fail, declared as something else."""
    rules = declared.events[event_type]
    open_ended = all(rule.when is not None for rule in rules)
    elsewhere = event_type in declared.evidence or event_type in declared.not_money
    where = ("events", event_type)
    if open_ended and not elsewhere:
        detail = "Nothing says what this event is when no `when` holds."
        document.add(where, detail, "Name the type in `evidence` or `not_money` too.")
    if not open_ended and elsewhere:
        document.add(where, "This type always is a money fact, yet it is in another list.", "Keep one of the two.")
    if any(rule.when is None for rule in rules[:-1]):
        document.add(where, "A rule without `when` hides the rules after it.", "Put it last.")


def _check_lists(document: MappingFile, declared: SourceFile) -> None:
    for name in declared.not_money:
        if name in declared.evidence:
            document.add(("evidence", name), "This type is in `evidence` and in `not_money`.", "Keep one of the two.")
    for name, sister in declared.evidence.items():
        if (sister.of is None) is not (sister.object_id is None):
            document.add(("evidence", name), "`of` and `object_id` go together.", "Give both or neither.")
    missing = _IDENTIFYING_FACTS - set(declared.facts)
    if missing:
        names = ", ".join(sorted(missing))
        document.add(("facts",), f"The digest needs {names}.", "Only `status` and `root` may be left out.")


def _try_source_example(document: MappingFile, mapping: SourceMapping, example: Example, position: int) -> None:
    if not example.then:
        detail = f"Example `{example.name}` expects nothing, so it cannot fail."
        document.add(("examples", position, "then"), detail, "Name what the body gives.")
    try:
        found = mapping.read(msgspec.json.encode(example.given))
    except Failure as failure:
        got: dict[str, Any] = {"failure": failure.code, "field": failure.field}
    else:
        got = found.outline()
        if isinstance(found, Reading):
            got["amount"] = Money(found.money.minor, found.money.currency, found.money.exponent).major()
    compare_example(document, example, got, ("examples", position), whole=False)

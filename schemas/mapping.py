"""Declarative mappings: users' fields from JMESPath expressions in YAML, linted at load, with examples that run.

The only door to jmespath and YAML. Three kinds of file, told apart by their members:

* ``events``: a source mapping, raw gateway bodies to money facts (``load_source``; run by ``streams.normalise``)
* ``sources``: a facility's overlay with its own attributes (``load_overlay``)
* ``fields``: a field mapping, canonical events to a target's fields (``FieldMapping``; run by sinks)

    Expression ── mapping_expressions    functions ── mapping_functions    lint ── mapping_lint
    YAML with lines, problems ── mapping_files    source files ── mapping_source, _assembly, _reading
    source mappings as code, for the hot path ── mapping_compiler, _statements, _layout
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import msgspec
from pydantic import Field

from schemas.failure import Failure, FailureKind
from schemas.mapping_assembly import (
    Overlay,
    assemble_overlay,
    assemble_source,
    compare_example,
    load_overlay,
    load_source,
)
from schemas.mapping_compiler import MappingNotCompiled, compile_mapping
from schemas.mapping_expressions import Expression, ExpressionError
from schemas.mapping_files import MappingError, MappingFile, Part, Problem, read_mapping_file, suggest
from schemas.mapping_functions import FUNCTIONS, MappingFunctions
from schemas.mapping_lint import Schema, lint, list_paths
from schemas.mapping_reading import Attribute, Reading, Reason, Skipped, SourceMapping
from schemas.mapping_source import Example
from schemas.wire import SCHEMA_NAMES, load_schema

if TYPE_CHECKING:
    from collections.abc import Collection, Iterable, Iterator, Mapping, Sequence
    from pathlib import Path

__all__ = [
    "FUNCTIONS",
    "Attribute",
    "Expression",
    "ExpressionError",
    "FieldMapping",
    "MappingError",
    "MappingFunctions",
    "Overlay",
    "Problem",
    "Reading",
    "Reason",
    "Skipped",
    "SourceMapping",
    "build_view",
    "check_files",
    "describe_compilation",
    "list_paths",
    "load_overlay",
    "load_source",
    "preview_bodies",
    "preview_events",
]


class FieldRule(Part):
    """One field of a target: its name there, the expression, whether it must have a value."""

    to: str = Field(min_length=1)
    expr: str
    required: bool = False


class FieldFile(Part):
    """A field mapping file. ``accepts_phi`` states that the target may be sent protected health information."""

    event: str
    target: str
    accepts_phi: bool = False
    members: tuple[str, ...] = ()
    """What the view holds beside the event, for example ``facility``."""
    tables: dict[str, dict[str, str]] = Field(default_factory=dict)
    fields: list[FieldRule] = Field(min_length=1)
    examples: list[Example] = Field(min_length=1)


class FieldOverlayFile(Part):
    """An overlay of a field mapping: adds fields or replaces ones that are not required."""

    target: str
    overlay: bool = Field(description="Always true: tells the file from a whole mapping.")
    tables: dict[str, dict[str, str]] = Field(default_factory=dict)
    fields: list[FieldRule] = Field(min_length=1)
    examples: list[Example] = Field(min_length=1)


@dataclass(frozen=True, slots=True)
class _Field:
    to: str
    expression: Expression
    required: bool


@dataclass(frozen=True, slots=True)
class FieldMapping:
    """Compiled fields of a target."""

    target: str
    fields: tuple[_Field, ...]

    @classmethod
    def load(
        cls,
        path: Path,
        overlay: Path | None = None,
        *,
        schema: str | Mapping[str, Any] | None = None,
        members: Collection[str] = (),
        accepts_phi: bool | None = None,
        phi_attributes: Collection[str] = (),
    ) -> FieldMapping:
        """Read, lint and try a field mapping and its overlay. Raises ``MappingError`` with every problem at once.

        ``schema`` is an Avro record or the name of one of ours; default: the file's ``event``. ``members`` are names
        the view holds beside the event. ``accepts_phi`` False refuses PHI whatever the file says; the file's own word
        holds when it is None. ``phi_attributes`` are attribute names that a source mapping declared as PHI.
        """
        documents = [read_mapping_file(path)]
        if overlay is not None:
            documents.append(read_mapping_file(overlay))
        builder = _FieldBuilder(documents, members, accepts_phi, phi_attributes)
        mapping = builder.build(schema)
        problems = [problem for document in documents for problem in document.problems]
        if mapping is None or problems:
            raise MappingError(problems)
        return mapping

    def apply(self, view: Mapping[str, Any]) -> dict[str, Any]:
        """The target's fields from a JSON view of an event (see ``build_view``); null results are left out.

        Raises ``Failure`` UNMAPPED FIELD_MISSING when a required field is null or empty text, INVALID FIELD_INVALID
        when a function meets a type it does not take.
        """
        found: dict[str, Any] = {}
        for part in self.fields:
            try:
                value = part.expression.evaluate(view)
            except ExpressionError:
                raise Failure(FailureKind.INVALID, "FIELD_INVALID", part.to) from None
            if part.required and (value is None or value == ""):  # 0 and false are values
                raise Failure(FailureKind.UNMAPPED, "FIELD_MISSING", part.to)
            if value is not None:
                found[part.to] = value
        return found


def build_view(event: msgspec.Struct, **members: Any) -> dict[str, Any]:
    """JSON view of an event for expressions, with ``members`` beside it. Money is whole minor units, never a float."""
    view: dict[str, Any] = msgspec.to_builtins(event)
    return view | members


def check_files(paths: Iterable[Path]) -> list[Problem]:
    """Lint mapping files of every kind and run their examples; all problems, in the order of files and lines."""
    found: list[Problem] = []
    for path in paths:
        document = read_mapping_file(path)
        members = document.data if isinstance(document.data, dict) else {}
        if "events" in members:
            assemble_source(document)
        elif "sources" in members:
            assemble_overlay(document)
        elif "fields" in members:
            _FieldBuilder([document], (), None, ()).build(None)
        elif not document.problems:
            document.add(
                (), "Not a mapping file.", "It has `events` (source), `sources` (overlay) or `fields` (target)."
            )
        found.extend(sorted(document.problems, key=lambda problem: problem.line))
    return found


def describe_compilation(paths: Iterable[Path]) -> dict[str, str]:
    """Of every source mapping that is right: ``yes``, or why its events are interpreted, which is several times slower.

    Both ways give the same events (``schemas.mapping_compiler``).
    """
    found: dict[str, str] = {}
    for path in paths:
        document = read_mapping_file(path)
        if not isinstance(document.data, dict) or "events" not in document.data:
            continue
        mapping = assemble_source(document)
        if mapping is None or document.problems:
            continue
        try:
            compile_mapping(mapping)
        except MappingNotCompiled as reason:
            found[str(path)] = f"no: {reason}"
        else:
            found[str(path)] = "yes"
    return found


def preview_bodies(path: Path, bodies: Iterable[bytes]) -> Iterator[dict[str, Any]]:
    """What a source mapping makes of raw bodies: outlines, or ``failure`` and ``field``. Raises ``MappingError``."""
    mapping = load_source(path)
    for body in bodies:
        try:
            yield mapping.read(body).outline()
        except Failure as failure:
            yield {"failure": failure.code, "field": failure.field}


def preview_events(mapping: FieldMapping, views: Iterable[Mapping[str, Any]]) -> Iterator[dict[str, Any]]:
    """What a field mapping makes of events: its fields, or ``failure`` and ``field``."""
    for view in views:
        try:
            yield mapping.apply(view)
        except Failure as failure:
            yield {"failure": failure.code, "field": failure.field}


class _FieldBuilder:
    """Builds one field mapping from a file and, as the second document, its overlay."""

    def __init__(
        self,
        documents: Sequence[MappingFile],
        members: Collection[str],
        accepts_phi: bool | None,  # noqa: FBT001 - three states, passed on from a keyword
        phi_attributes: Collection[str],
    ) -> None:
        self._documents = documents
        self._members = frozenset(members)
        self._accepts_phi = accepts_phi
        self._phi_attributes = phi_attributes

    def build(self, schema: str | Mapping[str, Any] | None) -> FieldMapping | None:
        document = self._documents[0]
        if isinstance(document.data, dict) and "overlay" in document.data:
            return self._check_lone_overlay(document)
        base = document.validate(FieldFile)
        extra = self._documents[1].validate(FieldOverlayFile) if len(self._documents) > 1 else None
        if base is None or (len(self._documents) > 1 and extra is None):
            return None
        avro = self._find_schema(base.event if schema is None else schema, document)
        if avro is None:
            return None
        checked = Schema(avro, members=self._members | set(base.members), phi_attributes=self._phi_attributes)
        accepts = base.accepts_phi and self._accepts_phi is not False
        fields = self._compile(document, base.fields, base.tables, checked, accepts=accepts)
        mapping = FieldMapping(base.target, tuple(fields.values()))
        if not document.problems:
            _try_examples(document, mapping, base.examples)
        if extra is not None:
            self._check_overlay(base, extra)
            tables = base.tables | extra.tables
            fields |= self._compile(self._documents[1], extra.fields, tables, checked, accepts=accepts)
            mapping = FieldMapping(base.target, tuple(fields.values()))
            if not self._documents[1].problems:
                _try_examples(self._documents[1], mapping, extra.examples)
        return mapping

    @staticmethod
    def _check_lone_overlay(document: MappingFile) -> None:
        # Without its mapping there is no schema to hold it against; its form and functions can be checked.
        extra = document.validate(FieldOverlayFile)
        if extra is not None:
            _compile_fields(document, extra.fields, extra.tables, None)

    @staticmethod
    def _find_schema(schema: str | Mapping[str, Any], document: MappingFile) -> Mapping[str, Any] | None:
        if not isinstance(schema, str):
            return schema
        if schema not in SCHEMA_NAMES:
            document.add(("event",), f"There is no event schema `{schema}`.", suggest(schema, SCHEMA_NAMES))
            return None
        avro: Mapping[str, Any] = json.loads(load_schema(schema))
        return avro

    @staticmethod
    def _compile(
        document: MappingFile,
        rules: Sequence[FieldRule],
        tables: Mapping[str, Mapping[str, str]],
        schema: Schema,
        *,
        accepts: bool,
    ) -> dict[str, _Field]:
        compiled = _compile_fields(document, rules, tables, schema)
        for position, to, phi in compiled.phi:
            if phi and not accepts:
                document.add(
                    ("fields", position),
                    f"`{to}` reads protected health information, and this target does not accept it.",
                    "Leave the field out, or let the target and the file declare `accepts_phi`.",
                )
        return compiled.fields

    def _check_overlay(self, base: FieldFile, extra: FieldOverlayFile) -> None:
        document = self._documents[1]
        required = {rule.to for rule in base.fields if rule.required}
        if extra.target != base.target:
            document.add(("target",), f"The mapping is of `{base.target}`.", "Use the overlay of that target.")
        for position, rule in enumerate(extra.fields):
            if rule.to in required:
                document.add(
                    ("fields", position),
                    f"`{rule.to}` is required by the mapping; an overlay may not replace it.",
                    "Choose another field.",
                )


@dataclass(frozen=True, slots=True)
class _Compiled:
    fields: dict[str, _Field]
    phi: list[tuple[int, str, bool]]


def _compile_fields(
    document: MappingFile,
    rules: Sequence[FieldRule],
    tables: Mapping[str, Mapping[str, str]],
    schema: Schema | None,
) -> _Compiled:
    functions = MappingFunctions(tables)
    compiled = _Compiled({}, [])
    for position, rule in enumerate(rules):
        where = ("fields", position, "expr")
        if rule.to in compiled.fields:
            document.add(("fields", position), f"`{rule.to}` is there twice.", "Keep one of them.")
        try:
            expression = Expression(rule.expr, functions)
        except ExpressionError as error:
            document.add(where, f"`{rule.to}`: `{rule.expr}` is {error}.", "See jmespath.org for the grammar.")
            continue
        finding = lint(expression.parsed, tables=tables, schema=schema)
        for detail, remedy in finding.issues:
            document.add(where, f"`{rule.to}`: {detail}", remedy)
        compiled.phi.append((position, rule.to, finding.reads_phi))
        compiled.fields[rule.to] = _Field(rule.to, expression, rule.required)
    return compiled


def _try_examples(document: MappingFile, mapping: FieldMapping, examples: Sequence[Example]) -> None:
    for position, example in enumerate(examples):
        got = next(preview_events(mapping, [example.given]))
        compare_example(document, example, got, ("examples", position), whole=True)

"""Checks expressions before any event meets them: functions, their arguments, paths, protected health information.

JMESPath itself accepts a misspelt path or function and answers null or fails at the first event. The linter walks the
syntax tree beside the Avro schema instead. Without a schema (raw bodies of a gateway) it checks functions only.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Final

from schemas.mapping_files import suggest
from schemas.mapping_functions import REFUSED, MappingFunctions

if TYPE_CHECKING:
    from collections.abc import Callable, Collection, Mapping

    Node = dict[str, Any]

_JSON_TYPES: Final[Mapping[str, str]] = {
    "string": "string", "enum": "string", "bytes": "string", "fixed": "string",
    "int": "number", "long": "number", "float": "number", "double": "number",
    "boolean": "boolean", "null": "null", "record": "object", "map": "object", "array": "array",
}  # fmt: skip
_ITEM_FUNCTIONS: Final = frozenset({"map", "sort_by", "min_by", "max_by"})


@dataclass(frozen=True, slots=True)
class Shape:
    """What is known of a value: its possible Avro types (None when unknown), and whether it may hold PHI."""

    types: tuple[Any, ...] | None
    phi: bool = False


_UNKNOWN = Shape(None)


class Schema:
    """An Avro record schema as the linter reads it.

    ``members`` names what a view holds beside the record (its inside is not checked); ``phi_attributes`` names the
    entries of map fields that a mapping declared as PHI.
    """

    def __init__(
        self, avro: Mapping[str, Any], *, members: Collection[str] = (), phi_attributes: Collection[str] = ()
    ) -> None:
        self._named: dict[str, Any] = {}
        self._collect(avro)
        self.members = frozenset(members)
        self.phi_attributes = frozenset(phi_attributes)
        self.root = avro

    @property
    def shape(self) -> Shape:
        """Shape of a whole event."""
        return Shape((self.root,))

    def resolve(self, avro: Any, *, phi: bool = False) -> Shape:
        """Shape of a field's type: unions opened, names looked up."""
        branches = avro if isinstance(avro, list) else [avro]
        types = tuple(self._named.get(branch, branch) if isinstance(branch, str) else branch for branch in branches)
        return Shape(types, phi)

    def holds_phi(self, avro: Any) -> bool:
        """Whether a value of this type has PHI anywhere inside."""
        if isinstance(avro, list):
            return any(self.holds_phi(branch) for branch in avro)
        avro = self._named.get(avro, avro) if isinstance(avro, str) else avro
        kind = read_kind(avro)
        if kind == "record":
            return any(part.get("sensitivity") == "phi" or self.holds_phi(part["type"]) for part in avro["fields"])
        if kind == "map":
            return bool(self.phi_attributes) or self.holds_phi(avro["values"])
        return kind == "array" and self.holds_phi(avro["items"])

    def _collect(self, avro: Any) -> None:
        if isinstance(avro, list):
            for branch in avro:
                self._collect(branch)
        elif isinstance(avro, dict):
            if isinstance(avro.get("type"), dict | list):
                self._collect(avro["type"])
            if "name" in avro and avro.get("type") in {"record", "enum", "fixed"}:
                self._named[avro["name"]] = avro
            for part in avro.get("fields", ()):
                self._collect(part["type"])
            self._collect(avro.get("items"))
            self._collect(avro.get("values"))


def read_kind(avro: Any) -> str:
    """Avro type name of a resolved type: ``record``, ``map``, ``string``; logical types by their base."""
    while isinstance(avro, dict):
        avro = avro["type"]
    return str(avro)


@dataclass(slots=True)
class Finding:
    """What linting one expression found: ``issues`` as (detail, remedy); ``reads_phi`` when its value may hold PHI."""

    issues: list[tuple[str, str]] = field(default_factory=list)
    reads_phi: bool = False


def lint(parsed: Node, *, tables: Collection[str] = (), schema: Schema | None = None) -> Finding:
    """Check one parsed expression; all issues at once."""
    linter = _Linter(schema, tables)
    linter.consume(parsed, schema.shape if schema else _UNKNOWN)
    return linter.finding


def list_paths(parsed: Node) -> list[tuple[str, ...]]:
    """Member paths an expression reads from the root, as far as they are plain; ``()`` stands for all of it.

    ``a.b || c`` gives ``a.b`` and ``c``; ``a[?x].b`` gives ``a``, because what follows may be anything.
    """
    if parsed["type"] == "literal":
        return []
    if parsed["type"] == "field":
        return [(parsed["value"],)]
    if parsed["type"] in {"current", "identity"}:
        return [()]
    children = parsed["children"]
    if parsed["type"] == "subexpression":
        heads = list_paths(children[0])
        plain = all(child["type"] == "field" for child in children[1:]) and _is_plain(children[0])
        tail = tuple(child["value"] for child in children[1:]) if plain else ()
        return [(*head, *tail) for head in heads]
    if parsed["type"] in {"pipe", "index_expression", "projection", "value_projection", "filter_projection", "flatten"}:
        return list_paths(children[0])
    return [path for child in children for path in list_paths(child)] if parsed["type"] != "slice" else [()]


def _is_plain(node: Node) -> bool:
    if node["type"] == "subexpression":
        return all(_is_plain(child) for child in node["children"])
    return node["type"] in {"field", "current"}


class _Linter:
    def __init__(self, schema: Schema | None, tables: Collection[str]) -> None:
        self.schema = schema
        self.tables = tables
        self.finding = Finding()

    def consume(self, node: Node, shape: Shape) -> Shape:
        """Visit a node whose whole value is used: a record used whole counts with all it holds."""
        found = self.visit(node, shape)
        whole = self.schema is not None and found.types is not None and any(map(self.schema.holds_phi, found.types))
        if found.phi or whole:
            self.finding.reads_phi = True
        return found

    def visit(self, node: Node, shape: Shape) -> Shape:
        visitor: Callable[[Node, Shape], Shape] | None = getattr(self, f"_visit_{node['type']}", None)
        if visitor is not None:
            return visitor(node, shape)
        for child in node["children"]:
            self.consume(child, shape)
        return _UNKNOWN

    def _visit_current(self, _node: Node, shape: Shape) -> Shape:
        return shape

    _visit_identity = _visit_current

    def _visit_literal(self, _node: Node, _shape: Shape) -> Shape:
        return _UNKNOWN

    def _visit_field(self, node: Node, shape: Shape) -> Shape:
        name = node["value"]
        if shape.types is None or self.schema is None:
            return Shape(None, shape.phi)
        known: set[str] = set()
        for avro in shape.types:
            kind = read_kind(avro)
            if kind == "map":
                return self.schema.resolve(avro["values"], phi=shape.phi or name in self.schema.phi_attributes)
            if kind != "record":
                continue
            for part in avro["fields"]:
                if part["name"] == name:
                    return self.schema.resolve(part["type"], phi=shape.phi or part.get("sensitivity") == "phi")
                known.add(part["name"])
            if avro is self.schema.root:
                if name in self.schema.members:
                    return _UNKNOWN
                known |= self.schema.members
        detail = f"`{name}` is not a member of the schema at this place."
        self.finding.issues.append((detail, suggest(name, known) if known else "The value before it has no members."))
        return _UNKNOWN

    def _visit_chain(self, node: Node, shape: Shape) -> Shape:
        for child in node["children"]:
            shape = self.visit(child, shape)
        return shape

    _visit_subexpression = _visit_chain
    _visit_pipe = _visit_chain
    _visit_index_expression = _visit_chain

    def _visit_index(self, _node: Node, shape: Shape) -> Shape:
        return self._item(shape)

    def _visit_slice(self, _node: Node, shape: Shape) -> Shape:
        return shape

    def _visit_flatten(self, node: Node, shape: Shape) -> Shape:
        return self.visit(node["children"][0], shape)

    def _visit_projection(self, node: Node, shape: Shape) -> Shape:
        left, right = node["children"]
        return self._project(self.visit(left, shape), right)

    def _visit_filter_projection(self, node: Node, shape: Shape) -> Shape:
        left, right, condition = node["children"]
        base = self.visit(left, shape)
        self.consume(condition, self._item(base))
        return self._project(base, right)

    def _visit_value_projection(self, node: Node, shape: Shape) -> Shape:
        left, right = node["children"]
        base = self.consume(left, shape)
        self.consume(right, _UNKNOWN)
        return Shape(None, base.phi)

    def _visit_comparator(self, node: Node, shape: Shape) -> Shape:
        for child in node["children"]:
            self.consume(child, shape)
        return Shape(("boolean",))

    def _visit_not_expression(self, node: Node, shape: Shape) -> Shape:
        self.consume(node["children"][0], shape)
        return Shape(("boolean",))

    def _visit_expref(self, node: Node, shape: Shape) -> Shape:
        self.consume(node["children"][0], shape)
        return _UNKNOWN

    def _visit_function_expression(self, node: Node, shape: Shape) -> Shape:
        name, arguments = node["value"], node["children"]
        items = _UNKNOWN
        shapes = []
        for argument in arguments:
            if argument["type"] == "expref":
                continue
            found = self.consume(argument, shape)
            shapes.append((argument, found))
            items = self._item(found) if name in _ITEM_FUNCTIONS else items
        for argument in arguments:
            if argument["type"] == "expref":
                self.visit(argument, items)
        self._check_call(name, arguments, {id(argument): found for argument, found in shapes})
        return _UNKNOWN

    def _check_call(self, name: str, arguments: list[Node], shapes: Mapping[int, Shape]) -> None:
        issues = self.finding.issues
        if name in REFUSED:
            issues.append(
                (f"`{name}()` is refused: {REFUSED[name]}.", "Use the integer minor units or `major(money)`.")
            )
            return
        entry = MappingFunctions.FUNCTION_TABLE.get(name)
        if entry is None:
            issues.append((f"There is no function `{name}()`.", suggest(name, MappingFunctions.FUNCTION_TABLE)))
            return
        signature: tuple[Mapping[str, Any], ...] = entry["signature"]
        variadic = bool(signature) and bool(signature[-1].get("variadic"))
        if len(arguments) < len(signature) or (len(arguments) > len(signature) and not variadic):
            wanted = f"{'at least ' if variadic else ''}{len(signature)}"
            issues.append(
                (
                    f"`{name}()` takes {wanted} argument(s), here are {len(arguments)}.",
                    "docs/mappings.md lists the functions.",
                )
            )
            return
        for position, (argument, accepted) in enumerate(zip(arguments, signature, strict=False), 1):
            given = _json_types(argument, shapes.get(id(argument), _UNKNOWN))
            taken = {kind.partition("-")[0] for kind in accepted["types"]}
            if given and taken and not given & taken:
                issues.append(
                    (
                        f"Argument {position} of `{name}()` is {' or '.join(sorted(given))}.",
                        f"It takes {' or '.join(sorted(taken))}.",
                    )
                )
        if name == "lookup":
            self._check_table(arguments[1])

    def _check_table(self, argument: Node) -> None:
        if argument["type"] != "literal":
            self.finding.issues.append(
                ("`lookup()` takes the name of a table in quotes.", "Write `lookup(key, 'table')`.")
            )
        elif argument["value"] not in self.tables:
            name = str(argument["value"])
            self.finding.issues.append((f"There is no table `{name}` in `tables`.", suggest(name, self.tables)))

    def _project(self, base: Shape, right: Node) -> Shape:
        found = self.visit(right, self._item(base))
        if found.types is None:
            return Shape(None, found.phi or base.phi)
        return Shape(({"type": "array", "items": list(found.types)},), found.phi or base.phi)

    def _item(self, shape: Shape) -> Shape:
        if shape.types is None or self.schema is None:
            return Shape(None, shape.phi)
        for avro in shape.types:
            if read_kind(avro) == "array":
                return self.schema.resolve(avro["items"], phi=shape.phi)
        self.finding.issues.append(
            ("An index or projection is used on a value that is no list.", "Name a member instead.")
        )
        return _UNKNOWN


def _json_types(argument: Node, shape: Shape) -> set[str]:
    if argument["type"] == "expref":
        return {"expref"}
    if argument["type"] == "literal":
        value = argument["value"]
        names = {str: "string", bool: "boolean", int: "number", float: "number", list: "array", dict: "object"}
        return {names.get(type(value), "null")}
    return set() if shape.types is None else {_JSON_TYPES[read_kind(avro)] for avro in shape.types}

"""Expressions as Python statements: straight-line code that reads the decoded body.

The same expression gives the same value as ``Expression.evaluate``, for every body (a property test compares). What has
no statement of its own here (projections, filters, multi-selects) is left to the expression's closures.
"""

from __future__ import annotations

from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Final

from schemas.mapping_expressions import is_false, read_path

if TYPE_CHECKING:
    from collections.abc import Callable, Generator

    from schemas.mapping_expressions import Expression
    from schemas.mapping_layout import Member

    Node = dict[str, Any]

_CLASSES: Final = {
    "string": (str,),
    "number": (int, float),
    "boolean": (bool,),
    "array": (list,),
    "object": (dict,),
    "null": (type(None),),
}
# What ``MappingFunctions`` does for the arguments of nearly every event, without a call.
_INLINE: Final = {
    "id_of": "{0} if {0}.__class__ is str or {0} is None else {call}",
    "epoch_ms": "{0} * 1000 if {0}.__class__ is int else {call}",
}


@dataclass(frozen=True, slots=True)
class View:
    """A variable that expressions read. ``member`` is its place in the body, None for plain JSON data."""

    name: str
    member: Member | None


class Statements:
    """Collects the statements of one function. Variables are ``v1``, ``v2``...; ``names`` are the globals it needs."""

    def __init__(self, names: dict[str, Any]) -> None:
        self.lines: list[str] = []
        self.names = names
        names["is_false"] = is_false
        self.sure: set[str] = set()
        """Variables that are known to hold the struct of their member."""
        self._depth = 1
        self._counter = 0
        self._known: dict[Any, str] = {}

    def add(self, line: str) -> None:
        """One statement."""
        self.lines.append("    " * self._depth + line)

    @contextmanager
    def block(self, head: str) -> Generator[None]:
        """Statements under ``head``; what they computed is not known after them."""
        self.add(head)
        known = dict(self._known)
        self._depth += 1
        yield
        self._depth -= 1
        self._known = known

    def assign(self, value: str) -> str:
        """A new variable."""
        self._counter += 1
        self.add(f"v{self._counter} = {value}")
        return f"v{self._counter}"

    def share(self, key: Any, compute: Callable[[], str]) -> str:
        """The variable of ``key`` when it was computed before in every case that leads here, else a new one."""
        name = self._known.get(key)
        if name is None:
            name = self._known[key] = compute()
        return name

    def hold(self, value: Any, prefix: str) -> str:
        """Name of an object that the statements use."""
        name = f"{prefix}{len(self.names)}"
        self.names[name] = value
        return name

    def evaluate(self, expression: Expression, view: View) -> str:
        """Statements that compute an expression over a view; the variable or literal that holds its value."""
        return _Writer(self, expression).write(expression.parsed, view)

    def walk(self, view: View, path: tuple[str, ...], *, whole: bool = True) -> View:
        """Statements that read a dotted path; the value is used ``whole``, or only members inside it."""
        name, member = view.name, view.member
        for place, part in enumerate(path):
            key = (view.name, path[: place + 1])
            if member is None or member.whole:
                if member is not None:
                    member.find(part)
                member, step = None, f"{name}.get({part!r}) if isinstance({name}, dict) else None"
            else:
                inner = member.find(part)
                step = f"{name}.{member.attribute(part)}"
                if name not in self.sure and member.struct is not None:
                    step += f" if {name}.__class__ is {self.name_struct(member.struct)} else None"
                member = inner
            name = self.share(key, lambda step=step: self.assign(step))  # type: ignore[misc]
        if whole and member is not None:
            member.whole = True
            member = None
        return View(name, member)

    def name_struct(self, struct: type[Any]) -> str:
        """Name of a struct that the statements compare with."""
        self.names[struct.__name__] = struct
        return struct.__name__


class _Writer:
    """Writes the statements of one expression."""

    def __init__(self, statements: Statements, expression: Expression) -> None:
        self._out = statements
        self._expression = expression

    def write(self, node: Node, view: View) -> str:
        path = read_path(node)
        if path is not None:
            return self._out.walk(view, path).name
        writer: Callable[[Node, View], str] | None = getattr(self, f"_write_{node['type']}", None)
        return self._leave(node, view) if writer is None else writer(node, view)

    def _leave(self, node: Node, view: View) -> str:
        name = self._write_current(node, view)
        closure = self._out.hold(self._expression.build_closure(node), "closure")
        return self._out.assign(f"{closure}({name})")

    def _write_current(self, _node: Node, view: View) -> str:
        return self._out.walk(view, ()).name

    _write_identity = _write_current

    def _write_literal(self, node: Node, _view: View) -> str:
        return self._out.hold(node["value"], "constant")

    def _write_chain(self, node: Node, view: View) -> str:
        first, *rest = node["children"]
        name = self.write(first, view)
        for child in rest:
            name = self.write(child, View(name, None))
        return name

    _write_subexpression = _write_chain
    _write_pipe = _write_chain
    _write_index_expression = _write_chain

    def _write_index(self, node: Node, view: View) -> str:
        name, place = self._write_current(node, view), int(node["value"])
        there = f"isinstance({name}, list) and -len({name}) <= {place} < len({name})"
        return self._out.assign(f"{name}[{place}] if {there} else None")

    def _write_or_expression(self, node: Node, view: View) -> str:
        return self._choose(node, view, "if {0} is None or (not {0} and is_false({0})):")

    def _write_and_expression(self, node: Node, view: View) -> str:
        return self._choose(node, view, "if {0} is not None and ({0} or not is_false({0})):")

    def _choose(self, node: Node, view: View, condition: str) -> str:
        left, right = node["children"]
        name = self._out.assign(self.write(left, view))
        with self._out.block(condition.format(name)):
            self._out.add(f"{name} = {self.write(right, view)}")
        return name

    def _write_not_expression(self, node: Node, view: View) -> str:
        name = self.write(node["children"][0], view)
        return self._out.assign(f"{name} is None or (not {name} and is_false({name}))")

    def _write_comparator(self, node: Node, view: View) -> str:
        if node["value"] not in {"eq", "ne"}:
            return self._leave(node, view)
        one, other = (self.write(child, view) for child in node["children"])
        # Python says 1 == True; JMESPath does not.
        same = f"({one} == {other} and isinstance({one}, bool) is isinstance({other}, bool))"
        return self._out.assign(same if node["value"] == "eq" else f"not {same}")

    def _write_function_expression(self, node: Node, view: View) -> str:
        if any(child["type"] == "expref" for child in node["children"]):
            return self._leave(node, view)
        arguments = [self.write(child, view) for child in node["children"]]
        name = node["value"]
        function = self._out.hold(_specialise(self._expression.functions, name), f"{name}_")
        call = f"{function}({', '.join(arguments)})"
        return self._out.assign(_INLINE[name].format(*arguments, call=call) if name in _INLINE else call)


def _specialise(functions: Any, name: str) -> Callable[..., Any]:
    """A function without JMESPath's own check of arguments, where the classes of the arguments are accepted ones."""
    entry = functions.FUNCTION_TABLE[name]
    signature, function = entry["signature"], entry["function"]
    accepted = tuple(_list_classes(part["types"]) for part in signature)
    wanted = len(accepted)
    variadic = bool(signature) and bool(signature[-1].get("variadic"))

    def call(*arguments: Any) -> Any:
        if len(arguments) == wanted or (variadic and len(arguments) > wanted):
            # As in JMESPath, what is beyond a variadic signature is left to the function.
            for argument, classes in zip(arguments, accepted, strict=False):
                if classes is not None and argument.__class__ not in classes:
                    break
            else:
                return function(functions, *arguments)
        return functions.call_function(name, list(arguments))

    return call


def _list_classes(types: list[str]) -> frozenset[type] | None:
    """Classes of the values a parameter takes, None for all; types such as `array-string` are left to JMESPath."""
    return frozenset(found for kind in types for found in _CLASSES.get(kind, ())) if types else None

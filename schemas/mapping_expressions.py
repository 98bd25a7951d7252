"""Mapping expressions: JMESPath, parsed once, evaluated fast.

Dotted paths, ``||``, ``&&``, ``!``, ``==``, literals, indexes and calls are turned into plain Python closures; all else
is left to JMESPath's own interpreter, node by node. Both give the same result for every JSON value (a property test
compares them).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Final

from jmespath import exceptions, visitor
from jmespath.parser import Parser

from schemas.mapping_functions import MappingFunctions

if TYPE_CHECKING:
    from collections.abc import Callable

    Evaluate = Callable[[Any], Any]
    Node = Any

_CHAINS: Final = frozenset({"subexpression", "pipe", "index_expression"})
EVALUATION_ERRORS: Final = (
    exceptions.JMESPathError,
    ArithmeticError,
    AttributeError,
    LookupError,
    OSError,
    RecursionError,
    TypeError,
    ValueError,
)
"""What evaluating an expression may raise when types do not fit."""


class ExpressionError(Exception):
    """An expression that cannot be parsed, or that a value's types do not fit. Never holds text of the value."""


class Expression:
    """A compiled expression. ``parsed`` is JMESPath's syntax tree, for the linter."""

    __slots__ = ("_compiler", "_evaluate", "functions", "parsed", "text")

    def __init__(self, text: str, functions: MappingFunctions | None = None) -> None:
        """Parse and compile. Raises ``ExpressionError`` with the position of a syntax error."""
        self.text = text
        try:
            self.parsed: Node = Parser().parse(text).parsed
        except (exceptions.JMESPathError, ValueError, RecursionError) as error:
            position = getattr(error, "lex_position", None)
            place = "" if position is None else f" at character {position + 1}"
            raise ExpressionError(f"not a JMESPath expression{place}") from None
        self.functions = functions or MappingFunctions()
        options = visitor.Options(custom_functions=self.functions)
        self._compiler = _Compiler(visitor.TreeInterpreter(options), self.functions)
        self._evaluate = self._compiler.compile(self.parsed)

    def __repr__(self) -> str:
        return f"Expression({self.text!r})"

    def evaluate(self, value: Any) -> Any:
        """Value of the expression over JSON data; null for what is not there.

        Raises ``ExpressionError`` when a function meets a type it does not take.
        """
        try:
            return self._evaluate(value)
        except EVALUATION_ERRORS as error:
            raise ExpressionError(type(error).__name__) from None

    def build_closure(self, node: Node) -> Evaluate:
        """The function that evaluates one node of ``parsed``. It raises what ``EVALUATION_ERRORS`` names."""
        return self._compiler.compile(node)

    @property
    def path(self) -> tuple[str, ...] | None:
        """Member names when the expression is a plain dotted path, else None. ``@`` is the empty path."""
        return () if self.parsed["type"] in {"current", "identity"} else read_path(self.parsed)


def is_false(value: Any) -> bool:
    """JMESPath's notion of false: null, false, and empty text, list or object. Zero is true."""
    return value is None or value is False or (not value and isinstance(value, str | list | dict))


def read_path(node: Node) -> tuple[str, ...] | None:
    """Member names of a node that is a plain dotted path, else None."""
    if node["type"] == "field":
        return (node["value"],)
    if node["type"] not in {"subexpression", "pipe"}:
        return None
    names: tuple[str, ...] = ()
    for child in node["children"]:
        part = read_path(child)
        if part is None:
            return None
        names += part
    return names


class _Compiler:
    """Turns syntax trees into closures; ``interpreter`` evaluates what has none."""

    def __init__(self, interpreter: visitor.TreeInterpreter, functions: Any) -> None:
        self._interpreter = interpreter
        self._functions = functions

    def compile(self, node: Node) -> Evaluate:
        path = read_path(node)
        if path is not None:
            return _compile_path(path)
        if node["type"] in _CHAINS:
            return _compile_chain(tuple(self.compile(child) for child in node["children"]))
        compiler = getattr(self, f"_compile_{node['type']}", None)
        return self._interpret(node) if compiler is None else compiler(node)

    def _interpret(self, node: Node) -> Evaluate:
        visit = self._interpreter.visit
        return lambda value: visit(node, value)

    def _compile_literal(self, node: Node) -> Evaluate:
        constant = node["value"]
        return lambda _value: constant

    def _compile_current(self, _node: Node) -> Evaluate:
        return lambda value: value

    _compile_identity = _compile_current

    def _compile_index(self, node: Node) -> Evaluate:
        position: int = node["value"]

        def pick(value: Any) -> Any:
            if not isinstance(value, list) or not -len(value) <= position < len(value):
                return None
            return value[position]

        return pick

    def _compile_or_expression(self, node: Node) -> Evaluate:
        left, right = (self.compile(child) for child in node["children"])

        def either(value: Any) -> Any:
            found = left(value)
            return right(value) if is_false(found) else found

        return either

    def _compile_and_expression(self, node: Node) -> Evaluate:
        left, right = (self.compile(child) for child in node["children"])

        def both(value: Any) -> Any:
            found = left(value)
            return found if is_false(found) else right(value)

        return both

    def _compile_not_expression(self, node: Node) -> Evaluate:
        inner = self.compile(node["children"][0])
        return lambda value: is_false(inner(value))

    def _compile_comparator(self, node: Node) -> Evaluate:
        if node["value"] not in {"eq", "ne"}:
            return self._interpret(node)
        left, right = (self.compile(child) for child in node["children"])
        wanted = node["value"] == "eq"

        def compare(value: Any) -> bool:
            one, other = left(value), right(value)
            # Python says 1 == True; JMESPath does not.
            same = one == other and isinstance(one, bool) is isinstance(other, bool)
            return same is wanted

        return compare

    def _compile_function_expression(self, node: Node) -> Evaluate:
        if any(child["type"] == "expref" for child in node["children"]):
            return self._interpret(node)
        arguments = tuple(self.compile(child) for child in node["children"])
        call, name = self._functions.call_function, node["value"]
        return lambda value: call(name, [argument(value) for argument in arguments])


def _compile_path(names: tuple[str, ...]) -> Evaluate:
    if len(names) == 1:
        (only,) = names
        return lambda value: value.get(only) if isinstance(value, dict) else None

    def walk(value: Any) -> Any:
        for name in names:
            if not isinstance(value, dict):
                return None
            value = value.get(name)
        return value

    return walk


def _compile_chain(steps: tuple[Evaluate, ...]) -> Evaluate:
    def run(value: Any) -> Any:
        for step in steps:
            value = step(value)
        return value

    return run

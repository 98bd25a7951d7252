"""What a mapping reads of a body, as msgspec types: the decoder builds these members and skips all others.

A member that some expression uses whole is plain JSON data; one that only leads to others is a generated struct. An
absent member is None, as null is: JMESPath does not tell them apart.
"""

from __future__ import annotations

from itertools import count
from typing import TYPE_CHECKING, Any

import msgspec

from schemas.mapping_reading import JSON_OPTIONS

if TYPE_CHECKING:
    from collections.abc import Iterator


class Member:
    """A member of a body: ``whole`` when its value is used, ``inside`` the members that are read in it."""

    __slots__ = ("inside", "struct", "whole")

    def __init__(self) -> None:
        self.whole = False
        self.inside: dict[str, Member] = {}
        self.struct: type[msgspec.Struct] | None = None
        """Set by ``settle`` for a member that only leads to others."""

    def find(self, name: str) -> Member:
        """The member of that name inside; from now on it counts as read."""
        return self.inside.setdefault(name, Member())

    def attribute(self, name: str) -> str:
        """Python name of a member of the struct; JSON names need not be identifiers."""
        return f"m{list(self.inside).index(name)}"

    def settle(self, numbers: Iterator[int]) -> Any:
        """The msgspec type of this member, once every expression has been seen; ``numbers`` name the structs."""
        if self.whole:
            return Any
        names = list(self.inside)
        self.struct = msgspec.defstruct(
            f"Object{next(numbers)}",
            [(f"m{place}", self.inside[name].settle(numbers), None) for place, name in enumerate(names)],
            rename={f"m{place}": name for place, name in enumerate(names)},
            gc=False,  # decoded JSON has no cycles
        )
        # Anything but an object is null to a path that goes on.
        return self.struct | str | int | float | bool | list[Any] | None


def build_decoder(root: Member) -> msgspec.json.Decoder[Any]:
    """Decoder of bodies. Raises ``msgspec.MsgspecError`` for what is no JSON object."""
    root.settle(count())
    return msgspec.json.Decoder(dict[str, Any] if root.struct is None else root.struct, **JSON_OPTIONS)

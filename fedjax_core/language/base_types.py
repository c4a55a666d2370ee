"""What all types have in common: their notation, and how one is compared with another."""

import abc
import functools
import re
from collections.abc import Iterator
from typing import NamedTuple, Self

from fedjax_core.errors import FederatedTypeError

PLAIN_NAME = re.compile(r"[^\W\d]\w*")

_MAX_SHOWN = 400


class Misfit(NamedTuple):
    """The first place at which one type does not fit another.

    Attributes:
      path: from the root of both types: `.name` and `[position]` for fields of structs, `[*]` for
        the elements of a sequence, `(parameter)` and `(result)` for those of a function.
      expected: what stands there in the target.
      got: what stands there in the source.
    """

    path: str
    expected: str
    got: str

    def inside(self, step: str) -> "Misfit":
        """The same misfit, seen from one level further up."""
        return self._replace(path=step + self.path)

    def turned(self) -> "Misfit":
        """The same misfit with the two sides exchanged."""
        return Misfit(self.path, self.got, self.expected)


class Type(abc.ABC):
    """Base of all types; `str(t)` is the compact notation, and `parse_type` its inverse.

    Types are immutable and hashable. `==` compares everything, the Python containers of structs
    among it; `is_equivalent_to` asks only whether values of one can stand for those of the other.
    """

    @abc.abstractmethod
    def __str__(self) -> str: ...

    def __repr__(self) -> str:
        return f"{type(self).__name__}({str(self)!r})"

    def __format__(self, spec: str) -> str:
        return format(str(self), spec)

    def formatted(self) -> str:
        """The notation with one field of a struct a line, indented by two spaces.

        Examples:
          >>> from fedjax_core.language.notation import parse_type
          >>> print(parse_type("{<x=float32[3],y=<>>*}@CLIENTS").formatted())
          {<
            x=float32[3],
            y=<>
          >*}@CLIENTS
        """
        return str(self)

    @abc.abstractmethod
    def misfit(self, source: "Type") -> Misfit | None:
        """Where a value of type `source` does not fit where `self` is expected; None if it does."""

    def children(self) -> Iterator["Type"]:
        """The types that this one is directly made of."""
        return iter(())

    def is_assignable_from(self, source: "Type") -> bool:
        """Whether a value of type `source` may be used where `self` is expected."""
        return self.misfit(source) is None

    def is_equivalent_to(self, other: "Type") -> bool:
        """Whether the two types are assignable in both directions, whatever their containers."""
        return self.is_assignable_from(other) and other.is_assignable_from(self)

    def check_assignable_from(self, source: "Type", what: str = "the value") -> Self:
        """Returns `self` if it is assignable from `source`.

        Args:
          source: the type of a value.
          what: names the value in the message.

        Raises:
          FederatedTypeError: naming both types, and the first place at which they do not fit.
        """
        found = self.misfit(source)
        if found is not None:
            raise FederatedTypeError(
                f"Expected {what} to be assignable to type {shorten(self)}, got type "
                f"{shorten(source)}{_describe(found)}."
            )
        return self

    def check_equivalent_to(self, other: "Type", what: str = "the value") -> Self:
        """Returns `self` if the types are equivalent. Arguments as of `check_assignable_from`.

        Raises:
          FederatedTypeError: naming both types, and the first place at which they differ.
        """
        found = self.misfit(other)
        if found is None and (reverse := other.misfit(self)) is not None:
            found = reverse.turned()
        if found is not None:
            raise FederatedTypeError(
                f"Expected {what} to be of a type equivalent to {shorten(self)}, got type "
                f"{shorten(other)}{_describe(found)}."
            )
        return self

    def contains(self, *kinds: "type[Type]") -> bool:
        """Whether this type, or one inside it, is an instance of one of `kinds`."""
        return any(issubclass(kind, kinds) for kind in self._kinds)

    @functools.cached_property
    def _kinds(self) -> "frozenset[type[Type]]":
        """The classes of this type and of those inside it."""
        return frozenset([type(self)]).union(*(child._kinds for child in self.children()))


def differs(target: Type, source: Type) -> Misfit:
    """The misfit of two types that differ at their roots."""
    return Misfit("", shorten(target), shorten(source))


def _describe(found: Misfit) -> str:
    if not found.path:
        return ""
    return f":{at_path(found.path)} expected {found.expected}, got {found.got}"


def at_path(path: str) -> str:
    """` at .params.w`, for messages; nothing for the root."""
    return f" at {shorten(path)}" if path else ""


def shorten(thing: object, limit: int = _MAX_SHOWN) -> str:
    """`str(thing)`, for messages: a long one without its middle.

    Examples:
      >>> shorten("float32" * 100, limit=20)
      'float32fl ... 2float32'
    """
    text = str(thing)
    half = (limit - 3) // 2
    return text if len(text) <= limit else f"{text[: half + 1]} ... {text[-half:]}"


def field_name(name: str) -> str:
    """The name of a field as types print it: as it is if it is an identifier, else quoted.

    Examples:
      >>> field_name("Dense_0"), field_name("Dense_0/kernel")
      ('Dense_0', "'Dense_0/kernel'")
    """
    return name if PLAIN_NAME.fullmatch(name) else repr(name)


def step_to(name: str | None, position: int) -> str:
    """The step from a struct to one of its fields, in the paths of messages.

    Examples:
      >>> step_to("w", 0), step_to("Dense_0/kernel", 0), step_to(None, 0)
      ('.w', "['Dense_0/kernel']", '[0]')
    """
    if name is None:
        return f"[{position}]"
    return f".{name}" if PLAIN_NAME.fullmatch(name) else f"[{name!r}]"

"""Calling by a typed interface: from what a user passes to arrays, and from arrays to results."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
from jax.core import Tracer

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language import feeding, inference
from fedjax_core.language.local import pack_types
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.program import Program, is_at_clients
from fedjax_core.language.tracing import Value
from fedjax_core.language.types import FederatedType, FunctionType, StructType, Type
from fedjax_core.language.values import Federated, Sequence


class Given(NamedTuple):
    """The arguments of one call.

    Attributes:
      leaves: for each of `Interface.leaves` its value: `Federated` where it is placed.
      num_clients: the size of the clients axis.
      is_lazy: whether results stay arrays, because the arguments were.
    """

    leaves: list[Any]
    num_clients: int
    is_lazy: bool


@dataclasses.dataclass(frozen=True)
class Interface:
    """What is known of something that can be called, apart from what it does.

    Attributes:
      name: for errors.
      parameter_names: of the arguments, as far as they have names.
      parameters: the types of the arguments.
      result: the type of the result.
      has_clients: whether it matters how many clients there are.
    """

    name: str
    parameter_names: tuple[str, ...]
    parameters: tuple[Type, ...]
    result: Type
    has_clients: bool

    @classmethod
    def of(cls, program: Program) -> "Interface":
        """The interface of a program."""
        names, parameters = program.parameter_names, program.argument_types
        has_clients = any(map(is_at_clients, program.ops))
        return cls(program.name, names, parameters, program.type_signature.result, has_clients)

    @property
    def type_signature(self) -> FunctionType:
        """The type of the whole."""
        return FunctionType(pack_types(self.parameter_names, self.parameters), self.result)

    @functools.cached_property
    def leaves(self) -> tuple[tuple[Type, str], ...]:
        """The arguments, structs of placed values taken apart: each with its type and its name."""
        named = enumerate(self.parameters)
        return tuple(leaf for k, t in named for leaf in _leaves_of_type(t, self._short_name(k)))

    def _short_name(self, index: int) -> str:
        names = self.parameter_names
        return names[index] if index < len(names) else f"argument_{index}"

    def take(self, args: Any, kwargs: Any, num_clients: int | None, valid: Any = None) -> Given:
        """Checks and converts the arguments of a call.

        Args:
          args: by position.
          kwargs: by name.
          num_clients: how many clients there are, where no argument tells.
          valid: which clients exist.

        Raises:
          FederatedTypeError: naming the argument that does not fit.
          ArgumentError: where the number of clients is unknown, or the arguments disagree on it.
        """
        count = len(self.parameters)
        args = feeding.bind_arguments(self.name, self.parameter_names, count, args, kwargs)
        given = [
            leaf
            for k, (arg, t) in enumerate(zip(args, self.parameters, strict=True))
            for leaf in feeding.leaves_of(arg, t, self._long_name(k))
        ]
        wanted = self.leaves
        placed = [
            _place(leaf, t, f"argument `{name}` of `{self.name}`")
            for leaf, (t, name) in zip(given, wanted, strict=True)
        ]
        sizes = _sizes(placed, wanted) | _listed(given, wanted)
        sizes |= {"valid": None if valid is None else len(valid), "num_clients": num_clients}
        return Given(placed, self._one_size(sizes), _is_lazy(given, wanted))

    def _long_name(self, index: int) -> str:
        return f"argument `{self._short_name(index)}` of `{self.name}`"

    def _one_size(self, sizes: dict[str, int | None]) -> int:
        """The number of clients that all agree on."""
        known = {name: size for name, size in sizes.items() if size is not None}
        stated = sizes["num_clients"]
        if stated is not None and (isinstance(stated, bool) or stated < 0):
            raise ArgumentError(f"Expected a number of clients of at least 0, got {stated!r}.")
        if len(set(known.values())) > 1:
            raise ArgumentError(
                f"`{self.name}` expected one number of clients, got {known}; pass values of the "
                "same clients."
            )
        if self.has_clients and not known:
            raise ArgumentError(
                f"`{self.name}` expected to know how many clients there are, and no argument says "
                "so; pass num_clients=."
            )
        return next(iter(known.values()), 0)


def is_stacked(t: Type) -> bool:
    """Whether values of type `t` have a clients axis."""
    return isinstance(t, FederatedType) and t.placement is CLIENTS and not t.all_equal


def to_user(result: Any, is_lazy: bool) -> Any:
    """A result as the arguments were: Python values and lists, or `Federated` values and arrays."""
    if is_lazy:
        return result

    def convert(x: Any) -> Any:
        return feeding.to_python(x) if isinstance(x, Federated) else feeding.to_host(x)

    return jax.tree.map(convert, result, is_leaf=lambda x: isinstance(x, Federated | Sequence))


def out_of_bounds(name: str, label: str, bounds: Any, where: str, counts: Any) -> ArgumentError:
    """The error for clients' values that are not within the bounds of a secure sum.

    Args:
      name: of the computation.
      label: of the edge.
      bounds: the smallest and the largest values allowed.
      where: the line of the operator.
      counts: how many were below and above.
    """
    lower, upper = map(list, bounds)
    below, above = map(int, counts)
    return ArgumentError(
        f"`{name}`: expected values from {lower} to {upper} for the secure sum {label!r} ({where}),"
        f" got {below} below and {above} above; clip them in federated_map, or pass "
        "report_clipped=True."
    )


def _leaves_of_type(t: Type, name: str) -> Iterator[tuple[Type, str]]:
    if not feeding.is_composite(t):
        yield t, name
        return
    assert isinstance(t, StructType)
    for position, (field, child) in enumerate(t.elements):
        yield from _leaves_of_type(child, f"{name}.{field}" if field else f"{name}[{position}]")


def _place(leaf: Any, t: Type, where: str) -> Any:
    if isinstance(leaf, Value):
        raise FederatedTypeError(
            f"{where}: expected a concrete value of type {t}, got a value of a computation's body; "
            "what was compiled cannot become part of another computation."
        )
    if isinstance(t, FederatedType):
        return feeding.to_placed(leaf, t, where)
    return feeding.to_member(leaf, t, where)


def _sizes(placed: list[Any], wanted: Any) -> dict[str, int | None]:
    return {
        name: feeding.num_clients_of(x)
        for x, (_, name) in zip(placed, wanted, strict=True)
        if isinstance(x, Federated)
    }


def _listed(given: list[Any], wanted: Any) -> dict[str, int | None]:
    """The number of clients where a list of values without arrays alone tells it."""
    return {
        name: len(leaf)
        for leaf, (t, name) in zip(given, wanted, strict=True)
        if is_stacked(t) and inference.is_empty(t) and isinstance(leaf, list | tuple)
    }


def _is_lazy(given: list[Any], wanted: Any) -> bool:
    """Whether the arguments were arrays or `Federated` values."""
    arrays = jax.tree.leaves(given)
    if any(isinstance(x, Tracer) for x in arrays):
        return True
    federated = [x for x, (t, _) in zip(given, wanted, strict=True) if isinstance(t, FederatedType)]
    if federated:
        return all(isinstance(x, Federated) for x in federated)
    return any(isinstance(x, jax.Array) for x in arrays)

"""Calling by a typed interface: from what a user passes to arrays, and from arrays to results."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any, NamedTuple

import jax
import numpy as np
from jax.core import Tracer

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language import feeding, inference, results
from fedjax_core.language.arguments import bind_arguments
from fedjax_core.language.local import pack_types
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.program import Program, goes_up, is_at_clients
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
        has_clients = any(is_at_clients(op) or goes_up(op) for op in program.ops)
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

    @functools.cached_property
    def places(self) -> tuple[str, ...]:
        """What errors call each of `leaves`."""
        return tuple(
            f"{self._place_of(k)}{name.removeprefix(self._short_name(k))}"
            for k, t in enumerate(self.parameters)
            for _, name in _leaves_of_type(t, self._short_name(k))
        )

    def _place_of(self, index: int) -> str:
        names = self.parameter_names
        called = f" `{names[index]}`" if index < len(names) else ""
        return f"argument {index}{called} of `{self.name}`"

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
        args = bind_arguments(self.name, self.parameter_names, count, args, kwargs)
        given = [
            leaf
            for k, (arg, t) in enumerate(zip(args, self.parameters, strict=True))
            for leaf in feeding.leaves_of(arg, t, self._place_of(k))
        ]
        wanted = [t for t, _ in self.leaves]
        fed = list(map(_feed, given, wanted, self.places))
        sizes = self._sizes(fed) | self._listed(given)
        num_clients = self._one_size(sizes, num_clients, valid)
        return Given(fed, num_clients, _is_lazy(given, wanted))

    def check(self, leaves: Any, num_clients: int | None = None, valid: Any = None) -> int:
        """Checks arguments that are placed already; returns the number of clients.

        Raises:
          FederatedTypeError: naming the argument that does not fit.
          ArgumentError: where the number of clients is unknown, or the arguments disagree on it.
        """
        if len(leaves) != len(self.leaves):
            raise FederatedTypeError(
                f"`{self.name}` expected {len(self.leaves)} arguments of type "
                f"{self.type_signature.parameter}, got {len(leaves)}; pass one for each."
            )
        for leaf, (t, _), place in zip(leaves, self.leaves, self.places, strict=True):
            _check(leaf, t, place)
        return self._one_size(self._sizes(leaves), num_clients, valid)

    def _sizes(self, fed: Any) -> dict[str, int | None]:
        """The number of clients in each argument that has some."""
        pairs = zip(self.places, fed, strict=True)
        return {place: results.num_clients_of(x) for place, x in pairs if isinstance(x, Federated)}

    def _listed(self, given: list[Any]) -> dict[str, int | None]:
        """The number of clients where a list of values without arrays alone tells it."""
        return {
            place: len(leaf)
            for leaf, (t, _), place in zip(given, self.leaves, self.places, strict=True)
            if is_stacked(t) and inference.is_empty(t) and isinstance(leaf, list | tuple)
        }

    def _one_size(
        self, sizes: dict[str, int | None], num_clients: int | None, valid: Any = None
    ) -> int:
        """The number of clients that all agree on."""
        if num_clients is not None:
            _check_count(self.name, num_clients)
        if valid is not None:
            _check_valid(self.name, valid)
        stated = {"valid": None if valid is None else len(valid), "num_clients": num_clients}
        known = {name: n for name, n in (sizes | stated).items() if n is not None}
        if len(set(known.values())) > 1:
            counts = ", ".join(f"{size} for {name}" for name, size in known.items())
            raise ArgumentError(
                f"`{self.name}` expected one number of clients, got {counts}; pass values of the "
                "same clients."
            )
        if self.has_clients and not known:
            raise ArgumentError(
                f"`{self.name}` expected to know how many clients there are, and no argument says "
                "so; pass num_clients=."
            )
        return next(iter(known.values()), 0)


def _check_count(name: str, num_clients: Any) -> None:
    is_count = isinstance(num_clients, int | np.integer) and not isinstance(num_clients, bool)
    if not (is_count and 0 <= num_clients < 1 << 31):
        raise ArgumentError(
            f"`{name}` expected a number of clients of at least 0, got {num_clients=}; pass an int "
            "of at most 31 bits."
        )


def _check_valid(name: str, valid: Any) -> None:
    is_array = isinstance(valid, np.ndarray | jax.Array)
    array = valid if is_array else np.asarray(valid)
    if array.ndim != 1 or (array.dtype.kind not in "biu" and array.size):
        raise ArgumentError(
            f"`{name}` expected `valid` to be a bool for each client, got {array.dtype}"
            f"{list(array.shape)}; pass an array of bools with one axis."
        )


def _check(leaf: Any, t: Type, place: str) -> None:
    if not isinstance(t, FederatedType):
        feeding.check_runtime(t, inference.infer_type(leaf), place)
        return
    if not isinstance(leaf, Federated):
        raise FederatedTypeError(
            f"{place}: expected a Federated value of type {t}, got {type(leaf).__name__}; wrap it "
            "in fc.Federated."
        )
    feeding.check_federated(leaf, t, place)


def is_stacked(t: Type) -> bool:
    """Whether values of type `t` have a clients axis."""
    return isinstance(t, FederatedType) and t.placement is CLIENTS and not t.all_equal


def to_user(result: Any, is_lazy: bool) -> Any:
    """A result as the arguments were: Python values and lists, or `Federated` values and arrays."""
    if is_lazy:
        return result

    def convert(x: Any) -> Any:
        return results.to_python(x) if isinstance(x, Federated) else results.to_host(x)

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


def _feed(leaf: Any, t: Type, where: str) -> Any:
    if isinstance(leaf, Value):
        raise FederatedTypeError(
            f"{where}: expected a concrete value of type {t}, got a value of a computation's body; "
            "what was compiled cannot become part of another computation."
        )
    if isinstance(t, FederatedType):
        return feeding.to_placed(leaf, t, where)
    return feeding.to_member(leaf, t, where)


def _is_lazy(given: list[Any], wanted: list[Type]) -> bool:
    """Whether the arguments were arrays or `Federated` values."""
    arrays = jax.tree.leaves(given)
    if any(isinstance(x, Tracer) for x in arrays):
        return True
    federated = [x for x, t in zip(given, wanted, strict=True) if isinstance(t, FederatedType)]
    if federated:
        return all(isinstance(x, Federated) for x in federated)
    return any(isinstance(x, jax.Array) for x in arrays)

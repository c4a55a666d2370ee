"""The parts that the program of a member function is made of: where values are to be, and maps."""

import dataclasses
from typing import Any, NamedTuple

import jax
from jax.extend import core as jex_core

from fedjax_core.language.placements import CLIENTS, SERVER, Placement
from fedjax_core.language.types import FederatedType, Type


class Home(NamedTuple):
    """Where a result of the program is to be; no placement for an unplaced one."""

    placement: Placement | None
    all_equal: bool

    @classmethod
    def of(cls, t: Type) -> "Home":
        """That of a value of type `t`."""
        return cls(t.placement, t.all_equal) if isinstance(t, FederatedType) else cls(None, True)

    def type(self, member: Type) -> Type:
        """The type of a value there."""
        if self.placement is None:
            return member
        return FederatedType(member, self.placement, self.all_equal)


AT_SERVER = Home(SERVER, True)
AT_CLIENTS = Home(CLIENTS, False)
EVERYWHERE = Home(CLIENTS, True)
UNPLACED = Home(None, True)


@dataclasses.dataclass(frozen=True, eq=False)
class Signature:
    """What a program is to look like from outside.

    Attributes:
      name: of the program.
      parameters: the type of each parameter.
      parameter_tree: the arguments' structure, with indices of `parameters` at the leaves.
      packed: the one type of all arguments.
      parameter_names: of the arguments.
      homes: of the results, in the order of the leaves of `result_tree`.
      result_tree: the result's structure, with indices of `homes` at the leaves.
    """

    name: str
    parameters: tuple[Type, ...]
    parameter_tree: Any
    packed: Type | None
    parameter_names: tuple[str, ...]
    homes: tuple[Home, ...]
    result_tree: Any


class Output(NamedTuple):
    """A pytree of atoms that a map has to give."""

    key: Any
    atoms: tuple[Any, ...]
    tree: Any


class Source(NamedTuple):
    """An operation whose value maps can take, with the variables of its leaves."""

    position: int
    leaves: tuple[Any, ...]
    tree: Any
    home: Home


class Piece(NamedTuple):
    """The work of one map.

    Attributes:
      name: for printing and profiles.
      jaxpr: on the leaves of the arguments.
      types: of the arguments.
      parameters: for each argument the index of the program's parameter that it is, else -1.
      trees: of the outputs; a map with several returns a tuple.
    """

    name: str
    jaxpr: jex_core.ClosedJaxpr
    types: tuple[Type, ...]
    parameters: tuple[int, ...]
    trees: tuple[Any, ...]

    def call(self, jaxpr: jex_core.ClosedJaxpr, args: tuple[Any, ...]) -> Any:
        """Evaluates `jaxpr`, this piece's or that of another capacity, on the arguments."""
        leaves = iter(jex_core.jaxpr_as_fun(jaxpr)(*jax.tree.leaves(args)))
        outputs = tuple(
            jax.tree.unflatten(tree, [next(leaves) for _ in range(tree.num_leaves)])
            for tree in self.trees
        )
        return outputs[0] if len(self.trees) == 1 else outputs


def can_take(home: Home, source: Home) -> bool:
    """Whether a map at `home` can have a value at `source`."""
    if home == AT_SERVER:
        return source in (AT_SERVER, UNPLACED)
    return source == home or (home == AT_CLIENTS and source == EVERYWHERE)


def name_of(home: Home) -> str:
    """What maps there are called."""
    if home.placement is None:
        return "unplaced"
    return "server" if home.placement is SERVER else "clients"

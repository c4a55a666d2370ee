"""Concrete values: sequences of examples, and values at a placement."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from fedjax_core.errors import PlacementError
from fedjax_core.language.placements import SERVER, Placement


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """A client's examples: rows ``start .. start + length`` of arrays that may hold more.

    Two layouts share this class. *Padded*: `elements` belongs to this sequence alone, `start` is 0
    and rows past `length` are padding. *Packed*: `elements` is a pool shared by all clients, in
    which this sequence is the slice that begins at `start`; nothing is copied or padded per client.

    `take`, `positions` and `reduce` work on both; indexing `elements` does not, for a packed
    sequence begins at `start`.

    Attributes:
      elements: pytree of arrays, each ``[rows, ...]`` with one common number of rows.
      start: int32 scalar, the first row of this sequence.
      length: int32 scalar, how many rows it has.
      capacity: static upper bound of `length`; shapes inside a traced function depend on it alone.
      packed: static, whether `elements` is a pool without a clients axis.

    Stacked over clients, `start` and `length` are ``[clients]``, and so is the leading axis of
    `elements` unless `packed`.
    """

    elements: Any
    start: jax.Array
    length: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})

    def take(self, positions: jax.Array) -> Any:
        """Rows at `positions` (int32 ``[n]``, each below `length`) as a pytree of ``[n, ...]``."""
        rows = self.start + positions
        return jax.tree.map(lambda x: jnp.take(x, rows, axis=0, mode="clip"), self.elements)

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """``(arange(capacity), mask)``: every position, and whether it holds an example."""
        index = jnp.arange(self.capacity, dtype=jnp.int32)
        return index, index < self.length

    def reduce(self, zero: Any, operator: Callable[[Any, Any], Any]) -> Any:
        """Folds the examples in order: ``operator(...operator(zero, first)..., last)``.

        Args:
          zero: pytree of scalars or arrays; the result for an empty sequence.
          operator: `(accumulator, element) -> accumulator`, of one example without a rows axis.
            Results are cast to the dtypes of `zero`.

        Returns:
          The accumulator, of the structure and dtypes of `zero`.

        Examples:
          >>> rows = Sequence(jnp.array([1.0, 2.0, 4.0]), jnp.int32(0), jnp.int32(2), capacity=3)
          >>> float(rows.reduce(0.0, lambda total, x: total + x))
          3.0
        """
        zero = jax.tree.map(jnp.asarray, zero)

        def step(position: jax.Array, accumulator: Any) -> Any:
            element = jax.tree.map(lambda x: x[0], self.take(position[None]))
            folded = operator(accumulator, element)
            return jax.tree.map(lambda old, new: jnp.asarray(new, old.dtype), accumulator, folded)

        return jax.lax.fori_loop(0, self.length, step, zero)


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Federated:
    """A concrete value at a placement; a pytree, so that JAX transforms see through it.

    Args:
      value: a pytree of arrays. At `CLIENTS`, unless `all_equal`, every leaf has a leading clients
        axis.
      placement: `CLIENTS` or `SERVER`.
      all_equal: whether all members hold the same value; by default only at the server.

    Examples:
      >>> import numpy as np
      >>> from fedjax_core.language.placements import CLIENTS
      >>> Federated(np.array([68.5, 70.3, 69.8]), CLIENTS).value.shape
      (3,)
    """

    value: Any
    placement: Placement = dataclasses.field(metadata={"static": True})
    all_equal: bool = dataclasses.field(default=None, metadata={"static": True})  # pyright: ignore[reportAssignmentType] - None means "as the placement has it", resolved below

    def __post_init__(self) -> None:
        if not isinstance(self.placement, Placement):
            raise PlacementError(
                f"Expected CLIENTS or SERVER as the placement, got {self.placement!r}."
            )
        if self.all_equal is None:
            object.__setattr__(self, "all_equal", self.placement is SERVER)

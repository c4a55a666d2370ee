"""Sequences: a client's examples, and what local functions do with them.

take, positions   rows by position, and which positions hold examples
map               a function of each example: a sequence again
reduce            a fold in order; runs as many steps as there are examples
scan              a fold in order that can be differentiated, and keeps an output of each step
sum               the examples added up
batch             groups of examples, the last one masked
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple, NoReturn

import jax
import jax.numpy as jnp
from jax import lax

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language import types
from fedjax_core.language.folds import keep_type
from fedjax_core.language.rows import (
    MAX_POSITION,
    check_length,
    check_numbers,
    initial,
    num_rows,
    sum_rows,
)
from fedjax_core.language.types import StructType, TensorType, Type


class Batch(NamedTuple):
    """An element of what `Sequence.batch` makes.

    Attributes:
      examples: pytree of ``[size, ...]``; zeros where there is no example.
      mask: bool ``[size]``, True for examples.
    """

    examples: Any
    mask: jax.Array


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class Sequence:
    """A client's examples: rows ``start .. start + length`` of arrays that may hold more.

    Two layouts share this class. *Padded*: `elements` belongs to this sequence alone, `start` is 0
    and rows past `length` are padding. *Packed*: `elements` is a pool shared by all clients, in
    which this sequence is the slice that begins at `start`; nothing is copied or padded per client.

    The methods work on both, in local functions and under all JAX transforms; indexing `elements`
    does not, for a packed sequence begins at `start`. What stands in the padding, NaN for example,
    reaches neither results nor gradients.

    Attributes:
      elements: pytree of arrays, each ``[rows, ...]`` with one common number of rows.
      start: int32 scalar, the first row of this sequence.
      length: int32 scalar, how many rows it has. What is below 0 counts as 0, and what is above
        `capacity` as `capacity`.
      capacity: static upper bound of `length`; shapes inside a traced function depend on it alone.
      packed: static, whether `elements` is a pool without a clients axis.
      pools: static, of how many pools of one size `elements` consists, if packed. Each belongs to
        an equal share of the clients, in their order, whose `start` counts from its beginning: on a
        mesh of as many devices, each holds the pool of its own clients.

    Stacked over clients, `start` and `length` are ``[clients]``, and so is the leading axis of
    `elements` unless `packed`.

    Examples:
      >>> rows = Sequence.from_elements(jnp.array([1.0, 2.0, 4.0]))
      >>> float(rows.map(jnp.square).sum())
      21.0
    """

    elements: Any
    start: jax.Array
    length: jax.Array
    capacity: int = dataclasses.field(metadata={"static": True})
    packed: bool = dataclasses.field(default=False, metadata={"static": True})
    pools: int = dataclasses.field(default=1, metadata={"static": True})

    @classmethod
    def from_elements(cls, elements: Any, length: Any = None) -> "Sequence":
        """A sequence of the rows of arrays, in the padded layout.

        Args:
          elements: an array or a pytree of arrays, each ``[rows, ...]``.
          length: how many of the rows are examples, the others being padding; all if not given.
            An int, or a scalar array of them, which under JAX transforms is not known here.

        Raises:
          FederatedTypeError: for what is no array, or has no or another number of rows; for a
            length that is no integer.
          ArgumentError: for a length that is negative or larger than the number of rows, or more
            than one.

        Examples:
          >>> import numpy as np
          >>> rows = Sequence.from_elements({"x": np.zeros((3, 2), np.float32), "y": np.arange(3)})
          >>> rows.capacity, int(rows.length)
          (3, 3)
        """
        capacity = num_rows(elements)
        length = capacity if length is None else length
        check_length(length, capacity)
        return cls(elements, jnp.int32(0), jnp.asarray(length, jnp.int32), capacity)

    @property
    def element_spec(self) -> Any:
        """One element as a pytree of `jax.ShapeDtypeStruct`, without the axis of rows."""
        axes = 1 if self.packed else 1 + jnp.ndim(self.length)
        return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[axes:], x.dtype), self.elements)

    @property
    def element_type(self) -> Type:
        """The type of one element: `T` of the type `T*`.

        Examples:
          >>> import numpy as np
          >>> str(Sequence.from_elements({"x": np.zeros((3, 2), np.float32)}).element_type)
          '<x=float32[2]>'
        """
        return _type_of(self.element_spec)

    def take(self, positions: jax.Array) -> Any:
        """Rows at `positions` (int32 ``[n]``, each below `length`) as a pytree of ``[n, ...]``."""
        self._check_single()
        rows = self.start + positions

        def leaf(x: Any) -> jax.Array:
            if x.shape[0] == 0:  # jnp.take refuses an empty axis; no position is below `length`
                return jnp.zeros((*rows.shape, *x.shape[1:]), x.dtype)
            return jnp.take(x, rows, axis=0, mode="clip")

        return jax.tree.map(leaf, self.elements)

    def positions(self) -> tuple[jax.Array, jax.Array]:
        """``(arange(capacity), mask)``: every position, and whether it holds an example."""
        self._check_single()
        index = jnp.arange(self.capacity, dtype=jnp.int32)
        return index, index < self.length

    def map(self, function: Callable[[Any], Any]) -> "Sequence":
        """Applies a function to every example.

        All `capacity` rows go through `function` at once, padding as copies of the last example. A
        gradient through the results is finite where that of `function` on the examples is; for a
        sequence without examples, where it is on the number 1/2 (1 for integers).

        Args:
          function: `(element) -> result`, of one example without a rows axis; returns any pytree.

        Returns:
          The results, padded, of the same length and capacity; zeros past the length.

        Raises:
          FederatedTypeError: if `function` returns None.

        Examples:
          >>> rows = Sequence.from_elements(jnp.array([1.0, 2.0]))
          >>> rows.map(lambda x: {"half": x / 2}).elements["half"].tolist()
          [0.5, 1.0]
        """
        results = jax.vmap(function)(self._filled())
        if results is None:
            raise FederatedTypeError(
                "Sequence.map: expected a function that returns a pytree of arrays, got None; add "
                "a return."
            )
        return self._padded(_mask_rows(self.positions()[1], results))

    def reduce(self, zero: Any, operator: Callable[[Any, Any], Any]) -> Any:
        """Folds the examples in order: ``operator(...operator(zero, first)..., last)``.

        Takes one step for each example, however large the capacity. JAX cannot differentiate such
        a loop in reverse mode; where a gradient is needed, use `scan` (or `map` and `sum`).

        Args:
          zero: pytree of scalars or arrays; the result for an empty sequence.
          operator: `(accumulator, element) -> accumulator`, of one example without a rows axis.

        Returns:
          The accumulator, of the structure and dtypes of `zero`: floats are rounded to its
          precision at every step.

        Raises:
          FederatedTypeError: if `operator` returns another structure or shape than that of `zero`,
            or a dtype that it does not hold; for a `zero` that is no pytree of numbers.
          ArgumentError: for a `zero` with an int of too many bits.

        Examples:
          >>> rows = Sequence(jnp.array([1.0, 2.0, 4.0]), jnp.int32(0), jnp.int32(2), capacity=3)
          >>> float(rows.reduce(0.0, lambda total, x: total + x))
          3.0
        """

        def step(position: jax.Array, accumulator: Any) -> Any:
            element = jax.tree.map(lambda x: x[0], self.take(position[None]))
            folded = operator(accumulator, element)
            return keep_type(accumulator, folded, "Sequence.reduce: the accumulator")

        start = initial(zero, "Sequence.reduce: zero")
        return lax.fori_loop(0, self._length(), step, start)

    def scan(
        self, init: Any, function: Callable[[Any, Any], tuple[Any, Any]]
    ) -> tuple[Any, "Sequence"]:
        """A fold in order that keeps an output of each step and can be differentiated.

        Takes `capacity` steps. Those past the length are computed on a copy of the last example
        and then dropped: they leave the carry bit for bit as it is, and pass no gradient, to the
        carry, the elements, or anything that `function` captures, even where it is not finite.

        Note: under `jax.vmap`, arrays that `function` captures are copied for every lane to that
        end. What can be computed from them once belongs before the scan, or into `map`.

        Args:
          init: pytree of scalars or arrays.
          function: `(carry, element) -> (carry, output)`, as that of `jax.lax.scan`.

        Returns:
          `(carry, outputs)`: the carry after the last example, of the structure and dtypes of
          `init`, and the outputs, padded, with zeros past the length.

        Raises:
          FederatedTypeError: if `function` does not return a pair, or a carry of another structure
            or shape than that of `init`, or of a dtype that it does not hold.

        Examples:
          >>> rows = Sequence.from_elements(jnp.array([1.0, 2.0, 4.0]))
          >>> total, sums = rows.scan(0.0, lambda total, x: (total + x, total + x))
          >>> float(total), sums.elements.tolist()
          (7.0, [1.0, 3.0, 7.0])
        """
        init = initial(init, "Sequence.scan: init")
        converted, captured = jax.closure_convert(function, init, self.element_spec)

        def step(carry: Any, x: tuple[Any, jax.Array]) -> tuple[Any, Any]:
            row, is_example = x
            args = _block_gradient(is_example, (carry, row, *captured))
            new, output = _as_pair(converted(*args))
            new = keep_type(carry, new, "Sequence.scan: the carry")
            kept = jax.tree.map(lambda a, b: jnp.where(is_example, a, b), new, carry)
            return kept, jax.tree.map(lambda y: _or_zeros(is_example, y), output)

        carry, outputs = lax.scan(step, init, (self._filled(), self.positions()[1]))
        return carry, self._padded(outputs)

    def sum(self) -> Any:
        """The sum of the examples, a pytree of the shapes and dtypes of an element.

        Dtypes of less than 32 bits are summed in 32. A sum that a small integer dtype does not
        hold becomes its smallest or largest number; 32 bits and more wrap around, as in JAX.

        Raises:
          FederatedTypeError: for elements that are no numbers.

        Examples:
          >>> Sequence.from_elements(jnp.array([100, 100], jnp.int8)).sum().tolist()
          127
        """
        check_numbers(self.element_spec)
        index, mask = self.positions()
        return jax.tree.map(sum_rows, _mask_rows(mask, self.take(index)))

    def batch(self, size: int, drop_remainder: bool = False) -> "Sequence":
        """Groups of `size` examples in order, as a sequence of `Batch`.

        Args:
          size: static number of examples in a batch.
          drop_remainder: whether to leave out a last batch that is not full.

        Returns:
          Batches with examples ``[size, ...]`` and a mask; in the last one examples that do not
          exist are zeros, and False in the mask.

        Raises:
          ArgumentError: for a size that is no positive int, or that JAX has no array for.

        Examples:
          >>> batches = Sequence.from_elements(jnp.array([1, 2, 3])).batch(2)
          >>> batches.elements.examples.tolist(), batches.elements.mask.tolist()
          ([[1, 2], [3, 0]], [[True, True], [True, False]])
        """
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ArgumentError(f"Expected a batch size of at least 1, got {size=}.")
        if size > MAX_POSITION - (self.capacity if isinstance(self.capacity, int) else 0):
            raise ArgumentError(
                f"Expected a batch size with which positions fit into 31 bits, got {size=} for a "
                f"capacity of {self.capacity}; a batch of all examples has the capacity as size."
            )
        self._check_single()
        extra = 0 if drop_remainder else size - 1
        length = self._length()
        num_batches = (length + extra) // size
        capacity = (self.capacity + extra) // size
        index = jnp.arange(capacity * size, dtype=jnp.int32)
        mask = index < jnp.minimum(length, num_batches * size)
        rows = _mask_rows(mask, self.take(index))
        fold = lambda x: x.reshape(capacity, size, *x.shape[1:])  # noqa: E731
        batches = jax.tree.map(fold, Batch(rows, mask))
        return Sequence(batches, jnp.int32(0), jnp.asarray(num_batches, jnp.int32), capacity)

    def _check_single(self) -> None:
        if jnp.ndim(self.length):
            raise FederatedTypeError(
                f"Expected one client's sequence, got those of {len(self.length)} clients; apply "
                "the function to each with federated_map, or jax.vmap."
            )

    def _filled(self) -> Any:
        """The rows as ``[capacity, ...]``, those past the length copies of the last example.

        What is finite on the examples is finite on all rows then. Where there is no example they
        hold 1/2 and 1, on which most functions are finite.
        """
        index, _ = self.positions()
        last = jnp.maximum(jnp.asarray(self.length) - 1, 0)
        rows = self.take(jnp.minimum(index, last))
        return jax.tree.map(lambda x: jnp.where(self.length > 0, x, _ordinary(x)), rows)

    def _padded(self, elements: Any) -> "Sequence":
        """Rows of the length of this sequence that begin at 0."""
        return Sequence(elements, jnp.int32(0), self._length(), self.capacity)

    def _length(self) -> jax.Array:
        """The length that counts: the nearest one of which there can be as many rows."""
        self._check_single()
        most = jnp.asarray(self.capacity, jnp.int32)  # which `export` may leave open
        return jnp.clip(jnp.asarray(self.length, jnp.int32), 0, most)

    def _refuse(self, *_: Any) -> NoReturn:
        raise FederatedTypeError(
            f"A sequence {self.element_type}* has no Python length, items or truth value, for its "
            "length is an array: use its map, reduce, scan, sum or batch, or `length` itself."
        )

    __len__ = __iter__ = __getitem__ = __contains__ = __bool__ = _refuse


def _type_of(spec: Any) -> Type:
    if isinstance(spec, jax.ShapeDtypeStruct):
        return TensorType(spec.dtype, spec.shape)
    fields, container = types.one_level(spec)
    return StructType([(name, _type_of(child)) for name, child in fields], container)


def _block_gradient(keep: jax.Array, tree: Any) -> Any:
    """`tree`, through which derivatives pass only where `keep`, finite or not."""
    return jax.tree.map(lambda x: jnp.where(keep, x, lax.stop_gradient(x)), tree)


def _ordinary(x: jax.Array) -> jax.Array:
    if types.is_extended_dtype(x.dtype) or x.dtype == jnp.bool_:
        return jnp.zeros_like(x)
    return jnp.full_like(x, 0.5 if jnp.issubdtype(x.dtype, jnp.inexact) else 1)


def _or_zeros(keep: jax.Array, x: Any) -> jax.Array:
    return jnp.where(keep, x, jnp.zeros_like(x))


def _mask_rows(mask: jax.Array, rows: Any) -> Any:
    """``[n, ...]`` with zeros where the mask ``[n]`` is False."""
    return jax.tree.map(lambda x: _or_zeros(mask.reshape(-1, *[1] * (x.ndim - 1)), x), rows)


def _as_pair(result: Any) -> tuple[Any, Any]:
    if not isinstance(result, tuple) or len(result) != 2:
        raise FederatedTypeError(
            "Sequence.scan: expected a function that returns (carry, output), got "
            f"{jax.tree.structure(result)}; return a pair, with () for no output."
        )
    return result

"""The rows of a sequence: what they have to be, and their sum."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import export
from jax.core import Tracer

from fedjax_core.errors import ArgumentError, FederatedTypeError
from fedjax_core.language import types
from fedjax_core.language.base_types import shorten
from fedjax_core.language.containers import check_nesting
from fedjax_core.language.folds import as_arrays

MAX_POSITION = 2**31 - 1


def num_rows(elements: Any) -> int:
    """The one number of rows of all arrays."""
    check_nesting(elements, "the elements of a sequence")
    rows: dict[str, int] = {}
    for path, x in jax.tree_util.tree_leaves_with_path(elements):
        where = jax.tree_util.keystr(path) or "the root"
        if not hasattr(x, "dtype") or not getattr(x, "shape", ()):
            raise FederatedTypeError(
                f"Sequence: expected arrays with a leading axis of rows, got {x!r} at {where}; "
                "stack the examples."
            )
        rows[where] = x.shape[0]
    if len(set(rows.values())) != 1:
        raise FederatedTypeError(
            f"Sequence: expected arrays with one common number of rows, got {rows}; stack the "
            "examples, each leaf along a new first axis."
        )
    return next(iter(rows.values()))


def check_length(length: Any, capacity: Any) -> None:
    """Raises unless `length` is one int, and no larger than `capacity` as far as that is known."""
    if export.is_symbolic_dim(length):
        return
    if not _is_int(length):
        raise FederatedTypeError(
            f"Expected an int as the length of a sequence, got {length!r} of type "
            f"{type(length).__name__}; count the examples."
        )
    if jnp.ndim(length):
        raise ArgumentError(
            f"Expected one length, got {length!r}; for several sequences use jax.vmap."
        )
    is_known = not isinstance(length, Tracer) and isinstance(capacity, int)
    if is_known and not 0 <= int(length) <= capacity:
        raise ArgumentError(f"Expected a length from 0 to {capacity}, the rows; got {length}.")


def _is_int(x: Any) -> bool:
    if isinstance(x, int):
        return not isinstance(x, bool)
    return isinstance(x, np.generic | np.ndarray | jax.Array) and bool(
        not types.is_extended_dtype(x.dtype) and jnp.issubdtype(x.dtype, jnp.integer)
    )


def initial(tree: Any, what: str) -> Any:
    """The arrays that a fold starts with."""
    check_nesting(tree, what)
    try:
        return as_arrays(tree)
    except OverflowError as error:
        raise ArgumentError(f"{what}: expected numbers that JAX holds; {error}.") from error
    except (TypeError, ValueError) as error:
        raise FederatedTypeError(
            f"{what}: expected a pytree of arrays and numbers, got {shorten(repr(tree))}."
        ) from error


def check_numbers(spec: Any) -> None:
    """Raises `FederatedTypeError` for elements that cannot be added up."""
    for path, x in jax.tree_util.tree_leaves_with_path(spec):
        if types.is_extended_dtype(x.dtype) or not jnp.issubdtype(x.dtype, jnp.number):
            where = jax.tree_util.keystr(path) or "the root"
            raise FederatedTypeError(
                f"Sequence.sum: expected numbers, got {x.dtype} at {where}; convert it, for "
                "example with astype, in map."
            )


def sum_rows(rows: jax.Array) -> jax.Array:
    """The sum over the first axis, in the dtype of the rows, see `Sequence.sum`."""
    dtype = rows.dtype
    total = jnp.sum(rows, axis=0, dtype=_accumulator(dtype))
    if jnp.issubdtype(dtype, jnp.integer) and total.dtype != dtype:
        limits = jnp.iinfo(dtype)
        total = jnp.clip(total, limits.min, limits.max)
    return total.astype(dtype)


def _accumulator(dtype: Any) -> Any:
    if jnp.issubdtype(dtype, jnp.complexfloating):
        return dtype
    if jnp.issubdtype(dtype, jnp.floating):
        return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype
    is_signed = jnp.issubdtype(dtype, jnp.signedinteger)
    return (jnp.int32 if is_signed else jnp.uint32) if jnp.iinfo(dtype).bits < 32 else dtype

"""The dtypes and shapes of tensors: those that JAX has, and strings on the host."""

import functools
from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from fedjax_core.errors import FederatedTypeError

Shape = tuple[int | None, ...] | None

_MAX_SIZE = np.iinfo(np.int64).max


def is_extended_dtype(dtype: Any) -> bool:
    """Whether `dtype` is one of JAX's own, such as that of PRNG keys."""
    scalar_type = getattr(dtype, "type", None)
    return isinstance(scalar_type, type) and issubclass(scalar_type, jax.dtypes.extended)


def is_str(dtype: Any) -> bool:
    """Whether `dtype` is that of strings on the host."""
    return isinstance(dtype, np.dtype) and dtype.kind == "U"


def is_dtype_like(value: Any) -> bool:
    """Whether `value` names a dtype beyond doubt: a NumPy or JAX dtype or scalar type."""
    if isinstance(value, np.dtype) or is_extended_dtype(value):
        return True
    if type(value) is type(jnp.float32):
        return True
    return isinstance(value, type) and issubclass(value, np.generic)


@functools.cache
def _numeric_dtypes() -> Mapping[str, np.dtype]:
    """JAX's dtypes by name, without those of keys."""
    scalars = [value for value in vars(jnp).values() if type(value) is type(jnp.float32)]
    return {np.dtype(value).name: np.dtype(value) for value in scalars}


@functools.cache
def _canonical_dtypes() -> frozenset[np.dtype]:
    return frozenset(_numeric_dtypes().values())


@functools.cache
def known_dtypes() -> Mapping[str, Any]:
    """All dtypes that a tensor can have, by the name that types print."""
    keys = {}
    for name in ("threefry2x32", "rbg", "unsafe_rbg"):
        # Only the dtype is wanted: nothing runs.
        key = jax.eval_shape(functools.partial(jax.random.key, 0, impl=name))
        keys[str(key.dtype)] = key.dtype
    return {**_numeric_dtypes(), **keys, "str": np.dtype(str)}


def dtype_name(dtype: Any) -> str:
    """The name of a dtype as types print it: `str` for strings, `key<fry>` for a kind of keys."""
    return "str" if is_str(dtype) else str(dtype)


def as_dtype(dtype: Any) -> Any:
    """`dtype` in its one canonical form.

    Args:
      dtype: a NumPy or JAX dtype or scalar type, or the name of one.

    Raises:
      FederatedTypeError: for what is no dtype, one that JAX does not have, and Python's `int`,
        `float` and `complex`, which do not tell how many bits they have.

    Examples:
      >>> as_dtype(">i4"), as_dtype(np.bytes_)
      (dtype('int32'), dtype('<U'))
    """
    if isinstance(dtype, np.dtype) and dtype in _canonical_dtypes():
        return dtype
    if is_extended_dtype(dtype):
        return dtype
    converted = _as_numpy_dtype(dtype)
    if converted.kind in "US":
        return np.dtype(str)
    native = converted if converted.isnative else converted.newbyteorder("=")
    if native not in _canonical_dtypes():
        raise FederatedTypeError(
            f"Expected a dtype that JAX has, got {dtype!r}; convert the values to numbers, such as "
            "np.float32 or np.int32."
        )
    return native


def _as_numpy_dtype(dtype: Any) -> np.dtype:
    try:
        # NumPy takes 64 bits for these. `in` would compare: np.dtype("float64") == float.
        if any(dtype is unclear for unclear in (None, int, float, complex)):
            raise TypeError("it does not say how many bits")
        return np.dtype(dtype)
    except (TypeError, ValueError) as error:
        raise FederatedTypeError(
            f"Expected a dtype such as np.float32, got {dtype!r} of type {type(dtype).__name__} "
            f"({error})."
        ) from error


def as_shape(shape: Any) -> Shape:
    """`shape` as a tuple of ints and Nones, or None for an unknown rank.

    Raises:
      FederatedTypeError: naming the size that is none.

    Examples:
      >>> as_shape([np.int64(2), None])
      (2, None)
    """
    if shape is None:
        return None
    if not isinstance(shape, list | tuple):
        raise FederatedTypeError(
            f"Expected a tuple of sizes as the shape, got {shape!r} of type "
            f"{type(shape).__name__}; write (3,) for three elements, None for an unknown rank."
        )
    return tuple(_as_size(size, position) for position, size in enumerate(shape))


def _as_size(size: Any, position: int) -> int | None:
    if type(size) is int and 0 <= size <= _MAX_SIZE:
        return size
    if size is None or export.is_symbolic_dim(size):
        return cast(int | None, size)
    is_int = isinstance(size, int | np.integer) and not isinstance(size, bool)
    if not is_int or not 0 <= size <= _MAX_SIZE:
        raise FederatedTypeError(
            f"Expected an int from 0 to 2**63 - 1, or None if it is unknown, as dimension "
            f"{position} of a shape, got {size if not is_int else hex(size)} of type "
            f"{type(size).__name__}."
        )
    return int(size)


def is_shape_assignable(target: Shape, source: Shape) -> bool:
    """Whether an array of shape `source` fits where `target` is expected."""
    if target is None:
        return True
    if source is None or len(target) != len(source):
        return False
    return all(t is None or t == s for t, s in zip(target, source, strict=True))


def is_shape_compatible(first: Shape, second: Shape) -> bool:
    """Whether there is an array that has both shapes, as far as they are known.

    Examples:
      >>> is_shape_compatible((2, 3), (2, None)), is_shape_compatible((2, 3), (20, 3))
      (True, False)
    """
    if first is None or second is None:
        return True
    return len(first) == len(second) and all(
        a is None or b is None or a == b for a, b in zip(first, second, strict=True)
    )

"""Types of values, templates of types, and what can be done with values of a type."""

from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.types import (
    FederatedType,
    MisplacedTypeError,
    SequenceType,
    StructType,
    TensorType,
    Type,
    is_extended_dtype,
    is_str,
    one_level,
)
from fedjax_core.language.values import Sequence


def infer_type(value: Any) -> Type:
    """The type of a concrete value: an array, a Python number, a `Sequence`, or a pytree of these.

    Python numbers become bool, int32 (int64 where 32 bits do not hold it), float32 and complex128.

    Raises:
      FederatedTypeError: for a value that is no array and no pytree of arrays.

    Examples:
      >>> str(infer_type({"w": np.zeros((3, 2), np.float32), "b": 0.5}))
      '<b=float32,w=float32[3,2]>'
    """
    if isinstance(value, Sequence):
        return SequenceType(_element_type(value))
    if isinstance(value, bool | int | float | complex | str):
        return TensorType(_python_dtype(value))
    if hasattr(value, "dtype") and hasattr(value, "shape"):
        return TensorType(value.dtype, value.shape)
    fields, container = one_level(value)
    return StructType([(name, infer_type(child)) for name, child in fields], container)


def _element_type(sequence: Sequence) -> Type:
    row_axes = 1 if sequence.packed else 1 + len(sequence.length.shape)
    return infer_type(
        jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape[row_axes:], x.dtype), sequence.elements)
    )


def _python_dtype(value: bool | float | complex | str) -> Any:
    match value:
        case bool():
            return np.bool_
        case int():
            return _integer_dtype(value)
        case float():
            return np.float32
        case complex():
            return np.complex128
        case str():
            return np.str_


def _integer_dtype(value: int) -> Any:
    for dtype in (np.int32, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype
    raise MisplacedTypeError(f"Expected an integer of at most 64 bits, got {value}.")


def template(t: Type, capacity: int = 1) -> Any:
    """The pytree of `jax.ShapeDtypeStruct` that stands for one member's value of type `t`.

    Args:
      t: an unplaced type.
      capacity: of the sequences in `t`.

    Raises:
      FederatedTypeError: for a type that has no fixed shape.
    """
    match t:
        case TensorType(dtype, shape) if shape is not None and None not in shape:
            return jax.ShapeDtypeStruct(cast(tuple[int, ...], shape), runtime_dtype(dtype))
        case StructType():
            children = [template(child, capacity) for child in t.children()]
            return jax.tree.unflatten(t.container, children)
        case SequenceType(element):
            rows = jax.tree.map(
                lambda x: jax.ShapeDtypeStruct((capacity, *x.shape), x.dtype), template(element)
            )
            scalar: Any = jax.ShapeDtypeStruct((), jnp.int32)
            return Sequence(rows, scalar, scalar, capacity)
    raise FederatedTypeError(f"Expected a type with a fixed shape, got {t}; give every dimension.")


def runtime_dtype(dtype: Any) -> Any:
    """`dtype` as arrays have it: 64 bits become 32 unless `jax_enable_x64` is set."""
    if is_extended_dtype(dtype):
        return dtype
    if is_str(dtype):
        raise FederatedTypeError("Expected a dtype that JAX computes with, got str; use numbers.")
    return jax.dtypes.canonicalize_dtype(dtype)


def runtime_type(t: Type) -> Type:
    """`t` with the dtypes that arrays have, see `runtime_dtype`."""
    match t:
        case TensorType(dtype, shape):
            return TensorType(runtime_dtype(dtype), shape)
        case StructType(elements, container):
            return StructType([(name, runtime_type(child)) for name, child in elements], container)
        case SequenceType(element):
            return SequenceType(runtime_type(element))
        case FederatedType(member, placement, all_equal):
            return FederatedType(runtime_type(member), placement, all_equal)
    return t


def is_sum_compatible(t: Type) -> bool:
    """Whether values of type `t` can be added: numbers of fixed shape, and structs of them."""
    if isinstance(t, TensorType):
        is_number = isinstance(t.dtype, np.dtype) and jnp.issubdtype(t.dtype, jnp.number)
        return is_number and t.shape is not None and None not in t.shape
    if isinstance(t, FederatedType):
        return is_sum_compatible(t.member)
    return isinstance(t, StructType) and all(map(is_sum_compatible, t.children()))


def is_average_compatible(t: Type) -> bool:
    """Whether values of type `t` can be averaged: floating or complex, and structs of them."""
    if isinstance(t, TensorType):
        return is_sum_compatible(t) and jnp.issubdtype(t.dtype, jnp.inexact)
    if isinstance(t, FederatedType):
        return is_average_compatible(t.member)
    return isinstance(t, StructType) and all(map(is_average_compatible, t.children()))


def is_empty(t: Type) -> bool:
    """Whether values of type `t` have no arrays at all, and so nothing to send."""
    if isinstance(t, FederatedType):
        return is_empty(t.member)
    return isinstance(t, StructType) and all(map(is_empty, t.children()))


def difference(expected: Any, got: Any) -> str | None:
    """The first leaf in whose path, shape or dtype two pytrees of arrays differ, in words.

    Examples:
      >>> difference({"w": np.zeros(2, np.float32)}, {"w": np.zeros(3, np.float32)})
      "expected float32[2] at ['w'], got float32[3]"
    """
    wanted = dict(jax.tree_util.tree_leaves_with_path(expected))
    found = dict(jax.tree_util.tree_leaves_with_path(got))
    for path in [*wanted, *found]:
        want, have = (_describe_leaf(tree.get(path)) for tree in (wanted, found))
        if want != have:
            return f"expected {want} at {jax.tree_util.keystr(path) or 'the root'}, got {have}"
    if jax.tree.structure(expected) != jax.tree.structure(got):
        return f"expected {jax.tree.structure(expected)}, got {jax.tree.structure(got)}"
    return None


def _describe_leaf(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return f"{dtype}{list(jnp.shape(leaf))}"


def check_same(expected: Type, got: Type, what: str) -> None:
    """Raises `FederatedTypeError` unless two unplaced types have the same structure and leaves."""
    found = difference(template(expected), template(got))
    if found:
        raise FederatedTypeError(f"{what}: {found}.")

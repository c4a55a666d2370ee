"""Types of values, templates of types, and what can be done with values of a type."""

from typing import Any, NamedTuple, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.base_types import at_path, shorten, step_to
from fedjax_core.language.compatibility import check_sum_compatible as check_sum_compatible
from fedjax_core.language.compatibility import is_average_compatible as is_average_compatible
from fedjax_core.language.compatibility import is_integer_compatible as is_integer_compatible
from fedjax_core.language.compatibility import is_min_max_compatible as is_min_max_compatible
from fedjax_core.language.compatibility import is_sum_compatible as is_sum_compatible
from fedjax_core.language.compatibility import why_not_averageable as why_not_averageable
from fedjax_core.language.compatibility import why_not_integers as why_not_integers
from fedjax_core.language.compatibility import why_not_orderable as why_not_orderable
from fedjax_core.language.compatibility import why_not_summable as why_not_summable
from fedjax_core.language.containers import check_depth
from fedjax_core.language.placements import CLIENTS
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
from fedjax_core.language.values import Federated, Sequence


def infer_type(value: Any) -> Type:
    """The type of a concrete value: an array, a Python number, a `Sequence`, or a pytree of these.

    Arrays and NumPy's scalars keep their dtype. Python numbers become bool, int32 (int64 where 32
    bits do not hold it), float32 and complex128, strings and bytes str. A `Federated` value has a
    `FederatedType`, in which there is no clients axis.

    Args:
      value: anything of that; a pytree keeps its Python container, None is a struct without fields.

    Raises:
      FederatedTypeError: for a value that is no array and no pytree of arrays, naming the leaf, for
        a masked array, and for what is nested more than 100 deep, or contains itself; for an
        integer of more than 64 bits it is a `ValueError` too.

    Examples:
      >>> str(infer_type({"w": np.zeros((3, 2), np.float32), "b": 0.5}))
      '<b=float32,w=float32[3,2]>'
    """
    return _infer(value, _Position())


class _Position(NamedTuple):
    """Where in a value its type is being inferred.

    Attributes:
      path: for errors.
      depth: how many containers are around it.
      num_axes: how many axes arrays have that do not belong to their type.
    """

    path: str = ""
    depth: int = 0
    num_axes: int = 0

    def inside(self, step: str) -> "_Position":
        return self._replace(path=self.path + step, depth=self.depth + 1)


def _infer(value: Any, at: _Position) -> Type:
    check_depth(at.depth, "a value")
    if isinstance(value, Federated):
        is_stacked = value.placement is CLIENTS and not value.all_equal
        inner = at.inside("")._replace(num_axes=int(is_stacked))
        return FederatedType(_infer(value.value, inner), value.placement, value.all_equal)
    if isinstance(value, Sequence):
        axes = 1 if value.packed else 1 + jnp.ndim(value.length)
        return SequenceType(_infer(value.elements, at.inside("")._replace(num_axes=axes)))
    if isinstance(value, type | Type):
        raise FederatedTypeError(
            f"Expected a value{at_path(at.path)}, got the type {value!r}; use to_type for types."
        )
    # A registered pytree is a struct, even if it has a dtype and a shape of its own.
    is_leaf = jax.tree_util.all_leaves([value])
    if is_leaf and hasattr(value, "dtype") and hasattr(value, "shape"):
        return _array_type(value, at)
    if isinstance(value, bool | int | float | complex | str | bytes):
        _check_axes(value, (), at)
        return _tensor_type(_python_dtype(value, at.path), (), at.path)
    return _infer_struct(value, at)


def _array_type(value: Any, at: _Position) -> Type:
    if isinstance(value, np.ma.MaskedArray):
        raise FederatedTypeError(
            f"Expected an array without a mask{at_path(at.path)}, got a masked one; fill it, or "
            "pass its data and its mask as two arrays."
        )
    shape = tuple(value.shape)
    _check_axes(value, shape, at)
    return _tensor_type(value.dtype, shape[at.num_axes :], at.path)


def _check_axes(value: Any, shape: tuple[Any, ...], at: _Position) -> None:
    if len(shape) < at.num_axes:
        raise FederatedTypeError(
            "Expected arrays with a leading clients axis in a value at CLIENTS, and one of rows in "
            f"a sequence, got {shorten(repr(value))}{at_path(at.path)}; stack the clients' values."
        )


def _tensor_type(dtype: Any, shape: tuple[Any, ...], path: str) -> Type:
    try:
        return TensorType(dtype, shape)
    except FederatedTypeError as error:
        raise FederatedTypeError(f"The value{at_path(path)} has no type: {error}") from error


def _infer_struct(value: Any, at: _Position) -> Type:
    try:
        fields, container = one_level(value)
    except FederatedTypeError as error:
        raise FederatedTypeError(f"The value{at_path(at.path)} has no type: {error}") from error
    children = [
        (name, _infer(child, at.inside(step_to(name, position))))
        for position, (name, child) in enumerate(fields)
    ]
    return StructType(children, container)


def _python_dtype(value: bool | float | complex | str | bytes, path: str) -> Any:
    match value:
        case bool():
            return np.bool_
        case int():
            return _integer_dtype(value, path)
        case float():
            return np.float32
        case complex():
            return np.complex128
        case _:
            return np.str_


def _integer_dtype(value: int, path: str) -> Any:
    for dtype in (np.int32, np.int64):
        if np.iinfo(dtype).min <= value <= np.iinfo(dtype).max:
            return dtype
    num_bits = 1 + max(value, ~value).bit_length()  # not the value: it may have too many digits
    raise MisplacedTypeError(
        f"Expected an integer of at most 64 bits{at_path(path)}, got one of {num_bits}; use a "
        "float, or split it."
    )


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
    if _is_alike(expected, got):
        return None
    wanted = dict(jax.tree_util.tree_leaves_with_path(expected))
    found = dict(jax.tree_util.tree_leaves_with_path(got))
    for path in [*wanted, *found]:
        want, have = (_describe_leaf(tree.get(path)) for tree in (wanted, found))
        if want != have:
            return f"expected {want} at {jax.tree_util.keystr(path) or 'the root'}, got {have}"
    if jax.tree.structure(expected) != jax.tree.structure(got):
        return f"expected {jax.tree.structure(expected)}, got {jax.tree.structure(got)}"
    return None


def _is_alike(expected: Any, got: Any) -> bool:
    """Whether there is no difference, found without words: every round asks this of its state."""
    wanted, structure = jax.tree.flatten(expected)
    found, other = jax.tree.flatten(got)
    pairs = zip(wanted, found, strict=False)
    return structure == other and all(_shape_and_dtype(x) == _shape_and_dtype(y) for x, y in pairs)


def _shape_and_dtype(leaf: Any) -> tuple[tuple[int, ...], Any]:
    dtype = leaf.dtype if hasattr(leaf, "dtype") else jnp.result_type(leaf)
    return jnp.shape(leaf), dtype


def _describe_leaf(leaf: Any) -> str:
    if leaf is None:
        return "nothing"
    shape, dtype = _shape_and_dtype(leaf)
    return f"{dtype}{list(shape)}"


def check_same(expected: Type, got: Type, what: str) -> None:
    """Raises `FederatedTypeError` unless two unplaced types have the same structure and leaves."""
    found = difference(template(expected), template(got))
    if found:
        raise FederatedTypeError(f"{what}: {found}.")

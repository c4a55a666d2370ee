"""Between Python values and arrays: what a computation is fed with, and what it gives back.

A member's value is a pytree of arrays (NumPy on the host). Values of clients come as a list or
tuple with one entry a client, or as a `Federated`. Dicts are matched by key, never by order.
"""

from collections.abc import Mapping
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language import containers, inference, types
from fedjax_core.language.checks import check_fits
from fedjax_core.language.placements import CLIENTS
from fedjax_core.language.types import (
    FederatedType,
    FunctionType,
    SequenceType,
    StructType,
    TensorType,
    Type,
)
from fedjax_core.language.values import Federated, Sequence


def to_member(value: Any, t: Type, where: str) -> Any:
    """Converts one member's value to a pytree of arrays of type `t`.

    Args:
      value: Python numbers, arrays, containers; a list of examples where `t` has a sequence.
      t: an unplaced type.
      where: names the value in errors.

    Raises:
      FederatedTypeError: naming the leaf that does not fit.
    """
    match t:
        case TensorType():
            return _to_array(value, t, where)
        case StructType():
            return _to_struct(value, t, where)
        case SequenceType():
            return _to_sequence(value, t, where)
    raise FederatedTypeError(f"{where}: expected an unplaced type, got {t}.")


def _to_array(value: Any, t: TensorType, where: str) -> Any:
    if not hasattr(value, "dtype"):
        value = _from_python(value, t, where)
    _check_dtype(value, t, where)
    if not types.is_shape_assignable(t.shape, tuple(value.shape)):
        raise FederatedTypeError(
            f"{where}: expected {t}, got shape {tuple(value.shape)}; reshape or pad it, or declare "
            "another type."
        )
    dtype = inference.runtime_dtype(t.dtype)
    if value.dtype == dtype:
        return value
    if isinstance(value, np.ndarray | np.generic):
        return _narrowed(np.asarray(value), t, where)
    return value.astype(dtype)


def _narrowed(array: np.ndarray, t: TensorType, where: str) -> np.ndarray:
    """`array` in the dtype that arrays of type `t` have, if that holds its values."""
    dtype = inference.runtime_dtype(t.dtype)
    if np.dtype(dtype).kind in "iu":
        _check_range(array, t, where)
    with np.errstate(over="ignore"):
        narrow = array.astype(dtype)
    if np.dtype(dtype).kind == "f" and np.any(np.isinf(narrow) & np.isfinite(array)):
        raise FederatedTypeError(
            f"{where}: expected values that {dtype} holds, up to {np.finfo(dtype).max}, got "
            f"{np.max(np.abs(array))}; scale them, or declare a wider type."
        )
    return narrow


def _from_python(value: Any, t: TensorType, where: str) -> np.ndarray:
    try:
        array = np.asarray(value)
    except (ValueError, TypeError) as error:
        raise FederatedTypeError(
            f"{where}: expected {t}, got {value!r} ({error}); give all rows one shape."
        ) from error
    order = "biufc"
    target = np.dtype(t.dtype).kind if isinstance(t.dtype, np.dtype) else "?"
    target = "f" if target == "V" else target  # bfloat16 and its kin
    fits = array.dtype.kind in order and target in order
    if not fits or (array.size and order.index(array.dtype.kind) > order.index(target)):
        raise FederatedTypeError(
            f"{where}: expected {t}, got {value!r} of {type(value).__name__}; convert it, or "
            "declare another type."
        )
    return _narrowed(array, t, where)


def _check_range(array: np.ndarray, t: TensorType, where: str) -> None:
    dtype = inference.runtime_dtype(t.dtype)
    limits = np.iinfo(dtype)
    if array.size and (array.min() < limits.min or array.max() > limits.max):
        held = f"{t}, without jax_enable_x64 {dtype}," if dtype != t.dtype else f"{t}"
        raise FederatedTypeError(
            f"{where}: expected values that {held} holds, from {limits.min} to {limits.max}, got "
            f"values from {array.min()} to {array.max()}; scale them, or declare a wider type."
        )


def _check_dtype(value: Any, t: TensorType, where: str) -> None:
    if t.dtype in (value.dtype, inference.runtime_dtype(value.dtype)):
        return
    if inference.runtime_dtype(t.dtype) == value.dtype:
        return
    raise FederatedTypeError(
        f"{where}: expected {t}, got an array of {value.dtype}; convert it with astype."
    )


def _to_struct(value: Any, t: StructType, where: str) -> Any:
    children = _fields_of(value, t, where)
    _check_static(value, t, where)
    fed = [
        to_member(child, child_type, f"{where}{_suffix(name, position)}")
        for position, ((name, child_type), child) in enumerate(
            zip(t.elements, children, strict=True)
        )
    ]
    return jax.tree.unflatten(t.container, fed)


def _check_static(value: Any, t: StructType, where: str) -> None:
    if value is None or isinstance(value, list | tuple | Mapping):
        return
    given = types.one_level(value)[1]
    if containers.differs_statically(t.container, given):
        raise FederatedTypeError(
            f"{where}: expected {t.container}, got {given}, of other static fields; declare the "
            "type with these, or make them fields with values."
        )


def _suffix(name: str | None, position: int) -> str:
    return f".{name}" if name else f"[{position}]"


def _fields_of(value: Any, t: StructType, where: str) -> list[Any]:
    """The children of `value` in the order of the type: by name where both have names."""
    is_container = isinstance(value, tuple | list | Mapping)
    if not t.elements and (value is None or (is_container and not value)):
        return []
    given, _ = types.one_level(value)
    names, by_name = t.names(), dict(given)
    if names and None not in names and None not in by_name:
        if set(by_name) != set(names):
            raise FederatedTypeError(
                f"{where}: expected the fields {names} of {t}, got {sorted(map(str, by_name))}; "
                f"{_difference_of_names(names, by_name)}."
            )
        return [by_name[name] for name in names]
    if len(given) != len(names) or (isinstance(value, Mapping) and names):
        raise FederatedTypeError(
            f"{where}: expected the {len(names)} fields of {t}, got {len(given)} in a "
            f"{type(value).__name__}; pass one value for each."
        )
    return [child for _, child in given]


def _difference_of_names(names: list[Any], given: Any) -> str:
    missing = [name for name in names if name not in given]
    unknown = sorted(str(name) for name in given if name not in names)
    parts = ["add " + str(missing)] if missing else []
    return " and ".join([*parts, *(["leave out " + str(unknown)] if unknown else [])])


def contains_str(t: Type) -> bool:
    """Whether there is a string of the host in values of type `t`."""
    return (isinstance(t, TensorType) and types.is_str(t.dtype)) or any(
        map(contains_str, t.children())
    )


def is_composite(t: Type) -> bool:
    """Whether `t` is a struct of federated types or functions, given and kept leaf by leaf."""
    return isinstance(t, StructType) and (t.contains(FederatedType) or t.contains(FunctionType))


def leaves_of(value: Any, t: Type, where: str) -> list[Any]:
    """What `value` holds for each parameter in `t`, which is one or a struct of them."""
    if not is_composite(t):
        return [value]
    assert isinstance(t, StructType)
    fields = zip(t.elements, _fields_of(value, t, where), strict=True)
    return [
        leaf
        for position, ((name, child), given) in enumerate(fields)
        for leaf in leaves_of(given, child, f"{where}{_suffix(name, position)}")
    ]


def _to_sequence(value: Any, t: SequenceType, where: str) -> Sequence:
    if isinstance(value, Sequence):
        check_runtime(t, inference.infer_type(value), where)
        return value
    if isinstance(value, Mapping) and isinstance(t.element, StructType):
        return _to_columns(value, t, where)
    if not isinstance(value, list | tuple | np.ndarray | jax.Array):
        raise FederatedTypeError(
            f"{where}: expected a list of examples of type {t.element}, got "
            f"{type(value).__name__}; wrap the examples in a list."
        )
    is_rows = isinstance(t.element, TensorType) and t.element.shape is not None
    if isinstance(value, np.ndarray | jax.Array) and value.ndim and is_rows:
        column = to_member(value, _with_leading_axis(t.element), f"{where}, an array of examples")
        return _padded(column, column.shape[0])
    rows = [
        to_member(row, t.element, f"{where}, example {position}")
        for position, row in enumerate(value)
    ]
    return _stack_rows(rows, t, bucket(len(rows)))


def _to_columns(value: Any, t: SequenceType, where: str) -> Sequence:
    """A sequence of structs from a dict of arrays, each with a leading axis of examples."""
    columns = to_member(value, _with_leading_axis(t.element), where)
    sizes = sorted({len(x) for x in jax.tree.leaves(columns)})
    if len(sizes) != 1:
        raise FederatedTypeError(
            f"{where}: expected columns of one number of examples, got {sizes}; pass a list of "
            "examples, or arrays with one row each."
        )
    return _padded(columns, sizes[0])


def _padded(columns: Any, length: int) -> Sequence:
    capacity = bucket(length)
    rows = jax.tree.map(lambda x: _pad(x, capacity), columns)
    return Sequence(rows, cast(Any, np.int32(0)), cast(Any, np.int32(length)), capacity)


def _with_leading_axis(t: Type) -> Type:
    if isinstance(t, StructType):
        children = [(name, _with_leading_axis(child)) for name, child in t.elements]
        return StructType(children, t.container)
    assert isinstance(t, TensorType)
    return TensorType(t.dtype, None if t.shape is None else (None, *t.shape))


def _stack_rows(rows: list[Any], t: SequenceType, capacity: int) -> Sequence:
    blank = inference.template(t.element)
    padding = [jax.tree.map(lambda x: np.zeros(x.shape, x.dtype), blank)] * (capacity - len(rows))
    elements = jax.tree.map(lambda *leaves: _stack(leaves), *rows, *padding)
    return Sequence(elements, cast(Any, np.int32(0)), cast(Any, np.int32(len(rows))), capacity)


def bucket(size: int) -> int:
    """The next power of two, so that few different shapes are ever compiled.

    Examples:
      >>> [bucket(n) for n in (0, 1, 2, 3, 100)]
      [1, 1, 2, 4, 128]
    """
    return 1 << max(size - 1, 0).bit_length()


def to_clients(value: Any, t: FederatedType, where: str) -> Any:
    """Converts a list with one entry a client to a pytree of arrays with a leading clients axis.

    Args:
      value: a list or tuple with one entry a client, or an array with a leading clients axis.
      t: a type at the clients.
      where: names the value in errors.

    Raises:
      FederatedTypeError: for anything else, or naming the client that does not fit.
    """
    if isinstance(value, np.ndarray | jax.Array) and value.ndim:
        if isinstance(t.member, TensorType) and t.member.shape is not None:
            stacked = TensorType(t.member.dtype, (None, *t.member.shape))
            return _to_array(value, stacked, f"{where}, with a leading clients axis")
        value = list(value)
    if not isinstance(value, list | tuple):
        raise FederatedTypeError(
            f"{where}: expected a list with one entry a client for {t}, got {value!r} of "
            f"{type(value).__name__}; wrap the values in a list, or in fc.Federated."
        )
    members = [
        to_member(member, t.member, f"{where}, client {client}")
        for client, member in enumerate(value)
    ]
    return stack_members(members, t.member)


def stack_members(members: list[Any], t: Type) -> Any:
    """Stacks members' values along a new leading clients axis, padding sequences alike."""
    if not members:
        blank = inference.template(t)
        return jax.tree.map(lambda x: jnp.zeros((0, *x.shape), x.dtype), blank)
    is_sequence = lambda x: isinstance(x, Sequence)  # noqa: E731 - used twice, as a leaf predicate
    return jax.tree.map(
        lambda *leaves: _stack_sequences(leaves) if is_sequence(leaves[0]) else _stack(leaves),
        *members,
        is_leaf=is_sequence,
    )


def _stack(leaves: tuple[Any, ...]) -> Any:
    on_host = all(isinstance(leaf, np.ndarray | np.generic) for leaf in leaves)
    return np.stack(leaves) if on_host else jnp.stack(leaves)


def _stack_sequences(sequences: tuple[Sequence, ...]) -> Sequence:
    capacity = max(sequence.capacity for sequence in sequences)

    def stack(*leaves: Any) -> Any:
        rows = max(capacity, *(leaf.shape[0] for leaf in leaves))
        return _stack(tuple(_pad(leaf, rows) for leaf in leaves))

    elements = jax.tree.map(stack, *(sequence.elements for sequence in sequences))
    starts = np.stack([sequence.start for sequence in sequences])
    lengths = np.stack([sequence.length for sequence in sequences])
    return Sequence(elements, cast(Any, starts), cast(Any, lengths), capacity)


def _pad(x: Any, rows: int) -> Any:
    numpy = np if isinstance(x, np.ndarray) else jnp
    return numpy.pad(x, [(0, rows - x.shape[0])] + [(0, 0)] * (x.ndim - 1))


def to_placed(value: Any, t: FederatedType, where: str) -> Federated:
    """Converts what a user passes for a federated parameter to a `Federated` value.

    Raises:
      FederatedTypeError: where placement, structure, dtype or shape do not fit.
    """
    if isinstance(value, Federated):
        check_federated(value, t, where)
        return value
    if t.placement is CLIENTS and not t.all_equal:
        return Federated(to_clients(value, t, where), CLIENTS)
    return Federated(to_member(value, t.member, where), t.placement, all_equal=True)


def check_federated(value: Federated, t: FederatedType, where: str) -> None:
    """Raises unless `value` may be passed for a parameter of type `t`."""
    check_runtime(t, type_of_federated(value, where), where)


def check_runtime(t: Type, given: Type, where: str) -> None:
    """Raises unless arrays of type `given` may be used as `t`, 64 bits as arrays have them."""
    check_fits(inference.runtime_type(t), inference.runtime_type(given), where)


def type_of_federated(value: Federated, where: str = "a value at CLIENTS") -> FederatedType:
    """The type of a concrete federated value, without the clients axis."""
    if value.placement is CLIENTS and not value.all_equal:
        return FederatedType(_member_type(value.value, where), CLIENTS, False)
    return FederatedType(inference.infer_type(value.value), value.placement, value.all_equal)


def _member_type(stacked: Any, where: str) -> Type:
    def member(x: Any) -> Any:
        if isinstance(x, Sequence):
            return x  # knows its own axes
        if not getattr(x, "shape", ()):
            raise FederatedTypeError(
                f"Expected arrays with a leading clients axis for {where}, got {x!r} without axes; "
                "stack one row a client, or pass all_equal=True."
            )
        return jax.ShapeDtypeStruct(x.shape[1:], x.dtype)

    is_sequence = lambda x: isinstance(x, Sequence)  # noqa: E731
    return inference.infer_type(jax.tree.map(member, stacked, is_leaf=is_sequence))

"""Tensors, structs of them, and the conversion of what specifies a type."""

import dataclasses
from collections import Counter
from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.base_types import Misfit, Type, differs, field_name, shorten, step_to
from fedjax_core.language.containers import (
    check_depth,
    default_container,
    differs_statically,
    one_level,
    plain_str,
)
from fedjax_core.language.dtypes import (
    Shape,
    as_dtype,
    as_shape,
    dtype_name,
    is_dtype_like,
    is_shape_assignable,
)


@dataclasses.dataclass(frozen=True, repr=False)
class TensorType(Type):
    """An array of `dtype` and `shape`.

    Args:
      dtype: anything NumPy or JAX takes as a dtype; PRNG keys have the dtype of their
        implementation.
      shape: a tuple of sizes, None for an unknown one; None alone when not even the rank is known.

    Raises:
      FederatedTypeError: for a dtype that JAX does not have, or a size that is no int from 0 on.

    Examples:
      >>> str(TensorType(np.int32, (2, None))), str(TensorType(np.int32, None))
      ('int32[2,?]', "'int32'(shape=None)")
    """

    dtype: Any
    shape: Shape = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", as_dtype(self.dtype))
        object.__setattr__(self, "shape", as_shape(self.shape))

    def __str__(self) -> str:
        name = dtype_name(self.dtype)
        if self.shape is None:
            return f"'{name}'(shape=None)"
        if not self.shape:
            return name
        return f"{name}[{','.join('?' if n is None else str(n) for n in self.shape)}]"

    def misfit(self, source: Type) -> Misfit | None:
        """See `Type.misfit`."""
        if (
            isinstance(source, TensorType)
            and self.dtype == source.dtype
            and is_shape_assignable(self.shape, source.shape)
        ):
            return None
        return differs(self, source)


@dataclasses.dataclass(frozen=True, init=False, repr=False)
class StructType(Type):
    """A struct with named or unnamed fields.

    Args:
      elements: types, or `(name, type)` pairs.
      container: the one-level `PyTreeDef` of the Python container that holds the fields; without
        one, a struct whose fields all have names is an OrderedDict, any other a tuple.

    Raises:
      FederatedTypeError: for fields that are no types, or share a name.

    Examples:
      >>> str(StructType([('a', np.int32), np.bool_, ('c', [])]))
      '<a=int32,bool,c=<>>'
    """

    elements: tuple[tuple[str | None, Type], ...]
    container: Any = dataclasses.field(hash=False)

    def __init__(self, elements: Any, container: Any = None) -> None:
        if isinstance(elements, str) or not hasattr(elements, "__iter__"):
            raise FederatedTypeError(
                f"Expected a list of types or (name, type) pairs, got {elements!r}."
            )
        pairs = tuple(_as_field(element) for element in elements)
        names = [name for name, _ in pairs]
        _check_distinct(names)
        if container is None:
            container = default_container(names)
        if container.num_leaves != len(pairs):
            raise FederatedTypeError(
                f"Expected a container of {len(pairs)} fields, got {container}; pass the "
                "jax.tree.structure of one level."
            )
        object.__setattr__(self, "elements", pairs)
        object.__setattr__(self, "container", container)

    def __str__(self) -> str:
        fields = (_with_name(name, str(t)) for name, t in self.elements)
        return f"<{','.join(fields)}>"

    def formatted(self) -> str:
        """See `Type.formatted`."""
        if not self.elements:
            return "<>"
        fields = (_with_name(name, t.formatted()) for name, t in self.elements)
        lines = ",\n".join(fields).replace("\n", "\n  ")
        return f"<\n  {lines}\n>"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return (t for _, t in self.elements)

    def misfit(self, source: Type) -> Misfit | None:
        """See `Type.misfit`."""
        if not isinstance(source, StructType):
            return differs(self, source)
        fields = zip(self.elements, source.elements, strict=False)
        for position, ((ours, target), (theirs, given)) in enumerate(fields):
            if theirs is not None and ours != theirs:
                return Misfit(f"[{position}]", _describe_name(ours), _describe_name(theirs))
            found = target.misfit(given)
            if found is not None:
                return found.inside(step_to(ours, position))
        if len(self.elements) != len(source.elements):
            return _other_length(self, source)
        if differs_statically(self.container, source.container):
            return Misfit("(static fields)", str(self.container), str(source.container))
        return None

    def names(self) -> list[str | None]:
        """The names of the fields, None for one without."""
        return [name for name, _ in self.elements]

    def position(self, key: str | int) -> int:
        """The position of the field called `key`, or at index `key`."""
        if isinstance(key, int):
            if not 0 <= key < len(self.elements):
                raise IndexError(
                    f"Expected an index from 0 to {len(self.elements) - 1} into {shorten(self)}, "
                    f"got {key}."
                )
            return key
        if key not in self.names():
            raise AttributeError(
                f"Expected one of the fields {shorten(self.names())} of {shorten(self)}, "
                f"got {key!r}."
            )
        return self.names().index(key)


def _with_name(name: str | None, text: str) -> str:
    return text if name is None else f"{field_name(name)}={text}"


def _describe_name(name: str | None) -> str:
    return "a field without a name" if name is None else f"a field called {name!r}"


def _other_length(target: StructType, source: StructType) -> Misfit:
    """For structs of which one is the beginning of the other: the first field too few or many."""
    position = min(len(target.elements), len(source.elements))

    def there(t: StructType) -> str:
        if position == len(t.elements):
            return "no further field"
        name, child = t.elements[position]
        return shorten(_with_name(name, str(child)))

    return Misfit(f"[{position}]", there(target), there(source))


def _check_distinct(names: list[str | None]) -> None:
    given = [name for name in names if name is not None]
    if len(set(given)) == len(given):
        return
    counts = Counter(given)
    repeated = sorted(name for name, count in counts.items() if count > 1)
    raise FederatedTypeError(
        f"Expected different names for the fields of a struct, got {repeated} more than once; "
        "rename them."
    )


def _as_field(element: Any, depth: int = 0) -> tuple[str | None, Type]:
    if _is_named_field(element):
        name, t = element
        name = None if name is None else plain_str(name)
        return name, StructType([]) if isinstance(t, list | tuple) and not t else _convert(t, depth)
    return None, _convert(element, depth)


def _is_named_field(element: Any) -> bool:
    is_pair = type(element) is tuple and len(element) == 2
    return is_pair and (element[0] is None or isinstance(element[0], str))


def _is_shape_like(value: Any) -> bool:
    sizes = None | int | float | np.number
    return value is None or (
        isinstance(value, list | tuple) and all(isinstance(n, sizes) for n in value)
    )


def to_type(spec: Any) -> Type:
    """Converts a specification of a type to a `Type`.

    Args:
      spec: a `Type`; a NumPy or JAX dtype; a `(dtype, shape)` pair; a `jax.ShapeDtypeStruct`; a
        list of `(name, spec)` pairs; or any pytree of these.

    Returns:
      The type; a pytree keeps its Python container.

    Raises:
      FederatedTypeError: for anything else, Python's `float` and concrete arrays among it, and for
        what is nested more than 100 deep, or contains itself.

    Examples:
      >>> str(to_type({"x": (np.float32, [784]), "y": np.int32}))
      '<x=float32[784],y=int32>'
    """
    return _convert(spec, 0)


def _convert(spec: Any, depth: int) -> Type:
    check_depth(depth, "a type, or a pytree of types,")
    if isinstance(spec, Type):
        return spec
    if isinstance(spec, jax.ShapeDtypeStruct):
        return TensorType(spec.dtype, spec.shape)
    if is_dtype_like(spec):
        return TensorType(spec)
    is_pair = type(spec) is tuple and len(spec) == 2  # a NamedTuple is a struct
    if is_pair and is_dtype_like(spec[0]) and _is_shape_like(spec[1]):
        return TensorType(spec[0], spec[1])
    if _is_named_field(spec):
        return StructType([_as_field(spec, depth + 1)])
    if isinstance(spec, list) and spec and all(_is_named_field(element) for element in spec):
        return StructType([_as_field(element, depth + 1) for element in spec])
    return _struct_type(spec, depth)


def _struct_type(spec: Any, depth: int) -> Type:
    if spec is None or isinstance(spec, type | np.ndarray | np.generic | jax.Array):
        raise FederatedTypeError(
            f"Expected a type such as np.float32 or (np.float32, [3]), got {spec!r}; for a value, "
            "use infer_type."
        )
    fields, container = one_level(spec)
    children = [(name, _convert(child, depth + 1)) for name, child in fields]
    return StructType(children, container)

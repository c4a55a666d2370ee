"""The types of a federated program, in the notation of TensorFlow Federated.

    float32[2,?]            a tensor; `?` is an unknown dimension
    <a=int32,bool>          a struct (any registered pytree), fields named or not
    float32*                a sequence: a client's examples
    {float32}@CLIENTS       a value that every client has its own of
    float32@CLIENTS         one that is the same at all clients, float32@SERVER at the server
    (T -> U), ( -> U)       a function

Types are immutable and compare by structure. `target.is_assignable_from(source)` follows TFF's
table: dtypes must agree, an unknown dimension takes a known one, a named struct takes an unnamed
  one,
`{T}@P` takes `T@P`, parameters of functions are contravariant.
"""

import abc
import dataclasses
from collections import OrderedDict
from collections.abc import Iterator
from typing import Any, Self, cast

import jax
import jax.numpy as jnp
import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.placements import SERVER, Placement

Shape = tuple[int | None, ...] | None


class Type(abc.ABC):
    """Base of all types; `str(t)` is the compact notation."""

    @abc.abstractmethod
    def __str__(self) -> str: ...

    @abc.abstractmethod
    def is_assignable_from(self, source: "Type") -> bool:
        """Whether a value of type `source` may be used where `self` is expected."""

    def children(self) -> Iterator["Type"]:
        """The types that this one is directly made of."""
        return iter(())

    def is_equivalent_to(self, other: "Type") -> bool:
        """Whether the two types are assignable in both directions."""
        return self.is_assignable_from(other) and other.is_assignable_from(self)

    def check_assignable_from(self, source: "Type", what: str = "the value") -> Self:
        """Raises `FederatedTypeError` unless `self` is assignable from `source`."""
        if not self.is_assignable_from(source):
            raise FederatedTypeError(
                f"Expected {what} to be assignable to type {self}, got type {source}."
            )
        return self

    def contains(self, kind: "type[Type]") -> bool:
        """Whether this type, or one inside it, is an instance of `kind`."""
        return isinstance(self, kind) or any(child.contains(kind) for child in self.children())


@dataclasses.dataclass(frozen=True)
class TensorType(Type):
    """An array of `dtype` and `shape`.

    Args:
      dtype: anything NumPy or JAX takes as a dtype; PRNG keys have the dtype of their
        implementation.
      shape: a tuple of sizes, None for an unknown one; None alone when not even the rank is known.

    Examples:
      >>> str(TensorType(np.int32, (2, None)))
      'int32[2,?]'
    """

    dtype: Any
    shape: Shape = ()

    def __post_init__(self) -> None:
        object.__setattr__(self, "dtype", _as_dtype(self.dtype))
        if self.shape is not None:
            object.__setattr__(self, "shape", tuple(self.shape))

    def __str__(self) -> str:
        name = "str" if is_str(self.dtype) else str(self.dtype)
        if self.shape is None:
            return f"{name}(shape=None)"
        if not self.shape:
            return name
        return f"{name}[{','.join('?' if n is None else str(n) for n in self.shape)}]"

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        return (
            isinstance(source, TensorType)
            and self.dtype == source.dtype
            and is_shape_assignable(self.shape, source.shape)
        )


def is_shape_assignable(target: Shape, source: Shape) -> bool:
    """Whether an array of shape `source` fits where `target` is expected."""
    if target is None:
        return True
    if source is None or len(target) != len(source):
        return False
    return all(t is None or t == s for t, s in zip(target, source, strict=True))


@dataclasses.dataclass(frozen=True, init=False)
class StructType(Type):
    """A struct with named or unnamed fields.

    Args:
      elements: types, or `(name, type)` pairs.
      container: the one-level `PyTreeDef` of the Python container that holds the fields; without
        one, a struct whose fields all have names is an OrderedDict, any other a tuple.

    Examples:
      >>> str(StructType([('a', np.int32), np.bool_, ('c', [])]))
      '<a=int32,bool,c=<>>'
    """

    elements: tuple[tuple[str | None, Type], ...]
    container: Any

    def __init__(self, elements: Any, container: Any = None) -> None:
        pairs = tuple(_as_field(element) for element in elements)
        names = [name for name, _ in pairs if name is not None]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise FederatedTypeError(
                f"Expected different names for the fields of a struct, got {repeated} more than "
                "once; rename them."
            )
        object.__setattr__(self, "elements", pairs)
        object.__setattr__(self, "container", container or _default_container(pairs))

    def __str__(self) -> str:
        fields = (f"{name}={t}" if name else str(t) for name, t in self.elements)
        return f"<{','.join(fields)}>"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return (t for _, t in self.elements)

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        if not isinstance(source, StructType) or len(self.elements) != len(source.elements):
            return False
        return all(
            (theirs is None or ours == theirs) and target.is_assignable_from(given)
            for (ours, target), (theirs, given) in zip(self.elements, source.elements, strict=True)
        )

    def names(self) -> list[str | None]:
        """The names of the fields, None for one without."""
        return [name for name, _ in self.elements]

    def position(self, key: str | int) -> int:
        """The position of the field called `key`, or at index `key`."""
        if isinstance(key, int):
            if not 0 <= key < len(self.elements):
                raise IndexError(
                    f"Expected an index from 0 to {len(self.elements) - 1} into {self}, got {key}."
                )
            return key
        if key not in self.names():
            raise AttributeError(
                f"Expected one of the fields {self.names()} of {self}, got {key!r}."
            )
        return self.names().index(key)


@dataclasses.dataclass(frozen=True)
class SequenceType(Type):
    """A client's examples, each of type `element`; as a value, a `Sequence`.

    Examples:
      >>> str(SequenceType(np.float32))
      'float32*'
    """

    element: Type

    def __post_init__(self) -> None:
        object.__setattr__(self, "element", to_type(self.element))
        _refuse_inside(self.element, "a sequence", (FederatedType, FunctionType, SequenceType))

    def __str__(self) -> str:
        return f"{self.element}*"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return iter((self.element,))

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        return isinstance(source, SequenceType) and self.element.is_assignable_from(source.element)


@dataclasses.dataclass(frozen=True)
class FederatedType(Type):
    """A value of type `member` at a placement.

    Args:
      member: the type of one member's value.
      placement: `CLIENTS` or `SERVER`.
      all_equal: whether all members hold the same value; by default only at the server.

    Examples:
      >>> str(FederatedType(np.float32, Placement.CLIENTS)), str(FederatedType(np.float32, SERVER))
      ('{float32}@CLIENTS', 'float32@SERVER')
    """

    member: Type
    placement: Placement
    all_equal: bool = cast(bool, None)

    def __post_init__(self) -> None:
        if not isinstance(self.placement, Placement):
            raise FederatedTypeError(
                f"Expected CLIENTS or SERVER as the placement, got {self.placement!r}."
            )
        object.__setattr__(self, "member", to_type(self.member))
        _refuse_inside(self.member, "a federated type", (FederatedType, FunctionType))
        if self.all_equal is None:
            object.__setattr__(self, "all_equal", self.placement is SERVER)

    def __str__(self) -> str:
        member = str(self.member) if self.all_equal else f"{{{self.member}}}"
        return f"{member}@{self.placement}"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return iter((self.member,))

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        return (
            isinstance(source, FederatedType)
            and self.placement is source.placement
            and (source.all_equal or not self.all_equal)
            and self.member.is_assignable_from(source.member)
        )


@dataclasses.dataclass(frozen=True)
class FunctionType(Type):
    """A function from `parameter` (None if it takes nothing) to `result`.

    Examples:
      >>> str(FunctionType(None, np.int32))
      '( -> int32)'
    """

    parameter: Type | None
    result: Type

    def __post_init__(self) -> None:
        if self.parameter is not None:
            object.__setattr__(self, "parameter", to_type(self.parameter))
        object.__setattr__(self, "result", to_type(self.result))

    def __str__(self) -> str:
        return f"({'' if self.parameter is None else self.parameter} -> {self.result})"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return iter((self.result,) if self.parameter is None else (self.parameter, self.result))

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        if not isinstance(source, FunctionType):
            return False
        if self.parameter is None or source.parameter is None:
            parameters_fit = self.parameter is source.parameter
        else:
            parameters_fit = source.parameter.is_assignable_from(self.parameter)
        return parameters_fit and self.result.is_assignable_from(source.result)


@dataclasses.dataclass(frozen=True)
class AbstractType(Type):
    """A type variable in the signature of a generic operator.

    Examples:
      >>> str(FunctionType(AbstractType("T"), AbstractType("U")))
      '(T -> U)'
    """

    label: str

    def __str__(self) -> str:
        return self.label

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        raise FederatedTypeError("Abstract types are not comparable.")


@dataclasses.dataclass(frozen=True)
class PlacementType(Type):
    """The type of placements themselves.

    Examples:
      >>> str(PlacementType())
      'placement'
    """

    def __str__(self) -> str:
        return "placement"

    def is_assignable_from(self, source: Type) -> bool:
        """See `Type.is_assignable_from`."""
        return isinstance(source, PlacementType)


def is_extended_dtype(dtype: Any) -> bool:
    """Whether `dtype` is one of JAX's own, such as that of PRNG keys."""
    scalar_type = getattr(dtype, "type", None)
    return isinstance(scalar_type, type) and issubclass(scalar_type, jax.dtypes.extended)


def _as_dtype(dtype: Any) -> Any:
    if is_extended_dtype(dtype):
        return dtype
    try:
        dtype = np.dtype(dtype)
    except TypeError as error:
        raise FederatedTypeError(
            f"Expected a dtype such as np.float32, got {dtype!r} of type {type(dtype).__name__}."
        ) from error
    if dtype.kind in "US":
        return np.dtype(str)
    if dtype.kind in "OMm" or dtype.type is np.void:  # bfloat16 is of kind V too
        raise FederatedTypeError(f"Expected a dtype that JAX has, got {dtype}.")
    return dtype


def is_str(dtype: Any) -> bool:
    """Whether `dtype` is that of strings on the host."""
    return isinstance(dtype, np.dtype) and dtype.kind == "U"


def _as_field(element: Any) -> tuple[str | None, Type]:
    if _is_named_field(element):
        name, t = element
        return name, StructType([]) if isinstance(t, list | tuple) and not t else to_type(t)
    return None, to_type(element)


def _is_named_field(element: Any) -> bool:
    is_pair = isinstance(element, tuple) and len(element) == 2
    return is_pair and (element[0] is None or isinstance(element[0], str))


def _refuse_inside(t: Type, what: str, kinds: tuple[type[Type], ...]) -> None:
    for kind in kinds:
        if t.contains(kind):
            raise MisplacedTypeError(f"Expected no {kind.__name__} inside {what}, got {t}.")


class MisplacedTypeError(FederatedTypeError, ValueError):
    """A type where it may not stand; a `ValueError` too, as in TFF."""


def _default_container(pairs: tuple[tuple[str | None, Type], ...]) -> Any:
    if pairs and all(name is not None for name, _ in pairs):
        return jax.tree.structure(OrderedDict((name, 0) for name, _ in pairs))
    return jax.tree.structure(tuple(0 for _ in pairs))


def _is_dtype_like(value: Any) -> bool:
    if isinstance(value, np.dtype) or is_extended_dtype(value):
        return True
    if type(value) is type(jnp.float32):
        return True
    return isinstance(value, type) and issubclass(value, np.generic)


def _is_shape_like(value: Any) -> bool:
    return value is None or (
        isinstance(value, list | tuple) and all(n is None or type(n) is int for n in value)
    )


def one_level(tree: Any) -> tuple[list[tuple[str | None, Any]], Any]:
    """The children of a pytree node as `(name or None, child)`, and its one-level `PyTreeDef`.

    Raises `FederatedTypeError` for a leaf.
    """
    paths, container = jax.tree_util.tree_flatten_with_path(tree, is_leaf=lambda y: y is not tree)
    if any(not path for path, _ in paths):
        raise FederatedTypeError(
            f"Expected a registered pytree or an array, got {tree!r} of type {type(tree).__name__}."
        )
    return [(_name_of(path[0]), child) for path, child in paths], container


def _name_of(key: Any) -> str | None:
    if isinstance(key, jax.tree_util.GetAttrKey):
        return key.name
    if isinstance(key, jax.tree_util.DictKey):
        return str(key.key)
    return None


def to_type(spec: Any) -> Type:
    """Converts a specification of a type to a `Type`.

    Args:
      spec: a `Type`; a NumPy or JAX dtype; a `(dtype, shape)` pair; a `jax.ShapeDtypeStruct`; a
        list of `(name, spec)` pairs; or any pytree of these.

    Returns:
      The type; a pytree keeps its Python container.

    Raises:
      FederatedTypeError: for anything else, Python's `float` and concrete arrays among it.

    Examples:
      >>> str(to_type({"x": (np.float32, [784]), "y": np.int32}))
      '<x=float32[784],y=int32>'
    """
    if isinstance(spec, Type):
        return spec
    if isinstance(spec, jax.ShapeDtypeStruct):
        return TensorType(spec.dtype, spec.shape)
    if _is_dtype_like(spec):
        return TensorType(spec)
    if (
        isinstance(spec, tuple)
        and len(spec) == 2
        and _is_dtype_like(spec[0])
        and _is_shape_like(spec[1])
    ):
        return TensorType(spec[0], spec[1])
    if _is_named_field(spec):
        return StructType([spec])
    if isinstance(spec, list) and spec and all(_is_named_field(element) for element in spec):
        return StructType(spec)
    return _struct_type(spec)


def _struct_type(spec: Any) -> Type:
    if spec is None or isinstance(spec, type | np.ndarray | np.generic | jax.Array):
        raise FederatedTypeError(
            f"Expected a type such as np.float32 or (np.float32, [3]), got {spec!r}; for a value, "
            "use infer_type."
        )
    fields, container = one_level(spec)
    return StructType([(name, to_type(child)) for name, child in fields], container)

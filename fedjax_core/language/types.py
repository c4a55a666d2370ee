"""The types of a federated program, in the notation of TensorFlow Federated.

    float32[2,?]            a tensor; `?` is an unknown dimension
    'float32'(shape=None)   one of which not even the rank is known
    <a=int32,bool>          a struct (any registered pytree), fields named or not
    float32*                a sequence: a client's examples
    {float32}@CLIENTS       a value that every client has its own of
    float32@CLIENTS         one that is the same at all clients, float32@SERVER at the server
    (T -> U), ( -> U)       a function

The name of a field that is no identifier is quoted: `<'Dense_0/kernel'=float32>`.

Types are immutable and compare by structure. `target.is_assignable_from(source)` follows TFF's
table: dtypes must agree, an unknown dimension takes a known one, a named struct takes an unnamed
one, `{T}@P` takes `T@P`, parameters of functions are contravariant.
"""

import dataclasses
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any, cast

import numpy as np

from fedjax_core.errors import FederatedTypeError
from fedjax_core.errors import MisplacedTypeError as MisplacedTypeError
from fedjax_core.language.base_types import PLAIN_NAME, differs, shorten
from fedjax_core.language.base_types import Misfit as Misfit
from fedjax_core.language.base_types import Type as Type
from fedjax_core.language.containers import one_level as one_level
from fedjax_core.language.containers import plain_str
from fedjax_core.language.dtypes import Shape as Shape
from fedjax_core.language.dtypes import is_extended_dtype as is_extended_dtype
from fedjax_core.language.dtypes import is_shape_assignable as is_shape_assignable
from fedjax_core.language.dtypes import is_shape_compatible as is_shape_compatible
from fedjax_core.language.dtypes import is_str as is_str
from fedjax_core.language.placements import SERVER, Placement
from fedjax_core.language.structs import StructType as StructType
from fedjax_core.language.structs import TensorType as TensorType
from fedjax_core.language.structs import to_type as to_type


@dataclasses.dataclass(frozen=True, repr=False)
class SequenceType(Type):
    """A client's examples, each of type `element`; as a value, a `Sequence`.

    Raises:
      MisplacedTypeError: for federated types, functions and sequences among the elements.

    Examples:
      >>> str(SequenceType(np.float32))
      'float32*'
    """

    element: Type

    if TYPE_CHECKING:  # what is no type is converted

        def __init__(self, element: Any) -> None: ...

    def __post_init__(self) -> None:
        object.__setattr__(self, "element", to_type(self.element))
        _refuse_inside(self.element, "a sequence", (FederatedType, FunctionType, SequenceType))

    def __str__(self) -> str:
        return f"{self.element}*"

    def formatted(self) -> str:
        """See `Type.formatted`."""
        return f"{self.element.formatted()}*"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return iter((self.element,))

    def misfit(self, source: Type) -> Misfit | None:
        """See `Type.misfit`."""
        if not isinstance(source, SequenceType):
            return differs(self, source)
        found = self.element.misfit(source.element)
        return None if found is None else found.inside("[*]")


@dataclasses.dataclass(frozen=True, repr=False)
class FederatedType(Type):
    """A value of type `member` at a placement.

    Args:
      member: the type of one member's value.
      placement: `CLIENTS` or `SERVER`.
      all_equal: whether all members hold the same value; by default only at the server.

    Raises:
      FederatedTypeError: for what is no placement.
      MisplacedTypeError: for federated types and functions inside `member`.

    Examples:
      >>> str(FederatedType(np.float32, Placement.CLIENTS)), str(FederatedType(np.float32, SERVER))
      ('{float32}@CLIENTS', 'float32@SERVER')
    """

    member: Type
    placement: Placement
    all_equal: bool = cast(bool, None)

    if TYPE_CHECKING:  # what is no type is converted

        def __init__(
            self, member: Any, placement: Placement, all_equal: bool | None = None
        ) -> None: ...

    def __post_init__(self) -> None:
        if not isinstance(self.placement, Placement):
            raise FederatedTypeError(
                f"Expected CLIENTS or SERVER as the placement, got {self.placement!r}."
            )
        if not isinstance(self.all_equal, bool | np.bool_ | None):
            raise FederatedTypeError(
                f"Expected True, False or None as all_equal, got {self.all_equal!r}."
            )
        object.__setattr__(self, "member", to_type(self.member))
        _refuse_inside(self.member, "a federated type", (FederatedType, FunctionType))
        is_same = self.placement is SERVER if self.all_equal is None else bool(self.all_equal)
        object.__setattr__(self, "all_equal", is_same)

    def __str__(self) -> str:
        return self._placed(str(self.member))

    def formatted(self) -> str:
        """See `Type.formatted`."""
        return self._placed(self.member.formatted())

    def _placed(self, member: str) -> str:
        return f"{member if self.all_equal else f'{{{member}}}'}@{self.placement}"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return iter((self.member,))

    def misfit(self, source: Type) -> Misfit | None:
        """See `Type.misfit`."""
        if (
            isinstance(source, FederatedType)
            and self.placement is source.placement
            and (source.all_equal or not self.all_equal)
        ):
            return self.member.misfit(source.member)
        return differs(self, source)


@dataclasses.dataclass(frozen=True, repr=False)
class FunctionType(Type):
    """A function from `parameter` (None if it takes nothing) to `result`.

    Examples:
      >>> str(FunctionType(None, np.int32))
      '( -> int32)'
    """

    parameter: Type | None
    result: Type

    if TYPE_CHECKING:  # what is no type is converted

        def __init__(self, parameter: Any, result: Any) -> None: ...

    def __post_init__(self) -> None:
        if self.parameter is not None:
            object.__setattr__(self, "parameter", to_type(self.parameter))
        object.__setattr__(self, "result", to_type(self.result))

    def __str__(self) -> str:
        return f"({'' if self.parameter is None else self.parameter} -> {self.result})"

    def formatted(self) -> str:
        """See `Type.formatted`."""
        parameter = "" if self.parameter is None else self.parameter.formatted()
        return f"({parameter} -> {self.result.formatted()})"

    def children(self) -> Iterator[Type]:
        """See `Type.children`."""
        return iter((self.result,) if self.parameter is None else (self.parameter, self.result))

    def misfit(self, source: Type) -> Misfit | None:
        """See `Type.misfit`."""
        if not isinstance(source, FunctionType):
            return differs(self, source)
        if (self.parameter is None) is not (source.parameter is None):
            return differs(self, source)
        if self.parameter is not None and source.parameter is not None:
            found = source.parameter.misfit(self.parameter)
            if found is not None:
                return found.turned().inside("(parameter)")
        found = self.result.misfit(source.result)
        return None if found is None else found.inside("(result)")


@dataclasses.dataclass(frozen=True, repr=False)
class AbstractType(Type):
    """A type variable in the signature of a generic operator.

    Args:
      label: an identifier that begins with an upper-case letter; dtypes begin with a lower one.

    Examples:
      >>> str(FunctionType(AbstractType("T"), AbstractType("U")))
      '(T -> U)'
    """

    label: str

    def __post_init__(self) -> None:
        if not is_label(self.label):
            raise FederatedTypeError(
                "Expected an identifier with an upper-case first letter, such as T, as the label "
                f"of an abstract type, got {self.label!r}."
            )
        object.__setattr__(self, "label", plain_str(self.label))

    def __str__(self) -> str:
        return self.label

    def misfit(self, source: Type) -> Misfit | None:
        """Raises `FederatedTypeError`: which type this stands for is not known."""
        raise FederatedTypeError("Abstract types are not comparable.")


def is_label(label: Any) -> bool:
    """Whether `label` can be that of an abstract type."""
    return isinstance(label, str) and bool(PLAIN_NAME.fullmatch(label)) and label[0].isupper()


@dataclasses.dataclass(frozen=True, repr=False)
class PlacementType(Type):
    """The type of placements themselves.

    Examples:
      >>> str(PlacementType())
      'placement'
    """

    def __str__(self) -> str:
        return "placement"

    def misfit(self, source: Type) -> Misfit | None:
        """See `Type.misfit`."""
        return None if isinstance(source, PlacementType) else differs(self, source)


def _refuse_inside(t: Type, what: str, kinds: tuple[type[Type], ...]) -> None:
    if t.contains(*kinds):
        found = next(kind for kind in kinds if t.contains(kind))
        raise MisplacedTypeError(f"Expected no {found.__name__} inside {what}, got {shorten(t)}.")

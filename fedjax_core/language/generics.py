"""Generic types: which types the labels in `<(T -> U),{T}@CLIENTS> -> {U}@CLIENTS` stand for.

A label is *defined* where a caller provides a value of its type: in the parameter of a function, in
the result of a function that is itself a parameter, and so on, turning with each step into a
parameter. There it has to be one and the same type everywhere. In the other places, where a value
of that type is used, the concrete type may be a wider one that is assignable from it.
"""

from typing import NamedTuple, NoReturn

from fedjax_core.errors import FederatedTypeError
from fedjax_core.language.base_types import Type, at_path, shorten, step_to
from fedjax_core.language.types import (
    AbstractType,
    FederatedType,
    FunctionType,
    SequenceType,
    StructType,
)


class NotConcreteTypeError(FederatedTypeError):
    """There is a label in a type that should have none."""


class MismatchedStructureError(FederatedTypeError):
    """A concrete type that is made up differently than the generic one."""


class MissingDefiningUsageError(FederatedTypeError):
    """A label that no parameter of the generic type defines."""


class MismatchedConcreteTypesError(FederatedTypeError):
    """A label that is defined as two different types."""


class UnassignableConcreteTypesError(FederatedTypeError):
    """A label that is used as a type that is not assignable from the one it is defined as."""


class _Usage(NamedTuple):
    """A place at which a label stands, and the type that the concrete type has there."""

    label: str
    concrete: Type
    path: str
    is_defining: bool


def check_concrete_instance_of(concrete: Type, generic: Type) -> dict[str, Type]:
    """Finds the types for which the labels in a generic type stand.

    Args:
      concrete: a type without labels, most often that of a function.
      generic: a type with labels.

    Returns:
      The type of each label of `generic`, in the order of their definitions.

    Raises:
      NotConcreteTypeError: if there is a label in `concrete`.
      MismatchedStructureError: where the two differ otherwise than in labels.
      MissingDefiningUsageError: for a label that no parameter defines.
      MismatchedConcreteTypesError: for one that is defined as two different types.
      UnassignableConcreteTypesError: for one that is used as a type that does not fit.

    Examples:
      >>> from fedjax_core.language.notation import parse_type
      >>> concrete = parse_type("(<(int32 -> bool),{int32}@CLIENTS> -> {bool}@CLIENTS)")
      >>> generic = parse_type("(<(T -> U),{T}@CLIENTS> -> {U}@CLIENTS)")
      >>> {label: str(t) for label, t in check_concrete_instance_of(concrete, generic).items()}
      {'U': 'bool', 'T': 'int32'}
    """
    for name, t in (("concrete", concrete), ("generic", generic)):
        if not isinstance(t, Type):
            raise FederatedTypeError(
                f"Expected a type as `{name}`, got {t!r} of type {type(t).__name__}; convert it "
                "with to_type or parse_type."
            )
    if concrete.contains(AbstractType):
        raise NotConcreteTypeError(
            f"Expected a type without labels, got {shorten(concrete)}; replace its labels by types."
        )
    usages = list(_usages(concrete, generic, "", False))
    bindings = _bindings([usage for usage in usages if usage.is_defining])
    for usage in usages:
        if not usage.is_defining:
            _check_usage(usage, bindings, generic)
    return bindings


def _usages(concrete: Type, generic: Type, path: str, is_defining: bool) -> list[_Usage]:
    """Every place at which a label stands in `generic`, in the order of reading."""
    if isinstance(generic, AbstractType):
        return [_Usage(generic.label, concrete, path, is_defining)]
    found = []
    for step, is_turning, theirs, ours in _parts(concrete, generic, path):
        found += _usages(theirs, ours, path + step, is_defining is not is_turning)
    return found


def _parts(concrete: Type, generic: Type, path: str) -> list[tuple[str, bool, Type, Type]]:
    """The step to each pair of corresponding children, and whether it is into a parameter."""
    match generic, concrete:
        case StructType(), StructType() if generic.names() == concrete.names():
            fields = zip(generic.elements, concrete.children(), strict=True)
            return [
                (step_to(name, position), False, theirs, ours)
                for position, ((name, ours), theirs) in enumerate(fields)
            ]
        case SequenceType(ours), SequenceType(theirs):
            return [("[*]", False, theirs, ours)]
        case FederatedType(), FederatedType():
            if (generic.placement, generic.all_equal) == (concrete.placement, concrete.all_equal):
                return [("", False, concrete.member, generic.member)]
        case FunctionType(None, ours), FunctionType(None, theirs):
            return [("(result)", False, theirs, ours)]
        case FunctionType(Type() as wanted, ours), FunctionType(Type() as given, theirs):
            return [("(parameter)", True, given, wanted), ("(result)", False, theirs, ours)]
        case _ if not list(generic.children()) and generic.is_equivalent_to(concrete):
            return []
    _refuse_structure(concrete, generic, path)


def _refuse_structure(concrete: Type, generic: Type, path: str) -> NoReturn:
    raise MismatchedStructureError(
        f"Expected a type of the form {shorten(generic)}{at_path(path)}, got {shorten(concrete)}."
    )


def _bindings(defining: list[_Usage]) -> dict[str, Type]:
    bindings: dict[str, Type] = {}
    for label, concrete, path, _ in defining:
        bound = bindings.setdefault(label, concrete)
        if not bound.is_equivalent_to(concrete):
            raise MismatchedConcreteTypesError(
                f"Expected one type for {label} in all parameters, got {shorten(bound)} and, "
                f"later,{at_path(path)} {shorten(concrete)}; give both the same type."
            )
    return bindings


def _check_usage(usage: _Usage, bindings: dict[str, Type], generic: Type) -> None:
    label, concrete, path, _ = usage
    if label not in bindings:
        raise MissingDefiningUsageError(
            f"Expected {label} in a parameter of {shorten(generic)}, where the caller defines it, "
            f"but it stands only{at_path(path) or ' at its root'}."
        )
    if not concrete.is_assignable_from(bindings[label]):
        raise UnassignableConcreteTypesError(
            f"Expected a type that is assignable from {label} = {shorten(bindings[label])}"
            f"{at_path(path)}, got {shorten(concrete)}."
        )
